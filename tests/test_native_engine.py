"""The native engine: the transformers engine's completions, with less work."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from captures import record
from distributed_runs import on_two_ranks
from tiny_engines import CASES, KEY, MODELS, PROMPTS, TOKENIZER, assert_same, batch_of, tiny_policy
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel

from lightning_grpo.adapters import Lora
from lightning_grpo.generation import (
    NativeEngine,
    Sampling,
    TransformersEngine,
    build_engine,
    decode_loop,
)
from lightning_grpo.generation.cached_decoder import CachedDecoder
from lightning_grpo.generation.decoder import Lengths
from lightning_grpo.generation.fused_decoder import FusedDecoder
from lightning_grpo.generation.pooled_decoder import PooledDecoder
from lightning_grpo.policy import load_policy
from lightning_grpo.sharding import shard_policy


@pytest.mark.parametrize("name", MODELS)
def test_completions_are_those_of_the_transformers_engine(name: str):
    policy, batch = tiny_policy(name), batch_of(PROMPTS)
    choices: list[Any] = [None]
    if MODELS[name][2] == "fused":
        choices.append({"cached": CachedDecoder})
    for case, (eos, sampling, max_rows) in CASES.items():
        expected = TransformersEngine(policy, TOKENIZER, eos).generate(batch, sampling, 4, key=KEY)
        for decoders in choices:
            engine = NativeEngine(policy, TOKENIZER, eos, max_rows=max_rows, decoders=decoders)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                drawn = engine.generate(batch, sampling, 4, key=KEY)
            assert engine.decoder_name == (MODELS[name][2] if decoders is None else "cached"), case
            assert_same(drawn, expected)


def test_one_completion_of_each_prompt_and_prompts_of_one_token():
    policy, batch = tiny_policy(), batch_of(["3", "4", "=", "3"])
    sampling = Sampling(max_completion_tokens=10)
    expected = TransformersEngine(policy, TOKENIZER, [1]).generate(batch, sampling, 1, key=KEY)
    assert_same(
        NativeEngine(policy, TOKENIZER, [1]).generate(batch, sampling, 1, key=KEY), expected
    )


@pytest.mark.parametrize("decoder", [FusedDecoder, CachedDecoder])
def test_adapters_are_applied_on_the_side(char_model: str, decoder: Any):
    policy = load_policy(char_model, num_tokens=len(TOKENIZER), lora=Lora(rank=4)).eval()
    batch, sampling = batch_of(PROMPTS), Sampling(max_completion_tokens=10)
    base = NativeEngine(policy, TOKENIZER, [1]).generate(batch, sampling, 4, key=KEY)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.normal_(std=0.5)
    weights = {k: v.clone() for k, v in policy.state_dict().items()}
    engine = NativeEngine(policy, TOKENIZER, [1], decoders={"this": decoder})
    drawn = engine.generate(batch, sampling, 4, key=KEY)
    expected = TransformersEngine(policy, TOKENIZER, [1]).generate(batch, sampling, 4, key=KEY)
    assert engine.decoder_name == "this"
    assert_same(drawn, expected)
    assert not torch.equal(drawn.completion_ids, base.completion_ids)
    assert all(torch.equal(v, weights[k]) for k, v in policy.state_dict().items())


@pytest.mark.parametrize("decoder", [FusedDecoder, CachedDecoder])
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_other_precisions_are_close_to_a_plain_forward(
    char_model: str, decoder: Any, precision: str
):
    policy = load_policy(char_model, num_tokens=len(TOKENIZER)).eval()
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    policy = policy.to(dtype)
    torch.set_default_dtype(dtype)  # as Lightning does for a true precision
    sampling = Sampling(max_completion_tokens=9)
    engine = NativeEngine(policy, TOKENIZER, [1], decoders={"this": decoder}, max_rows=7)
    plain = TransformersEngine(policy, TOKENIZER, [1])
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            drawn = engine.generate(batch_of(PROMPTS), sampling, 4, key=KEY)
            expected = plain.generate(batch_of(PROMPTS), sampling, 4, key=KEY)
    finally:
        torch.set_default_dtype(torch.float32)
    assert engine.decoder_name == "this"
    assert drawn.sampler_logprobs.dtype == torch.float32
    first = (drawn.sampler_logprobs - expected.sampler_logprobs)[:, 0]
    assert float(first.abs().max()) < 0.05
    if precision == "64-true":
        assert_same(drawn, expected)


@pytest.mark.parametrize("decoder", [FusedDecoder, CachedDecoder])
def test_neither_compaction_nor_refill_nor_late_checks_change_a_result(
    decoder: Any, monkeypatch: pytest.MonkeyPatch
):
    policy, batch = tiny_policy("qwen2-tied"), batch_of(PROMPTS)
    sampling = Sampling(max_completion_tokens=25)
    found = []
    compactions = set()
    for share, check_every, max_rows in [
        (0.0, 1, 0),
        (0.75, 1, 0),
        (1.0, 1, 0),
        (0.75, 7, 0),
        (0.75, 7, 6),
        (1.0, 40, 1),
    ]:
        monkeypatch.setattr(decode_loop, "_COMPACT_BELOW", share)
        monkeypatch.setitem(decode_loop._CHECK_EVERY, "cpu", check_every)
        monkeypatch.setattr(decode_loop, "_MAX_PREFILL_TOKENS", 16384 if max_rows else 20)
        engine = NativeEngine(
            policy, TOKENIZER, [1, 2, 3, 4], max_rows=max_rows, decoders={"this": decoder}
        )
        found.append(engine.generate(batch, sampling, 5, key=KEY))
        compactions.add(engine.counts.num_compactions)
    assert len(compactions) > 2 and 0 in compactions
    for other in found[1:]:
        assert_same(found[0], other)


def test_rows_that_run_on_stay_within_learned_positions(monkeypatch: pytest.MonkeyPatch):
    # Prompt and completion fill the positions. Rows start at different times, and those that have
    # ended stay until all but a few have.
    monkeypatch.setitem(decode_loop._CHECK_EVERY, "cpu", 16)
    monkeypatch.setattr(decode_loop, "_COMPACT_BELOW", 0.6)
    policy, sampling = tiny_policy("gpt2"), Sampling(max_completion_tokens=32)
    batch = batch_of([PROMPTS[2]])
    engine = NativeEngine(policy, TOKENIZER, [1], max_rows=8)
    drawn = engine.generate(batch, sampling, 40, key=KEY)
    assert bool(drawn.truncated.any()) and not bool(drawn.truncated.all())
    assert engine.decoder_name == "cached"
    assert_same(
        drawn, TransformersEngine(policy, TOKENIZER, [1]).generate(batch, sampling, 40, key=KEY)
    )


@pytest.mark.parametrize("name", ["qwen2-tied", "gpt2"])
def test_a_change_of_the_weights_is_seen_by_the_next_rollout(name: str):
    policy, batch = tiny_policy(name), batch_of(PROMPTS)
    sampling = Sampling(max_completion_tokens=8)
    engine = NativeEngine(policy, TOKENIZER, [1])
    before = engine.generate(batch, sampling, 4, key=KEY)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter))
    after = engine.generate(batch, sampling, 4, key=KEY)
    expected = TransformersEngine(policy, TOKENIZER, [1]).generate(batch, sampling, 4, key=KEY)
    assert not torch.equal(before.sampler_logprobs[:, 0], after.sampler_logprobs[:, 0])
    assert_same(after, expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_the_distribution_that_is_reported(temperature: float):
    policy = tiny_policy()
    policy.num_tokens = 12
    sampling = Sampling(temperature, max_completion_tokens=1)
    group_size = 4000
    drawn = NativeEngine(policy, TOKENIZER, []).generate(
        batch_of(["12="]), sampling, group_size, key=KEY
    )
    tokens = drawn.completion_ids[:, 0]
    ids = torch.tensor([TOKENIZER("12=").input_ids])
    with torch.no_grad():
        logits = policy.model(ids).logits[0, -1, :12]
    probabilities = (logits / temperature).softmax(-1)
    reported = drawn.sampler_logprobs[:, 0].exp()
    assert torch.allclose(reported, probabilities[tokens], atol=1e-5)
    counts, expected = torch.bincount(tokens, minlength=12), probabilities * group_size
    often = expected >= 5
    rest = torch.stack([counts[~often].sum(), expected[~often].sum()])
    chi_square = float(((counts - expected) ** 2 / expected)[often].sum())
    if rest[1] > 0:
        chi_square += float((rest[0] - rest[1]) ** 2 / rest[1].clamp(min=1))
    assert chi_square < 31.3  # 99.9 % quantile of chi square with 11 degrees of freedom


def test_a_batch_without_prompts_may_come_after_others():
    engine = NativeEngine(tiny_policy(), TOKENIZER, [1])
    for texts in (PROMPTS, []):
        drawn = engine.generate(batch_of(texts), Sampling(max_completion_tokens=3), 2, key=KEY)
        assert len(drawn.completion_ids) == 2 * len(texts)


def test_a_prompt_runs_once_however_many_completions_it_gets():
    policy = tiny_policy()
    batch = batch_of(["123456", "12=456", "123456", "777777"])
    sampling = Sampling(max_completion_tokens=5)
    engine = NativeEngine(policy, TOKENIZER, [])
    engine.generate(batch, sampling, 8, key=KEY)
    counts = engine.counts
    assert (counts.num_prefills, counts.num_prefill_tokens) == (1, 3 * 6)
    assert (counts.num_steps, counts.num_row_steps) == (4, 4 * 32)
    # Keys and values in float32, of 2 layers with 2 heads of 8 numbers.
    assert counts.max_kv_bytes == 2 * 2 * 2 * 8 * 4 * (3 * 6 + 32 * 5)
    engine = NativeEngine(policy, TOKENIZER, [], max_rows=8)
    engine.generate(batch, sampling, 8, key=KEY)
    assert (engine.counts.num_prefills, engine.counts.num_prefill_tokens) == (3, 3 * 6)
    assert engine.counts.num_row_steps == 4 * 32


def test_finished_rows_cost_nothing_for_long():
    policy, sampling = tiny_policy(), Sampling(max_completion_tokens=40)
    batch = batch_of(PROMPTS)
    engine = NativeEngine(policy, TOKENIZER, list(range(1, 5)))
    lengths = engine.generate(batch, sampling, 8, key=KEY).completion_mask.sum(1)
    num_useful = int((lengths - 1).sum())
    num_dense = 40 * (int(lengths.max()) - 1)
    assert num_dense > 2 * num_useful
    # Below three quarters of running rows the others are dropped.
    assert engine.counts.num_row_steps <= num_useful / 0.75 + 1
    assert 0 < engine.counts.num_compactions < 16
    refilled = NativeEngine(policy, TOKENIZER, list(range(1, 5)), max_rows=10)
    refilled.generate(batch, sampling, 8, key=KEY)
    assert refilled.counts.num_row_steps <= num_useful / 0.6
    assert refilled.counts.num_steps < 3 * num_useful / 10


class WrongDecoder(FusedDecoder):
    """A decoder that answers with something else."""

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the right shape."""
        return super().step(tokens) * 1.1


def refusing(model: PreTrainedModel, lengths: Lengths) -> FusedDecoder:
    """Cover no model."""
    raise NotImplementedError("this one covers nothing")


def test_a_decoder_that_disagrees_with_the_model_gives_way_and_says_so_once():
    policy, batch, sampling = tiny_policy(), batch_of(PROMPTS), Sampling(max_completion_tokens=6)
    expected = TransformersEngine(policy, TOKENIZER, [1]).generate(batch, sampling, 4, key=KEY)
    engine = NativeEngine(
        policy, TOKENIZER, [1], decoders={"refusing": refusing, "wrong": WrongDecoder}
    )
    with pytest.warns(UserWarning, match=r"native does not cover.*covers nothing.*off by") as seen:
        drawn = engine.generate(batch, sampling, 4, key=KEY)
        engine.generate(batch, sampling, 4, key=KEY)
    assert len(seen) == 1
    assert engine.decoder_name == "transformers"
    assert_same(drawn, expected, tolerance=0.0)
    second = NativeEngine(
        policy, TOKENIZER, [1], decoders={"wrong": WrongDecoder, "cached": CachedDecoder}
    )
    with pytest.warns(UserWarning, match=r"decodes cached, which may be slower .wrong.*off by"):
        second.generate(batch, sampling, 4, key=KEY)
    assert second.decoder_name == "cached"


def test_broken_weights_are_named_at_the_first_rollout_and_later():
    policy, batch = tiny_policy(), batch_of(PROMPTS)
    engine = NativeEngine(policy, TOKENIZER, [1])
    engine.generate(batch, Sampling(max_completion_tokens=3), 2, key=KEY)
    with torch.no_grad():
        next(policy.parameters())[5:] = torch.nan
    for broken in (engine, NativeEngine(policy, TOKENIZER, [1])):
        with warnings.catch_warnings(), pytest.raises(RuntimeError, match="not finite"):
            warnings.simplefilter("ignore")
            broken.generate(batch, Sampling(max_completion_tokens=3), 2, key=KEY)


def complete_sharded(folder: str) -> list[str]:
    """Four rollouts with FSDP2, to the first of which rank 1 brings no prompt.

    Args:
        folder: of the model.

    Returns:
        The decoder of each.
    """
    rank = int(os.environ["LOCAL_RANK"])
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))
    policy = load_policy(folder, num_tokens=len(TOKENIZER)).eval()
    batches = [batch_of(PROMPTS[:n]) for n in ((0, 3, 5) if rank else (2, 1, 4))]
    sampling = Sampling(max_completion_tokens=6 + 9 * rank)
    plain = TransformersEngine(policy, TOKENIZER, [1])
    expected = [plain.generate(batch, sampling, 3, key=KEY) for batch in batches]
    shard_policy(policy, mesh)
    engine = NativeEngine(policy, TOKENIZER, [1])
    names = []
    for batch, right in zip(batches, expected, strict=True):
        drawn = engine.generate(batch, sampling, 3, key=KEY)
        names.append(str(engine.decoder_name))
        if len(batch):
            assert_same(drawn, right)
    engine = NativeEngine(policy, TOKENIZER, [1], decoders={"cached": CachedDecoder})
    assert_same(engine.generate(batches[2], sampling, 3, key=KEY), expected[2])
    names.append(str(engine.decoder_name))
    # What is gathered lies elsewhere in the next rollout, or not: the steps have to follow it.
    engine = NativeEngine(
        policy, TOKENIZER, [1], decoders={"captured": PooledDecoder(record).begin}
    )
    for batch, right in zip(batches[1:], expected[1:], strict=True):
        assert_same(engine.generate(batch, sampling, 3, key=KEY), right)
    return [*names, str(engine.decoder_name)]


def test_ranks_with_other_amounts_of_work_complete_with_gathered_weights(
    char_model: str, tmp_path: Path
):
    first, second = on_two_ranks(complete_sharded, tmp_path, char_model)
    assert first == ["fused", "fused", "fused", "cached", "captured"], first
    assert second == ["None", "fused", "fused", "cached", "captured"], second


def test_the_default_engine_is_the_native_one():
    policy = tiny_policy()
    assert isinstance(build_engine("native", policy, TOKENIZER, [1]), NativeEngine)

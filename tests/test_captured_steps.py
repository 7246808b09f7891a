"""Steps that are captured once and replayed: the same rollouts, and nothing read on the way."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from captures import HostOperations, record
from tiny_engines import CASES, KEY, MODELS, PROMPTS, TOKENIZER, assert_same, batch_of, tiny_policy

from lightning_grpo.adapters import Lora
from lightning_grpo.generation import (
    NativeEngine,
    Sampling,
    TransformersEngine,
    decode_loop,
)
from lightning_grpo.generation.pooled_decoder import PooledDecoder
from lightning_grpo.generation.steps import Steps
from lightning_grpo.policy import Policy, load_policy

FUSED_MODELS = [name for name, (_, _, decoder) in MODELS.items() if decoder == "fused"]


def captured_engine(
    policy: Policy, eos: list[int], decoder: PooledDecoder | None = None, **options: Any
) -> NativeEngine:
    decoder = decoder or PooledDecoder(record)
    return NativeEngine(policy, TOKENIZER, eos, decoders={"captured": decoder.begin}, **options)


def change(policy: Policy, scale: float = 0.05) -> None:
    """Other weights in the same places."""
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(scale * torch.randn_like(parameter))


@pytest.mark.parametrize(
    ("name", "case"),
    [("qwen2-tied", case) for case in CASES] + [(name, "ragged") for name in FUSED_MODELS[1:]],
)
def test_replayed_rollouts_are_those_of_the_transformers_engine(name: str, case: str):
    eos, sampling, max_rows = CASES[case]
    policy, batch = tiny_policy(name), batch_of(PROMPTS)
    engine = captured_engine(policy, eos, max_rows=max_rows)
    torch.manual_seed(1)
    for iteration in range(2):
        key = KEY._replace(iteration=iteration)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            drawn = engine.generate(batch, sampling, 4, key=key)
        assert engine.decoder_name == "captured"
        expected = TransformersEngine(policy, TOKENIZER, eos).generate(batch, sampling, 4, key=key)
        assert_same(drawn, expected, tolerance=1e-5)
        change(policy)


def test_later_rollouts_capture_nothing_though_weights_prompts_and_draws_are_others():
    policy, sampling = tiny_policy(), Sampling(max_completion_tokens=9)
    engine = captured_engine(policy, [])
    captures = []
    for iteration, prompts in enumerate([PROMPTS, ["1", "22222222222", "3", "9", "1"], PROMPTS]):
        change(policy)
        engine.generate(batch_of(prompts), sampling, 4, key=KEY._replace(iteration=iteration))
        captures.append(engine.counts.num_captures)
        # Validation, with completions of another length, has its own.
        engine.generate(batch_of(prompts[:2]), Sampling(0.0, max_completion_tokens=5), 1, key=KEY)
        captures.append(engine.counts.num_captures)
    assert captures == [1, 1, 0, 0, 0, 0]


def test_settings_of_rows_are_those_of_the_rollout_and_not_of_the_captured_one():
    policy, batch = tiny_policy(), batch_of(PROMPTS)
    engine = captured_engine(policy, [1, 2, 3])
    common = {"max_completion_tokens": 12, "stop_strings": ["1"], "bad_words": ["7", "ab"]}
    longest = Sampling(**common)
    own = [
        [longest, Sampling(0.0, **common), Sampling(0.5, 3, 0.8, **common)] + 2 * [longest],
        [Sampling(2.0, 2, **common), Sampling(0.7, top_p=0.5, **common)] + 3 * [longest],
    ]
    short = [Sampling(max_completion_tokens=n, min_completion_tokens=n // 2) for n in (2, 12, 4)]
    captures = []
    for samplings in (own[0], own[1], own[0], short + short[:2], short[1:] + 3 * short[:1]):
        drawn = engine.generate(batch, samplings, 4, key=KEY)
        expected = TransformersEngine(policy, TOKENIZER, [1, 2, 3]).generate(
            batch, samplings, 4, key=KEY
        )
        assert_same(drawn, expected)
        captures.append(engine.counts.num_captures)
    assert engine.decoder_name == "captured"
    assert captures[0] > 0 and captures[1:3] == [0, 0] and captures[3] > 0


def test_other_words_and_limits_are_other_captures():
    policy, batch = tiny_policy(), batch_of(PROMPTS)
    engine = captured_engine(policy, [1])
    common = {"max_completion_tokens": 8}
    for options in (
        {},
        {"temperature": 0.7},
        {"top_k": 3},
        {"top_p": 0.6},
        {"min_completion_tokens": 5},
        {"min_completion_tokens": 7},
        {"bad_words": ["3"]},
        {"bad_words": ["4"]},
        {"bad_words": ["45"]},
        {"stop_strings": ["4"]},
        {"stop_strings": ["5"]},
    ):
        sampling = Sampling(**(common | options))
        plain = TransformersEngine(policy, TOKENIZER, [1])
        for iteration in range(2):
            key = KEY._replace(iteration=iteration)
            drawn = engine.generate(batch, sampling, 4, key=key)
            assert_same(drawn, plain.generate(batch, sampling, 4, key=key))


def test_rows_are_dropped_without_moving_keys_and_the_bucket_shrinks():
    policy, batch = tiny_policy(), batch_of(PROMPTS)
    sizes: list[int] = []
    pools = set()

    class Sizes(PooledDecoder):
        def step(self, tokens: torch.Tensor) -> torch.Tensor:
            sizes.append(len(tokens))
            pools.add(tuple(kv.data_ptr() for kv in self.kv))
            return super().step(tokens)

    engine = captured_engine(policy, list(range(1, 5)), Sizes())
    drawn = engine.generate(batch, Sampling(max_completion_tokens=40), 8, key=KEY)
    lengths = drawn.completion_mask.sum(1)
    sizes, pools = sizes[-engine.counts.num_steps :], set(list(pools)[-1:])
    assert engine.counts.num_compactions > 3 and len(pools) == 1
    running = [int((lengths > 1 + step).sum()) for step in range(len(sizes))]
    for count, size in zip(running, sizes):
        # Below three quarters of running rows the others are dropped.
        assert count <= size and count >= 0.75 * size - 1
    steps = Steps(record)
    assert [steps.num_places(n) for n in (1, 2, 3, 4, 5, 7, 9, 13, 96, 97, 129, 256)] == [
        *(1, 2, 3, 4, 6, 8, 12, 16, 96, 128, 192, 256)
    ]
    assert [Steps().num_places(n) for n in (1, 5, 97)] == [1, 5, 97]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_completion_tokens=6),
        Sampling(0.0, max_completion_tokens=6),
        Sampling(0.7, 5, 0.9, max_completion_tokens=6, stop_strings=["7", "ab"]),
        CASES["bad-words"][1],
        CASES["own"][1],
    ],
    ids=["plain", "greedy", "truncated-with-stops", "bad-words", "own"],
)
def test_a_step_reads_nothing_and_has_no_size_that_depends_on_values(sampling: Any):
    found: list[str] = []
    num_records = 0

    def counted(function: Callable[[], None]) -> Callable[[], None]:
        nonlocal num_records
        num_records += 1
        with HostOperations() as seen:
            replay = record(function)
        found.extend(seen.names)
        return replay

    engine = captured_engine(tiny_policy("qwen3"), [1], PooledDecoder(counted))
    engine.generate(batch_of(PROMPTS), sampling, 4, key=KEY)
    assert num_records > 0 and found == []
    with HostOperations() as seen:  # it sees what there is to see
        x = torch.tensor([1, 2, 3])
        x[x > 1].sum().item()
    assert [name.split(".")[1] for name in seen.names] == [
        "lift_fresh",
        "index",
        "_local_scalar_dense",
    ]


@pytest.mark.parametrize(("num_tokens", "num_reads"), [(16, 1), (48, 3), (50, 4)])
def test_the_host_reads_once_for_so_many_tokens(
    num_tokens: int, num_reads: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(decode_loop._CHECK_EVERY, "cpu", 16)
    policy, batch = tiny_policy(), batch_of(PROMPTS)
    engine = NativeEngine(policy, TOKENIZER, [])
    operations = []
    for length in (1, num_tokens, num_tokens):  # the first chooses the decoder
        with HostOperations() as seen:
            engine.generate(batch, Sampling(max_completion_tokens=length), 4, key=KEY)
        operations.append(seen.names)
    assert engine.counts.num_reads == num_reads
    assert engine.counts.num_steps == num_tokens - 1
    values = [name for name in operations[-1] if "_local_scalar_dense" in name]
    # Two more at the end: the longest length, and whether all log-probs are finite.
    assert len(values) == num_reads + 2


class OneLate:
    """Answers with the number of the call before, as a GPU does."""

    def __init__(self, device: torch.device) -> None:
        self.waiting: int | None = None

    def read(self, number: torch.Tensor) -> int | None:
        before, self.waiting = self.waiting, int(number)
        return before

    def forget(self) -> None:
        self.waiting = None


class Reports:
    """Keeps what is handed out."""

    def __init__(self) -> None:
        self.rows: list[list[tuple[int, list[int]]]] = []

    def append(self, rows: Sequence[int], token_lists: Sequence[list[int]]) -> None:
        self.rows.append(list(zip(rows, token_lists, strict=True)))


@pytest.mark.parametrize("check_every", [1, 5])
def test_late_answers_change_no_completion(check_every: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode_loop, "LateReader", OneLate)
    monkeypatch.setitem(decode_loop._CHECK_EVERY, "cpu", check_every)
    policy, batch = tiny_policy(), batch_of(PROMPTS)
    for case in ("ragged", "refill", "eos-at-once", "one-token", "own"):
        eos, sampling, max_rows = CASES[case]
        expected = TransformersEngine(policy, TOKENIZER, eos).generate(batch, sampling, 4, key=KEY)
        captured = captured_engine(policy, eos, max_rows=max_rows)
        plain = NativeEngine(policy, TOKENIZER, eos, max_rows=max_rows)
        for engine in (captured, plain):
            reports = Reports()
            drawn = engine.generate(batch, sampling, 4, key=KEY, on_finished=reports.append)
            assert_same(drawn, expected)
            ids, mask = expected.completion_ids, expected.completion_mask
            reported = [pair for rows in reports.rows for pair in rows]
            assert sorted(reported) == [(row, ids[row][mask[row]].tolist()) for row in range(20)]
            assert len(reports.rows) > 1 or case in ("eos-at-once", "one-token")
        assert captured.decoder_name == "captured"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_replays_apply_adapters_beside_weights_that_are_refreshed_in_place(
    char_model: str, precision: str
):
    policy = load_policy(char_model, num_tokens=len(TOKENIZER), lora=Lora(rank=4)).eval()
    if precision == "bf16-true":  # as peft keeps them: adapters in float32 beside it
        policy.causal_lm.to(torch.bfloat16)
        for parameter in policy.trainable().values():
            parameter.data = parameter.data.float()
    batch, sampling = batch_of(PROMPTS), Sampling(max_completion_tokens=8)
    decoder = PooledDecoder(record)
    engine = captured_engine(policy, [1], decoder)
    torch.manual_seed(1)
    addresses: dict[str, int] = {}
    for iteration in range(3):
        change(policy, 0.2)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            drawn = engine.generate(batch, sampling, 2, key=KEY._replace(iteration=iteration))
            difference = engine._plain_logprobs(policy.causal_lm, batch, drawn)
        difference = (difference - drawn.sampler_logprobs)[drawn.completion_mask].abs()
        assert float(difference.max()) <= (1e-5 if precision == "32-true" else 0.1)
        assert engine.decoder_name == "captured"
        if iteration:
            assert engine.counts.num_captures == 0
            assert decoder.held.addresses() == addresses
        addresses = decoder.held.addresses()
    if precision == "bf16-mixed":
        # One copy of every matrix, at 2 bytes a number, the output layer included.
        matrices = [p for n, p in policy.named_parameters() if "norm" not in n]
        copies = [x for name, x in decoder.held.copies.items() if name != "rope"]
        tied = policy.causal_lm.get_input_embeddings().weight.numel()
        assert all(x.dtype == torch.bfloat16 for x in copies)
        num_copied = sum(x.numel() for x in copies)
        is_tied = policy.causal_lm.config.tie_word_embeddings
        assert num_copied == sum(p.numel() for p in matrices) - (0 if is_tied else tied)


def test_a_step_that_cannot_be_captured_runs_one_operation_at_a_time_and_says_so():
    def refuse(function: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    policy, batch = tiny_policy(), batch_of(PROMPTS)
    eos, sampling, _ = CASES["ragged"]
    engine = captured_engine(policy, eos, PooledDecoder(refuse))
    with pytest.warns(UserWarning, match="one operation at a time.*not permitted") as seen:
        drawn = engine.generate(batch, sampling, 4, key=KEY)
        engine.generate(batch, sampling, 4, key=KEY)
    assert len(seen) == 1
    assert_same(
        drawn, TransformersEngine(policy, TOKENIZER, eos).generate(batch, sampling, 4, key=KEY)
    )


def test_a_large_pool_is_given_back_after_each_rollout_and_a_small_one_is_kept():
    policy, batch = tiny_policy(), batch_of(PROMPTS)
    sampling = Sampling(max_completion_tokens=8)
    expected = TransformersEngine(policy, TOKENIZER, []).generate(batch, sampling, 4, key=KEY)
    for max_kept_bytes, is_kept in ((1e9, True), (1e4, False)):
        decoder = PooledDecoder(record, max_kept_bytes=max_kept_bytes)
        engine = captured_engine(policy, [], decoder)
        for _ in range(2):
            assert_same(engine.generate(batch, sampling, 4, key=KEY), expected)
            assert bool(decoder.kv) == is_kept
        assert engine.counts.num_captures == (0 if is_kept else 1)
        assert engine.counts.max_kv_bytes > 1e4


def test_the_stand_in_replays_operations_and_no_python():
    values, total = torch.tensor([1.0, 2.0]), torch.zeros(2)
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        doubled = values * 2
        total.add_(doubled.flip(0) + count)

    replay = record(step)
    assert (total.tolist(), count) == ([0.0, 0.0], 1)
    replay()
    assert total.tolist() == [5.0, 3.0]
    values.copy_(torch.tensor([10.0, 20.0]))
    replay()
    assert total.tolist() == [46.0, 24.0] and count == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", FUSED_MODELS)
def test_a_gpu_captures_its_steps(name: str):
    policy, batch = tiny_policy(name).to("cuda"), batch_of(PROMPTS)
    for case in ("ragged", "refill", "no-eos-greedy"):
        eos, sampling, max_rows = CASES[case]
        engine = NativeEngine(policy, TOKENIZER, eos, max_rows=max_rows)
        for iteration in range(3):
            key = KEY._replace(iteration=iteration)
            drawn = engine.generate(batch, sampling, 4, key=key)
            expected = TransformersEngine(policy, TOKENIZER, eos).generate(
                batch, sampling, 4, key=key
            )
            assert str(engine.decoder_name).startswith("captured")
            assert_same(drawn, expected, tolerance=1e-4)
            change(policy)

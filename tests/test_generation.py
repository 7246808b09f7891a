"""Both engines: what is drawn, from what, and where it ends."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from lightning_grpo.generation import (
    NativeEngine,
    Sampling,
    SamplingKey,
    TransformersEngine,
    build_engine,
    decode_loop,
)
from lightning_grpo.generation.sampling import keyed_uniforms, sample_tokens
from lightning_grpo.policy import Policy, load_policy
from lightning_grpo.rollout import collect_rollout
from lightning_grpo.scoring import score_rollout
from lightning_grpo.types import PromptBatch


def load(folder: str, scale: float = 8.0) -> tuple[Policy, object]:
    """The tiny model with weights large enough that its distribution is far from uniform."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy = load_policy(folder, num_tokens=len(tokenizer)).eval()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "norm" not in name:
                parameter.mul_(scale)
    return policy, tokenizer


def prompts(texts: list[str], tokenizer) -> PromptBatch:
    ids = [tokenizer(text).input_ids for text in texts]
    return PromptBatch(list(texts), ids, {}, list(range(len(texts))))


KEY = SamplingKey(seed=3, iteration=5)
# The native engine must not pass by giving its work to the other one.
pytestmark = pytest.mark.filterwarnings("error:.*native does not cover.*")


@pytest.fixture(params=[NativeEngine, TransformersEngine], ids=["native", "transformers"])
def make_engine(request: pytest.FixtureRequest) -> type:
    """One engine after the other."""
    return request.param


def test_uniforms_depend_on_every_part_of_the_key_and_on_nothing_else():
    group_ids, rows = torch.arange(6) // 2, torch.arange(6) % 2
    first = keyed_uniforms(KEY, group_ids, rows, 4)
    assert torch.equal(first[3:], keyed_uniforms(KEY, group_ids[3:], rows[3:], 4))
    others = [
        keyed_uniforms(SamplingKey(4, 5), group_ids, rows, 4),
        keyed_uniforms(SamplingKey(3, 6), group_ids, rows, 4),
        keyed_uniforms(KEY, group_ids + 1, rows, 4),
        keyed_uniforms(KEY, group_ids, rows + 1, 4),
        keyed_uniforms(KEY, group_ids, rows, 5),
    ]
    assert all(bool((first != other).all()) for other in others)
    assert len(set(first.tolist())) == 6


def test_uniforms_are_uniform_and_unrelated_between_rows_and_positions():
    n = 20_000
    u = keyed_uniforms(KEY, torch.arange(n), torch.zeros(n, dtype=torch.int64), 0)
    v = keyed_uniforms(KEY, torch.arange(n), torch.zeros(n, dtype=torch.int64), 1)
    assert float(u.min()) >= 0 and float(u.max()) < 1
    counts = torch.histc(u, bins=20, min=0, max=1)
    chi_square = float(((counts - n / 20) ** 2 / (n / 20)).sum())
    assert chi_square < 43.8  # 99.9 % quantile of chi square with 19 degrees of freedom
    correlation = float(torch.corrcoef(torch.stack([u, v]))[0, 1])
    assert abs(correlation) < 0.03


def test_tokens_are_drawn_in_proportion_to_their_probabilities():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    n = 20_000
    uniforms = keyed_uniforms(KEY, torch.arange(n), torch.zeros(n, dtype=torch.int64), 0)
    tokens, logprobs = sample_tokens(probabilities.log().expand(n, 4), Sampling(), uniforms)
    shares = torch.bincount(tokens, minlength=4) / n
    assert shares[1] == 0
    assert torch.allclose(shares, probabilities, atol=0.012)
    assert torch.allclose(logprobs.exp(), probabilities[tokens], atol=1e-6)


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_unit_interval_draw_the_first_and_last_possible_token(u: float):
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]])
    token, _ = sample_tokens(logits, Sampling(), torch.tensor([u], dtype=torch.float64))
    assert token.item() == (1 if u == 0 else 2)


def test_temperature_and_truncation_change_the_distribution_that_is_reported():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    u = torch.tensor([0.999], dtype=torch.float64)
    _, plain = sample_tokens(logits, Sampling(temperature=0.5), u)
    assert plain.item() == pytest.approx(-0.1429316, abs=1e-6)  # -log(1 + e^-2 + e^-4)
    _, top_two = sample_tokens(logits, Sampling(top_k=2), u)
    assert top_two.item() == pytest.approx(-0.3132617, abs=1e-6)  # -log(1 + e^-1)
    token, greedy = sample_tokens(logits, Sampling(temperature=0), u)
    assert (token.item(), greedy.item()) == (2, 0.0)


def test_sampler_logprobs_are_those_of_the_training_forward(make_engine, char_model: str):
    policy, tokenizer = load(char_model)
    engine = make_engine(policy, tokenizer, [1])
    batch = prompts(["12=", "3=", "777777="], tokenizer)
    sampling = Sampling(temperature=0.7, max_completion_tokens=9)
    rollout = collect_rollout(engine, tokenizer, batch, sampling, 3, key=KEY)
    again = score_rollout(policy, rollout, [torch.arange(9)], temperature=0.7).logprobs
    difference = (again - rollout.sampler_logprobs)[rollout.completion_mask].abs().max()
    assert difference < 1e-5
    assert (rollout.sampler_logprobs[rollout.completion_mask] < -1e-3).any()
    # The temperature counts: at another one the log-probs differ.
    other = score_rollout(policy, rollout, [torch.arange(9)], temperature=1.0).logprobs
    assert (other - rollout.sampler_logprobs)[rollout.completion_mask].abs().max() > 1e-2


def test_a_row_does_not_depend_on_the_rows_beside_it(make_engine, char_model: str):
    policy, tokenizer = load(char_model)
    sampling = Sampling(max_completion_tokens=8)
    batch = prompts(["12=", "3=", "777777="], tokenizer)
    whole = make_engine(policy, tokenizer, [1]).generate(batch, sampling, 4, key=KEY)
    parts = make_engine(policy, tokenizer, [1], max_rows=5).generate(batch, sampling, 4, key=KEY)
    assert torch.equal(whole.completion_mask, parts.completion_mask)
    mask = whole.completion_mask
    assert torch.equal(whole.completion_ids[mask], parts.completion_ids[mask])
    alone = PromptBatch(batch.prompts[1:2], batch.prompt_ids[1:2], {}, [1])
    single = make_engine(policy, tokenizer, [1]).generate(alone, sampling, 4, key=KEY)
    for row in range(4):
        length = int(single.completion_mask[row].sum())
        assert length == int(mask[4 + row].sum())
        assert torch.equal(
            single.completion_ids[row, :length], whole.completion_ids[4 + row, :length]
        )


def test_siblings_and_iterations_get_different_draws(make_engine, char_model: str):
    policy, tokenizer = load(char_model, scale=1.0)
    engine = make_engine(policy, tokenizer, [])
    batch = prompts(["12=", "12="], tokenizer)
    sampling = Sampling(max_completion_tokens=12)
    first = engine.generate(batch, sampling, 3, key=KEY).completion_ids
    assert len({tuple(row) for row in first.tolist()}) == 6
    later = engine.generate(batch, sampling, 3, key=SamplingKey(3, 6)).completion_ids
    assert not torch.equal(first, later)
    assert torch.equal(first, engine.generate(batch, sampling, 3, key=KEY).completion_ids)


def test_every_eos_id_ends_a_completion_and_is_part_of_it(make_engine, char_model: str):
    policy, tokenizer = load(char_model, scale=1.0)
    eos = [1, 5, 6, 7, 8, 9]
    engine = make_engine(policy, tokenizer, eos)
    batch = prompts(["12="] * 8, tokenizer)
    result = engine.generate(batch, Sampling(max_completion_tokens=10), 4, key=KEY)
    ends = set()
    for ids, mask, truncated in zip(
        result.completion_ids.tolist(), result.completion_mask.tolist(), result.truncated.tolist()
    ):
        length = sum(mask)
        assert mask == [True] * length + [False] * (len(mask) - length)
        assert not set(ids[: length - 1]) & set(eos)
        assert truncated == (ids[length - 1] not in eos)
        ends.add(ids[length - 1])
    assert len(ends & set(eos)) > 1
    assert any(result.truncated.tolist())


def test_eos_as_the_very_first_token_gives_a_completion_of_one_token(make_engine, char_model: str):
    policy, tokenizer = load(char_model)
    everything = list(range(len(tokenizer)))
    engine = make_engine(policy, tokenizer, everything)
    batch = prompts(["12="], tokenizer)
    result = engine.generate(batch, Sampling(max_completion_tokens=5), 2, key=KEY)
    assert result.completion_mask.sum(1).tolist() == [1, 1]
    assert not result.truncated.any()


def test_a_stop_string_ends_a_completion_but_one_in_the_prompt_does_not(
    make_engine, char_model: str
):
    policy, tokenizer = load(char_model, scale=1.0)
    engine = make_engine(policy, tokenizer, [])
    batch = prompts(["a7=", "7 7="], tokenizer)
    sampling = Sampling(max_completion_tokens=40, stop_strings=["7", "ab"])
    result = engine.generate(batch, sampling, 6, key=KEY)
    stopped = 0
    for ids, mask, truncated in zip(
        result.completion_ids, result.completion_mask, result.truncated.tolist()
    ):
        text = tokenizer.decode(ids[mask])
        if truncated:
            assert "7" not in text and "ab" not in text
        else:
            stopped += 1
            assert text.endswith(("7", "ab"))
            assert "7" not in text[:-1] and "ab" not in text[:-1]
    assert stopped > 3


def test_the_models_own_generation_config_cannot_change_the_distribution(
    make_engine, char_model: str
):
    policy, tokenizer = load(char_model)
    batch = prompts(["12=", "9="], tokenizer)
    sampling = Sampling(max_completion_tokens=10)
    before = make_engine(policy, tokenizer, [1]).generate(batch, sampling, 4, key=KEY)
    config = policy.causal_lm.generation_config
    config.repetition_penalty = 5.0
    config.top_k = 1
    config.suppress_tokens = list(range(3, 20))
    after = make_engine(policy, tokenizer, [1]).generate(batch, sampling, 4, key=KEY)
    assert torch.equal(before.completion_ids, after.completion_ids)
    assert policy.causal_lm.generation_config is config


def test_padding_rows_of_the_embedding_are_never_drawn(make_engine, char_model: str):
    policy, tokenizer = load(char_model, scale=1.0)
    policy.num_tokens = 10
    engine = make_engine(policy, tokenizer, [])
    batch = prompts(["12="] * 4, tokenizer)
    result = engine.generate(batch, Sampling(max_completion_tokens=20), 4, key=KEY)
    assert int(result.completion_ids.max()) < 10
    rollout = collect_rollout(
        engine, tokenizer, batch, Sampling(max_completion_tokens=20), 4, key=KEY
    )
    again = score_rollout(policy, rollout, [torch.arange(16)], temperature=1.0).logprobs
    assert (again - rollout.sampler_logprobs).abs().max() < 1e-5


@pytest.mark.parametrize("check_every", [1, 7])
def test_every_row_is_handed_out_once_as_it_ends(
    make_engine, char_model: str, check_every: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(decode_loop._CHECK_EVERY, "cpu", check_every)
    policy, tokenizer = load(char_model, scale=1.0)
    engine = make_engine(policy, tokenizer, list(range(1, 12)), max_rows=6)
    reports: list[dict[int, list[int]]] = []
    result = engine.generate(
        prompts(["12="] * 3, tokenizer),
        Sampling(max_completion_tokens=4),
        4,
        key=KEY,
        on_finished=lambda rows, ids: reports.append(dict(zip(rows, ids, strict=True))),
    )
    assert all(reports) and len(reports) >= 2
    handed_out = [row for report in reports for row in report]
    assert sorted(handed_out) == list(range(12))
    found = {row: ids for report in reports for row, ids in report.items()}
    for row in range(12):
        mask = result.completion_mask[row]
        assert found[row] == result.completion_ids[row][mask].tolist()
    assert bool(result.truncated.any()) and not bool(result.truncated.all())


def test_no_prompts_give_no_completions(make_engine, char_model: str):
    policy, tokenizer = load(char_model)
    engine = make_engine(policy, tokenizer, [1])
    result = engine.generate(PromptBatch([], [], {}, []), Sampling(), 4, key=KEY)
    assert result.completion_ids.shape[0] == 0


def test_an_unknown_engine_is_named_in_the_error(char_model: str):
    policy, tokenizer = load(char_model)
    with pytest.raises(ValueError, match=r"rollout\.engine 'warp' is unknown"):
        build_engine("warp", policy, tokenizer, [1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ],
)
def test_sampling_settings_out_of_range_are_refused(options: dict, word: str):
    with pytest.raises(ValueError, match=word):
        Sampling(**options)

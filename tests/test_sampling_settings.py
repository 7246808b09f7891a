"""Bad words, shortest completions, and prompts with settings of their own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from runs import make_data, make_module, make_trainer
from test_generation import KEY, load, prompts
from transformers import MinNewTokensLengthLogitsProcessor, NoBadWordsLogitsProcessor

from lightning_grpo.generation import NativeEngine, Sampling, TransformersEngine
from lightning_grpo.generation.protocol import per_prompt
from lightning_grpo.generation.sampling import OwnSettings, sample_own_tokens, sample_tokens
from lightning_grpo.generation.token_sampler import NO_TOKEN, TokenSampler, bad_sequences
from lightning_grpo.rollout import RolloutSettings, collect_rollout, own_samplings
from lightning_grpo.scoring import score_rollout
from lightning_grpo.types import PromptBatch

pytestmark = pytest.mark.filterwarnings("error:.*native does not cover.*")
CPU = torch.device("cpu")


@pytest.fixture(params=[NativeEngine, TransformersEngine], ids=["native", "transformers"])
def make_engine(request: pytest.FixtureRequest) -> type:
    """One engine after the other."""
    return request.param


@pytest.mark.parametrize("num_tokens", [7, 300])
def test_a_row_at_its_own_settings_gets_what_it_gets_alone(num_tokens: int):
    generator = torch.Generator().manual_seed(0)
    settings = [
        (temperature, top_k, top_p)
        for temperature in (0.0, 0.1, 0.7, 1.0, 3.0)
        for top_k in (0, 1, 5, 1000)
        for top_p in (1.0, 0.9, 0.3, 1e-6)
    ] * 3
    logits = torch.randn(len(settings), num_tokens, generator=generator) * 30
    logits[::4, 3] = -torch.inf
    uniforms = torch.rand(len(settings), generator=generator, dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, 1 - 2.0**-53])
    temperature, top_k, top_p = zip(*settings)
    own = OwnSettings(torch.tensor(temperature), torch.tensor(top_k), torch.tensor(top_p))
    tokens, logprobs = sample_own_tokens(logits, own, uniforms, truncates=True)
    for row, setting in enumerate(settings):
        part = slice(row, row + 1)
        token, logprob = sample_tokens(logits[part], Sampling(*setting), uniforms[part])
        assert (tokens[row], logprobs[row]) == (token, logprob), setting
    plain = [row for row, (_, k, p) in enumerate(settings) if k == 0 and p == 1]
    own = OwnSettings(*(x[plain] for x in own))
    some = sample_own_tokens(logits[plain], own, uniforms[plain], truncates=False)
    assert torch.equal(some[0], tokens[plain]) and torch.equal(some[1], logprobs[plain])


def drawn_after(history: list[int], sequences: list[list[int]], least: int = 1) -> torch.Tensor:
    """Probabilities of the next of eight tokens after others, from draws all over [0, 1)."""
    n = 4000
    sampler = TokenSampler(
        [Sampling(min_completion_tokens=least)] * n,
        bad_sequences=sequences,
        eos_token_ids=[0, 7],
        num_tokens=8,
        device=CPU,
    )
    recent = torch.tensor([([NO_TOKEN] * 9 + history)[-9:]]).expand(n, -1)
    logits = torch.linspace(0, 1.4, 8).expand(n, -1)
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens, logprobs = sampler.draw(
        logits, uniforms, drawn=torch.full((n,), len(history)), recent=recent, own=sampler.own
    )
    probabilities = torch.bincount(tokens, minlength=8) / n
    # What is reported is the distribution that was drawn from.
    assert torch.allclose(probabilities[tokens], logprobs.exp(), atol=1e-3)
    return probabilities


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("history", [[], [3], [2, 3], [3, 3], [2, 3, 5], [4, 2, 3, 5, 2]])
def test_what_must_not_be_drawn_is_what_transformers_forbids(history: list[int], least: int):
    sequences = [[6], [3, 4], [2, 3, 5], [5, 2, 2], [1, 1], [3, 5]]
    found = drawn_after(history, sequences, least)
    scores = torch.linspace(0, 1.4, 8).unsqueeze(0)
    ids = torch.tensor([[9, *history]])  # a prompt of one token that is in no sequence
    scores = NoBadWordsLogitsProcessor(sequences)(ids, scores)
    # Theirs does not count the EOS.
    shortest = MinNewTokensLengthLogitsProcessor(1, least - 1, [0, 7], device="cpu")
    expected = shortest(ids, scores)[0].softmax(-1)
    assert torch.equal(found == 0, expected == 0)
    assert torch.allclose(found, expected, atol=1e-3)


def codes(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
    """A tokenizer that drops spaces at the end."""
    assert not add_special_tokens
    return {"input_ids": [ord(character) for character in text.rstrip()]}


def test_bad_words_are_tokenized_by_themselves_and_behind_a_space():
    assert bad_sequences(["ab", "a", "ab"], codes) == [[97, 98], [32, 97, 98], [97], [32, 97]]
    assert bad_sequences([], codes) == []
    with pytest.raises(ValueError, match="makes no token of the bad word '  '"):
        bad_sequences(["a", "  "], codes)


def test_no_token_left_to_draw_is_refused():
    options: dict[str, Any] = {"eos_token_ids": [0], "num_tokens": 3, "device": CPU}
    words = [[1], [2], [9], [9, 0]]  # what cannot be drawn anyway says nothing
    TokenSampler([Sampling()], bad_sequences=words, **options)
    with pytest.raises(ValueError, match="leave no token to draw"):
        TokenSampler([Sampling(min_completion_tokens=2)], bad_sequences=words, **options)


def test_completions_have_no_bad_word_and_are_long_enough(make_engine, char_model: str):
    policy, tokenizer = load(char_model, scale=1.0)
    engine = make_engine(policy, tokenizer, list(range(1, 12)))
    batch = prompts(["12=", "a"] * 6, tokenizer)
    plain = Sampling(max_completion_tokens=12)
    words = ["x", "ab", "7q7", "77"]
    restricted = Sampling(
        max_completion_tokens=12,
        bad_words=words,
        stop_strings=["c", "9"],
        min_completion_tokens=4,
    )
    before = collect_rollout(engine, tokenizer, batch, plain, 20, key=KEY)
    rollout = collect_rollout(engine, tokenizer, batch, restricted, 20, key=KEY)
    text = " ".join(map(str, before.completions))
    assert "x" in text and "ab" in text
    assert int(before.completion_mask.sum(1).min()) == 1
    for completion in rollout.completions:
        assert not any(word in completion for word in words)
    lengths = rollout.completion_mask.sum(1)
    assert int(lengths.min()) == 4
    eos = torch.isin(rollout.completion_ids, torch.arange(1, 12)) & rollout.completion_mask
    assert not bool(eos[:, :3].any())
    ended = [str(c)[-1:] in "c9" or bool(eos[i].any()) for i, c in enumerate(rollout.completions)]
    assert [not x for x in rollout.truncated.tolist()] == ended
    assert any("c" in str(c)[:3] or "9" in str(c)[:3] for c in rollout.completions)
    # A restricted distribution gives the rest more than the model does.
    rows = torch.arange(len(rollout))
    own = score_rollout(policy, rollout, [rows], temperature=1.0).logprobs
    gain = (rollout.sampler_logprobs - own)[rollout.completion_mask]
    assert float(gain.min()) > -1e-5 and float(gain.max()) > 0.01


def test_a_word_that_the_prompt_begins_may_be_ended(make_engine, char_model: str):
    policy, tokenizer = load(char_model, scale=1.0)
    engine = make_engine(policy, tokenizer, [])
    sampling = Sampling(max_completion_tokens=1, bad_words=["ab"])
    drawn = engine.generate(prompts(["a"], tokenizer), sampling, 400, key=KEY)
    assert "b" in tokenizer.decode(drawn.completion_ids[:, 0])


def test_prompts_keep_to_their_own_settings_and_leave_others_alone(make_engine, char_model: str):
    policy, tokenizer = load(char_model)
    engine = make_engine(policy, tokenizer, [])
    batch = prompts(["12=", "3=", "12=", "777777=", "5"], tokenizer)
    common = Sampling(0.7, max_completion_tokens=12)
    own = [
        common,
        Sampling(0.0, max_completion_tokens=5),
        Sampling(0.7, top_k=1, max_completion_tokens=12),
        common,
        Sampling(2.5, top_p=0.9, max_completion_tokens=9, min_completion_tokens=8),
    ]
    drawn = engine.generate(batch, own, 4, key=KEY)
    lengths = drawn.completion_mask.sum(1).view(5, 4)
    assert lengths.unique(dim=1).flatten().tolist() == [12, 5, 12, 12, 9]
    assert bool(drawn.truncated.all())
    exact = 0.0 if make_engine is TransformersEngine else 1e-5
    for index, sampling in enumerate(own):
        alone = engine.generate(batch, sampling, 4, key=KEY)
        rows, length = slice(4 * index, 4 * index + 4), sampling.max_completion_tokens
        assert torch.equal(drawn.completion_ids[rows, :length], alone.completion_ids[rows])
        difference = drawn.sampler_logprobs[rows, :length] - alone.sampler_logprobs[rows]
        assert float(difference.abs().max()) <= exact
    assert len(drawn.completion_ids[4:8].unique(dim=0)) == 1  # greedy
    assert len(drawn.completion_ids[:4].unique(dim=0)) == 4


def test_samplings_have_to_fit_the_prompts():
    one = Sampling()
    assert per_prompt(one, 2) == [one, one]
    assert per_prompt([], 0) == []
    with pytest.raises(ValueError, match="1 samplings for 2 prompts"):
        per_prompt([one], 2)
    with pytest.raises(ValueError, match="stop_strings has to be the same"):
        per_prompt([one, Sampling(stop_strings=["a"])], 2)
    with pytest.raises(ValueError, match="bad_words has to be the same"):
        per_prompt([one, Sampling(bad_words=["a"])], 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_completion_tokens": 0}, r"min_completion_tokens must lie between 1 and .*\(256\)"),
        ({"min_completion_tokens": 3, "max_completion_tokens": 2}, r"\(2\), got 3"),
        ({"bad_words": ["a", ""]}, "bad_words has an empty text"),
        ({"temperature": math.nan}, "temperature must be a number >= 0, got nan"),
        ({"temperature": math.inf}, "temperature must be a number >= 0, got inf"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_a_restricted_distribution_says_so():
    assert not Sampling(0.5, min_completion_tokens=1).restricts_tokens
    assert Sampling(bad_words=["a"]).restricts_tokens
    assert Sampling(min_completion_tokens=2).restricts_tokens
    assert RolloutSettings(sampling_column="own").restricts_tokens
    assert not RolloutSettings().restricts_tokens


def test_what_the_data_says_of_a_prompt_comes_before_what_is_common():
    common = Sampling(0.7, max_completion_tokens=9, bad_words=["x"])
    found = own_samplings(common, [None, {}, {"top_k": 3, "top_p": None}, {"temperature": 0}])
    assert found[:2] == [common, common]
    assert found[2] == Sampling(0.7, 3, max_completion_tokens=9, bad_words=["x"])
    assert found[3] == Sampling(0, max_completion_tokens=9, bad_words=["x"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hot", "'hot' is neither a dict of sampling settings nor null"),
        ({"stop_strings": ["a"]}, "'stop_strings' is none of temperature, top_k"),
        ({"top_k": 1.5}, "top_k is 1.5, not a number of its kind"),
        ({"top_p": "0.5"}, "top_p is '0.5', not a number of its kind"),
        ({"top_p": 0}, r"top_p must lie in \(0, 1\], got 0"),
        ({"max_completion_tokens": 10}, r"10, more than rollout.max_completion_tokens \(9\)"),
        ({"min_completion_tokens": 10}, "min_completion_tokens must lie between 1 and"),
    ],
)
def test_what_the_data_cannot_say_is_named_with_its_prompt(value: Any, message: str):
    with pytest.raises(ValueError, match=f"prompt 2 of 3: .*{message}"):
        own_samplings(Sampling(max_completion_tokens=9), [None, value, None])


def rows_with(*settings: Any, num_rows: int = 16) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{i}=", "answer": "1", "own": settings[i % len(settings)]}
        for i in range(num_rows)
    ]


def fit(model: str, folder: Any, rows: Any, val_rows: Any = None, **options: Any) -> Any:
    """A run of two iterations; the module after it, and its rollouts."""
    import lightning as L

    seen: list[Any] = []

    class Seeing(L.Callback):
        def on_rewards_end(self, trainer, module, rollout):
            seen.append(rollout)

    trainer = make_trainer(
        rollout=options,
        callbacks=[Seeing()],
        num_minibatches=2,
        max_epochs=1,
        default_root_dir=str(folder),
    )
    module = make_module(model)
    trainer.fit(module, datamodule=make_data(rows, val_data=val_rows))
    return module, seen, trainer


def test_a_run_completes_each_prompt_as_its_column_says(char_model: str, tmp_path):
    rows = rows_with(None, {"max_completion_tokens": 2}, {"top_k": 1, "max_completion_tokens": 4})
    val_rows = rows_with({"temperature": 0.0}, num_rows=4)
    module, rollouts, trainer = fit(char_model, tmp_path, rows, val_rows, sampling_column="own")
    assert len(rollouts) == 2
    for rollout in rollouts:
        lengths = rollout.completion_mask.sum(1)
        for row, own in enumerate(rollout.columns["own"]):
            limit = (own or {}).get("max_completion_tokens", 6)
            assert int(lengths[row]) == limit or not bool(rollout.truncated[row])
            assert int(lengths[row]) <= limit
        greedy = [row for row, own in enumerate(rollout.columns["own"]) if own and "top_k" in own]
        texts = {(rollout.prompts[row], rollout.completions[row]) for row in greedy}
        assert len(texts) == len({rollout.prompts[row] for row in greedy})
    # The sampler's log-probs are not those of the model, and greedy samples of a prompt agree.
    assert module.choices.old_logprobs == "recompute"
    metrics = trainer.callback_metrics
    assert metrics["val/pass_at_1"] == metrics["val/pass_at_k"]


@pytest.mark.parametrize(
    ("options", "choice"),
    [
        ({}, "sampler"),
        ({"bad_words": ["7"]}, "recompute"),
        ({"min_completion_tokens": 2}, "recompute"),
    ],
)
def test_old_logprobs_are_recomputed_where_tokens_are_restricted(
    char_model: str, tmp_path, options: dict[str, Any], choice: str
):
    module, _, _ = fit(char_model, tmp_path, None, **options)
    assert module.choices.old_logprobs == choice


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"temperature": 0.5}, "'own' of data.train_data has a temperature.*one for all prompts"),
        ({"top_q": 1}, "sampling_column 'own' of data.train_data: prompt 1 of 16: 'top_q' is none"),
        ({"max_completion_tokens": 7}, "data.train_data: prompt 1 of 16: .*bounds all"),
    ],
)
def test_a_column_that_cannot_be_followed_stops_the_run_at_once(
    char_model: str, tmp_path, own: Any, message: str
):
    with pytest.raises(ValueError, match=message):
        fit(char_model, tmp_path, rows_with(own), sampling_column="own")


def test_a_column_that_no_data_has_is_named(char_model: str, tmp_path):
    with pytest.raises(ValueError, match="sampling_column names 'other', which no data has"):
        fit(char_model, tmp_path, None, sampling_column="other")


def test_the_samplers_logprobs_are_not_trusted_where_a_prompt_restricts_tokens(
    char_model: str, tmp_path
):
    for own, is_refused in (({"top_k": 3}, True), ({"max_completion_tokens": 3}, False)):
        trainer = make_trainer(
            rollout={"sampling_column": "own"}, max_steps=1, default_root_dir=str(tmp_path)
        )
        module = make_module(char_model, old_logprobs="sampler")
        data = make_data(rows_with(None, own))
        if not is_refused:
            trainer.fit(module, datamodule=data)
            continue
        with pytest.raises(ValueError, match="old_logprobs sampler does not go with top_k"):
            trainer.fit(module, datamodule=data)


def test_prediction_takes_the_settings_of_its_data(char_model: str, tmp_path):
    rows = rows_with({"max_completion_tokens": 2}, {"temperature": 0, "max_completion_tokens": 3})
    trainer = make_trainer(rollout={"sampling_column": "own"}, default_root_dir=str(tmp_path))
    made = trainer.predict(make_module(char_model), datamodule=make_data(predict_data=rows))
    lengths = torch.cat([rollout.completion_mask.sum(1) for rollout in made])
    limits = [row["own"]["max_completion_tokens"] for row in rows for _ in range(4)]
    assert bool((lengths <= torch.tensor(limits)).all()) and int(lengths.max()) == 3


def test_prompts_without_any_give_nothing(make_engine, char_model: str):
    policy, tokenizer = load(char_model)
    drawn = make_engine(policy, tokenizer, [1]).generate(
        PromptBatch([], [], {}, []), [], 2, key=KEY
    )
    assert len(drawn.completion_ids) == 0

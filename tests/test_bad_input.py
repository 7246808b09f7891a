"""What a run says about input that cannot work, and what it bears."""

from __future__ import annotations

import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from command_lines import run, write_config
from lightning.pytorch.callbacks import Callback
from runs import make_data, make_module, make_trainer, spread_reward
from transformers import AutoTokenizer

from lightning_grpo.algorithms import GRPO
from lightning_grpo.callbacks import HealthWarnings
from lightning_grpo.rewards.scorer import RewardError

# Reward functions


def too_short(completions: list[str], **columns: Any) -> list[float]:
    return [0.0]


def not_a_number(completions: list[str], **columns: Any) -> list[float]:
    return [0.0, 1.0] + [float("nan")] * (len(completions) - 2)


def words(completions: list[str], **columns: Any) -> list[str]:
    return ["good"] * len(completions)


def raising(completions: list[str], **columns: Any) -> list[float]:
    raise KeyError("no such answer")


def nothing_for_odd_rows(completions: list[str], **columns: Any) -> list[float | None]:
    return [None if row % 2 else float(row) for row in range(len(completions))]


def equal(completions: list[str], **columns: Any) -> list[float]:
    return [0.5] * len(completions)


def needing_solution(completions: list[str], solution: list[str]) -> list[float]:
    return [0.0] * len(completions)


def fit(model: str, *, module: dict[str, Any] | None = None, data: Any = None, **options: Any):
    """Fit for one step; returns the trainer and its module."""
    made = make_module(model, **(module or {}))
    trainer = make_trainer(**({"max_steps": 1} | options))
    trainer.fit(made, data or make_data())
    return trainer, made


BAD_REWARDS = [
    (too_short, "'too_short' returned 1 values, expected 32, one per completion"),
    (not_a_number, r"'not_a_number' returned nan for row 2 \(completion "),
    (words, r"'words' returned 'good' for row 0 \(completion "),
    (raising, "'raising' raised KeyError: 'no such answer'"),
]


@pytest.mark.parametrize(("function", "message"), BAD_REWARDS)
def test_a_faulty_reward_function_stops_the_run_and_is_named(char_model, function, message):
    with pytest.raises(RewardError, match=message):
        fit(char_model, reward=function)


@pytest.mark.parametrize(("function", "message"), BAD_REWARDS)
@pytest.mark.parametrize(("policy", "filled"), [("skip", None), ("value", -1.0)])
def test_a_faulty_reward_function_can_be_borne(
    char_model, function, message, policy, filled, caplog
):
    options = {"on_error": policy, "error_value": -1.0}
    with caplog.at_level(logging.WARNING):
        trainer, module = fit(
            char_model, reward=[function, spread_reward], reward_options=options, group_size=4
        )
    assert module.counters.optimizer_steps == 1
    assert any(function.__name__ in record.getMessage() for record in caplog.records)
    share = 30 / 64 if function is not_a_number else 0.5
    assert float(trainer.callback_metrics["reward/failed_frac"]) == pytest.approx(share)
    logged = trainer.callback_metrics.get(f"reward/{function.__name__}")
    if function is not_a_number:
        mean = 0.5 if filled is None else (1 - 30) / 32
        assert float(logged) == pytest.approx(mean)
    else:
        assert logged is None if filled is None else float(logged) == filled


def test_a_run_whose_only_function_fails_under_skip_teaches_nothing_and_says_so(char_model):
    before = {}

    class Weights(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            before.update({n: p.detach().clone() for n, p in module.policy.named_parameters()})

    with pytest.warns(UserWarning, match="no reward function scored any completion"):
        _, module = fit(
            char_model,
            reward=raising,
            reward_options={"on_error": "skip"},
            callbacks=[Weights(), HealthWarnings()],
            module={"beta": 0.0},
        )
    for name, parameter in module.policy.named_parameters():
        assert torch.equal(parameter, before[name])


def test_a_row_without_a_reward_counts_for_nothing(char_model):
    advantages = []

    class Watch(Callback):
        def on_minibatch_end(self, trainer: Any, module: Any, minibatch: Any, output: Any) -> None:
            advantages.append(minibatch.rollout.advantages[:, 0].reshape(-1, 4))

    trainer, _ = fit(char_model, reward=nothing_for_odd_rows, callbacks=[Watch()])
    (values,) = advantages
    assert torch.equal(values[:, 1::2], torch.zeros(8, 2))
    # Of two scored rows one is half a sample deviation below the mean and one above.
    assert torch.allclose(values[:, 0::2], torch.tensor([-1.0, 1.0]) * 2**-0.5, atol=1e-6)


def test_a_reward_function_that_needs_another_column_is_refused_at_start(char_model):
    with pytest.raises(ValueError, match="'needing_solution' needs the column 'solution'.*answer"):
        fit(char_model, reward=needing_solution)


def test_equal_rewards_have_exactly_no_policy_gradient(char_model):
    gradients = []

    class Gradients(Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            gradients.extend(p.grad.abs().max().item() for p in module.policy.parameters())

    fit(char_model, reward=equal, module={"beta": 0.0}, callbacks=[Gradients()])
    assert gradients and set(gradients) == {0.0}


# Groups, lengths, positions


def test_groups_of_one_are_refused(char_model):
    with pytest.raises(ValueError, match=r"rollout\.group_size is 1.*set it to 2 or more"):
        fit(char_model, group_size=1)


def test_more_minibatches_than_prompts_are_refused(char_model):
    with pytest.raises(ValueError, match=r"replay\.num_minibatches is 9 but .* 8 prompts"):
        fit(char_model, num_minibatches=9)


def test_a_prompt_beyond_the_context_is_refused_with_its_length(char_model):
    rows = [{"prompt": "1" * length} for length in (3, 70, 5)]
    data = make_data(rows, prompts_per_iteration=1)
    with pytest.raises(ValueError, match=r"longest prompt \(70 tokens\).*64 positions"):
        fit(char_model, data=data)
    data = make_data(rows, prompts_per_iteration=1, max_prompt_tokens=20)
    with pytest.raises(ValueError, match=r"data\.train_data: row 2 has a prompt of 70 tokens"):
        fit(char_model, data=data)


def test_prompt_and_completion_beyond_the_positions_are_refused(char_model):
    with pytest.raises(
        ValueError, match=r"rollout\.max_completion_tokens \(61\) make 65 tokens.*64 positions"
    ):
        fit(char_model, max_completion_tokens=61)
    fit(char_model, max_completion_tokens=60)


# Tokenizers


def changed_tokenizer(model: str, **changes: Any) -> str:
    """A copy of the model with other special tokens."""
    shutil.copytree(model, "changed")
    tokenizer = AutoTokenizer.from_pretrained("changed")
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained("changed")
    for name in ("generation_config.json", "config.json"):
        text = Path("changed", name).read_text()
        if "eos_token" in changes:
            text = text.replace('"eos_token_id": 1', '"eos_token_id": null')
        Path("changed", name).write_text(text)
    return "changed"


def test_a_tokenizer_without_padding_works(char_model):
    model = changed_tokenizer(char_model, pad_token=None)
    assert AutoTokenizer.from_pretrained(model).pad_token is None
    _, module = fit(model)
    assert module.counters.optimizer_steps == 1


def test_a_tokenizer_without_eos_needs_a_stop_string(char_model):
    model = changed_tokenizer(char_model, eos_token=None)
    with pytest.raises(ValueError, match=r"EOS token.*set rollout\.stop_strings"):
        fit(model)
    _, module = fit(model, rollout={"stop_strings": ["="]})
    assert module.counters.optimizer_steps == 1


def test_a_chat_without_a_chat_template_is_refused(char_model):
    with pytest.raises(ValueError, match=r"data\.train_data: row 1 is a chat.*no chat template"):
        fit(char_model, data=make_data(chat=True))


# Completions


class Bias(Callback):
    """Makes one token certain, or impossible."""

    def __init__(self, token: int, bias: float) -> None:
        self.token, self.bias = token, bias

    def on_train_start(self, trainer: Any, module: Any) -> None:
        def add(layer: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
            change = torch.zeros_like(logits)
            change[..., self.token] = self.bias
            return logits + change

        module.policy.causal_lm.lm_head.register_forward_hook(add)


def test_completions_that_end_at_once_train(char_model):
    seen = []

    def lengths(completions: list[str], completion_ids: list[list[int]], **columns: Any):
        seen.extend(zip(completions, completion_ids, strict=True))
        return [float(row) for row in range(len(completions))]

    trainer, module = fit(
        char_model, reward=lengths, callbacks=[Bias(token=1, bias=1e4)], num_epochs=2, max_steps=2
    )
    assert {(text, tuple(ids)) for text, ids in seen} == {("", (1,))}
    assert module.counters.optimizer_steps == 2 and module.counters.skipped_steps == 0
    assert float(trainer.callback_metrics["completion/tokens_mean"]) == 1.0


def test_completions_that_never_end_are_warned_of_after_nine_in_ten(char_model):
    with pytest.warns(UserWarning, match=r"100% .* rollout\.max_completion_tokens \(6\)"):
        trainer, _ = fit(char_model, callbacks=[Bias(token=1, bias=-1e4), HealthWarnings()])
    assert float(trainer.callback_metrics["completion/truncated_frac"]) == 1.0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*max_completion_tokens")
        fit(char_model, callbacks=[HealthWarnings()], max_completion_tokens=40)


# Data files, through the command line


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "data.train_data: empty.jsonl has no rows"),
        ("bad.jsonl", '{"prompt": "1="}\n{"prompt": oops}\n', "bad.jsonl, line 2: not valid JSON"),
        ("list.jsonl", '{"prompt": "1="}\n[1]\n', "list.jsonl, line 2: an object is needed"),
        ("column.jsonl", '{"question": "1="}\n', "row 1 of 1: no column 'prompt'"),
        ("short.jsonl", '{"prompt": "1="}\n', "1 prompts, fewer than data.prompts_per_iteration=4"),
        ("absent.jsonl", None, "no such file: absent.jsonl"),
        ("data.pkl", "x", "data.pkl has an unknown ending '.pkl'"),
    ],
)
def test_faulty_data_is_one_line_that_names_file_and_place(
    monkeypatch, char_model, name, content, message
):
    monkeypatch.setattr("sys.argv", ["__main__.py"])
    if content is not None:
        Path(name).write_text(content)
    with pytest.raises(SystemExit) as stop:
        run("fit", "--config", write_config(char_model), "--data.train_data", name)
    last = str(stop.value.code).splitlines()[-1]
    assert last.startswith("error: data.train_data") and message in last
    assert list(Path("runs").glob("*")) == []


def test_an_error_of_a_reward_function_shows_where_it_was_raised(monkeypatch, char_model):
    monkeypatch.setattr("sys.argv", ["__main__.py"])
    options = ["--reward.functions", "[test_bad_input.raising]", "--validation.at_start", "false"]
    with pytest.raises(SystemExit) as stop:
        run("fit", "--config", write_config(char_model), *options)
    text = str(stop.value.code)
    assert "in raising" in text and "test_bad_input.py" in text
    assert text.splitlines()[-1].startswith("error: reward function 'raising' raised KeyError")


# Precision


def test_rewards_are_computed_outside_of_the_policys_precision(char_model):
    seen = []

    def reward(completions: list[str], **columns: Any) -> list[float]:
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_default_dtype()))
        return spread_reward(completions)

    for precision in ("bf16-mixed", "bf16-true"):
        data = make_data(val_data=[{"prompt": "1="}])
        trainer = make_trainer(reward=reward, precision=precision)
        trainer.fit(make_module(char_model), data)
    assert len(seen) == 6  # two rollouts and a validation in each
    assert set(seen) == {(False, torch.float32)}


def test_logits_that_are_not_finite_are_named(char_model):
    class Break(Callback):
        def on_iteration_end(self, trainer: Any, module: Any, rollout: Any) -> None:
            with torch.no_grad():
                next(module.policy.parameters()).fill_(torch.nan)

    trainer = make_trainer(callbacks=[Break()])
    with pytest.raises(RuntimeError, match="the policy's logits are not finite"):
        trainer.fit(make_module(char_model), make_data())


def test_updates_that_would_be_rounded_away_are_warned_of(char_model):
    trainer = make_trainer(precision="bf16-true", max_steps=1)
    with pytest.warns(UserWarning, match=r"half precision and the learning rate is 1\.0e-06"):
        trainer.fit(make_module(char_model, learning_rate=1e-6), make_data())


def test_a_kl_estimator_without_gradient_is_warned_of(char_model):
    trainer = make_trainer(max_steps=1)
    with pytest.warns(UserWarning, match="k1 has no gradient in expectation"):
        trainer.fit(make_module(char_model, algorithm=GRPO(kl_estimator="k1")), make_data())


def test_trusting_a_truncated_sampler_is_refused(char_model):
    trainer = make_trainer(rollout={"top_k": 3})
    with pytest.raises(ValueError, match=r"model\.old_logprobs sampler does not go with"):
        trainer.fit(make_module(char_model, old_logprobs="sampler"), make_data())


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_prompts_too_long_are_refused_before_an_evaluation_too(char_model, stage):
    rows = [{"prompt": "1" * 61 + "="}]
    data = make_data(val_data=rows, test_data=rows, predict_data=rows)
    trainer = make_trainer()
    with pytest.raises(ValueError, match="the model has only 64 positions"):
        getattr(trainer, stage)(make_module(char_model), data)

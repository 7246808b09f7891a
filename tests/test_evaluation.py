from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from runs import make_data, make_module, make_trainer

from lightning_grpo.evaluation import (
    Judge,
    majority_success,
    pass_at_k,
    update_metrics,
    validation_metrics,
)


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "k", "expected"),
    [(4, 1, 1, 0.25), (4, 1, 2, 0.5), (4, 2, 2, 5 / 6), (10, 3, 5, 11 / 12), (5, 0, 5, 0.0)],
)
def test_pass_at_k_of_hand_worked_counts(num_samples, num_correct, k, expected):
    assert pass_at_k(num_samples, num_correct, k) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("num_samples", [1, 3, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(num_samples):
    for num_correct, k in itertools.product(range(num_samples + 1), range(1, num_samples + 1)):
        samples = [i < num_correct for i in range(num_samples)]
        subsets = list(itertools.combinations(samples, k))
        share = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(num_samples, num_correct, k) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_needs_enough_samples(k):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(4, 2, k)


@pytest.mark.parametrize(
    ("answers", "successes", "expected"),
    [
        (["1", "1", "2"], [True, True, False], 1.0),
        (["1", "2", "2"], [True, False, False], 0.0),
        (["1", "2"], [True, False], 0.5),
        (["1", "1", "2", "2", "3", "3"], [True, True, False, False, False, False], 1 / 3),
        ([None, None, "5"], [False, False, True], 1.0),
        ([None, None], [True, True], 0.0),
    ],
)
def test_the_majority_is_right_when_its_answer_is(answers, successes, expected):
    assert majority_success(answers, successes) == pytest.approx(expected)


def test_the_judge_takes_one_function_and_a_threshold():
    rewards = {
        "form": torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64),
        "right": torch.tensor([0.5, math.nan, 1.0], dtype=torch.float64),
    }
    assert Judge().successes(rewards) == [True, True, False]
    assert Judge("right").successes(rewards) == [False, False, True]
    assert Judge("right", 0.5).successes(rewards) == [True, False, True]
    with pytest.raises(ValueError, match=r"reward\.success_function 'wrong'"):
        Judge("wrong").successes(rewards)


def test_answers_are_stripped_texts_or_what_is_extracted():
    chat = [{"role": "assistant", "content": " 7 \n"}]
    assert Judge().answers([" a ", chat]) == ["a", "7"]
    last = Judge(extract_answer=lambda text: text.strip()[-1:] or None)
    assert last.answers(["x1", " "]) == ["1", None]


def test_metrics_are_means_over_prompts_and_completions():
    metrics = validation_metrics("val/")
    update_metrics(
        metrics,
        num_samples=2,
        k=2,
        successes=[True, False, False, False],
        answers=["1", "2", "3", "3"],
        rewards=torch.tensor([1.0, 0.0, math.nan, 0.25]),
        num_tokens=torch.tensor([1, 2, 3, 6]),
        truncated=torch.tensor([False, False, False, True]),
    )
    # A rank whose prompts are used up takes part with nothing.
    nothing = torch.zeros(0)
    update_metrics(
        metrics,
        num_samples=2,
        k=2,
        successes=[],
        answers=[],
        rewards=nothing,
        num_tokens=nothing,
        truncated=nothing.bool(),
    )
    values = {name: float(value) for name, value in metrics.compute().items()}
    assert values == pytest.approx(
        {
            "val/pass_at_1": 0.25,
            "val/pass_at_k": 0.5,
            "val/maj_at_k": 0.25,
            "val/reward": 1.25 / 3,
            "val/completion_tokens": 3.0,
            "val/truncated_frac": 0.25,
        }
    )


def right_for_even_rows(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """Right or wrong by the data alone, so that the metrics are known."""
    return [float(int(value) % 2 == 0) for value in answer]


def one_of_four(completions: list[str], **columns: Any) -> list[float]:
    """The first of each four completions is right."""
    return [float(row % 4 == 0) for row in range(len(completions))]


@pytest.mark.parametrize(
    ("reward", "pass_at_1", "pass_at_2"),
    [(right_for_even_rows, 0.5, 0.5), (one_of_four, 0.25, 0.5)],
)
def test_validate_measures_pass_at_1_and_pass_at_k(char_model, reward, pass_at_1, pass_at_2):
    rows = [{"prompt": f"{i}=", "answer": str(i)} for i in range(10)]
    trainer = make_trainer(reward=reward, rollout={"num_val_samples": 4, "pass_k": 2})
    data = make_data(rows, val_data=rows, val_prompts_per_batch=3)
    (values,) = trainer.validate(make_module(char_model), data, verbose=False)
    assert values["val/pass_at_1"] == pytest.approx(pass_at_1)
    assert values["val/pass_at_k"] == pytest.approx(pass_at_2)
    assert values["val/reward"] == pytest.approx(pass_at_1)
    assert 1 <= values["val/completion_tokens"] <= 6


def test_two_validations_of_one_policy_give_the_same_numbers(char_model):
    rows = [{"prompt": f"{i}="} for i in range(8)]
    results = []
    for batch_size in (8, 3):
        trainer = make_trainer()
        data = make_data(rows, val_data=rows, val_prompts_per_batch=batch_size)
        (values,) = trainer.validate(make_module(char_model), data, verbose=False)
        results.append(values)
    assert results[0] == pytest.approx(results[1], abs=1e-6)


def test_predictions_of_a_trainer_in_python_are_rollouts(char_model):
    rows = [{"prompt": f"{i}="} for i in range(4)]
    trainer = make_trainer(rollout={"num_val_samples": 2})
    data = make_data(rows, predict_data=rows)
    (rollout,) = trainer.predict(make_module(char_model), data)
    assert rollout.prompts == ["0=", "0=", "1=", "1=", "2=", "2=", "3=", "3="]
    assert rollout.rewards is None

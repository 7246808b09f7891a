"""The built-in tasks: right answers, disjoint splits, the same rows in every process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lightning_grpo.tasks import ShiftedDigits, SortDigits, right_digits, sorted_exactly
from lightning_grpo.types import CompletionText


def rows_of(task: SortDigits) -> list[dict]:
    return [task[i] for i in range(len(task))]


def test_the_answer_is_the_prompts_digits_in_order():
    for row in rows_of(SortDigits(200, min_digits=3, max_digits=6)):
        digits = row["prompt"].removesuffix("=")
        assert row["prompt"] == digits + "="
        assert Counter(digits) == Counter(row["answer"])
        assert all(a <= b for a, b in zip(row["answer"], row["answer"][1:]))
        assert row["completion"] == row["answer"]
        assert 3 <= len(digits) <= 6


def test_training_and_validation_share_no_prompt_whatever_their_seeds_and_lengths():
    train = {row["prompt"] for seed in (0, 1) for row in rows_of(SortDigits(600, 1, 3, seed=seed))}
    val = {
        row["prompt"]
        for seed in (0, 1)
        for row in rows_of(SortDigits(90, 2, 4, split="val", seed=seed))
    }
    assert len(train) > 600 and len(val) > 90
    assert not train & val


def test_no_prompt_comes_twice_and_all_lengths_are_alike():
    prompts = [row["prompt"] for row in rows_of(SortDigits(4000, 4, 7))]
    assert len(set(prompts)) == 4000
    lengths = Counter(len(prompt) - 1 for prompt in prompts)
    assert set(lengths) == {4, 5, 6, 7}
    assert all(900 < count < 1100 for count in lengths.values())


def test_the_rows_depend_on_the_seed_and_on_nothing_else():
    expected = [row["prompt"] for row in rows_of(SortDigits(5, seed=7))]
    assert [row["prompt"] for row in rows_of(SortDigits(5, seed=8))] != expected
    script = (
        "from lightning_grpo.tasks import SortDigits\n"
        "print(*(SortDigits(5, seed=7)[i]['prompt'] for i in range(5)))"
    )
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": root}
    printed = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert printed.split() == expected
    assert expected == PINNED


PINNED = ["42060=", "5121410=", "64426016=", "55458129=", "7035="]


def test_only_the_sorted_digits_are_rewarded():
    completions: list[CompletionText] = [
        "12459",
        " 12459\n",
        "12495",
        "1245",
        "124590",
        "",
        "12459=",
        [{"role": "assistant", "content": "12459"}],
        [{"role": "assistant", "content": "52914"}],
    ]
    rewards = sorted_exactly(completions=completions, answer=["12459"] * 9, prompts=["52914="] * 9)
    assert rewards == [1, 1, 0, 0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prompts": 0}, "num_prompts must be at least 1"),
        ({"min_digits": 0}, "min_digits=0 must lie between 1 and"),
        ({"min_digits": 9, "max_digits": 8}, "min_digits=9 must lie between 1 and max_digits=8"),
        ({"split": "test"}, "split must be train or val, got 'test'"),
        (
            {"num_prompts": 11, "min_digits": 1, "max_digits": 1},
            "different prompts of 1 to 1 digits in this split, not num_prompts=11",
        ),
    ],
)
def test_impossible_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SortDigits(**options)


def test_shifted_digits_ask_for_each_digit_moved_on_by_three():
    rows = ShiftedDigits(50, 16, seed=1)
    row = rows[7]
    assert len(row["prompt"]) == 17 and row["prompt"][-1] == "="
    pairs = [(int(a), int(b)) for a, b in zip(row["prompt"], row["answer"])]
    assert len(pairs) == 16 and all((a + 3 - b) % 10 == 0 for a, b in pairs)
    assert row["completion"] == row["answer"]
    assert [rows[i] for i in range(50)] == [ShiftedDigits(90, 16, seed=1)[i] for i in range(50)]
    assert rows[0] != ShiftedDigits(50, 16, seed=2)[0]
    with pytest.raises(ValueError, match="num_digits must be at least 1, got 0"):
        ShiftedDigits(num_digits=0)


def test_every_right_digit_counts_by_itself():
    completions = ["7328", "732", "", "9328", "8327x", [{"role": "assistant", "content": "7328"}]]
    assert right_digits(completions, ["7328"] * 6) == [4.0, 3.0, 0.0, 3.0, 2.0, 4.0]

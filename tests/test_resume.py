"""Runs that are stopped and go on in another process end in the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from resume_runs import CASES, Stop, check, differences, rows_of, whole_run

HOW = ["sigterm", "sigkill", "exception"]


@pytest.fixture(scope="module")
def whole_runs(char_model, tmp_path_factory) -> dict[str, Path]:
    """The run of each case that nothing stops, made when it is first asked for."""

    class Runs(dict):
        def __missing__(self, name: str) -> Path:
            self[name] = whole_run(char_model, name, tmp_path_factory.mktemp(name) / "whole")
            return self[name]

    return Runs()


def test_a_whole_run_is_what_the_others_are_compared_with(char_model, whole_runs, tmp_path: Path):
    """It learns, validates after each epoch, and the comparison sees another run."""
    folder = whole_runs["grpo"]
    rows = rows_of(folder)
    assert [row["step"] for row in rows if "policy/loss" in row] == [str(i) for i in range(24)]
    assert sum("val/reward" in row for row in rows) == 3
    assert len(list((folder / "samples").iterdir())) == 12
    other = whole_run(char_model, "lora", tmp_path / "other")
    wrong = differences(other, folder)
    assert {"weights", "moments", "prompts", "beta", "torch"} <= set(wrong)
    assert any(name.startswith("samples") for name in wrong)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("rollout", 2),  # after the first iteration
        ("update", 7),  # between the two steps of the second
        ("epoch", 1),
    ],
)
def test_grpo_ends_in_the_same_bits(char_model, whole_runs, tmp_path: Path, moment, number, how):
    stop = Stop(moment, number, how)
    assert check(char_model, "grpo", whole_runs["grpo"], tmp_path / "run", stop) == []


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("ppo", Stop("hooks", 10, "exception")),
        ("lora", Stop("reward", 9, "sigterm")),
        ("switched", Stop("update", 22, "sigterm")),
        ("grpo", Stop("saved", 5, "sigkill")),
        ("grpo", Stop("validation", 2, "sigterm")),
        ("ddp", Stop("rollout", 6, "sigterm", ranks=(1,))),
        ("fsdp2", Stop("reward", 7, "exception", ranks=(1,))),
    ],
)
def test_other_runs_do_too(char_model, whole_runs, tmp_path: Path, name, stop):
    assert stop.how in HOW and name in CASES
    assert check(char_model, name, whole_runs[name], tmp_path / "run", stop) == []

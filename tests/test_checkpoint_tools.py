"""inspect, diff and average say of checkpoints what is in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_lines import run

from lightning_grpo.checkpoints import (
    BrokenCheckpointError,
    Manifest,
    Metric,
    Sections,
    open_checkpoint,
    write_checkpoint,
)
from lightning_grpo.tools.average import average
from lightning_grpo.tools.diff import diff
from lightning_grpo.tools.inspect import inspect


def saved(folder: Path, weights: dict, *, step: int = 3, run: dict | None = None) -> str:
    state = {"lightning_grpo": {"counters": {"iterations": step}, "beta": 0.04, **(run or {})}}
    optimizers = [{"state": {"policy.w": {"exp_avg": torch.ones(2)}}, "param_groups": []}]
    manifest = Manifest(
        kind="last", step=step, serial=1, files={}, stage="grpo", metric=Metric("val/pass", 0.5)
    )
    write_checkpoint(folder, Sections(state, weights, optimizers), manifest)
    return str(folder)


def test_inspect_tells_step_sizes_types_and_metric(tmp_path: Path, capsys):
    weights = {"policy.w": torch.zeros(2, 3), "policy.b": torch.zeros(5, dtype=torch.bfloat16)}
    path = saved(tmp_path / "a", weights)
    found = inspect(path, check_sha256=True, json=str(tmp_path / "found.json"))
    assert found["step"] == 3
    assert found["stage"] == "grpo"
    assert found["metric"] == {"val/pass": 0.5}
    assert found["run"]["counters"]["iterations"] == 3
    assert found["parts"]["weights"] == {
        "num_tensors": 2,
        "num_values": {"float32": 6, "bfloat16": 5},
        "num_bytes": 34,
    }
    assert found["parts"]["optimizer"]["num_bytes"] == 8
    assert json.loads((tmp_path / "found.json").read_text()) == found
    text = capsys.readouterr().out
    assert "every byte is as it was written" in text
    assert "counters.iterations" in text


def test_inspect_finds_a_flipped_bit_only_when_it_reads_all(tmp_path: Path):
    path = saved(tmp_path / "a", {"policy.w": torch.zeros(64)})
    file = tmp_path / "a" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    inspect(path)
    with pytest.raises(BrokenCheckpointError, match=r"weights\.safetensors is damaged"):
        inspect(path, check_sha256=True)


def test_diff_gives_distances_and_what_only_one_has(tmp_path: Path, capsys):
    first = {
        "policy.w": torch.tensor([3.0, 4.0]),
        "policy.same": torch.ones(2),
        "policy.zero": torch.zeros(2),
        "critic.head": torch.ones(1),
    }
    second = {
        "policy.w": torch.tensor([3.0, 5.0]),
        "policy.same": torch.ones(2),
        "policy.zero": torch.tensor([0.0, 2.0]),
        "policy.more": torch.ones(1),
    }
    a = saved(tmp_path / "a", first)
    b = saved(tmp_path / "b", second, step=5, run={"beta": 0.1})
    found = diff(a, b)
    assert found["tensors"]["policy.w"] == {"relative": 0.2, "largest": 1.0}
    assert found["tensors"]["policy.same"] == {"relative": 0.0, "largest": 0.0}
    assert found["tensors"]["policy.zero"] == {"relative": None, "largest": 2.0}
    assert (found["only_in_first"], found["only_in_second"]) == (["critic.head"], ["policy.more"])
    assert found["state"] == {"step": [3, 5], "counters.iterations": [3, 5], "beta": [0.04, 0.1]}
    assert "2 of 3 tensors differ" in capsys.readouterr().out


def test_the_average_is_the_weighted_mean_without_an_optimizer(tmp_path: Path, capsys):
    a = saved(tmp_path / "a", {"policy.w": torch.tensor([1.0, 2.0])}, step=7)
    b = saved(tmp_path / "b", {"policy.w": torch.tensor([3.0, -2.0])})
    out = tmp_path / "mean"
    average([a, b], str(out), weights=[3.0, 1.0], dry_run=True)
    assert not out.exists()
    average([a, b], str(out), weights=[3.0, 1.0])
    mean = open_checkpoint(out, check_sha256=True)
    assert {n: t.tolist() for n, t in mean.read_weights()} == {"policy.w": [1.5, 1.0]}
    assert mean.manifest.step == 7
    assert mean.read_all().optimizers is None


def test_bf16_weights_are_averaged_before_they_are_rounded(tmp_path: Path):
    values = [1.0, 1.0, 1.0078125]  # neighbours in bfloat16
    paths = [
        saved(tmp_path / str(i), {"policy.w": torch.tensor([v], dtype=torch.bfloat16)})
        for i, v in enumerate(values)
    ]
    average(paths, str(tmp_path / "mean"), weights=[1.0, 1.0, 4.0])
    (_, mean), *_ = open_checkpoint(tmp_path / "mean").read_weights()
    assert mean.dtype == torch.bfloat16
    assert mean.item() == 1.0078125


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1.0], "1 numbers for 2"), ([0.0, 0.0], "not all 0"), ([2.0, -1.0], "must be >= 0")],
)
def test_weights_that_make_no_mean_are_refused(tmp_path: Path, weights, message):
    paths = [saved(tmp_path / name, {"policy.w": torch.ones(1)}) for name in "ab"]
    with pytest.raises(ValueError, match=message):
        average(paths, str(tmp_path / "mean"), weights=weights)


def test_checkpoints_of_two_models_have_no_mean(tmp_path: Path):
    a = saved(tmp_path / "a", {"policy.w": torch.ones(1)})
    b = saved(tmp_path / "b", {"policy.w": torch.ones(2)})
    with pytest.raises(ValueError, match=r"not of the same model.*policy\.w"):
        average([a, b], str(tmp_path / "mean"))


def test_the_commands_take_paths_without_names(tmp_path: Path, capsys):
    a = saved(tmp_path / "a", {"policy.w": torch.tensor([1.0])})
    b = saved(tmp_path / "b", {"policy.w": torch.tensor([3.0])})
    run("inspect", a, "--check-sha256")
    run("diff", a, b, "--num_tensors", "1")
    run("average", a, b, "--out", str(tmp_path / "mean"))
    out = capsys.readouterr().out
    assert "every byte is as it was written" in out and "1 of 1 tensors differ" in out
    assert dict(open_checkpoint(tmp_path / "mean").read_weights())["policy.w"].item() == 2.0
    with pytest.raises(SystemExit, match="one value more than there are options"):
        run("diff", a, b, "3", "found.json", "more")

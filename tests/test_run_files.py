from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lightning_grpo.checkpoint_paths import run_dir_of
from lightning_grpo.checkpoints.io import FolderCheckpointIO
from lightning_grpo.run_files import (
    ResumableCSVLogger,
    ResumePoint,
    Run,
    choose_run_dir,
    config_file_name,
    find_checkpoint,
    newest_config,
    remove_if_nothing_ran,
    run_loggers,
)


def touch(path: str) -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    return file


def test_runs_are_counted_by_number_and_not_by_name():
    for name in ("version_2", "version_10", "version_9", "version_x", "other"):
        Path("runs/a", name).mkdir(parents=True)
    run = Run(name="a")
    assert [path.name for path in run.versions()] == ["version_2", "version_9", "version_10"]
    assert run.next_dir() == Path("runs/a/version_11")
    assert Run(name="b").next_dir() == Path("runs/b/version_0")


@pytest.mark.parametrize("name", ["", "../a", "/tmp/a", "a/../../b"])
def test_a_name_outside_of_the_folder_of_runs_is_refused(name):
    with pytest.raises(ValueError, match=r"run\.name"):
        Run(name=name)


def save(path: str) -> str:
    FolderCheckpointIO().save_checkpoint({"global_step": int(path[-6:])}, path)
    return path


def test_last_and_best_are_those_of_the_newest_run_that_has_one():
    run = Run(name="a")
    first = save("runs/a/version_0/checkpoints/last-000003")
    newest = save("runs/a/version_10/checkpoints/last-000002")
    best = save("runs/a/version_9/checkpoints/best-000002")
    Path("runs/a/version_11").mkdir()
    assert find_checkpoint("last", run) == newest
    assert find_checkpoint("auto", run) == newest
    assert find_checkpoint("best", run) == best
    assert find_checkpoint(first, run) == first
    assert find_checkpoint("runs/a/version_9/checkpoints/best", run) == best
    assert find_checkpoint("auto", Run(name="b")) is None
    with pytest.raises(ValueError, match="no run in runs/b has a checkpoint of that kind"):
        find_checkpoint("last", Run(name="b"))
    with pytest.raises(ValueError, match="there is no such checkpoint; .*/auto takes the newest"):
        find_checkpoint("runs/a/version_0/checkpoints/best-000003", run)
    with pytest.raises(ValueError, match="of a run take .*: runs/a/version_0/checkpoints/last"):
        find_checkpoint("runs/a/version_0", run)


def test_a_run_whose_only_checkpoint_is_broken_is_not_passed_over():
    save("runs/a/version_0/checkpoints/last-000003")
    Path(save("runs/a/version_1/checkpoints/last-000002"), "state.json").unlink()
    for wanted in ("last", "auto"):
        with (
            pytest.warns(UserWarning, match="last-000002 is left out"),
            pytest.raises(ValueError, match=f"--ckpt_path {wanted}: .*holds no complete"),
        ):
            find_checkpoint(wanted, Run(name="a"))


def test_a_resumed_run_keeps_its_folder_and_any_other_gets_a_new_one():
    inside = "elsewhere/a/version_3/checkpoints/last-000004"
    assert run_dir_of(inside) == Path("elsewhere/a/version_3")
    assert run_dir_of(str(Path(inside).absolute())) == Path("elsewhere/a/version_3").absolute()
    assert choose_run_dir(Run(name="a"), inside) == Path("elsewhere/a/version_3")
    loose = "downloads/model"
    assert run_dir_of(loose) is None
    assert choose_run_dir(Run(name="a"), loose) == Path("runs/a/version_0")
    assert choose_run_dir(Run(name="a"), None) == Path("runs/a/version_0")


def test_no_resume_overwrites_a_configuration():
    folder = Path("version_0")
    assert config_file_name(folder) == "config.yaml" and newest_config(folder) is None
    first = touch("version_0/config.yaml")
    assert newest_config(folder) == first
    assert config_file_name(folder) == "config_resume_1.yaml"
    touch("version_0/config_resume_1.yaml")
    tenth = touch("version_0/config_resume_10.yaml")
    assert config_file_name(folder) == "config_resume_11.yaml"
    assert newest_config(folder) == tenth


def rows_of(file: str) -> list[dict[str, str]]:
    with Path(file).open(newline="") as stream:
        return list(csv.DictReader(stream))


def log_steps(steps: range, num_rows: int | None, **metrics: float) -> None:
    resume = None if num_rows is None else ResumePoint(num_rows, num_rows)
    logger = ResumableCSVLogger(
        ".", name="a", version="v", flush_logs_every_n_steps=1, resume=resume
    )
    for step in steps:
        logger.log_metrics({"loss": float(step)} | metrics, step)
    logger.save()


def test_metrics_of_a_resumed_run_are_kept_up_to_its_step():
    log_steps(range(5), None)
    log_steps(range(3, 6), 3, reward=1.0)
    rows = rows_of("a/v/metrics.csv")
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    assert [row["reward"] for row in rows] == ["", "", "", "1.0", "1.0", "1.0"]
    assert [row["loss"] for row in rows] == ["0.0", "1.0", "2.0", "3.0", "4.0", "5.0"]


def test_a_resume_that_stops_before_it_logs_keeps_the_rows():
    log_steps(range(5), None)
    log_steps(range(0), 3)
    assert [row["step"] for row in rows_of("a/v/metrics.csv")] == ["0", "1", "2", "3", "4"]


def test_the_folder_of_a_run_that_never_began_is_removed_and_no_other():
    touch("runs/a/version_0/events.out.tfevents.1")
    touch("runs/a/version_0/config.yaml")
    touch("runs/a/version_1/metrics.csv")
    remove_if_nothing_ran(Path("runs/a/version_0"))
    remove_if_nothing_ran(Path("runs/a/version_1"))
    remove_if_nothing_ran(Path("runs/a/version_2"))
    assert [path.name for path in Path("runs/a").iterdir()] == ["version_1"]
    touch("other/b/version_0/config.yaml")
    remove_if_nothing_ran(Path("other/b/version_0"))
    assert list(Path("other").iterdir()) == []


def test_both_loggers_write_to_the_folder_of_the_run():
    loggers = run_loggers(Path("runs/a/version_4"), None)
    assert {Path(logger.log_dir) for logger in loggers} == {Path("runs/a/version_4")}

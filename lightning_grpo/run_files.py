"""Where a run's files are: the folder, its loggers, its checkpoints, and how a resume finds them."""

from __future__ import annotations

import csv
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

# Processes that Lightning launches for the other ranks inherit it.
RUN_DIR_VARIABLE = "LIGHTNING_GRPO_RUN_DIR"


@dataclass
class Run:
    """Where a run writes.

    Args:
        root_dir: folder of all runs.
        name: folder of runs of one kind; each run gets a version_<k> in it.
    """

    root_dir: str = "runs"
    name: str = "default"

    def __post_init__(self) -> None:
        parts = Path(self.name).parts
        if not self.name or Path(self.name).is_absolute() or ".." in parts:
            raise ValueError(f"run.name {self.name!r} has to name a folder inside run.root_dir")

    def versions(self) -> list[Path]:
        """Folders of earlier runs of this name, the oldest first."""
        folder = Path(self.root_dir) / self.name
        found = [p for p in folder.glob("version_*") if p.name[8:].isdigit()]
        return sorted(found, key=lambda p: int(p.name[8:]))

    def next_dir(self) -> Path:
        """The folder for a new run."""
        versions = self.versions()
        number = int(versions[-1].name[8:]) + 1 if versions else 0
        return Path(self.root_dir) / self.name / f"version_{number}"


def find_checkpoint(ckpt_path: str, run: Run) -> Path:
    """The checkpoint that `--ckpt_path` names.

    Args:
        ckpt_path: "last" or "best" of the newest run that has one, or a path.
        run: where runs of this name are.

    Returns:
        An existing path.

    Raises:
        ValueError: there is none; a run never starts from scratch instead.
    """
    if ckpt_path in ("last", "best"):
        for version in reversed(run.versions()):
            path = version / "checkpoints" / f"{ckpt_path}.ckpt"
            if path.exists():
                return path
        folder = Path(run.root_dir) / run.name
        raise ValueError(f"--ckpt_path {ckpt_path}: no run in {folder} has a {ckpt_path}.ckpt")
    path = Path(ckpt_path)
    if not path.exists():
        raise ValueError(f"--ckpt_path {ckpt_path}: there is no such file or folder")
    return path


def run_dir_of(checkpoint: Path) -> Path | None:
    """The run's folder that a checkpoint lies in; None when it lies somewhere else."""
    folder = checkpoint.absolute().parent
    return folder.parent if folder.name == "checkpoints" else None


def saved_step(checkpoint: Path) -> int:
    """Optimizer steps, skipped ones included, that a checkpoint has behind it."""
    file = checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint
    content: dict[str, Any] = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    return int(content["global_step"])


def choose_run_dir(run: Run, resume_from: Path | None) -> Path:
    """The folder this process writes to: a resumed run's own, or a new one.

    Args:
        run: where runs of this name are.
        resume_from: the checkpoint that is resumed, if any.

    Returns:
        The same folder in every process of this launch.
    """
    if RUN_DIR_VARIABLE in os.environ:
        return Path(os.environ[RUN_DIR_VARIABLE])
    resumed = run_dir_of(resume_from) if resume_from is not None else None
    run_dir = resumed or run.next_dir()
    os.environ[RUN_DIR_VARIABLE] = str(run_dir)
    return run_dir


def config_file_name(run_dir: Path) -> str:
    """config.yaml for a new run; config_resume_<n>.yaml for its n-th resume."""
    if not (run_dir / "config.yaml").exists():
        return "config.yaml"
    return f"config_resume_{len(list(run_dir.glob('config_resume_*.yaml'))) + 1}.yaml"


def run_loggers(run_dir: Path, resume_step: int | None) -> list[Any]:
    """TensorBoard and CSV in one folder, going on where a resumed run stands.

    Args:
        run_dir: <root>/<name>/version_<k>.
        resume_step: the step that is resumed; None for a new run.

    Returns:
        The two loggers.
    """
    place: dict[str, Any] = {"name": run_dir.parent.name, "version": run_dir.name}
    root = str(run_dir.parent.parent)
    purge = {} if resume_step is None else {"purge_step": resume_step}
    return [
        TensorBoardLogger(root, default_hp_metric=False, **place, **purge),
        ResumableCSVLogger(root, flush_logs_every_n_steps=1, resume_step=resume_step, **place),
    ]


class ResumableCSVLogger(CSVLogger):
    """A CSVLogger that keeps the rows of a run it resumes, up to the resumed step.

    Lightning's own deletes the file when it finds one.

    Args:
        *args: of CSVLogger.
        resume_step: rows of this step and later ones are dropped; None for a new run.
        **kwargs: of CSVLogger.
    """

    def __init__(self, *args: Any, resume_step: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.resume_step = resume_step

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, with the rows that were there."""
        if self._experiment is not None:
            return self._experiment
        file = Path(self.log_dir) / "metrics.csv"
        rows: list[dict[str, Any]] = []
        if self.resume_step is not None and file.exists():
            with file.open(newline="") as stream:
                rows = [r for r in csv.DictReader(stream) if int(r["step"]) < self.resume_step]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Experiment logs directory")
            writer = CSVLogger.experiment.fget(self)  # type: ignore[attr-defined]
        writer.metrics = rows
        writer.save()
        return writer

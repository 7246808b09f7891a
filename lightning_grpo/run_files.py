"""Where a run keeps its files: folder, loggers and checkpoints, and how a resume finds them."""

from __future__ import annotations

import csv
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from upath import UPath

from lightning_grpo.checkpoint_paths import checkpoint_dir, has_checkpoints, run_dir_of, shown
from lightning_grpo.checkpoints import BrokenCheckpointError, resolve_checkpoint
from lightning_grpo.saved_run import KEY, read_checkpoint


@dataclass
class Run:
    """Where a run writes, and how many threads compute.

    Args:
        root_dir: folder of all runs, a path or a URL such as s3://bucket/runs.
        name: folder of runs of one kind; each run gets a version_<k> in it.
        num_threads: threads of torch on the CPU; null leaves it to torch.
    """

    root_dir: str = "runs"
    name: str = "default"
    num_threads: int | None = None

    def __post_init__(self) -> None:
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"run.num_threads must be at least 1, got {self.num_threads}")
        name = PurePath(self.name)
        if not self.name or name.is_absolute() or ".." in name.parts or "://" in self.name:
            raise ValueError(f"run.name {self.name!r} has to name a folder inside run.root_dir")

    @property
    def folder(self) -> UPath:
        """The folder of the runs of this name."""
        return UPath(self.root_dir) / self.name

    def versions(self) -> list[UPath]:
        """Folders of earlier runs of this name, the oldest first."""
        found = [p for p in self.folder.glob("version_*") if p.name[8:].isdigit()]
        return sorted(found, key=lambda p: int(p.name[8:]))

    def next_dir(self) -> UPath:
        """The folder for a new run."""
        versions = self.versions()
        number = int(versions[-1].name[8:]) + 1 if versions else 0
        return self.folder / f"version_{number}"


def find_checkpoint(ckpt_path: str, run: Run) -> str | None:
    """The checkpoint that `--ckpt_path` names.

    Args:
        ckpt_path: "last" or "best" of the newest run that has one; "auto" for the newest that is
            whole, of the newest run that has any; or a path or URL, of which the end may be
            last, best or auto too.
        run: where runs of this name are.

    Returns:
        Path or URL of a complete checkpoint. None for "auto" when no run of this name has a
        checkpoint yet.

    Raises:
        ValueError: there is none, or it is not whole; a run never starts from scratch instead.
    """
    path = ckpt_path
    if ckpt_path in ("last", "best", "auto"):
        folders = [checkpoint_dir(version) for version in reversed(run.versions())]
        folder = next((f for f in folders if has_checkpoints(f, ckpt_path)), None)
        if folder is None and ckpt_path == "auto":
            return None
        if folder is None:
            raise ValueError(
                f"--ckpt_path {ckpt_path}: no run in {run.folder} has a checkpoint of that kind"
            )
        path = f"{folder}/{ckpt_path}"
    try:
        return shown(resolve_checkpoint(path))
    except (FileNotFoundError, BrokenCheckpointError) as error:
        raise ValueError(f"--ckpt_path {ckpt_path}: {error}{_hint(path)}") from error


def _hint(path: str) -> str:
    if has_checkpoints(f"{path}/checkpoints", "auto"):
        return f"; of a run take one of its checkpoints: {path}/checkpoints/last"
    folder, _, name = path.rpartition("/")
    if name not in ("last", "best", "auto") and has_checkpoints(folder or ".", "auto"):
        return f"; {folder or '.'}/auto takes the newest that is whole"
    return ""


@dataclass(frozen=True)
class ResumePoint:
    """What the files of a run hold at the moment its checkpoint is of."""

    step: int
    """Optimizer steps, skipped ones included."""
    num_rows: int | None = None
    """Rows of metrics.csv; None where the checkpoint does not say."""
    purge_step: int = 0
    """Entries of TensorBoard of this step and later ones are made again."""


def resume_point(checkpoint: str) -> ResumePoint:
    """Read from a checkpoint what a resume keeps of the run's files.

    Args:
        checkpoint: path or URL.
    """
    content = read_checkpoint(checkpoint)
    step, mark = int(content["global_step"]), content[KEY].get("mark")
    if mark is None:
        return ResumePoint(step, None, step)
    num_rows = mark["num_rows"]
    if num_rows is not None:
        num_rows += mark["is_row_due"]
    # Samples of a rollout that is kept have been shown as of the step that comes next.
    return ResumePoint(step, num_rows, step + (mark["point"] in ("rollout", "queue")))


def choose_run_dir(run: Run, resume_from: str | None) -> UPath:
    """The folder this process writes to: a resumed run's own, or a new one.

    Rank 0 decides: all others write to `trainer.log_dir`, which is rank 0's.

    Args:
        run: where runs of this name are.
        resume_from: the checkpoint that is resumed, if any.

    Returns:
        A folder that need not exist yet.
    """
    resumed = run_dir_of(resume_from) if resume_from is not None else None
    return resumed or run.next_dir()


def config_file_name(run_dir: UPath) -> str:
    """config.yaml for a new run; config_resume_<n>.yaml for its n-th resume."""
    if not (run_dir / "config.yaml").exists():
        return "config.yaml"
    return f"config_resume_{_num_resumes(run_dir) + 1}.yaml"


def newest_config(run_dir: UPath) -> UPath | None:
    """The configuration that a run had when it was last started; None when it has none."""
    num_resumes = _num_resumes(run_dir)
    name = f"config_resume_{num_resumes}.yaml" if num_resumes else "config.yaml"
    return run_dir / name if (run_dir / name).exists() else None


def _num_resumes(run_dir: UPath) -> int:
    stems = [path.stem[len("config_resume_") :] for path in run_dir.glob("config_resume_*.yaml")]
    return max((int(number) for number in stems if number.isdigit()), default=0)


def run_loggers(run_dir: UPath, resume: ResumePoint | None) -> list[Any]:
    """TensorBoard and CSV in one folder, going on where a resumed run stands.

    Args:
        run_dir: <root>/<name>/version_<k>.
        resume: where the run is resumed; None for a new run.

    Returns:
        The two loggers.
    """
    place: dict[str, Any] = {"name": run_dir.parent.name, "version": run_dir.name}
    root = str(run_dir.parent.parent)
    purge: dict[str, Any] = {} if resume is None else {"purge_step": resume.purge_step}
    return [
        TensorBoardLogger(root, default_hp_metric=False, **place, **purge),
        ResumableCSVLogger(root, flush_logs_every_n_steps=1, resume=resume, **place),
    ]


class ResumableCSVLogger(CSVLogger):
    """A CSVLogger that keeps the rows of a run it resumes, and counts them.

    Lightning's own deletes the file when it finds one.

    Args:
        *args: of CSVLogger.
        resume: later rows than its own are dropped; None for a new run.
        **kwargs: of CSVLogger.
    """

    def __init__(self, *args: Any, resume: ResumePoint | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.resume = resume
        self.num_rows = 0
        """Rows of the run so far; 0 on all ranks but the first."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, with the rows that were there."""
        if self._experiment is not None:
            return self._experiment
        file = UPath(self.log_dir) / "metrics.csv"
        content = file.read_bytes() if self.resume is not None and file.exists() else None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Experiment logs directory")
            writer = CSVLogger.experiment.fget(self)  # type: ignore[attr-defined]
        if content is not None and self.resume is not None:
            file.write_bytes(content)
            self.num_rows = len(kept_rows(file, self.resume)[1])
        else:
            self.resume = None
        return writer

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Write a row; before the first one, drop the rows that the resumed run makes again."""
        writer = self.experiment
        if self.resume is not None:
            # Only now: a resume that fails to start must not cost rows.
            writer.metrics_keys = cut_rows(UPath(self.log_dir) / "metrics.csv", self.resume)
            self.resume = None
        super().log_metrics(metrics, step)
        self.num_rows += 1


def kept_rows(file: UPath, resume: ResumePoint) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns of a metrics.csv, and the rows that belong to a run that is resumed.

    Args:
        file: as CSVLogger writes it, with a column `step`.
        resume: where.
    """
    with file.open(newline="") as stream:
        reader = csv.DictReader(stream)
        rows = list(reader)
    if resume.num_rows is not None:
        return list(reader.fieldnames or []), rows[: resume.num_rows]
    return list(reader.fieldnames or []), [row for row in rows if int(row["step"]) < resume.step]


def cut_rows(file: UPath, resume: ResumePoint) -> list[str]:
    """Drop the rows of a metrics.csv that a resumed run makes again.

    Args:
        file: as CSVLogger writes it.
        resume: where.

    Returns:
        The names of its columns.
    """
    names, rows = kept_rows(file, resume)
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        writer.writerows(rows)
    return names


def remove_if_nothing_ran(run_dir: UPath) -> None:
    """Remove the folder of a run that failed before it measured or saved anything.

    Args:
        run_dir: a folder that this process made.
    """
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    is_empty_start = all(
        path.name.startswith(("events.out.tfevents", "config", "hparams")) for path in files
    )
    if not run_dir.exists() or not is_empty_start:
        return
    for path in files:
        path.unlink()
    if isinstance(run_dir, Path):  # a store has no folders
        shutil.rmtree(run_dir)
        if not any(run_dir.parent.iterdir()):
            run_dir.parent.rmdir()

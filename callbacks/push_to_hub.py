"""PushToHub: every new best checkpoint goes to the Hub while the run goes on."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_grpo.callbacks.checkpoint import IterationCheckpoint
from lightning_grpo.checkpoint_paths import shown
from lightning_grpo.export.hub import check_login, check_name
from lightning_grpo.export.kept_copy import keep_copy, remove_copy, remove_left_copies
from lightning_grpo.module import GRPOModule

# Of torchrun, Slurm and Lightning: the other process is no rank of this run.
_OF_RANKS = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"),
}
_STOPPING_S = 10.0
_NICENESS = 10  # the run comes first


@dataclass
class Push:
    """A checkpoint that is to be sent."""

    path: Path
    """As the run named it."""
    copy: Path
    """What is read: it outlives the checkpoint."""
    num_attempts: int = 0


class PushToHub(L.Callback):
    """Export each new best checkpoint and send it to the Hub, in a process of its own.

    The export proves itself as that of `python -m lightning_grpo export` does. A failure is warned
    of and tried again, and never stops the run; a newer best takes the place of one that waits.
    The token is that of `hf auth login` or HF_TOKEN. What the process says is appended to
    push_to_hub.log in the run's folder.

    Args:
        repo_id: user/name, which is made if it is not there.
        private: make it readable to its owner only.
        form: merged, a whole model; or adapter, the adapters of a LoRA run.
        dtype: of the weights of a whole model.
        num_retries: of one checkpoint.
        retry_after_s: seconds between two attempts.
        max_wait_s: seconds that the end of the run waits for the last one.
    """

    def __init__(
        self,
        repo_id: str,
        private: bool = True,
        form: Literal["merged", "adapter"] = "merged",
        dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep",
        num_retries: int = 3,
        retry_after_s: float = 60.0,
        max_wait_s: float = 900.0,
    ) -> None:
        check_name(repo_id)
        self.repo_id = repo_id
        self.private = private
        self.form = form
        self.dtype = dtype
        self.num_retries = num_retries
        self.retry_after_s = retry_after_s
        self.max_wait_s = max_wait_s
        self.run_dir = Path()
        self.waiting: Push | None = None
        self.running: Push | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._is_on = False
        self._may_be_new = False
        self._seen: tuple[str, int, int] | None = None
        self._not_before = 0.0

    def setup(self, trainer: L.Trainer, module: GRPOModule, stage: str) -> None:
        """Warn of a run that nobody is logged in for, while it can still be mended."""
        self._is_on = stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if self._is_on:
            try:
                check_login()
            except ValueError as error:
                rank_zero_warn(f"nothing will be sent to {self.repo_id}: {error}")

    def on_fit_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Remove what an earlier process of the run has left; its best is left alone."""
        if self._is_on and not isinstance(module.run_dir, Path):
            self._is_on = False
            rank_zero_warn(f"nothing will be sent to {self.repo_id}: the run is not on a disk")
        self.run_dir = Path(str(module.run_dir))
        if self._is_on:
            remove_left_copies(self.run_dir / "checkpoints")

    def on_validation_end(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Note that there may be a new best, which is saved after this hook."""
        self._may_be_new = True

    def on_train_batch_start(
        self, trainer: L.Trainer, module: GRPOModule, batch: Any, batch_idx: int
    ) -> None:
        """Start what waits, and see what has become of what runs."""
        if self._is_on:
            self._go_on(trainer)

    def on_fit_end(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Wait for the last one."""
        if not self._is_on:
            return
        deadline = time.monotonic() + self.max_wait_s
        self._go_on(trainer)
        if self.running is not None:
            rank_zero_info(f"waiting for {self.running.path.name} to be sent to {self.repo_id}")
        while (self.running or self.waiting) and time.monotonic() < deadline:
            time.sleep(0.1)
            self._go_on(trainer)
        self._give_up(f"not sent within {self.max_wait_s:.0f} s")

    def on_exception(
        self, trainer: L.Trainer, module: GRPOModule, exception: BaseException
    ) -> None:
        """Stop sending: a run that is interrupted has to end soon."""
        self._give_up("the run was stopped")

    def _go_on(self, trainer: L.Trainer) -> None:
        try:
            if self._may_be_new:
                self._may_be_new = False
                self._look(best_checkpoint(trainer))
            self._finish()
            if self._process is None and self.waiting and time.monotonic() >= self._not_before:
                self._start(self.waiting)
        except OSError as error:  # of a disk that is full, of a system without memory for more
            rank_zero_warn(f"the best checkpoint is not sent to {self.repo_id}: {error}")

    def _look(self, best: Path | None) -> None:
        found = None if best is None else identity_of(best)
        if best is None or found is None or found == self._seen:
            return
        self._seen = found
        if self.waiting is not None:
            remove_copy(self.waiting.copy)
            self.waiting = None
        self.waiting = Push(best, keep_copy(best))
        self._not_before = 0.0

    def _start(self, push: Push) -> None:
        push.num_attempts += 1
        environment = {k: v for k, v in os.environ.items() if k not in _OF_RANKS}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        # What is exported is as large as the checkpoint: it goes to the disk that has room for it.
        self._work_dir.mkdir(exist_ok=True)
        environment |= {"TMPDIR": str(self._work_dir), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        with (self.run_dir / "push_to_hub.log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command(push),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the run, which tells this process
            )
        self.waiting, self.running = None, push
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self._process.pid, _NICENESS)

    def command(self, push: Push) -> list[str]:
        """The command that sends a checkpoint, word by word."""
        words = [sys.executable, "-m", "lightning_grpo", "export", "--ckpt_path", str(push.copy)]
        words += ["--form", self.form, "--dtype", self.dtype, "--push_to_hub", self.repo_id]
        return words if self.private else [*words, "--public"]

    @property
    def _work_dir(self) -> Path:
        return self.run_dir.absolute() / ".push_to_hub"

    def _finish(self) -> None:
        push, process = self.running, self._process
        if push is None or process is None or process.poll() is None:
            return
        shutil.rmtree(self._work_dir, ignore_errors=True)
        self.running = self._process = None
        if process.returncode == 0:
            remove_copy(push.copy)
            rank_zero_info(f"sent {push.path.name} to {self.repo_id}")
            return
        message = f"{push.path.name} was not sent to {self.repo_id}: {self._last_words()}"
        if self.waiting is not None or push.num_attempts > self.num_retries:
            remove_copy(push.copy)
            rank_zero_warn(message)
            return
        rank_zero_warn(f"{message}; trying again in {self.retry_after_s:.0f} s")
        self.waiting = push
        self._not_before = time.monotonic() + self.retry_after_s

    def _last_words(self) -> str:
        lines = (self.run_dir / "push_to_hub.log").read_text(errors="replace").splitlines()
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")[-500:]

    def _give_up(self, reason: str) -> None:
        if self._process is not None:
            stop(self._process)
            shutil.rmtree(self._work_dir, ignore_errors=True)
        for push in (self.running, self.waiting):
            if push is not None:
                remove_copy(push.copy)
                rank_zero_warn(
                    f"{push.path.name} is not on the Hub ({reason}): send it with python -m "
                    f"lightning_grpo export --ckpt_path {push.path} --push_to_hub {self.repo_id}"
                )
        self.running = self.waiting = self._process = None


def best_checkpoint(trainer: L.Trainer) -> Path | None:
    """The best checkpoint that this fit has written; None before the first."""
    keepers = [c for c in trainer.checkpoint_callbacks if isinstance(c, IterationCheckpoint)]
    url = keepers[0].saved_urls.get("best") if keepers else None
    return None if url is None else Path(shown(url))


def identity_of(checkpoint: Path) -> tuple[str, int, int] | None:
    """What tells a checkpoint from another one in its place; None when nothing is there."""
    try:
        found = checkpoint.stat()
    except OSError:
        return None
    return str(checkpoint), found.st_ino, found.st_mtime_ns


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process, which may say what it was at."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_STOPPING_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

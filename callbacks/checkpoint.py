"""IterationCheckpoint: save the run, counted in iterations."""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim.lr_scheduler import LambdaLR
from upath import UPath

from lightning_grpo.checkpoint_paths import checkpoint_dir, shown
from lightning_grpo.checkpoints import Metric, clean_litter, new_url, prune
from lightning_grpo.checkpoints.codec import encode
from lightning_grpo.checkpoints.folder import Kind
from lightning_grpo.module import GRPOModule
from lightning_grpo.resume.stopping import STOP
from lightning_grpo.snapshot import interrupts_deferred


class IterationCheckpoint(Checkpoint):
    """Keep the last checkpoint, the best one, and one of every n iterations, in <run>/checkpoints.

    Each is a folder such as last-000050, named by its optimizer steps, that appears when it is
    whole and verified; only then the one before is removed.

    A run that is resumed from one goes on where the run was that wrote it, between two minibatches
    too, and ends in the same bits. It takes weights and moments from the checkpoint, but the
    options of the optimizer (learning rate, weight decay, ...), the course of the learning rate
    and a changed `model.beta` from its configuration.

    Args:
        every_n_iterations: how often last-* is replaced; it is always written at the end.
        keep_every_n_iterations: also keep an iteration-* every so often; 0 keeps none.
        monitor: validation metric that decides which checkpoint is best-*; null keeps no best.
        mode: whether the best is the largest (max) or the smallest (min); ties go to the newest.
        on_exception: write last-* on Ctrl-C, on SIGTERM, and on an error, on several processes
            only on one that all of them have.
        force_resume: resume although base model, tokenizer or training prompts are not those that
            the checkpoint was made with; other prompts begin at their first.
    """

    def __init__(
        self,
        every_n_iterations: int = 50,
        keep_every_n_iterations: int = 0,
        monitor: str | None = "val/pass_at_1",
        mode: Literal["max", "min"] = "max",
        on_exception: bool = True,
        force_resume: bool = False,
    ) -> None:
        if every_n_iterations < 1:
            raise ValueError(
                f"checkpoint.every_n_iterations must be at least 1, got {every_n_iterations}"
            )
        self.every_n_iterations = every_n_iterations
        self.keep_every_n_iterations = keep_every_n_iterations
        self.monitor = monitor
        self.mode = mode
        self.saves_on_exception = on_exception
        self.force_resume = force_resume
        self.best_score: float | None = None
        self.folder = ""
        self.saved_urls: dict[Kind, str] = {}
        """The newest checkpoint of each kind that this fit has written."""
        self._saved_mark = 0
        self._saved: tuple[Any, ...] = ()
        self._beta = 0.0
        self._saved_beta: float | None = None
        self._options: list[dict[str, Any]] = []

    def setup(self, trainer: L.Trainer, module: GRPOModule, stage: str) -> None:
        """Find the run's folder, and note the configured beta before a checkpoint is loaded."""
        self.folder = checkpoint_dir(UPath(trainer.log_dir or trainer.default_root_dir))
        self._beta = module.beta
        self._saved_mark, self._saved = 0, ()
        self.saved_urls = {}
        module.force_resume = self.force_resume
        if stage == "fit":
            STOP.listen(trainer)

    def on_fit_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Note the configured options of the optimizer before those of a checkpoint are loaded."""
        self._options = [options_of(group) for group in trainer.optimizers[0].param_groups]

    def on_train_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Let the configuration win over the checkpoint, and see what a save would trip over."""
        encode(call._call_callbacks_state_dict(trainer), ("callbacks",))
        if trainer.is_global_zero:
            clean_litter(self.folder)
        if trainer.world_size > 1:
            STOP.listen_for_interrupts()
        if self._saved_beta is not None and self._saved_beta != self._beta:
            module.beta = self._beta
        groups = trainer.optimizers[0].param_groups
        schedulers = [c.scheduler for c in trainer.lr_scheduler_configs]
        for number, (group, options) in enumerate(zip(groups, self._options, strict=True)):
            group.update(options)
            for scheduler in schedulers:
                if isinstance(scheduler, LambdaLR):
                    scheduler.base_lrs[number] = options["initial_lr"]
                    factor = scheduler.lr_lambdas[number](scheduler.last_epoch)
                    group["lr"] = options["initial_lr"] * factor

    def on_train_batch_end(
        self, trainer: L.Trainer, module: GRPOModule, outputs: object, batch: Any, batch_idx: int
    ) -> None:
        """Save after the last minibatch of an iteration, when it is time, and at the very end."""
        module.marks.after_batch(module)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        iterations = module.counters.iterations
        is_over = is_last_batch(trainer)
        if module.queue and not is_over:
            return
        if is_over or iterations % self.every_n_iterations == 0:
            self.save(trainer, module, "last")
        keep = self.keep_every_n_iterations
        if keep and not module.queue and iterations % keep == 0:
            self.save(trainer, module, "iteration")

    def on_train_end(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Save the end of the run, when these weights are not saved yet."""
        mark = module.marks.last
        if self.has_news(trainer, module) and mark is not None and mark.weights != self._saved:
            self.save(trainer, module, "last")

    def on_validation_end(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Keep this policy when it is the best so far."""
        if self.monitor is None or trainer.state.fn != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        score = float(trainer.callback_metrics.get(self.monitor, math.nan))
        if self.is_best(score):
            self.best_score = score
            module.marks.after_validation(module)
            self.save(trainer, module, "best", Metric(self.monitor, score))

    def is_best(self, score: float) -> bool:
        """Whether a score is at least as good as every one before; NaN never is."""
        if math.isnan(score):
            return False
        if self.best_score is None:
            return True
        return score >= self.best_score if self.mode == "max" else score <= self.best_score

    def on_exception(
        self, trainer: L.Trainer, module: GRPOModule, exception: BaseException
    ) -> None:
        """Save where the run was last whole, where every rank is sure to come by."""
        module.marks.let_signals_through()
        is_on_all_ranks = STOP.is_agreed or getattr(exception, "is_on_all_ranks", False)
        STOP.forget()
        if trainer.world_size > 1 and not is_on_all_ranks:
            return
        if self.saves_on_exception and self.has_news(trainer, module):
            problem = module.marks.problem(module)
            if problem:
                rank_zero_info(f"not saved: {problem}; the checkpoints are as they were")
                return
            self.save(trainer, module, "last")
        mark = module.marks.last
        if mark is not None and mark.serial == self._saved_mark:
            rank_zero_info(
                f"stopped at step {mark.place.num_steps}; resume with --ckpt_path "
                f"{shown(self.saved_urls['last'])}"
            )

    def has_news(self, trainer: L.Trainer, module: GRPOModule) -> bool:
        """Whether the run has got on since its last checkpoint."""
        mark = module.marks.last
        if trainer.state.fn != "fit" or mark is None or not mark.place.num_steps:
            return False
        return mark.serial > max(self._saved_mark, module.marks.resumed)

    def save(
        self, trainer: L.Trainer, module: GRPOModule, kind: Kind, metric: Metric | None = None
    ) -> None:
        """Write one checkpoint, and remove the one that it replaces. Every rank has to call it."""
        step = module.marks.last.place.num_steps if module.marks.last else trainer.global_step
        url = trainer.strategy.broadcast(
            new_url(self.folder, kind, step) if trainer.is_global_zero else ""
        )
        with interrupts_deferred():
            # Here it means that the optimizer and the loops are saved too.
            trainer.save_checkpoint(url, weights_only=False, storage_options=metric)
            if kind != "iteration" and trainer.is_global_zero:
                prune(self.folder, kind, 1)
        self.saved_urls[kind] = url
        if kind == "last" and module.marks.last is not None:
            self._saved_mark, self._saved = module.marks.last.serial, module.marks.last.weights

    def state_dict(self) -> dict[str, Any]:
        """The best score, which a resumed run has to reach, and the beta that was asked for."""
        return {"best_score": self.best_score, "configured_beta": self._beta}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.best_score = state_dict["best_score"]
        self._saved_beta = state_dict["configured_beta"]


def is_last_batch(trainer: L.Trainer) -> bool:
    """Whether the batch that has just ended is the last one of the fit."""
    if trainer.global_step >= trainer.max_steps > 0:
        return True
    max_epochs = trainer.max_epochs
    is_last_epoch = max_epochs is not None and 0 < max_epochs <= trainer.current_epoch + 1
    return is_last_epoch and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def options_of(group: dict[str, Any]) -> dict[str, Any]:
    """What a parameter group was configured with; its `lr` moves with the schedule."""
    return {name: value for name, value in group.items() if name not in ("params", "lr")}

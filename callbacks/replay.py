"""InnerEpochReplay: K epochs of M minibatches over one rollout."""

from __future__ import annotations

import time
from typing import Literal

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_grpo.distributed import failing_together
from lightning_grpo.hooks import call_hook
from lightning_grpo.loaders import Slot
from lightning_grpo.masking import reduction_count
from lightning_grpo.module import GRPOModule
from lightning_grpo.replay import split_microbatches, split_minibatches
from lightning_grpo.scoring import evaluating, rollout_logprobs
from lightning_grpo.types import Minibatch, MinibatchOutput, Rollout, select_rows, to_device

# The sampler's log-probs may stand for the training forward's when they are this close, in nats.
SAMPLER_TOLERANCE = 1e-5


class InnerEpochReplay(L.Callback):
    """Turn a scored rollout into minibatches, and put one into each slot.

    Args:
        num_epochs: K, passes over each rollout.
        num_minibatches: M, minibatches per pass; K * M has to be a multiple of
            trainer.accumulate_grad_batches.
    """

    def __init__(self, num_epochs: int = 1, num_minibatches: int = 1) -> None:
        for name, value in (("num_epochs", num_epochs), ("num_minibatches", num_minibatches)):
            if value < 1:
                raise ValueError(f"replay.{name} must be at least 1, got {value}")
        self.num_epochs = num_epochs
        self.num_minibatches = num_minibatches
        self._update_start = 0.0

    @property
    def slots_per_iteration(self) -> int:
        """Minibatches that one rollout makes: K * M."""
        return self.num_epochs * self.num_minibatches

    def setup(self, trainer: L.Trainer, module: GRPOModule, stage: str) -> None:
        """Tell the data module how many slots a prompt batch fills."""
        if stage != "fit":
            return
        window = trainer.accumulate_grad_batches
        if self.slots_per_iteration % window:
            raise ValueError(
                f"replay.num_epochs * replay.num_minibatches = {self.slots_per_iteration} has to "
                f"be a multiple of trainer.accumulate_grad_batches = {window}, so that every "
                "optimizer step belongs to one rollout"
            )
        trainer.datamodule.slots_per_iteration = self.slots_per_iteration  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Refuse an epoch that would end inside an accumulation window."""
        window = trainer.accumulate_grad_batches
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if trainer.num_training_batches % window:
            raise ValueError(
                f"an epoch of {trainer.num_training_batches} minibatches (limit_train_batches, "
                f"overfit_batches) ends inside a window of accumulate_grad_batches = {window}: "
                "make it a multiple"
            )
        interval = trainer.val_check_batch
        if trainer.enable_validation and isinstance(interval, int) and interval % window:
            raise ValueError(
                f"trainer.val_check_interval makes a validation every {interval} minibatches, "
                f"inside a window of accumulate_grad_batches = {window}: make it a multiple"
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, module: GRPOModule, batch: Slot, batch_idx: int
    ) -> None:
        """Fill the queue when it is empty, and hand out one minibatch."""
        if not module.queue:
            self._update_start = time.perf_counter()
            module.phase.enter("scoring log-probs")
            self.fill_queue(trainer, module)
        module.phase.enter("updating", self.slots_per_iteration)
        module.phase.num_done = self.slots_per_iteration - len(module.queue)
        batch.minibatch = module.queue.popleft()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: GRPOModule, outputs: object, batch: Slot, batch_idx: int
    ) -> None:
        """Tell everyone that a minibatch, and perhaps the iteration, has ended."""
        minibatch = batch.minibatch
        assert minibatch is not None
        is_skipped = module.is_step_skipped and minibatch.is_window_end
        output = MinibatchOutput(dict(module.minibatch_metrics), is_skipped)
        call_hook(trainer, "on_minibatch_end", module, minibatch, output)
        if module.queue:
            return
        seconds = time.perf_counter() - self._update_start
        module.phase.spend("updating", seconds)
        module.log("time/update_s", seconds, batch_size=1)
        rollout, module.rollout = module.rollout, None
        module.counters.iterations += 1
        module.log("iteration", float(module.counters.iterations), batch_size=1)
        call_hook(trainer, "on_iteration_end", module, rollout)

    def fill_queue(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Cut the scored rollout into minibatches with log-probs and advantages.

        Args:
            trainer: for accumulation and precision.
            module: whose rollout is cut and whose queue is filled.
        """
        assert module.rollout is not None
        rollout = to_device(module.rollout, module.device)
        iteration = module.counters.iterations
        key = f"{module.settings.seed}/{iteration}"
        with failing_together(module, "cutting the rollout into minibatches"):
            rows = [
                part
                for epoch in range(self.num_epochs)
                for part in split_minibatches(
                    rollout, self.num_minibatches, shuffle_key=f"{key}/{epoch}"
                )
            ]
        microbatches = [
            split_microbatches(select_rows(rollout, part), module.microbatch_tokens)
            for part in rows
        ]
        equalize_over_ranks(module, microbatches)
        first_epoch = [
            part[micro]
            for part, micros in zip(rows[: self.num_minibatches], microbatches, strict=False)
            for micro in micros
        ]
        rollout = self._with_logprobs(trainer, module, rollout, first_epoch)
        rollout = rollout.replace(advantages=module.algorithm.advantages(rollout))
        module.rollout = rollout
        parts = [select_rows(rollout, part) for part in rows]
        window = trainer.accumulate_grad_batches
        denominators = window_denominators(module, parts, window)
        for index, part in enumerate(parts):
            module.queue.append(
                Minibatch(
                    rollout=part,
                    microbatches=microbatches[index],
                    denominator=denominators[index // window],
                    iteration=iteration,
                    index=index,
                    is_window_end=(index + 1) % window == 0,
                )
            )

    def _with_logprobs(
        self,
        trainer: L.Trainer,
        module: GRPOModule,
        rollout: Rollout,
        microbatches: list[torch.Tensor],
    ) -> Rollout:
        temperature = module.settings.sampling.temperature
        context = trainer.precision_plugin.forward_context
        if module.reference is not None:
            # The weights are exchanged outside of autocast, which keeps casts it has seen.
            with evaluating(module.policy), module.reference.in_place(), context():
                ref = rollout_logprobs(
                    module.policy, rollout, microbatches, temperature=temperature
                )
            rollout = rollout.replace(ref_logprobs=ref)
        if self.slots_per_iteration == trainer.accumulate_grad_batches:
            return rollout  # one step per rollout: the policy of the loss is the one that acted
        if module.old_logprobs == "sampler":
            return rollout.replace(old_logprobs=rollout.sampler_logprobs)
        with evaluating(module.policy), context():
            old = rollout_logprobs(module.policy, rollout, microbatches, temperature=temperature)
        if module.old_logprobs == "auto":
            module.old_logprobs = resolve_old_logprobs(trainer, module, rollout, old)
        return rollout.replace(old_logprobs=old)


def resolve_old_logprobs(
    trainer: L.Trainer, module: GRPOModule, rollout: Rollout, recomputed: torch.Tensor
) -> Literal["sampler", "recompute"]:
    """Decide once whether the sampler's log-probs can serve as the old ones.

    Args:
        trainer: whose precision counts.
        module: whose sampling counts.
        rollout: with the sampler's log-probs.
        recomputed: (B, C) of the training forward.

    Returns:
        "sampler" or "recompute", the same on all ranks.
    """
    difference = (rollout.sampler_logprobs - recomputed).abs()
    difference = torch.where(rollout.completion_mask, difference, 0.0)
    # A NaN compares as not close enough.
    is_far = not float(difference.max()) <= SAMPLER_TOLERANCE
    num_far = float(module.sum_over_ranks(torch.tensor(float(is_far))))
    is_exact = trainer.precision == "32-true" and not module.settings.sampling.restricts_tokens
    choice: Literal["sampler", "recompute"]
    choice = "sampler" if is_exact and num_far == 0 else "recompute"
    rank_zero_info(
        f"old log-probs: {choice} (sampler against training forward: at most "
        f"{float(difference.max()):.1e} nats apart, precision {trainer.precision})"
    )
    return choice


def equalize_over_ranks(module: GRPOModule, microbatches: list[list[torch.Tensor]]) -> None:
    """Append empty micro-batches until every rank makes the same number of forwards.

    Args:
        module: adds over the ranks.
        microbatches: of each minibatch, changed in place.
    """
    counts = torch.tensor([float(len(parts)) for parts in microbatches])
    most = module.max_over_ranks(counts).tolist()
    for parts, count in zip(microbatches, most, strict=True):
        parts += [torch.zeros(0, dtype=torch.int64)] * (int(count) - len(parts))


def window_denominators(module: GRPOModule, parts: list[Rollout], window: int) -> list[float]:
    """Counts that the loss of each optimizer step is divided by, over all ranks.

    Args:
        module: whose algorithm says what is counted.
        parts: the minibatches in order.
        window: minibatches per optimizer step.

    Returns:
        One count per step, at least 1.
    """
    num_max = module.settings.sampling.max_completion_tokens
    counts = torch.stack(
        [
            reduction_count(part.action_mask, module.algorithm.reduction, num_max).double()
            for part in parts
        ]
    )
    totals = module.sum_over_ranks(counts).reshape(-1, window).sum(dim=1)
    return [max(total, 1.0) for total in totals.tolist()]

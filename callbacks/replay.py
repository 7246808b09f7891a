"""InnerEpochReplay: K epochs of M minibatches over one rollout."""

from __future__ import annotations

import time

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_grpo.choices import settle_decoder, settle_old_logprobs, text_of
from lightning_grpo.distributed import failing_together
from lightning_grpo.hooks import call_hook
from lightning_grpo.levelling import level_over_ranks
from lightning_grpo.lifecycle import give_up_critic
from lightning_grpo.loaders import Slot
from lightning_grpo.masking import reduction_count
from lightning_grpo.module import GRPOModule
from lightning_grpo.replay import split_microbatches, split_minibatches
from lightning_grpo.scoring import evaluating, score_rollout
from lightning_grpo.stages import Stage
from lightning_grpo.types import Minibatch, MinibatchOutput, Rollout, select_rows, to_device
from lightning_grpo.value_loss import explained_variance

UPDATES: dict[Stage, str] = {
    "grpo": "updating",
    "handover": "updating, critic learns",
    "warmup": "critic warms up",
    "ppo": "updating (PPO)",
}


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
        self._has_told_choices = False

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
        self._has_told_choices = False
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
            if not self._has_told_choices:
                settle_decoder(module)
            self.fill_queue(trainer, module)
            if not self._has_told_choices:
                rank_zero_info(text_of(module.choices, module.settings.engine))
                self._has_told_choices = True
        module.phase.enter(UPDATES[module.stage], self.slots_per_iteration)
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
        rollout = level_over_ranks(module, to_device(module.rollout, module.device))
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
        microbatches = cut_over_ranks(module, [select_rows(rollout, part) for part in rows])
        first_epoch = [
            part[micro]
            for part, micros in zip(rows[: self.num_minibatches], microbatches, strict=False)
            for micro in micros
        ]
        rollout = self._with_reference(trainer, module, rollout, first_epoch)
        rollout = self._with_scores(trainer, module, rollout, first_epoch)
        rollout = prepare(module, rollout)
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

    def _with_reference(
        self,
        trainer: L.Trainer,
        module: GRPOModule,
        rollout: Rollout,
        microbatches: list[torch.Tensor],
    ) -> Rollout:
        if module.reference is None:
            return rollout
        context = trainer.precision_plugin.forward_context
        # The weights are exchanged outside of autocast, which keeps casts it has seen.
        with evaluating(module.policy), module.reference.in_place(), context():
            scored = score_rollout(
                module.policy,
                rollout,
                microbatches,
                temperature=module.settings.sampling.temperature,
            )
        return rollout.replace(ref_logprobs=scored.logprobs)

    def _with_scores(
        self,
        trainer: L.Trainer,
        module: GRPOModule,
        rollout: Rollout,
        microbatches: list[torch.Tensor],
    ) -> Rollout:
        """Old log-probs, where the loss cannot take its own, and the values of the critic."""
        is_one_step = self.slots_per_iteration == trainer.accumulate_grad_batches
        needs_old = not is_one_step or (module.reference is not None and module.kl_in == "reward")
        if needs_old and module.choices.old_logprobs == "sampler":
            rollout = rollout.replace(old_logprobs=rollout.sampler_logprobs)
            needs_old = False
        if not needs_old and module.critic is None:
            return rollout
        with evaluating(module.policy), trainer.precision_plugin.forward_context():
            scored = score_rollout(
                module.policy,
                rollout,
                microbatches,
                temperature=module.settings.sampling.temperature,
                critic=module.critic,  # type: ignore[arg-type]
                with_logprobs=needs_old,
            )
        if scored.logprobs is not None:
            if module.choices.old_logprobs is None:
                settle_old_logprobs(module, rollout, scored.logprobs)
            rollout = rollout.replace(old_logprobs=scored.logprobs)
        return rollout.replace(values=scored.values, final_values=scored.final_values)


def prepare(module: GRPOModule, rollout: Rollout) -> Rollout:
    """Turn rewards and values into advantages, and into what the critic learns to predict.

    A critic that gives anything but finite values is freed, and GRPO goes on with the rollout.

    Args:
        module: whose algorithm acts.
        rollout: scored.

    Returns:
        The rollout that the minibatches are cut from.
    """
    beta = module.reward_beta
    if module.critic is not None:
        problem = value_problem(module, rollout)
        if problem:
            give_up_critic(module, problem)
            rollout = rollout.replace(values=None, final_values=None)
    algorithm = module.acting_algorithm
    rollout = algorithm.prepare(rollout, beta=beta, sum_over_ranks=module.sum_over_ranks)
    if module.critic is None or rollout.values is None:
        return rollout
    if rollout.returns is None:
        rollout = rollout.replace(returns=module.ppo.returns(rollout, beta=beta))
    assert rollout.returns is not None and rollout.values is not None
    explained = explained_variance(
        rollout.values,
        rollout.returns,
        rollout.action_mask,
        sum_over_ranks=module.sum_over_ranks,
    )
    module.log("value/explained_var", explained, batch_size=1)
    return rollout


def value_problem(module: GRPOModule, rollout: Rollout) -> str:
    """What is wrong with the values of the critic on any rank; empty when nothing is."""
    if module.critic_failure is not None:
        return module.critic_failure
    assert rollout.values is not None
    # A value whose square overflows would make the loss infinite.
    is_fine = torch.isfinite(rollout.values.square()) | ~rollout.completion_mask
    num_bad = int(module.sum_over_ranks((~is_fine).sum()))
    return f"{num_bad} of its values are not finite" if num_bad else ""


def cut_over_ranks(module: GRPOModule, parts: list[Rollout]) -> list[list[torch.Tensor]]:
    """Cut minibatches into micro-batches, of which every rank makes the same number. Collective.

    Args:
        module: with its token budget and its ranks.
        parts: the minibatches.

    Returns:
        Of each minibatch the rows of each forward; the last may be none, where a rank has fewer
        groups than another has forwards.
    """

    def cut(num_parts: list[int]) -> list[list[torch.Tensor]]:
        return [
            split_microbatches(
                part,
                module.microbatch_tokens,
                is_packed=module.policy.is_packing,
                num_parts=number,
            )
            for part, number in zip(parts, num_parts, strict=True)
        ]

    microbatches = cut([1] * len(parts))
    counts = [len(rows) for rows in microbatches]
    found = module.max_over_ranks(torch.tensor(counts, dtype=torch.float64))
    most = [int(count) for count in found.tolist()]
    if most != counts:
        microbatches = cut(most)
    for rows, count in zip(microbatches, most, strict=True):
        rows += [torch.zeros(0, dtype=torch.int64)] * (count - len(rows))
    return microbatches


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
            reduction_count(part.action_mask, module.acting_algorithm.reduction, num_max).double()
            for part in parts
        ]
    )
    totals = module.sum_over_ranks(counts).reshape(-1, window).sum(dim=1)
    return [max(total, 1.0) for total in totals.tolist()]

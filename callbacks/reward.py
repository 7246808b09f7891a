"""RewardScoring: give a fresh rollout its rewards."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import lightning as L
import torch

from lightning_grpo.advantages import group_statistics, zero_std_fraction
from lightning_grpo.distributed import failing_together
from lightning_grpo.evaluation import Judge
from lightning_grpo.hooks import pass_through_hook
from lightning_grpo.loaders import Slot
from lightning_grpo.metrics import MetricSums
from lightning_grpo.module import GRPOModule
from lightning_grpo.rewards import RewardFunction, Scorer, Scores
from lightning_grpo.scoring import with_scores
from lightning_grpo.types import Rollout


class RewardScoring(L.Callback):
    """Score the completions with one or more reward functions.

    Args:
        functions: reward functions `f(prompts, completions, **columns) -> list[float | None]`,
            plain or async; from YAML an import path, or class_path and init_args of a callable
            such as lightning_grpo.rewards.RewardModel.
        weights: one per function; 1 each when null.
        on_error: raise stops the run when a function fails or returns what is no number; skip
            leaves the rows unscored; value gives them `error_value`.
        error_value: reward of failed rows under `on_error: value`, before the weight.
        success_function: name of the function that says whether a completion is right, for
            pass@k; the first one when null.
        success_threshold: least value of that function that counts as right.
        extract_answer: finds the answer in a completion's text, for maj@k; the stripped text
            when null.
        per_row: names of functions that score each row by itself, besides those that say so
            (lightning_grpo.rewards.per_row): they are called, in threads, with rows that have
            ended while others are being completed, for the same rewards. No function that uses
            the GPU or logs a metric should be among them.
        num_threads: threads for them; 0 scores everything after the rollout. Also under a true
            half or double precision, whose default dtype all threads share, nothing begins early.
    """

    def __init__(
        self,
        functions: list[Callable],
        weights: list[float] | None = None,
        on_error: Literal["raise", "skip", "value"] = "raise",
        error_value: float = 0.0,
        success_function: str | None = None,
        success_threshold: float = 1.0,
        extract_answer: Callable | None = None,
        per_row: list[str] | None = None,
        num_threads: int = 8,
    ) -> None:
        reward_functions: list[RewardFunction] = list(functions)
        self.scorer = Scorer(
            reward_functions, weights, on_error, error_value, per_row or [], num_threads
        )
        self.judge = Judge(success_function, success_threshold, extract_answer)
        if success_function is not None and success_function not in self.scorer.names:
            raise ValueError(
                f"reward.success_function {success_function!r} is not one of the reward "
                f"functions {self.scorer.names}"
            )

    def setup(self, trainer: L.Trainer, module: GRPOModule, stage: str) -> None:
        """Hand the scorer to the module, and check that the data has the columns it needs."""
        module.scorer = self.scorer
        module.judge = self.judge
        columns = getattr(trainer.datamodule, "column_names", None)  # type: ignore[attr-defined]
        if columns is None or stage == "predict":
            return
        for name, missing in self.scorer.missing_columns(columns).items():
            raise ValueError(
                f"reward function {name!r} needs the column {missing[0]!r}, but the data has only "
                f"{sorted(columns)}"
            )

    def on_fit_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Put reward models on the device of the policy."""
        self.move_models(module)

    def on_validation_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Do the same before `validate`; a fit has done so."""
        if trainer.state.fn == "validate":
            self.move_models(module)

    def on_test_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Do the same before `test`."""
        self.move_models(module)

    def move_models(self, module: GRPOModule) -> None:
        """Put every reward function that has a device on that of the policy."""
        for function in self.scorer.functions:
            if hasattr(function, "to"):
                function.to(module.device)

    def on_train_batch_start(
        self, trainer: L.Trainer, module: GRPOModule, batch: Slot, batch_idx: int
    ) -> None:
        """Score the rollout when it has no rewards yet."""
        rollout = module.rollout
        if rollout is None or rollout.rewards is not None:
            return
        module.rollout, scores, seconds = reward_rollout(trainer, module, rollout)
        self._log(module, module.rollout, scores, seconds)

    def on_exception(
        self, trainer: L.Trainer, module: GRPOModule, exception: BaseException
    ) -> None:
        """Leave no reward function at work behind a run that has stopped."""
        if module.early_scores is not None:
            module.early_scores.cancel()

    def _log(self, module: GRPOModule, rollout: Rollout, scores: Scores, seconds: float) -> None:
        assert rollout.rewards is not None
        statistics = group_statistics(rollout.rewards, rollout.group_ids)
        num_equal, num_groups = zero_std_fraction(rollout.rewards, rollout.group_ids)
        sums = MetricSums()
        sums.add(
            {
                "reward/mean": finite_sum(rollout.rewards),
                "reward/std": finite_sum(statistics.std),
                "reward/failed_frac": (
                    torch.tensor(float(scores.num_errors)),
                    torch.tensor(float(len(rollout) * len(self.scorer.functions))),
                ),
                "group/zero_std_frac": (num_equal, num_groups),
            }
        )
        sums.add({f"reward/{k}": finite_sum(v) for k, v in rollout.function_rewards.items()})
        metrics: dict[str, Any] = sums.reduce(module.sum_over_ranks)
        metrics["time/reward_s"] = seconds
        # What a function logs may differ between ranks, so it is averaged apart, on this rank.
        for name, values in scores.metrics.items():
            metrics[name] = sum(values) / len(values)
        module.log_dict(metrics, batch_size=1)


class RewardedRollout(NamedTuple):
    """A rollout with its rewards, and what else came of the scoring."""

    rollout: Rollout
    scores: Scores
    seconds: float


def reward_rollout(trainer: L.Trainer, module: GRPOModule, rollout: Rollout) -> RewardedRollout:
    """Give a rollout its rewards.

    Args:
        trainer: with the callbacks that define `on_rewards_end`.
        module: with the reward functions.
        rollout: B rows without rewards.

    Returns:
        The rollout with rewards, as the callbacks left it, and the scores as the functions gave
        them.
    """
    start = time.perf_counter()
    module.phase.enter("scoring")
    with failing_together(module, "scoring completions"):
        scores = module.score(rollout)
    scored = with_scores(rollout, scores)
    scored = pass_through_hook(trainer, "on_rewards_end", module, scored)
    seconds = time.perf_counter() - start
    module.phase.spend("scoring", seconds)
    return RewardedRollout(scored, scores, seconds)


def finite_sum(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum and count of the values that are not NaN, on the CPU."""
    values = values.detach().double().cpu()
    kept = ~torch.isnan(values)
    return torch.where(kept, values, 0.0).sum(), kept.sum()

"""HealthWarnings: say what to do when a run goes on but cannot learn."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_grpo.module import GRPOModule
from lightning_grpo.types import Minibatch, MinibatchOutput, Rollout


class HealthWarnings(L.Callback):
    """Warn about runs that learn nothing, once each time the trouble begins.

    Args:
        dead_iterations: warn after so many iterations of GRPO in a row without any spread in any
            group.
        truncated_frac: warn when more of the completions than this were cut off.
    """

    def __init__(self, dead_iterations: int = 5, truncated_frac: float = 0.9) -> None:
        self.dead_iterations = dead_iterations
        self.truncated_frac = truncated_frac
        self._num_dead = 0
        self._was_truncated = False
        self._was_dead = False

    def state_dict(self) -> dict[str, Any]:
        """Which trouble has been told."""
        return {
            "num_dead": self._num_dead,
            "was_dead": self._was_dead,
            "was_truncated": self._was_truncated,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._num_dead = state_dict["num_dead"]
        self._was_dead = state_dict["was_dead"]
        self._was_truncated = state_dict["was_truncated"]

    def on_minibatch_end(
        self, trainer: L.Trainer, module: GRPOModule, minibatch: Minibatch, output: MinibatchOutput
    ) -> None:
        """Read what the first minibatch of an iteration has logged."""
        if minibatch.index:
            return
        logged = trainer.callback_metrics
        number = minibatch.iteration + 1
        if "group/zero_std_frac" in logged and module.uses_group_baseline:
            self._check_groups(number, float(logged["group/zero_std_frac"]))
        if "completion/truncated_frac" in logged:
            self._check_lengths(number, module, float(logged["completion/truncated_frac"]))

    def _check_groups(self, number: int, zero_std_frac: float) -> None:
        self._num_dead = self._num_dead + 1 if zero_std_frac >= 1 else 0
        is_dead = self._num_dead >= self.dead_iterations
        if is_dead and not self._was_dead:
            rank_zero_warn(
                f"iterations {number - self._num_dead + 1} to {number}: all completions of every "
                "prompt got the same reward, so nothing is learned. If all rewards are 0: look "
                "at the samples, and whether the reward finds the answer; use easier prompts or "
                "a cold start. If all are 1: use harder prompts. Otherwise raise "
                "rollout.group_size or rollout.temperature"
            )
        self._was_dead = is_dead

    def _check_lengths(self, number: int, module: GRPOModule, truncated_frac: float) -> None:
        is_truncated = truncated_frac > self.truncated_frac
        if is_truncated and not self._was_truncated:
            limit = module.settings.sampling.max_completion_tokens
            rank_zero_warn(
                f"iteration {number}: {truncated_frac:.0%} of the completions reached "
                f"rollout.max_completion_tokens ({limit}) without an end: raise it, or check that "
                "the model knows its EOS token (rollout.stop_strings can end completions too)"
            )
        self._was_truncated = is_truncated

    def on_rewards_end(self, trainer: L.Trainer, module: GRPOModule, rollout: Rollout) -> None:
        """Warn when no reward function scored anything."""
        if rollout.rewards is not None and bool(rollout.rewards.isnan().all()):
            warnings.warn(
                "no reward function scored any completion of this rank (each returned None or "
                "failed), so this rollout teaches nothing",
                stacklevel=2,
            )

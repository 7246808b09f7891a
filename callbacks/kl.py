"""KLMonitor: adaptive beta, early stop of the replay, and the return to the old policy."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import torch

from lightning_grpo.distributed import TrainingStopped
from lightning_grpo.kl import adaptive_beta
from lightning_grpo.module import GRPOModule
from lightning_grpo.snapshot import local_weights
from lightning_grpo.types import Minibatch, MinibatchOutput, Rollout


class KLMonitor(L.Callback):
    """Watch how far the policy moves from the old policy and from the reference.

    All its numbers are means over all ranks, so that every rank decides the same. The KL to the
    old policy is measured before each step: the first step on a rollout always sees 0.

    Args:
        target_nats_per_completion: KL to the reference, summed over a completion, that an
            adaptive beta aims at; null keeps beta as it is.
        horizon_completions: completions over which beta reacts; smaller reacts faster.
        stop_above_nats_per_token: drop the rest of the replay when the approximate KL between
            old and current policy passes this; null never does. 0.01 to 0.05 is usual.
        rollback_above_nats_per_token: return to the old policy's weights, clear its moments and
            drop the replay when that KL passes this; needs model.old_policy: weights; null never
            does.
        warn_above_nats_per_token: say so when that KL passes this.
        max_rollbacks: stop after so many rollbacks in a row.
    """

    def __init__(
        self,
        target_nats_per_completion: float | None = None,
        horizon_completions: float = 10_000.0,
        stop_above_nats_per_token: float | None = None,
        rollback_above_nats_per_token: float | None = None,
        warn_above_nats_per_token: float = 0.2,
        max_rollbacks: int = 3,
    ) -> None:
        for name, value in (
            ("target_nats_per_completion", target_nats_per_completion),
            ("stop_above_nats_per_token", stop_above_nats_per_token),
            ("rollback_above_nats_per_token", rollback_above_nats_per_token),
            ("horizon_completions", horizon_completions),
        ):
            if value is not None and value <= 0:
                raise ValueError(f"kl.{name} must be positive, got {value}")
        self.target = target_nats_per_completion
        self.horizon = horizon_completions
        self.stop_above = stop_above_nats_per_token
        self.rollback_above = rollback_above_nats_per_token
        self.warn_above = warn_above_nats_per_token
        self.max_rollbacks = max_rollbacks
        self._rollbacks_in_a_row = 0
        self._is_over = False
        self._ref_kl: list[float] = []
        self._has_rolled_back = False

    def setup(self, trainer: L.Trainer, module: GRPOModule, stage: str) -> None:
        """Check that what is asked for is there."""
        if stage != "fit":
            return
        if self.target is not None and module.beta == 0:
            raise ValueError(
                "kl.target_nats_per_completion adapts model.beta, but beta is 0 and no reference "
                "is loaded: set model.beta above 0"
            )
        if self.rollback_above is not None and module.old_policy_form != "weights":
            raise ValueError(
                "kl.rollback_above_nats_per_token needs a copy of the old policy: set "
                "model.old_policy to weights"
            )

    def on_train_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Refuse bounds on a KL that cannot be seen."""
        slots = trainer.datamodule.slots_per_iteration  # type: ignore[attr-defined]
        bounds = {
            "stop_above_nats_per_token": self.stop_above,
            "rollback_above_nats_per_token": self.rollback_above,
        }
        for name, value in bounds.items():
            if value is not None and slots == trainer.accumulate_grad_batches:
                raise ValueError(
                    f"kl.{name} is set, but every rollout makes one optimizer step, before which "
                    "policy and old policy are the same: raise replay.num_epochs or "
                    "replay.num_minibatches"
                )

    def state_dict(self) -> dict[str, Any]:
        """What has been measured since the last iteration, and the rollbacks in a row."""
        return {
            "ref_kl": self._ref_kl,
            "is_over": self._is_over,
            "rollbacks_in_a_row": self._rollbacks_in_a_row,
            "has_rolled_back": self._has_rolled_back,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._ref_kl = state_dict["ref_kl"]
        self._is_over = state_dict["is_over"]
        self._rollbacks_in_a_row = state_dict["rollbacks_in_a_row"]
        self._has_rolled_back = state_dict["has_rolled_back"]

    def on_minibatch_end(
        self, trainer: L.Trainer, module: GRPOModule, minibatch: Minibatch, output: MinibatchOutput
    ) -> None:
        """Stop or roll back, at the end of an accumulation window only."""
        if "ref/kl_per_completion" in output.metrics:
            self._ref_kl.append(output.metrics["ref/kl_per_completion"])
        approx_kl = output.metrics.get("policy/approx_kl", 0.0)
        self._is_over |= self.stop_above is not None and approx_kl > self.stop_above
        if approx_kl > self.warn_above:
            warnings.warn(
                f"the policy is {approx_kl:.3f} nats per token from the one that sampled "
                f"(kl.warn_above_nats_per_token {self.warn_above}): lower the learning rate, "
                "replay.num_epochs or replay.num_minibatches, or set "
                "kl.stop_above_nats_per_token",
                stacklevel=2,
            )
        if not minibatch.is_window_end:
            return
        if self._must_roll_back(module, approx_kl):
            self._roll_back(trainer, module)
        elif self._is_over:
            module.queue.clear()
        module.log("kl/replay_stopped", float(self._is_over), batch_size=1)
        self._is_over = False

    def on_iteration_end(self, trainer: L.Trainer, module: GRPOModule, rollout: Rollout) -> None:
        """Adapt beta to the KL of the iteration."""
        if not self._has_rolled_back:
            self._rollbacks_in_a_row = 0
        self._has_rolled_back = False
        if module.reference is None:
            return
        if self.target is not None and self._ref_kl:
            module.beta = adaptive_beta(
                module.beta,
                sum(self._ref_kl) / len(self._ref_kl),
                target_nats_per_completion=self.target,
                horizon_completions=self.horizon,
                num_completions=len(rollout) * module.num_ranks,
            )
        self._ref_kl.clear()
        module.log("ref/beta", module.beta, batch_size=1)

    def _must_roll_back(self, module: GRPOModule, approx_kl: float) -> bool:
        if self.rollback_above is None:
            return False
        num_bad = sum((~torch.isfinite(p)).any().float() for p in local_parameters(module))
        any_bad = float(module.sum_over_ranks(torch.as_tensor(num_bad))) > 0
        return any_bad or not approx_kl <= self.rollback_above

    def _roll_back(self, trainer: L.Trainer, module: GRPOModule) -> None:
        assert module.old_policy is not None
        module.old_policy.restore()
        optimizer = trainer.optimizers[0]
        for parameter in optimizer.param_groups[0]["params"]:
            optimizer.state.pop(parameter, None)
        module.queue.clear()
        module.counters.rollbacks += 1
        self._has_rolled_back = True
        self._rollbacks_in_a_row += 1
        message = (
            "the policy went too far from the one that sampled (kl.rollback_above_nats_per_token "
            f"{self.rollback_above}): its weights are those of before this rollout again"
        )
        if self._rollbacks_in_a_row >= self.max_rollbacks:
            raise TrainingStopped(
                f"{message}. This was rollback {self._rollbacks_in_a_row} in a row "
                "(kl.max_rollbacks): lower the learning rate"
            )
        warnings.warn(message, stacklevel=2)


def local_parameters(module: GRPOModule) -> list[torch.Tensor]:
    """The part of each trainable parameter that this rank holds."""
    return list(local_weights(module.policy).values())

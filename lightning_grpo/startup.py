"""What is refused or warned of before a run starts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import lightning as L
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.optim import Optimizer

from lightning_grpo.checkpoints.io import FolderCheckpointIO
from lightning_grpo.policy import Policy

# Below it, an update of a bf16 weight is usually smaller than half the distance to the next one.
MIN_HALF_PRECISION_LR = 1e-5


def refuse_unsupported(trainer: L.Trainer, stage: str) -> None:
    """Refuse a Trainer that the loop does not work with.

    Args:
        trainer: with its strategy and accelerator.
        stage: fit, validate, test or predict.

    Raises:
        ValueError: FSDP1, a strategy or plugin with other checkpoints, fp16, or Apple's GPUs.
    """
    if isinstance(trainer.strategy, FSDPStrategy):
        raise ValueError("trainer.strategy fsdp (FSDP1) is not supported: use fsdp2")
    if type(trainer.strategy) is ModelParallelStrategy:
        raise ValueError(
            "trainer.strategy ModelParallelStrategy saves its checkpoints past those of this run: "
            "use fsdp2, which shards in the same way"
        )
    if not isinstance(trainer.strategy.checkpoint_io, TorchCheckpointIO | FolderCheckpointIO):
        raise ValueError(
            f"trainer.plugins has the {type(trainer.strategy.checkpoint_io).__name__}: leave it "
            "out, checkpoints are written by lightning_grpo.checkpoints"
        )
    if isinstance(trainer.accelerator, MPSAccelerator):
        raise ValueError(
            "trainer.accelerator mps is not supported, since Apple's GPUs have no float64: set it "
            "to cpu"
        )
    if stage == "fit" and str(trainer.precision).startswith("16"):
        raise ValueError(
            f"trainer.precision {trainer.precision!r} is not supported, since its gradients "
            "overflow before they are scaled: use bf16-mixed"
        )


def warn_of_lost_updates(policy: Policy, optimizer: Optimizer) -> None:
    """Warn when weights are too coarse for the learning rate.

    Args:
        policy: whose weights are trained.
        optimizer: with the group of the policy first.
    """
    rate = optimizer.param_groups[0]["lr"]
    if policy.rounds_small_updates and rate < MIN_HALF_PRECISION_LR:
        warnings.warn(
            f"the weights are in half precision and the learning rate is {rate:.1e}: most updates "
            "are smaller than the rounding of a weight and are lost; use model.dtype float32 with "
            "trainer.precision bf16-mixed",
            stacklevel=2,
        )


def warn_of_idle_kl(algorithms: Mapping[str, object], loss_beta: float) -> None:
    """Warn when the KL to the reference is paid for and holds nothing.

    Args:
        algorithms: those that may run, by the name of their option.
        loss_beta: weight of the KL in the loss.
    """
    for option, algorithm in algorithms.items():
        if loss_beta > 0 and getattr(algorithm, "kl_estimator", None) == "k1":
            warnings.warn(
                f"{option}.kl_estimator k1 has no gradient in expectation, so model.beta holds "
                "nothing: use k3 or reverse",
                stacklevel=2,
            )

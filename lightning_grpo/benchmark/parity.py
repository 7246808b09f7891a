"""The gate before a benchmark: on one frozen batch, ours and TRL compute the same.

The batch has fixed completions and rewards. TRL's side is one real step of its trainer, whose
`rollout_func` returns those completions; ours is the loss of one minibatch. Advantages are not
divided by the std, to which TRL adds 1e-4 and we add 1e-8.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback

from lightning_grpo.algorithms import GRPO
from lightning_grpo.benchmark.frozen import (
    Frozen,
    frozen_batch,
    mean_advantage,
    scored_rollout,
)
from lightning_grpo.benchmark.regimes import Regime
from lightning_grpo.benchmark.trl_trainer import make_trainer
from lightning_grpo.masking import reduction_count
from lightning_grpo.optimization import gradient_norm
from lightning_grpo.packing_check import settle_packing
from lightning_grpo.policy import Policy, load_policy
from lightning_grpo.stages import Stage
from lightning_grpo.tokenizing import load_tokenizer
from lightning_grpo.types import Minibatch
from lightning_grpo.update import Learners, microbatch_loss

Dtype = Literal["float32", "bfloat16"]
Reduction = Literal["completion", "token"]
# The reduction of ours -> the loss_type of TRL that is the same.
LOSS_TYPES: dict[Reduction, str] = {"completion": "grpo", "token": "dapo"}

LOGPROB_TOLERANCE: dict[Dtype, float] = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest difference of a log-prob, in nats."""
NORM_TOLERANCE: dict[Dtype, float] = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest difference of the gradient's norm, as a share of it, and of the loss, as a share of the
mean size of an advantage: the loss itself may be 0."""


class Found(NamedTuple):
    """What one side computes of the frozen batch."""

    logprobs: list[Tensor]
    """B rows, each as long as its completion."""
    loss: float
    grad_norm: float


class Difference(NamedTuple):
    """Of the two sides, under one reduction."""

    logprobs: float
    """Largest, in nats."""
    loss: float
    """As a share of the mean size of an advantage."""
    grad_norm: float
    """As a share of the norm."""


def compare(
    folder: Path, work: Path, regime: Regime, device: torch.device, dtype: Dtype
) -> dict[str, tuple[float, ...]]:
    """Compute the frozen batch on both sides, under each reduction.

    Args:
        folder: of the model.
        work: where TRL may write.
        regime: sizes.
        device: where.
        dtype: float32, or bfloat16 for autocast.

    Returns:
        Reduction -> difference.
    """
    batch = frozen_batch(folder, regime)
    policy = load_policy(str(folder), num_tokens=len(load_tokenizer(str(folder))))
    settle_packing(policy, "auto")
    policy.to(device).train()
    found: dict[str, tuple[float, ...]] = {}
    for reduction in LOSS_TYPES:
        ours = our_step(policy, batch, regime, reduction, folder, dtype)
        theirs = trl_step(folder, work, batch, regime, reduction, dtype)
        found[reduction] = difference_of(ours, theirs, mean_advantage(batch, regime, folder))
    return found


def difference_of(ours: Found, theirs: Found, scale: float) -> Difference:
    """How far the two sides are apart.

    Args:
        ours: one side.
        theirs: the other.
        scale: mean size of an advantage.

    Returns:
        The differences.
    """
    rows = zip(ours.logprobs, theirs.logprobs, strict=True)
    return Difference(
        max(float((left - right).abs().max()) for left, right in rows),
        abs(ours.loss - theirs.loss) / scale,
        abs(ours.grad_norm - theirs.grad_norm) / theirs.grad_norm,
    )


def problems_of(differences: dict[str, tuple[float, ...]], dtype: Dtype) -> list[str]:
    """What is out of tolerance.

    Args:
        differences: reduction -> logprobs, loss, grad_norm.
        dtype: as in `compare`.

    Returns:
        A line for each; none when the gate is passed. NaN is out of every tolerance.
    """
    bound, share = LOGPROB_TOLERANCE[dtype], NORM_TOLERANCE[dtype]
    lines = []
    for reduction, values in differences.items():
        for name, value, limit in zip(
            Difference._fields, values, (bound, share, share), strict=True
        ):
            if not value <= limit:
                lines.append(f"{name} under reduction {reduction}: {value:.2g}, above {limit:g}")
    return lines


def our_step(
    policy: Policy,
    batch: Frozen,
    regime: Regime,
    reduction: Reduction,
    folder: Path,
    dtype: Dtype,
) -> Found:
    """Loss and gradient of the frozen batch as one minibatch of the module.

    Args:
        policy: in train().
        batch: fixed completions.
        regime: sizes.
        reduction: of the loss.
        folder: of the tokenizer.
        dtype: as in `compare`.

    Returns:
        What was computed.
    """
    device = policy.device
    algorithm = GRPO(scale="none", reduction=reduction)
    rollout = scored_rollout(batch, regime, folder, device)
    rollout = algorithm.prepare(rollout, beta=0.0, sum_over_ranks=lambda tensor: tensor)
    count = reduction_count(rollout.action_mask, reduction, regime.completion_tokens)
    rows = torch.arange(len(rollout))
    minibatch = Minibatch(rollout, [rows], float(count), 0, 0, True)
    stage: Stage = "grpo"
    forwards: list[Tensor] = []
    handle = policy.register_forward_hook(lambda _, __, output: forwards.append(output.logprobs))
    policy.zero_grad(set_to_none=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        result = microbatch_loss(
            Learners(policy, algorithm, None, None, stage),  # type: ignore[arg-type]
            minibatch,
            rows,
            beta=0.0,
            temperature=1.0,
            max_completion_tokens=regime.completion_tokens,
        )
    handle.remove()
    loss = result.loss_sum / minibatch.denominator
    loss.backward()
    return Found(
        _unpadded(forwards[0], batch), loss.item(), gradient_norm(policy.trainable().values())
    )


def _unpadded(logprobs: Tensor, batch: Frozen) -> list[Tensor]:
    lengths = map(len, batch.completion_ids)
    return [row[:n].float().cpu() for row, n in zip(logprobs.detach(), lengths, strict=True)]


class GradientNorm(TrainerCallback):
    """Keeps the norm of the gradient that a step is made with."""

    value = float("nan")

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the norm."""
        self.value = gradient_norm(kwargs["model"].parameters())


def trl_step(
    folder: Path, work: Path, batch: Frozen, regime: Regime, reduction: Reduction, dtype: Dtype
) -> Found:
    """The same from one step of TRL's trainer.

    Args:
        folder: of the model.
        work: where TRL may write.
        batch: fixed completions.
        regime: sizes.
        reduction: of the loss.
        dtype: as in `compare`.

    Returns:
        What was computed.
    """
    trainer = make_trainer(
        folder,
        work,
        replace(regime, num_completions=len(batch.completion_ids), rows_per_forward=None),
        [{"prompt": text} for text in batch.prompts],
        rollout_func=lambda prompts, _: {
            "prompt_ids": [ids for ids in batch.prompt_ids for _ in range(regime.group_size)],
            "completion_ids": batch.completion_ids,
            "logprobs": None,
        },
        loss_type=LOSS_TYPES[reduction],
        scale_rewards="none",
        gradient_checkpointing=False,
        max_grad_norm=0.0,
        bf16=dtype == "bfloat16",
    )
    norm = GradientNorm()
    trainer.add_callback(norm)
    losses: list[Tensor] = []
    rows: dict[tuple[int, ...], Tensor] = {}
    score, compute_loss = trainer._get_per_token_logps_and_entropies, trainer._compute_loss

    def keep_logprobs(model: Any, ids: Tensor, mask: Tensor, width: int, **options: Any) -> Any:
        found = score(model, ids, mask, width, **options)
        # TRL shuffles the rows of a batch.
        for row, row_mask, logprobs in zip(ids, mask, found[0].detach(), strict=True):
            own = row_mask[-width:].bool()
            rows[tuple(row[-width:][own].tolist())] = logprobs[own].float().cpu()
        return found

    def keep_loss(*args: Any) -> Tensor:
        losses.append(compute_loss(*args))
        return losses[-1]

    trainer._get_per_token_logps_and_entropies = keep_logprobs
    trainer._compute_loss = keep_loss
    trainer.train()
    return Found([rows[tuple(ids)] for ids in batch.completion_ids], losses[0].item(), norm.value)

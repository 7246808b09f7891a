"""What several algorithms do alike: checks, group advantages, and the terms added to a loss."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, get_args

import torch
from torch import Tensor

from lightning_grpo.advantages import Baseline, Scale, group_advantages
from lightning_grpo.kl import KLKind, kl_estimate
from lightning_grpo.losses import clipped_policy_loss
from lightning_grpo.masking import masked_sum
from lightning_grpo.types import LossOutput, Rollout


def check_clip(
    clip_low: float, clip_high: float, dual_clip: float | None = None, *, prefix: str = ""
) -> None:
    """Refuse bounds of the ratio that bound nothing or everything, by their names with a prefix."""
    if not 0 < clip_low < 1:
        raise ValueError(f"{prefix}clip_low must lie in (0, 1), got {clip_low}")
    if not clip_high > 0:
        raise ValueError(f"{prefix}clip_high must be positive, got {clip_high}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")


def check_at_least_zero(**options: float) -> None:
    """Refuse options that are negative, or not a number."""
    for name, value in options.items():
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")


def check_choices(**options: tuple[str, Any]) -> None:
    """Refuse an option that is none of its choices.

    Args:
        **options: name -> (value, the Literal type of its choices).

    Raises:
        ValueError: naming the option and its choices.
    """
    for name, (value, choices) in options.items():
        if value not in get_args(choices):
            raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")


def check_has_siblings(group_size: int, what: str) -> None:
    """Refuse a group in which a completion has no other to be compared with."""
    if group_size < 2:
        raise ValueError(
            f"rollout.group_size is {group_size}, but {what} compares the completions of a "
            "prompt with each other: set it to 2 or more (8 is usual)"
        )


def required(rollout: Rollout, name: str, remedy: str) -> Tensor:
    """A field of the rollout that has to be there.

    Args:
        rollout: whose field.
        name: of the field.
        remedy: ends the message.

    Raises:
        ValueError: it is None.
    """
    value = getattr(rollout, name)
    if value is None:
        raise ValueError(f"the rollout has no {name}: {remedy}")
    assert isinstance(value, Tensor)
    return value


def scores_of(rollout: Rollout) -> Tensor:
    """The rewards (B,) of a scored rollout."""
    return required(rollout, "rewards", "score it first")


def without_unscored(rollout: Rollout) -> Rollout:
    """Take the rows that no reward function scored out of the loss and its denominator."""
    is_scored = ~scores_of(rollout).isnan()
    return rollout.replace(action_mask=rollout.action_mask & is_scored.unsqueeze(1))


def kl_terms(rollout: Rollout, beta: float) -> dict[str, Any]:
    """Arguments of `token_rewards` for a KL in the reward; none when beta is 0."""
    if beta == 0:
        return {}
    check_at_least_zero(beta=beta)
    remedy = "a KL in the reward needs them"
    return {
        "old_logprobs": required(rollout, "old_logprobs", remedy),
        "ref_logprobs": required(rollout, "ref_logprobs", remedy),
        "beta": beta,
    }


def with_group_advantages(
    rollout: Rollout, *, beta: float, baseline: Baseline, scale: Scale, mask_truncated: bool
) -> Rollout:
    """Broadcast each completion's group advantage over its tokens.

    With beta above 0, what is compared is the reward less beta times the KL of the completion,
    summed over its tokens. Truncated rows that are masked still count in their group's statistics:
    they were sampled, and the siblings are to be held to all that the policy does.

    Args:
        rollout: B rows with rewards.
        beta: weight of the KL in the reward, >= 0.
        baseline: see `group_advantages`.
        scale: see `group_advantages`.
        mask_truncated: take truncated rows out of the loss and its denominator.

    Returns:
        The rollout with advantages (B, C) float32, 0 where the policy did not act.
    """
    scores = scores_of(rollout)
    mask = rollout.action_mask
    terms = kl_terms(rollout, beta)
    if terms:
        kl = kl_estimate(terms["old_logprobs"], terms["ref_logprobs"], mask, "k1")
        scores = scores - beta * masked_sum(kl.detach().to(torch.float64), mask, dim=1)
    per_row = group_advantages(scores, rollout.group_ids, baseline=baseline, scale=scale)
    if mask_truncated:
        mask = mask & ~rollout.truncated.unsqueeze(1)
    advantages = torch.where(mask, per_row.float().unsqueeze(1), 0.0)
    return rollout.replace(action_mask=mask, advantages=advantages)


def policy_inputs(logprobs: Tensor, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, old log-probs, advantages and mask, in the order in which the losses take them.

    Without old log-probs the policy of the loss is the one that acted, and its own serve.
    """
    old_logprobs = logprobs.detach() if rollout.old_logprobs is None else rollout.old_logprobs
    advantages = required(rollout, "advantages", "prepare it first")
    return logprobs, old_logprobs, advantages, rollout.action_mask


class ClipOptions(Protocol):
    """The options of a clipped loss, as an algorithm has them."""

    @property
    def clip_low(self) -> float:
        """How far below 1 the ratio counts."""
        ...

    @property
    def clip_high(self) -> float:
        """How far above 1 the ratio counts."""
        ...

    @property
    def dual_clip(self) -> float | None:
        """Caps the loss where A < 0."""
        ...

    @property
    def kl_estimator(self) -> KLKind:
        """How the KL enters the loss."""
        ...

    @property
    def entropy_coef(self) -> float:
        """Weight of the entropy bonus."""
        ...


def clipped_loss(
    options: ClipOptions,
    logprobs: Tensor,
    rollout: Rollout,
    *,
    beta: float,
    entropy: Tensor | None,
) -> LossOutput:
    """The clipped loss with KL and entropy bonus, of the algorithms that share it.

    Args:
        options: the algorithm.
        logprobs: (b, C) under the current policy, nats.
        rollout: the same rows, prepared.
        beta: weight of the KL in the loss.
        entropy: (b, C), nats, with gradients.

    Returns:
        Token losses (b, C) and metrics.
    """
    policy = clipped_policy_loss(
        *policy_inputs(logprobs, rollout),
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        dual_clip=options.dual_clip,
    )
    return regularized(
        policy,
        logprobs,
        rollout,
        beta=beta,
        kl_estimator=options.kl_estimator,
        entropy=entropy,
        entropy_coef=options.entropy_coef,
    )


def regularized(
    policy: LossOutput,
    logprobs: Tensor,
    rollout: Rollout,
    *,
    beta: float,
    kl_estimator: KLKind,
    entropy: Tensor | None,
    entropy_coef: float,
) -> LossOutput:
    """Add the KL to the reference and the entropy bonus to a policy loss.

    loss = policy + beta * KL(policy || reference) - entropy_coef * H

    Args:
        policy: the policy loss of each token.
        logprobs: (b, C) under the current policy, nats.
        rollout: the same rows.
        beta: weight of the KL, >= 0.
        kl_estimator: how the KL enters the loss; k3 is what is logged.
        entropy: (b, C) of the current policy, nats, with gradients.
        entropy_coef: weight of the bonus, >= 0.

    Returns:
        Token losses (b, C), and metrics with ref/kl when the rollout has ref_logprobs.

    Raises:
        ValueError: a weight above 0 for something that is missing.
    """
    mask = rollout.action_mask
    per_token, metrics = policy.per_token, dict(policy.metrics)
    if beta > 0:
        ref_logprobs = required(rollout, "ref_logprobs", "a KL in the loss needs them")
        per_token = per_token + beta * kl_estimate(logprobs, ref_logprobs, mask, kl_estimator)
    if rollout.ref_logprobs is not None:
        with torch.no_grad():
            ref_kl = kl_estimate(logprobs, rollout.ref_logprobs, mask, "k3").double().sum()
        metrics["ref/kl"] = (ref_kl, mask.sum())
        metrics["ref/kl_per_completion"] = (ref_kl, mask.any(dim=1).sum())
    if entropy_coef > 0:
        if entropy is None:
            raise ValueError("entropy_coef is above 0: pass the entropy, with gradients")
        per_token = per_token - entropy_coef * torch.where(mask, entropy, 0.0)
    return dataclasses.replace(policy, per_token=per_token, metrics=metrics)

"""Whether a policy may be forwarded packed: by its architecture, and then by what comes out."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_grpo.policy import Policy
from lightning_grpo.trunk import packing_obstacle

Packing = Literal["auto", "off"]
# Most that log-probs (nats) and gradients (relative) may differ from those of the padded forward.
_TOLERANCE = {True: (1e-4, 1e-3), False: (5e-2, 1e-1)}  # by whether the weights are fp32 at least


def settle_packing(policy: Policy, wanted: Packing) -> None:
    """Let a policy forward packed where that gives what the padded forward gives.

    Args:
        policy: not sharded; its gradients and training mode stay as they are.
        wanted: auto asks the policy; off never packs.
    """
    policy.is_packing = False
    if wanted == "off":
        return
    reason = "" if policy.has_plain_output else "its output layer is not a plain linear layer"
    reason = reason or packing_obstacle(policy.trunk) or _disagreement(policy)
    policy.is_packing = not reason
    if reason:
        rank_zero_info(f"packing: off, each row is forwarded with its prompt and padding: {reason}")


def _disagreement(policy: Policy) -> str:
    """How the packed forward of a small batch differs from the padded one; empty if it does not."""
    rows = _rows(policy)
    parameters = _first_parameters(policy)
    results = []
    was_training = policy.training
    policy.train()  # activation checkpointing is off in eval()
    try:
        for policy.is_packing in (False, True):
            results.append(_logprobs_and_gradient(policy, rows, parameters))
    except Exception as error:  # an architecture may fail in any way at all
        if not policy.is_packing:
            raise
        return f"{type(error).__name__}: {error}"
    finally:
        policy.train(was_training)
    (padded, padded_gradient), (packed, packed_gradient) = results
    is_exact = torch.finfo(next(policy.parameters()).dtype).bits >= 32
    most, most_relative = _TOLERANCE[is_exact]
    difference = float((packed - padded).abs().max())
    if not difference <= most:
        return f"its log-probs differ by {difference:.1e}"
    relative = float((packed_gradient - padded_gradient).norm() / padded_gradient.norm())
    if not relative <= most_relative:
        return f"its gradients differ by {relative:.1e}"
    return ""


def _rows(policy: Policy) -> dict[str, Tensor]:
    """Two groups of ragged rows."""
    generator = torch.Generator().manual_seed(0)
    prompt_lengths, completion_lengths = [4, 4, 4, 1, 1], [1, 5, 3, 2, 4]
    prompt_mask = torch.arange(4) >= 4 - torch.tensor(prompt_lengths).unsqueeze(1)
    completion_mask = torch.arange(5) < torch.tensor(completion_lengths).unsqueeze(1)
    ids = torch.randint(policy.num_tokens, (5, 9), generator=generator)
    group_ids = torch.tensor([0, 0, 0, 1, 1])
    rows = {
        "prompt_ids": ids[[0, 0, 0, 3, 3], :4],
        "prompt_mask": prompt_mask,
        "completion_ids": ids[:, 4:],
        "completion_mask": completion_mask,
        "group_ids": group_ids,
    }
    return {name: tensor.to(policy.device) for name, tensor in rows.items()}


def _first_parameters(policy: Policy) -> list[nn.Parameter]:
    """What is trained in the first layer: its gradients have come through all the others."""
    names = set(getattr(policy.causal_lm, "_no_split_modules", None) or ())
    layers = [m for m in policy.trunk.modules() if type(m).__name__ in names]
    found = [p for p in (layers or [policy.trunk])[0].parameters() if p.requires_grad]
    return found or list(policy.trainable().values())


def _logprobs_and_gradient(
    policy: Policy, rows: dict[str, Any], parameters: list[nn.Parameter]
) -> tuple[Tensor, Tensor]:
    """Log-probs, and the gradients of all the parameters as one vector."""
    with torch.enable_grad():
        logprobs = policy(**rows).logprobs
        weights = torch.linspace(-1, 2, logprobs.numel(), device=logprobs.device)
        loss = (logprobs * weights.view_as(logprobs)).sum()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return logprobs.detach(), torch.cat([g.flatten() for g in found if g is not None]).double()

"""A critic as a transformers folder: a token classifier whose output is the value of a state."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification

from lightning_grpo.adapters import POLICY_ADAPTER
from lightning_grpo.critic import CRITIC_ADAPTER, LoraCritic, SeparateCritic, ValueHead
from lightning_grpo.policy import Policy
from lightning_grpo.types import Rollout

# Of a value, in reward units; the folder holds the same weights, merged where there are adapters.
TOLERANCE = 1e-3


def write_critic(critic: nn.Module, policy: Policy, tokenizer: Any, folder: Path) -> float:
    """Write a critic, read it again with transformers alone, and compare their values.

    logits[i,t,0] of the folder's model is the value of the state after token t. Adapters are merged
    into the base, in the policy's own model, which is of no use afterwards.

    Args:
        critic: one of the three forms, on the CPU and not sharded.
        policy: it belongs to.
        tokenizer: the policy's.
        folder: where to write.

    Returns:
        The largest difference between the two on sample tokens, in reward units.

    Raises:
        ValueError: the values of the folder's model are not those of the critic.
    """
    rows = _sample(policy)
    expected = _values(critic, policy, rows)
    config = copy.deepcopy(_trunk(critic, policy).config)
    config.num_labels = 1
    model = AutoModelForTokenClassification.from_config(config, dtype=torch.float32)
    trunk = getattr(model, model.base_model_prefix)
    trunk.load_state_dict(_trunk_state(critic, policy))
    layers = [module for module in model.children() if isinstance(module, nn.Linear)]
    head: ValueHead = critic.head  # type: ignore[assignment]
    with torch.no_grad():
        layers[0].weight.copy_(head.weight.unsqueeze(0))
        if layers[0].bias is not None:
            layers[0].bias.copy_(head.bias)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    again = AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        ids = torch.cat([rows.prompt_ids, rows.completion_ids], dim=1)
        found = again(input_ids=ids).logits[:, rows.prompt_ids.shape[1] - 1 :, 0]
    difference = float((found - expected).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ValueError(
            f"the model in {folder} gives other values than the critic (up to {difference:.2e} "
            "apart): it is of no use"
        )
    return difference


def _trunk(critic: nn.Module, policy: Policy) -> Any:
    return critic.trunk if isinstance(critic, SeparateCritic) else policy.trunk


def _trunk_state(critic: nn.Module, policy: Policy) -> dict[str, Tensor]:
    if not isinstance(critic, SeparateCritic) and isinstance(policy.model, PeftModel):
        name = CRITIC_ADAPTER if isinstance(critic, LoraCritic) else POLICY_ADAPTER
        # In float32: in half precision a merge rounds small changes away.
        policy.model.float()
        merged: Any = policy.model.merge_and_unload(adapter_names=[name])
        return getattr(merged, merged.base_model_prefix).state_dict()  # type: ignore[no-any-return]
    state: dict[str, Tensor] = _trunk(critic, policy).state_dict()
    return state


def _sample(policy: Policy) -> Rollout:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(policy.num_tokens, (2, 12), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    return Rollout(
        prompt_ids=ids[:, :4],
        prompt_mask=mask[:, :4],
        completion_ids=ids[:, 4:],
        completion_mask=mask[:, 4:],
        action_mask=mask[:, 4:],
        sampler_logprobs=torch.zeros(2, 8),
        group_ids=torch.arange(2),
        truncated=torch.zeros(2, dtype=torch.bool),
    )


@torch.no_grad()
def _values(critic: nn.Module, policy: Policy, rows: Rollout) -> Tensor:
    hidden = policy.hidden_states(
        rows.prompt_ids, rows.prompt_mask, rows.completion_ids, rows.completion_mask
    )
    values: Tensor = critic(policy, rows, hidden)
    return values

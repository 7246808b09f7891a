"""The policy over several ranks with FSDP2."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from lightning_grpo.critic import SeparateCritic, own_layers
from lightning_grpo.policy import Policy


def shard_policy(policy: Policy, mesh: DeviceMesh) -> None:
    """Shard a policy over the ranks with FSDP2: each decoder layer, then what is left.

    Args:
        policy: changed in place.
        mesh: the data-parallel mesh.
    """
    _shard_layers(policy, policy.causal_lm, mesh)
    fully_shard(policy, mesh=mesh)
    register_fsdp_forward_method(policy, "call_unsharded")
    register_fsdp_forward_method(policy, "hidden_states")


def shard_critic(critic: nn.Module, policy: Policy, mesh: DeviceMesh) -> None:
    """Shard a critic over the ranks as the policy is.

    Args:
        critic: changed in place.
        policy: already sharded; the adapters that a lora critic has in it are sharded here.
        mesh: the data-parallel mesh.
    """
    if isinstance(critic, SeparateCritic):
        _shard_layers(critic, critic.trunk, mesh)
    for layer in own_layers(critic, policy):
        fully_shard(layer, mesh=mesh)
    fully_shard(critic.head, mesh=mesh)  # type: ignore[arg-type]  # its dtype may be another one
    fully_shard(critic, mesh=mesh)


def forget_shards(policy: Policy, layers: Sequence[nn.Module]) -> None:
    """Let go of layers that leave a sharded policy, whose root keeps a list of all its parts.

    Args:
        policy: sharded or not.
        layers: that are about to be removed from it.
    """
    if not isinstance(policy, FSDPModule):
        return
    leaving = {id(layer._get_fsdp_state()) for layer in layers if isinstance(layer, FSDPModule)}
    states = policy._get_fsdp_state()._state_ctx.all_states
    states[:] = [state for state in states if id(state) not in leaving]


def _shard_layers(module: nn.Module, model: nn.Module, mesh: DeviceMesh) -> None:
    layer_names = set(getattr(model, "_no_split_modules", None) or ())
    for part in module.modules():
        if type(part).__name__ in layer_names:
            fully_shard(part, mesh=mesh)

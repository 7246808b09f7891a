"""The policy over several ranks with FSDP2."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from lightning_grpo.policy import Policy


def check_mesh(mesh: DeviceMesh) -> None:
    """Refuse a mesh whose ranks would hold copies of the same work.

    Args:
        mesh: of ModelParallelStrategy, with the dimensions data_parallel and tensor_parallel.

    Raises:
        ValueError: the tensor-parallel dimension is larger than 1.
    """
    size = mesh["tensor_parallel"].size()
    if size != 1:
        raise ValueError(
            f"trainer.strategy has tensor_parallel_size {size} (its default is all devices), but "
            "the policy is sharded over data-parallel ranks only: set tensor_parallel_size to 1 "
            "and data_parallel_size to the number of devices"
        )


def shard_policy(policy: Policy, mesh: DeviceMesh) -> None:
    """Shard a policy over the ranks with FSDP2: each decoder layer, then what is left.

    Args:
        policy: changed in place.
        mesh: the data-parallel mesh.
    """
    layer_names = set(getattr(policy.causal_lm, "_no_split_modules", None) or ())
    for module in policy.modules():
        if type(module).__name__ in layer_names:
            fully_shard(module, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    register_fsdp_forward_method(policy, "call_unsharded")

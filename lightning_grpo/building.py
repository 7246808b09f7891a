"""Making the policy of a module, and what a fit needs beside it, in the order of sharding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_grpo.choices import settle_forwards
from lightning_grpo.policy import load_policy
from lightning_grpo.reference import Reference, frozen_reference_hash
from lightning_grpo.sharding import check_mesh, shard_policy
from lightning_grpo.snapshot import WeightSnapshot

if TYPE_CHECKING:
    from lightning_grpo.module import GRPOModule


def make_policy(module: GRPOModule) -> None:
    """Load the policy, and shard it under FSDP2. Collective.

    Args:
        module: with its Trainer; what has to be seen of whole weights is found here.
    """
    with torch.random.fork_rng(devices=[]):
        # Random weights and adapters have to be the same on every rank.
        torch.default_generator.manual_seed(module.settings.seed)
        policy = load_policy(
            module.name_or_path, num_tokens=len(module.tokenizer), **module.load_options
        )
    module.strict_loading = not policy.is_lora
    is_fitting = module.trainer.state.fn == "fit"
    if is_fitting:
        settle_forwards(module, policy)
    if module.beta > 0 and is_fitting and module.trainer.is_global_zero:
        module.initial_hash = frozen_reference_hash(policy)
    if module.device_mesh is not None:
        check_mesh(module.device_mesh)
        shard_policy(policy, module.device_mesh["data_parallel"])
    module.policy = policy


def make_ready_to_fit(module: GRPOModule) -> None:
    """Take the reference and the old policy.

    Args:
        module: with its policy.

    Raises:
        ValueError: under FSDP2 a policy that was loaded to be measured.
    """
    if not module.is_forward_settled and module.device_mesh is None:
        settle_forwards(module, module.policy)  # it was loaded to be measured
    if module.beta > 0 and not module.initial_hash and module.trainer.is_global_zero:
        if module.device_mesh is not None:
            raise ValueError(
                "under FSDP2 a module that was validated first cannot be fitted: make another"
            )
        module.initial_hash = frozen_reference_hash(module.policy)
    module.reference = Reference(module.policy) if module.beta > 0 else None
    keeps_weights = module.old_policy_form == "weights"
    module.old_policy = WeightSnapshot(module.policy) if keeps_weights else None
    module.policy.train()

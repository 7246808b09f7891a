"""Making and freeing the critic in the middle of a run, so that every part of the trainer agrees.

The optimizer always has two groups, `policy` and `critic`, of which the second is empty while there
is no critic. DDP decides when it is made which gradients to exchange; so it is made again whenever
the parameters that take gradients change, or the ranks would drift apart without a word.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lightning_grpo.critic import (
    SeparateCritic,
    critic_parameters,
    make_critic,
    own_layers,
    remove_critic,
)
from lightning_grpo.distributed import TrainingStopped
from lightning_grpo.policy import Policy, gather_no_more
from lightning_grpo.sharding import forget_shards, shard_critic
from lightning_grpo.stages import Stage, has_critic, moves_policy

if TYPE_CHECKING:
    from lightning_grpo.module import GRPOModule


def enter_stage(module: GRPOModule, stage: Stage) -> None:
    """Make or free the critic, freeze or release the policy. Every rank has to call it.

    Args:
        module: between iterations, or before its optimizer is made.
        stage: what comes now.

    Raises:
        ValueError: the stage needs a critic and model.critic is not set.
    """
    before = trained_parameters(module)
    if has_critic(stage) and module.critic is None:
        attach_critic(module)
    elif not has_critic(stage) and module.critic is not None:
        detach_critic(module)
    module.policy.freeze(not moves_policy(stage))
    module.stage = stage
    if trained_parameters(module) != before:
        wrap_again(module.trainer.strategy)


def give_up_critic(module: GRPOModule, reason: str) -> None:
    """Free a critic that does not work, and go on with GRPO. Every rank has to call it.

    Args:
        module: between iterations.
        reason: what is wrong with it.

    Raises:
        TrainingStopped: GRPO cannot go on, because there is one completion per prompt.
    """
    message = f"the critic is of no use: {reason}"
    advice = "lower model.critic.learning_rate, or scale the rewards down"
    try:
        module.algorithm.check_group_size(module.settings.group_size)
    except ValueError as error:
        raise TrainingStopped(f"{message}; {advice}. GRPO cannot take over: {error}") from error
    rank_zero_warn(f"{message}. It is freed, and the run goes on under GRPO; {advice}")
    enter_stage(module, "grpo")
    module.critic_failure = reason  # until AlgorithmSwitch has taken note
    module.num_critic_failures += 1


def trained_parameters(module: GRPOModule) -> set[int]:
    """Identities of the parameters that take gradients."""
    parameters = [*module.policy.parameters()]
    if module.critic is not None:
        parameters += module.critic.parameters()
    return {id(parameter) for parameter in parameters if parameter.requires_grad}


def attach_critic(module: GRPOModule) -> None:
    """Make the critic, put it on this rank's device or shard it, and tell the optimizer."""
    if module.critic_settings is None:
        raise ValueError(
            "switch asks for PPO, but there is no critic: set model.critic.form to head, lora "
            "or separate"
        )
    with torch.random.fork_rng(devices=[]):
        # Adapters are drawn at random, and have to be the same on every rank.
        torch.default_generator.manual_seed(module.critic_seed)
        critic = make_critic(module.critic_settings, module.policy, module.tokenizer)
    optimizers = module.trainer.optimizers
    if optimizers:  # the strategy has cast and moved everything else by now
        for part in (critic, *own_layers(critic, module.policy)):
            module.trainer.precision_plugin.convert_module(part)
    critic.to(module.device)
    if module.device_mesh is not None:
        shard_critic(critic, module.policy, module.device_mesh["data_parallel"])
    module.critic = critic.train(module.policy.training)
    start_from_policy(module)
    for optimizer in optimizers:
        optimizer.param_groups[1]["params"] += critic_parameters(critic, module.policy)


def start_from_policy(module: GRPOModule) -> None:
    """Give a separate critic without weights of its own those that the policy has now."""
    settings = module.critic_settings
    if isinstance(module.critic, SeparateCritic) and settings and settings.name_or_path is None:
        copy_trunk(module.critic, module.policy)


def detach_critic(module: GRPOModule) -> None:
    """Free the critic: weights, gradients and moments."""
    assert module.critic is not None
    for optimizer in module.trainer.optimizers:
        parameters = optimizer.param_groups[1]["params"]
        for parameter in parameters:
            parameter.grad = None
            optimizer.state.pop(parameter, None)
        parameters.clear()
    forget_shards(module.policy, own_layers(module.critic, module.policy))
    remove_critic(module.critic, module.policy)
    module.critic = None
    gc.collect()


@torch.no_grad()
def copy_trunk(critic: SeparateCritic, policy: Policy) -> None:
    """Fill the trunk of a separate critic with the policy's weights as they are.

    Each rank copies the part it holds; adapters of a LoRA policy are left out.

    Args:
        critic: sharded as the policy is.
        policy: where the weights come from.
    """
    gather_no_more(policy)
    gather_no_more(critic)
    source = {
        name.replace(".base_layer", ""): parameter
        for name, parameter in policy.trunk.named_parameters()
    }
    for name, parameter in critic.trunk.named_parameters():
        _local(parameter).copy_(_local(source[name]))


def _local(parameter: nn.Parameter) -> torch.Tensor:
    data: Any = parameter.data
    return data.to_local() if isinstance(data, DTensor) else data  # type: ignore[no-any-return]


def wrap_again(strategy: Strategy) -> None:
    """Let DDP see which parameters take gradients now; nothing to do for other strategies.

    Args:
        strategy: of the Trainer.
    """
    if not isinstance(strategy, DDPStrategy):
        return
    if not isinstance(strategy.model, DistributedDataParallel):
        return  # not wrapped yet
    module = strategy.lightning_module
    strategy.model = None
    gc.collect()  # two reducers at once would both hook into every parameter
    strategy.model = module
    strategy.configure_ddp()


def call_before_loading(strategy: Strategy, prepare: Callable[[str], None]) -> None:
    """Call a function with the path of a checkpoint before its weights are loaded.

    FSDP2 loads weights and moments before any hook of Lightning has seen the checkpoint, and they
    need a place to go to.

    Args:
        strategy: of the Trainer.
        prepare: gets the path or URL.
    """
    vars(strategy).pop("load_checkpoint", None)  # of an earlier fit
    load = strategy.load_checkpoint

    def load_checkpoint(checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        prepare(str(checkpoint_path))
        return load(checkpoint_path, *args, **kwargs)

    strategy.load_checkpoint = load_checkpoint  # type: ignore[method-assign]

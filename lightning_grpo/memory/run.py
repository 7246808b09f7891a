"""The memory of a run that is about to start, against that of its device."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_grpo.critic import CriticSettings
from lightning_grpo.distributed import failing_together
from lightning_grpo.memory.device import device_limit, memory_at_hand
from lightning_grpo.memory.estimate import MemorySettings, Sharding, estimate_memory
from lightning_grpo.memory.fit import GB, check_fits, choose, is_far_below
from lightning_grpo.memory.model import config_as_json, read_config, spec_from_config

if TYPE_CHECKING:
    from lightning_grpo.module import GRPOModule

# For a model that cannot be estimated.
_USUAL_TOKENS = 16384


def settle_memory(module: GRPOModule, trainer: L.Trainer) -> None:
    """Choose token budget and activation checkpointing from the memory at hand, where left open.

    The choice is the same on all ranks, whichever has least; every rank has to call it. It needs
    the settings but not the weights, so that it is best called once the data is set up and before
    the policy is loaded. For a model that cannot be estimated it is the usual one.

    Args:
        module: with its rollout settings; its choices are completed.
        trainer: with its strategy, its callbacks and its data module.
    """
    made = module.choices
    if made.microbatch_tokens is not None and made.is_checkpointing is not None:
        return
    device, num_sharing = _device_of(trainer)
    at_hand = torch.tensor(-float(memory_at_hand(device, num_sharing)), dtype=torch.float64)
    limit = -int(module.max_over_ranks(at_hand))
    with failing_together(module, "choosing from the memory"):
        try:
            chosen = choose(
                settings_of_run(module, trainer),
                limit,
                microbatch_tokens=made.microbatch_tokens,
                is_checkpointing=made.is_checkpointing,
            )
            tokens, recomputes = chosen.microbatch_tokens, chosen.model.activation_checkpointing
            if not is_far_below(chosen, limit):
                peak = estimate_memory(chosen).peak
                rank_zero_info(
                    f"memory: a token budget of {tokens} with activation checkpointing "
                    f"{'on' if recomputes else 'off'} is estimated at {peak / GB:.1f} GB, of "
                    f"{limit / GB:.1f} GB that may be planned with"
                )
        except Exception:  # code of any model runs here, on tensors without values
            tokens = made.microbatch_tokens or _USUAL_TOKENS
            recomputes = bool(made.is_checkpointing)
    tokens, recomputes = trainer.strategy.broadcast((tokens, recomputes))
    module.choices = replace(made, microbatch_tokens=tokens, is_checkpointing=recomputes)


def refuse_what_cannot_fit(module: GRPOModule, trainer: L.Trainer) -> None:
    """Refuse a fit that its device has no memory for; every rank has to call it.

    A model that cannot be estimated is left alone, with a note.

    Args:
        module: with its rollout settings and its choices.
        trainer: with its strategy, its callbacks and its data module.

    Raises:
        ValueError: the estimate is above the device's memory.
    """
    limit = device_limit(*_device_of(trainer))
    with failing_together(module, "checking the memory"):
        try:
            settings = settings_of_run(module, trainer)
            if is_far_below(settings, limit):
                return
            estimate = estimate_memory(settings)
        except Exception as error:  # code of any model runs here, on tensors without values
            rank_zero_info(f"memory: not estimated for this model ({error})")
            return
        check_fits(estimate, limit)


def _device_of(trainer: L.Trainer) -> tuple[torch.device, int]:
    """The device of this rank, and how many ranks share its memory."""
    device = trainer.strategy.root_device
    return device, 1 if device.type == "cuda" else trainer.num_devices


def settings_of_run(module: GRPOModule, trainer: L.Trainer) -> MemorySettings:
    """The settings of a run that is about to start.

    Args:
        module: with its rollout settings.
        trainer: with strategy, callbacks and data module.

    Returns:
        What decides its memory; of what is not chosen yet, the usual.
    """
    options = module.load_options
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    found = [getattr(c, "num_minibatches", None) for c in trainer.callbacks]  # type: ignore[attr-defined]
    critic: CriticSettings | None = module.critic_settings if module.may_use_critic else None
    settings = module.settings
    critic_config = None
    if critic is not None and critic.name_or_path is not None:
        critic_config = config_as_json(read_config(critic.name_or_path))
    is_half = str(trainer.precision) == "bf16-true"
    model = spec_from_config(
        read_config(module.name_or_path, options["revision"]),
        dtype="bfloat16" if is_half else options["dtype"],
        is_converted=is_half,
        lora=options["lora"],
        activation_checkpointing=bool(module.choices.is_checkpointing),
        attn_implementation=options["attn_implementation"],
        dropout=options["dropout"],
        num_tokens=len(module.tokenizer),
        critic=critic,
        critic_config_json=critic_config,
    )
    return MemorySettings(
        model=model,
        prompt_tokens=max(data.longest_prompt, 1),
        completion_tokens=settings.sampling.max_completion_tokens,
        prompts=max(data.prompts_per_iteration // module.num_ranks, 1),
        group_size=settings.group_size,
        val_prompts=data.val_prompts_per_batch if data.sources["val"][0] is not None else 0,
        num_val_samples=settings.num_val_samples,
        num_minibatches=next((number for number in found if number), 1),
        engine=settings.engine,
        max_rows=settings.max_rows,
        microbatch_tokens=module.choices.microbatch_tokens or _USUAL_TOKENS,
        is_packed=module.choices.is_packing is not False,
        temperature=settings.sampling.temperature,
        has_entropy_bonus=any(
            getattr(part, "entropy_coef", 0) > 0 for part in (module.algorithm, module.ppo)
        ),
        is_autocast=str(trainer.precision) == "bf16-mixed",
        has_reference=module.beta > 0,
        keeps_old_weights=module.old_policy_form == "weights",
        make_optimizer=module.make_optimizer,
        sharding=_sharding(trainer),
        num_devices=module.num_ranks,
        is_cuda=trainer.strategy.root_device.type == "cuda",
    )


def _sharding(trainer: L.Trainer) -> Sharding:
    if isinstance(trainer.strategy, ModelParallelStrategy):
        return "fsdp2"
    return "ddp" if isinstance(trainer.strategy, DDPStrategy) else "none"

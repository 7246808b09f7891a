"""The memory of a run that is about to start, against that of its device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_grpo.critic import CriticSettings
from lightning_grpo.distributed import failing_together
from lightning_grpo.memory.estimate import MemorySettings, Sharding, estimate_memory
from lightning_grpo.memory.fit import check_fits
from lightning_grpo.memory.model import config_as_json, read_config, spec_from_config

if TYPE_CHECKING:
    from lightning_grpo.module import GRPOModule


def device_limit(device: torch.device, num_sharing: int = 1) -> int:
    """Bytes that a process can use on a device.

    Args:
        device: a CUDA GPU, whose whole memory counts, or the CPU, whose memory is that of the
            machine or the limit of its control group, whichever is less.
        num_sharing: processes that share the memory of a CPU.

    Returns:
        Bytes.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *_cgroup_limits()]) // num_sharing


def _cgroup_limits() -> list[int]:
    limits = []
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        root = Path("/sys/fs/cgroup") / ("memory" if "memory" in controllers else "")
        name = "memory.limit_in_bytes" if "memory" in controllers else "memory.max"
        inner = root / group.lstrip("/")
        for folder in [inner, *inner.parents]:
            file = folder / name
            if folder.is_relative_to(root) and file.is_file():
                text = file.read_text(encoding="ascii").strip()
                limits += [int(text)] if text.isdigit() else []
    return limits


def refuse_what_cannot_fit(module: GRPOModule, trainer: L.Trainer) -> None:
    """Refuse a fit that its device has no memory for; every rank has to call it.

    It needs the settings but not the weights, so that it is best called once the data is set up
    and before the policy is loaded. A model that cannot be estimated is left alone, with a note.

    Args:
        module: with its rollout settings.
        trainer: with its strategy, its callbacks and its data module.

    Raises:
        ValueError: the estimate is above the device's memory.
    """
    device = trainer.strategy.root_device
    limit = device_limit(device, 1 if device.type == "cuda" else trainer.num_devices)
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


def settings_of_run(module: GRPOModule, trainer: L.Trainer) -> MemorySettings:
    """The settings of a run that is about to start.

    Args:
        module: with its rollout settings.
        trainer: with strategy, callbacks and data module.

    Returns:
        What decides its memory.
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
        activation_checkpointing=options["activation_checkpointing"],
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
        num_minibatches=next((number for number in found if number), 1),
        max_rows=settings.max_rows,
        microbatch_tokens=module.microbatch_tokens,
        is_packed=module.packing == "auto",
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


def is_far_below(settings: MemorySettings, limit: int) -> bool:
    """Whether a bound that is cheap to compute, and far above any estimate, is below the limit.

    Args:
        settings: of a run.
        limit: bytes.

    Returns:
        True where there is nothing to measure.
    """
    config = settings.model.config
    depth, hidden = settings.model.num_layers, settings.model.hidden_size
    inner = max(getattr(config, "intermediate_size", None) or 0, 4 * hidden)
    vocabulary = settings.model.vocab_size
    heads = int(config.num_attention_heads)
    length = settings.row_tokens
    tokens = max(settings.microbatch_rows, settings.rows_decoded) * length
    parameters = depth * (8 * hidden * hidden + 4 * hidden * inner) + 2 * hidden * vocabulary
    activations = tokens * (depth * (64 * hidden + 16 * inner + 4 * heads * length))
    logits = tokens * vocabulary * 16
    # Full state with copies and snapshots, policy and critic; everything in float32, twice.
    return 2 * (parameters * 64 + (activations + logits) * 4) < limit

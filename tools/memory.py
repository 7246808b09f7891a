"""What a run would take in memory, before it is started."""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from lightning_grpo.critic import CriticSettings
from lightning_grpo.memory.device import device_limit
from lightning_grpo.memory.estimate import MemoryEstimate, MemorySettings, Sharding, estimate_memory
from lightning_grpo.paths import resolve_package_path
from lightning_grpo.tools.memory_tables import critic_table, memory_table, notes
from lightning_grpo.tools.run_config import (
    ModelShape,
    is_on_cuda,
    num_devices_of,
    read_run_config,
    settings_from_config,
)

QUICKSTART = "package://lightning_grpo/conf/quickstart.yaml"


def memory(
    config: str = QUICKSTART,
    name_or_path: str | None = None,
    shape: ModelShape | None = None,
    prompt_tokens: int | None = None,
    devices: int | None = None,
    sharding: Sharding | None = None,
    device_memory_gb: float | None = None,
    json: str | None = None,
    overrides: Sequence[str] = (),
) -> MemoryEstimate:
    """Print what a run takes in memory, part by part and phase by phase, and what a critic adds.

    No weights are loaded and no data is read. Options of `fit`, such as
    `--model.microbatch_tokens 4096` or `--rollout.max_rows 64`, are taken as `fit` takes them, and
    what they leave open is chosen as `fit` would on a device with this memory.

    Args:
        config: configuration of a fit.
        name_or_path: another model than the configuration's.
        shape: another model, by its sizes.
        prompt_tokens: the longest prompt in tokens; data.max_prompt_tokens when null, and without
            that 256, or as many as the model's positions allow.
        devices: data-parallel ranks; those of the trainer when null.
        sharding: none, ddp or fsdp2; that of the trainer's strategy when null, and ddp when it has
            none and there are several devices.
        device_memory_gb: memory of one device in units of 1e9 bytes; that of this machine when
            null. With it, a trainer that is not on the CPU is taken to be on a GPU.
        json: file to write the numbers to.
        overrides: options of fit, such as "--model.beta=0".

    Returns:
        The estimate.
    """
    run = read_run_config([f"--config={resolve_package_path(config)}", *overrides])
    if name_or_path is not None:
        run.model.name_or_path = name_or_path
    is_cuda = is_on_cuda(run.trainer.accelerator, device_memory_gb)
    num_devices = devices or num_devices_of(run.trainer, is_cuda)
    if device_memory_gb is not None:
        limit = int(device_memory_gb * 1e9)
    else:
        has_gpu = is_cuda and torch.cuda.is_available()
        device = torch.device("cuda" if has_gpu else "cpu")
        limit = device_limit(device, 1 if is_cuda else num_devices)
    settings = settings_from_config(
        run,
        shape=shape,
        prompt_tokens=prompt_tokens,
        num_devices=num_devices,
        sharding=sharding,
        is_cuda=is_cuda,
        limit=limit,
    )
    estimate = estimate_memory(settings)
    critics = critic_estimates(settings)
    console = Console(highlight=False)
    console.print(memory_table(estimate))
    for line in notes(estimate, limit):
        console.print(line, soft_wrap=True)
    console.print(critic_table(critics))
    if json is not None:
        numbers = estimate.as_dict() | {
            "limit_bytes": limit,
            "critics": {name: found and found.as_dict() for name, found in critics.items()},
        }
        Path(json).write_text(json_format.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    return estimate


def critic_estimates(settings: MemorySettings) -> dict[str, MemoryEstimate | None]:
    """The same run under GRPO, and under PPO with each form of critic.

    Args:
        settings: of the run; its own critic's adapters and model count where it has them.

    Returns:
        Name -> estimate; None where the policy does not allow that form.
    """
    own = settings.model.critic or CriticSettings()
    found: dict[str, MemoryEstimate | None] = {}
    grpo = replace(settings.model, critic=None)
    found["GRPO"] = estimate_memory(replace(settings, model=grpo))
    forms: tuple[Literal["head", "lora", "separate"], ...] = ("head", "lora", "separate")
    for form in forms:
        if form == "lora" and settings.model.lora is None:
            found["PPO, lora"] = None
            continue
        model = replace(settings.model, critic=CriticSettings(form=form, lora=own.lora))
        if form != "separate":
            model = replace(model, critic_config_json=None)
        found[f"PPO, {form}"] = estimate_memory(replace(settings, model=model))
    return found

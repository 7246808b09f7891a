"""What a checkpoint says of a run besides weights and moments, and reading it before they load."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_grpo.checkpoints.manifest import MANIFEST
from lightning_grpo.checkpoints.store import open_checkpoint
from lightning_grpo.run_state import Counters

if TYPE_CHECKING:
    from lightning_grpo.module import GRPOModule

KEY = "lightning_grpo"


def record_of(module: GRPOModule) -> dict[str, Any]:
    """Counters, beta, choices, stage, and what is known of the reference, as plain values."""
    return {
        "counters": asdict(module.counters),
        "beta": module.beta,
        "is_lora": module.policy.is_lora,
        "choices": asdict(module.choices),
        "is_cold_started": module.is_cold_started,
        "reference": dict(module.reference_record),
        "stage": module.stage,
        "critic_form": module.critic_settings.form if module.critic_settings else None,
        "critic_failure": module.critic_failure,
        "num_critic_failures": module.num_critic_failures,
    }


def restore_record(module: GRPOModule, saved: dict[str, Any]) -> None:
    """Take back what `record_of` gave; stage and choices come earlier, before the weights."""
    module.counters = Counters(**saved["counters"])
    module.beta = saved["beta"]
    module.is_cold_started = saved["is_cold_started"]
    module.reference_record = saved["reference"]
    module.critic_failure = saved["critic_failure"]
    module.num_critic_failures = saved["num_critic_failures"]


def check_record(module: GRPOModule, saved: dict[str, Any]) -> None:
    """Refuse a checkpoint whose weights the present options have no place for.

    Args:
        module: set up, in fit.
        saved: of `record_of`.

    Raises:
        ValueError: adapters against a whole model, or a critic of another form.
    """
    if saved["is_lora"] != (module.load_options["lora"] is not None):
        kind = "adapters" if saved["is_lora"] else "a whole model"
        raise ValueError(
            f"the checkpoint holds {kind}: resume with the model.lora that the run began with"
        )
    if saved["stage"] == "grpo":
        return
    form = module.critic_settings.form if module.critic_settings else None
    if form != saved["critic_form"]:
        raise ValueError(
            f"the checkpoint holds a critic of form {saved['critic_form']}, but model.critic.form "
            f"is {form}: resume with the form that the run had"
        )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """All of a checkpoint but its weights, which are not read.

    Args:
        path: a checkpoint folder of ours, a file, or a folder that Lightning has sharded.

    Returns:
        Its content; tensors of a file are on the meta device.
    """
    if (path / MANIFEST).exists():
        return open_checkpoint(path).read_state()
    file = path / "meta.pt" if path.is_dir() else path
    content: dict[str, Any] = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    return content

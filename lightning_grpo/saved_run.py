"""What a checkpoint says of a run besides weights and moments, and reading it before they load."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_grpo.checkpoints import open_checkpoint, resolve_checkpoint
from lightning_grpo.resume.fingerprints import check_fingerprints
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
        "fingerprints": dict(module.fingerprints),
        "is_cold_started": module.is_cold_started,
        "reference": dict(module.reference_record),
        "stage": module.stage,
        "critic_form": module.critic_settings.form if module.critic_settings else None,
        "critic_failure": module.critic_failure,
        "num_critic_failures": module.num_critic_failures,
        "num_nonfinite_in_a_row": module.nonfinite_guard.num_in_a_row,
    }


def restore_record(module: GRPOModule, saved: dict[str, Any]) -> None:
    """Take back what `record_of` gave; stage and choices come earlier, before the weights."""
    module.counters = Counters(**saved["counters"])
    module.beta = saved["beta"]
    module.is_cold_started = saved["is_cold_started"]
    module.reference_record = saved["reference"]
    module.critic_failure = saved["critic_failure"]
    module.num_critic_failures = saved["num_critic_failures"]
    module.nonfinite_guard.num_in_a_row = saved["num_nonfinite_in_a_row"]


def check_record(module: GRPOModule, saved: dict[str, Any]) -> None:
    """Refuse a checkpoint of another model, or whose weights the options have no place for.

    Args:
        module: with its policy loaded, in fit.
        saved: of `record_of`.

    Raises:
        ValueError: adapters against a whole model, another base model or tokenizer, or a critic of
            another form.
    """
    if saved["is_lora"] != (module.load_options["lora"] is not None):
        kind = "adapters" if saved["is_lora"] else "a whole model"
        raise ValueError(
            f"the checkpoint holds {kind}: resume with the model.lora that the run began with"
        )
    check_fingerprints(module, saved["fingerprints"])
    if saved["stage"] == "grpo":
        return
    form = module.critic_settings.form if module.critic_settings else None
    if form != saved["critic_form"]:
        raise ValueError(
            f"the checkpoint holds a critic of form {saved['critic_form']}, but model.critic.form "
            f"is {form}: resume with the form that the run had"
        )


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """All of a checkpoint but its weights, which are not read.

    Args:
        path: of a checkpoint folder of ours or its URL; a file, or a folder that Lightning sharded.

    Returns:
        Its content; tensors are on the meta device.
    """
    file = Path(path) / "meta.pt" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        return open_checkpoint(resolve_checkpoint(path)).read_state()
    content: dict[str, Any] = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    return content

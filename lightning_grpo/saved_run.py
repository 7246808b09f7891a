"""What a checkpoint says of a run besides weights and moments, and reading it before they load."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_grpo.checkpoints import open_checkpoint, resolve_checkpoint
from lightning_grpo.checkpoints.optimizer_names import (
    parameter_names,
    with_names,
    with_numbers,
)
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
        path: of its folder or its URL, as `resolve_checkpoint` takes it.

    Returns:
        Its content.
    """
    return open_checkpoint(resolve_checkpoint(path)).read_state()


def name_optimizer_states(module: GRPOModule, checkpoint: dict[str, Any]) -> None:
    """Let the moments of a checkpoint be found by the names of their parameters.

    Args:
        module: in fit.
        checkpoint: of Lightning, changed; without optimizers it stays as it is.
    """
    if "optimizer_states" in checkpoint:
        names = parameter_names(module.trainer.optimizers[0], module.named_parameters())
        states = checkpoint["optimizer_states"]
        checkpoint["optimizer_states"] = [with_names(state, names) for state in states]


def number_optimizer_states(module: GRPOModule, checkpoint: dict[str, Any]) -> None:
    """Undo `name_optimizer_states` for the optimizer that the module is about to make.

    Args:
        module: with its policy and its critic.
        checkpoint: changed; without optimizers, as FSDP2 gives it, it stays as it is.
    """
    if "optimizer_states" in checkpoint:
        own = {id(parameter): name for name, parameter in module.named_parameters()}
        names = [own[id(parameter)] for group in module.optimized() for parameter in group]
        states = checkpoint["optimizer_states"]
        checkpoint["optimizer_states"] = [with_numbers(state, names) for state in states]

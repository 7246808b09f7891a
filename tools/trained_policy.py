"""The policy that a checkpoint or a transformers folder holds, as the run had it."""

from __future__ import annotations

from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

import torch
import yaml
from jsonargparse import Namespace
from torch import nn
from transformers import PreTrainedTokenizerBase
from upath import UPath

from lightning_grpo.checkpoint_paths import run_dir_of
from lightning_grpo.critic import CRITIC_ADAPTER, CriticSettings, make_critic
from lightning_grpo.importing import Source, open_source
from lightning_grpo.paths import resolve_package_path
from lightning_grpo.policy import Policy, load_policy
from lightning_grpo.reference import frozen_reference_hash
from lightning_grpo.run_files import newest_config
from lightning_grpo.saved_run import KEY, read_checkpoint
from lightning_grpo.tokenizing import load_tokenizer
from lightning_grpo.tools.run_config import critic_settings, lora_of, read_run_config

_SECTIONS = ("seed_everything", "model", "data", "rollout")


class Trained(NamedTuple):
    """A policy on the CPU, in eval mode, and what belongs to it."""

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    run: Namespace | None
    """Configuration of the run; None where a transformers folder says nothing of one."""
    place: str = ""
    """Of the checkpoint that was opened."""
    critic: nn.Module | None = None
    """Where it was asked for."""


def load_trained(
    ckpt_path: str, config: str | None = None, *, with_critic: bool = False
) -> Trained:
    """Load the policy of a checkpoint, and its critic.

    Args:
        ckpt_path: a checkpoint of a run.
        config: the run's configuration; the one that the run left beside its checkpoints when None.
        with_critic: whether the critic is needed.

    Returns:
        The policy with the checkpoint's weights.

    Raises:
        ValueError: no configuration, or one of another model; no critic where one is needed.
    """
    source = open_source(ckpt_path)
    run = run_of(source.place, config)
    options = run.model
    tokenizer = load_tokenizer(
        resolve_package_path(options.tokenizer or options.name_or_path),
        revision=None if options.tokenizer else options.revision,
    )
    # Random weights that a LoRA run has not saved come back with its seed.
    torch.manual_seed(run.rollout.seed if run.rollout.seed is not None else run.seed_everything)
    policy = load_policy(
        options.name_or_path,
        num_tokens=len(tokenizer),
        init=options.init,
        revision=options.revision,
        dtype=options.dtype,
        lora=lora_of(options.lora),
    )
    record = read_checkpoint(source.place).get(KEY)
    if record is None:
        raise ValueError(f"{ckpt_path} is no checkpoint of a run of lightning_grpo")
    reference = record["reference"]
    is_base_kept = policy.is_lora and reference and not reference["folder"]
    if is_base_kept and frozen_reference_hash(policy) != reference["sha256"]:
        raise ValueError("model.name_or_path does not hold the base that the run was trained on")
    critic = None
    if with_critic:
        critic = make_critic(_critic_settings(run, record, ckpt_path), policy, tokenizer).eval()
    fill(policy, source, critic)
    return Trained(policy.eval(), tokenizer, run, source.place, critic)


def _critic_settings(run: Namespace, record: dict[str, Any], ckpt_path: str) -> CriticSettings:
    if record["stage"] == "grpo":
        raise ValueError(f"{ckpt_path} holds no critic: its run was on GRPO when it was saved")
    settings = critic_settings(run.model.get("critic"))
    if settings is None:
        raise ValueError("model.critic is not set in the run's configuration")
    return settings


def load_exported(name_or_path: str) -> Trained:
    """Load a transformers folder, or a name on the Hub, as a policy.

    Args:
        name_or_path: as transformers takes it.

    Returns:
        The policy.
    """
    tokenizer = load_tokenizer(resolve_package_path(name_or_path))
    policy = load_policy(name_or_path, num_tokens=len(tokenizer), dtype="auto")
    return Trained(policy.eval(), tokenizer, None)


def run_of(checkpoint: str, config: str | None) -> Namespace:
    """The configuration of the run that wrote a checkpoint.

    Args:
        checkpoint: path in a run's folder, if `config` is None.
        config: a file that counts instead.

    Returns:
        The sections of `fit`; those that a policy does not depend on have their defaults.

    Raises:
        ValueError: none is beside the checkpoint.
    """
    content = config_of(checkpoint, config)
    # What is not asked for here, such as reward functions, need not be where the checkpoint is.
    kept = {name: content[name] for name in _SECTIONS if name in content}
    with NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(kept | {"reward": {"functions": []}}, file)
        file.flush()
        return read_run_config(["--config", file.name])


def config_of(checkpoint: str, config: str | None) -> dict[str, Any]:
    """The configuration of the run that wrote a checkpoint, as plain values.

    Args:
        checkpoint: path in a run's folder, if `config` is None.
        config: a file that counts instead.

    Returns:
        Section -> options; nothing that they name is imported.

    Raises:
        ValueError: none is beside the checkpoint.
    """
    if config is None:
        run_dir = run_dir_of(checkpoint)
        found = newest_config(run_dir) if run_dir is not None else None
        if found is None:
            raise ValueError(
                f"there is no configuration beside {checkpoint}: name it with --config"
            )
        config = str(found)
    content = yaml.safe_load(UPath(resolve_package_path(config)).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{config} is no configuration of a run")
    return content


@torch.no_grad()
def fill(policy: Policy, source: Source, critic: nn.Module | None = None) -> None:
    """Put the weights of a checkpoint into a policy, one tensor at a time.

    Args:
        policy: of the run's model; under LoRA the base stays as it is.
        source: checkpoint of the run.
        critic: of the run; None leaves its weights out.

    Raises:
        ValueError: the checkpoint has another model's weights.
    """
    places: dict[str, Any] = {f"policy.{n}": t for n, t in policy.state_dict().items()}
    if critic is not None:
        places |= {f"critic.{name}": tensor for name, tensor in critic.state_dict().items()}
    needed = {n for n in places if not policy.is_lora or ".lora_" in n or n.startswith("critic.")}
    tensors = {n: t for n, t in source.tensors.items() if n.startswith(("policy.", "critic."))}
    if critic is None:
        tensors = {n: t for n, t in tensors.items() if not _is_of_critic(n)}
    if wrong := sorted(needed - tensors.keys()) or sorted(tensors.keys() - places.keys()):
        raise ValueError(
            f"{source.place} does not fit the run's configuration: {wrong[0]} and "
            f"{len(wrong) - 1} other tensors are in one of them only"
        )
    for name, tensor in tensors.items():
        if places[name].shape != tensor.shape:
            raise ValueError(
                f"{source.place}: {name} has shape {tuple(tensor.shape)}, and the run's model "
                f"{tuple(places[name].shape)}"
            )
        places[name].copy_(tensor.read())


def _is_of_critic(name: str) -> bool:
    return name.startswith("critic.") or f".{CRITIC_ADAPTER}.weight" in name

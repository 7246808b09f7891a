"""export_critic: the critic of a checkpoint as a transformers folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from upath import UPath

from lightning_grpo.checkpoint_paths import run_dir_of
from lightning_grpo.checkpoints import Checkpoint, open_checkpoint, resolve_checkpoint
from lightning_grpo.critic import CriticSettings, make_critic
from lightning_grpo.critic_export import write_critic
from lightning_grpo.paths import resolve_package_path
from lightning_grpo.policy import load_policy
from lightning_grpo.reference import frozen_reference_hash
from lightning_grpo.run_files import newest_config
from lightning_grpo.saved_run import KEY
from lightning_grpo.tokenizing import load_tokenizer
from lightning_grpo.tools.run_config import critic_settings, lora_of, read_run_config


def export_critic(ckpt_path: str, out: str, config: str | None = None) -> None:
    """Write the critic of a checkpoint as a token classifier of transformers, and check it.

    The folder loads with AutoModelForTokenClassification; its one output at each token is the value
    of the state after that token. Its values are compared with the critic's before it says done.

    Args:
        ckpt_path: a checkpoint of a run that was on PPO or on its way there.
        out: folder to write to.
        config: the run's configuration; the one that the run left beside its checkpoints when null.
    """
    try:
        checkpoint = open_checkpoint(resolve_checkpoint(ckpt_path))
    except FileNotFoundError as error:
        raise ValueError(f"--ckpt_path {ckpt_path}: {error}") from error
    saved = checkpoint.read_state()[KEY]
    if saved["stage"] == "grpo":
        raise ValueError(f"{ckpt_path} holds no critic: its run was on GRPO when it was saved")
    run = read_run_config(["--config", str(config or _config_of(checkpoint.url))])
    settings = critic_settings(run.model.get("critic"))
    if settings is None:
        raise ValueError("model.critic is not set in the run's configuration")
    # Random weights that a LoRA run has not saved come back with its seed.
    torch.manual_seed(run.rollout.seed if run.rollout.seed is not None else run.seed_everything)
    write_from(checkpoint, run.model, settings, Path(out), base_sha256=base_hash(saved))


def base_hash(saved: dict[str, Any]) -> str:
    """The hash of the base under a LoRA policy, if the checkpoint has it; else empty."""
    record = saved["reference"]
    return record["sha256"] if record and saved["is_lora"] and not record["folder"] else ""


def write_from(
    checkpoint: Checkpoint,
    options: Any,
    settings: CriticSettings,
    folder: Path,
    *,
    base_sha256: str = "",
) -> None:
    """Load the critic of a checkpoint and write it.

    Args:
        checkpoint: whose weights are read.
        options: the section `model` of the run's configuration.
        settings: of the critic.
        folder: to write to.
        base_sha256: of the base under adapters, to check; not checked when empty.

    Raises:
        ValueError: checkpoint, configuration and model do not belong together.
    """
    source = resolve_package_path(options.tokenizer or options.name_or_path)
    tokenizer = load_tokenizer(source, revision=None if options.tokenizer else options.revision)
    policy = load_policy(
        options.name_or_path,
        num_tokens=len(tokenizer),
        init=options.init,
        revision=options.revision,
        lora=lora_of(options.lora),
    )
    if base_sha256 and frozen_reference_hash(policy) != base_sha256:
        raise ValueError("model.name_or_path does not hold the base that the run was trained on")
    critic = make_critic(settings, policy, tokenizer)
    state = dict(checkpoint.read_weights())
    for prefix, module in (("policy.", policy), ("critic.", critic)):
        part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        wrong = module.load_state_dict(part, strict=False)
        # A checkpoint of a LoRA run holds adapters only.
        missing = [name for name in wrong.missing_keys if not policy.is_lora or ".lora_" in name]
        if missing or wrong.unexpected_keys:
            raise ValueError(
                f"{checkpoint.url} does not fit the run's configuration: {missing[:3]} missing"
            )
    difference = write_critic(critic.eval(), policy.eval(), tokenizer, folder)
    print(f"wrote {folder}: its values are within {difference:.1e} of the critic's")


def _config_of(path: str) -> UPath:
    run_dir = run_dir_of(path)
    found = newest_config(run_dir) if run_dir is not None else None
    if found is None:
        raise ValueError(f"there is no configuration beside {path}: name it with --config")
    return found

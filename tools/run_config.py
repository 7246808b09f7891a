"""From the configuration of a fit to what decides its memory, without making anything."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from jsonargparse import Namespace
from torch.optim import Optimizer
from transformers import Qwen2Config

from lightning_grpo.adapters import Lora
from lightning_grpo.cli import GRPOCLI, RunParser, resolve_config_names
from lightning_grpo.critic import CriticSettings
from lightning_grpo.data import PromptDataModule
from lightning_grpo.memory.device import planned
from lightning_grpo.memory.estimate import MemorySettings, Sharding
from lightning_grpo.memory.fit import choose
from lightning_grpo.memory.model import ModelSpec, config_as_json, read_config, spec_from_config
from lightning_grpo.module import GRPOModule
from lightning_grpo.optimization import adamw

ASSUMED_PROMPT_TOKENS = 256


@dataclass
class ModelShape:
    """A model of Qwen2's architecture, by its sizes; the defaults are those of Qwen2.5-7B.

    Args:
        hidden_size: width.
        num_layers: decoder layers.
        num_heads: attention heads of queries.
        num_kv_heads: attention heads of keys and values.
        intermediate_size: width of the feed-forward layers.
        vocab_size: rows of the embedding.
        tie_embeddings: use the input embedding as the output layer too.
    """

    hidden_size: int = 3584
    num_layers: int = 28
    num_heads: int = 28
    num_kv_heads: int = 4
    intermediate_size: int = 18944
    vocab_size: int = 152064
    tie_embeddings: bool = False

    def config(self) -> Qwen2Config:
        """The configuration of transformers."""
        return Qwen2Config(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            tie_word_embeddings=self.tie_embeddings,
            bos_token_id=None,
            eos_token_id=None,
        )


class _ConfigReader(GRPOCLI):
    """The command line of `fit` up to the point where something would be made."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Accept what the configuration file that a run leaves behind holds."""
        parser.add_argument("--ckpt_path", default=None)
        parser.add_argument("--weights_only", default=None)

    def before_instantiate_classes(self) -> None:
        """Do nothing: there is no run."""

    def instantiate_classes(self) -> None:
        """Make nothing."""

    def _set_seed(self) -> None:
        pass


def read_run_config(args: list[str]) -> Namespace:
    """Parse options of `fit` as `fit` does, and make nothing of them.

    Args:
        args: with `--config`.

    Returns:
        The sections.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
        reader = _ConfigReader(
            GRPOModule,
            PromptDataModule,
            run=False,
            args=resolve_config_names(args),
            save_config_callback=None,
            auto_configure_optimizers=False,
            parser_class=RunParser,
        )
    found: Namespace = reader.config
    return found


def settings_from_config(
    run: Namespace,
    *,
    shape: ModelShape | None,
    prompt_tokens: int | None,
    num_devices: int,
    sharding: Sharding | None,
    is_cuda: bool,
    limit: int,
) -> MemorySettings:
    """What decides the memory of a run, from its configuration.

    Args:
        run: as parsed.
        shape: of another model than the configuration's.
        prompt_tokens: longest prompt; the configuration's bound when None.
        num_devices: data-parallel ranks.
        sharding: how they share the model; from the strategy when None.
        is_cuda: whether they are GPUs.
        limit: bytes of one, from which is chosen what the configuration leaves open.

    Returns:
        The settings.
    """
    model, rollout = run.model, run.rollout
    precision = str(run.trainer.precision)
    is_half = precision == "bf16-true"
    critic = critic_settings(model.get("critic"))
    critic_config = None
    if critic is not None and critic.name_or_path is not None:
        critic_config = config_as_json(read_config(critic.name_or_path))
    spec = spec_from_config(
        shape.config() if shape else read_config(model.name_or_path, model.revision),
        dtype="bfloat16" if is_half else model.dtype,
        is_converted=is_half,
        lora=lora_of(model.lora),
        attn_implementation=model.attn_implementation,
        dropout=model.dropout,
        critic=critic,
        critic_config_json=critic_config,
    )
    bonus = [_init_args(model.get(name)).get("entropy_coef") for name in ("algorithm", "ppo")]
    settings = MemorySettings(
        model=spec,
        prompt_tokens=prompt_tokens or run.data.max_prompt_tokens or _assumed_prompt(run, spec),
        completion_tokens=rollout.max_completion_tokens,
        prompts=max(run.data.prompts_per_iteration // num_devices, 1),
        group_size=rollout.group_size,
        val_prompts=run.data.val_prompts_per_batch if run.data.val_data else 0,
        num_val_samples=rollout.num_val_samples,
        num_minibatches=run.replay.num_minibatches,
        engine=rollout.engine,
        max_rows=rollout.max_rows,
        is_packed=model.packing == "auto",
        temperature=rollout.temperature,
        has_entropy_bonus=any(bonus),
        is_autocast=precision in ("bf16-mixed", "bf16"),
        has_reference=model.beta > 0,
        keeps_old_weights=model.old_policy == "weights",
        make_optimizer=optimizer_maker(model.optimizer),
        sharding=sharding or _sharding(run.trainer.strategy, num_devices),
        num_devices=num_devices,
        is_cuda=is_cuda,
    )
    tokens, recomputes = model.microbatch_tokens, model.activation_checkpointing
    return choose(
        settings,
        planned(limit, is_cuda=is_cuda),
        microbatch_tokens=None if tokens == "auto" else tokens,
        is_checkpointing=None if recomputes == "auto" else recomputes,
    )


def _assumed_prompt(run: Namespace, spec: ModelSpec) -> int:
    positions = getattr(spec.config, "max_position_embeddings", None) or math.inf
    longest = max(positions - run.rollout.max_completion_tokens, 1)
    return int(min(ASSUMED_PROMPT_TOKENS, longest))


def optimizer_maker(section: Any) -> Callable[[Any], Optimizer]:
    """Something that makes the optimizer that a configuration names.

    Args:
        section: class_path and init_args, or None.

    Returns:
        From groups of parameters to an optimizer.
    """
    class_path = section if isinstance(section, str) else (section or {}).get("class_path")
    if class_path is None:
        return section if callable(section) else adamw
    module, _, name = class_path.rpartition(".")
    make = getattr(import_module(module), name)
    options = _init_args(section)
    return lambda params: make(params, **options)


def _init_args(section: Any) -> dict[str, Any]:
    found = section.get("init_args", section) if isinstance(section, Namespace) else None
    return found.as_dict() if isinstance(found, Namespace) else {}


def critic_settings(section: Any) -> CriticSettings | None:
    """The critic that a section `model.critic` describes; None when there is none."""
    if section is None or isinstance(section, CriticSettings):
        return section
    options = section.as_dict()
    return CriticSettings(**options | {"lora": lora_of(options.get("lora")) or Lora()})


def lora_of(section: Any) -> Lora | None:
    """The adapters that a section describes; None when there are none."""
    if section is None or isinstance(section, Lora):
        return section
    return Lora(**(section.as_dict() if isinstance(section, Namespace) else section))


def is_on_cuda(accelerator: Any, device_memory_gb: float | None) -> bool:
    """Whether a trainer would run on GPUs, here or where the memory of a device is given."""
    if accelerator in ("gpu", "cuda"):
        return True
    is_there = torch.cuda.is_available() or device_memory_gb is not None
    return accelerator == "auto" and is_there


def num_devices_of(trainer: Namespace, is_cuda: bool) -> int:
    """Data-parallel ranks that a trainer's section asks for."""
    asked = trainer.devices
    if isinstance(asked, list):
        number = len(asked)
    elif str(asked).isdigit():
        number = int(asked)
    else:
        number = max(torch.cuda.device_count(), 1) if is_cuda else 1
    return number * int(trainer.num_nodes)


def _sharding(strategy: Any, num_devices: int) -> Sharding:
    name = strategy if isinstance(strategy, str) else strategy.class_path
    if name.startswith("ddp") or name.endswith("DDPStrategy"):
        return "ddp"
    if name.endswith("ModelParallelStrategy"):
        return "fsdp2"
    return "ddp" if num_devices > 1 else "none"

"""Folders of runs in tests: the checkpoint of a policy that has moved, with the run's files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from command_lines import write_config
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from lightning_grpo.adapters import Lora
from lightning_grpo.checkpoints.io import FolderCheckpointIO
from lightning_grpo.policy import load_policy
from lightning_grpo.tokenizing import load_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
GPT2_SIZES: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
ARCHITECTURES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, SIZES),
    "qwen2": (Qwen2Config, SIZES),
    "qwen3": (Qwen3Config, SIZES),
    "gemma2": (Gemma2Config, SIZES),
    "gpt2": (GPT2Config, GPT2_SIZES),
}
METRICS = """\
step,reward/mean,ref/kl,val/pass_at_1
0,,,0.25
0,0.3,0.0,
1,0.4,0.001,
2,,,0.5
3,0.6,0.002,
4,,,0.75
5,,,0.875
"""


def write_model(name: str, char_model: str, folder: Path, *, is_tied: bool) -> str:
    """A model of another architecture with the tokenizer of the small one."""
    kind, sizes = ARCHITECTURES[name]
    tokenizer = load_tokenizer(char_model)
    config = kind(
        **sizes,
        vocab_size=len(tokenizer),
        tie_word_embeddings=is_tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in Path(char_model).glob("token*.json"):
        shutil.copy(file, folder)
    return str(folder)


def write_run(model: str, *, lora: Lora | None = None, **changes: dict[str, Any]) -> str:
    """A run's folder with the checkpoint of a policy that has moved away from its model.

    Args:
        model: folder that it starts from.
        lora: adapters in place of all weights.
        changes: further options of its configuration, by section.

    Returns:
        The checkpoint of step 4.
    """
    adapters = {"lora": {"rank": lora.rank, "alpha": lora.alpha}} if lora else {}
    write_config(model, model={"name_or_path": model, **adapters}, **changes)
    Path("run/checkpoints").mkdir(parents=True)
    Path("config.yaml").rename("run/config.yaml")
    Path("run/metrics.csv").write_text(METRICS)
    policy = load_policy(model, num_tokens=len(load_tokenizer(model)), lora=lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    state = {f"policy.{n}": t for n, t in policy.state_dict().items() if not lora or "lora_" in n}
    counters = {"iterations": 2, "optimizer_steps": 4, "completions": 16, "tokens": 64}
    record = {"counters": counters, "stage": "grpo", "is_lora": lora is not None, "reference": {}}
    content = {"state_dict": state, "lightning_grpo": record, "global_step": 4}
    FolderCheckpointIO().save_checkpoint(content, "run/checkpoints/last-000004")
    return "run/checkpoints/last-000004"


def change_config(**sections: Any) -> None:
    """Put other options into the configuration of the run, section by section."""
    path = Path("run/config.yaml")
    content = yaml.safe_load(path.read_text())
    for name, options in sections.items():
        content[name] = content.get(name, {}) | options
    path.write_text(yaml.safe_dump(content))

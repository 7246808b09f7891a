"""Whether a run is resumed with the base model and the tokenizer it had: cheap hashes of them."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from lightning_grpo.module import GRPOModule

# Elements of each weight that are hashed: training moves nearly all of them.
_NUM_SAMPLES = 64
# Shows how a tokenizer treats spaces, digits, capitals, other scripts and its own tokens.
_PROBE = " The 1st of 12,345 tests:\n\n\tnaive caf\u00e9s, \u4f60\u597d, don't <s>x</s> == !=  end"
_MEANINGS = {
    "base_weights": "another base model (model.name_or_path, model.revision)",
    "tokenizer": "another tokenizer (model.tokenizer)",
}


def fingerprints_of(policy: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Hashes of what a run starts from.

    Args:
        policy: as it was loaded, before it is trained or sharded.
        tokenizer: of the policy.

    Returns:
        Name -> hash.
    """
    return {
        "base_weights": weights_fingerprint(policy),
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }


def weights_fingerprint(module: nn.Module) -> str:
    """Hash of names and shapes of all weights, and of a few elements of each.

    Adapters are left out, and elements are rounded to bfloat16: neither model.lora nor model.dtype
    makes another base model.

    Args:
        module: on any device.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(module.named_parameters()):
        if ".lora_" in name:
            continue
        flat = weight.detach().flatten()
        last = max(len(flat) - 1, 0)
        places = torch.linspace(0, last, min(len(flat), _NUM_SAMPLES), dtype=torch.float64).long()
        sampled = flat[places.to(flat.device)].bfloat16().float().cpu()
        plain = name.replace("base_model.model.", "").replace(".base_layer", "")
        digest.update(f"{plain}{tuple(weight.shape)}".encode() + sampled.numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of a tokenizer's vocabulary, special tokens and chat template, and of what it does.

    Args:
        tokenizer: of any kind.
    """
    parts = {
        "vocabulary": tokenizer.get_vocab(),
        "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "probe": tokenizer(_PROBE)["input_ids"],
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def check_fingerprints(module: GRPOModule, saved: dict[str, str]) -> None:
    """Refuse to resume with another model or tokenizer.

    Args:
        module: with its policy loaded, about to load a checkpoint.
        saved: fingerprints of the checkpoint.

    Raises:
        ValueError: something differs, and checkpoint.force_resume is not set.
    """
    own = module.fingerprints
    changed = [text for name, text in _MEANINGS.items() if own[name] != saved[name]]
    if changed and not module.force_resume:
        raise ValueError(
            f"the checkpoint was made with {' and '.join(changed)}: resume with what the run "
            "started from, or set checkpoint.force_resume if the change is meant"
        )

"""From the names of a checkpoint to those of a transformers model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_grpo.importing.lazy import LazyTensor, Weights

# What wrappers around a module put into the names of its parameters.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_UNKNOWN_ADAPTER = re.compile(r"\.(lora_(embedding_[AB]|magnitude_vector)|modules_to_save)\b")


@dataclass(frozen=True)
class WantedModel:
    """The names and shapes that a configuration asks for."""

    shapes: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    """Name -> name of the parameter that it is the same as."""
    ignored: tuple[str, ...]
    """Patterns of names that old checkpoints of this model have besides."""
    transposed: frozenset[str]
    """Weights that are stored as (inputs, outputs), such as those of GPT-2."""
    model: Any
    """On the meta device."""

    @property
    def class_name(self) -> str:
        """Of transformers."""
        return type(self.model).__name__


@dataclass(frozen=True)
class Pair:
    """The two halves of a low-rank change of a weight."""

    a: LazyTensor
    """(rank, inputs)"""
    b: LazyTensor
    """(outputs, rank)"""


@dataclass(frozen=True)
class Matched:
    """A checkpoint's tensors under the names of the model."""

    prefix: str
    weights: Weights
    pairs: dict[str, Pair]
    """Name of the weight that it changes -> adapter."""
    num_others: int
    """Tensors that are no part of the model, such as those of a critic or an optimizer."""


def wanted_model(folder: Path) -> WantedModel:
    """Find what tensors a model has, without making any.

    Args:
        folder: with config.json; no code of it is run.

    Returns:
        Names and shapes.

    Raises:
        ValueError: transformers does not know a model of this kind by itself.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        found = getattr(transformers, (config.architectures or [""])[0], None)
        is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        with torch.device("meta"):
            if is_model:
                model = found(config)  # type: ignore[misc]
            else:
                model = transformers.AutoModelForCausalLM.from_config(
                    config, trust_remote_code=False
                )
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{folder} describes no model that transformers knows by itself, and code of a model's "
            f"folder is not run: {reason}"
        ) from error
    return _describe(model)


def _describe(model: Any) -> WantedModel:
    names = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    declared = getattr(model, "_tied_weights_keys", None) or {}
    targets = set(declared.values()) if isinstance(declared, dict) else set()
    same: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same.setdefault(id(parameter), []).append(name)
    tied: dict[str, str] = {}
    for group in same.values():
        kept = next((name for name in group if name in targets), group[0])
        tied |= {name: kept for name in group if name != kept}
    transposed = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module).__name__ == "Conv1D" and isinstance(module, nn.Module)
    }
    ignored = tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    return WantedModel(names, tied, ignored, frozenset(transposed), model)


def match_names(
    tensors: Weights, wanted: WantedModel, prefix: str | None = None, *, is_partial: bool = False
) -> Matched:
    """Give a checkpoint's tensors the names of the model.

    Args:
        tensors: under the checkpoint's names.
        wanted: the model.
        prefix: what its names begin with; found by comparing names when None.
        is_partial: whether weights may be missing, as in a checkpoint of adapters only.

    Returns:
        The tensors; of tied ones only the first.

    Raises:
        ValueError: tensors are missing, of another shape, or too many; the message names them.
    """
    plain, pairs = _split_adapters(tensors)
    if prefix is None:
        prefix = find_prefix({*plain, *pairs}, wanted)
    weights = {name.removeprefix(prefix): t for name, t in plain.items() if name.startswith(prefix)}
    own_pairs = {n.removeprefix(prefix): p for n, p in pairs.items() if n.startswith(prefix)}
    num_others = len(tensors) - len(weights) - 2 * len(own_pairs)
    old = [n for n in weights if any(re.search(pattern, n) for pattern in wanted.ignored)]
    for name in old:
        if name not in wanted.shapes:
            del weights[name]
    weights = _without_tied(weights, wanted)
    missing = [n for n in wanted.shapes if n not in weights and n not in wanted.tied]
    unexpected = [n for n in {**weights, **own_pairs} if n not in wanted.shapes]
    if unexpected or (missing and not (is_partial and own_pairs and not weights)):
        raise ValueError(
            f"the tensors under {prefix!r} are not those of a {wanted.class_name}: missing "
            f"{_some(missing)}; too many {_some(unexpected)}. Name what their names begin with in "
            "--prefix, or the model in --like"
        )
    for name, tensor in weights.items():
        if tensor.shape != wanted.shapes[name]:
            raise ValueError(
                f"{name} has the shape {tensor.shape}, and {wanted.shapes[name]} in the "
                "configuration: name the right model with --like"
            )
    return Matched(prefix, weights, own_pairs, num_others)


def find_prefix(names: Collection[str], wanted: WantedModel) -> str:
    """Find what the names of a checkpoint begin with before those of the model.

    Args:
        names: of the checkpoint.
        wanted: the model.

    Returns:
        The prefix under which the most names are the model's.

    Raises:
        ValueError: there is none, or there are several under which all are.
    """
    counts: Counter[str] = Counter()
    for name in names:
        start = 0
        while start >= 0:
            if name[start:] in wanted.shapes:
                counts[name[:start]] += 1
            start = name.find(".", start) + 1 or -1
    if not counts:
        raise ValueError(
            f"no name in the checkpoint is one of a {wanted.class_name}; they begin with "
            f"{_some(_roots(names))}: name the model with --like"
        )
    most = max(counts.values())
    best = sorted(prefix for prefix, count in counts.items() if count == most)
    if len(best) > 1:
        raise ValueError(
            f"the checkpoint holds several models of this kind, under {best}: choose one of them "
            "with --prefix"
        )
    return best[0]


def _split_adapters(tensors: Weights) -> tuple[Weights, dict[str, Pair]]:
    plain: Weights = {}
    halves: dict[str, dict[tuple[str, str], LazyTensor]] = {}
    for full_name, tensor in tensors.items():
        name = full_name
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        if match := _LORA.fullmatch(name):
            adapter = halves.setdefault(match["adapter"] or "default", {})
            adapter[match["module"], match["half"]] = tensor
        elif _UNKNOWN_ADAPTER.search(name):
            raise ValueError(f"{name} belongs to an adapter of a kind that is not read")
        else:
            plain[name.replace(".base_layer.", ".")] = tensor
    if not halves:
        return plain, {}
    if "default" not in halves and len(halves) > 1:
        raise ValueError(
            f"the checkpoint holds the adapters {sorted(halves)} and none is 'default'"
        )
    chosen = halves["default"] if "default" in halves else next(iter(halves.values()))
    pairs: dict[str, Pair] = {}
    for module, _ in chosen:
        if not {(module, "A"), (module, "B")} <= chosen.keys():
            raise ValueError(f"{module} has only one half of its adapter")
        pairs[f"{module}.weight"] = Pair(chosen[module, "A"], chosen[module, "B"])
    return plain, pairs


def _without_tied(weights: Weights, wanted: WantedModel) -> Weights:
    kept = dict(weights)
    for name, other in wanted.tied.items():
        if name not in kept:
            continue
        tensor = kept.pop(name)
        if other not in kept:
            kept[other] = tensor
        elif not torch.equal(tensor.read(), kept[other].read()):
            raise ValueError(
                f"{name} and {other} are tied in the configuration and differ in the checkpoint: "
                "set tie_word_embeddings to false in the config.json that --like names"
            )
    return kept


def _roots(names: Iterable[str]) -> list[str]:
    return sorted({".".join(name.split(".")[:2]) for name in names})


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

"""A transformers model below its output layer: its states at completions, packed or padded."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_grpo.masking import position_ids
from lightning_grpo.packed_attention import NAME, attention_in_use
from lightning_grpo.packing import PackedLayout, pack_rows

# Other kinds of layers mix tokens in ways that a packed stream does not allow.
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


def completion_states(
    trunk: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    layout: PackedLayout | None,
) -> Tensor:
    """Last hidden states of completions.

    Args:
        trunk: a transformers model without its output layer.
        prompt_ids: (B, P) left-padded.
        prompt_mask: (B, P) bool, True = real token.
        completion_ids: (B, C) right-padded.
        completion_mask: (B, C) bool, True = real token.
        layout: of the same rows, to forward each prompt once and no padding.

    Returns:
        (B, C + 1, H): those that predict each token, and that of the last token; those off the
        mask mean nothing.
    """
    if layout is None:
        inputs = padded_inputs(trunk, prompt_ids, prompt_mask, completion_ids, completion_mask)
        hidden: Tensor = trunk(**inputs).last_hidden_state
        return hidden[:, -completion_ids.shape[1] - 1 :]
    with attention_in_use(trunk, NAME):
        hidden = trunk(
            input_ids=layout.token_ids,
            position_ids=layout.position_ids,
            use_cache=False,
            packed_layout=layout,
        ).last_hidden_state
    return layout.states(hidden)


def padded_inputs(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
) -> dict[str, Any]:
    """What a transformers model is called with for prompts and their completions, row by row."""
    attention_mask = torch.cat([prompt_mask, completion_mask], dim=1)
    inputs: dict[str, Any] = {
        "input_ids": torch.cat([prompt_ids, completion_ids], dim=1),
        "attention_mask": attention_mask.long(),
        "use_cache": False,
    }
    if takes_positions(model):
        inputs["position_ids"] = position_ids(attention_mask)
    return inputs


def takes_positions(model: nn.Module) -> bool:
    """Whether a model is told the position of each token."""
    return "position_ids" in inspect.signature(type(model).forward).parameters


def layout_for(
    trunk: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    group_ids: Tensor | None,
) -> PackedLayout | None:
    """The layout of a packed forward, or None when a row is longer than a window of attention."""
    layout = pack_rows(prompt_ids, prompt_mask, completion_ids, completion_mask, group_ids)
    config = trunk.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    is_cut = any(window and layout.max_positions > window for window in windows)
    return None if is_cut else layout


def packing_obstacle(trunk: Any) -> str:
    """Why a model cannot be forwarded packed; empty when its configuration speaks for it."""
    name = type(trunk).__name__
    config = trunk.config.get_text_config()
    if not trunk._can_set_attn_implementation():
        return f"{name} does not let its attention be exchanged"
    if not takes_positions(trunk):
        return f"{name} takes no position_ids"
    others = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if others:
        return f"{name} has {', '.join(sorted(others))} layers"
    if getattr(config, "attn_logit_softcapping", None):
        return f"{name} caps its attention scores"
    if has_dropout(trunk):
        return "dropout would hit a shared prompt once for all its completions"
    return ""


def checkpoint_activations(
    model: Any, again: Callable[[], contextlib.AbstractContextManager[None]] | None = None
) -> None:
    """Recompute the activations of a transformers model in the backward pass.

    Args:
        model: changed in place.
        again: called in the forward pass; makes a context in which to repeat it. The attention
            function is that of the forward in any case.
    """

    trunk = getattr(model, model.base_model_prefix, model)

    def contexts() -> tuple[Any, Any]:
        name = trunk.config._attn_implementation
        return contextlib.nullcontext(), repeated(name, again() if again else None)

    @contextlib.contextmanager
    def repeated(
        name: str, context: contextlib.AbstractContextManager[None] | None
    ) -> Iterator[None]:
        with attention_in_use(trunk, name), context or contextlib.nullcontext():
            yield

    # Renamed in transformers 5; the old name goes in 6.
    enable = getattr(model, "activation_checkpointing_enable", None)
    options = {"use_reentrant": False, "context_fn": contexts}
    (enable or model.gradient_checkpointing_enable)(options)


def keep_activations(model: Any) -> None:
    """Undo `checkpoint_activations`.

    Args:
        model: changed in place.
    """
    disable = getattr(model, "activation_checkpointing_disable", None)
    (disable or model.gradient_checkpointing_disable)()


def zero_dropout(model: nn.Module) -> None:
    """Switch off every dropout of a model for good.

    Args:
        model: changed in place; its configuration is not.
    """
    # In the modules and not in the configuration, which is what an export writes.
    for module in model.modules():
        for name in _dropout_names(module):
            setattr(module, name, 0.0)


def has_dropout(model: nn.Module) -> bool:
    """Whether a model in training drops anything out."""
    return any(getattr(m, name) > 0 for m in model.modules() for name in _dropout_names(m))


def _dropout_names(module: nn.Module) -> list[str]:
    """Attributes of a module that are probabilities of dropout."""
    names = [n for n, value in vars(module).items() if "dropout" in n and isinstance(value, float)]
    return names + ["p"] * isinstance(module, nn.Dropout)

"""The output layer of a causal LM: from hidden states, or from the model, to log-probs."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_grpo.logprobs import Entropy, linear_logprobs, token_entropy, token_logprobs

# Settings of architectures that change the logits behind the output layer.
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def is_plain(model: Any) -> bool:
    """Whether the logits of a causal LM are its hidden states through one linear layer.

    Args:
        model: a transformers model; what its configuration does not tell, `check_plain` finds.
    """
    config = model.config.get_text_config()
    changes = [getattr(config, name, None) for name in _LOGIT_CHANGES]
    is_changed = any(change not in (None, 1, 1.0) for change in changes)
    return type(model.get_output_embeddings()) is nn.Linear and not is_changed


@torch.no_grad()
def check_plain(model: Any, trunk: nn.Module) -> bool:
    """Whether nothing lies between hidden states, output layer and logits, found by forwards.

    Args:
        model: a transformers model with an output layer, its weights in place.
        trunk: the same without.

    Returns:
        False when the model changes what it gives to the layer, or what the layer gives.
    """
    layer = model.get_output_embeddings()
    ids = torch.zeros(1, 2, dtype=torch.int64, device=layer.weight.device)
    # Far from 0, where a cap shows that would hardly be seen on the logits of a fresh model.
    probe = torch.linspace(-90, 90, 2 * len(layer.weight), device=ids.device).to(layer.weight.dtype)
    probe = probe.view(1, 2, -1)
    handle = layer.register_forward_hook(lambda *_: probe)
    try:
        with _input_of(layer, True) as seen:
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state
    return torch.equal(logits, probe) and torch.allclose(seen[0], hidden, rtol=1e-3, atol=1e-3)


def logprobs_of_states(
    layer: nn.Linear,
    states: Tensor,
    completion_ids: Tensor,
    selected: Tensor | None,
    *,
    num_tokens: int,
    temperature: float,
    entropy: Entropy,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of completion tokens from the states that predict them.

    Args:
        layer: the output layer.
        states: (B, C, H).
        completion_ids: (B, C).
        selected: (B, C) bool, the tokens to compute; None computes all.
        num_tokens: tokens that can be drawn.
        temperature: the sampling temperature.
        entropy: see `Policy.forward`.

    Returns:
        (B, C) each, 0 where not selected.
    """
    options: dict[str, Any] = {
        "bias": layer.bias,
        "num_tokens": num_tokens,
        "temperature": temperature,
        "entropy": entropy,
    }
    if selected is None:
        rows, tokens = states.flatten(0, 1), completion_ids.flatten()
        logprobs, entropies = linear_logprobs(rows, layer.weight, tokens, **options)
        return logprobs.view_as(completion_ids), entropies.view_as(completion_ids)
    rows, tokens = states[selected], completion_ids[selected]
    found = linear_logprobs(rows, layer.weight, tokens, **options)
    logprobs, entropies = (
        x.new_zeros(completion_ids.shape).masked_scatter(selected, x) for x in found
    )
    return logprobs, entropies


def logprobs_of_model(
    model: nn.Module,
    layer: nn.Module,
    inputs: dict[str, Any],
    completion_ids: Tensor,
    *,
    num_tokens: int,
    temperature: float,
    entropy: Entropy,
    with_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same from the logits of a model that does more than one linear layer to make them.

    Args:
        model: gives logits.
        layer: its output layer.
        inputs: of the model.
        completion_ids: (B, C), the last of the model's tokens.
        num_tokens: tokens that can be drawn.
        temperature: the sampling temperature.
        entropy: see `Policy.forward`.
        with_hidden: return the input of the output layer too.

    Returns:
        Log-probs and entropies (B, C), and hidden states (B, C + 1, H).
    """
    num_logits = completion_ids.shape[1] + 1
    with _input_of(layer, with_hidden) as seen:
        logits = model(**inputs).logits
    # The last position predicts a token past the completion.
    logits = logits[:, -num_logits:-1, :num_tokens]
    logprobs = token_logprobs(logits, completion_ids, temperature=temperature)
    entropies = torch.zeros_like(logprobs)
    if entropy == "gradient":
        entropies = token_entropy(logits, temperature=temperature)
    elif entropy == "detached":
        with torch.no_grad():  # row by row: its temporaries are as wide as the vocabulary
            for row, row_logits in enumerate(logits.detach()):
                entropies[row] = token_entropy(row_logits[None], temperature=temperature)[0]
    return logprobs, entropies, seen[0][:, -num_logits:] if with_hidden else None


def takes_num_logits(model: nn.Module) -> bool:
    """Whether a model can be told to compute the last logits only."""
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters


@contextlib.contextmanager
def _input_of(layer: nn.Module, is_wanted: bool) -> Iterator[list[Tensor]]:
    """What a layer gets as its input; a list that the layer's forward fills."""
    seen: list[Tensor] = []
    if not is_wanted:
        yield seen
        return
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()

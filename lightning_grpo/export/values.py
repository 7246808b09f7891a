"""A critic as a classifier of transformers with one output, compared with its source."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerBase,
)

from lightning_grpo.adapters import POLICY_ADAPTER
from lightning_grpo.critic import CRITIC_ADAPTER, LoraCritic, SeparateCritic
from lightning_grpo.export.proof import ExportMismatchError, compare_tokenizers, tokenizer_line
from lightning_grpo.policy import Policy
from lightning_grpo.types import Rollout

Head = Literal["tokens", "sequence"]

# Of a value, beside the largest: sums in another order, in float32.
_TOLERANCE = 1e-4
_NUM_PROMPT, _NUM_TOKENS = 4, 12
_CLASSES: dict[Head, Any] = {
    "tokens": AutoModelForTokenClassification,
    "sequence": AutoModelForSequenceClassification,
}


@dataclass(frozen=True)
class ValueProof:
    """What the comparison of a folder with the critic gave, in reward units."""

    num_values: int
    max_difference: float
    """To the critic with its weights rounded to the type of the folder."""
    rounding: float
    """Largest difference to the critic as it is."""
    max_value: float
    """Largest absolute value, for scale."""
    left_out_bias: float
    """By which the folder's values are lower, because such a classifier has no bias."""
    tokenizer_class: str
    """Class of transformers that cuts texts as in training."""

    def as_lines(self) -> list[str]:
        """The numbers as sentences."""
        lines = [
            f"{self.num_values} values of states: at most {self.max_difference:.1e} apart, where "
            f"they go up to {self.max_value:.3g}; {self.rounding:.1e} with the rounding of the "
            "weights",
            tokenizer_line(self.tokenizer_class),
        ]
        if self.left_out_bias:
            lines.append(
                f"all values are lower than the critic's by its bias, {self.left_out_bias:.6g}, "
                "which a sequence classifier of this kind has no place for"
            )
        return lines


@dataclass(frozen=True)
class ExpectedValues:
    """What a classifier has to say about the samples."""

    ids: Tensor
    """(B, T) token ids."""
    values: Tensor
    """(B, C + 1) of the states before each token of the completions and after the last."""
    bias: float
    """Of the critic's head."""


@torch.no_grad()
def expect_values(critic: Any, policy: Policy) -> ExpectedValues:
    """Ask a critic about sample tokens.

    Args:
        critic: in float32, on the CPU.
        policy: it belongs to, likewise.

    Returns:
        Its values.
    """
    rows = _sample(policy)
    hidden = policy.hidden_states(
        rows.prompt_ids, rows.prompt_mask, rows.completion_ids, rows.completion_mask
    )
    ids = torch.cat([rows.prompt_ids, rows.completion_ids], dim=1)
    return ExpectedValues(ids, critic(policy, rows, hidden), float(critic.head.bias))


@torch.no_grad()
def classifier_of(critic: Any, policy: Policy, tokenizer: Any, head: Head) -> Any:
    """Make a classifier of a critic, in float32.

    logits[i,t,0] of tokens is the value of the state after token t, logits[i,0] of sequence that
    of the state after the last token. Adapters are merged into the base, in the policy's own
    model, which is of no use afterwards.

    Args:
        critic: one of the three forms, on the CPU and not sharded.
        policy: it belongs to.
        tokenizer: the policy's.
        head: which of the two.

    Returns:
        A model of transformers.

    Raises:
        ValueError: transformers has no such classifier of this architecture.
    """
    config = copy.deepcopy(_trunk(critic, policy).config)
    config.num_labels = 1
    if config.pad_token_id is None:  # by which a sequence classifier finds the last token
        config.pad_token_id = tokenizer.pad_token_id
    try:
        model = _CLASSES[head].from_config(config, dtype=torch.float32)
    except ValueError as error:
        kind = type(config).__name__
        raise ValueError(f"transformers has no classifier of {head} for a {kind}") from error
    getattr(model, model.base_model_prefix).load_state_dict(_trunk_state(critic, policy))
    layer = _output_layer(model)
    layer.weight.copy_(critic.head.weight.unsqueeze(0))
    if layer.bias is not None:
        layer.bias.copy_(critic.head.bias)
    return model.eval()


@torch.no_grad()
def prove_values(
    folder: Path, model: Any, expected: ExpectedValues, tokenizer: PreTrainedTokenizerBase
) -> ValueProof:
    """Read a folder with transformers alone and compare its values with the critic's.

    Args:
        folder: as written.
        model: of `classifier_of`; its weights are rounded, and it is of no use afterwards.
        expected: of `expect_values`.
        tokenizer: the policy's.

    Returns:
        The numbers.

    Raises:
        ExportMismatchError: tokens or values differ.
    """
    tokenizer_class = compare_tokenizers(folder, tokenizer)
    head: Head = "tokens" if "TokenClassification" in type(model).__name__ else "sequence"
    again = _CLASSES[head].from_pretrained(folder, trust_remote_code=False)
    dtype = again.dtype
    found = _values(again.float().eval(), expected.ids, head)
    exact = _values(model, expected.ids, head)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    rounded = _values(model, expected.ids, head)
    values = expected.values if head == "tokens" else expected.values[:, -1:]
    bias = expected.bias if _output_layer(model).bias is None else 0.0
    largest = float(values.abs().max())
    difference = max(
        float((found - rounded).abs().max()), float((exact + bias - values).abs().max())
    )
    if not difference <= _TOLERANCE * max(1.0, largest):
        raise ExportMismatchError(
            f"the model in {folder} is not the critic: its values are up to {difference:.1e} apart "
            f"from the critic's, which go up to {largest:.3g}"
        )
    return ValueProof(
        num_values=values.numel(),
        max_difference=difference,
        rounding=float((found + bias - values).abs().max()),
        max_value=largest,
        left_out_bias=bias,
        tokenizer_class=tokenizer_class,
    )


def _values(model: Any, ids: Tensor, head: Head) -> Tensor:
    """Values (B, C + 1), or (B, 1) of the last state, as the classifier gives them."""
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits[:, _NUM_PROMPT - 1 :, 0] if head == "tokens" else logits


def _output_layer(model: Any) -> nn.Linear:
    return next(module for module in model.children() if isinstance(module, nn.Linear))


def _trunk(critic: nn.Module, policy: Policy) -> Any:
    return critic.trunk if isinstance(critic, SeparateCritic) else policy.trunk


def _trunk_state(critic: nn.Module, policy: Policy) -> dict[str, Tensor]:
    if not isinstance(critic, SeparateCritic) and isinstance(policy.model, PeftModel):
        name = CRITIC_ADAPTER if isinstance(critic, LoraCritic) else POLICY_ADAPTER
        merged: Any = policy.model.merge_and_unload(adapter_names=[name])
        return getattr(merged, merged.base_model_prefix).state_dict()  # type: ignore[no-any-return]
    state: dict[str, Tensor] = _trunk(critic, policy).state_dict()
    return state


def _sample(policy: Policy) -> Rollout:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(policy.num_tokens, (2, _NUM_TOKENS), generator=generator)
    pad = getattr(policy.causal_lm.config, "pad_token_id", None)
    if pad is not None:  # a sequence classifier would take the last token before it
        ids[ids == pad] = (pad + 1) % policy.num_tokens
    mask = torch.ones_like(ids, dtype=torch.bool)
    prompt, completion = slice(0, _NUM_PROMPT), slice(_NUM_PROMPT, None)
    return Rollout(
        prompt_ids=ids[:, prompt],
        prompt_mask=mask[:, prompt],
        completion_ids=ids[:, completion],
        completion_mask=mask[:, completion],
        action_mask=mask[:, completion],
        sampler_logprobs=torch.zeros(2, _NUM_TOKENS - _NUM_PROMPT),
        group_ids=torch.arange(2),
        truncated=torch.zeros(2, dtype=torch.bool),
    )

"""The least time that a machine allows for a step, from counts of operations and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Machine(NamedTuple):
    """What a device does at its best."""

    bytes_per_s: float
    """Of a copy, reads and writes counted."""
    flops_per_s: float
    """Of a matrix product."""


@dataclass(frozen=True)
class ModelCosts:
    """What a decoder of Qwen2's architecture takes per token.

    Args:
        hidden_size: h.
        num_layers: L.
        num_heads: n_q, of queries.
        num_kv_heads: n_kv, of keys and values.
        head_size: d.
        intermediate_size: width of the gated feed-forward layers.
        vocab_size: V.
        weight_bytes: of a weight and of an element of the cache.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    weight_bytes: int

    @property
    def num_head_params(self) -> int:
        """V * h: those of the output layer."""
        return self.vocab_size * self.hidden_size

    @property
    def num_params(self) -> int:
        """N: those that a token is multiplied with, the output layer once, no input embedding."""
        projected = (self.num_heads + 2 * self.num_kv_heads) * self.head_size
        attention = (self.hidden_size + 1) * projected
        attention += self.num_heads * self.head_size * self.hidden_size
        mlp = 3 * self.hidden_size * self.intermediate_size
        layer = attention + mlp + 2 * self.hidden_size
        return self.num_layers * layer + self.hidden_size + self.num_head_params

    @property
    def kv_bytes(self) -> int:
        """b: of the keys and values of one token."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * self.weight_bytes

    @property
    def attention_flops(self) -> int:
        """4 * L * n_q * d: of one query with one key and value."""
        return 4 * self.num_layers * self.num_heads * self.head_size


def decode_step_seconds(
    costs: ModelCosts, machine: Machine, num_rows: int, num_read: float, num_attended: float
) -> float:
    """Floor of one token more for every row.

    t = max((N * bytes + num_read * b) / bandwidth,
            (2 N B + 4 L n_q d * num_attended) / flops)

    Args:
        costs: of the model.
        machine: its best.
        num_rows: B, rows that run.
        num_read: cached tokens that are read, over all rows; a prompt that is read once for its
            group counts once.
        num_attended: cached tokens that the rows attend to, over all rows.

    Returns:
        Seconds.
    """
    num_bytes = costs.num_params * costs.weight_bytes + num_read * costs.kv_bytes
    flops = 2 * costs.num_params * num_rows + costs.attention_flops * num_attended
    return max(num_bytes / machine.bytes_per_s, flops / machine.flops_per_s)


class Sizes(NamedTuple):
    """Of the completions of one step."""

    prompt_tokens: int
    """P."""
    group_size: int
    """G."""
    lengths: Sequence[int]
    """B lengths of completions, in tokens."""

    @property
    def num_prompts(self) -> int:
        """N."""
        return len(self.lengths) // self.group_size


def rollout_seconds(costs: ModelCosts, machine: Machine, sizes: Sizes) -> float:
    """Floor of a rollout: each prompt run once, its keys and values read by every row.

    t = 2 N * (unique prompt tokens) / flops + sum over steps of `decode_step_seconds`

    Args:
        costs: of the model.
        machine: its best.
        sizes: of the completions.

    Returns:
        Seconds.
    """
    prompt_tokens = sizes.num_prompts * sizes.prompt_tokens
    total = 2 * costs.num_params * prompt_tokens / machine.flops_per_s
    for step in range(max(sizes.lengths)):
        rows = sum(length > step for length in sizes.lengths)
        attended = rows * (sizes.prompt_tokens + step)
        total += decode_step_seconds(costs, machine, rows, attended, attended)
    return total


def decode_bytes(costs: ModelCosts, sizes: Sizes) -> float:
    """Bytes that the steps of a rollout read: the weights in each, the cache of each running row.

    Args:
        costs: of the model.
        sizes: of the completions.

    Returns:
        Bytes.
    """
    cached = sum(n * sizes.prompt_tokens + n * (n - 1) // 2 for n in sizes.lengths)
    weights = costs.num_params * costs.weight_bytes
    return max(sizes.lengths) * weights + cached * costs.kv_bytes


class Update(NamedTuple):
    """What a training forward and backward runs over."""

    num_tokens: int
    """Tokens forwarded."""
    num_scored: int
    """Tokens that the output layer scores."""
    num_squared: int
    """Sum of S^2 over causal sequences of S tokens."""


def plain_update(sizes: Sizes) -> Update:
    """Every completion with its own prompt, without padding: the work that is asked for."""
    rows = [sizes.prompt_tokens + n for n in sizes.lengths]
    return Update(sum(rows), sum(sizes.lengths), sum(s * s for s in rows))


def shared_update(sizes: Sizes) -> Update:
    """The same, with each prompt forwarded once for its group."""
    plain = plain_update(sizes)
    repeated = len(sizes.lengths) - sizes.num_prompts
    return Update(
        plain.num_tokens - repeated * sizes.prompt_tokens,
        plain.num_scored,
        plain.num_squared - repeated * sizes.prompt_tokens**2,
    )


def padded_update(sizes: Sizes) -> Update:
    """Every completion with its own prompt, padded to the longest."""
    longest = max(sizes.lengths)
    row = sizes.prompt_tokens + longest
    num_rows = len(sizes.lengths)
    return Update(num_rows * row, num_rows * longest, num_rows * row**2)


def update_flops(costs: ModelCosts, update: Update, *, recomputes: bool = False) -> float:
    """Operations of a forward and backward.

    6 (N - V h) * tokens + 8 V h * scored + 6 L n_q d * sum S^2, and with the layers recomputed in
    the backward 8 and 8 in place of 6. The output layer is recomputed in its backward either way,
    as no logits are kept.

    Args:
        costs: of the model.
        update: what is run over.
        recomputes: whether the backward runs the layers once more.

    Returns:
        Floating-point operations.
    """
    passes = 8 if recomputes else 6
    layers = costs.num_params - costs.num_head_params
    flops = passes * layers * update.num_tokens + 8 * costs.num_head_params * update.num_scored
    return flops + passes / 4 * costs.attention_flops * update.num_squared

"""From logits to the log-probability of sampled tokens and to entropy, at the sampling temperature.

`linear_logprobs` goes from hidden states, and never holds the logits of all tokens at once.

All compute in float32 at least, whatever the dtype of the logits: in bfloat16 a log-softmax is off
by up to 0.1 nats, which is more than a policy moves in one step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_grpo.kernels import logit_kernels

# none: zeros; detached: for the metric alone; gradient: for an entropy bonus in the loss.
Entropy = Literal["none", "detached", "gradient"]
# Logits that exist at a time: 16 MB in float32 on a CPU, where more is no faster.
_CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**27}


def token_logprobs(logits: Tensor, token_ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probability of given tokens under temperature-scaled logits.

    lp[i,t] = z[i,t,y] - log sum_v exp z[i,t,v],    z = logits / temperature,  y = token_ids[i,t]

    Source: own; the temperature belongs to the policy, since it is the distribution that was
    sampled from (N Implementation Details of RLHF with PPO, policy training).

    The logits are not changed. A float32 or float64 input at temperature 1 is not copied either;
    otherwise one (B, C, V) copy is made, so long sequences are best passed in chunks.

    Args:
        logits: (B, C, V), row t predicts token t of `token_ids` (the caller shifts); finite also at
            positions that a mask will drop, since a NaN here has a NaN derivative.
        token_ids: (B, C) int64 in [0, V), also under a mask.
        temperature: divides the logits, > 0; the same in rollout, scoring and update.

    Returns:
        (B, C) nats, float32, or float64 for float64 logits.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.
    """
    if logits.ndim != 3 or token_ids.shape != logits.shape[:2]:
        raise ValueError(
            f"logits {tuple(logits.shape)} do not fit token_ids {tuple(token_ids.shape)}; "
            "pass (B, C, V) and (B, C)"
        )
    scaled = _scaled(logits, temperature)
    chosen = scaled.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)  # (B, C)
    return chosen - scaled.logsumexp(dim=-1)


def token_entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy of the next-token distribution at each position.

    H[i,t] = - sum_v p[i,t,v] * log p[i,t,v],    p = softmax(logits / temperature),  0 log 0 = 0

    Source: own. As a bonus it enters a loss as -coefficient * H.

    Args:
        logits: (B, C, V); -inf marks a token that cannot be drawn and adds neither entropy nor
            gradient.
        temperature: divides the logits, > 0.

    Returns:
        (B, C) nats in [0, log V], float32, or float64 for float64 logits.

    Raises:
        ValueError: logits that are not (B, C, V), or a temperature that is not positive.
    """
    if logits.ndim != 3:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; pass (B, C, V)")
    logp = _scaled(logits, temperature).log_softmax(dim=-1)
    finite_logp = logp.masked_fill(logp == -math.inf, 0.0)  # 0 * -inf is NaN
    return -(logp.exp() * finite_logp).sum(dim=-1)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    num_tokens: int | None = None,
    temperature: float = 1.0,
    entropy: Entropy = "none",
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of tokens, from hidden states and a linear output layer.

    z = (hidden @ weight^T + bias)[:num_tokens] / temperature
    logprob[n] = z[n, token_ids[n]] - log sum_v exp z[n,v],    entropy[n] = H(softmax z[n])

    Equal to `token_logprobs` and `token_entropy` of the logits. Forward and backward take some
    tokens at a time; kept in between are the hidden states and one normaliser per token, and the
    logits are computed again. A weight or bias that needs no gradient costs none. On a CUDA GPU
    with Triton what follows the product is one pass over the logits, see kernels/triton_logits.py.

    Source: own; the recomputation is that of Cut Cross-Entropy (arXiv:2411.09009).

    Args:
        hidden: (N, H), row n predicts token n.
        weight: (V, H).
        token_ids: (N,) int64 in [0, num_tokens).
        bias: (V,).
        num_tokens: tokens that can be drawn, all V when None; the rest has probability 0.
        temperature: divides the logits, > 0.
        entropy: whether to compute the entropy, and whether with gradients.

    Returns:
        Log-probabilities and entropies, (N,) each, float32 or float64; entropies are 0 when they
        are not asked for.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.
    """
    _check_temperature(temperature)
    if hidden.ndim != 2 or token_ids.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} does not fit token_ids {tuple(token_ids.shape)}; "
            "pass (N, H) and (N,)"
        )
    device = hidden.device.type
    is_cast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if is_cast else hidden.dtype
    logprobs, entropies = _LinearLogprobs.apply(
        hidden, weight, bias, token_ids, num_tokens or len(weight), temperature, entropy, dtype
    )
    return logprobs, entropies


class _LinearLogprobs(torch.autograd.Function):
    """The function of `linear_logprobs`.

    d logprob / dz = onehot(token) - p,    d entropy / dz = -p (log p + entropy),    p = softmax z
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        num_tokens: int,
        temperature: float,
        entropy: Entropy,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies, (N,) each."""
        wide = torch.promote_types(dtype, torch.float32)
        logprobs, lse, entropies = hidden.new_zeros(3, len(hidden), dtype=wide).unbind()
        ctx.options = num_tokens, temperature, dtype
        layer = _cast_layer(weight, bias, num_tokens, dtype)
        operations = _operations(hidden.device, dtype)
        for part in _chunks(hidden, num_tokens):
            z = _logits(hidden[part].to(dtype), *layer)
            statistics = operations.statistics(z, token_ids[part], temperature, entropy != "none")
            logprobs[part], lse[part] = statistics[:2]
            if statistics[2] is not None:
                entropies[part] = statistics[2]
        ctx.save_for_backward(hidden, weight, bias, token_ids, lse, entropies)
        if entropy != "gradient":
            entropies = entropies.clone()
            ctx.mark_non_differentiable(entropies)
        ctx.has_entropy = entropy == "gradient"
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states, weight and bias; sums over tokens are in float32."""
        hidden, weight, bias, token_ids, lse, entropies = ctx.saved_tensors
        num_tokens, temperature, dtype = ctx.options
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=lse.dtype) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=lse.dtype) if needs_bias else None
        layer = _cast_layer(weight, bias, num_tokens, dtype)
        operations = _operations(hidden.device, dtype)
        for part in _chunks(hidden, num_tokens):
            rows = hidden[part].to(dtype)
            d_logits = operations.gradients(
                _logits(rows, *layer),
                token_ids[part],
                lse[part],
                entropies[part],
                grads[0][part] / temperature,
                grads[1][part] / temperature if ctx.has_entropy else None,
                temperature,
            )
            if d_bias is not None:
                d_bias[:num_tokens] += d_logits.sum(0, dtype=d_bias.dtype)
            d_logits = d_logits.to(dtype)
            if d_hidden is not None:
                d_hidden[part] = d_logits @ layer[0]
            if d_weight is not None and d_weight.dtype == dtype:
                d_weight[:num_tokens].addmm_(d_logits.T, rows)
            elif d_weight is not None:
                d_weight[:num_tokens] += d_logits.T @ rows
        return d_hidden, d_weight, d_bias, None, None, None, None, None


def _cast_layer(
    weight: Tensor, bias: Tensor | None, num_tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The rows of an output layer that belong to tokens, in the type of its product."""
    cut = None if bias is None else bias[:num_tokens].to(dtype)
    return weight[:num_tokens].to(dtype), cut


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(rows.device.type, enabled=False):
        return torch.nn.functional.linear(rows, weight, bias)


class _Operations(NamedTuple):
    """What the function of `linear_logprobs` does with some rows of logits, which it may overwrite.

    The kernels have functions of the same names and arguments.
    """

    statistics: Callable[[Tensor, Tensor, float, bool], tuple[Tensor, Tensor, Tensor | None]]
    """Logits, token ids, temperature, whether with entropies -> log-probs, log sum exp, entropies
    or None, (N,) each."""
    gradients: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
    """Logits, token ids, log sum exp, entropies, gradients of log-probs and of entropies if any,
    both over the temperature, temperature -> (N, V) gradients of logits."""


def _operations(device: torch.device, dtype: torch.dtype) -> _Operations:
    kernels = logit_kernels(device.type) if dtype != torch.float64 else None
    if kernels is None:
        return _Operations(_token_statistics, _logit_gradients)
    return _Operations(kernels.token_statistics, kernels.logit_gradients)


def _token_statistics(
    logits: Tensor, token_ids: Tensor, temperature: float, has_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    z = _widened(logits, temperature)
    lse = z.logsumexp(dim=-1)
    logprobs = z.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1) - lse
    if not has_entropy:
        return logprobs, lse, None
    z -= lse.unsqueeze(-1)
    return logprobs, lse, -torch.linalg.vecdot(z.exp(), z)


def _logit_gradients(
    logits: Tensor,
    token_ids: Tensor,
    lse: Tensor,
    entropies: Tensor,
    scales: Tensor,
    entropy_scales: Tensor | None,
    temperature: float,
) -> Tensor:
    logp = _widened(logits, temperature).sub_(lse.unsqueeze(-1))
    scale = scales.unsqueeze(-1)
    if entropy_scales is None:
        gradients = logp.exp_().mul_(-scale)
    else:
        factors = (logp + entropies.unsqueeze(-1)).mul_(entropy_scales.unsqueeze(-1)).add_(scale)
        gradients = logp.exp_().mul_(factors.neg_())
    return gradients.scatter_add_(-1, token_ids.unsqueeze(-1), scale)


def _widened(logits: Tensor, temperature: float) -> Tensor:
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return z if temperature == 1.0 else z.div_(temperature)


def _chunks(hidden: Tensor, width: int, device: str | None = None) -> list[slice]:
    """Slices of rows with a bounded number of logits."""
    most = _CHUNK_LOGITS.get(device or hidden.device.type, _CHUNK_LOGITS["cpu"])
    size = max(most // width, 64)  # fewer rows make the products slow
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


def _check_temperature(temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; it must be a positive number")


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    _check_temperature(temperature)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide if temperature == 1.0 else wide / temperature

"""A critic that is not built: linear regression of returns on the policy's hidden states.

It costs no backward pass and no memory to speak of, so it runs beside an algorithm without a
critic, and says what one could know there. Its values are those of a linear head on the policy's
detached last hidden states, fitted to the returns (lambda 1) of every token of earlier iterations;
a token's state is the one that its logits come from, so it holds what came before that token and
not the token itself.

Everything that it knows is one matrix, the sums of products of features, 1 and return over tokens.
Such sums add up over ranks, and older ones fade by a factor per iteration, since the policy that
the states come from moves. The strength of the ridge is the one whose values were nearest to the
returns of iterations that had not been fitted yet; their errors follow from the same sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-2, 1.0, 100.0)
# Features whose variance is below this part of their mean square are constants, up to rounding.
_CONSTANT = 1e-10
_NUM_ROWS = 4096  # converted to float64 at a time


@torch.no_grad()
def regression_sums(states: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Sums over tokens of all products of features, 1 and return.

    sum_t z_t z_t^T,    z_t = (x_t, 1, y_t)

    Source: own.

    Args:
        states: (B, C, F) detached hidden state that each token was sampled from.
        returns: (B, C) what came after that state, reward units.
        mask: (B, C) bool, True where the policy chose the token.

    Returns:
        (F + 2, F + 2) float64; the sum over ranks is that of all their tokens.

    Raises:
        ValueError: shapes that do not fit, or a state or return that is not finite.
    """
    if mask.dtype != torch.bool or not states.shape[:-1] == returns.shape == mask.shape:
        raise ValueError(
            f"states {tuple(states.shape)}, returns {tuple(returns.shape)} and mask "
            f"{tuple(mask.shape)} must be (B, C, F), (B, C) and bool (B, C)"
        )
    x, y = states[mask], returns[mask].unsqueeze(1)
    size = states.shape[-1] + 2
    sums = torch.zeros(size, size, dtype=torch.float64, device=states.device)
    for x_rows, y_rows in zip(x.split(_NUM_ROWS), y.split(_NUM_ROWS), strict=True):
        ones = torch.ones_like(y_rows, dtype=torch.float64)
        z = torch.cat([x_rows.double(), ones, y_rows.double()], dim=1)
        sums.addmm_(z.T, z)
    if not bool(sums.isfinite().all()):
        raise ValueError("a state or a return is not finite")
    return sums


class ShadowCritic:
    """Ridge regression with forgetting: first asked for values, then shown what they should be."""

    def __init__(
        self, num_features: int, *, decay: float = 0.9, ridges: Sequence[float] = RIDGES
    ) -> None:
        """Begin with values of 0.

        Args:
            num_features: F, of a hidden state.
            decay: weight that the sums of an iteration keep in the next, in [0, 1]; .9 means
                that about ten iterations count.
            ridges: strengths to choose from, > 0, in units of the variance of a feature.

        Raises:
            ValueError: a number out of range.
        """
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}; it must be in [0, 1]")
        if not ridges or not all(ridge > 0 for ridge in ridges):
            raise ValueError(f"ridges are {list(ridges)}; they must be positive")
        self.num_features, self.decay, self.ridges = num_features, decay, tuple(ridges)
        self._sums = torch.zeros(num_features + 2, num_features + 2, dtype=torch.float64)
        self._errors = torch.zeros(len(ridges), dtype=torch.float64)
        self._spread = torch.zeros((), dtype=torch.float64)
        self._weights = torch.zeros(len(ridges), num_features + 1, dtype=torch.float64)

    @property
    def has_learned(self) -> bool:
        """Whether it has been shown any token."""
        return bool(self._sums[-2, -2] > 0)

    @property
    def ridge(self) -> float:
        """The strength that its values come from."""
        return self.ridges[self._best]

    @property
    def explained_var(self) -> float:
        """Share of the variance of the returns that it explained before it was fitted to them.

        Returns:
            At most 1; NaN before the second iteration, and where the returns do not vary.
        """
        spread = float(self._spread)
        return 1 - float(self._errors[self._best]) / spread if spread > 0 else math.nan

    @torch.no_grad()
    def values(self, states: Tensor) -> Tensor:
        """Value of each state, from earlier iterations alone as long as `update` comes after.

        Args:
            states: (..., F).

        Returns:
            (...) float64, reward units; 0 before the first `update`.
        """
        weights = self._weights[self._best].to(states.device)
        flat = states.reshape(-1, self.num_features)
        parts = [rows.double() @ weights[:-1] + weights[-1] for rows in flat.split(_NUM_ROWS)]
        return torch.cat(parts).view(states.shape[:-1])

    @torch.no_grad()
    def update(self, sums: Tensor) -> None:
        """Learn from the tokens of one iteration.

        beta = argmin sum_t w_t (y_t - c - x_t beta)^2 + ridge * sum_f W var_f beta_f^2

        with w_t the decay to the power of the token's age, and W their sum.

        Args:
            sums: (F + 2, F + 2) from `regression_sums`, added over the ranks.

        Raises:
            ValueError: sums of another number of features.
        """
        if sums.shape != self._sums.shape:
            raise ValueError(f"sums {tuple(sums.shape)} must be {tuple(self._sums.shape)}")
        new = sums.cpu().double()
        if float(new[-2, -2]) == 0:
            return
        if self.has_learned:
            # sum_t (x_t beta + c - y_t)^2, without the tokens themselves.
            residual = torch.cat([self._weights, -torch.ones(len(self.ridges), 1).double()], dim=1)
            self._errors = self.decay * self._errors + (residual @ new * residual).sum(1)
            spread = new[-1, -1] - new[-1, -2].square() / new[-2, -2]
            self._spread = self.decay * self._spread + spread
        self._sums = self.decay * self._sums + new
        self._weights = _ridge_weights(self._sums, self.ridges)

    def state_dict(self) -> dict[str, Any]:
        """As tensors and plain values."""
        return {
            "ridges": list(self.ridges),
            "sums": self._sums,
            "errors": self._errors,
            "spread": self._spread,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError: it is of other features or other ridges.
        """
        if state["sums"].shape != self._sums.shape or tuple(state["ridges"]) != self.ridges:
            raise ValueError(
                f"saved were {len(state['sums']) - 2} features and the ridges {state['ridges']}; "
                f"here are {self.num_features} and {list(self.ridges)}"
            )
        self._sums = state["sums"].clone()
        self._errors = state["errors"].clone()
        self._spread = state["spread"].clone()
        if self.has_learned:
            self._weights = _ridge_weights(self._sums, self.ridges)

    @property
    def _best(self) -> int:
        return int(self._errors.argmin()) if bool(self._errors.any()) else len(self.ridges) // 2


def _ridge_weights(sums: Tensor, ridges: Sequence[float]) -> Tensor:
    """(R, F + 1) weights of the features, and the constant, for each ridge."""
    count = sums[-2, -2]
    mean = sums[-2, :-2] / count
    mean_return = sums[-1, -2] / count
    covariance = sums[:-2, :-2] / count - torch.outer(mean, mean)
    moment = sums[-1, :-2] / count - mean * mean_return
    variance = covariance.diagonal()
    is_constant = variance <= _CONSTANT * (variance + mean.square())
    # Features in units of their standard deviation, so that one ridge suits all of them; the
    # constant is not shrunk.
    scale = torch.where(is_constant, 0.0, variance.clamp(min=0).rsqrt())
    correlation = covariance * torch.outer(scale, scale)
    weights = []
    for ridge in ridges:
        shrunk = correlation + ridge * torch.eye(len(scale), dtype=torch.float64)
        factor = torch.linalg.cholesky(shrunk)
        beta = scale * torch.cholesky_solve((scale * moment).unsqueeze(1), factor).squeeze(1)
        weights.append(torch.cat([beta, (mean_return - mean @ beta).unsqueeze(0)]))
    return torch.stack(weights)

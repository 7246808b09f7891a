"""Running sums of the gradients of prompts, and the inner products of pairs of them.

What an arm's gradient is worth shows in inner products of gradients of *different* prompts: that of
a gradient with itself holds its own noise, which agrees with itself. A critic adds a condition. It
must not have learned from either prompt of a pair, or it has learned their noise.
`GradientAccumulator` forms no other pairs:

- `end_fold`: pairs within the fold. The critic of a fold was fitted on other folds only.
- `end_iteration`: pairs within the iteration, and of its group gradients with what the earlier
  ones gave. The critic of an iteration was fitted on earlier ones only.

The sum over all pairs follows from sums of gradients, sum_{i != j} <x_i, h_j> = <X, H> - sum_i
<x_i, h_i>, so no gradient is kept. Prompts are dealt into blocks with sums of their own, so that
any block can be left out afterwards, which the jackknife does. (A bootstrap, which draws prompts
again, would put a prompt on both sides of a pair.) The memory is A * K * D numbers for A arms, K
blocks and D parameters, twice that in a window; where it is too much, give the gradients of the
model's last layer alone, and say so. Nothing is projected: an inner product after projection on 64
random directions is off by |x| |h| / 8, far more than the signal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lightning_grpo.types import SumOverRanks

_NUM_COLUMNS = 1 << 16  # converted to float64 at a time


@dataclass
class PairSums:
    """Sums over pairs of different prompts, by the blocks of the two; they add up over folds."""

    arms: tuple[str, ...]
    """The first is the unbiased one, with gradients h_i; those of arm a are x_i."""
    alignment: Tensor
    """(A, K, K) sum of <x_i, h_j> over admissible pairs, i in block k and j in block l."""
    num_alignment: Tensor
    """(K, K) how many pairs these are."""
    norm: Tensor
    """(A, K, K) sum of <x_i, x_j> over the pairs of one fold, or of all iterations of a window."""
    num_norm: Tensor
    """(K, K) how many pairs these are."""
    squares: Tensor
    """(A, K) sum of |x_i|^2."""
    num_prompts: Tensor
    """(K,) float64."""

    @classmethod
    def empty(cls, arms: Sequence[str], num_blocks: int) -> PairSums:
        """No pairs yet."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        a, k = len(arms), num_blocks
        return cls(
            arms=tuple(arms),
            alignment=zeros(a, k, k),
            num_alignment=zeros(k, k),
            norm=zeros(a, k, k),
            num_norm=zeros(k, k),
            squares=zeros(a, k),
            num_prompts=zeros(k),
        )

    def __add__(self, other: PairSums) -> PairSums:
        if self.arms != other.arms or len(self.num_prompts) != len(other.num_prompts):
            raise ValueError("pairs of other arms, or in another number of blocks, do not add up")
        sums = {
            name: getattr(self, name) + getattr(other, name)
            for name in (field.name for field in fields(self))
            if name != "arms"
        }
        return PairSums(arms=self.arms, **sums)


class GradientAccumulator:
    """Takes the gradients of prompts, and gives the sums over admissible pairs."""

    def __init__(self, arms: Sequence[str], *, num_blocks: int = 16) -> None:
        """Begin with nothing.

        Args:
            arms: names; the first is the unbiased one: leave-one-out advantages that are not
                divided by a standard deviation, every token with the same weight.
            num_blocks: K, what is left out at a time by the jackknife is one K-th of the prompts;
                >= 3. As many as prompts leave out one at a time.

        Raises:
            ValueError: fewer than three blocks, no arms, or one named twice.
        """
        if num_blocks < 3:
            raise ValueError(f"num_blocks is {num_blocks}; an interval needs at least 3")
        if not arms or len(set(arms)) != len(arms):
            raise ValueError(f"arms are {list(arms)}; name each once, the unbiased one first")
        self.arms = tuple(arms)
        self.pairs = PairSums.empty(arms, num_blocks)
        self.next_block = 0
        # Sums of the present iteration or fold, and of the earlier iterations of the window.
        self._now: Tensor | None = None
        self._earlier: Tensor | None = None
        self._num_now = torch.zeros(num_blocks, dtype=torch.float64)
        self._num_earlier = torch.zeros(num_blocks, dtype=torch.float64)
        self._squares = torch.zeros(len(arms), num_blocks, dtype=torch.float64)
        self._own_alignment = torch.zeros(len(arms), num_blocks, dtype=torch.float64)

    @property
    def num_blocks(self) -> int:
        """K."""
        return len(self._num_now)

    @torch.no_grad()
    def add(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Add one prompt, or a few, each to the next block.

        Args:
            gradients: of each arm, (D,) or (n, D): what the prompt adds to the gradient of the
                arm's loss at ratio 1, over all its completions and with the weights of that loss;
                zeros for a dead group. The scale may differ between arms, and not within one.

        Returns:
            (n,) int64, the block of each prompt.

        Raises:
            ValueError: an arm is missing or unknown, shapes differ, or a gradient is not finite.
        """
        rows = self._checked(gradients)
        blocks = (self.next_block + torch.arange(rows.shape[1])) % self.num_blocks
        if self._now is None:
            self._now = rows.new_zeros(len(self.arms), self.num_blocks, rows.shape[2])
        self._now.index_add_(1, blocks.to(rows.device), rows)
        self._squares.index_add_(1, blocks, _own_products(rows, rows))
        self._own_alignment.index_add_(1, blocks, _own_products(rows, rows[:1]))
        self._num_now.index_add_(0, blocks, torch.ones(len(blocks), dtype=torch.float64))
        self.next_block = (self.next_block + len(blocks)) % self.num_blocks
        return blocks

    @torch.no_grad()
    def end_fold(self, sum_over_ranks: SumOverRanks = lambda tensor: tensor) -> None:
        """Add the pairs within the prompts since the last end; nothing else is paired with them.

        Args:
            sum_over_ranks: adds a tensor over the ranks, each of which has added a prompt.

        Raises:
            RuntimeError: no prompt was added since the last end.
        """
        self._add_pairs_within(sum_over_ranks)
        self._forget_now()

    @torch.no_grad()
    def end_iteration(self, sum_over_ranks: SumOverRanks = lambda tensor: tensor) -> None:
        """Add the pairs within this iteration, and of it with the earlier ones of the window.

        <x_i, h_j> with i of an earlier iteration than j, not the other way round: the critic that
        gave x_i has learned from what earlier iterations sampled. <x_i, x_j> over all of them,
        since the length of a sum of gradients is what it is, whatever its terms have in common.
        The window counts as one policy: how far mu turns within it is not seen.

        Args:
            sum_over_ranks: adds a tensor over the ranks, each of which has added a prompt.

        Raises:
            RuntimeError: no prompt was added since the last end.
        """
        self._add_pairs_within(sum_over_ranks)
        now, earlier, pairs = self._now, self._earlier, self.pairs
        assert now is not None
        if earlier is not None:
            pairs.alignment += _products(earlier, now[:1])
            across = _products(earlier, now)
            pairs.norm += across + across.mT
            num_across = torch.outer(self._num_earlier, self._num_now)
            pairs.num_alignment += num_across
            pairs.num_norm += num_across + num_across.T
        self._earlier = now if earlier is None else earlier.add_(now)
        self._num_earlier += self._num_now
        self._forget_now()

    def new_window(self) -> None:
        """Forget everything but which block comes next."""
        self.pairs = PairSums.empty(self.arms, self.num_blocks)
        self._earlier = None
        self._num_earlier.zero_()
        self._forget_now()

    def state_dict(self) -> dict[str, Any]:
        """As tensors and plain values; between `end_iteration` and the next `add`.

        Raises:
            RuntimeError: prompts were added after the last end.
        """
        if self._now is not None:
            raise RuntimeError("end the iteration before the state is saved")
        sums = {f.name: getattr(self.pairs, f.name) for f in fields(self.pairs) if f.name != "arms"}
        return {
            "arms": list(self.arms),
            "next_block": self.next_block,
            "earlier": self._earlier,
            "num_earlier": self._num_earlier,
            **sums,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError: it is of other arms, or of another number of blocks.
        """
        if tuple(state["arms"]) != self.arms or len(state["num_earlier"]) != self.num_blocks:
            raise ValueError(
                f"saved were the arms {state['arms']} in {len(state['num_earlier'])} blocks; "
                f"here are {list(self.arms)} in {self.num_blocks}"
            )
        sums = {f.name: state[f.name].clone() for f in fields(self.pairs) if f.name != "arms"}
        self.pairs = PairSums(arms=self.arms, **sums)
        self.next_block = state["next_block"]
        self._earlier = None if state["earlier"] is None else state["earlier"].clone()
        self._num_earlier = state["num_earlier"].clone()
        self._forget_now()

    def _add_pairs_within(self, sum_over_ranks: SumOverRanks) -> None:
        now, pairs = self._now, self.pairs
        if now is None:
            raise RuntimeError("no prompt was added since the last end, on this rank")
        for name in ("_num_now", "_squares", "_own_alignment"):
            setattr(self, name, sum_over_ranks(getattr(self, name)).cpu())
        for of_arm in now:  # one arm at a time, for what the sum itself takes
            of_arm.copy_(sum_over_ranks(of_arm))
        pairs.alignment += _products(now, now[:1]) - self._own_alignment.diag_embed()
        pairs.norm += _products(now, now) - self._squares.diag_embed()
        num_pairs = torch.outer(self._num_now, self._num_now) - torch.diag(self._num_now)
        pairs.num_alignment += num_pairs
        pairs.num_norm += num_pairs
        pairs.squares += self._squares
        pairs.num_prompts += self._num_now

    def _forget_now(self) -> None:
        self._now = None
        for name in ("_num_now", "_squares", "_own_alignment"):
            setattr(self, name, torch.zeros_like(getattr(self, name)))

    def _checked(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """(A, n, D), finite."""
        if set(gradients) != set(self.arms):
            raise ValueError(f"gradients of {sorted(gradients)}; expected {sorted(self.arms)}")
        shapes = {tuple(gradients[arm].shape) for arm in self.arms}
        if len(shapes) != 1 or len(next(iter(shapes))) not in (1, 2):
            raise ValueError(f"the gradients have the shapes {shapes}; all must be (D,) or (n, D)")
        rows = torch.stack([torch.atleast_2d(gradients[arm]) for arm in self.arms])
        if self._now is not None and rows.shape[2] != self._now.shape[2]:
            raise ValueError(
                f"gradients of {rows.shape[2]} parameters after {self._now.shape[2]} before"
            )
        if not bool(rows.isfinite().all()):
            raise ValueError("a gradient is not finite; leave the prompt out")
        return rows


def without_each_block(sums: Tensor, is_used: Tensor) -> Tensor:
    """Sums over all pairs, and over those without one block of prompts each, for a jackknife.

    Args:
        sums: (..., K, K) by the blocks of the two prompts.
        is_used: (K,) bool, the blocks that have prompts; L of them.

    Returns:
        (..., 1 + L).
    """
    total = sums.sum((-2, -1)).unsqueeze(-1)
    own = sums.diagonal(dim1=-2, dim2=-1)
    without = total - sums.sum(-1) - sums.sum(-2) + own
    return torch.cat([total, without[..., is_used]], dim=-1)


def _products(x: Tensor, y: Tensor) -> Tensor:
    """(A, K, K) of (A, K, D) and (A or 1, K, D), in float64 whatever they are in, on the CPU."""
    chunks = zip(x.split(_NUM_COLUMNS, dim=2), y.split(_NUM_COLUMNS, dim=2), strict=True)
    return sum((a.double() @ b.double().mT for a, b in chunks), _zero(x)).cpu()


def _own_products(x: Tensor, y: Tensor) -> Tensor:
    """(A, n) of (A, n, D) and (A or 1, n, D), row by row, in float64, on the CPU."""
    chunks = zip(x.split(_NUM_COLUMNS, dim=2), y.split(_NUM_COLUMNS, dim=2), strict=True)
    return sum(((a.double() * b.double()).sum(dim=2) for a, b in chunks), _zero(x)).cpu()


def _zero(x: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=x.device)

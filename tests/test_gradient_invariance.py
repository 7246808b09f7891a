"""The gradient of an optimizer step depends on the rollout alone.

Measured where the optimizer sees it, through Trainer.fit: padding, what lies under the mask,
micro-batches, accumulation and ranks change nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import pytest
import torch
from distributed_runs import Perturb, Record, ShortenGroups, on_two_ranks, strategy_options
from runs import make_data, make_trainer

from lightning_grpo.algorithms import GRPO
from lightning_grpo.loaders import Slot
from lightning_grpo.module import GRPOModule
from lightning_grpo.types import Rollout

REDUCTIONS = ["completion", "token", "constant"]
TOLERANCE = {"64-true": 1e-6, "32-true": 1e-5}
NUM_STEPS = 2
# Prompts of 2 to 9 tokens: padded on the left.
PROMPTS = [{"prompt": f"{'abcdefgh'[: (3 * i) % 8 + 1]}="} for i in range(8)]


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.02)


def record_fit(
    model: str,
    reduction: Any,
    precision: Any = "64-true",
    *,
    strategy: str = "single",
    tokens: int = 16384,
    window: int = 1,
    old_logprobs: Any = "recompute",
    packing: Any = "auto",
    before: L.Callback | None = None,
    after: L.Callback | None = None,
) -> Record:
    """Two optimizer steps on one rollout: 4 ragged groups, and 4 whose completions are 1 token."""
    record = Record()
    module = GRPOModule(
        model,
        optimizer=sgd,
        beta=0.3,
        algorithm=GRPO(reduction=reduction, clip_low=0.1, clip_high=0.1),
        microbatch_tokens=tokens,
        old_logprobs=old_logprobs,
        packing=packing,
    )
    trainer = make_trainer(
        num_epochs=NUM_STEPS,
        num_minibatches=window,
        accumulate_grad_batches=window,
        precision=precision,
        max_completion_tokens=12,
        rollout={"stop_strings": list("012345")},
        callbacks=[Perturb(), ShortenGroups(4), *([before] if before else []), record],
        max_steps=NUM_STEPS,
        max_epochs=-1,
        **strategy_options(strategy),
    )
    if after is not None:
        trainer.callbacks.append(after)  # type: ignore[attr-defined]
    trainer.fit(module, datamodule=make_data(PROMPTS))
    return record


def assert_same_gradients(found: Record, expected: Record, tolerance: float) -> None:
    assert len(found.gradients) == len(expected.gradients) == NUM_STEPS
    for gradient, right in zip(found.gradients, expected.gradients):
        difference = float((gradient.double() - right.double()).abs().max() / right.abs().max())
        assert difference <= tolerance, difference


class WidenRollout(L.Callback):
    """Adds columns of padding to a scored rollout, with anything in them."""

    def __init__(self, token: int, logprob: float) -> None:
        self.token = token
        self.logprob = logprob

    def on_rewards_end(self, trainer: L.Trainer, module: GRPOModule, rollout: Rollout) -> Rollout:
        return widened(rollout, self.token, self.logprob)


def widened(rollout: Rollout, token: int, logprob: float) -> Rollout:
    """3 columns more on the left of the prompts, 5 on the right of the completions."""

    def pad(x: torch.Tensor, value: float, left: int, right: int) -> torch.Tensor:
        return torch.nn.functional.pad(x, (left, right), value=value)

    prompts, completions = rollout.prompt_mask, rollout.completion_mask
    return rollout.replace(
        prompt_ids=pad(torch.where(prompts, rollout.prompt_ids, token), token, 3, 0),
        prompt_mask=pad(prompts, False, 3, 0),
        completion_ids=pad(torch.where(completions, rollout.completion_ids, token), token, 0, 5),
        completion_mask=pad(completions, False, 0, 5),
        action_mask=pad(rollout.action_mask, False, 0, 5),
        sampler_logprobs=pad(
            torch.where(completions, rollout.sampler_logprobs, logprob), logprob, 0, 5
        ),
    )


class PoisonMinibatches(L.Callback):
    """Puts a value under the mask of everything that the loss reads."""

    def __init__(self, value: float) -> None:
        self.value = value

    def on_train_batch_start(
        self, trainer: L.Trainer, module: GRPOModule, batch: Slot, batch_idx: int
    ) -> None:
        minibatch = batch.minibatch
        assert minibatch is not None
        rollout = minibatch.rollout
        names = ("sampler_logprobs", "old_logprobs", "ref_logprobs", "advantages")
        poisoned = {
            name: torch.where(rollout.completion_mask, getattr(rollout, name), self.value)
            for name in names
        }
        batch.minibatch = dataclasses.replace(minibatch, rollout=rollout.replace(**poisoned))


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_microbatches_and_accumulation_leave_the_gradient_the_same(
    char_model, reduction, precision
):
    whole = record_fit(char_model, reduction, precision)
    assert whole.num_microbatches == [1, 1]
    # The steps have something to get wrong: ragged rows, ratios off 1, a KL, clipped tokens.
    metrics = whole.outputs[1].metrics
    assert 0.01 < metrics["policy/clip_frac"] < 0.9
    assert metrics["ref/kl"] > 0.01
    lengths = whole.rollouts[0].completion_mask.sum(1).tolist()
    assert lengths[16:] == [1] * 16
    assert len(set(lengths[:16])) > 3
    for tokens, num_microbatches in ((100, 2), (45, 3)):
        cut = record_fit(char_model, reduction, precision, tokens=tokens)
        assert cut.num_microbatches == [num_microbatches] * 2
        assert_same_gradients(cut, whole, TOLERANCE[precision])
    for window, tokens in ((2, 16384), (4, 16384), (2, 30)):
        accumulated = record_fit(char_model, reduction, precision, window=window, tokens=tokens)
        assert len(accumulated.num_microbatches) == NUM_STEPS * window
        assert_same_gradients(accumulated, whole, TOLERANCE[precision])


@pytest.mark.parametrize("precision", TOLERANCE)
def test_packing_leaves_the_gradient_the_same(char_model, precision):
    packed = record_fit(char_model, "completion", precision)
    padded = record_fit(char_model, "completion", precision, packing="off", tokens=300)
    assert padded.num_microbatches == [2, 2]
    assert_same_gradients(packed, padded, TOLERANCE[precision])


@pytest.mark.parametrize("precision", TOLERANCE)
def test_padding_leaves_the_gradient_the_same_whatever_it_holds(char_model, precision):
    narrow = record_fit(char_model, "completion", precision, old_logprobs="sampler")
    zeros = record_fit(
        char_model, "completion", precision, old_logprobs="sampler", before=WidenRollout(0, 0.0)
    )
    assert zeros.rollouts[0].prompt_ids.shape[1] == narrow.rollouts[0].prompt_ids.shape[1] + 3
    assert_same_gradients(zeros, narrow, TOLERANCE[precision])
    for token, logprob in ((7, math.nan), (8, math.inf), (9, -math.inf), (1, 1e4), (2, -1e4)):
        junk = record_fit(
            char_model,
            "completion",
            precision,
            old_logprobs="sampler",
            before=WidenRollout(token, logprob),
        )
        for gradient, expected in zip(junk.gradients, zeros.gradients, strict=True):
            assert torch.equal(gradient, expected)


def test_padding_that_is_not_cut_off_leaves_the_gradient_the_same(char_model, monkeypatch):
    narrow = record_fit(char_model, "completion")
    monkeypatch.setattr("lightning_grpo.forward.trim_padding", lambda rollout: rollout)
    wide = record_fit(char_model, "completion", before=WidenRollout(7, math.nan))
    assert_same_gradients(wide, narrow, TOLERANCE["64-true"])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_lies_under_the_mask_changes_no_bit_of_the_gradient(char_model, reduction):
    zeros = record_fit(char_model, reduction, "32-true", after=PoisonMinibatches(0.0))
    for value in (math.nan, math.inf, -math.inf, 1e4, -1e4):
        poisoned = record_fit(char_model, reduction, "32-true", after=PoisonMinibatches(value))
        for gradient, expected in zip(poisoned.gradients, zeros.gradients, strict=True):
            assert torch.equal(gradient, expected)


def record_levelled_or_not(fit: Callable[..., Any], model: str, options: dict[str, Any]) -> Any:
    """A fit, without an exchange of groups between ranks where `is_levelled` is False."""
    options = dict(options)
    if options.pop("is_levelled", True):
        return fit(model, **options)
    with patch("lightning_grpo.callbacks.replay.level_over_ranks", lambda _, rollout: rollout):
        return fit(model, **options)


def record_on_this_rank(model: str, fits: list[dict[str, Any]]) -> list[Record]:
    """All the fits of one process, without what cannot travel between processes."""
    return [record_levelled_or_not(record_fit, model, fit) for fit in fits]


def tokens_of(record: Record) -> int:
    """Tokens of the first rollout of a rank, each prompt once for its group."""
    (rollout,) = record.rollouts[:1]
    firsts = {group: row for row, group in enumerate(rollout.group_ids.tolist())}
    prompts = rollout.prompt_mask.sum(1)[list(firsts.values())]
    return int(prompts.sum() + rollout.completion_mask.sum())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_leave_the_gradient_the_same(char_model, strategy, tmp_path: Path):
    precisions = ["64-true", "32-true"] if strategy == "ddp" else ["32-true"]
    cuts = [{}, {"tokens": 45}, {"window": 2, "tokens": 30}, {"tokens": 14, "is_levelled": False}]
    fits = [
        {"reduction": reduction, "precision": precision, **cut}
        for reduction in REDUCTIONS
        for precision in precisions
        for cut in cuts
    ]
    on_both = on_two_ranks(
        record_on_this_rank, tmp_path, char_model, [fit | {"strategy": strategy} for fit in fits]
    )
    assert isinstance(on_both[0], list), on_both
    on_one = {
        (reduction, precision): record_fit(char_model, reduction, precision)
        for reduction in REDUCTIONS
        for precision in precisions
    }
    for fit, first, second in zip(fits, *on_both, strict=True):
        alone = on_one[fit["reduction"], fit["precision"]]
        rows = [rollout for record in (first, second) for rollout in record.rollouts]
        ids = [row for r in rows for row in r.completion_ids[r.completion_mask].tolist()]
        expected = alone.rollouts[0]
        assert sorted(ids) == sorted(expected.completion_ids[expected.completion_mask].tolist())
        # Both make the same number of forwards.
        assert first.num_microbatches == second.num_microbatches
        sizes = [[len(m) for m in r.minibatches[0].microbatches] for r in (first, second)]
        if not fit.get("is_levelled", True):
            # One rank has long rows and the other short ones, of which there are too few.
            assert tokens_of(first) > 1.5 * tokens_of(second)
            assert 0 not in sizes[0]
            assert 0 in sizes[1]
        else:
            assert 0.9 < tokens_of(first) / tokens_of(second) < 1.1
            if fit["precision"] == "64-true":  # where an exchange loses nothing, all digits stay
                assert_same_gradients(first, alone, 1e-12)
        assert_same_gradients(first, alone, TOLERANCE[fit["precision"]])
        assert_same_gradients(second, alone, TOLERANCE[fit["precision"]])

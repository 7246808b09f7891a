"""The replay: how a rollout is cut, and that the ratio is 1 until the policy moves."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from distributed_runs import Perturb, Record, weights_of
from runs import make_data, make_module, make_trainer
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_grpo.algorithms import GRPO
from lightning_grpo.callbacks import InnerEpochReplay
from lightning_grpo.module import GRPOModule
from lightning_grpo.replay import split_microbatches, split_minibatches, trim_padding
from lightning_grpo.types import LossOutput, Minibatch, MinibatchOutput, Rollout

STOPS = {"stop_strings": list("012345")}


def rollout_of(rows: list[tuple[int, int, int]]) -> Rollout:
    """Rows given as (group, prompt tokens, completion tokens), two columns wider than needed."""
    num_prompt = max(p for _, p, _ in rows) + 2
    num_completion = max(c for _, _, c in rows) + 2
    prompt_lengths = torch.tensor([p for _, p, _ in rows]).unsqueeze(1)
    completion_lengths = torch.tensor([c for _, _, c in rows]).unsqueeze(1)
    prompt_mask = torch.arange(num_prompt) >= num_prompt - prompt_lengths
    completion_mask = torch.arange(num_completion) < completion_lengths
    return Rollout(
        prompt_ids=prompt_mask.long() * 5,
        prompt_mask=prompt_mask,
        completion_ids=completion_mask.long() * 6,
        completion_mask=completion_mask,
        action_mask=completion_mask,
        sampler_logprobs=-completion_mask.float(),
        group_ids=torch.tensor([group for group, _, _ in rows]),
        truncated=torch.zeros(len(rows), dtype=torch.bool),
    )


def pairs(lengths: list[int]) -> Rollout:
    """Groups of two rows, prompts of 1 token, completions of the given lengths."""
    return rollout_of([(g, 1, n) for g, n in enumerate(lengths) for _ in range(2)])


# Cutting


def test_minibatches_are_whole_groups_and_hold_every_row_once():
    rollout = rollout_of(
        [(group, 2, 1 + (5 * group + row) % 7) for row in range(3) for group in range(6)]
    )
    parts = split_minibatches(rollout, 2, shuffle_key="k")
    assert sorted(torch.cat(parts).tolist()) == list(range(18))
    groups = [set(rollout.group_ids[part].tolist()) for part in parts]
    assert groups[0].isdisjoint(groups[1])
    assert [len(g) for g in groups] == [3, 3]


def test_minibatches_have_about_the_same_number_of_tokens():
    rollout = pairs([30, 1, 1, 1, 1, 28])
    parts = split_minibatches(rollout, 2, shuffle_key="k")
    # Two rows of prompt 1 and completion n make 2 (n + 1) tokens.
    tokens = [int((rollout.completion_mask[part].sum(1) + 1).sum()) for part in parts]
    assert tokens == [2 * (31 + 2 + 2), 2 * (29 + 2 + 2)]


def test_groups_of_the_same_length_are_dealt_in_an_order_that_the_key_decides():
    rollout = pairs([4] * 8)
    same = [split_minibatches(rollout, 2, shuffle_key="1/0")[0].tolist() for _ in range(2)]
    assert same[0] == same[1]
    others = {
        tuple(split_minibatches(rollout, 2, shuffle_key=f"1/{e}")[0].tolist()) for e in range(9)
    }
    assert len(others) > 3


def test_more_minibatches_than_prompts_are_refused():
    with pytest.raises(ValueError, match=r"replay.num_minibatches is 3 .* only 2 prompts"):
        split_minibatches(pairs([1, 1]), 3, shuffle_key="k")


def test_microbatches_stay_within_the_budget_and_hold_every_row_once():
    rollout = rollout_of([(g, 3, 1 + (7 * g + r) % 9) for g in range(5) for r in range(4)])
    parts = split_microbatches(rollout, 40)
    assert sorted(torch.cat(parts).tolist()) == list(range(20))
    for part in parts:
        width = 3 + int(rollout.completion_mask[part].sum(1).max())
        assert len(part) == 1 or width * len(part) <= 40


def test_a_group_over_the_budget_is_split_and_a_row_over_it_goes_alone():
    rollout = pairs([30])
    assert [p.tolist() for p in split_microbatches(rollout, 62)] == [[0, 1]]
    assert [p.tolist() for p in split_microbatches(rollout, 61)] == [[0], [1]]
    assert [p.tolist() for p in split_microbatches(rollout, 5)] == [[0], [1]]


def test_packed_microbatches_count_each_prompt_once_and_no_padding():
    rollout = rollout_of([(g, 3, 1 + (7 * g + r) % 9) for g in range(5) for r in range(4)])
    totals = [3 + int(n) for n in rollout.completion_mask.sum(1).reshape(5, 4).sum(1)]
    for budget in (20, 40, 60, sum(totals)):
        parts = split_microbatches(rollout, budget, is_packed=True)
        assert sorted(torch.cat(parts).tolist()) == list(range(20))
        for part in parts:
            num_groups = len(set(rollout.group_ids[part].tolist()))
            num_tokens = 3 * num_groups + int(rollout.completion_mask[part].sum())
            assert len(part) == 1 or num_tokens <= budget
    assert len(split_microbatches(rollout, sum(totals), is_packed=True)) == 1
    assert len(split_microbatches(rollout, sum(totals) - 1, is_packed=True)) == 2
    # A group of 3 + 30 + 30 tokens.
    pair = rollout_of([(0, 3, 30), (0, 3, 30)])
    assert [p.tolist() for p in split_microbatches(pair, 63, is_packed=True)] == [[0, 1]]
    assert [p.tolist() for p in split_microbatches(pair, 62, is_packed=True)] == [[0], [1]]


def test_trimming_cuts_the_columns_that_are_padding_in_every_row():
    trimmed = trim_padding(rollout_of([(0, 3, 1), (0, 1, 4)]))
    assert trimmed.prompt_ids.tolist() == [[5, 5, 5], [0, 0, 5]]
    assert trimmed.completion_ids.tolist() == [[6, 0, 0, 0], [6, 6, 6, 6]]
    assert trimmed.sampler_logprobs.shape == trimmed.action_mask.shape == (2, 4)
    empty = trim_padding(rollout_of([(0, 3, 0)]))
    assert empty.completion_ids.shape == (1, 1)


# Options


@pytest.mark.parametrize("option", ["num_epochs", "num_minibatches"])
def test_a_replay_of_nothing_is_refused(option):
    with pytest.raises(ValueError, match=f"replay.{option} must be at least 1, got 0"):
        InnerEpochReplay(**{option: 0})


def test_a_replay_that_is_no_multiple_of_the_accumulation_is_refused(char_model):
    trainer = make_trainer(num_epochs=3, accumulate_grad_batches=2)
    with pytest.raises(
        ValueError, match="= 3 has to be a multiple of trainer.accumulate_grad_batches = 2"
    ):
        trainer.fit(make_module(char_model), datamodule=make_data())


def test_an_epoch_that_ends_inside_an_accumulation_window_is_refused(char_model):
    trainer = make_trainer(num_epochs=2, accumulate_grad_batches=2, limit_train_batches=3)
    with pytest.raises(ValueError, match="an epoch of 3 minibatches .* make it a multiple"):
        trainer.fit(make_module(char_model), datamodule=make_data())


# The ratio


class RecordingGRPO:
    """GRPO that keeps what each forward with gradients gave."""

    def __init__(self) -> None:
        self.grpo = GRPO()
        self.forwards: list[tuple[Rollout, Tensor]] = []

    @property
    def reduction(self) -> Any:
        return self.grpo.reduction

    def check_group_size(self, group_size: int) -> None:
        self.grpo.check_group_size(group_size)

    @property
    def entropy_coef(self) -> float:
        return self.grpo.entropy_coef

    def prepare(self, rollout: Rollout, *, beta: float, sum_over_ranks: Any) -> Rollout:
        return self.grpo.prepare(rollout, beta=beta, sum_over_ranks=sum_over_ranks)

    def loss(
        self, logprobs: Tensor, rollout: Rollout, *, beta: float, entropy: Tensor | None = None
    ) -> LossOutput:
        self.forwards.append((rollout, logprobs.detach().clone()))
        return self.grpo.loss(logprobs, rollout, beta=beta, entropy=entropy)

    def log_ratios(self) -> list[float]:
        """Largest |log ratio| of each forward."""
        return [
            float((new - rows.old_logprobs)[rows.action_mask].abs().max())
            for rows, new in self.forwards
            if rows.old_logprobs is not None
        ]


@pytest.mark.parametrize("packing", ["auto", "off"])
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
def test_the_ratio_is_exactly_one_on_the_first_minibatch_when_recomputed(
    char_model, precision, packing
):
    algorithm = RecordingGRPO()
    module = make_module(
        char_model,
        algorithm=algorithm,
        old_logprobs="recompute",
        microbatch_tokens=60,
        packing=packing,
    )
    record = Record()
    trainer = make_trainer(
        num_epochs=2,
        num_minibatches=2,
        rollout=STOPS,
        precision=precision,
        callbacks=[Perturb(), record],
    )
    trainer.fit(module, datamodule=make_data())
    assert module.policy.is_packing == (packing == "auto")
    assert min(record.num_microbatches) >= 2
    ratios = algorithm.log_ratios()
    first_of_slot = 0
    for minibatch, num_microbatches in zip(record.minibatches, record.num_microbatches):
        of_slot = ratios[first_of_slot : first_of_slot + num_microbatches]
        first_of_slot += num_microbatches
        if minibatch.index == 0:
            assert of_slot == [0.0] * num_microbatches
        else:
            assert max(of_slot) > 1e-5
    assert [m.index for m in record.minibatches] == [0, 1, 2, 3] * 2


def test_the_ratio_is_one_within_1e_5_with_the_log_probs_of_the_fp32_sampler(char_model):
    algorithm = RecordingGRPO()
    module = make_module(
        char_model, algorithm=algorithm, old_logprobs="sampler", microbatch_tokens=60
    )
    record = Record()
    trainer = make_trainer(num_minibatches=2, rollout=STOPS, callbacks=[record])
    trainer.fit(module, datamodule=make_data())
    assert max(algorithm.log_ratios()[: record.num_microbatches[0]]) <= 1e-5
    assert record.outputs[0].metrics["policy/sampler_mismatch"] <= 1e-5
    assert "policy/sampler_mismatch" not in record.outputs[1].metrics


def test_one_step_per_rollout_needs_no_old_log_probs(char_model):
    algorithm = RecordingGRPO()
    record = Record()
    trainer = make_trainer(
        num_minibatches=2, accumulate_grad_batches=2, rollout=STOPS, callbacks=[record]
    )
    trainer.fit(make_module(char_model, algorithm=algorithm), datamodule=make_data())
    assert all(rows.old_logprobs is None for rows, _ in algorithm.forwards)
    assert [o.metrics["policy/approx_kl"] for o in record.outputs] == [0.0] * 4


@pytest.mark.parametrize(
    ("precision", "sampling", "choice"),
    [
        ("32-true", {}, "sampler"),
        ("bf16-mixed", {}, "recompute"),
        ("64-true", {}, "recompute"),
        ("32-true", {"top_k": 5}, "recompute"),
        ("32-true", {"temperature": 0.7}, "sampler"),
    ],
)
def test_the_samplers_log_probs_serve_only_where_they_agree(
    char_model, precision, sampling, choice
):
    module = make_module(char_model)
    trainer = make_trainer(
        num_epochs=2, rollout=STOPS | sampling, precision=precision, max_steps=2, max_epochs=-1
    )
    trainer.fit(module, datamodule=make_data())
    assert module.choices.old_logprobs == choice


class KeepWeights(L.Callback):
    """Keeps the weights after each minibatch."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        self.weights.append(weights_of(module))

    def on_minibatch_end(
        self, trainer: L.Trainer, module: GRPOModule, minibatch: Minibatch, output: MinibatchOutput
    ) -> None:
        self.weights.append(weights_of(module))


def logprobs_by_hand(folder: str, weights: dict[str, Tensor], rollout: Rollout) -> list[Tensor]:
    """Each row by itself, without padding, through transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    # The output layer is tied to the embedding, and not listed a second time.
    missing = model.load_state_dict(
        {n.removeprefix("model."): w for n, w in weights.items()}, strict=False
    )
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys
    rows = []
    for row in range(len(rollout)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        completion = rollout.completion_ids[row][rollout.completion_mask[row]]
        with torch.no_grad():
            logits = model(torch.cat([prompt, completion]).unsqueeze(0)).logits[0]
        logits = logits[len(prompt) - 1 : -1] / 0.7
        probabilities = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
        rows.append(probabilities[torch.arange(len(completion)), completion].log())
    return rows


def test_the_second_minibatch_has_the_ratio_of_the_moved_policy(char_model):
    algorithm, keeper = RecordingGRPO(), KeepWeights()
    trainer = make_trainer(
        num_minibatches=2,
        rollout=STOPS | {"temperature": 0.7},
        precision="64-true",
        max_steps=2,
        max_epochs=-1,
        callbacks=[keeper],
    )
    module = make_module(char_model, algorithm=algorithm, learning_rate=1e-2)
    trainer.fit(module, datamodule=make_data())
    rows, new = algorithm.forwards[1]
    before = logprobs_by_hand(char_model, keeper.weights[0], rows)
    after = logprobs_by_hand(char_model, keeper.weights[1], rows)
    found = (new - rows.old_logprobs).exp()
    largest = 0.0
    for row in range(len(rows)):
        ratio = (after[row] - before[row]).exp()
        torch.testing.assert_close(found[row, : len(ratio)], ratio, rtol=1e-9, atol=0)
        largest = max(largest, float((ratio - 1).abs().max()))
    assert largest > 0.01

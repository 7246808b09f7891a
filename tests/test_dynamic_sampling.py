"""Dynamic sampling: which groups a scripted stream of rewards leaves, and that nothing else moves."""

from __future__ import annotations

import dataclasses
import math
import warnings

import lightning as L
import pytest
import torch
from distributed_runs import Perturb, Record, on_two_ranks, same_bits, strategy_options, weights_of
from runs import make_data, make_module, make_trainer, spread_reward

from lightning_grpo.algorithms import GRPO
from lightning_grpo.callbacks import DynamicSampling
from lightning_grpo.critic import CriticSettings
from lightning_grpo.types import Rollout, join_rollouts, select_rows

ROWS = [{"prompt": f"{i % 10}{(7 * i) % 10}=", "answer": str(i)} for i in range(48)]


def solved_sometimes(*alive: int):
    """A reward by which the siblings of these prompts differ, and those of no other."""

    def scripted(completions, answer, **columns):
        return [float(row % 2 and int(a) in alive) for row, a in enumerate(answer)]

    return scripted


class Rounds(L.Callback):
    """Keeps every rollout that was generated and every one that was scored."""

    def __init__(self):
        self.generated: list[Rollout] = []
        self.scored: list[Rollout] = []

    def on_rollout_end(self, trainer, module, rollout):
        self.generated.append(rollout)

    def on_rewards_end(self, trainer, module, rollout):
        self.scored.append(rollout)


class KeepGroups(L.Callback):
    """Leaves some groups of a rollout, as if the others had never been sampled."""

    def __init__(self, *groups: int):
        self.groups = groups

    def on_rewards_end(self, trainer, module, rollout):
        kept = torch.isin(rollout.group_ids, torch.tensor(self.groups))
        return select_rows(rollout, kept.nonzero().flatten())


def run(char_model, reward, max_refills, *, num_prompts=4, iterations=1, algorithm=None, **options):
    """Some iterations; returns the module, what was recorded, and every round."""
    record, rounds = Record(), Rounds()
    callbacks = [Perturb(), *options.pop("callbacks", []), record, rounds]
    sampling = {"max_refills": max_refills, **options.pop("sampling", {})}
    module = make_module(char_model, algorithm=algorithm)
    data = make_data(ROWS, prompts_per_iteration=num_prompts)
    options = {"group_size": 2, "limit_train_batches": iterations} | options
    trainer = make_trainer(reward=reward, callbacks=callbacks, sampling=sampling, **options)
    trainer.fit(module, datamodule=data)
    return module, record, rounds


def answers(rollout):
    """The prompts of a rollout, one entry per group of two rows."""
    first, second = rollout.columns["answer"][::2], rollout.columns["answer"][1::2]
    assert first == second
    return [int(answer) for answer in first]


# Which groups


def test_the_first_living_groups_of_the_stream_are_kept(char_model):
    reward = solved_sometimes(1, 5, 6, 8, 9, 10)
    module, record, rounds = run(char_model, reward, max_refills=5)
    # Rounds 0-3, 4-7 and 8-11 have 1, 2 and 3 living groups; the last two are one too many.
    rollout = record.rollouts[0]
    assert answers(rollout) == [1, 5, 6, 8]
    assert rollout.group_ids.tolist() == [1, 1, 5, 5, 6, 6, 8, 8]
    assert rollout.rewards.tolist() == [0, 1] * 4
    assert torch.equal(rollout.action_mask, rollout.completion_mask)
    assert [answers(part) for part in rounds.generated] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]
    assert len(rounds.scored) == 3
    assert record.logged[0]["sampling/refills"] == 2
    assert record.logged[0]["sampling/dropped_frac"] == 6 / 12
    # Everything generated counts, and the reward that is shown is the one before any selection.
    assert module.counters.completions == 24
    num_tokens = sum(int(part.completion_mask.sum()) for part in rounds.generated)
    assert module.counters.tokens == num_tokens
    assert record.logged[0]["reward/mean"] == 1 / 8
    assert record.logged[0]["group/zero_std_frac"] == 3 / 4


def test_the_rows_that_are_kept_are_those_that_were_sampled(char_model):
    _, record, rounds = run(char_model, solved_sometimes(1, 5, 6, 8), max_refills=5)
    kept = record.rollouts[0]
    sampled = join_rollouts(rounds.scored, pad_token_id=0)
    for row, (group, text) in enumerate(zip(kept.group_ids.tolist(), kept.completions)):
        twin = 2 * group + row % 2
        assert sampled.completions[twin] == text
        for name in ("completion_ids", "sampler_logprobs"):
            own = getattr(kept, name)[row][kept.completion_mask[row]]
            assert torch.equal(own, getattr(sampled, name)[twin][sampled.completion_mask[twin]])
        prompt = kept.prompt_ids[row][kept.prompt_mask[row]]
        assert torch.equal(prompt, sampled.prompt_ids[twin][sampled.prompt_mask[twin]])


def test_without_dead_groups_nothing_is_refilled(char_model):
    module, record, _ = run(char_model, solved_sometimes(*range(48)), 5, iterations=2)
    assert [answers(rollout) for rollout in record.rollouts] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [logged["sampling/refills"] for logged in record.logged] == [0, 0]
    assert [logged["sampling/dropped_frac"] for logged in record.logged] == [0, 0]
    assert module.counters.completions == 16


def test_the_next_iteration_goes_on_in_the_stream_after_the_refills(char_model):
    reward = solved_sometimes(0, 1, 2, 5, *range(8, 12))
    _, record, _ = run(char_model, reward, max_refills=1, iterations=2)
    assert [answers(rollout) for rollout in record.rollouts] == [[0, 1, 2, 5], [8, 9, 10, 11]]


def test_off_is_as_if_it_was_not_there(char_model):
    module, record, _ = run(char_model, solved_sometimes(1), max_refills=0)
    assert answers(record.rollouts[0]) == [0, 1, 2, 3]
    assert torch.equal(record.rollouts[0].action_mask, record.rollouts[0].completion_mask)
    assert not [name for name in record.logged[0] if name.startswith("sampling/")]
    assert module.counters.completions == 8


def test_it_rests_while_there_is_a_critic_to_learn_from_the_prompts_as_they_come(char_model):
    rounds, record = Rounds(), Record()
    trainer = make_trainer(
        reward=solved_sometimes(1),
        sampling={"max_refills": 3},
        switch={"algorithm": "grpo", "num_iterations": 1, "handover_ratio": None},
        callbacks=[rounds, record],
        group_size=2,
        max_epochs=-1,
        max_steps=4,
    )
    module = make_module(char_model, critic=CriticSettings())
    trainer.fit(module, datamodule=make_data(ROWS, prompts_per_iteration=4))
    stages = [rollout.values is not None for rollout in record.rollouts]
    assert stages == [False, True, True, True]  # GRPO, twice the handover, PPO
    # One rollout and three refills without a critic, one rollout each with one.
    assert len(rounds.generated) == 4 + 3


def test_each_rollout_is_selected_from_once_and_not_for_every_minibatch(char_model):
    reward = solved_sometimes(*range(0, 48, 2))
    module, record, rounds = run(
        char_model, reward, 1, iterations=8, num_epochs=2, num_minibatches=2
    )
    assert len(rounds.generated) == 4 and module.counters.iterations == 2
    assert [answers(rollout) for rollout in record.rollouts] == [[0, 2, 4, 6], [8, 10, 12, 14]]


def test_refills_of_the_same_prompts_draw_anew(char_model):
    rows = [{"prompt": "12=", "answer": "0"} for _ in range(8)]
    rounds = Rounds()
    trainer = make_trainer(
        reward=solved_sometimes(),
        group_size=2,
        sampling={"max_refills": 1},
        callbacks=[rounds],
        limit_train_batches=1,
    )
    trainer.fit(make_module(char_model), datamodule=make_data(rows, prompts_per_iteration=4))
    first, second = rounds.generated
    assert first.group_ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert second.group_ids.tolist() == [4, 4, 5, 5, 6, 6, 7, 7]
    assert len(set(first.completions + second.completions)) == 16


# The cap


def test_at_the_cap_dead_groups_stand_in_outside_of_the_loss(char_model):
    module, record, _ = run(char_model, solved_sometimes(2, 5), 1, iterations=2, num_minibatches=2)
    rollout = record.rollouts[0]
    assert answers(rollout) == [2, 5, 0, 1]
    assert rollout.action_mask.any(dim=1).tolist() == [True] * 4 + [False] * 4
    assert torch.equal(rollout.action_mask[:4], rollout.completion_mask[:4])
    assert bool(rollout.completion_mask.any(dim=1).all())
    assert module.counters.completions == 16
    assert len(record.minibatches) == 2
    assert sum(m.denominator for m in record.minibatches if m.rollout.action_mask.any()) == 4


def test_with_dead_groups_only_it_ends_at_the_cap_and_warns_once(char_model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module, record, rounds = run(char_model, solved_sometimes(), max_refills=2, iterations=4)
    assert len(rounds.generated) == 4 * 3 and module.counters.completions == 4 * 3 * 8
    for rollout in record.rollouts:
        assert len(rollout) == 8 and not rollout.action_mask.any()
    assert [logged["sampling/dropped_frac"] for logged in record.logged] == [1.0] * 4
    assert all(float(gradient.abs().max()) == 0 for gradient in record.gradients)
    messages = [str(w.message) for w in caught if "dynamic_sampling" in str(w.message)]
    assert len(messages) == 1 and "3 iterations in a row stayed short" in messages[0]


def test_falling_short_now_and_then_is_no_reason_to_warn(char_model):
    reward = solved_sometimes(*range(16, 20), *range(36, 40))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Iterations take 8, 8, 4, 8, 8, 4 prompts; the third and the sixth have all groups.
        _, record, _ = run(char_model, reward, max_refills=1, iterations=6)
    assert [logged["sampling/refills"] for logged in record.logged] == [1, 1, 0, 1, 1, 0]
    assert not [w for w in caught if "dynamic_sampling" in str(w.message)]


@pytest.mark.parametrize("reduction", ["completion", "token", "constant"])
def test_the_gradient_is_that_of_the_living_groups_alone(char_model, reduction):
    reward, algorithm = solved_sometimes(1, 5), GRPO(reduction=reduction)
    stops = {"rollout": {"stop_strings": list("0123")}}  # completions of different lengths
    _, filled, _ = run(char_model, reward, 1, algorithm=algorithm, **stops)
    # The same groups with the same keys: prompts 0 to 7 in one round, of which 1 and 5 remain.
    _, alone, _ = run(
        char_model,
        reward,
        0,
        num_prompts=8,
        algorithm=algorithm,
        callbacks=[KeepGroups(1, 5)],
        **stops,
    )
    assert answers(filled.rollouts[0])[:2] == answers(alone.rollouts[0]) == [1, 5]
    size = float(alone.gradients[0].abs().max())
    assert size > 1e-4
    assert float((filled.gradients[0] - alone.gradients[0]).abs().max()) < 1e-5 * size
    _, unfiltered, _ = run(char_model, reward, 0, algorithm=algorithm, **stops)
    assert float((filled.gradients[0] - unfiltered.gradients[0]).abs().max()) > 1e-2 * size


# Which reward judges


def test_a_shaped_reward_keeps_no_group_alive(char_model):
    functions = [solved_sometimes(1, 4, 5, 6), spread_reward]
    _, record, _ = run(char_model, functions, max_refills=1)
    assert answers(record.rollouts[0]) == [1, 4, 5, 6]
    # Their rewards are still the sum of both.
    assert (
        record.rollouts[0].rewards.tolist()
        != record.rollouts[0].function_rewards["scripted"].tolist()
    )


def test_the_function_that_judges_successes_judges_groups_unless_told_otherwise(char_model):
    functions = [spread_reward, solved_sometimes(1, 4, 5, 6)]
    success = {"reward_options": {"success_function": "scripted"}}
    _, record, _ = run(char_model, functions, 1, **success)
    assert answers(record.rollouts[0]) == [1, 4, 5, 6]
    options = {"sampling": {"function": "spread_reward"}}
    _, record, _ = run(char_model, functions, 1, **success, **options)
    assert record.logged[0]["sampling/refills"] == 0
    _, record, _ = run(char_model, functions, 1)
    assert record.logged[0]["sampling/refills"] == 0


def test_a_group_with_one_scored_row_is_dead_and_an_unscored_row_kills_no_other(char_model):
    def reward(completions, answer, **columns):
        by_prompt = {"0": [1.0, None, None], "1": [1.0, None, 0.0], "2": [None] * 3}
        return [by_prompt.get(a, [1.0, 0.0, 0.0])[row % 3] for row, a in enumerate(answer)]

    _, record, _ = run(char_model, reward, 1, group_size=3)
    assert record.rollouts[0].group_ids.tolist() == [1] * 3 + [3] * 3 + [4] * 3 + [5] * 3
    assert math.isnan(record.rollouts[0].rewards[1])


def test_bad_options_are_refused(char_model):
    with pytest.raises(ValueError, match=r"max_refills must not be negative: -1"):
        DynamicSampling(-1)
    with pytest.raises(ValueError, match=r"dynamic_sampling.function 'exact' is not .*'scripted'"):
        run(char_model, solved_sometimes(), 1, sampling={"function": "exact"})


# Resume and ranks


def test_a_resumed_run_goes_on_after_the_prompts_that_refills_took(char_model, tmp_path):
    reward = solved_sometimes(*range(1, 48, 3))
    options = {"reward": reward, "group_size": 2, "sampling": {"max_refills": 2}, "max_epochs": -1}
    path = str(tmp_path / "half")

    def fit(callbacks, max_steps, ckpt_path=None):
        trainer = make_trainer(callbacks=callbacks, max_steps=max_steps, **options)
        module = make_module(char_model)
        data = make_data(ROWS, prompts_per_iteration=4)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=False)
        return trainer, module

    whole_run, resumed = Record(), Record()
    _, straight = fit([Perturb(), whole_run], 3)
    trainer, _ = fit([Perturb()], 1)
    trainer.save_checkpoint(path)
    _, module = fit([resumed], 3, path)
    assert [answers(r) for r in resumed.rollouts] == [answers(r) for r in whole_run.rollouts[1:]]
    assert same_bits(weights_of(module), weights_of(straight))
    assert module.counters == straight.counters
    assert straight.counters.completions == 3 * 3 * 8


def fit_on_two_ranks(char_model):
    """Rank 0 gets prompts 0, 1, 4, 5, 8, 9 and only dead ones; rank 1 the others, all alive."""
    alive = [i for i in range(48) if i % 4 >= 2] + [12, 13]
    module, record, rounds = run(
        char_model, solved_sometimes(*alive), 2, iterations=2, **strategy_options("ddp")
    )
    return {
        "answers": [answers(rollout) for rollout in record.rollouts],
        "group_ids": [rollout.group_ids.tolist()[::2] for rollout in record.rollouts],
        "living": [rollout.action_mask.any(1).tolist()[::2] for rollout in record.rollouts],
        "rounds": len(rounds.generated),
        "logged": record.logged,
        "denominators": [m.denominator for m in record.minibatches],
        "gradients": record.gradients,
        "completions": module.counters.completions,
    }


def test_all_ranks_make_the_same_rounds_when_one_is_short(char_model, tmp_path):
    first, second = on_two_ranks(fit_on_two_ranks, tmp_path, char_model)
    assert isinstance(first, dict), first
    assert isinstance(second, dict), second
    assert first["rounds"] == second["rounds"] == 3 + 1
    assert first["completions"] == second["completions"] == 4 * 8
    # Iteration 1: three rounds of 0-3, 4-7 and 8-11; iteration 2: one of 12-15.
    assert first["answers"] == [[0, 1], [12, 13]]
    assert first["living"] == [[False, False], [True, True]]
    assert second["answers"] == [[2, 3], [14, 15]]
    assert second["living"] == [[True, True], [True, True]]
    assert first["group_ids"] == [[0, 1], [0, 1]] and second["group_ids"] == [[2, 3], [2, 3]]
    for logged in (first["logged"], second["logged"]):
        assert [entry["sampling/refills"] for entry in logged] == [2, 0]
        assert [entry["sampling/dropped_frac"] for entry in logged] == [0.5, 0.0]
    assert first["denominators"] == second["denominators"] == [4.0, 8.0]
    assert all(torch.equal(a, b) for a, b in zip(first["gradients"], second["gradients"]))


# Joining


def piece(
    num_rows: int, num_prompt: int, num_completion: int, first: int = 1, **changes
) -> Rollout:
    """Rows of full prompts and completions, with ids that count up from `first`."""
    ids = torch.arange(first, first + num_rows * num_completion).reshape(num_rows, num_completion)
    return Rollout(
        prompt_ids=torch.full((num_rows, num_prompt), first),
        prompt_mask=torch.ones(num_rows, num_prompt, dtype=torch.bool),
        completion_ids=ids,
        completion_mask=torch.ones_like(ids, dtype=torch.bool),
        action_mask=torch.ones_like(ids, dtype=torch.bool),
        sampler_logprobs=-ids.float(),
        group_ids=torch.full((num_rows,), first),
        truncated=torch.zeros(num_rows, dtype=torch.bool),
    ).replace(**changes)


def test_joining_pads_prompts_on_the_left_and_completions_on_the_right():
    joined = join_rollouts([piece(1, 2, 3), piece(2, 3, 1, first=7)], pad_token_id=99)
    assert joined.prompt_ids.tolist() == [[99, 1, 1], [7, 7, 7], [7, 7, 7]]
    assert joined.prompt_mask.tolist() == [[False, True, True], [True] * 3, [True] * 3]
    assert joined.completion_ids.tolist() == [[1, 2, 3], [7, 99, 99], [8, 99, 99]]
    for name in ("completion_mask", "action_mask"):
        assert getattr(joined, name).tolist() == [
            [True] * 3,
            [True, False, False],
            [True, False, False],
        ]
        assert getattr(joined, name).dtype == torch.bool
    assert joined.sampler_logprobs.tolist() == [[-1, -2, -3], [-7, 0, 0], [-8, 0, 0]]
    assert joined.group_ids.tolist() == [1, 7, 7]
    assert len(joined) == 3 and joined.rewards is None


def test_joining_undoes_selecting_and_takes_every_field_along():
    tensors = {
        item.name: torch.arange(4.0).unsqueeze(1).repeat(1, 3)
        for item in dataclasses.fields(Rollout)
        if item.default is None
    }
    tensors |= {"rewards": torch.arange(4.0), "final_values": torch.arange(4.0)}
    known = {item.name for item in dataclasses.fields(Rollout)}
    whole_rollout = piece(4, 2, 3).replace(
        prompts=list("abcd"),
        completions=list("wxyz"),
        columns={"answer": [1, 2, 3, 4]},
        function_rewards={"f": torch.arange(4.0)},
        extra_columns={"why": list("0123")},
        **{name: tensor for name, tensor in tensors.items() if name in known},
    )
    parts = [select_rows(whole_rollout, torch.tensor(rows).long()) for rows in ([0], [], [1, 2, 3])]
    joined = join_rollouts(parts, pad_token_id=0)
    for item in dataclasses.fields(Rollout):
        expected, found = getattr(whole_rollout, item.name), getattr(joined, item.name)
        if isinstance(expected, torch.Tensor):
            assert torch.equal(found, expected), item.name
        elif item.name == "function_rewards":
            assert torch.equal(found["f"], expected["f"])
        else:
            assert found == expected and expected, item.name


def test_columns_that_one_rollout_lacks_are_filled():
    first = piece(1, 1, 1, extra_columns={"why": ["a"]}, function_rewards={"f": torch.ones(1)})
    second = piece(2, 1, 1, extra_columns={"how": [1, 2]}, function_rewards={"g": torch.zeros(2)})
    joined = join_rollouts([first, second], pad_token_id=0)
    assert joined.extra_columns == {"why": ["a", None, None], "how": [None, 1, 2]}
    assert joined.function_rewards["f"].nan_to_num(-1).tolist() == [1, -1, -1]
    assert joined.function_rewards["g"].nan_to_num(-1).tolist() == [-1, 0, 0]


def test_a_tensor_that_one_rollout_lacks_is_refused():
    with pytest.raises(ValueError, match="some of the rollouts have rewards and others have not"):
        join_rollouts([piece(1, 1, 1), piece(1, 1, 1, rewards=torch.ones(1))], pad_token_id=0)

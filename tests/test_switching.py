"""The decision between GRPO and PPO, and the evidence it is made from; no run, no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from lightning_grpo.evidence import Evidence, measure_evidence
from lightning_grpo.intervals import Interval
from lightning_grpo.separability import BaselineErrors, DeadGroups, RewardVariance
from lightning_grpo.stages import Stage
from lightning_grpo.switching import SwitchOptions, SwitchState, decide, enter, restored


def evidence(
    iteration: int, stage: Stage, ratio: float | None = None, explained: float | None = 0.2
) -> Evidence:
    return Evidence(
        iteration=iteration,
        stage=stage,
        dead=DeadGroups(0, 8, 0.0, Interval(0.0, 0.3)),
        variance=RewardVariance(1.0, 0.0, 0.0, 0.0, Interval(0.0, 1.0), 4.0, 8),
        errors=BaselineErrors(1.0, ratio, ratio, None, None if ratio is None else explained, 32),
        value_explained_var=None,
    )


def run(
    options: SwitchOptions,
    num_iterations: int,
    ratio: Callable[[int], float | None] = lambda iteration: None,
    barred_from: int = 1000,
    state: SwitchState | None = None,
) -> tuple[str, SwitchState]:
    """The stages of a run, one letter each, as the callback would carry decisions out."""
    state = SwitchState() if state is None else state
    stage: Stage = options.first_stage
    stages = ""
    for iteration in range(num_iterations):
        stages += stage[0]
        decision = decide(
            options,
            state,
            evidence(iteration, stage, ratio(iteration)),
            is_critic_barred=iteration >= barred_from,
        )
        if decision.stage != stage:
            enter(state, stage, decision.stage)
            stage = decision.stage
    return stages, state


def always(answer: Any) -> Callable[[Evidence], Any]:
    return lambda evidence: answer


def says(answers: Sequence[str]) -> Callable[[Evidence], Any]:
    """A rule that asks for p(po) or g(rpo) by iteration."""
    return lambda evidence: {"p": "ppo", "g": "grpo"}[answers[evidence.iteration]]


EASY: dict[str, Any] = {"patience": 1, "min_stay_iterations": 0, "handover_ratio": None}


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        (SwitchOptions("grpo"), "gggggg"),
        (SwitchOptions("ppo"), "pppppp"),
        (SwitchOptions("ppo", num_warmup_iterations=2), "wwpppp"),
        (SwitchOptions("ppo", num_warmup_iterations=1), "wppppp"),
    ],
)
def test_a_fixed_algorithm_stays(options, stages):
    found, state = run(options, 6)
    assert found == stages
    assert state.num_switches == 0


@pytest.mark.parametrize(
    ("options", "stages", "num_switches"),
    [
        # From iteration 2 on, after the two that the handover takes at least.
        (SwitchOptions("grpo", 2, handover_ratio=None), "gghhpppp", 1),
        (SwitchOptions("grpo", 1, handover_ratio=None), "ghhppppp", 1),
        (SwitchOptions("grpo", 2, handover_ratio=None, num_warmup_iterations=3), "gghhhppp", 1),
        (SwitchOptions("ppo", 3), "pppggggg", 1),
        (SwitchOptions("ppo", 4, num_warmup_iterations=2), "wwppgggg", 1),
        (SwitchOptions("ppo", 2, num_warmup_iterations=4), "wwgggggg", 1),
        (SwitchOptions("grpo", 20), "gggggggg", 0),
    ],
)
def test_a_schedule_changes_once_and_in_either_direction(options, stages, num_switches):
    found, state = run(options, 8)
    assert found == stages
    assert state.num_switches == num_switches


def test_a_rule_switches_both_ways_as_often_as_it_asks():
    options = SwitchOptions(rule=says("pppggpppgg"), **EASY)
    found, state = run(options, 10)
    assert found == "ghhpgghhpg"
    assert state.num_switches == 4


def test_a_rule_has_to_ask_as_often_in_a_row_as_patience_says():
    options = SwitchOptions(
        rule=says("ppgpppppgpgggg"), patience=3, min_stay_iterations=0, handover_ratio=None
    )
    # Asked at 0, 1, and from 3: the third time in a row is 5. Back: at 8, and from 10 to 12.
    assert run(options, 14)[0] == "gggggghhpppppg"


def test_a_rule_cannot_leave_a_stage_before_its_minimum_stay():
    options = SwitchOptions(
        rule=says("pppppppgggggggg"), patience=1, min_stay_iterations=4, handover_ratio=None
    )
    # 4 of GRPO; the handover counts from its own beginning, and PPO from its own.
    assert run(options, 15)[0] == "gggghhppppggggg"


def test_asking_for_what_runs_already_changes_nothing():
    assert run(SwitchOptions(rule=always("grpo"), **EASY), 5)[0] == "ggggg"
    assert run(SwitchOptions("ppo", rule=always("ppo"), **EASY), 5)[0] == "ppppp"
    options = SwitchOptions("ppo", rule=always("ppo"), num_warmup_iterations=2, **EASY)
    assert run(options, 5)[0] == "wwppp"


def test_a_rule_may_end_a_handover_or_a_warmup_early():
    options = SwitchOptions(rule=says("pggggg"), **EASY)
    assert run(options, 4)[0] == "ghgg"
    options = SwitchOptions("ppo", rule=says("gggg"), num_warmup_iterations=3, **EASY)
    assert run(options, 4)[0] == "wggg"


def test_the_first_values_of_a_critic_never_hand_over():
    # Its values before it has learned anything look perfect, and count for nothing.
    options = SwitchOptions("grpo", 1, handover_ratio=1.0)
    ratio = {1: 0.1}.get
    found, _ = run(options, 6, ratio)
    assert found == "ghhhhh"
    assert run(options, 6, {1: 0.1, 2: 1.0}.get)[0] == "ghhppp"


@pytest.mark.parametrize(
    ("limit", "ratio", "is_enough"),
    [
        (1.25, 1.25, True),
        (1.25, 1.2501, False),
        (1.25, math.inf, False),
        (1.25, math.nan, False),
        (1.25, None, False),
        (0.5, 0.49, True),
        (0.5, 0.51, False),
        (None, 1e9, True),
        (None, None, True),
    ],
)
def test_ppo_takes_over_when_the_critic_is_good_enough(limit, ratio, is_enough):
    options = SwitchOptions("grpo", 1, handover_ratio=limit)
    assert run(options, 4, always(ratio))[0] == ("ghhp" if is_enough else "ghhh")


def test_a_handover_that_takes_too_long_is_given_up_for_good():
    options = SwitchOptions("grpo", 1, handover_ratio=1.0, max_handover_iterations=3)
    state = SwitchState()
    # From iteration 4 on the critic would do, but there is none any more.
    found, state = run(options, 9, lambda i: 2.0 if i < 4 else 0.1, state=state)
    assert found == "ghhhggggg"
    assert state.num_refusals == 1
    assert state.num_switches == 0
    assert run(options, 9, lambda i: 2.0 if i < 3 else 0.1)[0] == "ghhhppppp"


def test_the_reason_for_giving_up_names_the_options():
    options = SwitchOptions("grpo", 1, handover_ratio=1.1, max_handover_iterations=2)
    state = SwitchState(num_in_stage=1)
    decision = decide(options, state, evidence(5, "handover", 1.3), is_critic_barred=False)
    assert decision.stage == "grpo"
    assert "switch.handover_ratio 1.1" in decision.reason
    assert "switch.max_handover_iterations 2" in decision.reason


def test_giving_up_waits_until_values_could_have_counted():
    # The least that a handover takes is more than it may take: the criterion is asked once.
    options = SwitchOptions("grpo", 1, handover_ratio=1.0, max_handover_iterations=1)
    assert run(options, 5, always(0.5))[0] == "ghhpp"
    assert run(options, 5, always(2.0))[0] == "ghhgg"


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        (SwitchOptions("ppo"), "pppggg"),
        (SwitchOptions("ppo", num_warmup_iterations=4), "wwwggg"),
        (SwitchOptions("grpo", 1, handover_ratio=1.0), "ghhggg"),
        (SwitchOptions("grpo", 4), "gggggg"),
        (SwitchOptions(rule=always("ppo"), **EASY), "ghhggg"),
        (SwitchOptions("ppo", rule=always("ppo"), **EASY), "pppggg"),
    ],
)
def test_once_a_critic_has_failed_ppo_is_out_of_the_question(options, stages):
    assert run(options, 6, always(5.0), barred_from=2)[0] == stages


@pytest.mark.parametrize("answer", [None, True, "PPO", "handover", 1, ""])
def test_a_rule_that_returns_anything_else_is_told_so(answer):
    options = SwitchOptions(rule=always(answer), **EASY)
    with pytest.raises(ValueError, match=r"switch.rule returned .*; it has to return grpo or ppo"):
        decide(options, SwitchState(), evidence(0, "grpo"), is_critic_barred=False)


def test_the_rule_gets_the_evidence_of_the_iteration():
    seen = []
    options = SwitchOptions(rule=lambda found: seen.append(found) or "grpo")  # type: ignore[func-returns-value]
    given = evidence(3, "ppo", 0.5)
    decide(options, SwitchState(), given, is_critic_barred=False)
    assert seen == [given]


def test_options_know_which_algorithms_can_come_up():
    def uses(**options: Any) -> tuple[bool, bool]:
        return SwitchOptions(**options).may_use_grpo, SwitchOptions(**options).may_use_ppo

    assert uses(algorithm="grpo") == (True, False)
    assert uses(algorithm="ppo") == (False, True)
    assert uses(algorithm="grpo", num_iterations=3) == (True, True)
    assert uses(algorithm="ppo", num_iterations=3) == (True, True)
    assert uses(algorithm="ppo", rule=always("ppo")) == (True, True)


def test_a_decision_continues_from_a_saved_state():
    options = SwitchOptions(rule=always("ppo"), patience=3, min_stay_iterations=2)
    state = SwitchState()
    for iteration in range(2):
        assert decide(
            options, state, evidence(iteration, "grpo"), is_critic_barred=False
        ).stage == ("grpo")
    saved = state.state_dict()
    assert saved == {"num_in_stage": 2, "num_asked": 2, "num_switches": 0, "num_refusals": 0}
    again = restored(saved)
    assert decide(options, again, evidence(2, "grpo"), is_critic_barred=False).stage == "handover"
    assert again == SwitchState(num_in_stage=3, num_asked=3)


REWARDS = torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1])
GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


def measured(**changes: Any) -> Evidence:
    options: dict[str, Any] = {
        "iteration": 3,
        "stage": "ppo",
        "rewards": REWARDS,
        "group_ids": GROUPS,
        "baseline_rewards": REWARDS,
        "baseline_group_ids": GROUPS,
        "prompt_values": torch.tensor([0.5] * 4 + [1.0] * 4),
        "value_explained_var": 0.25,
    }
    return measure_evidence(**(options | changes))


def test_the_evidence_of_two_groups_by_hand():
    found = measured()
    # Group means 1/2 and 1. Squares within: 1, over 8 - 2 degrees of freedom. Between the means:
    # (4 * 2 * (1/4)^2 - 1/6) / 4. A sibling's residual is 4/3 of that from the mean, so that
    # (2/3)^2 * 4 / 8. The critic: (1/2)^2 * 4 / 8. Variance of all rewards: 3/16.
    expected = {
        "evidence/zero_std_frac": 1 / 2,
        "evidence/zero_std_frac_low": 1 - math.sqrt(0.95),
        "evidence/zero_std_frac_high": math.sqrt(0.95),
        "evidence/within_var": 1 / 6,
        "evidence/between_var": 1 / 12,
        "evidence/icc": 1 / 3,
        "evidence/siblings_mse": 2 / 9,
        "evidence/critic_mse": 1 / 8,
        "evidence/mse_ratio": 9 / 16,
        "evidence/critic_explained_var": 1 / 3,
        "evidence/break_even_explained_var": 1 / 9,
    }
    assert found.numbers() == pytest.approx(expected)
    assert found.largest_gain == pytest.approx(4 / 3)
    assert found.break_even_explained_var == pytest.approx(1 / 9)


def test_what_was_not_measured_is_left_out():
    without = measured(prompt_values=None, value_explained_var=None)
    assert not {name for name in without.numbers() if "critic" in name or "ratio" in name}
    assert "critic" not in str(without)
    alone = measured(
        rewards=torch.tensor([1.0, 0.0]),
        group_ids=torch.tensor([0, 1]),
        baseline_rewards=torch.tensor([1.0, 0.0]),
        baseline_group_ids=torch.tensor([0, 1]),
        prompt_values=torch.tensor([0.5, 0.5]),
    )
    # One completion per prompt: no siblings, and nothing to be said of them.
    assert math.isnan(alone.largest_gain)
    assert math.isnan(alone.break_even_explained_var)
    assert "evidence/siblings_mse" not in alone.numbers()
    assert all(math.isfinite(value) for value in alone.numbers().values())
    assert "0 of 0 groups" in str(alone)


def test_groups_are_counted_before_some_are_dropped_and_errors_after():
    found = measured(
        rewards=torch.cat([REWARDS, torch.zeros(4)]),
        group_ids=torch.cat([GROUPS, torch.full((4,), 2)]),
    )
    assert (found.dead.num_dead, found.dead.num_groups) == (2, 3)
    assert found.errors.num_rows == 8
    assert found.errors.siblings == pytest.approx(2 / 9)


def test_the_evidence_in_words():
    assert str(measured()) == (
        "1 of 2 groups without spread (in 3% to 97% of the prompts); variance of the reward 0.167 "
        "within prompts and 0.0833 between them; squared error of the critic at the prompt 0.56 "
        "times that of the siblings' mean (0.00 to inf); explained variance of the returns 0.25"
    )


def test_a_critic_that_says_the_same_everywhere_does_not_take_over():
    """With a success rate of 0.15, one that says 0 has a ratio of 1.03 at 8 completions."""
    state = SwitchState(num_in_stage=5)
    options = SwitchOptions("grpo", num_iterations=1)
    for explained, stage in ((-0.18, "handover"), (0.0, "handover"), (0.01, "ppo")):
        found = evidence(9, "handover", 1.03, explained)
        assert decide(options, state, found, is_critic_barred=False).stage == stage

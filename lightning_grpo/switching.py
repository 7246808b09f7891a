"""Deciding between iterations which algorithm comes next, from evidence, options and what was.

The decision is pure: it changes nothing but its own counters. `lifecycle.enter_stage` carries it
out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from lightning_grpo.evidence import Evidence
from lightning_grpo.stages import AlgorithmName, Stage, is_ppo

# A rule gets the evidence of the iteration that has just ended and says what should run.
SwitchRule = Callable[[Evidence], AlgorithmName]


@dataclass
class SwitchState:
    """What a decision remembers; saved with every checkpoint."""

    num_in_stage: int = 0
    """Iterations since the stage began."""
    num_asked: int = 0
    """Iterations in a row in which the rule has asked for the other algorithm."""
    num_switches: int = 0
    """Changes of the algorithm that moves the policy."""
    num_refusals: int = 0
    """Handovers that were given up because the critic did not get good enough."""

    def state_dict(self) -> dict[str, int]:
        """As plain values."""
        return asdict(self)


@dataclass(frozen=True)
class SwitchOptions:
    """How decisions are made; see `AlgorithmSwitch` for what each means."""

    algorithm: AlgorithmName = "grpo"
    num_iterations: int | None = None
    rule: SwitchRule | None = None
    patience: int = 3
    min_stay_iterations: int = 10
    handover_ratio: float | None = 1.25
    max_handover_iterations: int = 100
    num_warmup_iterations: int = 0

    @property
    def may_use_ppo(self) -> bool:
        """Whether PPO can come up at all."""
        return self.algorithm == "ppo" or self.may_switch

    @property
    def may_use_grpo(self) -> bool:
        """Whether GRPO can come up without a critic having failed."""
        return self.algorithm == "grpo" or self.may_switch

    @property
    def may_switch(self) -> bool:
        """Whether the algorithm can change."""
        return self.rule is not None or self.num_iterations is not None

    @property
    def first_stage(self) -> Stage:
        """What a new run begins with."""
        if self.algorithm == "grpo":
            return "grpo"
        return "warmup" if self.num_warmup_iterations else "ppo"


@dataclass(frozen=True)
class Decision:
    """What comes next, and why."""

    stage: Stage
    reason: str


def decide(
    options: SwitchOptions, state: SwitchState, evidence: Evidence, *, is_critic_barred: bool
) -> Decision:
    """Choose the stage of the next iteration.

    Args:
        options: of the switch.
        state: changed in place, except for what a change of stage resets: see `enter`.
        evidence: of the iteration that has just ended.
        is_critic_barred: whether a critic has failed, so that PPO is out of the question.

    Returns:
        The next stage, which may be the present one.

    Raises:
        ValueError: the rule returned something else than grpo or ppo.
    """
    stage = evidence.stage
    state.num_in_stage += 1
    wanted, reason = wanted_algorithm(options, state, evidence)
    if is_critic_barred:
        wanted, reason = "grpo", "a critic has failed before"
    elif state.num_refusals:
        wanted, reason = "grpo", "a critic did not get good enough before"
    if wanted == "grpo":
        return Decision("grpo", reason)
    if stage == "grpo":
        return Decision("handover", reason)
    if stage == "warmup":
        is_over = state.num_in_stage >= options.num_warmup_iterations
        return Decision("ppo" if is_over else "warmup", "the critic has warmed up")
    if stage == "handover":
        return _after_handover(options, state, evidence)
    return Decision("ppo", reason)


def enter(state: SwitchState, before: Stage, after: Stage) -> None:
    """Begin another stage.

    Args:
        state: changed in place.
        before: the stage that ends.
        after: the stage that begins.
    """
    state.num_in_stage = 0
    state.num_asked = 0
    state.num_switches += is_ppo(before) != is_ppo(after)


def wanted_algorithm(
    options: SwitchOptions, state: SwitchState, evidence: Evidence
) -> tuple[AlgorithmName, str]:
    """What options or rule want next, once the rule has asked for it often enough.

    Args:
        options: of the switch.
        state: counts how often the rule has asked.
        evidence: of the iteration that has just ended.

    Returns:
        The algorithm, and the reason in words.
    """
    present: AlgorithmName = "grpo" if evidence.stage == "grpo" else "ppo"
    if options.rule is not None:
        asked = options.rule(evidence)
        if asked not in ("grpo", "ppo"):
            raise ValueError(f"switch.rule returned {asked!r}; it has to return grpo or ppo")
        state.num_asked = state.num_asked + 1 if asked != present else 0
        is_asked = state.num_asked >= options.patience
        if is_asked and state.num_in_stage >= options.min_stay_iterations:
            return asked, f"switch.rule has asked for it {state.num_asked} times in a row"
        return present, "nothing has asked for another"
    if options.num_iterations is None:
        return options.algorithm, "switch.algorithm"
    is_first_part = evidence.iteration + 1 < options.num_iterations
    other: AlgorithmName = "ppo" if options.algorithm == "grpo" else "grpo"
    reason = f"switch.num_iterations {options.num_iterations}"
    return (options.algorithm if is_first_part else other), reason


def _after_handover(options: SwitchOptions, state: SwitchState, evidence: Evidence) -> Decision:
    # The values of the first iteration are those of a critic that has not learned anything.
    num_needed = max(options.num_warmup_iterations, 2)
    has_learned = state.num_in_stage >= num_needed
    ratio = evidence.errors.ratio
    # One that says the same everywhere may pass by the ratio, when successes are rare.
    explained = max(evidence.errors.explained_var or 0.0, evidence.value_explained_var or 0.0)
    is_good = options.handover_ratio is None or (
        ratio is not None and ratio <= options.handover_ratio and explained > 0
    )
    if has_learned and is_good:
        return Decision("ppo", "the critic is good enough")
    if state.num_in_stage >= max(options.max_handover_iterations, num_needed):
        state.num_refusals += 1
        reason = (
            f"the critic did not get good enough in {state.num_in_stage} iterations "
            f"(switch.handover_ratio {options.handover_ratio}, "
            f"switch.max_handover_iterations {options.max_handover_iterations})"
        )
        return Decision("grpo", reason)
    return Decision("handover", "the critic learns")


def restored(state_dict: dict[str, Any]) -> SwitchState:
    """The state that `SwitchState.state_dict` gave."""
    return SwitchState(**state_dict)

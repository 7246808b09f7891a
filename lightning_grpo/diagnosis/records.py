"""What a diagnosis has found, as plain records: text, JSON and the page are made from these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_grpo.dead_groups import DeadAgain, DeadBounds, DeadShare
from lightning_grpo.intervals import Interval
from lightning_grpo.reward_quality import Ranking, RescoringNoise
from lightning_grpo.separability import RewardVariance

Verdict = Literal["change", "keep", "undecided", "note"]


@dataclass(frozen=True)
class Estimate:
    """A mean or a share over rows, whose chance is that of the prompts."""

    value: float
    """NaN without rows."""
    interval: Interval
    """Of the value."""
    num_rows: int
    """Rows that it is over."""


@dataclass(frozen=True)
class Histogram:
    """How often values occur: in ranges, or each by itself where there are few."""

    lows: list[float]
    """The lower end of each range; the value itself where low and high are the same."""
    highs: list[float]
    """The upper end, which belongs to the next range but for the last."""
    counts: list[int]
    """Values in each range."""


@dataclass(frozen=True)
class Rewards:
    """The rewards of all rows."""

    mean: Estimate
    smallest: float
    largest: float
    is_binary: bool
    """Two values at most: a prompt then has a pass rate, that of the larger one."""
    histogram: Histogram


@dataclass(frozen=True)
class Prompts:
    """Each of the N prompts by itself, in the order of the file."""

    names: list[str]
    num_rows: list[int]
    mean_rewards: list[float]
    has_spread: list[bool]
    """False where all rewards are equal; a single completion has none either."""
    histogram: Histogram
    """Of the mean rewards."""


@dataclass(frozen=True)
class Groups:
    """What only siblings can show; prompts with a single completion are left out."""

    num_prompts: int
    """With two completions or more."""
    group_size: int
    """The largest that at least half of these prompts have."""
    planned_size: int
    """The group size of the training that is thought of."""
    dead: list[DeadShare]
    """At sizes of 2 up to `group_size`."""
    beyond: list[DeadBounds]
    """At larger sizes, which these scores only bound."""
    easy: DeadAgain | None
    """Prompts whose completions all have the best reward; None below groups of 3, as the next."""
    hard: DeadAgain | None
    """Prompts whose completions all have one other reward."""
    variance: RewardVariance
    largest_gain: float
    """Factor by which a perfect critic of the prompt would lower the variance, at this size."""
    alike: Estimate | None
    """Share of pairs of siblings with the same text, in groups without spread below the best
    reward; None without texts."""


@dataclass(frozen=True)
class Lengths:
    """How long completions are."""

    unit: Literal["tokens", "characters"]
    mean: Estimate
    median: float
    longest: float
    histogram: Histogram


@dataclass(frozen=True)
class Truncation:
    """Completions that were cut."""

    share: Estimate
    reward_of_cut: Estimate
    reward_of_whole: Estimate


@dataclass(frozen=True)
class Parsing:
    """Completions in which no answer was found."""

    failures: Estimate


@dataclass(frozen=True)
class Sample:
    """One completion to look at."""

    text: str
    reward: float
    num_tokens: float | None
    is_truncated: bool


@dataclass(frozen=True)
class PromptSample:
    """A prompt to look at, with a few of its completions."""

    name: str
    prompt: str
    mean_reward: float
    num_rows: int
    samples: list[Sample]


@dataclass(frozen=True)
class Advice:
    """One thing to do or to leave, with the number that says so."""

    topic: str
    verdict: Verdict
    """change: do something; keep: it is well; undecided: the scores do not say; note: a fact."""
    text: str
    value: float | None = None
    interval: Interval | None = None
    prompts: tuple[str, ...] = ()
    """Names of the prompts that it is about."""


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found. What could not be measured is None."""

    source: str
    """What was read."""
    columns: dict[str, str]
    """What was read -> the column that held it."""
    level: float
    """Of all intervals."""
    num_completions: int
    num_prompts: int
    num_single: int
    """Prompts with one completion."""
    rewards: Rewards
    prompts: Prompts
    groups: Groups | None
    noise: RescoringNoise | None
    ranking: Ranking | None
    lengths: Lengths | None
    truncation: Truncation | None
    parsing: Parsing | None
    worst: list[PromptSample]
    best: list[PromptSample]
    advice: list[Advice]

"""A diagnosis as text for a terminal, to be read in a minute."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from lightning_grpo.diagnosis.advice import no_statement
from lightning_grpo.diagnosis.records import Advice, Diagnosis, Truncation
from lightning_grpo.diagnosis.wording import (
    counted,
    one_line,
    percent,
    percent_range,
    short,
    short_range,
)

_ORDER = ("change", "undecided", "keep", "note")
_NUM_NAMES = 5


def summary(found: Diagnosis, width: int = 100) -> str:
    """What was found and what to do, as lines of text.

    Args:
        found: the diagnosis.
        width: of the terminal, characters.

    Returns:
        The text, without a line break at its end.
    """
    facts = list(facts_of(found))
    margin = max(len(name) for name, _ in facts) + 2
    lines = [_entry(name, text, margin, width) for name, text in facts]
    lines += ["", f"advice (ranges are {percent(found.level)} intervals)"]
    statement = no_statement(found)
    if statement is not None:
        lines.append(textwrap.fill(statement, width))
    advice = sorted_advice(found)
    margin = max((len(_title(each)) for each in advice), default=0) + 2
    for each in advice:
        lines.append(_entry(_title(each), each.text, margin, width))
        if each.prompts:
            lines.append(_entry("", names_of(each), margin, width))
    return "\n".join(lines)


def sorted_advice(found: Diagnosis) -> list[Advice]:
    """What to change first, mere facts last."""
    return sorted(found.advice, key=lambda each: _ORDER.index(each.verdict))


def names_of(advice: Advice) -> str:
    """The first of the prompts that a piece of advice is about."""
    shown = ", ".join(one_line(name, 40) for name in advice.prompts[:_NUM_NAMES])
    others = len(advice.prompts) - _NUM_NAMES
    return f"{shown} and {others:,} more" if others > 0 else shown


def facts_of(found: Diagnosis) -> Iterator[tuple[str, str]]:
    """What was found, without judgement: a name and a line each.

    Args:
        found: the diagnosis.

    Yields:
        Pairs.
    """
    rewards, groups = found.rewards, found.groups
    single = f", {found.num_single:,} with a single one" if found.num_single else ""
    yield (
        "completions",
        f"{found.num_completions:,} of {counted(found.num_prompts, 'prompt')}{single}",
    )
    yield (
        "reward",
        f"mean {short(rewards.mean.value)} ({short_range(rewards.mean.interval)}), from "
        f"{short(rewards.smallest)} to {short(rewards.largest)}",
    )
    if groups is not None:
        dead = groups.dead[-1]
        yield (
            f"groups of {dead.group_size}",
            f"{percent(dead.share)} ({percent_range(dead.interval)}) have no spread and teach "
            "nothing",
        )
        powers = [d for d in groups.dead[:-1] if d.group_size & (d.group_size - 1) == 0]
        others = [f"{percent(d.share)} of {d.group_size}" for d in powers]
        others += [
            f"{percent_range(b.interval)} of {b.group_size} (extrapolated)"
            for b in groups.beyond[:1]
        ]
        yield "other sizes", ", ".join(others)
        yield (
            "between prompts",
            f"{percent(groups.variance.icc)} ({percent_range(groups.variance.interval)}) of the "
            "variance of the reward",
        )
    if found.lengths is not None:
        lengths = found.lengths
        yield (
            "length",
            f"median {short(lengths.median)} {lengths.unit}, longest {short(lengths.longest)}",
        )
    if found.truncation is not None:
        cut = found.truncation
        yield (
            "cut",
            f"{percent(cut.share.value)} ({percent_range(cut.share.interval)}){rewards_of(cut)}",
        )
    if found.parsing is not None:
        failures = found.parsing.failures
        yield (
            "no answer",
            f"{percent(failures.value)} ({percent_range(failures.interval)})",
        )


def rewards_of(cut: Truncation) -> str:
    """The mean rewards of completions that were cut and of the others, where there are both."""
    if not cut.reward_of_cut.num_rows or not cut.reward_of_whole.num_rows:
        return ""
    rewards = short(cut.reward_of_cut.value), short(cut.reward_of_whole.value)
    return f", with mean reward {rewards[0]}, the others {rewards[1]}"


def _title(advice: Advice) -> str:
    return f"{advice.verdict:<9} {advice.topic}"


def _entry(name: str, text: str, margin: int, width: int) -> str:
    """A name, and a text in a column of its own."""
    # No line ends between a number and its sign.
    filled = textwrap.fill(
        text.replace(" %", "\u00a0%"),
        width=max(width, margin + 30),
        initial_indent=name.ljust(margin),
        subsequent_indent=" " * margin,
        break_long_words=False,
    )
    return filled.replace("\u00a0", " ")

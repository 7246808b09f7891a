"""What to do, where the numbers say so, and that they do not, where they do not.

A piece of advice rests on one interval against one line. Where the interval holds the line, nothing
is advised: too few prompts for it, or close to the line, where it matters little.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from lightning_grpo.diagnosis.records import Advice, Diagnosis, Estimate, Groups
from lightning_grpo.diagnosis.wording import (
    counted,
    percent,
    percent_range,
    short,
)
from lightning_grpo.intervals import Interval
from lightning_grpo.separability import break_even_explained_var

# More groups without spread than with it: most of what is sampled teaches nothing.
_HALF = 0.5
# Of completions that are cut or not understood: above it a run's metrics count as unhealthy too.
_MANY = 0.1
# An interval of a share that is wider says next to nothing.
_TOO_WIDE = 0.4
# Fewer prompts have no interval.
_FEWEST_PROMPTS = 3


def advice_of(found: Diagnosis) -> list[Advice]:
    """All advice that a diagnosis allows.

    Args:
        found: everything else of the diagnosis.

    Returns:
        What there is to say, in the order of what it costs to leave it.
    """
    return [*_on_groups(found), *_on_rewards(found), *_on_completions(found)]


def no_statement(found: Diagnosis) -> str | None:
    """That the scores allow no statement about groups, where that is so, and why.

    Args:
        found: everything else of the diagnosis.

    Returns:
        A sentence or two, or None.
    """
    groups = found.groups
    if groups is None:
        return (
            "Every prompt has one completion: nothing can be said about groups, what they teach, "
            "or their size. Score several completions of each prompt."
        )
    if found.rewards.smallest == found.rewards.largest:
        return (
            f"All completions have the same reward, {short(found.rewards.largest)}: nothing can be "
            "learned from it, whatever the groups are."
        )
    dead = groups.dead[-1].interval
    if groups.num_prompts < _FEWEST_PROMPTS or dead.high - dead.low > _TOO_WIDE:
        return (
            "Too few prompts for any statement about groups: of "
            f"{counted(groups.num_prompts, 'prompt')} with several completions, "
            f"{percent_range(dead)} may have no spread. Score a few dozen prompts."
        )
    return None


def side_of(interval: Interval, line: float) -> Literal["above", "below", "unclear"]:
    """Where an interval lies for sure."""
    return "above" if interval.low > line else "below" if interval.high < line else "unclear"


def _unclear(interval: Interval, line: float, what: str) -> str:
    if interval.high - interval.low > _TOO_WIDE:
        return f"too few prompts to say: {what} may be {percent_range(interval)}"
    return f"near the line of {percent(line)}: {what} is {percent_range(interval)}"


def _on_groups(found: Diagnosis) -> Iterator[Advice]:
    groups = found.groups
    if groups is None or no_statement(found) is not None:
        return
    yield _group_size(groups)
    yield from _prompts(found, groups)
    yield _temperature(groups)
    yield _critic(groups)


def _group_size(groups: Groups) -> Advice:
    size = groups.planned_size
    measured = {dead.group_size: dead for dead in groups.dead}
    beyond = {bounds.group_size: bounds for bounds in groups.beyond}
    if size in measured:
        share, interval = measured[size].share, measured[size].interval
        said = f"{percent(share)} ({percent_range(interval)}) of groups of {size} have no spread"
    else:
        share, interval = None, beyond[size].interval
        said = f"{percent_range(interval)} of groups of {size} have no spread (extrapolated)"
    side = side_of(interval, _HALF)
    verdict: Literal["change", "keep", "undecided"] = "undecided"
    if side == "below":
        verdict = "keep"
        text = f"keep {size}: {said}"
        smaller = [dead for dead in groups.dead if dead.group_size < size]
        enough = [d for d in smaller if side_of(d.interval, _HALF) == "below"]
        if enough:
            text += (
                f". From {enough[0].group_size} on it is less than half: fewer completions of more "
                f"prompts are possible, at {percent(enough[0].share)} without spread"
            )
    elif side == "above":
        verdict = "change"
        larger = [b for b in groups.beyond if b.group_size > size]
        helpful = [b for b in larger if b.interval.low < _HALF]
        if helpful and helpful[0].group_size > 2 * size:
            text = (
                f"{said}, and could fall below half only from {helpful[0].group_size} on "
                f"({percent_range(helpful[0].interval)} there, extrapolated). Change the prompts"
            )
        elif helpful:
            text = (
                f"{said}. Try {helpful[0].group_size}: {percent_range(helpful[0].interval)} "
                "would have none (extrapolated), or change the prompts"
            )
        else:
            last = larger[-1]
            text = (
                f"{said}, and a larger group does not help: of {last.group_size} at least "
                f"{percent(last.interval.low)} would have none (extrapolated). Change the prompts"
            )
    else:
        text = _unclear(interval, _HALF, f"the share of groups of {size} without spread")
    return Advice("group size", verdict, text, share, interval)


def _prompts(found: Diagnosis, groups: Groups) -> Iterator[Advice]:
    easy, hard = _flat_prompts(found, groups.group_size)
    best = f"got the best reward, {short(found.rewards.largest)}, in all"
    for topic, again, what, names in (
        ("prompts too easy", groups.easy, best, easy),
        ("prompts too hard", groups.hard, "got one reward, not the best, in all", hard),
    ):
        if again is None or not names:
            continue
        size, least = groups.group_size, Interval(again.least, 1.0)
        said = (
            f"{counted(len(names), 'prompt')} {what} {size} completions; of such, at least "
            f"{percent(again.least)} would in {size} more"
        )
        if again.least > _HALF:
            yield Advice(topic, "change", f"drop them: {said}", None, least, tuple(names))
        else:
            text = f"{said}, which is not enough to drop them"
            yield Advice(topic, "undecided", text, None, least, tuple(names))


def _flat_prompts(found: Diagnosis, group_size: int) -> tuple[list[str], list[str]]:
    """Prompts without spread in so many completions or more: at the best reward, and below it."""
    rewards, prompts = found.rewards, found.prompts
    best = rewards.largest - 1e-6 * max(abs(rewards.largest), abs(rewards.smallest))
    flat = [
        (name, mean)
        for name, num, mean, spreads in zip(
            prompts.names, prompts.num_rows, prompts.mean_rewards, prompts.has_spread
        )
        if num >= group_size and not spreads
    ]
    return [name for name, mean in flat if mean >= best], [n for n, mean in flat if mean < best]


def _temperature(groups: Groups) -> Advice:
    alike = groups.alike
    topic = "temperature"
    if alike is None:
        text = "not known without the texts of the completions (column completion)"
        return Advice(topic, "undecided", text)
    if not alike.num_rows:
        return Advice(topic, "keep", "keep it: no group is stuck at one reward below the best")
    said = (
        f"{percent(alike.value)} ({percent_range(alike.interval)}) of the pairs of siblings that "
        "are stuck below the best reward have the same text"
    )
    side = side_of(alike.interval, _HALF)
    if side == "above":
        text = f"raise it: {said}"
        return Advice(topic, "change", text, alike.value, alike.interval)
    if side == "below":
        text = f"keep it: {said}, so that sampling is not what keeps them there"
        return Advice(topic, "keep", text, alike.value, alike.interval)
    what = "the share of stuck siblings with the same text"
    return Advice(
        topic, "undecided", _unclear(alike.interval, _HALF, what), alike.value, alike.interval
    )


def _critic(groups: Groups) -> Advice:
    gain, size, icc = groups.largest_gain, groups.planned_size, groups.variance.interval
    text = (
        f"as a baseline of the prompt it lowers the variance by a factor {gain:.2f} at most "
        f"(G / (G - 1) at {size})"
    )
    if icc.high - icc.low < 1:
        needed = Interval(*(max(0.0, break_even_explained_var(end, size)) for end in icc))
        text += (
            f", and only if it explains more than {percent_range(needed)} of the variance of the "
            "reward"
        )
    text += ". What credit per token (lambda below 1) would gain, scores do not show"
    return Advice("critic", "note", text, gain, None)


def _on_rewards(found: Diagnosis) -> Iterator[Advice]:
    noise, ranking = found.noise, found.ranking
    if noise is not None and noise.num_rows:
        said = (
            f"{percent(noise.share)} ({percent_range(noise.interval)}) of the variance between "
            "siblings is noise of the scoring"
        )
        side = side_of(noise.interval, _HALF)
        text = {
            "above": f"average several scores of each completion: {said}",
            "below": f"one score is enough: {said}",
            "unclear": _unclear(noise.interval, _HALF, "the noise's part of the variance"),
        }[side]
        verdict: Literal["change", "keep", "undecided"]
        verdict = "change" if side == "above" else "keep" if side == "below" else "undecided"
        yield Advice("noise of the reward", verdict, text, noise.share, noise.interval)
    if ranking is not None and ranking.num_pairs:
        said = (
            f"{percent(ranking.share_right)} ({percent_range(ranking.interval)}) of "
            f"{counted(ranking.num_pairs, 'pair')} of siblings are ranked as by gold"
        )
        side = side_of(ranking.interval, _HALF)
        text = {
            "above": f"it ranks better than a coin: {said}",
            "below": f"it ranks the wrong way: {said}",
            "unclear": f"no better than a coin, as far as one can tell: {said}",
        }[side]
        verdict = "keep" if side == "above" else "change" if side == "below" else "undecided"
        yield Advice("ranking of siblings", verdict, text, ranking.share_right, ranking.interval)


def _on_completions(found: Diagnosis) -> Iterator[Advice]:
    if found.truncation is not None:
        remedy = "raise the longest completion, or reward shorter ones"
        yield _on_share("length", found.truncation.share, "are cut", remedy)
    if found.parsing is not None:
        remedy = "say the format in the prompt, reward it, or look at the parser"
        yield _on_share("answers", found.parsing.failures, "have no answer that is found", remedy)


def _on_share(topic: str, share: Estimate, what: str, remedy: str) -> Advice:
    said = f"{percent(share.value)} ({percent_range(share.interval)}) of the completions {what}"
    side = side_of(share.interval, _MANY)
    if side == "above":
        return Advice(topic, "change", f"{remedy}: {said}", share.value, share.interval)
    if side == "below":
        return Advice(topic, "keep", f"fine: {said}", share.value, share.interval)
    text = _unclear(share.interval, _MANY, f"the share of completions that {what}")
    return Advice(topic, "undecided", text, share.value, share.interval)

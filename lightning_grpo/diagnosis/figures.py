"""The figures of the page, each with its caption."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_grpo.diagnosis import svg
from lightning_grpo.diagnosis.records import Diagnosis, Groups
from lightning_grpo.diagnosis.text import rewards_of
from lightning_grpo.diagnosis.wording import percent, percent_range, short, short_range


def figures_of(found: Diagnosis) -> Iterator[str]:
    """All figures that the diagnosis has numbers for.

    Args:
        found: the diagnosis.

    Yields:
        `<figure>` elements.
    """
    groups, rewards = found.groups, found.rewards
    if groups is not None:
        yield _dead_groups(groups)
    yield _figure(
        "Reward of completions",
        f"mean {short(rewards.mean.value)} ({short_range(rewards.mean.interval)})",
        svg.bars(rewards.histogram, label="reward", unit="completions"),
    )
    if groups is not None:
        prompts = found.prompts
        name = "Pass rate of prompts" if rewards.is_binary else "Mean reward of prompts"
        num_flat = sum(not spreads for spreads in prompts.has_spread)
        yield _figure(
            name,
            f"{num_flat:,} of {len(prompts.names):,} prompts have no spread",
            svg.bars(prompts.histogram, label=name.lower(), unit="prompts"),
        )
        if groups.variance.between + groups.variance.within > 0:
            yield _variance(found, groups)
    if found.lengths is not None:
        lengths = found.lengths
        yield _figure(
            "Length of completions",
            f"median {short(lengths.median)} {lengths.unit}, longest {short(lengths.longest)}"
            f"{_truncated(found)}",
            svg.bars(lengths.histogram, label=lengths.unit, unit="completions"),
        )


def _figure(title: str, text: str, drawing: str, below: str = "") -> str:
    return (
        f'<figure class="card"><figcaption>{title}<small>{text}</small></figcaption>'
        f"{drawing}{below}</figure>"
    )


def _dead_groups(groups: Groups) -> str:
    measured = [
        svg.BandPoint(d.group_size, d.share, d.interval.low, d.interval.high) for d in groups.dead
    ]
    last = 4 * max(groups.group_size, groups.planned_size)
    beyond = [b for b in groups.beyond if b.group_size <= last]
    drawing = svg.curve(
        measured,
        [svg.BandPoint(b.group_size, b.interval.high, *b.interval) for b in beyond],
        label="group size",
        y_label="share of groups without spread",
        line=0.5,
    )
    cells = [(d.group_size, percent(d.share), percent_range(d.interval)) for d in groups.dead]
    cells += [(b.group_size, "extrapolated", percent_range(b.interval)) for b in beyond]
    rows = "".join(f"<tr><td>{g}</td><td>{s}</td><td>{i}</td></tr>" for g, s, i in cells)
    table = (
        "<details><summary>numbers</summary><table><tr><th>group size</th><th>without spread</th>"
        f"<th>range</th></tr>{rows}</table></details>"
    )
    text = (
        f"up to {groups.group_size} measured on {groups.num_prompts:,} prompts; the dotted line is "
        "at half"
    )
    return _figure("Groups without spread, over their size", text, drawing, table)


def _variance(found: Diagnosis, groups: Groups) -> str:
    variance = groups.variance
    total = variance.between + variance.within
    noise = 0.0
    if found.noise is not None and found.noise.share == found.noise.share:
        noise = found.noise.share * variance.within / total
    parts = [
        svg.Part("between prompts", variance.between / total, "second"),
        svg.Part("between siblings", variance.within / total - noise, "bar"),
    ]
    if found.noise is not None:
        parts.append(svg.Part("noise of the scoring", noise, "third"))
    return _figure(
        "Where the reward's variance comes from",
        f"between prompts {percent_range(variance.interval)}; only what is between siblings "
        "teaches",
        svg.parts_bar(parts, label="variance of the reward"),
    )


def _truncated(found: Diagnosis) -> str:
    if found.truncation is None:
        return ""
    return f"; {percent(found.truncation.share.value)} cut{rewards_of(found.truncation)}"

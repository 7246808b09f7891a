"""A diagnosis as one HTML page that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

import html
from collections.abc import Iterator

from lightning_grpo.diagnosis.advice import no_statement
from lightning_grpo.diagnosis.figures import figures_of
from lightning_grpo.diagnosis.records import Advice, Diagnosis, PromptSample, Sample
from lightning_grpo.diagnosis.style import STYLE
from lightning_grpo.diagnosis.text import sorted_advice
from lightning_grpo.diagnosis.wording import (
    counted,
    percent,
    percent_range,
    short,
    short_range,
    shortened,
)

_MOST_CHARS = 1200
_MOST_NAMES = 500
# Nothing is loaded, whatever a completion says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def to_html(found: Diagnosis) -> str:
    """The page.

    Args:
        found: the diagnosis.

    Returns:
        A whole HTML document.
    """
    statement = no_statement(found)
    body = [
        "<h1>Diagnosis</h1>",
        f'<p class="soft path">{escaped(found.source)}: {found.num_completions:,} completions of '
        f"{counted(found.num_prompts, 'prompt')}; ranges are {percent(found.level)} intervals, "
        "each by itself</p>",
        f'<div class="card statement">{escaped(statement)}</div>' if statement else "",
        "<h2>In short</h2>",
        f'<div class="tiles">{"".join(_tiles(found))}</div>',
        "<h2>Advice</h2>" if found.advice else "",
        f'<div class="advice">{"".join(_advice(each) for each in sorted_advice(found))}</div>',
        "<h2>What was measured</h2>",
        f'<div class="figures">{"".join(figures_of(found))}</div>',
        _prompts("Prompts with the lowest rewards", found.worst),
        _prompts("Prompts with the highest rewards", found.best),
        _notes(found),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Diagnosis of {escaped(found.source)}</title>"
        f"<style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def escaped(text: str) -> str:
    """Text that a page shows and never acts on.

    Args:
        text: anything, such as what a model has said.

    Returns:
        HTML.
    """
    visible = "".join(c if c in "\n\t" or c >= " " else chr(0xFFFD) for c in text)
    # Half a surrogate pair, which JSON can hold, is no text that could be written.
    return html.escape(visible.encode("utf-8", "replace").decode("utf-8"))


def _tiles(found: Diagnosis) -> Iterator[str]:
    groups, mean = found.groups, found.rewards.mean
    if groups is not None:
        dead = groups.dead[-1]
        yield _tile(
            percent(dead.share),
            f"of groups of {dead.group_size} have no spread ({percent_range(dead.interval)})",
        )
    yield _tile(short(mean.value), f"mean reward ({short_range(mean.interval)})")
    if groups is not None:
        variance = groups.variance
        yield _tile(
            percent(variance.icc),
            f"of the reward's variance is between prompts ({percent_range(variance.interval)})",
        )
    if found.noise is not None:
        yield _tile(
            percent(found.noise.share),
            f"of the variance between siblings is noise ({percent_range(found.noise.interval)})",
        )
    if found.ranking is not None:
        yield _tile(
            percent(found.ranking.share_right),
            f"of siblings are ranked as by gold ({percent_range(found.ranking.interval)})",
        )
    if found.truncation is not None:
        share = found.truncation.share
        yield _tile(
            percent(share.value), f"of completions are cut ({percent_range(share.interval)})"
        )
    if found.parsing is not None:
        share = found.parsing.failures
        yield _tile(percent(share.value), f"have no answer ({percent_range(share.interval)})")


def _tile(value: str, text: str) -> str:
    return f'<div class="card"><b>{value}</b><span>{text}</span></div>'


def _advice(each: Advice) -> str:
    names = ""
    if each.prompts:
        shown = ", ".join(escaped(shortened(name, 80)) for name in each.prompts[:_MOST_NAMES])
        others = len(each.prompts) - _MOST_NAMES
        shown += f" and {others:,} more, which diagnosis.json names" if others > 0 else ""
        names = (
            f"<details><summary>{counted(len(each.prompts), 'prompt')}</summary>"
            f'<div class="names">{shown}</div></details>'
        )
    return (
        f'<div class="card"><span class="badge {each.verdict}">{each.verdict}</span>'
        f"<b>{escaped(each.topic)}</b><div>{escaped(_sentence(each.text))}{names}</div></div>"
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _prompts(title: str, prompts: list[PromptSample]) -> str:
    shown = "".join(_prompt(prompt, is_open=i == 0) for i, prompt in enumerate(prompts))
    return f"<h2>{title}</h2>{shown}"


def _prompt(prompt: PromptSample, *, is_open: bool) -> str:
    samples = "".join(_sample(sample) for sample in prompt.samples)
    own = "" if prompt.prompt == prompt.name else f"<pre>{_text(prompt.prompt)}</pre>"
    if prompt.prompt == prompt.name and len(prompt.name) > 120:
        own = f"<pre>{_text(prompt.prompt)}</pre>"
    return (
        f'<details class="card prompt"{" open" if is_open else ""}>'
        f"<summary><span>{escaped(shortened(prompt.name, 120))}</span>"
        f'<span class="soft">mean {short(prompt.mean_reward)}, '
        f"{counted(prompt.num_rows, 'completion')}</span></summary>"
        f"{own}{samples}</details>"
    )


def _sample(sample: Sample) -> str:
    facts = [f"reward {short(sample.reward)}"]
    if sample.num_tokens is not None:
        facts.append(f"{short(sample.num_tokens)} tokens")
    if sample.is_truncated:
        facts.append("cut")
    return f'<p class="reward">{", ".join(facts)}</p><pre dir="auto">{_text(sample.text)}</pre>'


def _text(text: str) -> str:
    return escaped(shortened(text, _MOST_CHARS))


def _notes(found: Diagnosis) -> str:
    columns = "".join(
        f"<tr><td>{escaped(role.replace('_', ' '))}</td><td>{escaped(column)}</td></tr>"
        for role, column in found.columns.items()
    )
    return (
        "<h2>How to read this</h2>"
        "<p>A group is the completions of one prompt. Where all their rewards are equal it has no "
        "spread, and a baseline of siblings makes nothing of it. Intervals take the prompts as a "
        "random sample: they say how far off another sample as large could be, and nothing about "
        "prompts of another kind. Shares at smaller sizes come from all parts of each group; at "
        "larger ones the scores of these groups only give bounds.</p>"
        f'<div class="scroll"><table><tr><th>what</th><th>column</th></tr>{columns}</table></div>'
    )

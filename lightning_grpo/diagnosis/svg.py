"""Plots as SVG text: bars, a curve with its band, and a bar of parts. Colours are the page's."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lightning_grpo.diagnosis.records import Histogram
from lightning_grpo.diagnosis.wording import short

# In units of the drawing, which the page scales to its width; text of 12 units stays readable on a
# telephone.
_WIDTH, _HEIGHT = 420, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 14, 44


class BandPoint(NamedTuple):
    """One point of a curve: where, what, and between what."""

    x: float
    y: float
    low: float
    high: float


class Part(NamedTuple):
    """One part of a whole: its name, its share, and the class of its colour."""

    name: str
    share: float
    colour: str


def bars(found: Histogram, *, label: str, unit: str) -> str:
    """A histogram.

    Args:
        found: counts of ranges, or of values.
        label: of the horizontal axis.
        unit: what is counted, in the plural.

    Returns:
        An `<svg>` element.
    """
    top = max(found.counts)
    ticks = _ticks(top)
    scale = _vertical(0, ticks[-1])
    num = len(found.counts)
    step = (_WIDTH - _LEFT - _RIGHT) / max(num, 4)
    start = _LEFT + (_WIDTH - _LEFT - _RIGHT - step * num) / 2
    is_single = all(low == high for low, high in zip(found.lows, found.highs))
    gap = min(step * 0.2, 10) if is_single else 1
    parts = [_grid(ticks, scale, short)]
    for i, (low, high, count) in enumerate(zip(found.lows, found.highs, found.counts)):
        where = short(low) if low == high else f"{short(low)} to {short(high)}"
        x, y = start + i * step + gap / 2, scale(count)
        parts.append(
            f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{step - gap:.1f}" '
            f'height="{scale(0) - y:.1f}"><title>{where}: {count:,} {html.escape(unit)}</title>'
            "</rect>"
        )
    named = [short(low) for low in found.lows]
    places = [start + (i + 0.5) * step for i in range(num)]
    if not is_single:
        named.append(short(found.highs[-1]))
        places = [start + i * step for i in range(num + 1)]
    widest = max(len(name) for name in named) * 7 + 8
    every = max(1, math.ceil(widest / step))
    for name, x in list(zip(named, places))[::every]:
        parts.append(_text(x, _HEIGHT - _BOTTOM + 16, name, "middle"))
    parts.append(_axis_label(label))
    return _svg(parts, f"{label}: {unit}")


def curve(
    measured: Sequence[BandPoint],
    beyond: Sequence[BandPoint],
    *,
    label: str,
    y_label: str,
    line: float | None = None,
) -> str:
    """A share over sizes that double, with its intervals; beyond the last, an area of bounds.

    Args:
        measured: points in ascending order, y between 0 and 1.
        beyond: bounds at larger sizes, whose y is not looked at.
        label: of the horizontal axis.
        y_label: what is drawn.
        line: a share to compare with.

    Returns:
        An `<svg>` element.
    """
    everything = [*measured, *beyond]
    first, last = math.log2(everything[0].x), math.log2(everything[-1].x)
    span = max(last - first, 1e-9)

    def place(size: float) -> float:
        inside = _WIDTH - _LEFT - _RIGHT - 16
        return _LEFT + 8 + inside * ((math.log2(size) - first) / span if last > first else 0.5)

    scale = _vertical(0, 1)
    parts = [_grid([0, 0.25, 0.5, 0.75, 1], scale, lambda y: f"{100 * y:.0f} %")]
    if beyond:
        outline = [measured[-1], *beyond]
        parts.append(f'<polygon class="beyond" points="{_outline(outline, place, scale)}"/>')
        middle = (place(measured[-1].x) + place(beyond[-1].x)) / 2
        above = _TOP + 12 if measured[-1].high < 0.8 else scale(0.05)
        parts.append(_text(middle, above, "extrapolated: bounds", "middle"))
    parts.append(f'<polygon class="band" points="{_outline(measured, place, scale)}"/>')
    path = " ".join(f"{place(p.x):.1f},{scale(p.y):.1f}" for p in measured)
    parts.append(f'<polyline class="line" points="{path}"/>')
    for point in measured:
        parts.append(
            f'<circle class="dot" cx="{place(point.x):.1f}" cy="{scale(point.y):.1f}" r="3.5">'
            f"<title>{short(point.x)}: {100 * point.y:.0f} % ({100 * point.low:.0f} to "
            f"{100 * point.high:.0f} %)</title></circle>"
        )
    if line is not None:
        y = scale(line)
        parts.append(
            f'<line class="limit" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
    # Where names would run into one another, that of a power of two is there first.
    named: list[float] = []
    for point in sorted(everything, key=lambda p: not math.log2(p.x).is_integer()):
        if all(abs(place(point.x) - x) > 22 for x in named):
            named.append(place(point.x))
            parts.append(_text(named[-1], _HEIGHT - _BOTTOM + 16, short(point.x), "middle"))
    parts.append(_axis_label(label))
    return _svg(parts, f"{y_label} over {label}")


def parts_bar(parts: Sequence[Part], *, label: str) -> str:
    """One bar of parts, with their names below.

    Args:
        parts: that add up to 1.
        label: what the whole is.

    Returns:
        An `<svg>` element.
    """
    drawn = []
    x, width = float(_RIGHT), _WIDTH - 2 * _RIGHT
    for row, part in enumerate(parts):
        length = width * part.share
        drawn.append(
            f'<rect class="{part.colour}" x="{x:.1f}" y="{_TOP}" width="{max(length - 1, 0):.1f}" '
            f'height="44"><title>{html.escape(part.name)}: {100 * part.share:.0f} %</title></rect>'
        )
        x += length
        y = _TOP + 74 + 24 * row
        drawn.append(
            f'<rect class="{part.colour}" x="{_RIGHT}" y="{y - 10}" width="12" height="12"/>'
        )
        drawn.append(_text(_RIGHT + 20, y, f"{part.name}: {100 * part.share:.0f} %", "start"))
    return _svg(drawn, label, height=_TOP + 64 + 24 * len(parts))


def _svg(parts: Sequence[str], label: str, height: float = _HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{html.escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _axis_label(label: str) -> str:
    return _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, label, "middle")


def _vertical(low: float, high: float) -> Callable[[float], float]:
    inside = _HEIGHT - _TOP - _BOTTOM
    return lambda y: _TOP + inside * (1 - (y - low) / (high - low))


def _grid(
    ticks: Sequence[float], scale: Callable[[float], float], name: Callable[[float], str]
) -> str:
    lines = []
    for tick in ticks:
        y = scale(tick)
        lines.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        lines.append(_text(_LEFT - 6, y + 4, name(tick), "end"))
    return "".join(lines)


def _ticks(top: float) -> list[float]:
    """At most five whole numbers from 0 to the first round one that is not below `top`."""
    step = 10 ** math.floor(math.log10(max(top, 1)))
    for factor in (0.2, 0.5, 1, 2, 5):
        size = max(1, math.ceil(step * factor))
        if size * 4 >= top:
            return [size * i for i in range(math.ceil(top / size) + 1)]
    return [0, 5 * step, 10 * step]


def _outline(
    points: Sequence[BandPoint], place: Callable[[float], float], scale: Callable[[float], float]
) -> str:
    there = [f"{place(p.x):.1f},{scale(p.low):.1f}" for p in points]
    back = [f"{place(p.x):.1f},{scale(p.high):.1f}" for p in reversed(points)]
    return " ".join([*there, *back])

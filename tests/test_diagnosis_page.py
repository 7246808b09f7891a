"""The page of a diagnosis: whole, by itself, and safe from what completions say."""

from __future__ import annotations

import html.parser
import json
import re
from xml.etree import ElementTree

import pytest

from lightning_grpo.diagnosis.as_json import to_json
from lightning_grpo.diagnosis.measure import diagnose_rows
from lightning_grpo.diagnosis.page import to_html
from lightning_grpo.diagnosis.records import Histogram
from lightning_grpo.diagnosis.scores_file import read_scores
from lightning_grpo.diagnosis.svg import BandPoint, Part, bars, curve, parts_bar

EVIL = "</pre><script src=https://x.test/a.js></script><img src=x onerror=alert(1)>\ud800\x00\u202e&amp;"
VOID = {"meta"}


class Reader(html.parser.HTMLParser):
    """Collects tags, attributes and text, and checks that every tag is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page_of(rows, **options):
    found = diagnose_rows(read_scores(rows), source="<scores>.jsonl", **options)
    page = to_html(found)
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return page, reader, found


def rows_of(num_prompts, group_size, **columns):
    return [
        {"prompt_id": f"p{i}", "prompt": f"question {i}", "score": float(i % 4 == 0 or k < i % 4)}
        | {name: value(i, k) for name, value in columns.items()}
        for i in range(num_prompts)
        for k in range(group_size)
    ]


FULL = rows_of(
    40,
    8,
    completion=lambda i, k: EVIL if i < 4 else "a" * 5000,
    score_2=lambda i, k: float(k % 2),
    gold=lambda i, k: k,
    num_tokens=lambda i, k: 3 * i + k,
    finish=lambda i, k: "length" if k == 7 else "stop",
    parsed=lambda i, k: k != 3,
)


def test_the_page_has_every_section_with_its_numbers():
    page, reader, found = page_of(FULL)
    for words in (
        "Groups without spread, over their size",
        "Reward of completions",
        "Pass rate of prompts",
        "Where the reward's variance comes from",
        "noise of the scoring",
        "Length of completions",
        "12 % cut",
        "Prompts with the lowest rewards",
        "Prompts with the highest rewards",
        "ranges are 90 % intervals",
    ):
        assert words in reader.text, words
    assert page.count("<svg") == page.count("</svg>") == 5
    for advice in found.advice:
        assert f"{advice.text[1:]}." in reader.text
    assert "question 0" in reader.text and "p0" in reader.text
    assert "characters ..." in reader.text and len(page) < 120_000


def test_the_page_loads_nothing_and_runs_nothing():
    page, reader, _ = page_of(FULL)
    assert not {"script", "link", "img", "iframe", "object", "base", "form", "a"} & reader.tags
    for name, value in reader.attributes:
        assert name not in ("src", "href", "srcset", "action", "style")
        assert not name.startswith("on")
        assert "://" not in (value or "")
    assert not re.search(r"url\(|@import|expression\(", page)
    assert "default-src 'none'" in page


def test_what_completions_say_is_shown_and_not_done():
    page, reader, _ = page_of(FULL)
    assert "<script" not in page and "<img" not in page
    assert "</pre><script src=https://x.test/a.js></script>" in reader.text
    assert "\u202e&amp;" in reader.text
    assert "\x00" not in page and page.encode("utf-8")
    assert "<scores>.jsonl" in reader.text


def test_a_page_without_siblings_has_no_groups():
    page, reader, _ = page_of(rows_of(5, 1, completion=lambda i, k: "text"))
    assert "Every prompt has one completion" in reader.text
    assert "Groups without spread" not in reader.text and page.count("<svg") == 2


def test_a_page_of_rewards_that_are_all_the_same_is_whole():
    rows = [row | {"score": 1} for row in rows_of(30, 2)]
    _, reader, _ = page_of(rows)
    assert "All completions have the same reward, 1" in reader.text
    assert "nan" not in reader.text and "inf" not in reader.text.replace("in full", "")


@pytest.mark.parametrize("rows", [FULL, rows_of(2, 2), rows_of(5, 1)])
def test_json_is_strict_and_has_what_the_page_has(rows):
    _, _, found = page_of(rows)
    text = to_json(found)
    assert text.encode("utf-8")
    plain = json.loads(text, parse_constant=pytest.fail)
    assert plain["num_completions"] == len(rows)
    assert len(plain["prompts"]["names"]) == found.num_prompts
    assert [advice["topic"] for advice in plain["advice"]] == [a.topic for a in found.advice]
    if found.groups is None:
        assert plain["groups"] is None


# Plots


def elements(drawing, tag):
    return list(ElementTree.fromstring(drawing).iter(tag))


def test_bars_are_as_high_as_their_counts():
    drawing = bars(
        Histogram([0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [3, 0, 12]), label="a & b", unit="rows"
    )
    heights = [float(bar.get("height")) for bar in elements(drawing, "rect")]
    assert heights[1] == 0 and heights[2] == pytest.approx(4 * heights[0], abs=0.2)
    texts = [text.text for text in elements(drawing, "text")]
    assert {"0", "1", "2", "a & b"} <= set(texts)
    assert [title.text for title in elements(drawing, "title")][2] == "2: 12 rows"
    # Ranges have a name at each end, as many as there is room for.
    lows = [1000.0 * i for i in range(20)]
    wide = bars(Histogram(lows, [low + 1000 for low in lows], [1] * 20), label="x", unit="rows")
    named = [text.text for text in elements(wide, "text")]
    assert "0" in named and "3,000" in named and "1,000" not in named


def test_a_curve_goes_through_its_points_and_only_bounds_lie_beyond():
    points = [BandPoint(2, 1.0, 0.9, 1.0), BandPoint(4, 0.5, 0.4, 0.6), BandPoint(8, 0.0, 0.0, 0.2)]
    drawing = curve(points, [BandPoint(16, 0.2, 0.0, 0.2)], label="size", y_label="share", line=0.5)
    (line,) = elements(drawing, "polyline")
    xs, ys = zip(*(map(float, point.split(",")) for point in line.get("points").split()))
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[1] == pytest.approx((ys[0] + ys[2]) / 2, abs=0.2) and ys[0] < ys[2]
    shapes = {shape.get("class"): shape for shape in elements(drawing, "polygon")}
    assert set(shapes) == {"band", "beyond"}
    assert len(shapes["beyond"].get("points").split()) == 4
    (limit,) = [e for e in elements(drawing, "line") if e.get("class") == "limit"]
    assert float(limit.get("y1")) == pytest.approx(ys[1], abs=0.2)
    single = curve(points[:1], [], label="size", y_label="share")
    assert not [e for e in elements(single, "polygon") if e.get("class") == "beyond"]


def test_parts_fill_the_bar():
    drawing = parts_bar([Part("<one>", 0.25, "bar"), Part("two", 0.75, "second")], label="all")
    widths = [float(r.get("width")) for r in elements(drawing, "rect") if r.get("height") == "44"]
    assert (widths[0] + 1) * 3 == pytest.approx(widths[1] + 1, abs=0.5)
    assert "<one>: 25 %" in [text.text for text in elements(drawing, "text")]

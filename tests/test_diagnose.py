"""diagnose: what is measured of scored completions, what is advised, and what is not."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from command_lines import run, write_jsonl

from lightning_grpo.diagnosis.histogram import histogram
from lightning_grpo.diagnosis.measure import diagnose_rows
from lightning_grpo.diagnosis.scores_file import read_scores
from lightning_grpo.diagnosis.text import summary
from lightning_grpo.tools.diagnose import diagnose


def rows_of(groups, **columns):
    """Rows of groups of rewards; a column is a function of prompt and place in the group."""
    return [
        {"prompt": f"p{i}", "score": reward}
        | {name: value(i, k) for name, value in columns.items()}
        for i, group in enumerate(groups)
        for k, reward in enumerate(group)
    ]


def diagnosed(groups, *, group_size=None, level=0.9, **columns):
    rows = read_scores(rows_of(groups, **columns))
    return diagnose_rows(rows, source="scores.jsonl", group_size=group_size, level=level)


def advice_on(found, topic):
    (advice,) = [each for each in found.advice if each.topic == topic]
    return advice


ALIVE = [1, 0, 1, 0, 0, 0, 1, 0]
DEAD = [0] * 8
DONE = [1] * 8


def test_numbers_by_hand():
    found = diagnosed(
        [[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0]],
        num_tokens=lambda i, k: 10 * i + k,
        is_truncated=lambda i, k: k == 3,
        parsed=lambda i, k: i != 2,
    )
    assert (found.num_completions, found.num_prompts, found.num_single) == (17, 5, 1)
    assert found.rewards.mean.value == pytest.approx(8 / 17)
    assert (found.rewards.smallest, found.rewards.largest, found.rewards.is_binary) == (0, 1, True)
    assert found.rewards.histogram.counts == [9, 8]
    assert found.prompts.mean_rewards == [0.75, 0, 0.25, 1, 0]
    assert found.prompts.has_spread == [True, False, True, False, False]
    groups = found.groups
    assert (groups.num_prompts, groups.group_size, groups.planned_size) == (4, 4, 4)
    # Of 3 and 1 alike, half of the pairs and a quarter of the triples are equal.
    shares = {dead.group_size: dead.share for dead in groups.dead}
    assert shares == pytest.approx({2: 3 / 4, 3: 5 / 8, 4: 1 / 2})
    assert [b.group_size for b in groups.beyond] == [8, 16, 32]
    assert (groups.easy.num_dead, groups.easy.num_near) == (1, 1)
    assert (groups.hard.num_dead, groups.hard.num_near) == (1, 1)
    # Squares inside prompts .75 + 0 + .75 + 0, over 16 - 4.
    assert groups.variance.within == pytest.approx(1.5 / 12)
    assert groups.largest_gain == pytest.approx(4 / 3)
    assert (found.lengths.unit, found.lengths.median, found.lengths.longest) == ("tokens", 20, 40)
    assert found.truncation.share.value == pytest.approx(4 / 17)
    assert found.truncation.reward_of_cut.value == pytest.approx(1 / 4)
    assert found.truncation.reward_of_whole.value == pytest.approx(7 / 13)
    assert found.parsing.failures.value == pytest.approx(4 / 17)
    assert (found.noise, found.ranking) == (None, None)
    assert [p.name for p in found.worst] == ["p1", "p4", "p2", "p0"]
    assert [p.name for p in found.best] == ["p3", "p0", "p2", "p1"]
    assert found.worst[0].samples == []


def test_samples_are_the_best_the_middle_and_the_worst():
    found = diagnosed(
        [[0, 5, 3, 1, 2]],
        completion=lambda i, k: f"text {k}",
        finish=lambda i, k: "length" if k == 0 else "stop",
    )
    (prompt,) = found.best
    assert [(s.text, s.reward, s.is_truncated) for s in prompt.samples] == [
        ("text 1", 5, False),
        ("text 4", 2, False),
        ("text 0", 0, True),
    ]
    assert found.lengths.unit == "characters" and found.lengths.longest == 6


def test_a_better_group_size_is_advised_only_where_the_share_is_known_to_be_high():
    keep = advice_on(diagnosed([ALIVE] * 40 + [DEAD] * 4), "group size")
    assert keep.verdict == "keep" and keep.text.startswith("keep 8: 9 % (4 to 19 %) of groups of 8")
    assert keep.value == pytest.approx(1 / 11)
    # Rare success: most groups are dead, and few enough stay so.
    rare = [[0] * 7 + [1]] * 20 + [DEAD] * 40
    change = advice_on(diagnosed(rare), "group size")
    assert change.verdict == "change"
    assert "67 %" in change.text and "Try 16" in change.text and "(extrapolated)" in change.text
    hopeless = advice_on(diagnosed([ALIVE] * 5 + [DEAD] * 200), "group size")
    assert hopeless.verdict == "change" and "a larger group does not help" in hopeless.text
    near = advice_on(diagnosed([ALIVE] * 40 + [DEAD] * 40), "group size")
    assert near.verdict == "undecided" and near.text.startswith("near the line of 50 %")


def test_a_larger_group_than_that_of_the_file_is_only_bounded():
    found = diagnosed([ALIVE] * 30 + [DEAD] * 10, group_size=16)
    advice = advice_on(found, "group size")
    assert advice.value is None and "of groups of 16 have no spread (extrapolated)" in advice.text
    assert found.groups.largest_gain == pytest.approx(16 / 15)
    smaller = diagnosed([ALIVE] * 30 + [DEAD] * 10, group_size=4)
    assert "of groups of 4 have no spread" in advice_on(smaller, "group size").text
    assert advice_on(smaller, "critic").value == pytest.approx(4 / 3)
    with pytest.raises(ValueError, match="--group_size 1: .* 2 or more"):
        diagnosed([ALIVE], group_size=1)


def test_prompts_are_dropped_only_where_they_would_be_without_spread_again():
    sure = diagnosed([ALIVE] * 20 + [DONE] * 30 + [DEAD] * 30)
    easy, hard = advice_on(sure, "prompts too easy"), advice_on(sure, "prompts too hard")
    assert easy.verdict == hard.verdict == "change"
    assert easy.prompts == tuple(f"p{i}" for i in range(20, 50))
    assert hard.prompts == tuple(f"p{i}" for i in range(50, 80))
    # 30 and no prompt with 7 of 8: at 90 % the chance is above .1^(1/30), and 8 more follow.
    chance = 0.1 ** (1 / 30)
    least = (chance / (chance + (1 - chance) / 8)) ** 8
    assert easy.interval == pytest.approx((least, 1.0))
    assert f"at least {100 * least:.0f} % would in 8 more" in easy.text
    # As many with 7 of 8: what was lost once may well be won.
    unsure = advice_on(diagnosed([[0] * 7 + [1]] * 30 + [DEAD] * 10), "prompts too hard")
    assert unsure.verdict == "undecided" and "not enough to drop" in unsure.text
    topics = {each.topic for each in diagnosed([ALIVE] * 30).advice}
    assert not {"prompts too easy", "prompts too hard"} & topics


def test_the_temperature_is_raised_only_where_wrong_answers_repeat():
    groups = [ALIVE] * 20 + [DEAD] * 10 + [DONE] * 10
    alike = advice_on(diagnosed(groups, completion=lambda i, k: f"{i}"), "temperature")
    assert (alike.verdict, alike.value) == ("change", 1.0) and alike.text.startswith("raise it")
    # Right answers may be alike.
    other = diagnosed(groups, completion=lambda i, k: "right" if i >= 30 else f"{i} {k}")
    assert (advice_on(other, "temperature").verdict, advice_on(other, "temperature").value) == (
        "keep",
        0.0,
    )
    assert other.groups.alike.num_rows == 10 * 28
    unstuck = diagnosed([ALIVE] * 20, completion=lambda i, k: "same")
    assert "no group is stuck" in advice_on(unstuck, "temperature").text
    assert advice_on(diagnosed(groups), "temperature").verdict == "undecided"


def test_rewards_are_judged_by_a_second_score_and_by_gold():
    groups = [ALIVE] * 40
    flipped = diagnosed(groups, score_2=lambda i, k: (i + k) % 2, gold=lambda i, k: -ALIVE[k])
    noise = advice_on(flipped, "noise of the reward")
    assert noise.verdict == "change" and noise.text.startswith("average several scores")
    assert advice_on(flipped, "ranking of siblings").text.startswith("it ranks the wrong way: 0 %")
    same = diagnosed(groups, score_2=lambda i, k: ALIVE[k], gold=lambda i, k: ALIVE[k] + k / 99)
    assert advice_on(same, "noise of the reward").value == 0.0
    assert advice_on(same, "ranking of siblings").verdict == "keep"
    coin = diagnosed(groups, gold=lambda i, k: (3 * i + k) % 8)
    assert advice_on(coin, "ranking of siblings").verdict == "undecided"


def test_completions_that_are_cut_or_not_parsed_are_told_of():
    groups = [ALIVE] * 40
    found = diagnosed(groups, truncated=lambda i, k: i < 5, parsed=lambda i, k: k < 6)
    length = advice_on(found, "length")
    assert length.verdict == "undecided" and length.text.startswith("near the line of 10 %")
    assert advice_on(found, "answers").verdict == "change"
    found = diagnosed(groups, truncated=lambda i, k: k < 4, parsed=lambda i, k: True)
    assert advice_on(found, "length").verdict == "change"
    assert advice_on(found, "answers").verdict == "keep"


def test_one_completion_per_prompt_says_nothing_about_groups():
    found = diagnosed([[1], [0], [1]], truncated=lambda i, k: False)
    assert found.groups is None and found.num_single == 3
    assert [each.topic for each in found.advice] == ["length"]
    text = summary(found)
    assert "Every prompt has one completion: nothing can be said about groups" in text
    assert "spread" not in text


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([ALIVE, DEAD], "Too few prompts for any statement about groups: of 2 prompts"),
        ([ALIVE] * 6 + [DEAD] * 5, "Too few prompts for any statement about groups: of 11"),
        ([DONE] * 50, "All completions have the same reward, 1: nothing can be learned"),
    ],
)
def test_where_nothing_can_be_said_nothing_is_advised(groups, words):
    found = diagnosed(groups)
    assert found.advice == []
    assert words in " ".join(summary(found).split())


def test_the_summary_is_read_in_a_minute():
    found = diagnosed(
        [ALIVE] * 40 + [DEAD] * 20 + [DONE] * 4,
        completion=lambda i, k: f"{i} {k}",
        finish_reason=lambda i, k: "stop",
    )
    text = summary(found, width=100)
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) < 30
    assert "groups of 8      38 % (28 to 48 %) have no spread and teach nothing" in text
    assert "advice (ranges are 90 % intervals)" in text
    verdicts = [
        line.split()[0] for line in text.partition("advice")[2].splitlines() if line[:1].strip()
    ]
    order = {"change": 0, "undecided": 1, "keep": 2, "note": 3}
    ranks = [order[verdict] for verdict in verdicts if verdict in order]
    assert ranks == sorted(ranks) and len(ranks) >= 5
    assert "1,024" not in text and "512 of 64 prompts" in text


def test_the_level_is_that_of_all_intervals():
    groups = [ALIVE] * 40 + [DEAD] * 20
    narrow, wide = diagnosed(groups, level=0.5), diagnosed(groups, level=0.99)
    for a, b in (
        (narrow.groups.dead[-1].interval, wide.groups.dead[-1].interval),
        (narrow.groups.beyond[0].interval, wide.groups.beyond[0].interval),
        (narrow.rewards.mean.interval, wide.rewards.mean.interval),
        (narrow.groups.variance.interval, wide.groups.variance.interval),
    ):
        assert b.low < a.low <= a.high < b.high
    with pytest.raises(ValueError, match="level is 1"):
        diagnosed(groups, level=1.0)


def test_values_are_counted_by_themselves_or_in_round_ranges():
    few = histogram([1, 0, 1, 0.5])
    assert (few.lows, few.highs, few.counts) == ([0, 0.5, 1], [0, 0.5, 1], [1, 1, 2])
    ticks = histogram([0, 0, 1], ticks=[0, 0.5, 1])
    assert (ticks.lows, ticks.counts) == ([0, 0.5, 1], [2, 0, 1])
    many = histogram([float(x) for x in range(3, 103)])  # 20 ranges would be 4.95 long
    assert many.lows == [5.0 * i for i in range(21)]
    assert many.highs[-1] == 105.0 and sum(many.counts) == 100
    assert (many.counts[0], many.counts[1], many.counts[20]) == (2, 5, 3)
    ends = histogram([x / 7 for x in range(-50, 51)])
    assert sum(ends.counts) == 101 and len(ends.counts) <= 21
    assert all(low < high for low, high in zip(ends.lows, ends.highs))


# The command


def test_the_command_prints_and_writes_json_and_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write_jsonl("scores.jsonl", rows_of([ALIVE] * 20 + [DEAD] * 10))
    run("diagnose", path, "--output", "out", "--group_size", "4", "--level", "0.8")
    printed = capsys.readouterr().out
    assert "240 of 30 prompts" in printed and "written to out/diagnosis.html" in printed
    found = json.loads(Path("out/diagnosis.json").read_text(), parse_constant=pytest.fail)
    assert (found["level"], found["num_prompts"]) == (0.8, 30)
    assert found["groups"]["planned_size"] == 4
    (last,) = [dead for dead in found["groups"]["dead"] if dead["group_size"] == 8]
    assert last["share"] == pytest.approx(1 / 3)
    assert set(last["interval"]) == {"low", "high"}
    assert Path("out/diagnosis.html").read_text().startswith("<!DOCTYPE html>")


def test_the_command_takes_other_names_of_columns(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"q": f"{i // 4}", "points": i % 3} for i in range(40)]
    path = write_jsonl("scores.jsonl", rows)
    run("diagnose", "--scores", path, "--columns.score", "points", "--columns.prompt_id", "q")
    assert "40 of 10 prompts" in capsys.readouterr().out
    assert Path("runs/diagnosis/diagnosis.json").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "score": "x"}], "row 1: score: a number is needed, got 'x'"),
        ([], "scores.jsonl has no rows"),
        ([{"prompt": "a", "id": 1, "score": 1}] * 2, "row 2: id '1' is that of row 1 too"),
    ],
)
def test_bad_files_end_in_one_line(rows, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_jsonl("scores.jsonl", rows)
    with pytest.raises(SystemExit) as stopped:
        run("diagnose", path)
    assert message in str(stopped.value)
    assert not Path("runs").exists()


def test_the_function_returns_what_was_found(tmp_path):
    path = write_jsonl(str(tmp_path / "scores.jsonl"), rows_of([ALIVE] * 20))
    found = diagnose(path, output=str(tmp_path))
    assert found.groups.dead[-1].share == 0.0
    assert math.isnan(found.groups.variance.icc) is False

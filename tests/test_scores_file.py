"""Files of scores: columns by their usual or given names, and bad input named by row and column."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
from command_lines import write_jsonl

from lightning_grpo.diagnosis.scores_file import ScoreColumns, read_scores

ROWS = [
    {"prompt": "1+1=", "completion": "2", "score": 1},
    {"prompt": "2+2=", "completion": "5", "score": 0.0},
    {"prompt": "1+1=", "completion": "3", "score": False},
]


def changed(row, **values):
    """The rows with some values of one row changed."""
    return [r | values if i == row else r for i, r in enumerate(ROWS)]


def test_rows_with_the_same_prompt_are_a_group():
    rows = read_scores(ROWS)
    assert rows.group_ids.tolist() == [0, 1, 0]
    assert rows.rewards.tolist() == [1.0, 0.0, 0.0]
    assert (rows.names, rows.prompts) == (["1+1=", "2+2="], ["1+1=", "2+2="])
    assert rows.completions == ["2", "5", "3"]
    assert rows.columns == {"prompt": "prompt", "completion": "completion", "score": "score"}
    assert (rows.gold, rows.num_tokens, rows.truncated, rows.parsed) == (None,) * 4


def test_every_column_is_read_under_its_usual_names():
    full = {
        "group": 7,
        "prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1="}],
        "response": [{"role": "assistant", "content": "2"}],
        "reward": "0.5",
        "reward_2": None,
        "gold": 3,
        "completion_tokens": 4,
        "finish_reason": "length",
        "parsed": "true",
        "else": {},
    }
    other = full | {"reward_2": 1, "finish_reason": "stop", "parsed": None, "gold": ""}
    rows = read_scores([full, other, full | {"finish_reason": None, "parsed": 0}])
    assert rows.names == ["7"]
    assert rows.prompts == ["system: Add.\nuser: 1+1="]
    assert rows.completions[0] == "assistant: 2"
    assert rows.scores[1].tolist() == [0.5, 1.0] and math.isnan(rows.scores[0, 1])
    assert rows.gold.tolist()[0] == 3 and math.isnan(rows.gold[1])
    assert rows.num_tokens.tolist() == [4, 4, 4]
    assert rows.truncated.tolist()[:2] == [1, 0] and math.isnan(rows.truncated[2])
    assert rows.parsed[0] == 1 and math.isnan(rows.parsed[1]) and rows.parsed[2] == 0
    assert rows.columns["num_tokens"] == "completion_tokens"
    assert rows.columns["truncated"] == "finish_reason"


def test_columns_of_other_names_are_named():
    rows = [{"question": "q", "prompt": i, "points": i, "n": 3, "id": "q"} for i in range(2)]
    named = ScoreColumns(prompt_id="id", prompt="question", score="points", num_tokens="n")
    found = read_scores(rows, named)
    assert found.group_ids.tolist() == [0, 0] and found.prompts == ["q"]
    assert found.rewards.tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match=r"--columns.gold: there is no column 'best'; .*'score'"):
        read_scores(ROWS, ScoreColumns(gold="best"))


def test_several_scores_of_a_completion_may_be_a_list():
    rows = [{"prompt": "a", "score": score} for score in ([1, 0, 1], 2, [3], [4, 5])]
    scores = read_scores(rows).scores
    assert scores.shape == (4, 3)
    assert scores.nan_to_num(-1).tolist() == [[1, 0, 1], [2, -1, -1], [3, -1, -1], [4, 5, -1]]
    both = read_scores([row | {"score_2": 9} for row in rows]).scores
    assert both[:, 3].tolist() == [9.0] * 4


def test_files_are_read_compressed_and_as_csv(tmp_path):
    plain = write_jsonl(str(tmp_path / "scores.jsonl"), ROWS)
    packed = tmp_path / "scores.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(plain).read_bytes()))
    table = tmp_path / "scores.csv"
    table.write_text("prompt,score,is_truncated,gold\n1+1=,1,false,\n2+2=,0,True,2\n1+1=,0.0,,1\n")
    expected = read_scores(ROWS).rewards.tolist()
    for path in (plain, packed, table):
        assert read_scores(path).rewards.tolist() == expected
    rows = read_scores(table)
    assert rows.truncated.nan_to_num(-1).tolist() == [0, 1, -1]
    assert rows.gold.nan_to_num(-1).tolist() == [-1, 2, 1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (changed(1, score=None), r"row 2: score: it is missing; mend the value or leave the row"),
        ([ROWS[0], {"prompt": "x"}], r"row 2: score: it is missing"),
        (changed(2, score="good"), r"row 3: score: a number is needed, got 'good'"),
        (changed(0, score={"a": 1}), r"row 1: score: a number is needed, got a dict"),
        (changed(0, score=math.nan), r"row 1: score: a finite number is needed, got nan"),
        (changed(0, score="inf"), r"row 1: score: a finite number is needed, got inf"),
        (changed(0, score=10**400), r"row 1: score: a number is needed"),
        (changed(0, score=[]), r"row 1: score: the list is empty"),
        (changed(0, score=[1, None]), r"row 1: score: it is missing"),
        (changed(0, score_2=[1]), r"row 1: score_2: a number is needed, got a list"),
        (changed(1, gold="?"), r"row 2: gold: a number is needed, got '\?'"),
        (changed(1, num_tokens="many"), r"row 2: num_tokens: a number"),
        (changed(1, parsed="maybe"), r"row 2: parsed: true or false is needed, got 'maybe'"),
        (changed(1, is_truncated=3), r"row 2: is_truncated: true or false is needed, got '3'"),
        ([row | {"score": None} for row in ROWS], r"row 1: score: .* \(and 2 more rows\)"),
        (changed(1, prompt=None), r"row 2: prompt is missing"),
        (changed(1, prompt=""), r"row 2: prompt is missing"),
        ([{"prompt": "a"}], r"no column of scores: .* score or reward.*--columns.score.*'prompt'"),
        ([{"score": 1}], r"no column says which rows have the same prompt: .*group or prompt"),
        ([], "has no rows"),
    ],
)
def test_bad_input_is_named_by_row_and_column(rows, message):
    with pytest.raises(ValueError, match=message):
        read_scores(rows)


def test_an_empty_file_and_a_broken_line_are_named(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"scores.jsonl has no rows"):
        read_scores(path)
    path.write_text(json.dumps(ROWS[0]) + "\n{")
    with pytest.raises(ValueError, match=r"scores.jsonl, line 2: not valid JSON"):
        read_scores(path)


def test_the_same_completion_twice_is_refused():
    ids = [row | {"id": i} for i, row in enumerate(ROWS)]
    assert read_scores(ids).group_ids.tolist() == [0, 1, 0]
    # Counted from 0 for each prompt.
    per_prompt = [row | {"completion_id": i} for row, i in zip(ROWS, (0, 0, 1))]
    assert read_scores(per_prompt).group_ids.tolist() == [0, 1, 0]
    twice = [*ids, ids[0]]
    with pytest.raises(ValueError, match=r"row 4: id '0' is that of row 1 too, with the same"):
        read_scores(twice)
    # An id of the prompt, said to be so.
    of_prompt = [row | {"id": row["prompt"]} for row in ROWS]
    with pytest.raises(ValueError, match=r"row 3: id '1\+1='.*--columns.prompt_id id"):
        read_scores(of_prompt)
    assert read_scores(of_prompt, ScoreColumns(prompt_id="id")).group_ids.tolist() == [0, 1, 0]


def test_an_id_of_two_prompts_is_refused():
    rows = [row | {"prompt_id": i} for row, i in zip(ROWS, (0, 1, 0))]
    assert read_scores(rows).names == ["0", "1"]
    with pytest.raises(ValueError, match=r"row 3: prompt_id '1' has another prompt than in row 2"):
        read_scores([*rows[:2], rows[2] | {"prompt_id": 1}])

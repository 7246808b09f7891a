from __future__ import annotations

import time
from decimal import Decimal

import numpy as np
import pytest

from lightning_grpo.rewards import (
    SoftOverlong,
    answers,
    completion_text,
    exact_match,
    extract_gsm8k_strict,
    extract_last_number,
    format_reward,
    gsm8k_flexible,
    gsm8k_strict,
    numeric_match,
)

# Rows 1, 2, 645 and 5716 of the training split of GSM8K, (c) 2021 OpenAI, MIT licence.
GSM8K_ANSWERS = [
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72",
    "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\n"
    "Working 50 minutes, she earned 0.2 x 50 = $<<0.2*50=10>>10.\n#### 10",
    "13 weeks have 13 * 7 = <<13*7=91>>91 days.\n"
    "For 91 days the bus system carries 1,200,000 * 91 = <<1200000*91=109200000>>109,200,000 people.\n"
    "#### 109,200,000",
    "-14 + (-8) + 1 = <<-14+-8+1=-21>>-21 degrees Fahrenheit\n"
    "-21/3 = <<-21/3=-7>>-7 degrees Fahrenheit\nThe average temperature was -7 degrees Fahrenheit.\n#### -7",
]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", "72"),
        ("The answer is 72.", "72"),
        ("first 3, then 72 apples", "72"),
        ("1,234", "1234"),
        ("1,234,567.50", "1234567.5"),
        ("1,2,3", "3"),
        ("12,34", "34"),
        ("1,2345", "2345"),
        ("is -5", "-5"),
        ("(-5)", "-5"),
        ("=-5", "-5"),
        ("**-5**", "-5"),
        ("\u22125", "-5"),
        ("10-5", "5"),
        ("x-5", "5"),
        ("(2)-5", "5"),
        ("20%-30%", "30"),
        ("10 - 5", "5"),
        ("--5", "5"),
        ("- 5 apples", "5"),
        ("+5", "5"),
        ("$18", "18"),
        ("\\$18", "18"),
        ("-$18", "-18"),
        ("$-18", "-18"),
        ("\u20ac18", "18"),
        ("$18-$20", "20"),
        ("18 dollars", "18"),
        ("18dollars", "18"),
        ("50%", "50"),
        ("18.0", "18"),
        ("18.50", "18.5"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("$.50", "0.5"),
        ("...5", "5"),
        ("the answer is.5", "5"),
        ("3.14.15", "15"),
        ("007", "7"),
        ("-0", "0"),
        ("0.0", "0"),
        ("1e5", "100000"),
        ("1.5E-3", "0.0015"),
        ("2e1234", "2"),
        ("\\boxed{72}", "72"),
        ("20 m2", "20"),
        ("CO2", None),
        ("\u7b54\u6848\u662f18", "18"),
        ("12345678901234567890123456789012345678901", "12345678901234567890123456789012345678901"),
        (
            "-12345678901234567890123456789012345678901",
            "-12345678901234567890123456789012345678901",
        ),
        ("no number", None),
        ("", None),
        ("-", None),
        ("$", None),
    ],
)
def test_the_last_number_of_a_text_is_read(text, number):
    assert extract_last_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", "72"),
        ("It is 5.\n#### 1,234", "1234"),
        ("####72", "72"),
        ("#### 72.", "72"),
        ("#### 18.0", "18"),
        ("#### -5", "-5"),
        ("#### $18", "18"),
        ("#### -$18", "-18"),
        ("#### 50%", "50"),
        ("#### 18 dollars", "18"),
        ("#### .5", "0.5"),
        ("#### 1. First, add\n#### 72", "72"),
        ("#### 72\nThat makes 80.", "72"),
        ("72", None),
        ("### 72", None),
        ("##### 72", None),
        ("#### the answer is 72", None),
        ("####\n72", None),
        ("#### 1/2", None),
        ("#### 10-5", None),
        ("#### 1,2345", None),
        ("#### 3:30", None),
        ("####", None),
    ],
)
def test_a_marked_number_is_read_only_in_its_form(text, number):
    assert extract_gsm8k_strict(text) == number


def test_numbers_before_the_last_4000_characters_are_not_read():
    assert extract_last_number("7" + "x" * 3999) == "7"
    assert extract_last_number("7" + "x" * 4000) is None
    assert extract_gsm8k_strict("#### 7" + " " * 3994) == "7"
    assert extract_gsm8k_strict("#### 7" + " " * 4000) is None


@pytest.mark.parametrize(
    "pattern", [answers._ANY_NUMBER, answers._MARKED_NUMBER], ids=["any", "marked"]
)
@pytest.mark.parametrize(
    "unit",
    [
        "1",
        "1,111",
        ",111",
        "1.",
        ".",
        "-",
        "-$",
        "#### ",
        "####",
        "#### -",
        "1e",
        " ",
        "1-",
        "####\t",
    ],
)
def test_patterns_take_linear_time(pattern, unit):
    text = "####" + unit * (100_000 // len(unit)) + "x"
    start = time.process_time()
    for _ in pattern.finditer(text):
        pass
    assert time.process_time() - start < 2.0  # quadratic time would be minutes


def test_a_huge_number_costs_nothing():
    start = time.process_time()
    assert len(extract_last_number("9" * 1_000_000)) == 4000
    assert len(extract_last_number("1e999")) == 1000
    assert gsm8k_flexible(["9" * 1_000_000], answer=[5]) == [0.0]
    assert time.process_time() - start < 2.0


def test_the_text_of_messages_is_what_the_assistant_wrote():
    assert completion_text("plain") == "plain"
    assert completion_text([{"role": "assistant", "content": "hello"}]) == "hello"
    turns = [
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "42"},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "so "}, {"type": "text", "text": "7"}],
        },
    ]
    assert completion_text(turns) == "\nso 7"
    with pytest.raises(ValueError, match="a completion is a string or a list of messages, not 5"):
        completion_text(5)


def test_exact_match_compares_texts():
    completions = ["yes", " yes\n", "Yes", "7", "", "x"]
    answer = ["yes", "yes", "yes", 7, "", None]
    assert exact_match(completions, answer) == [1.0, 1.0, 0.0, 1.0, 1.0, None]


@pytest.mark.parametrize(
    ("completion", "gold", "reward"),
    [
        ("18.0", 18, 1.0),
        ("it is $18.00", "18", 1.0),
        ("18", 18.0, 1.0),
        ("0", -0.0, 1.0),
        ("0.1", 0.1, 1.0),
        ("0.10", Decimal("0.1"), 1.0),
        ("1,000", np.int64(1000), 1.0),
        ("0.30000000000000004", 0.3, 0.0),
        ("1e3", "1,000", 1.0),
        ("18", "$18 a day", 1.0),
        ("5", "-5", 0.0),
        ("-5", "-5", 1.0),
        ("100000000000000000001", "100000000000000000000", 0.0),
        ("18", "#### 18", 1.0),
        ("none", 18, 0.0),
        ("18", None, None),
    ],
)
def test_numeric_match_is_exact(completion, gold, reward):
    assert numeric_match([completion], [gold]) == [reward]


@pytest.mark.parametrize(
    "gold", ["eighteen", "1/2", "3 or 4", "#### none", "", float("nan"), True, [18]]
)
def test_an_answer_without_one_number_is_an_error_that_shows_it(gold):
    with pytest.raises(ValueError, match="nor a text with exactly one number") as error:
        numeric_match(["18"], [gold])
    assert repr(str(gold)) in str(error.value)


def test_gsm8k_answers_score_themselves():
    assert gsm8k_strict(GSM8K_ANSWERS, answer=GSM8K_ANSWERS) == [1.0, 1.0, 1.0, 1.0]
    assert gsm8k_flexible(GSM8K_ANSWERS, answer=["72", 10, "109200000", "-7.0"]) == [
        1.0,
        1.0,
        1.0,
        1.0,
    ]
    assert gsm8k_strict(GSM8K_ANSWERS, answer=[72, 10, 109_200_000, -7]) == [1.0, 1.0, 1.0, 1.0]
    assert gsm8k_strict(GSM8K_ANSWERS, answer=GSM8K_ANSWERS[1:] + GSM8K_ANSWERS[:1]) == [0.0] * 4


def test_gsm8k_strict_asks_for_the_form_and_flexible_does_not():
    completions = [
        "She sold 72 clips.\n#### 72",
        "She sold 72 clips.",
        "#### 72\nWait, it is 80.",
        "#### 80\nWait, it is 72",
        [{"role": "assistant", "content": "So #### 72"}],
    ]
    answer = [GSM8K_ANSWERS[0]] * 5
    assert gsm8k_strict(completions, answer) == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert gsm8k_flexible(completions, answer) == [1.0, 1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        (" <think>\na\nb\n</think>\n\n<answer> b </answer>\n", 1.0),
        ("<think></think><answer></answer>", 1.0),
        ("<think>1 < 2</think><answer>b</answer>", 1.0),
        ("x<think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer>x", 0.0),
        ("<think>a</think>x<answer>b</answer>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("a</think><answer>b</answer>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a<answer>b</think></answer>", 0.0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer><answer>b</answer>", 0.0),
        ("<think>a <answer>c</answer></think><answer>b</answer>", 0.0),
        ("</think><think><answer>b</answer>", 0.0),
        ("<Think>a</Think><Answer>b</Answer>", 0.0),
        ("", 0.0),
    ],
)
def test_the_format_is_one_thought_and_one_answer(text, reward):
    assert format_reward([text]) == [reward]
    assert format_reward([[{"role": "assistant", "content": text}]]) == [reward]


def test_the_overlong_penalty_grows_over_the_buffer():
    lengths = [0, 14, 15, 16, 18, 20, 21, 1000]
    penalty = SoftOverlong(max_completion_tokens=20, buffer_tokens=5)
    assert penalty([[1] * n for n in lengths]) == [0.0, 0.0, 0.0, -0.2, -0.6, -1.0, -1.0, -1.0]
    penalty = SoftOverlong(max_completion_tokens=100, buffer_tokens=20)
    assert penalty([[1] * n for n in (50, 90, 110)]) == [0.0, -0.5, -1.0]


@pytest.mark.parametrize("buffer_tokens", [0, -1, 21])
def test_a_buffer_outside_the_limit_is_refused(buffer_tokens):
    with pytest.raises(ValueError, match=f"buffer_tokens must be from 1 .*20.*not {buffer_tokens}"):
        SoftOverlong(max_completion_tokens=20, buffer_tokens=buffer_tokens)

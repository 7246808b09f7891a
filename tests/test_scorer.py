from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import math
import os
import signal
import sys
import threading
import warnings

import numpy as np
import pytest
import torch

from lightning_grpo.rewards import RewardError, Scorer

PROMPTS = ["p0", "p0", "p1"]
COMPLETIONS = ["c0", "c1", "c2"]
IDS = [[5], [5, 6], [5, 6, 7]]
COLUMNS = {"answer": ["a0", "a0", "a1"]}


def score(functions, completions=COMPLETIONS, columns=COLUMNS, trainer_state=None, **options):
    scorer = Scorer(functions, **options)
    return scorer(PROMPTS, completions, IDS, columns, trainer_state)


def returning(values):
    def constant(completions):
        return values

    return constant


def raising(error):
    def failing(completions):
        raise error

    return failing


def raising_async(error):
    async def failing(completions):
        await asyncio.sleep(0)
        raise error

    return failing


def equal(rewards, expected):
    assert rewards.dtype == torch.float64
    return np.array_equal(
        rewards.numpy(), [math.nan if x is None else x for x in expected], equal_nan=True
    )


def test_rewards_are_the_weighted_sum():
    scores = score([returning([1, 0, 1]), returning([0.0, 0.5, 1.0])], weights=[0.7, 0.3])
    assert scores.rewards.tolist() == pytest.approx([0.7, 0.15, 1.0], abs=1e-12)
    assert equal(scores.function_rewards["constant"], [1, 0, 1])
    assert equal(scores.function_rewards["constant_2"], [0, 0.5, 1])
    assert equal(score([returning([1, 2, 3]), returning([10, 20, 30])]).rewards, [11, 22, 33])
    assert equal(score([returning([1, 2, 3])], weights=[-2]).rewards, [-2, -4, -6])


def test_a_row_counts_the_functions_that_scored_it():
    scores = score([returning([1, None, None]), returning([0, 5, None])], weights=[0.5, 2])
    assert equal(scores.rewards, [0.5, 10, None])
    assert equal(scores.function_rewards["constant"], [1, None, None])
    assert scores.num_errors == 0


def test_a_reward_of_zero_is_a_score():
    assert equal(score([returning([0, 0.0, False])]).rewards, [0, 0, 0])


def test_a_function_of_weight_zero_is_only_logged():
    scores = score([returning([1, None, 3]), returning([7, 8, 9])], weights=[1, 0])
    assert equal(scores.rewards, [1, None, 3])
    assert equal(scores.function_rewards["constant_2"], [7, 8, 9])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([True, False, None], [1, 0, None]),
        ((1, 2.5, 3), [1, 2.5, 3]),
        ([np.float32(0.5), np.int64(2), np.bool_(True)], [0.5, 2, 1]),
        ([torch.tensor(0.5), torch.tensor(2), torch.tensor(True)], [0.5, 2, 1]),
        ([np.array(0.5), torch.tensor(1.5, requires_grad=True), 0.1], [0.5, 1.5, 0.1]),
        (np.array([1.0, 2.0, 3.0]), [1, 2, 3]),
        (torch.tensor([0.5, 2.0, 3.0], dtype=torch.bfloat16), [0.5, 2, 3]),
        ((x for x in [1, 2, 3]), [1, 2, 3]),
        ([None, None, None], [None, None, None]),
    ],
)
def test_numbers_of_every_kind_are_rewards(values, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(score([returning(values)]).rewards, expected)


BAD_VALUES = [
    math.nan,
    math.inf,
    -math.inf,
    "1",
    [1.0],
    1j,
    10**400,
    10**5000,
    torch.tensor([1.0]),
    torch.tensor(math.nan),
    np.array([1.0]),
    np.float64("nan"),
    {},
]


@pytest.mark.parametrize("bad", BAD_VALUES, ids=lambda bad: type(bad).__name__)
def test_a_value_that_is_no_reward_is_found(bad, caplog):
    completions = ["c0", "long" * 100, "c2"]
    function = returning([1, bad, None])
    with pytest.raises(RewardError, match=r"'constant' returned .* for row 1 ") as error:
        score([function], completions=completions)
    assert repr(("long" * 100)[:80]) in str(error.value)
    assert "return a finite number, or None" in str(error.value)
    assert len(str(error.value)) < 400

    skipped = score([function], completions=completions, on_error="skip")
    assert equal(skipped.rewards, [1, None, None])
    assert skipped.num_errors == 1
    assert "'constant' returned" in caplog.text
    assert "1 of 3 rows are not scored by it" in caplog.text

    valued = score([function], completions=completions, on_error="value", error_value=-1)
    assert equal(valued.rewards, [1, -1, None])
    assert valued.num_errors == 1
    assert "1 of 3 rows get -1.0 from it" in caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "returned 1 values, expected 3"),
        ([1.0] * 2, "returned 2 values, expected 3"),
        ([1.0] * 4, "returned 4 values, expected 3"),
        ([], "returned 0 values, expected 3"),
        (1.0, "returned float, not a list"),
        (None, "returned NoneType, not a list"),
        ("abc", "returned str, not a list"),
        ({0: 1, 1: 1, 2: 1}, "returned dict, not a list"),
        ({0.0, 1.0, 2.0}, "returned set, not a list"),
        (torch.tensor(1.0), "returned float, not a list"),
        (torch.ones(1), "returned 1 values, expected 3"),
        (torch.ones(3, 1), r"returned \[1.0\] for row 0"),
    ],
)
def test_a_wrong_number_of_values_is_never_broadcast(values, message):
    with pytest.raises(RewardError, match=f"reward function 'constant' .*{message}"):
        score([returning(values)])
    skipped = score([returning(values), returning([1, 2, 3])], on_error="skip")
    assert equal(skipped.rewards, [1, 2, 3])
    assert equal(skipped.function_rewards["constant"], [None, None, None])
    valued = score([returning(values)], on_error="value", error_value=0.25, weights=[2])
    assert equal(valued.rewards, [0.5, 0.5, 0.5])
    assert skipped.num_errors == valued.num_errors == 3


async def calls_a_task_that_exits(completions):
    async def inner():
        sys.exit(3)

    await asyncio.gather(asyncio.create_task(inner()))


def generator_that_fails(completions):
    yield 1.0
    raise ZeroDivisionError("late")


FAILING = [
    (raising(ZeroDivisionError("division by zero")), ZeroDivisionError),
    (raising(SystemExit(3)), SystemExit),
    (raising_async(ZeroDivisionError("division by zero")), ZeroDivisionError),
    (raising_async(SystemExit(3)), SystemExit),
    (raising_async(asyncio.CancelledError()), asyncio.CancelledError),
    (calls_a_task_that_exits, SystemExit),
    (generator_that_fails, ZeroDivisionError),
]


@pytest.mark.parametrize(("function", "kind"), FAILING)
def test_a_function_that_raises_is_named_and_its_error_kept(function, kind):
    with pytest.raises(RewardError, match=f"'{function.__name__}' raised {kind.__name__}") as error:
        score([returning([1, 2, 3]), function])
    assert isinstance(error.value.__cause__, kind)

    skipped = score([returning([1, 2, 3]), function], on_error="skip")
    assert equal(skipped.rewards, [1, 2, 3])
    assert equal(skipped.function_rewards[function.__name__], [None, None, None])
    assert skipped.num_errors == 3

    valued = score(
        [returning([1, 2, 3]), function], on_error="value", error_value=-1, weights=[1, 10]
    )
    assert equal(valued.rewards, [-9, -8, -7])


@pytest.mark.parametrize("policy", ["raise", "skip", "value"])
@pytest.mark.parametrize("make", [raising, raising_async])
def test_ctrl_c_is_never_swallowed(make, policy):
    coroutines = []

    async def zeros():
        return [0.0] * 3

    def innocent(completions):
        coroutines.append(zeros())
        return coroutines[-1]

    with pytest.raises(KeyboardInterrupt):
        score([innocent, make(KeyboardInterrupt())], on_error=policy)
    # Python warns of a coroutine that is dropped without being awaited or closed.
    assert inspect.getcoroutinestate(coroutines[0]) == inspect.CORO_CLOSED
    assert equal(score([innocent]).rewards, [0, 0, 0])


def test_ctrl_c_while_waiting_stops_the_async_calls():
    stopped = threading.Event()
    caller = threading.current_thread()

    async def slow(completions):
        while sys._current_frames()[caller.ident].f_code.co_name != "wait":
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()

    with pytest.raises(KeyboardInterrupt):
        score([slow], on_error="skip")
    assert stopped.wait(timeout=20)


def test_a_function_written_for_trl_works_unchanged():
    seen = {}

    def trl_reward(
        prompts,
        completions,
        completion_ids,
        answer,
        trainer_state=None,
        log_metric=None,
        log_extra=None,
        **kwargs,
    ):
        seen.update(kwargs, step=trainer_state.global_step, ids=completion_ids)
        contents = [completion[0]["content"] for completion in completions]
        if log_metric:
            log_metric("right_frac", 0.25)
            log_metric("right_frac", 0.75)
        if log_extra:
            log_extra("parsed", contents)
        return [float(c == a) for c, a in zip(contents, answer)]

    from transformers import TrainerState

    chats = [[{"role": "assistant", "content": text}] for text in ("a0", "x", "a1")]
    columns = {"answer": ["a0", "a0", "a1"], "level": [1, 1, 2]}
    state = TrainerState()
    state.global_step = 7
    scores = score([trl_reward], completions=chats, columns=columns, trainer_state=state)
    assert equal(scores.rewards, [1, 0, 1])
    assert seen == {"level": [1, 1, 2], "step": 7, "ids": [[5], [5, 6], [5, 6, 7]]}
    assert scores.metrics == {"right_frac": [0.25, 0.75]}
    assert scores.extra_columns == {"parsed": ["a0", "x", "a1"]}


def test_a_function_gets_the_arguments_that_it_names():
    def short_and_right(completions, answer):
        return [float(a in c and len(c) < 5) for c, a in zip(completions, answer)]

    def of_lengths(completion_ids, *, answer=None, offset=1):
        return [len(ids) + offset for ids in completion_ids]

    def of_nothing():
        return [0, 0, 0]

    scores = score([short_and_right, of_lengths, of_nothing], completions=["a0", "b", "a1 is long"])
    assert equal(scores.function_rewards["short_and_right"], [1, 0, 0])
    assert equal(scores.function_rewards["of_lengths"], [2, 3, 4])


def test_a_column_does_not_replace_what_a_partial_has_bound():
    def compare(completions, answer, **columns):
        return [float(c == a) for c, a in zip(completions, answer)]

    bound = functools.partial(compare, answer=["c0", "c1", "x"])
    assert equal(score([bound]).rewards, [1, 1, 0])


class Longest:
    def __call__(self, completion_ids):
        return [len(ids) for ids in completion_ids]


class AsyncLongest:
    async def __call__(self, completion_ids, **columns):
        await asyncio.sleep(0)
        return [len(ids) for ids in completion_ids]


def scaled(completion_ids, scale):
    return [scale * len(ids) for ids in completion_ids]


async def async_scaled(completion_ids, scale):
    return [scale * len(ids) for ids in completion_ids]


def test_every_kind_of_callable_is_a_reward_function():
    functions = [
        Longest(),
        AsyncLongest(),
        functools.partial(scaled, scale=2),
        functools.partial(async_scaled, scale=3),
        functools.partial(functools.partial(scaled), scale=4),
        lambda completion_ids: [5 * len(ids) for ids in completion_ids],
        Longest().__call__,
    ]
    scores = score(functions)
    expected = {
        "Longest": 1,
        "AsyncLongest": 1,
        "scaled": 2,
        "async_scaled": 3,
        "scaled_2": 4,
        "lambda": 5,
        "__call__": 1,
    }
    assert list(scores.function_rewards) == list(expected)
    for name, scale in expected.items():
        assert equal(scores.function_rewards[name], [scale, 2 * scale, 3 * scale])


def test_names_are_unique_and_an_object_can_choose_its_own():
    def f_2(completions): ...

    def f(completions): ...

    named = Longest()
    named.__name__ = "f"
    assert Scorer([f_2, f, f, named, f]).names == ["f_2", "f", "f_3", "f_4", "f_5"]


def test_async_functions_run_together_after_the_plain_ones():
    events = []
    reached = {}

    def meeting(own, other):
        async def meet(completions):
            events.append("async")
            reached.setdefault(own, asyncio.Event()).set()
            await asyncio.wait_for(reached.setdefault(other, asyncio.Event()).wait(), timeout=20)
            return [1.0] * 3

        return meet

    def plain(completions):
        events.append("plain" if threading.current_thread() is caller else "elsewhere")
        return [1.0] * 3

    caller = threading.current_thread()
    scores = score([meeting("a", "b"), plain, meeting("b", "a")])
    assert equal(scores.rewards, [3, 3, 3])
    assert events == ["plain", "async", "async"]


def test_scoring_works_inside_a_running_loop():
    async def notebook_cell():
        return score([AsyncLongest(), Longest()])

    assert equal(asyncio.run(notebook_cell()).rewards, [2, 4, 6])


def test_a_client_kept_between_calls_stays_on_its_loop():
    loops = []

    async def with_client(completions):
        loops.append(asyncio.get_running_loop())
        return [0.0] * 3

    scorer = Scorer([with_client])
    for _ in range(2):
        scorer(PROMPTS, COMPLETIONS, IDS, COLUMNS)
    assert loops[0] is loops[1]
    assert not loops[0].is_closed()


def test_a_function_that_changes_its_arguments_does_not_change_those_of_others():
    def vandal(prompts, completions, completion_ids, answer, tags):
        prompts[0][0]["content"] = "gone"
        completions[0][0]["content"] = "gone"
        completion_ids[0].append(99)
        tags[1]["list"].append(99)
        answer.clear()
        return [0.0, 0.0]

    seen = {}

    def witness(**given):
        seen.update(given)
        return [0.0, 0.0]

    given = {
        "prompts": [[{"role": "user", "content": "p"}]] * 2,
        "completions": [[{"role": "assistant", "content": "c"}] for _ in range(2)],
        "completion_ids": [[1], [2]],
        "columns": {"answer": ["a", "b"], "tags": [{"list": [1]}, {"list": [2]}]},
    }
    Scorer([vandal, witness, vandal])(**given)
    for source in (seen, {**given, **given["columns"]}):
        assert source["prompts"][0] == [{"role": "user", "content": "p"}]
        assert source["completions"][0] == [{"role": "assistant", "content": "c"}]
        assert source["completion_ids"] == [[1], [2]]
        assert source["answer"] == ["a", "b"]
        assert source["tags"] == [{"list": [1]}, {"list": [2]}]


def needs_solution(completions, solution, answer, threshold=0.5, **columns):
    return [0.0] * len(completions)


def test_a_missing_column_is_named_before_and_at_the_call():
    scorer = Scorer([Longest(), needs_solution, functools.partial(scaled, scale=1), scaled])
    assert scorer.missing_columns(["answer"]) == {
        "needs_solution": ["solution"],
        "scaled_2": ["scale"],
    }
    assert scorer.missing_columns({"answer", "solution", "scale"}) == {}
    with pytest.raises(
        RewardError,
        match=r"'needs_solution' needs the column 'solution', .*\(its columns: answer\)",
    ):
        scorer(PROMPTS, COMPLETIONS, IDS, COLUMNS)
    with pytest.raises(RewardError, match=r"its columns: none"):
        scorer(PROMPTS, COMPLETIONS, IDS, {})


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize(
    "name", ["prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra"]
)
def test_a_column_with_the_name_of_an_argument_is_refused(name, policy):
    scorer = Scorer([Longest()], on_error=policy)
    with pytest.raises(RewardError, match=f"the data has a column '{name}'.*rename the column"):
        scorer(PROMPTS, COMPLETIONS, IDS, {name: [1, 2, 3]})
    with pytest.raises(RewardError, match=f"column '{name}'"):
        scorer.missing_columns([name])


def test_a_column_of_another_length_is_refused():
    with pytest.raises(RewardError, match="'answer' has 2 values for 3 completions"):
        score([Longest()], columns={"answer": [1, 2]})
    with pytest.raises(RewardError, match="'prompts' has 1 values for 3 completions"):
        Scorer([Longest()])(["p"], COMPLETIONS, IDS, {})
    with pytest.raises(RewardError, match="'completion_ids' has 1 values for 3 completions"):
        Scorer([Longest()])(PROMPTS, COMPLETIONS, [[1]], {})


def test_no_rows_give_no_rewards_and_no_call():
    calls = []

    def spy(completions):
        calls.append(completions)
        return []

    scores = Scorer([spy])([], [], [], {"answer": []})
    assert scores.rewards.shape == scores.function_rewards["spy"].shape == (0,)
    assert calls == []


def test_logged_columns_have_a_value_per_row():
    def short(completions, log_extra):
        log_extra("note", ["only one"])
        return [0.0] * 3

    with pytest.raises(
        RewardError,
        match=r"'short' raised ValueError: log_extra\('note'\) got 1 values, expected 3",
    ):
        score([short])


def test_two_functions_can_log_the_same_names():
    def first(completions, log_metric, log_extra):
        log_metric("m", torch.tensor(1.0))
        log_extra("note", (1, 1, 1))
        log_extra("note", [2, 2, 2])
        return [0.0] * 3

    async def second(completions, log_metric, log_extra):
        log_metric("m", 2)
        log_extra("note", [3, 3, 3])
        return [0.0] * 3

    scores = score([first, second])
    assert scores.metrics == {"m": [1.0, 2.0]}
    assert scores.extra_columns == {"note": [2, 2, 2], "second/note": [3, 3, 3]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"functions": []}, "functions is empty"),
        ({"functions": ["gsm8k"]}, "must be callable, not 'gsm8k'"),
        ({"functions": [Longest]}, "Longest is a class; give an instance"),
        (
            {"functions": [scaled], "weights": [1, 2]},
            "weights has 2 values for 1 reward functions: scaled",
        ),
        ({"functions": [scaled], "weights": []}, "weights has 0 values"),
        ({"functions": [scaled], "weights": [math.nan]}, "weights must be finite"),
        ({"functions": [scaled], "weights": [0]}, "weights must be finite and not all 0"),
        (
            {"functions": [scaled], "on_error": "ignore"},
            "on_error must be raise, skip or value, not 'ignore'",
        ),
        ({"functions": [scaled], "error_value": math.inf}, "error_value must be finite"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Scorer(**options)


def test_nothing_is_logged_when_all_is_well(caplog):
    with caplog.at_level(logging.INFO):
        score([Longest(), AsyncLongest()])
    assert caplog.text == ""

"""Rows that are scored while others are being completed get what one call with all would give."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import os
import signal
import sys
import threading
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from runs import make_data, make_module, make_trainer, spread_reward

from lightning_grpo.generation import Sampling, SamplingKey
from lightning_grpo.rewards import RewardError, Scorer, early, per_row
from lightning_grpo.rollout import collect_rollout
from lightning_grpo.scoring import score_completions, start_scoring
from lightning_grpo.types import Completions, PromptBatch

NUM_ROWS = 12
PROMPTS = [f"p{row // 4}" for row in range(NUM_ROWS)]
COMPLETIONS = [f"c{row}" for row in range(NUM_ROWS)]
IDS = [[5] * (row % 3 + 1) for row in range(NUM_ROWS)]
COLUMNS = {"answer": [10 * row for row in range(NUM_ROWS)]}
ENDED = [[7, 3], [11], [0, 1, 2, 4, 5, 6, 8, 10], [9]]  # the order in which rows end


@pytest.fixture(autouse=True)
def call_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no row wait for others."""
    monkeypatch.setattr(early, "_SECONDS_BETWEEN_CALLS", 0.0)


def score(scorer: Scorer, *, ended: Any = ENDED, is_early: bool = True, **changes: Any) -> Any:
    """Score the rows as they end, or all at once; some things may change before the last call."""
    given: dict[str, Any] = {"prompts": PROMPTS, "completions": COMPLETIONS, "completion_ids": IDS}
    if not is_early:
        return scorer(**(given | {"columns": COLUMNS} | changes))
    begun = scorer.start_early(PROMPTS, COLUMNS)
    with begun:
        for rows in ended:
            begun.add(rows, [COMPLETIONS[row] for row in rows], [IDS[row] for row in rows])
    return scorer(**(given | {"columns": COLUMNS} | changes), early=begun)


def assert_same(first: Any, second: Any) -> None:
    assert list(first.function_rewards) == list(second.function_rewards)
    for name, rewards in first.function_rewards.items():
        np.testing.assert_array_equal(rewards.numpy(), second.function_rewards[name].numpy())
    np.testing.assert_array_equal(first.rewards.numpy(), second.rewards.numpy())
    assert first.metrics == second.metrics
    assert first.extra_columns == second.extra_columns
    assert first.num_errors == second.num_errors


class Recorder:
    """A reward of each row by itself that notes which rows it was called with."""

    is_per_row = True

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(self, prompts, completions, completion_ids, answer, log_extra):
        self.calls.append([int(c[1:]) for c in completions])
        log_extra("shown", [f"{p}/{c}" for p, c in zip(prompts, completions)])
        return [None if a == 20 else a + len(ids) / 8 for a, ids in zip(answer, completion_ids)]


@per_row
async def of_lengths(completion_ids, **columns):
    await asyncio.sleep(0)
    return np.array([len(ids) for ids in completion_ids])


def of_all(completions):
    assert len(completions) == NUM_ROWS
    assert threading.current_thread() is threading.main_thread()
    return range(NUM_ROWS)


@per_row
def generated(completions):
    for completion in completions:
        yield float(completion[1:])


@pytest.mark.parametrize("num_threads", [1, 3, 20])
def test_the_result_is_that_of_one_call(num_threads: int):
    recorder = Recorder()
    functions = [of_all, recorder, of_lengths, functools.partial(generated)]
    scorer = Scorer(functions, [1, 0.5, 2, 0.25], num_threads=num_threads)
    found = score(scorer)
    assert sorted(row for rows in recorder.calls for row in rows) == list(range(NUM_ROWS))
    assert len(recorder.calls) >= len(ENDED)
    later = score(scorer, is_early=False)
    assert recorder.calls[-1] == list(range(NUM_ROWS))
    assert_same(found, later)
    assert found.function_rewards["Recorder"][5].item() == 50 + 3 / 8
    assert math.isnan(found.function_rewards["Recorder"][2].item())
    assert found.extra_columns["shown"][4] == "p1/c4"


def test_only_functions_that_say_so_or_are_named_are_called_early():
    def plain(completions):
        assert len(completions) == NUM_ROWS
        return [0.0] * NUM_ROWS

    called = []

    def named(completions):
        called.append(len(completions))
        return [0.0] * len(completions)

    score(Scorer([plain, named], per_row=["named"]))
    assert len(called) > 1 and sum(called) == NUM_ROWS
    called.clear()
    score(Scorer([plain, named], per_row=["named"], num_threads=0))
    assert called == [NUM_ROWS]
    with pytest.raises(ValueError, match=r"per_row names 'other', which is none of \['plain'\]"):
        Scorer([plain], per_row=["other"])
    with pytest.raises(ValueError, match="num_threads must not be negative"):
        Scorer([plain], num_threads=-1)


def failing_at(bad: Any) -> Any:
    """A function that has trouble with row 7 alone."""

    @per_row
    def failing(completions):
        if isinstance(bad, BaseException) and "c7" in completions:
            raise bad
        values = [bad if c == "c7" else 1.0 for c in completions]
        return values[:-1] if bad == "short" and "c7" in completions else values

    return failing


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (ZeroDivisionError("division"), "'failing' raised ZeroDivisionError: division"),
        (SystemExit(3), "'failing' raised SystemExit: 3"),
        ("short", "'failing' returned 11 values, expected 12, one per completion"),
        (math.nan, r"'failing' returned nan for row 7 \(completion 'c7'\)"),
        ("x", r"'failing' returned 'x' for row 7 \(completion 'c7'\)"),
    ],
)
def test_what_goes_wrong_is_what_would_go_wrong_with_all_rows(bad: Any, message: str):
    with pytest.raises(RewardError, match=message) as found:
        score(Scorer([failing_at(bad)]))
    with pytest.raises(RewardError) as expected:
        score(Scorer([failing_at(bad)]), is_early=False)
    assert str(found.value) == str(expected.value)
    assert type(found.value.__cause__) is type(expected.value.__cause__)
    for options in ({"on_error": "skip"}, {"on_error": "value", "error_value": -1}):
        first, second = (
            score(Scorer([failing_at(bad)], **options), is_early=is_early)
            for is_early in (True, False)
        )
        assert_same(first, second)
        assert first.num_errors > 0


def test_a_function_that_fails_in_threads_only_is_called_with_all_rows(caplog):
    @per_row
    def with_alarm(completions):
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # the main thread alone may do this
        return [2.0] * len(completions)

    scorer = Scorer([with_alarm])
    for _ in range(2):
        assert score(scorer).rewards.tolist() == [2.0] * NUM_ROWS
    assert caplog.text.count("'with_alarm' is to score each row by itself, but called with") == 1
    assert "raised ValueError: signal only works in main thread" in caplog.text


def test_a_missing_column_is_named_as_ever():
    @per_row
    def needs_solution(completions, solution):
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match="'needs_solution' needs the column 'solution'"):
        score(Scorer([needs_solution]))


def test_a_metric_is_that_of_all_rows(caplog):
    calls = []

    @per_row
    def with_metric(completions, log_metric):
        calls.append(len(completions))
        log_metric("num_rows", len(completions))
        return [1.0] * len(completions)

    scorer = Scorer([with_metric])
    assert score(scorer).metrics == {"num_rows": [12.0]}
    assert "it logged the metric 'num_rows' of some rows" in caplog.text
    calls.clear()
    assert score(scorer).metrics == {"num_rows": [12.0]}
    assert calls == [12]


def test_a_column_of_some_rows_is_that_of_one_call():
    @per_row
    def with_column(completions, log_extra):
        if "c0" in completions:
            log_extra("note", completions)
        return [1.0] * len(completions)

    assert score(Scorer([with_column])).extra_columns == {"note": COMPLETIONS}


def changed(values: list[Any], **at: Any) -> list[Any]:
    return [at.get(f"row{row}", value) for row, value in enumerate(values)]


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, []),
        ({"completions": changed(COMPLETIONS, row3="c33", row8="c88")}, [33, 88]),
        ({"completion_ids": changed(IDS, row5=[5, 5])}, [5]),
        ({"columns": {"answer": changed(COLUMNS["answer"], row0=1.5)}}, [0]),
        ({"prompts": changed(PROMPTS, row1="q")}, [1]),
        ({"columns": COLUMNS | {"more": COMPLETIONS}}, list(range(NUM_ROWS))),
    ],
)
def test_rows_that_were_changed_are_scored_again_and_no_others(changes: Any, rows: list[int]):
    recorder = Recorder()
    scorer = Scorer([recorder])
    found = score(scorer, **changes)
    assert (recorder.calls[-1] if rows else []) == rows
    assert_same(found, score(scorer, is_early=False, **changes))


def test_fewer_or_other_rows_are_scored_as_they_are():
    recorder = Recorder()
    scorer = Scorer([recorder])
    backwards = {
        "prompts": PROMPTS[::-1],
        "completions": COMPLETIONS[::-1],
        "completion_ids": IDS[::-1],
        "columns": {"answer": COLUMNS["answer"][::-1]},
    }
    fewer = {name: values[:5] for name, values in backwards.items() if name != "columns"}
    fewer["columns"] = {"answer": backwards["columns"]["answer"][:5]}
    for changes in (backwards, fewer):
        assert_same(score(scorer, **changes), score(scorer, is_early=False, **changes))
    assert_same(score(scorer, ended=ENDED[:2]), score(scorer, is_early=False))
    assert_same(score(scorer, ended=[]), score(scorer, is_early=False))


def test_what_is_changed_in_place_is_found():
    @per_row
    def of_contents(completions, info, table):
        return [len(c[0]["content"]) + i["n"] for c, i in zip(completions, info)]

    scorer = Scorer([of_contents])
    chats = [[{"role": "assistant", "content": "ab"}] for _ in range(3)]
    columns = {"info": [{"n": 1}, {"n": 2}, {"n": 3}], "table": [np.zeros(2)] * 3}
    begun = scorer.start_early(["p"] * 3, columns)
    with begun:
        begun.add([0, 1, 2], chats, [[1]] * 3)
    for call in begun.calls[0]:
        call.future.result(timeout=20)
    chats[0][0]["content"] = "longer"
    columns["info"][2]["n"] = 10
    scores = scorer(["p"] * 3, chats, [[1]] * 3, columns, early=begun)
    assert scores.rewards.tolist() == [7.0, 4.0, 12.0]


def test_plain_functions_run_in_as_many_threads_as_asked_for():
    barrier = threading.Barrier(4, timeout=20)

    @per_row
    def meeting(completions):
        barrier.wait()
        return [1.0] * len(completions)

    # All rows end together, and are split over the threads.
    scores = score(Scorer([meeting], num_threads=4), ended=[list(range(NUM_ROWS))])
    assert scores.rewards.tolist() == [1.0] * NUM_ROWS


def test_async_functions_wait_together_whatever_the_threads():
    arrived = []

    @per_row
    async def meeting(completions):
        arrived.extend(completions)
        for _ in range(2000):
            if len(arrived) == NUM_ROWS:
                return [1.0] * len(completions)
            await asyncio.sleep(0.01)
        raise TimeoutError

    scores = score(Scorer([meeting], num_threads=1))
    assert scores.rewards.tolist() == [1.0] * NUM_ROWS


def test_cheap_functions_are_not_called_for_every_row(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(early, "_SECONDS_BETWEEN_CALLS", 60.0)
    recorder = Recorder()
    score(Scorer([recorder], num_threads=1))
    assert recorder.calls == [[row for rows in ENDED for row in rows]]


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_ctrl_c_inside_of_a_function_stops_the_run(kind: str):
    @per_row
    def plain(completions):
        raise KeyboardInterrupt

    @per_row
    async def waiting(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(Scorer([plain if kind == "plain" else waiting], on_error="skip"))


def test_ctrl_c_while_waiting_leaves_nothing_at_work():
    stopped, begun = threading.Event(), []
    caller = threading.current_thread()

    @per_row
    async def slow(completions):
        begun.append(len(completions))
        if len(begun) == 1:
            while sys._current_frames()[caller.ident].f_code.co_name != "wait":
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()

    with pytest.raises(KeyboardInterrupt):
        score(Scorer([slow], on_error="skip"))
    assert stopped.wait(timeout=20)


def test_an_error_in_the_rollout_drops_what_waits():
    goes_on, calls = threading.Event(), []

    @per_row
    def slow(completions):
        calls.append(completions)
        goes_on.wait(timeout=20)
        return [1.0] * len(completions)

    begun = Scorer([slow], num_threads=1).start_early(PROMPTS, COLUMNS)
    with pytest.raises(KeyboardInterrupt), begun:
        for row in range(NUM_ROWS):
            begun.add([row], [COMPLETIONS[row]], [IDS[row]])
        raise KeyboardInterrupt
    goes_on.set()
    for thread in begun.workers._threads:
        thread.join(timeout=20)
        assert not thread.is_alive()
    assert len(calls) <= 1


def test_threads_end_with_the_rollout_and_compute_gradients_only_where_the_caller_does():
    seen = []

    @per_row
    def asking(completions):
        seen.append(torch.is_grad_enabled())
        return [1.0] * len(completions)

    scorer = Scorer([asking])
    before = threading.active_count()
    with torch.no_grad():
        score(scorer)
    assert set(seen) == {False}
    seen.clear()
    score(scorer)
    assert set(seen) == {True}
    for thread in threading.enumerate():
        if thread.name.startswith("rewards-"):
            thread.join(timeout=20)
    assert threading.active_count() <= before + 1  # the event loop of async functions may be new


class Waiting:
    """An engine that does not go on until the first row it has handed out is scored."""

    def __init__(self, is_scored: threading.Event) -> None:
        self.is_scored = is_scored

    def generate(self, prompts, sampling, group_size, *, key, on_finished=None) -> Completions:
        num_rows = len(prompts) * group_size
        ids = torch.tensor([[5, 6, 1]] * num_rows)
        on_finished([1], [[5, 6, 1]])
        assert self.is_scored.wait(timeout=20)
        mask = torch.ones(num_rows, 3, dtype=torch.bool)
        return Completions(ids, mask, torch.zeros(num_rows, 3), torch.zeros(num_rows).bool())


def test_a_row_is_scored_while_others_are_being_completed(char_model: str):
    from transformers import AutoTokenizer

    is_scored, calls = threading.Event(), []

    @per_row
    def scoring(completions, answer):
        calls.append(list(zip(completions, answer)))
        is_scored.set()
        return [1.0] * len(completions)

    tokenizer = AutoTokenizer.from_pretrained(char_model)
    prompts = PromptBatch(["1", "2"], [[4], [5]], {"answer": ["a", "b"]}, [0, 1])
    scorer = Scorer([scoring], num_threads=1)
    begun = start_scoring(scorer, prompts, 2, None)
    with begun:
        rollout = collect_rollout(
            Waiting(is_scored),
            tokenizer,
            prompts,
            Sampling(),
            2,
            key=SamplingKey(0, 0),
            on_completed=begun.add,
        )
    assert score_completions(scorer, rollout, None, begun).rewards.tolist() == [1.0] * 4
    text = tokenizer.decode([5, 6])
    assert calls == [[(text, "a")], [(text, "a"), (text, "b"), (text, "b")]]


def test_nothing_begins_early_under_a_default_dtype_that_is_the_policys():
    prompts = PromptBatch(["1"], [[4]], {}, [0])
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert not start_scoring(Scorer([of_lengths]), prompts, 2, None).functions
    finally:
        torch.set_default_dtype(torch.float32)
    assert start_scoring(Scorer([of_lengths]), prompts, 2, None).functions


class Shouting(L.Callback):
    """Changes some completions before they are scored."""

    def on_rollout_end(self, trainer, module, rollout):
        texts = [t + "77" if i % 3 == 0 else t for i, t in enumerate(rollout.completions)]
        return rollout.replace(completions=texts)


class Rewards(L.Callback):
    """Keeps what came of every rollout, and what was measured."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_rewards_end(self, trainer, module, rollout):
        self.seen.append((rollout.completions, rollout.rewards.tolist()))

    def on_validation_end(self, trainer, module):
        self.seen.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def fit(model: str, folder: str, **reward_options: Any) -> tuple[list[Any], list[int]]:
    """Two iterations with refills and a validation; what was rewarded, and rows of each call."""
    sizes: list[int] = []

    def counted(completions, **columns):
        sizes.append(len(completions))
        return [float(value > 0.7) for value in spread_reward(completions)]

    rewards = Rewards()
    trainer = make_trainer(
        reward=[counted, spread_reward],
        reward_options=reward_options,
        callbacks=[Shouting(), rewards],
        sampling={"max_refills": 1, "function": "counted"},
        group_size=2,
        max_epochs=1,
        default_root_dir=folder,
    )
    L.seed_everything(0)
    data = make_data(val_data=[{"prompt": "12=", "answer": "1"}] * 5)
    trainer.fit(make_module(model), datamodule=data)
    for seen in rewards.seen:
        if isinstance(seen, dict):
            for name in [name for name in seen if name.startswith(("time/", "throughput/"))]:
                del seen[name]
    return rewards.seen, sizes


def test_a_run_is_the_same_with_rows_scored_early(char_model: str, tmp_path):
    early_seen, early_sizes = fit(char_model, str(tmp_path), per_row=["counted"], num_threads=3)
    seen, sizes = fit(char_model, str(tmp_path), per_row=["counted"], num_threads=0)
    assert str(early_seen) == str(seen)
    assert len(seen) > 4  # there was a refill
    assert any(isinstance(x, dict) and "val/reward" in x for x in seen)
    assert max(sizes) == 20 and min(sizes) >= 16
    assert max(early_sizes) < 16


def test_predictions_are_not_scored(char_model: str, tmp_path):
    @per_row
    def never(completions):
        raise AssertionError

    trainer = make_trainer(reward=[never], default_root_dir=str(tmp_path))
    data = make_data(predict_data=[{"prompt": "12="}])
    trainer.predict(make_module(char_model), datamodule=data)


def test_a_run_that_stops_leaves_no_reward_function_at_work(char_model: str, tmp_path, caplog):
    goes_on, calls = threading.Event(), []

    @per_row
    def slow(completions):
        calls.append(len(completions))
        goes_on.wait(timeout=20)
        return [1.0] * len(completions)

    class Stopping(L.Callback):
        def on_rollout_end(self, trainer, module, rollout):
            raise RuntimeError("stopped here")

    trainer = make_trainer(
        reward=[slow],
        reward_options={"num_threads": 1},
        callbacks=[Stopping()],
        default_root_dir=str(tmp_path),
    )
    module = make_module(char_model)
    with caplog.at_level(logging.ERROR), pytest.raises(RuntimeError, match="stopped here"):
        trainer.fit(module, datamodule=make_data())
    goes_on.set()
    for thread in module.early_scores.workers._threads:
        thread.join(timeout=20)
    assert len(calls) <= 1

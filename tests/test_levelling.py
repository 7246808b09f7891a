"""Groups that move between ranks: which, that nothing of them is lost, and what cannot move."""

from __future__ import annotations

import math
import os
import random
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed_runs import on_two_ranks
from test_replay import rollout_of

from lightning_grpo.distributed import gather_rows
from lightning_grpo.levelling import as_bytes, from_bytes, group_tokens, level_over_ranks, swapped
from lightning_grpo.types import Rollout


def totals_of(tokens: list[list[int]], held: list[list[tuple[int, int]]]) -> list[int]:
    return [sum(tokens[rank][index] for rank, index in own) for own in held]


def test_the_swap_that_levels_two_ranks_is_made():
    # 16 against 8 tokens: 6 for 2 makes 12 and 12.
    assert swapped([[9, 6, 1], [2, 3, 3]]) == [[(0, 0), (1, 0), (0, 2)], [(0, 1), (1, 1), (1, 2)]]


def test_ranks_that_are_level_or_cannot_be_levelled_keep_their_groups():
    for tokens in ([[100, 100], [101, 99]], [[50, 50, 1], [50, 50, 2]], [[9], [1]], [[7, 7]]):
        held = swapped(tokens)
        assert held == [[(rank, i) for i in range(len(own))] for rank, own in enumerate(tokens)]


def test_ragged_ranks_come_within_two_percent_and_keep_their_number_of_groups():
    draw = random.Random(0)
    tokens = [
        [200 + sum(min(512, int(draw.expovariate(1 / 200))) for _ in range(8)) for _ in range(16)]
        for _ in range(8)
    ]
    before, held = [sum(own) for own in tokens], swapped(tokens)
    after = totals_of(tokens, held)
    assert max(before) / min(before) > 1.15
    assert max(after) / min(after) < 1.02
    assert sum(after) == sum(before)
    assert [len(own) for own in held] == [16] * 8
    everywhere = sorted(group for own in held for group in own)
    assert everywhere == [(rank, i) for rank in range(8) for i in range(16)]
    moved = sum(source != rank for rank, own in enumerate(held) for source, _ in own)
    assert moved < 32  # of 128: most stay where they are


def test_the_tokens_of_a_group_are_those_that_a_forward_takes():
    rollout = rollout_of([(4, 3, 2), (9, 1, 5), (4, 3, 7)])
    assert group_tokens(rollout, is_packed=True) == [3 + 2 + 7, 1 + 5]
    assert group_tokens(rollout, is_packed=False) == [3 + 2 + 3 + 7, 1 + 5]


def with_columns(rollout: Rollout, **columns: list[Any]) -> Rollout:
    num_rows = len(rollout)
    return rollout.replace(
        prompts=[[{"role": "user", "content": f"{row}"}] for row in range(num_rows)],
        completions=[f"text {row}" for row in range(num_rows)],
        columns=columns,
        rewards=torch.arange(num_rows, dtype=torch.float64),
        function_rewards={"f": torch.full((num_rows,), math.nan, dtype=torch.float64)},
        extra_columns={"note": [None] * num_rows},
    )


def test_rows_travel_with_all_that_they_have():
    rollout = with_columns(rollout_of([(0, 3, 2), (0, 3, 4)]), answer=[("a", 1), {"b": [2.5]}])
    found = from_bytes(as_bytes(rollout))
    for name in ("prompt_ids", "completion_mask", "sampler_logprobs", "group_ids", "rewards"):
        assert torch.equal(getattr(found, name), getattr(rollout, name))
    for name in ("prompts", "completions", "columns", "extra_columns"):
        assert getattr(found, name) == getattr(rollout, name)
    assert found.rewards.dtype == torch.float64 and bool(found.function_rewards["f"].isnan().all())
    assert found.advantages is None


def test_rows_with_objects_that_only_code_could_make_do_not_travel():
    rollout = rollout_of([(0, 3, 2)])
    for thing in (date(2026, 1, 1), lambda: None, Path("x")):
        assert as_bytes(with_columns(rollout, column=[thing])) is None


def exchange_on_this_rank(columns: list[list[Any]]) -> list[dict[str, Any]]:
    """Rank 0 has groups of 40, 30 and 3 tokens, rank 1 of 4, 5 and 6, each of two rows."""
    rank = int(os.environ["LOCAL_RANK"])
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)

    def add(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        torch.distributed.all_reduce(tensor)
        return tensor

    module: Any = SimpleNamespace(
        num_ranks=2,
        global_rank=rank,
        device=torch.device("cpu"),
        policy=SimpleNamespace(is_packing=False),
        tokenizer=SimpleNamespace(pad_token_id=0),
        sum_over_ranks=add,
        gather_rows=lambda values: gather_rows(values, rank, 2, add),
    )
    sizes = [[20, 15, 2], [2, 3, 3]][rank]
    rows = [(3 * rank + i, 1, size - 1) for i, size in enumerate(sizes) for _ in range(2)]
    found = []
    for column in columns:
        rollout = with_columns(rollout_of(rows), answer=[f"{g} {column[rank]}" for g, _, _ in rows])
        if column[rank] == "bad":
            rollout = rollout.replace(columns={"answer": [date(2026, 1, 1)] * len(rows)})
        levelled = level_over_ranks(module, rollout)
        found.append(
            {
                "groups": levelled.group_ids.tolist(),
                "lengths": levelled.completion_mask.sum(1).tolist(),
                "answers": levelled.columns["answer"],
                "rewards": levelled.rewards.tolist(),
            }
        )
    return found


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory) -> list[list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("exchanged")
    return on_two_ranks(exchange_on_this_rank, folder, [["x", "y"], ["x", "bad"]])


def test_two_ranks_exchange_whole_groups(exchanged):
    (first, _), (second, _) = exchanged
    # 37 against 8 tokens in half a group: 15 for 2 makes 24 and 21.
    assert first["groups"] == [0, 0, 2, 2, 3, 3]
    assert second["groups"] == [4, 4, 5, 5, 1, 1]
    assert first["lengths"] == [19, 19, 1, 1, 1, 1]
    assert second["lengths"] == [2, 2, 2, 2, 14, 14]
    assert first["answers"] == ["0 x", "0 x", "2 x", "2 x", "3 y", "3 y"]
    assert second["rewards"] == [2, 3, 4, 5, 2, 3]


def test_what_one_rank_cannot_send_no_rank_does(exchanged):
    (_, first), (_, second) = exchanged
    assert first["groups"] == [0, 0, 1, 1, 2, 2] and second["groups"] == [3, 3, 4, 4, 5, 5]

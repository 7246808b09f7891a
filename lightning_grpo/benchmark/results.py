"""From the reports of steps to the numbers of the tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lightning_grpo.benchmark.regimes import SHAPES, Regime
from lightning_grpo.benchmark.rooflines import (
    Machine,
    ModelCosts,
    Sizes,
    decode_bytes,
    padded_update,
    plain_update,
    rollout_seconds,
    shared_update,
    update_flops,
)
from lightning_grpo.benchmark.turns import Result

PHASES = ("rollout", "reward", "scoring", "forward", "backward", "optimizer", "other")


class Spread(NamedTuple):
    """Of a number over steps."""

    median: float
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    """Median, least and most of some values."""
    return Spread(statistics.median(values), min(values), max(values))


class Row(NamedTuple):
    """The numbers of one contestant in one regime."""

    regime: Regime
    contestant: str
    num_steps: int
    cpu_s: Spread
    """Process CPU time of a step."""
    wall_s: Spread
    samples_per_s: float
    """B / the median step, in the time that counts: process CPU time on a CPU, wall on a GPU."""
    completion_tokens_per_s: float
    """Of the median step."""
    completion_tokens: float
    """Mean length of a completion."""
    speedup: Spread | None
    """Time of this contestant / time of ours, over the pairs of steps that were made by turns;
    None where ours did not take part."""
    phases_s: dict[str, float]
    """Median by phase, in the time that counts."""
    peak_bytes: int
    """Of the process on a CPU, allocated on a GPU."""
    start_bytes: int
    """The same when the first step began: imports, weights."""
    reserved_bytes: int
    """On a GPU, 0 on a CPU."""
    rollout_tokens: float
    """Tokens forwarded to sample, median."""
    update_tokens: float
    """Tokens forwarded with gradients, median."""
    rollout_floor: float
    """Least time of the rollout by the machine's roofline / its time."""
    mbu: float
    """Bytes that decoding has to read / (time of the rollout * bandwidth)."""
    mfu_useful: float
    """Operations of the update without padding and without sharing / (its time * FLOP/s); above 1
    is possible with shared prompts."""
    mfu_hardware: float
    """Operations that the update ran / (its time * FLOP/s)."""


def costs_of(shape: str, weight_bytes: int) -> ModelCosts:
    """What a token costs in a model of a shape.

    Args:
        shape: its name.
        weight_bytes: of a weight in the forward.

    Returns:
        The costs.
    """
    sizes = SHAPES[shape]
    return ModelCosts(
        hidden_size=sizes.hidden_size,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_size=sizes.hidden_size // sizes.num_heads,
        intermediate_size=sizes.intermediate_size,
        vocab_size=sizes.vocab_size,
        weight_bytes=weight_bytes,
    )


def rows_of(results: Sequence[Result], machine: Machine, *, is_cuda: bool) -> list[Row]:
    """The numbers of all contestants of one regime.

    Args:
        results: of the contest.
        machine: its best.
        is_cuda: whether wall time counts, and the forwards are in bfloat16.

    Returns:
        A row for each.
    """
    clock = "wall_s" if is_cuda else "cpu_s"
    ours = next((r for r in results if r.contestant.name == "ours"), None)
    own = None if ours is None else [step[clock] for step in ours.steps]
    return [_row(result, own, machine, is_cuda=is_cuda) for result in results]


def _row(result: Result, ours: list[float] | None, machine: Machine, *, is_cuda: bool) -> Row:
    regime, steps, profiles = result.regime, result.steps, result.profiles
    times = [step["wall_s" if is_cuda else "cpu_s"] for step in steps]
    phase_time = 1 if is_cuda else 0
    step_s = statistics.median(times)
    speedup = None
    if ours is not None:
        speedup = spread([time / own for time, own in zip(times, ours, strict=True)])
    memory = "allocated" if is_cuda else "host"
    costs = costs_of(regime.shape, 2 if is_cuda else 4)

    def phase(step: dict[str, Any], name: str) -> float:
        return float(step["phases"].get(name, (0.0, 0.0))[phase_time])

    def median(value: Callable[[dict[str, Any]], float], of: list[dict[str, Any]]) -> float:
        return statistics.median(map(value, of))

    return Row(
        regime=regime,
        contestant=result.contestant.name,
        num_steps=len(steps),
        cpu_s=spread([step["cpu_s"] for step in steps]),
        wall_s=spread([step["wall_s"] for step in steps]),
        samples_per_s=regime.num_completions / step_s,
        completion_tokens_per_s=statistics.median(
            sum(step["lengths"]) / time for step, time in zip(steps, times, strict=True)
        ),
        completion_tokens=statistics.mean(n for step in steps for n in step["lengths"]),
        speedup=speedup,
        phases_s={name: median(lambda step, n=name: phase(step, n), profiles) for name in PHASES},  # type: ignore[misc]
        peak_bytes=steps[-1]["memory"][memory],
        start_bytes=result.start[memory],
        reserved_bytes=steps[-1]["memory"].get("reserved", 0),
        rollout_tokens=median(lambda step: step["tokens"].get("rollout", 0), steps),
        update_tokens=median(lambda step: step["tokens"].get("forward", 0), steps),
        **_use(result, costs, machine, phase),
    )


def _use(
    result: Result,
    costs: ModelCosts,
    machine: Machine,
    phase: Callable[[dict[str, Any], str], float],
) -> dict[str, float]:
    """How much of the machine was used, medians over steps."""
    regime = result.regime
    found: dict[str, list[float]] = {
        name: [] for name in ("rollout_floor", "mbu", "mfu_useful", "mfu_hardware")
    }
    for step in result.profiles:
        sizes = Sizes(regime.prompt_tokens, regime.group_size, step["lengths"])
        rollout_s = phase(step, "rollout")
        update_s = phase(step, "forward") + phase(step, "backward")
        found["rollout_floor"].append(rollout_seconds(costs, machine, sizes) / rollout_s)
        found["mbu"].append(decode_bytes(costs, sizes) / rollout_s / machine.bytes_per_s)
        useful = update_flops(costs, plain_update(sizes))
        found["mfu_useful"].append(useful / update_s / machine.flops_per_s)
        found["mfu_hardware"].append(
            _ran_flops(result, costs, sizes) / update_s / machine.flops_per_s
        )
    return {name: statistics.median(values) for name, values in found.items()}


def _ran_flops(result: Result, costs: ModelCosts, sizes: Sizes) -> float:
    options = result.contestant.options
    if result.contestant.kind == "trl":
        recomputes = options.get("gradient_checkpointing", True)
        return update_flops(costs, padded_update(sizes), recomputes=recomputes)
    is_padded = options["module"].get("packing") == "off"
    return update_flops(costs, padded_update(sizes) if is_padded else shared_update(sizes))


def columns_of(row: Row) -> dict[str, Any]:
    """A row as columns of a CSV file, numbers unrounded but for noise digits.

    Args:
        row: of a contestant.

    Returns:
        Name -> value.
    """
    columns: dict[str, Any] = dict(row.regime.as_dict())
    for name, value in row._asdict().items():
        if name == "regime":
            continue
        if isinstance(value, Spread):
            for part, number in value._asdict().items():
                columns[f"{name}_{part}"] = _rounded(number)
        elif name == "speedup":
            columns |= {f"speedup_{part}": "" for part in Spread._fields}
        elif isinstance(value, dict):
            columns |= {f"{key}_s": _rounded(number) for key, number in value.items()}
        else:
            columns[name] = _rounded(value)
    return columns


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value

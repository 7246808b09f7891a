"""Stop runs of every kind at every point, in every way, and let another process go on with each.

Each has to end with the weights, moments, metrics, samples and random states of the run that
nothing stopped. The result is written to tests/results/resume.md.

    python tests/resume_matrix.py [case ...]
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
from resume_runs import CASES, EXIT_CODES, NUM_ITERATIONS, Stop, check, whole_run

from lightning_grpo.tools.tiny_model import write_tiny_model

RESULT = Path(__file__).parent / "results" / "resume.md"
NUM_WORKERS = 2
WORDS = {
    "rollout": "while completions are generated",
    "reward": "in the reward function",
    "update": "in a backward pass",
    "hooks": "after a minibatch, in a hook",
    "saved": "after a save, before the row of the metrics",
    "validation": "in a validation",
    "epoch": "at the end of an epoch",
}


def stops_of(seen: dict[str, int], num_ranks: int) -> list[Stop]:
    """The moments of a whole run at which it is stopped, in every way.

    Args:
        seen: how often a whole run came by each moment.
        num_ranks: two processes take long, and are stopped in rollouts and updates only.

    Returns:
        Each moment, of those in the four minibatches of an iteration one in turn.
    """
    stops = []
    for moment in WORDS if num_ranks == 1 else ("rollout", "update"):
        step = seen[moment] // NUM_ITERATIONS if moment in ("update", "hooks") else 1
        numbers = [first + (first // step) % step for first in range(1, seen[moment] + 1, step)]
        stops += [Stop(moment, number, how) for number in numbers for how in EXIT_CODES]
    return stops


def run_stop(model: str, name: str, expected: Path, folder: Path, stop: Stop) -> str:
    """What is wrong with one run that was stopped; empty when nothing is."""
    try:
        return ", ".join(check(model, name, expected, folder, stop))
    except AssertionError as error:
        return str(error)


def run_case(model: str, name: str, folder: Path) -> list[str]:
    """All stops of one kind of run; returns lines of the result."""
    start = time.monotonic()
    expected = whole_run(model, name, folder / name / "whole")
    num_ranks = 1 if CASES[name].strategy == "single" else 2
    stops = stops_of(json.loads((expected / "moments.json").read_text()), num_ranks)
    fork = multiprocessing.get_context("fork")  # from here, where everything is imported
    with concurrent.futures.ProcessPoolExecutor(NUM_WORKERS, mp_context=fork) as workers:
        jobs = {
            workers.submit(run_stop, model, name, expected, folder / name / str(i), stop): stop
            for i, stop in enumerate(stops)
        }
        wrong: dict[Stop, str] = {}
        for number, job in enumerate(concurrent.futures.as_completed(jobs), start=1):
            if job.result():
                wrong[jobs[job]] = job.result()
                print(f"{name}: {jobs[job]}: {job.result()}", flush=True)
            if number % 50 == 0:
                print(f"{name}: {number} of {len(jobs)}", flush=True)
    minutes = (time.monotonic() - start) / 60
    print(f"{name}: {len(stops)} stops, {len(wrong)} wrong, {minutes:.1f} minutes", flush=True)
    lines = []
    for moment, words in WORDS.items():
        of_moment = [stop for stop in stops if stop.moment == moment]
        if not of_moment:
            continue
        counts = []
        for how in EXIT_CODES:
            own = [stop for stop in of_moment if stop.how == how]
            counts.append(f"{sum(stop not in wrong for stop in own)} of {len(own)}")
        lines.append(f"| {name} | {words} | {' | '.join(counts)} |")
    return lines


def main() -> None:
    """Run the cases that the command line names, or all."""
    torch.set_num_threads(1)
    names = sys.argv[1:] or list(CASES)
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder) / "model")
        write_tiny_model(
            model,
            characters="0123456789= abcdefghijklmnopqrstuvwxyz",
            hidden_size=32,
            intermediate_size=64,
            num_layers=2,
            num_heads=2,
            max_positions=64,
        )
        heads = ["run", "stopped", "SIGTERM", "SIGKILL", "exception"]
        table = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for name in names:
            table += run_case(model, name, Path(folder))
    print("\n".join(table))
    if names == list(CASES):
        RESULT.write_text(INTRODUCTION + "\n".join(table) + "\n", encoding="utf-8")


INTRODUCTION = f"""# Runs that are stopped and resumed

Made by `make matrix`: runs of 12 iterations (24 optimizer steps, 3 epochs, a validation after each)
are stopped at every such moment and resumed in another process. The table says how many of them
end with the weights, moments, schedules, counters, random states, samples and rows of the metrics,
times apart, of the run that nothing stopped, bit for bit. torch {torch.__version__},
{platform.machine()}, one thread; ddp and fsdp2 on two processes with gloo.

"""

if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()

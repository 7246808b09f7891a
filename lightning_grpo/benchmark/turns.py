"""Contestants in processes of their own, which make a step by turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from lightning_grpo.benchmark.regimes import Regime

ContestantName = Literal["ours", "stand_in", "trl_best", "trl_default", "trl_cb"]
_NUM_PROFILED = 2


@dataclass(frozen=True)
class Contestant:
    """Who takes part, and with which options.

    Args:
        name: in the tables.
        kind: this package, or TRL.
        meaning: what it is, for the tables.
        options: module and rollout of ours, of GRPOConfig for TRL.
    """

    name: str
    kind: Literal["ours", "trl"]
    meaning: str
    options: dict[str, Any] = field(default_factory=dict)

    def options_for(self, regime: Regime) -> dict[str, Any]:
        """Its options, with the size of a training forward where the regime has one.

        Args:
            regime: sizes.

        Returns:
            Options of `train_ours` or `train_trl`.
        """
        rows = regime.rows_per_forward
        if rows is None or self.kind == "trl":
            return self.options
        tokens = rows * (regime.prompt_tokens + regime.completion_tokens)
        if self.options["module"].get("packing") != "off":
            tokens -= (rows - rows // regime.group_size) * regime.prompt_tokens
        return self.options | {"module": self.options["module"] | {"microbatch_tokens": tokens}}


CONTESTANTS: dict[str, Contestant] = {
    contestant.name: contestant
    for contestant in (
        Contestant("ours", "ours", "this package, its defaults", {"module": {}, "rollout": {}}),
        Contestant(
            "stand_in",
            "ours",
            "not TRL: this package through generate of transformers, each row with its prompt and "
            "padding, as TRL does it at its best settings",
            {"module": {"packing": "off"}, "rollout": {"engine": "transformers"}},
        ),
        Contestant(
            "trl_best",
            "trl",
            "TRL without vLLM, activation checkpointing off",
            {"gradient_checkpointing": False},
        ),
        Contestant("trl_default", "trl", "TRL without vLLM, activation checkpointing on"),
        Contestant(
            "trl_cb",
            "trl",
            "TRL without vLLM, continuous batching of transformers, activation checkpointing off",
            {"gradient_checkpointing": False, "use_transformers_continuous_batching": True},
        ),
    )
}


@dataclass
class Result:
    """What a contestant's steps took in one regime."""

    contestant: Contestant
    regime: Regime
    start: dict[str, int]
    """Peak memory when the first step began, in bytes."""
    steps: list[dict[str, Any]]
    """Reports of the timed steps, in order."""
    profiles: list[dict[str, Any]]
    """Reports whose phases count: those steps, or on a GPU further ones."""


class Worker:
    """A process that does a job: a context whose end stops it.

    Args:
        job: as the worker takes it.
        folder: new, for the job and what the process writes.
    """

    def __init__(self, job: dict[str, Any], folder: Path) -> None:
        folder.mkdir(parents=True)
        self.name = job.get("name", job["kind"])
        self.log = folder / "stderr.txt"
        file = folder / "job.json"
        file.write_text(json.dumps(job | {"work": str(folder)}), encoding="utf-8")
        self._log = self.log.open("w", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lightning_grpo.benchmark.worker", str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | worker_environment(job["num_threads"]),
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        if kind is not None:
            self.process.kill()
        with suppress(BrokenPipeError):  # it has ended already
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self._log.close()

    def step(self, word: str) -> Any:
        """Ask for a step and wait for its report."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # that there is no report says why
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
        return self.report()

    def report(self) -> Any:
        """Wait for a report.

        Raises:
            ValueError: the process ended instead, and how.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        code = self.process.wait()
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1] if lines else "it printed nothing"
        raise ValueError(f"benchmark job {self.name} ended with exit code {code}: {last}")


def worker_environment(num_threads: int) -> dict[str, str]:
    """Variables that keep a worker to its threads and off the network."""
    return {
        "OMP_NUM_THREADS": str(num_threads),
        "MKL_NUM_THREADS": str(num_threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }


def run_job(job: dict[str, Any], folder: Path) -> Any:
    """Do a job that reports once.

    Args:
        job: as the worker takes it.
        folder: new.

    Returns:
        Its report.
    """
    with Worker(job, folder) as worker:
        return worker.report()


def run_by_turns(
    contestants: Sequence[Contestant],
    regime: Regime,
    model: Path,
    work: Path,
    *,
    num_warmup: int,
    num_steps: int,
    num_threads: int,
    is_cuda: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Let contestants make a step by turns, all of them alive from the first to the last.

    Args:
        contestants: who takes part, in the order of their turns.
        regime: sizes of a step.
        model: folder of the weights.
        work: new folder for their files.
        num_warmup: steps of each that are not counted.
        num_steps: steps of each that are.
        num_threads: of each.
        is_cuda: whether steps of their own are made for the profile, because the phases have to
            be synchronised.
        progress: told what is going on.

    Returns:
        A result for each.
    """
    num_profiled = _NUM_PROFILED if is_cuda else 0
    total = num_warmup + num_steps + num_profiled
    with ExitStack() as stack:
        workers = []
        for contestant in contestants:
            job = {
                "name": contestant.name,
                "kind": contestant.kind,
                "regime": regime.as_dict(),
                "folder": str(model),
                "num_steps": total + 1,  # the last one is asked for and never made
                "num_threads": num_threads,
                "options": contestant.options_for(regime),
            }
            workers.append(stack.enter_context(Worker(job, work / contestant.name)))
        progress(f"{regime.label}: loading")
        results = [
            Result(contestant, regime, worker.report()["memory"], [], [])
            for contestant, worker in zip(contestants, workers, strict=True)
        ]
        words = ["step"] * (num_warmup + num_steps) + ["profile"] * num_profiled
        for number, word in enumerate(words):
            for result, worker in zip(results, workers, strict=True):
                progress(f"{regime.label}: step {number + 1} of {total}, {result.contestant.name}")
                report = worker.step(word)
                if word == "profile":
                    result.profiles.append(report)
                elif number >= num_warmup:
                    result.steps.append(report)
        for result in results:
            result.profiles = result.profiles or result.steps
        return results


def names_of(contestants: Iterable[Contestant]) -> str:
    """Their names and what they are, a line each, in Markdown."""
    return "\n".join(f"- {contestant.name}: {contestant.meaning}" for contestant in contestants)

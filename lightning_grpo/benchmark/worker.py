"""One job in a process of its own: `python -m lightning_grpo.benchmark.worker JOB.json`.

A contestant makes one step for each line of its standard input and reports each on its standard
output; other jobs report once. What libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

import torch

from lightning_grpo.benchmark.clock import StepClock
from lightning_grpo.benchmark.machine import machine_name, measure_machine
from lightning_grpo.benchmark.regimes import Regime
from lightning_grpo.console import quiet_libraries


def main(job: dict[str, Any], reports: TextIO) -> None:
    """Do a job.

    Args:
        job: kind (ours, trl, parity, sampler or machine), num_threads, and what the kind takes:
            regime, folder of the model, work for files, num_steps and options of a contestant.
        reports: gets JSON lines.
    """
    torch.set_num_threads(job["num_threads"])
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = job["kind"]
    # Each process pays for its own imports only: they count in its peak memory.
    if kind == "machine":
        report: Any = {"name": machine_name(device), "device": device.type}
        report |= measure_machine(device)._asdict()
    elif kind == "parity":
        from lightning_grpo.benchmark.parity import compare

        report = compare(*_paths(job), device, job["dtype"])
    elif kind == "sampler":
        from lightning_grpo.benchmark.sampler_gap import sampler_gaps

        folder, _, regime = _paths(job)
        report = [gap._asdict() for gap in sampler_gaps(folder, regime, device)]
    else:
        clock = StepClock(sys.stdin, reports, device)
        _train(job, clock)
        return
    reports.write(json.dumps(report) + "\n")


def _paths(job: dict[str, Any]) -> tuple[Path, Path, Regime]:
    return Path(job["folder"]), Path(job["work"]), Regime(**job["regime"])


def _train(job: dict[str, Any], clock: StepClock) -> None:
    folder, work, regime = _paths(job)
    if job["kind"] == "ours":
        from lightning_grpo.benchmark.ours import train_ours

        train_ours(clock, regime, folder, work, num_steps=job["num_steps"], **job["options"])
    else:
        from lightning_grpo.benchmark.trl_trainer import train_trl

        train_trl(clock, regime, folder, work, num_steps=job["num_steps"], **job["options"])


if __name__ == "__main__":
    quiet_libraries()
    # What is printed must not mix with the reports.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as lines:
        os.dup2(2, 1)
        main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), lines)

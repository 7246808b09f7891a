"""One contestant in its own process: `python -m lightning_grpo.benchmark.worker JOB.json`.

It makes one step for each line of its standard input, and reports each on its standard output;
what libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from lightning_grpo.benchmark.clock import StepClock
from lightning_grpo.benchmark.workload import Regime


def main(job: dict[str, Any]) -> None:
    """Train as one contestant.

    Args:
        job: kind (ours or trl), regime, folder, work, num_steps, num_threads, options.
    """
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(job["num_threads"])
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = StepClock(sys.stdin, reports, device)
    regime = Regime(**job["regime"])
    folder, work = Path(job["folder"]), Path(job["work"])
    # Each contestant pays for its own imports only.
    if job["kind"] == "ours":
        from lightning_grpo.benchmark.ours import train_ours

        train_ours(clock, regime, folder, work, num_steps=job["num_steps"], **job["options"])
    else:
        from lightning_grpo.benchmark.trl_trainer import train_trl

        train_trl(clock, regime, folder, work, num_steps=job["num_steps"], **job["options"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))

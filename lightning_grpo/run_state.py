"""Where a run stands: counters that are saved, and the phase that is shown."""

from __future__ import annotations

import os
from dataclasses import dataclass, field


def global_seed() -> int:
    """The seed of `seed_everything`; 0 when nothing was seeded."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


@dataclass
class Counters:
    """What has been done so far, over all ranks; saved with every checkpoint."""

    iterations: int = 0
    """Rollouts that were made and used up."""
    optimizer_steps: int = 0
    """Steps that moved the weights; `trainer.global_step` counts skipped ones too."""
    skipped_steps: int = 0
    """Steps that did not happen because a loss or a gradient was not finite."""
    completions: int = 0
    """Completions that were sampled for training."""
    tokens: int = 0
    """Completion tokens that were sampled for training."""
    rollbacks: int = 0
    """Returns to the old policy's weights."""


@dataclass
class Phase:
    """What the run is doing now, for the progress bar, and the time spent so far."""

    name: str = "starting"
    num_done: int = 0
    num_total: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """Phase -> seconds spent in it since the start of this process."""

    def enter(self, name: str, num_total: int = 0) -> None:
        """Begin a phase of `num_total` parts; 0 when it has no parts to count."""
        self.name, self.num_done, self.num_total = name, 0, num_total

    def advance(self, num_done: int, num_total: int) -> None:
        """Say how many parts of the phase are done."""
        self.num_done, self.num_total = num_done, num_total

    def spend(self, name: str, seconds: float) -> None:
        """Book time on a phase."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def __str__(self) -> str:
        return f"{self.name} {self.num_done}/{self.num_total}" if self.num_total else self.name

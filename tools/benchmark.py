"""The training step against TRL's, by turns in one run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from lightning_grpo.benchmark.parity import problems_of
from lightning_grpo.benchmark.regimes import (
    AXES,
    Length,
    Preset,
    Regime,
    ShapeName,
    preset_regimes,
    regimes_of,
)
from lightning_grpo.benchmark.report import Report, console_table
from lightning_grpo.benchmark.results import rows_of
from lightning_grpo.benchmark.rooflines import Machine
from lightning_grpo.benchmark.turns import (
    CONTESTANTS,
    Contestant,
    ContestantName,
    run_by_turns,
    run_job,
)
from lightning_grpo.benchmark.workload import write_model

# The gate and the gap need a model and a length, not a large batch.
_MOST_CHECKED_TOKENS = 64
_PACKAGES = ("torch", "transformers", "lightning", "trl")


# The defaults of the options that a preset takes the place of.
_DEFAULT_AXES = ("tiny", "fixed", 128, 64, 8, 64)


def benchmark(
    preset: Preset | None = None,
    shape: ShapeName | list[ShapeName] = "tiny",
    length: Length | list[Length] = "fixed",
    prompt_tokens: int | list[int] = 128,
    completion_tokens: int | list[int] = 64,
    group_size: int | list[int] = 8,
    num_completions: int | list[int] = 64,
    mean_tokens: int = 30,
    rows_per_forward: int | None = None,
    contestants: list[ContestantName] | None = None,
    num_steps: int = 7,
    num_warmup: int = 2,
    num_threads: int = 1,
    bandwidth_gb_per_s: float | None = None,
    compute_gflop_per_s: float | None = None,
    output: str = "runs/benchmark",
) -> None:
    """Measure a whole training step of this package and of TRL, by turns in one run.

    Each contestant trains in a process of its own, through its real training loop, from the same
    random weights on the same prompts. First a gate: on one frozen batch both must give the same
    log-probs, loss and gradient norm, or the benchmark stops. On a machine with a CUDA GPU all
    runs there in bf16 mixed precision and wall time counts; on a CPU in float32, and process CPU
    time counts, which neighbours disturb less. Where several options are lists, such as
    `--prompt_tokens [64,256]`, each value is combined with each other.

    Args:
        preset: a set of regimes in place of the lists: cpu is the published table, cuda that of
            a GPU, growth changes one size at a time.
        shape: models by size: tiny has 0.9M parameters, 30m 30M, 0.5b those of Qwen2.5-0.5B.
        length: of completions: all of completion_tokens, or ended by a random EOS before.
        prompt_tokens: P, of every prompt.
        completion_tokens: C, the longest completion.
        group_size: G, completions per prompt.
        num_completions: B, completions per step, a multiple of G.
        mean_tokens: mean length of completions of variable length, were C unbounded.
        rows_per_forward: completions of one forward with gradients, the same for all contestants,
            a multiple of G that divides B; null leaves this package its default and gives TRL all
            B at once.
        contestants: who takes part; ours, trl_best and trl_default when null, and ours and
            stand_in where TRL is not installed. trl_cb is TRL with continuous batching.
        num_steps: timed steps of each; 5 or more make a figure.
        num_warmup: steps of each before those.
        num_threads: of each process on a CPU.
        bandwidth_gb_per_s: of the device's memory, in units of 1e9 bytes; measured when null.
        compute_gflop_per_s: of the device's matrix products; measured when null.
        output: folder for benchmark.md and benchmark.csv, which hold what is done so far.
    """
    check_counts(num_steps, num_warmup, num_threads)
    for name, rate in (
        ("bandwidth_gb_per_s", bandwidth_gb_per_s),
        ("compute_gflop_per_s", compute_gflop_per_s),
    ):
        if rate is not None and not rate > 0:
            raise ValueError(f"{name} must be above 0, got {rate}")
    axes = (shape, length, prompt_tokens, completion_tokens, group_size, num_completions)
    if preset is None:
        regimes = regimes_of(axes, mean_tokens=mean_tokens, rows_per_forward=rows_per_forward)
    elif axes == _DEFAULT_AXES and rows_per_forward is None:
        regimes = preset_regimes(preset)
    else:
        raise ValueError(
            f"preset {preset} has sizes of its own: leave out {', '.join(AXES)}, rows_per_forward"
        )
    chosen = choose_contestants(contestants)
    folder = Path(output)
    console = Console(highlight=False)
    with (
        tempfile.TemporaryDirectory(prefix="benchmark_") as work,
        console.status("measuring the machine") as status,
    ):
        jobs = Jobs(Path(work), num_threads, status.update)
        report = jobs.first_report(chosen, regimes[0], bandwidth_gb_per_s, compute_gflop_per_s)
        report.num_warmup = num_warmup
        for regime in regimes:
            results = run_by_turns(
                chosen,
                regime,
                jobs.model_of(regime),
                jobs.new_folder("contest"),
                num_warmup=num_warmup,
                num_steps=num_steps,
                num_threads=num_threads,
                is_cuda=report.is_cuda,
                progress=status.update,
            )
            report.rows += rows_of(results, report.machine, is_cuda=report.is_cuda)
            report.write(folder)
        report.gaps = jobs.sampler_gaps(regimes[0])
        report.write(folder)
    console.print(console_table(report.rows))
    console.print(f"written to {folder / 'benchmark.md'} and {folder / 'benchmark.csv'}")


class Jobs:
    """Runs the jobs of a benchmark that are no contest, and keeps the models they share.

    Args:
        work: empty folder.
        num_threads: of a job.
        progress: told what is going on.
    """

    def __init__(self, work: Path, num_threads: int, progress: Callable[[str], None]) -> None:
        self.work = work
        self.num_threads = num_threads
        self.progress = progress
        self._models: dict[tuple[str, str, int], Path] = {}

    def new_folder(self, name: str) -> Path:
        """A path under the working folder that does not exist yet."""
        return self.work / f"{name}_{len(list(self.work.iterdir()))}"

    def model_of(self, regime: Regime) -> Path:
        """The folder of the weights that a regime starts from; one for all that can share it."""
        key = (regime.shape, regime.length, regime.mean_tokens)
        if key not in self._models:
            self.progress(f"writing the {regime.shape} model")
            folder = self.new_folder("model")
            write_model(folder, regime)
            self._models[key] = folder
        return self._models[key]

    def first_report(
        self,
        contestants: list[Contestant],
        regime: Regime,
        bandwidth_gb_per_s: float | None,
        compute_gflop_per_s: float | None,
    ) -> Report:
        """Measure the machine and pass the gate.

        Args:
            contestants: who takes part.
            regime: whose model goes through the gate.
            bandwidth_gb_per_s: in place of what is measured.
            compute_gflop_per_s: in place of what is measured.

        Returns:
            A report without rows.

        Raises:
            ValueError: ours and TRL do not compute the same.
        """
        job = {"kind": "machine", "num_threads": self.num_threads}
        found = run_job(job, self.new_folder("machine"))
        is_cuda = found["device"] == "cuda"
        machine = Machine(
            bandwidth_gb_per_s * 1e9 if bandwidth_gb_per_s else found["bytes_per_s"],
            compute_gflop_per_s * 1e9 if compute_gflop_per_s else found["flops_per_s"],
        )
        packages = [name for name in _PACKAGES if find_spec(name)]
        report = Report(
            machine_name=found["name"],
            is_cuda=is_cuda,
            machine=machine,
            versions={name: version(name) for name in packages},
            num_threads=self.num_threads,
            num_warmup=0,
            contestants=contestants,
            gate=None,
        )
        if any(contestant.kind == "trl" for contestant in contestants):
            self.progress("gate: ours and TRL on one frozen batch")
            job = self._checking(regime) | {"kind": "parity", "dtype": report.dtype}
            report.gate = run_job(job, self.new_folder("gate"))
            problems = problems_of(report.gate or {}, report.dtype)
            if problems:
                raise ValueError(
                    "ours and TRL do not compute the same on one frozen batch, so their times "
                    f"cannot be compared: {'; '.join(problems)}"
                )
        return report

    def sampler_gaps(self, regime: Regime) -> list[dict[str, object]]:
        """How far each engine's log-probs are from the training forward's."""
        self.progress("sampler against trainer")
        found: list[dict[str, object]] = run_job(
            self._checking(regime) | {"kind": "sampler"}, self.new_folder("sampler")
        )
        return found

    def _checking(self, regime: Regime) -> dict[str, object]:
        """A job on a short version of a regime, with a model whose completions do not end."""
        sizes = regime.as_dict() | {"length": "fixed", "rows_per_forward": None}
        for name in ("prompt_tokens", "completion_tokens"):
            sizes[name] = min(sizes[name], _MOST_CHECKED_TOKENS)
        return {
            "regime": sizes,
            "folder": str(self.model_of(Regime(**sizes))),
            "num_threads": self.num_threads,
        }


def check_counts(num_steps: int, num_warmup: int, num_threads: int) -> None:
    """Refuse counts that measure nothing."""
    for name, value, least in (
        ("num_steps", num_steps, 1),
        ("num_warmup", num_warmup, 0),
        ("num_threads", num_threads, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    cores = os.cpu_count() or 1
    if num_threads > cores:
        raise ValueError(f"num_threads is {num_threads}, but this machine has {cores} cores")


def choose_contestants(names: list[ContestantName] | None) -> list[Contestant]:
    """The contestants of these names, or those that can take part here.

    Args:
        names: asked for.

    Returns:
        At least one.

    Raises:
        ValueError: TRL is asked for and not installed, a name comes twice, or there is none.
    """
    has_trl = find_spec("trl") is not None
    if names is None:
        names = ["ours", "trl_best", "trl_default"] if has_trl else ["ours", "stand_in"]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"contestants must be one or more different names, got {names}")
    chosen = [CONTESTANTS[name] for name in names]
    if not has_trl and any(contestant.kind == "trl" for contestant in chosen):
        raise ValueError(
            "TRL is not installed: pip install 'lightning-grpo[bench]', or leave it out with "
            "--contestants '[ours, stand_in]'"
        )
    return chosen

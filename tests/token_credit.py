"""`make credit`: does credit per token beat one advantage for the whole completion?

The task is digits moved on by three (tasks/token_credit.py), whose reward is the number of right
digits. All arms begin with the same cold-started policy, see the same prompts, and get the same
number of completions, those of a critic's warm-up included. A learning rate, and the lambda of PPO,
are picked for each arm on other seeds than those reported. The critic is a copy of the policy that
has everything to learn, or a reward model that was fitted to the same reward on parts of answers,
as is usual where the reward is a model. One core, about 15 minutes.
"""

from __future__ import annotations

import csv
import logging
import math
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from runs import make_data, make_trainer
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from lightning_grpo.algorithms import GRPO, PPO
from lightning_grpo.callbacks import ColdStart
from lightning_grpo.critic import CriticSettings
from lightning_grpo.module import GRPOModule
from lightning_grpo.tasks import ShiftedDigits, right_digits
from lightning_grpo.tools.tiny_model import write_tiny_model

RESULTS = Path(__file__).parent / "results"
NUM_DIGITS = 16
PROMPTS, GROUP_SIZE, ITERATIONS = 2, 4, 60
COLD_START_STEPS = 70
LAST = 5  # iterations that the final value is the mean of
TUNING_SEEDS = (100, 101, 102)
SEEDS = (0, 1, 2, 3, 4)
T_95 = 2.776  # of Student's t with 4 degrees of freedom
GRID = (3e-4, 1e-3, 3e-3)
FACTOR = 3.0  # by which the grid grows where its best rate is at an edge
REWARD_MODEL_STEPS = 1500


@dataclass(frozen=True)
class Arm:
    """What is compared.

    Args:
        name: in the tables.
        lambdas: to pick gae_lambda from; none for GRPO.
        scale: of GRPO's advantages.
        has_model: the critic begins as the reward model, and not as the policy.
    """

    name: str
    lambdas: tuple[float, ...] = ()
    scale: Any = "std"
    has_model: bool = True


BEST = "ppo, lambda < 1, critic from the reward model"
ARMS = (
    Arm("grpo"),
    Arm("grpo, no std", scale="none"),
    Arm("ppo, lambda 1, critic from the reward model", (1.0,)),
    Arm(BEST, (0.5, 0.8)),
    Arm("ppo, lambda 0.9, new critic", (0.9,), has_model=False),
)


@dataclass(frozen=True)
class Result:
    """One run."""

    arm: str
    gae_lambda: float | None
    learning_rate: float
    seed: int
    mean: float
    """Right digits over all iterations: the area under the curve."""
    final: float
    seconds: float


class Rewards(L.Callback):
    """Keeps the mean reward of each iteration."""

    def __init__(self) -> None:
        self.curve: list[float] = []

    def on_iteration_end(self, trainer: L.Trainer, module: GRPOModule, rollout: Any) -> None:
        self.curve.append(float(trainer.callback_metrics["reward/mean"]))


def write_policy(folder: Path) -> None:
    """Configuration and tokenizer of a policy of 84,000 parameters."""
    write_tiny_model(
        str(folder),
        characters="0123456789=",
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        max_positions=64,
        weights=False,
    )


def train_reward_model(policy: Path, folder: Path) -> float:
    """Fit a model of the policy's size to the reward of every part of made-up answers.

    Args:
        policy: folder of its configuration and tokenizer.
        folder: where to write the model.

    Returns:
        Correlation of what each digit adds to its output with whether the digit is right.
    """
    tokenizer = AutoTokenizer.from_pretrained(policy)
    config = AutoConfig.from_pretrained(policy)
    config.num_labels = 1
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    generator = torch.Generator().manual_seed(0)
    zero, equals = tokenizer.convert_tokens_to_ids(["0", "="])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, REWARD_MODEL_STEPS)

    def predict(num_rows: int) -> tuple[Tensor, Tensor]:
        digits, is_right, guesses = made_up_answers(num_rows, generator)
        ids = torch.cat([digits + zero, torch.full((num_rows, 1), equals), guesses + zero], 1)
        hidden = model.base_model(input_ids=ids).last_hidden_state[:, NUM_DIGITS:]
        target = torch.cat([torch.zeros(num_rows, 1), is_right.float().cumsum(1)], 1)
        return model.score(hidden)[..., 0], target

    for _ in range(REWARD_MODEL_STEPS):
        predicted, target = predict(32)
        (predicted - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.no_grad():
        predicted, target = predict(256)
    steps = torch.stack([predicted.diff(dim=1).flatten(), target.diff(dim=1).flatten()])
    return float(torch.corrcoef(steps)[0, 1])


def made_up_answers(num_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Digits, whether each answer digit is right, and the answer digits, (B, T) each."""
    shape = (num_rows, NUM_DIGITS)
    digits = torch.randint(10, shape, generator=generator)
    right = (digits + 3) % 10
    skill = torch.rand(num_rows, 1, generator=generator)
    knows = torch.rand(shape, generator=generator) < skill
    guesses = torch.where(knows, right, torch.randint(10, shape, generator=generator))
    return digits, guesses == right, guesses


def train(arm: Arm, gae_lambda: float | None, rate: float, seed: int, folder: Path) -> Result:
    """One run of the trainer.

    Args:
        arm: what to run.
        gae_lambda: of PPO.
        rate: learning rate of the policy.
        seed: of weights, prompts and draws.
        folder: with the policy's configuration and the reward model.
    """
    rewards = Rewards()
    is_ppo = gae_lambda is not None

    def optimizer(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)

    start = time.perf_counter()
    L.seed_everything(seed, verbose=False)
    demonstrations = ShiftedDigits(4096, NUM_DIGITS, seed=1)
    cold_start = ColdStart(
        demonstrations, num_steps=COLD_START_STEPS, learning_rate=2e-3, seed=seed
    )
    trainer = make_trainer(
        reward=[right_digits],
        group_size=GROUP_SIZE,
        max_completion_tokens=NUM_DIGITS,
        rollout={"num_val_samples": 1, "seed": seed},
        switch={"algorithm": "ppo" if is_ppo else "grpo"},
        callbacks=[cold_start, rewards],
        max_epochs=-1,
        max_steps=ITERATIONS,
        gradient_clip_val=1.0,
    )
    module = GRPOModule(
        str(folder / "policy"),
        init="random",
        beta=0.0,
        optimizer=optimizer,
        num_warmup_steps=5,
        **algorithm_options(arm, gae_lambda, folder),
    )
    rows = ShiftedDigits(4096, NUM_DIGITS, seed=2)
    trainer.fit(module, datamodule=make_data(rows, prompts_per_iteration=PROMPTS, shuffle=True))
    curve = rewards.curve
    assert len(curve) == ITERATIONS
    mean, final = statistics.mean(curve), statistics.mean(curve[-LAST:])
    return Result(arm.name, gae_lambda, rate, seed, mean, final, time.perf_counter() - start)


def algorithm_options(arm: Arm, gae_lambda: float | None, folder: Path) -> dict[str, Any]:
    """The options of the module that differ between the arms."""
    if gae_lambda is None:
        return {"algorithm": GRPO(scale=arm.scale, reduction="token")}
    # One from a reward model has much to lose; a new one has everything to learn, and time for it.
    critic = CriticSettings(
        form="separate",
        name_or_path=str(folder / "reward_model") if arm.has_model else None,
        learning_rate=1e-4 if arm.has_model else 1e-3,
        num_warmup_iterations=0 if arm.has_model else 10,
    )
    return {"ppo": PPO(gae_lambda=gae_lambda, value_clip=None), "critic": critic}


def pick(arm: Arm, folder: Path, done: list[Result]) -> tuple[float | None, float]:
    """Lambda and learning rate with the best mean reward on the tuning seeds.

    Lambda is picked at the middle of the grid, the rate for that lambda; the grid grows until the
    best rate is not at its edge.
    """

    def measure(gae_lambda: float | None, rate: float) -> float:
        runs = [train(arm, gae_lambda, rate, seed, folder) for seed in TUNING_SEEDS]
        done.extend(runs)
        mean = statistics.mean(run.mean for run in runs)
        print(f"{arm.name}  lambda {gae_lambda}  rate {rate:.1g}  {mean:.2f}")
        return mean

    middle = GRID[1]
    at_middle = {gae_lambda: measure(gae_lambda, middle) for gae_lambda in arm.lambdas or (None,)}
    gae_lambda = max(at_middle, key=lambda value: at_middle[value])
    means = {middle: at_middle[gae_lambda]}
    means |= {rate: measure(gae_lambda, rate) for rate in GRID if rate != middle}
    while True:
        best = max(means, key=lambda rate: means[rate])
        if best not in (min(means), max(means)):
            return gae_lambda, best
        rate = best * (FACTOR if best == max(means) else 1 / FACTOR)
        means[rate] = measure(gae_lambda, rate)


def paired(first: list[float], second: list[float]) -> str:
    """Mean difference of runs with the same seeds, and its 95 % interval."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean = statistics.mean(differences)
    half = T_95 * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


def summary(reported: dict[str, list[Result]], correlation: float) -> str:
    """The Markdown table: each arm, and how far the best is ahead of it with the same seeds."""
    lines = [
        f"{PROMPTS} prompts x {GROUP_SIZE} completions x {ITERATIONS} iterations; seeds "
        f"{', '.join(map(str, SEEDS))}; right digits of {NUM_DIGITS}. What a digit adds to the "
        f"reward model's output correlates with its being right by {correlation:.2f}.",
        "",
        f"| arm | lambda | learning rate | mean | last {LAST} | {BEST}, minus this: mean (95 %) "
        f"| last {LAST} (95 %) |",
        "|---|---|---|---|---|---|---|",
    ]
    best = reported[BEST]
    for name, runs in reported.items():
        means, finals = [run.mean for run in runs], [run.final for run in runs]
        against = ["", ""]
        if name != BEST:
            against = [
                paired([r.mean for r in best], means),
                paired([r.final for r in best], finals),
            ]
        lam = "" if runs[0].gae_lambda is None else f"{runs[0].gae_lambda:g}"
        cells = [name, lam, f"{runs[0].learning_rate:.1g}"]
        cells += [f"{statistics.mean(values):.2f}" for values in (means, finals)]
        lines.append(f"| {' | '.join([*cells, *against])} |")
    return "\n".join(lines) + "\n"


def write_csv(results: list[Result]) -> None:
    """All runs, those on the tuning seeds too."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "token_credit.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("arm", "lambda", "learning_rate", "seed", "mean", "final", "seconds"))
        for run in results:
            lam = "" if run.gae_lambda is None else run.gae_lambda
            numbers = (f"{run.mean:.3f}", f"{run.final:.3f}", f"{run.seconds:.1f}")
            writer.writerow((run.arm, lam, f"{run.learning_rate:.1g}", run.seed, *numbers))


def main() -> None:
    """Tune, run, and write the two files."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    start = time.perf_counter()
    done: list[Result] = []
    reported: dict[str, list[Result]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_policy(folder / "policy")
        correlation = train_reward_model(folder / "policy", folder / "reward_model")
        print(f"reward model after {time.perf_counter() - start:.0f} s: {correlation:.2f}")
        for arm in ARMS:
            gae_lambda, rate = pick(arm, folder, done)
            reported[arm.name] = [train(arm, gae_lambda, rate, seed, folder) for seed in SEEDS]
    done += [run for runs in reported.values() for run in runs]
    write_csv(done)
    text = summary(reported, correlation)
    (RESULTS / "token_credit.md").write_text(text, encoding="utf-8")
    print(text + f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

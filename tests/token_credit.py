"""`make credit`: does credit per token beat one advantage for the whole completion?

The task is letters by their worth (tasks/token_credit.py) under a judge that errs. All arms see the
same prompts, begin with the same random weights and get the same number of completions. A learning
rate, and the lambda of PPO, are picked for each arm on other seeds than those reported. One core,
about 15 minutes.
"""

from __future__ import annotations

import csv
import itertools
import logging
import math
import random
import statistics
import string
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
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from lightning_grpo.algorithms import GRPO, PPO
from lightning_grpo.critic import CriticSettings
from lightning_grpo.module import GRPOModule
from lightning_grpo.rewards import RewardModel
from lightning_grpo.tasks import LetterPoints, NoisyLetterPoints, letter_points
from lightning_grpo.tasks.token_credit import MOST_POINTS, POINTS
from lightning_grpo.tools.tiny_model import write_tiny_model

RESULTS = Path(__file__).parent / "results"
NUM_LETTERS = 24
NOISE_STD = 0.1  # that of the true score over completions of a new policy is 0.06
PROMPTS, GROUP_SIZE, ITERATIONS = 2, 4, 40
LAST = 5  # iterations that the final value is the mean of
TUNING_SEEDS = (100, 101, 102)
SEEDS = (0, 1, 2, 3, 4)
T_95 = 2.776  # of Student's t with 4 degrees of freedom
GRID = (2e-3, 4e-3, 8e-3, 1.6e-2)
LAMBDAS = (0.5, 0.8, 0.9)
JUDGED = 16384  # texts that a reward model learns from


@dataclass(frozen=True)
class Arm:
    """What is compared.

    Args:
        name: in the tables.
        lambdas: to pick gae_lambda from; none for GRPO.
        scale: of GRPO's advantages.
        has_model: the critic, or the reward of GRPO, is the reward model.
    """

    name: str
    lambdas: tuple[float, ...] = ()
    scale: Any = "std"
    has_model: bool = False


ARMS = (
    Arm("grpo"),
    Arm("grpo, no std", scale="none"),
    Arm("grpo, reward from the model", has_model=True),
    Arm("ppo, lambda 1, new critic", (1.0,)),
    Arm("ppo, lambda < 1, new critic", LAMBDAS),
    Arm("ppo, lambda 1, critic from the model", (1.0,), has_model=True),
    Arm("ppo, lambda < 1, critic from the model", LAMBDAS, has_model=True),
)


@dataclass(frozen=True)
class Result:
    """One run."""

    arm: str
    gae_lambda: float | None
    learning_rate: float
    seed: int
    mean: float
    """True score over all iterations: the area under the curve."""
    final: float
    seconds: float


class TrueScores(L.Callback):
    """Keeps the mean score without noise of each iteration."""

    def __init__(self) -> None:
        self.scores: list[float] = []

    def on_iteration_end(self, trainer: L.Trainer, module: GRPOModule, rollout: Any) -> None:
        self.scores.append(float(trainer.callback_metrics["reward/letter_points"]))


def write_policy(folder: Path) -> None:
    """Configuration and tokenizer of a policy of 84,000 parameters."""
    write_tiny_model(
        str(folder),
        characters=string.ascii_lowercase + ":",
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        max_positions=64,
        weights=False,
    )


def train_reward_model(policy: Path, folder: Path, seed: int) -> float:
    """Fit a model of the policy's size to noisy scores of random texts of any length.

    Args:
        policy: folder of its configuration and tokenizer.
        folder: where to write the model.
        seed: of weights, texts and noise.

    Returns:
        Correlation of what each letter adds to its output with what the letter is worth.
    """
    tokenizer = AutoTokenizer.from_pretrained(policy)
    config = AutoConfig.from_pretrained(policy)
    config.num_labels = 1
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config)
    generator = random.Random(seed)
    task = LetterPoints(JUDGED, NUM_LETTERS, seed=seed)
    prompts = [task[i]["prompt"] for i in range(JUDGED)]
    texts = [random_text(generator, generator.randint(1, NUM_LETTERS)) for _ in prompts]
    judge = NoisyLetterPoints(NOISE_STD, seed)
    scores = torch.tensor(judge(prompts, texts, [NUM_LETTERS] * JUDGED))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, JUDGED // 32)
    for start in range(0, JUDGED, 32):
        pairs = zip(prompts[start : start + 32], texts[start : start + 32], strict=True)
        batch = tokenizer(["".join(pair) for pair in pairs], padding=True, return_tensors="pt")
        outputs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0]
        (outputs - scores[start : start + 32]).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    fresh = [random_text(generator, NUM_LETTERS) for _ in range(256)]
    batch = tokenizer(["abc:" + text for text in fresh], return_tensors="pt")
    with torch.no_grad():
        hidden = model.base_model(input_ids=batch.input_ids).last_hidden_state
        added = model.score(hidden)[:, 3:, 0].diff(dim=1)
    worth = torch.tensor([[POINTS[letter] / MOST_POINTS for letter in text] for text in fresh])
    return float(torch.corrcoef(torch.stack([added.flatten(), worth.flatten()]))[0, 1])


def random_text(generator: random.Random, length: int) -> str:
    """Letters, each as likely as any other."""
    return "".join(generator.choices(string.ascii_lowercase, k=length))


def train(arm: Arm, gae_lambda: float | None, rate: float, seed: int, folder: Path) -> Result:
    """One run of the trainer.

    Args:
        arm: what to run.
        gae_lambda: of PPO.
        rate: learning rate of the policy.
        seed: of weights, prompts and draws.
        folder: with the policy's configuration, and a reward model for each seed.
    """
    model = str(folder / f"model_{seed}")
    scores = TrueScores()
    is_ppo = gae_lambda is not None
    judge: Any = NoisyLetterPoints(NOISE_STD, seed)
    if arm.has_model and not is_ppo:
        judge = RewardModel(model, batch_size=PROMPTS * GROUP_SIZE)

    def optimizer(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)

    start = time.perf_counter()
    L.seed_everything(seed, verbose=False)
    trainer = make_trainer(
        reward=[letter_points, judge],
        reward_options={"weights": [0.0, 1.0]},
        group_size=GROUP_SIZE,
        max_completion_tokens=NUM_LETTERS,
        rollout={"num_val_samples": 1, "seed": seed},
        switch={"algorithm": "ppo" if is_ppo else "grpo"},
        callbacks=[scores],
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
        **algorithm_options(arm, gae_lambda, model),
    )
    rows = LetterPoints(4096, NUM_LETTERS)
    trainer.fit(module, datamodule=make_data(rows, prompts_per_iteration=PROMPTS, shuffle=True))
    curve = scores.scores
    assert len(curve) == ITERATIONS
    mean, final = statistics.mean(curve), statistics.mean(curve[-LAST:])
    seconds = time.perf_counter() - start
    return Result(arm.name, gae_lambda, rate, seed, mean, final, seconds)


def algorithm_options(arm: Arm, gae_lambda: float | None, model: str) -> dict[str, Any]:
    """The options of the module that differ between the arms."""
    if gae_lambda is None:
        return {"algorithm": GRPO(scale=arm.scale, reduction="token")}
    # A new critic has everything to learn, one from a reward model has much to lose.
    critic = CriticSettings(
        form="separate",
        name_or_path=model if arm.has_model else None,
        learning_rate=1e-4 if arm.has_model else 3e-3,
    )
    return {"ppo": PPO(gae_lambda=gae_lambda, value_clip=None), "critic": critic}


def pick(arm: Arm, folder: Path, done: list[Result]) -> tuple[float | None, float]:
    """Lambda and learning rate with the best mean score on the tuning seeds.

    The grid grows by factors of 2 until the best rate of each lambda is not at its edge.
    """
    means: dict[tuple[float | None, float], float] = {}

    def measure(gae_lambda: float | None, rate: float) -> None:
        runs = [train(arm, gae_lambda, rate, seed, folder) for seed in TUNING_SEEDS]
        done.extend(runs)
        means[gae_lambda, rate] = statistics.mean(run.mean for run in runs)
        print(f"{arm.name}  lambda {gae_lambda}  rate {rate:g}  {means[gae_lambda, rate]:.3f}")

    for gae_lambda in arm.lambdas or (None,):
        for rate in GRID:
            measure(gae_lambda, rate)
        while True:
            mine = {rate: mean for (lam, rate), mean in means.items() if lam == gae_lambda}
            best = max(mine, key=lambda rate: mine[rate])
            if best not in (min(mine), max(mine)):
                break
            measure(gae_lambda, best * (2 if best == max(mine) else 0.5))
    return max(means, key=lambda setting: means[setting])


def paired(first: list[float], second: list[float]) -> str:
    """Mean difference of runs with the same seeds, and its 95 % interval."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean = statistics.mean(differences)
    half = T_95 * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


def summary(reported: dict[str, list[Result]], correlations: list[float]) -> str:
    """The Markdown table, and the paired differences."""
    lines = [
        f"{PROMPTS} prompts x {GROUP_SIZE} completions x {ITERATIONS} iterations, {NUM_LETTERS} "
        f"letters, noise {NOISE_STD}; seeds {', '.join(map(str, SEEDS))}; true score from 0 to 1.",
        "What a letter adds to the reward model's output correlates with its worth by "
        f"{min(correlations):.2f} to {max(correlations):.2f}.",
        "",
        f"| arm | lambda | learning rate | mean score | in the last {LAST} | seconds a run |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in reported.items():
        lam = "" if runs[0].gae_lambda is None else f"{runs[0].gae_lambda:g}"
        cells = [
            f"{statistics.mean(v):.3f}" for v in ([r.mean for r in runs], [r.final for r in runs])
        ]
        seconds = statistics.mean(run.seconds for run in runs)
        rate = f"{runs[0].learning_rate:g}"
        lines.append(f"| {name} | {lam} | {rate} | {cells[0]} | {cells[1]} | {seconds:.1f} |")
    lines += [
        "",
        "| against | mean score, paired (95 %) | in the last 5, paired (95 %) |",
        "|---|---|---|",
    ]
    for first, second in itertools.product(
        ("ppo, lambda < 1, critic from the model", "ppo, lambda < 1, new critic"), reported
    ):
        if first != second:
            a, b = reported[first], reported[second]
            mean = paired([r.mean for r in a], [r.mean for r in b])
            final = paired([r.final for r in a], [r.final for r in b])
            lines.append(f"| {first} - {second} | {mean} | {final} |")
    return "\n".join(lines) + "\n"


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
        correlations = [
            train_reward_model(folder / "policy", folder / f"model_{seed}", seed)
            for seed in (*TUNING_SEEDS, *SEEDS)
        ]
        print(f"reward models after {time.perf_counter() - start:.0f} s: {correlations}")
        for arm in ARMS:
            gae_lambda, rate = pick(arm, folder, done)
            reported[arm.name] = [train(arm, gae_lambda, rate, seed, folder) for seed in SEEDS]
    done += [run for runs in reported.values() for run in runs]
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "token_credit.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("arm", "lambda", "learning_rate", "seed", "mean", "final", "seconds"))
        for run in done:
            lam = "" if run.gae_lambda is None else run.gae_lambda
            numbers = (f"{run.mean:.4f}", f"{run.final:.4f}", f"{run.seconds:.1f}")
            writer.writerow((run.arm, lam, f"{run.learning_rate:g}", run.seed, *numbers))
    text = summary(reported, correlations)
    (RESULTS / "token_credit.md").write_text(text, encoding="utf-8")
    print(text + f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

"""Validation metrics: pass@k, maj@k, and the means that go with them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchmetrics import MeanMetric, MetricCollection

from lightning_grpo.rewards import completion_text
from lightning_grpo.types import CompletionText


@dataclass(frozen=True)
class Judge:
    """What counts as a right completion, and which part of it is the answer that votes.

    Args:
        function: name of the reward function that decides; the first one when null.
        threshold: the least value of that function that counts as right.
        extract_answer: text of a completion -> answer for maj@k, or None for no vote; the
            stripped text when null.
    """

    function: str | None = None
    threshold: float = 1.0
    extract_answer: Callable[[str], str | None] | None = None

    def successes(self, function_rewards: dict[str, torch.Tensor]) -> list[bool]:
        """Whether each of B completions is right.

        Args:
            function_rewards: name -> (B,) values of each reward function.

        Returns:
            B booleans; a completion that was not scored is not right.

        Raises:
            ValueError: there is no reward function of that name.
        """
        name = self.function or next(iter(function_rewards))
        if name not in function_rewards:
            raise ValueError(
                f"reward.success_function {name!r} is not one of the reward functions "
                f"{list(function_rewards)}"
            )
        return (function_rewards[name] >= self.threshold).tolist()

    def answers(self, completions: Sequence[CompletionText]) -> list[str | None]:
        """The answer in each of B completions, for the majority vote."""
        texts = [completion_text(completion) for completion in completions]
        if self.extract_answer is None:
            return [text.strip() for text in texts]
        return [self.extract_answer(text) for text in texts]


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that at least one of k samples is right, without bias.

    pass@k = 1 - C(n - c, k) / C(n, k)

    Source: Chen et al., "Evaluating large language models trained on code"
    (arXiv:2107.03374), eq. 1.

    Args:
        num_samples: n, samples drawn for the prompt.
        num_correct: c, how many of them are right, 0 to n.
        k: samples that one would be allowed, 1 to n.

    Returns:
        A probability.

    Raises:
        ValueError: k is not between 1 and n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= {num_samples} samples per prompt")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_success(answers: Sequence[str | None], successes: Sequence[bool]) -> float:
    """Whether the most frequent answer is right; ties count by the share of right ones.

    Source: self-consistency, Wang et al. (arXiv:2203.11171), sec. 2. Departs: a tie is
    resolved in expectation, not at random.

    Args:
        answers: n answers as extracted from the completions; None does not vote.
        successes: n, whether each completion was right.

    Returns:
        A value between 0 and 1; 0 when nobody voted.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    right = {answer for answer, success in zip(answers, successes, strict=True) if success}
    return sum(answer in right for answer in winners) / len(winners)


def validation_metrics(prefix: str) -> MetricCollection:
    """The metrics of one evaluation, each a (sum, count) that is reduced over ranks.

    Args:
        prefix: "val/" or "test/".

    Returns:
        Means named pass_at_1, pass_at_k, maj_at_k, reward, completion_tokens, truncated_frac.
    """
    names = (
        "pass_at_1",
        "pass_at_k",
        "maj_at_k",
        "reward",
        "completion_tokens",
        "truncated_frac",
    )
    means: dict[str, Any] = {
        name: MeanMetric(nan_strategy="ignore").set_dtype(torch.float64) for name in names
    }
    return MetricCollection(means, prefix=prefix)


def update_metrics(
    metrics: MetricCollection,
    *,
    num_samples: int,
    k: int,
    successes: Sequence[bool],
    answers: Sequence[str | None],
    rewards: torch.Tensor,
    num_tokens: torch.Tensor,
    truncated: torch.Tensor,
) -> None:
    """Add a batch of prompts with n completions each, the rows of a prompt together.

    Args:
        metrics: as made by `validation_metrics`.
        num_samples: n, completions per prompt; maj@k is over all of them.
        k: the k of pass@k, 1 to n.
        successes: B, whether each completion is right.
        answers: B, extracted answers.
        rewards: (B,) weighted rewards; NaN is left out.
        num_tokens: (B,) completion lengths in tokens.
        truncated: (B,) bool.
    """
    means = {name.split("/")[-1]: metric for name, metric in metrics.items()}
    for start in range(0, len(successes), num_samples):
        rows = slice(start, start + num_samples)
        num_correct = sum(successes[rows])
        means["pass_at_1"].update(pass_at_k(num_samples, num_correct, 1))
        means["pass_at_k"].update(pass_at_k(num_samples, num_correct, k))
        means["maj_at_k"].update(majority_success(answers[rows], successes[rows]))
    if len(successes):
        means["reward"].update(rewards)
        means["completion_tokens"].update(num_tokens.double())
        means["truncated_frac"].update(truncated.double())

"""A policy over two tokens out of three, small enough to list all that can happen, exactly.

A prompt is one of a few, all equally likely. Its logits are those of a table that all prompts share
plus those of a table of its own, so that the gradients of prompts have something in common.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from lightning_grpo.advantages import group_advantages
from lightning_grpo.gae import gae, token_rewards

NUM_WORDS = 3
NUM_STATES = 1 + NUM_WORDS  # before the first token, and after each of the three
COMPLETIONS = torch.tensor(list(itertools.product(range(NUM_WORDS), repeat=2)))  # (9, 2)
STATES = torch.stack([torch.zeros(9, dtype=torch.long), 1 + COMPLETIONS[:, 0]], dim=1)  # (9, 2)


class EnumerablePolicy:
    """Probabilities, scores and the true gradient of a policy, and the gradients of all groups."""

    def __init__(self, parameters: Tensor, rewards: Tensor) -> None:
        """Tables of a policy with `parameters` (1 + P, 4, 3), and `rewards` (P, 9)."""
        self.rewards, self.num_prompts = rewards, len(rewards)
        self.parameters = parameters.double().requires_grad_()
        self.num_parameters = parameters.numel()
        chosen = self._logprobs()
        expected = (chosen.sum(2).exp() * rewards).sum(1).mean()
        self.true_gradient = self._gradient(expected)  # (D,)
        rows = [self._gradient(logprob) for logprob in chosen.flatten()]
        # d log pi of each token, (P, 9, 2, D)
        self.scores = torch.stack(rows).view(self.num_prompts, 9, 2, self.num_parameters)
        self.probabilities = chosen.detach().sum(2).exp()  # (P, 9)

    def _gradient(self, scalar: Tensor) -> Tensor:
        return torch.autograd.grad(scalar, self.parameters, retain_graph=True)[0].flatten()

    def _logprobs(self) -> Tensor:
        logprobs = (self.parameters[:1] + self.parameters[1:]).log_softmax(dim=2)  # (P, 4, 3)
        return logprobs[:, STATES, COMPLETIONS]  # (P, 9, 2)

    def values(self) -> Tensor:
        """(P, 4) expected reward from each state on."""
        p = self.probabilities.view(self.num_prompts, 3, 3)
        r = self.rewards.view(self.num_prompts, 3, 3)
        return torch.cat(
            [(p * r).sum((1, 2), keepdim=True)[:, 0], (p * r).sum(2) / p.sum(2)], dim=1
        )

    def critic_gradients(self, values: Tensor, gae_lambda: float) -> Tensor:
        """(P, 9, D) gradient of each completion with advantages over `values` (P, 4)."""
        mask = torch.ones(self.num_prompts * 9, 2, dtype=torch.bool)
        advantages = gae(
            token_rewards(self.rewards.flatten(), mask),
            values[:, STATES].reshape(-1, 2),
            mask,
            gamma=1.0,
            gae_lambda=gae_lambda,
        )
        return (self.scores * advantages.view(self.num_prompts, 9, 2, 1)).sum(2)

    def groups(self, group_size: int) -> tuple[Tensor, Tensor]:
        """All groups: (P * 9^G, 1 + G) prompt and completions, and their probabilities."""
        members = itertools.product(range(self.num_prompts), *[range(9)] * group_size)
        groups = torch.tensor(list(members))
        chances = self.probabilities[groups[:, :1], groups[:, 1:]].prod(1) / self.num_prompts
        return groups, chances

    def group_gradients(self, groups: Tensor, baseline: str, scale: str) -> Tensor:
        """(M, D) gradient of each group, a mean over its completions."""
        prompts, members = groups[:, :1], groups[:, 1:]
        rewards = self.rewards[prompts, members]
        ids = torch.arange(len(groups)).unsqueeze(1).expand_as(rewards)
        advantages = group_advantages(
            rewards.flatten(), ids.flatten(), baseline=baseline, scale=scale
        )
        scores = self.scores.sum(2)[prompts, members]  # (M, G, D)
        return (advantages.view_as(rewards).unsqueeze(2) * scores).mean(1)

    def mean_over_group(self, per_completion: Tensor, groups: Tensor) -> Tensor:
        """(M, D) means of (P, 9, D) over the completions of each group."""
        return per_completion[groups[:, :1], groups[:, 1:]].mean(1)


def make_policy(seed: int = 0, *, num_prompts: int = 4, spread: float = 1.0) -> EnumerablePolicy:
    """A policy with random tables, and rewards that its prompts partly share."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    parameters = normal(1 + num_prompts, NUM_STATES, NUM_WORDS) * 0.5
    rewards = normal(1, 9) + spread * normal(num_prompts, 9) + 2 * normal(num_prompts, 1)
    return EnumerablePolicy(parameters, rewards)

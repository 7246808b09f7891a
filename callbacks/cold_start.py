"""ColdStart: a short supervised phase on demonstrations, before the reinforcement learning."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_grpo.generation.transformers_engine import left_pad
from lightning_grpo.lifecycle import start_from_policy
from lightning_grpo.masking import masked_sum
from lightning_grpo.module import GRPOModule
from lightning_grpo.policy import Policy
from lightning_grpo.prompts import prepare_prompts
from lightning_grpo.run_state import global_seed
from lightning_grpo.sources import Rows, read_rows
from lightning_grpo.stages import moves_policy


class ColdStart(L.Callback):
    """Teach the policy the form of an answer before it is rewarded for right ones.

    loss = -(1/n) * sum of log pi(demonstration token | what came before), over n tokens

    The prompts are rendered as the data module renders them. Every rank sees the same batches,
    so that the ranks stay equal. The reference is taken after it.

    Source: DeepSeek-R1 (arXiv:2501.12948), sec. 2.3.1.

    Args:
        demonstrations: a file, URL or `datasets` name, or a class_path that gives rows, with a
            prompt and a completion in each.
        completion_column: column that holds the demonstrated completion, without EOS.
        num_steps: optimizer steps; 0 makes no cold start.
        batch_size: demonstrations per step.
        learning_rate: of AdamW, which is dropped afterwards; it falls linearly to 0.
        max_grad_norm: gradients are clipped to this norm.
        seed: order of the demonstrations; seed_everything when null.
    """

    def __init__(
        self,
        demonstrations: str | Rows | None = None,
        completion_column: str = "completion",
        num_steps: int = 0,
        batch_size: int = 64,
        learning_rate: float = 1e-5,
        max_grad_norm: float = 1.0,
        seed: int | None = None,
    ) -> None:
        if num_steps and demonstrations is None:
            raise ValueError("cold_start.num_steps is set, but cold_start.demonstrations is not")
        if num_steps < 0 or batch_size < 1:
            raise ValueError(
                "cold_start.num_steps must be >= 0 and cold_start.batch_size >= 1, got "
                f"{num_steps} and {batch_size}"
            )
        self.demonstrations = demonstrations
        self.completion_column = completion_column
        self.num_steps = num_steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.max_grad_norm = max_grad_norm
        self.seed = seed

    def on_train_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Run the supervised steps, unless a checkpoint says that they were run."""
        if not self.num_steps or module.is_cold_started:
            return
        start = time.perf_counter()
        rows = self.read(trainer, module)
        module.policy.freeze(False)  # a critic's warm-up comes after it
        losses = self.train(trainer, module, rows)
        module.policy.freeze(not moves_policy(module.stage))
        start_from_policy(module)
        module.is_cold_started = True
        seconds = time.perf_counter() - start
        module.phase.spend("cold start", seconds)
        rank_zero_info(
            f"cold start: {self.num_steps} steps on demonstrations, loss {losses[0]:.3f} -> "
            f"{losses[-1]:.3f} nats per token, {seconds:.1f} s"
        )

    def read(self, trainer: L.Trainer, module: GRPOModule) -> list[tuple[list[int], list[int]]]:
        """Prompt ids and completion ids, EOS included, of every demonstration."""
        assert self.demonstrations is not None
        rows = read_rows(self.demonstrations, split="train")
        prompt_format = trainer.datamodule.prompt_format  # type: ignore[attr-defined]
        prompts = prepare_prompts(rows, prompt_format, module.tokenizer)
        if self.completion_column not in prompts.columns:
            raise ValueError(
                f"cold_start.demonstrations have no column {self.completion_column!r}, only "
                f"{sorted(prompts.columns)}: set cold_start.completion_column"
            )
        eos = module.tokenizer.eos_token_id
        end = [] if eos is None else [int(eos)]
        texts = prompts.columns[self.completion_column]
        for number, text in enumerate(texts, start=1):
            if not isinstance(text, str):
                raise ValueError(
                    f"cold_start.demonstrations: row {number} has no text in "
                    f"{self.completion_column!r}, but {text!r}"
                )
        encoded = module.tokenizer(texts, add_special_tokens=False)["input_ids"]
        pairs = [(p, [*c, *end]) for p, c in zip(prompts.prompt_ids, encoded, strict=True)]
        longest, number = max((len(p) + len(c), i) for i, (p, c) in enumerate(pairs, start=1))
        limit = module.policy.max_positions
        if limit is not None and longest > limit:
            raise ValueError(
                f"cold_start.demonstrations: row {number} has {longest} tokens, but the model has "
                f"only {limit} positions"
            )
        return pairs

    def train(
        self,
        trainer: L.Trainer,
        module: GRPOModule,
        rows: Sequence[tuple[list[int], list[int]]],
    ) -> list[float]:
        """Make the supervised steps; returns the loss of each in nats per token."""
        policy = module.policy
        policy.train()
        parameters = list(policy.trainable().values())
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0.0)
        generator = random.Random(global_seed() if self.seed is None else self.seed)
        module.phase.enter("cold start", self.num_steps)
        losses = []
        for step in range(self.num_steps):
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * (1 - step / self.num_steps)
            batch = generator.sample(list(rows), min(self.batch_size, len(rows)))
            num_tokens = sum(len(completion) for _, completion in batch)
            loss = torch.zeros((), device=policy.device)
            for part in split_demonstrations(batch, module.microbatch_tokens):
                with trainer.precision_plugin.train_step_context():
                    part_loss = demonstration_loss(policy, part) / num_tokens
                part_loss.backward()
                loss += part_loss.detach()
            torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss))
            module.phase.advance(step + 1, self.num_steps)
        return losses


def split_demonstrations(
    batch: Sequence[tuple[list[int], list[int]]], max_tokens: int
) -> list[list[tuple[list[int], list[int]]]]:
    """Cut a batch into forwards of at most `max_tokens` tokens, padding counted.

    Args:
        batch: prompt ids and completion ids of each demonstration.
        max_tokens: budget of one forward; a single demonstration may exceed it.

    Returns:
        Parts, each of demonstrations of similar length.
    """
    parts: list[list[tuple[list[int], list[int]]]] = []
    for row in sorted(batch, key=lambda row: -len(row[0]) - len(row[1])):
        joined = [*parts[-1], row] if parts else [row]
        width = max(len(p) for p, _ in joined) + max(len(c) for _, c in joined)
        if parts and width * len(joined) <= max_tokens:
            parts[-1] = joined
        else:
            parts.append([row])
    return parts


def demonstration_loss(policy: Policy, batch: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """Negative log-likelihood of the demonstrated tokens, summed.

    Args:
        policy: in training mode.
        batch: prompt ids and completion ids of each demonstration.

    Returns:
        0-d sum in nats.
    """
    device = policy.device
    prompt_ids, prompt_mask = left_pad([prompt for prompt, _ in batch], 0, device)
    # The same function pads on the right when rows and result are turned around.
    reversed_ids, reversed_mask = left_pad([ids[::-1] for _, ids in batch], 0, device)
    completion_ids, completion_mask = reversed_ids.flip(1), reversed_mask.flip(1)
    logprobs = policy(prompt_ids, prompt_mask, completion_ids, completion_mask).logprobs
    return -masked_sum(logprobs, completion_mask)

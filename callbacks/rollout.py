"""RolloutGeneration: when the replay queue is empty, complete the next prompts."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, NamedTuple

import lightning as L
import torch

from lightning_grpo.distributed import failing_together
from lightning_grpo.generation import EngineName, Sampling
from lightning_grpo.hooks import pass_through_hook
from lightning_grpo.loaders import Slot
from lightning_grpo.module import GRPOModule
from lightning_grpo.policy import eos_token_ids
from lightning_grpo.rollout import RolloutSettings, own_samplings
from lightning_grpo.run_state import global_seed
from lightning_grpo.scoring import evaluating
from lightning_grpo.types import PromptBatch, Rollout

SPLITS = ("train", "val", "test", "predict")


class RolloutGeneration(L.Callback):
    """Complete N prompts G times each with the policy as it is.

    Args:
        group_size: G, completions per prompt in training.
        temperature: divides the logits, > 0.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with at least this probability, (0, 1].
        max_completion_tokens: C, the longest completion in tokens, EOS included.
        stop_strings: texts that end a completion, besides the model's EOS ids.
        bad_words: texts whose tokens, as the tokenizer makes them of the text by itself and behind
            a space, are never drawn in a row; other tokens can still spell them.
        min_completion_tokens: the shortest completion in tokens, EOS included.
        sampling_column: data column with settings of a prompt's own: null, or a dict with some of
            top_k, top_p, max_completion_tokens (at most that of all), min_completion_tokens, and
            outside of training temperature.
        engine: native runs each prompt once for all its completions and drops finished ones; it
            checks itself against the model first and gives way to transformers, which runs every
            model through its own `generate`, where it cannot do one.
        max_rows: rows decoded at a time; 0 decodes all at once.
        num_val_samples: completions per prompt in validation, test and predict.
        pass_k: the k of pass@k, at most `num_val_samples`; that number itself when null.
        val_temperature: temperature of validation, test and predict, 0 for greedy; the training
            temperature when null.
        seed: part of the key of every draw, and of random weights; seed_everything when null.
    """

    def __init__(
        self,
        group_size: int = 8,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        max_completion_tokens: int = 256,
        stop_strings: list[str] | None = None,
        bad_words: list[str] | None = None,
        min_completion_tokens: int = 1,
        sampling_column: str | None = None,
        engine: EngineName = "native",
        max_rows: int = 0,
        num_val_samples: int = 4,
        pass_k: int | None = None,
        val_temperature: float | None = None,
        seed: int | None = None,
    ) -> None:
        sampling = Sampling(
            temperature,
            top_k,
            top_p,
            max_completion_tokens,
            stop_strings or [],
            bad_words or [],
            min_completion_tokens,
        )
        val_sampling = sampling
        if val_temperature is not None:
            val_sampling = replace(sampling, temperature=val_temperature)
        self.seed = seed
        self.settings = RolloutSettings(
            group_size=group_size,
            sampling=sampling,
            val_sampling=val_sampling,
            engine=engine,
            max_rows=max_rows,
            num_val_samples=num_val_samples,
            pass_k=num_val_samples if pass_k is None else pass_k,
            seed=0 if seed is None else seed,
            sampling_column=sampling_column,
        )

    def setup(self, trainer: L.Trainer, module: GRPOModule, stage: str) -> None:
        """Hand the settings to the module."""
        if self.seed is None:
            self.settings = self.settings.with_seed(global_seed())
        module.rollout_settings = self.settings

    def on_fit_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Check what the model and the data allow before anything is generated."""
        self._check(trainer, module)
        samplings = [self.settings.sampling, *self._own_samplings(trainer, is_training=True)]
        if any(s.temperature != samplings[0].temperature for s in samplings):
            raise ValueError(
                f"the column {self.settings.sampling_column!r} of data.train_data has a "
                "temperature, but that of training is one for all prompts (rollout.temperature): "
                "the loss differentiates the log-probs at it"
            )
        if module.choices.old_logprobs == "sampler" and any(s.restricts_tokens for s in samplings):
            raise ValueError(
                "model.old_logprobs sampler does not go with top_k, top_p, bad_words and "
                "min_completion_tokens: with them the rollout samples from another distribution "
                "than the one the loss differentiates"
            )

    def _check(self, trainer: L.Trainer, module: GRPOModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        check_can_complete(module, data.longest_prompt)
        name = self.settings.sampling_column
        if name is not None and all(data.column(split, name) is None for split in SPLITS):
            raise ValueError(f"rollout.sampling_column names {name!r}, which no data has")
        self._own_samplings(trainer, is_training=False)

    def _own_samplings(self, trainer: L.Trainer, *, is_training: bool) -> list[Sampling]:
        """The samplings of all prompts of training, or of all others, if they have their own."""
        name = self.settings.sampling_column
        if name is None:
            return []
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        samplings: list[Sampling] = []
        common = self.settings.sampling if is_training else self.settings.val_sampling
        for split in SPLITS[:1] if is_training else SPLITS[1:]:
            try:
                samplings += own_samplings(common, data.column(split, name) or [])
            except ValueError as error:
                raise ValueError(
                    f"rollout.sampling_column {name!r} of data.{split}_data: {error}"
                ) from error
        return samplings

    def on_validation_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Check the same before `validate`; a fit has done so."""
        if trainer.state.fn == "validate":
            self._check(trainer, module)

    def on_test_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Check the same before `test`."""
        self._check(trainer, module)

    def on_predict_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Check the same before `predict`."""
        self._check(trainer, module)

    def on_train_batch_start(
        self, trainer: L.Trainer, module: GRPOModule, batch: Slot, batch_idx: int
    ) -> None:
        """Make the next rollout when every minibatch of the last one is used up."""
        if module.queue:
            return
        if module.old_policy is not None:
            module.old_policy.refresh()
        made = next_rollout(trainer, module)
        module.rollout = made.rollout
        module.log_dict(
            {
                "completion/tokens_mean": made.num_tokens / max(made.num_rows, 1),
                "completion/truncated_frac": made.num_truncated / max(made.num_rows, 1),
                "time/rollout_s": made.seconds,
                "throughput/completion_tokens_per_s": made.num_tokens / made.seconds,
            },
            batch_size=1,
        )


class NextRollout(NamedTuple):
    """A rollout of the next prompts, and what it took; the numbers are those of all ranks."""

    rollout: Rollout
    num_rows: int
    num_tokens: int
    num_truncated: int
    seconds: float


def next_rollout(trainer: L.Trainer, module: GRPOModule, *, refill: int = 0) -> NextRollout:
    """Complete the next prompts of the stream, and count what was generated.

    Args:
        trainer: with the data and the callbacks that define `on_rollout_end`.
        module: with the policy and the settings.
        refill: 0 for the first rollout of an iteration, k for the k-th refill. It shifts the group
            ids by k * prompts_per_iteration: the ids of an iteration stay unique, and so do the
            keys of its draws.

    Returns:
        The rollout, without rewards, and its counts.
    """
    start = time.perf_counter()
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    with failing_together(module, "taking prompts"):
        prompts: PromptBatch = data.next_prompts()
        shift = refill * data.prompts_per_iteration if refill else 0
        prompts = replace(prompts, group_ids=[group + shift for group in prompts.group_ids])
    with failing_together(module, "generating completions"):
        module.phase.enter("generating", len(prompts) * module.settings.group_size)
        with evaluating(module.policy), trainer.precision_plugin.forward_context():
            rollout = module.make_rollout(prompts, is_training=True)
    rollout = pass_through_hook(trainer, "on_rollout_end", module, rollout)
    totals = torch.stack(
        [
            rollout.completion_mask.sum(),
            rollout.truncated.sum(),
            torch.tensor(len(rollout), device=rollout.truncated.device),
        ]
    )
    num_tokens, num_truncated, num_rows = module.sum_over_ranks(totals).tolist()
    module.counters.completions += num_rows
    module.counters.tokens += num_tokens
    seconds = time.perf_counter() - start
    module.phase.spend("generating", seconds)
    return NextRollout(rollout, num_rows, num_tokens, num_truncated, seconds)


def check_can_complete(module: GRPOModule, num_prompt_tokens: int) -> None:
    """Check that completions can end, and fit into the model's positions.

    Args:
        module: with its policy loaded.
        num_prompt_tokens: of the longest prompt.

    Raises:
        ValueError: no EOS and no stop string, or too many tokens.
    """
    sampling = module.settings.sampling
    if not eos_token_ids(module.policy, module.tokenizer) and not sampling.stop_strings:
        raise ValueError(
            f"neither the tokenizer nor the generation config of {module.name_or_path!r} has an "
            "EOS token, so no completion would ever end: set rollout.stop_strings"
        )
    limit = module.policy.max_positions
    total = num_prompt_tokens + sampling.max_completion_tokens
    if limit is not None and total > limit:
        raise ValueError(
            f"the longest prompt ({num_prompt_tokens} tokens) and rollout.max_completion_tokens "
            f"({sampling.max_completion_tokens}) make {total} tokens, but the model has only "
            f"{limit} positions: lower data.max_prompt_tokens or rollout.max_completion_tokens"
        )

"""The engine for speed: a prompt runs once for its group, and finished rows are dropped.

Its draws are those of the transformers engine, so that the completions are the same up to rounding.
At its first rollout it compares its log-probs with a plain forward of the model, for each of its
decoders until one agrees; when none does, the transformers engine does the work, and a warning
says so.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_grpo.generation.cached_decoder import CachedDecoder
from lightning_grpo.generation.decode_loop import DecodeLoop
from lightning_grpo.generation.decoder import Decoder, Lengths, MakeDecoder, RolloutCounts
from lightning_grpo.generation.drawn_rows import Ending
from lightning_grpo.generation.fused_decoder import FusedDecoder
from lightning_grpo.generation.pooled_decoder import PooledDecoder
from lightning_grpo.generation.protocol import OnFinished, Sampling, SamplingKey, per_prompt
from lightning_grpo.generation.steps import CudaCapture
from lightning_grpo.generation.transformers_engine import TransformersEngine, left_pad
from lightning_grpo.kernels import has_triton
from lightning_grpo.logprobs import token_logprobs
from lightning_grpo.masking import position_ids
from lightning_grpo.policy import Policy
from lightning_grpo.types import Completions, PromptBatch

# Difference of a log-prob from that of a plain forward: by rounding in float32, and in anything
# shorter. A wrong decoder is off by far more.
_TOLERANCE = 1e-4
_TOLERANCE_SHORT = 0.3
_CHECKED_PROMPTS = 3
_CHECKED_TOKENS = 32
# Of the memory of a GPU, what keys and values may hold between two rollouts.
_KEPT_SHARE = 1 / 8


def decoders_for(device: torch.device) -> dict[str, MakeDecoder]:
    """Decoders by name, the one for speed first.

    Args:
        device: of the policy. On a CUDA GPU steps are captured, with a Triton kernel for the
            attention where there is Triton.
    """
    plain: dict[str, MakeDecoder] = {"fused": FusedDecoder, "cached": CachedDecoder}
    if device.type != "cuda":
        return plain
    most = torch.cuda.get_device_properties(device).total_memory * _KEPT_SHARE
    captured = {"captured": PooledDecoder(CudaCapture(), max_kept_bytes=most).begin}
    if has_triton():
        from lightning_grpo.kernels.triton_attention import kernel_attention

        kernels = PooledDecoder(CudaCapture(), kernel_attention, max_kept_bytes=most)
        captured = {"captured-kernels": kernels.begin, **captured}
    return captured | plain


class NativeEngine:
    """Completes prompts with the policy's own weights, as fast as it can.

    Args:
        policy: the policy whose weights generate; its training mode is left to the caller.
        tokenizer: for stop strings and the padding id.
        eos_token_ids: every id that ends a completion.
        max_rows: rows decoded at a time; 0 decodes all at once.
        decoders: by name, in the order in which they are tried; None for those of the device.
        first_decoder: the one that is tried before these, since a run began with it; transformers
            tries none.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Sequence[int],
        *,
        max_rows: int = 0,
        decoders: dict[str, MakeDecoder] | None = None,
        first_decoder: str | None = None,
    ) -> None:
        self.policy = policy
        self.eos_token_ids = list(eos_token_ids)
        self.max_rows = max_rows
        self.fallback = TransformersEngine(policy, tokenizer, eos_token_ids, max_rows=max_rows)
        self.decoders = dict(decoders or decoders_for(policy.device))
        self.first_decoder = first_decoder
        self.decoder_name: str | None = None
        """The decoder that passed the check, "transformers" when none did, None before it."""
        self.counts = RolloutCounts()
        """Of the last rollout; all zero when the transformers engine made it."""

    @property
    def decoder_names(self) -> list[str]:
        """In the order in which they are tried, and "transformers" for none of them."""
        return [*sorted(self.decoders, key=lambda name: name != self.first_decoder), "transformers"]

    @torch.no_grad()
    def generate(
        self,
        prompts: PromptBatch,
        sampling: Sampling | Sequence[Sampling],
        group_size: int,
        *,
        key: SamplingKey,
        on_finished: OnFinished | None = None,
    ) -> Completions:
        """Draw `group_size` completions of each prompt; see `Engine.generate`."""
        samplings = per_prompt(sampling, len(prompts))

        def run(model: PreTrainedModel) -> Completions:
            self.counts = RolloutCounts()
            if self.decoder_name is None and len(prompts):
                self.decoder_name = self._choose(model, prompts, samplings)
            if not len(prompts) or self.decoder_name in (None, "transformers"):
                return self.fallback.complete(
                    model, prompts, samplings, group_size, key=key, on_finished=on_finished
                )
            return self._complete(
                self.decoders[str(self.decoder_name)],
                model,
                prompts,
                samplings,
                group_size,
                key=key,
                on_finished=on_finished,
                counts=self.counts,
            )

        return self.policy.call_unsharded(run)

    def _complete(
        self,
        make_decoder: MakeDecoder,
        model: PreTrainedModel,
        prompts: PromptBatch,
        samplings: Sequence[Sampling],
        group_size: int,
        *,
        key: SamplingKey,
        on_finished: OnFinished | None,
        counts: RolloutCounts,
    ) -> Completions:
        num_tokens = self.policy.num_tokens
        sampler = self.fallback.token_sampler([s for s in samplings for _ in range(group_size)])
        lengths = Lengths(
            max(len(ids) for ids in prompts.prompt_ids), sampler.max_completion_tokens, num_tokens
        )
        ending = Ending(
            self.eos_token_ids,
            self.fallback.stop_criteria(sampler.common),
            self.fallback.pad_token_id,
        )
        decoder = make_decoder(model, lengths)
        num_captures = decoder.steps.num_captures
        try:
            return DecodeLoop(
                decoder,
                prompts,
                sampler,
                group_size,
                key=key,
                ending=ending,
                num_tokens=num_tokens,
                device=self.policy.device,
                counts=counts,
                max_rows=self.max_rows,
                on_finished=on_finished,
            ).run()
        finally:
            counts.num_captures = decoder.steps.num_captures - num_captures
            decoder.close()

    def _choose(
        self, model: PreTrainedModel, prompts: PromptBatch, samplings: Sequence[Sampling]
    ) -> str:
        """The first decoder whose log-probs are those of the model; those that fail are dropped."""
        reasons: list[str] = []
        failures: list[str] = []
        first = self.first_decoder
        if first == "transformers":
            return first
        if first is not None and first not in self.decoders:
            reasons.append(f"{first}: there is no such decoder here")
        for name in self.decoder_names[:-1]:
            try:
                difference = self._difference(self.decoders[name], model, prompts, samplings)
            except NotImplementedError as error:
                reasons.append(f"{name}: {error}")
            except Exception as error:  # how a model's own code fails is up to that code
                failures.append(f"{name}: {type(error).__name__}: {error}")
            else:
                if difference <= self._tolerance():
                    self._say_what_failed(name, reasons, failures)
                    return name
                failures.append(f"{name}: its log-probs are off by {difference:.2g}")
            self.decoders[name] = _no_decoder  # lets go of what the other holds
        reasons += failures
        warnings.warn(
            f"rollout.engine native does not cover {type(model).__name__}, the transformers "
            f"engine does its work ({'; '.join(reasons)})",
            stacklevel=2,
        )
        return "transformers"

    def _say_what_failed(self, name: str, reasons: list[str], failures: list[str]) -> None:
        """Warn that another decoder would have been better, if so."""
        if self.first_decoder not in (None, name):
            warnings.warn(
                f"the decoder of the run that is resumed does not work here, {name} takes "
                f"its place, and not to the same bits ({'; '.join(reasons + failures)})",
                stacklevel=2,
            )
        elif failures:
            warnings.warn(
                f"rollout.engine native decodes {name}, which may be slower "
                f"({'; '.join(failures)})",
                stacklevel=2,
            )

    def _difference(
        self,
        make_decoder: MakeDecoder,
        model: PreTrainedModel,
        prompts: PromptBatch,
        samplings: Sequence[Sampling],
    ) -> float:
        """Largest difference between a decoder's log-probs and those of a plain forward.

        Args:
            make_decoder: what to check.
            model: the policy's.
            prompts: from which the shortest, the longest and one more are taken.
            samplings: of the prompts, for their limits and stop strings.

        Returns:
            In nats, over a few short completions; infinite when one is not finite.
        """
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts.prompt_ids[i]))
        chosen = sorted({by_length[0], by_length[-1], by_length[len(by_length) // 2]})
        few = PromptBatch(
            [prompts.prompts[i] for i in chosen],
            [prompts.prompt_ids[i] for i in chosen],
            {},
            [prompts.group_ids[i] for i in chosen],
        )
        limit = min(max(s.max_completion_tokens for s in samplings), _CHECKED_TOKENS)
        plain = Sampling(max_completion_tokens=limit, stop_strings=samplings[0].stop_strings)
        drawn = self._complete(
            make_decoder,
            model,
            few,
            [plain] * len(few),
            2,
            key=SamplingKey(0, 0),
            on_finished=None,
            counts=RolloutCounts(),
        )
        difference = (self._plain_logprobs(model, few, drawn) - drawn.sampler_logprobs).abs()
        return float(difference[drawn.completion_mask].max())

    def _plain_logprobs(
        self, model: PreTrainedModel, prompts: PromptBatch, drawn: Completions
    ) -> Tensor:
        """Log-probs (B, C) of completions from a forward without a cache."""
        repeated = [ids for ids in prompts.prompt_ids for _ in range(2)]
        prompt_ids, prompt_mask = left_pad(repeated, self.fallback.pad_token_id, self.policy.device)
        mask = torch.cat([prompt_mask, drawn.completion_mask], dim=1)
        inputs: dict[str, Any] = {
            "input_ids": torch.cat([prompt_ids, drawn.completion_ids], dim=1),
            "attention_mask": mask.long(),
            "use_cache": False,
        }
        accepts = inspect.signature(model.forward).parameters
        num_logits = drawn.completion_ids.shape[1] + 1
        if "position_ids" in accepts:
            inputs["position_ids"] = position_ids(mask)
        if "logits_to_keep" in accepts:
            inputs["logits_to_keep"] = num_logits
        # The last position predicts a token past the completion.
        logits = model(**inputs).logits[:, -num_logits:-1, : self.policy.num_tokens]
        return token_logprobs(logits, drawn.completion_ids)

    def _tolerance(self) -> float:
        device = self.policy.device
        is_short = torch.is_autocast_enabled(device.type) or any(
            torch.finfo(p.dtype).bits < 32 for p in self.policy.parameters()
        )
        # On a GPU this setting allows matrix products with fewer bits.
        is_short |= device.type != "cpu" and torch.get_float32_matmul_precision() != "highest"
        return _TOLERANCE_SHORT if is_short else _TOLERANCE


def _no_decoder(model: PreTrainedModel, lengths: Lengths) -> Decoder:
    raise NotImplementedError("it has failed its check")

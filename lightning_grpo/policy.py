"""The policy: a causal language model, its log-probs, and how it is loaded."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lightning_grpo.logprobs import token_entropy, token_logprobs
from lightning_grpo.masking import position_ids
from lightning_grpo.paths import resolve_package_path

Dtype = Literal["float32", "bfloat16", "auto"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters in place of full fine-tuning; the frozen base serves as the reference.

    W' = W + (alpha / rank) * B A

    Source: LoRA (arXiv:2106.09685), eq. 3.

    Args:
        rank: columns of A and B, >= 1.
        alpha: scale of the update before it is divided by the rank.
        target_modules: names of the linear layers that get an adapter, or "all-linear".
    """

    rank: int = 16
    alpha: float = 32.0
    target_modules: str | list[str] = "all-linear"


class PolicyOutput(NamedTuple):
    """What one forward says about the completion tokens."""

    logprobs: Tensor
    """(B, C) at least float32."""
    entropy: Tensor
    """(B, C) entropy of the distribution each token was drawn from, detached."""


class Policy(nn.Module):
    """A causal LM that answers with log-probs of completions.

    Everything that touches a parameter happens inside `forward`, so that this module can be the
    root of FSDP2.

    Args:
        model: a transformers model, or a peft model around one.
        num_tokens: tokens the tokenizer knows; logits past them are rows of padding in the
            embedding and are never sampled nor counted.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, num_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.num_tokens = num_tokens
        self._accepts = frozenset(inspect.signature(self.causal_lm.forward).parameters)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, without the peft wrapper."""
        if isinstance(self.model, PeftModel):
            return self.model.get_base_model()  # type: ignore[return-value]
        return self.model

    @property
    def is_lora(self) -> bool:
        """Whether only adapters are trained."""
        return isinstance(self.model, PeftModel)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def rounds_small_updates(self) -> bool:
        """Whether weights that are trained have fewer bits than float32."""
        trained = [p.dtype for p in self.parameters() if p.requires_grad]
        return any(torch.finfo(dtype).bits < 32 for dtype in trained)

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> PolicyOutput:
        """Log-probs and entropies of completion tokens given their prompts.

        logprob_t = log softmax(logits_{P-1+t} / temperature)[completion_t]

        Args:
            prompt_ids: (B, P) left-padded.
            prompt_mask: (B, P) bool, True = real token.
            completion_ids: (B, C) right-padded.
            completion_mask: (B, C) bool, True = real token.
            temperature: the sampling temperature, > 0.
            with_entropy: whether to compute the entropy, which costs as much as the log-probs.

        Returns:
            Log-probs and entropies, (B, C) each; those off the mask mean nothing. Without
            `with_entropy` the entropies are 0.
        """
        num_logits = completion_ids.shape[1] + 1
        attention_mask = torch.cat([prompt_mask, completion_mask], dim=1)
        inputs: dict[str, Any] = {
            "input_ids": torch.cat([prompt_ids, completion_ids], dim=1),
            "attention_mask": attention_mask.long(),
            "use_cache": False,
        }
        if "position_ids" in self._accepts:
            inputs["position_ids"] = position_ids(attention_mask)
        if "logits_to_keep" in self._accepts:
            inputs["logits_to_keep"] = num_logits
        # The last position predicts a token past the completion.
        logits = self.model(**inputs).logits[:, -num_logits:-1, : self.num_tokens]
        logprobs = token_logprobs(logits, completion_ids, temperature=temperature)
        entropy = torch.zeros_like(logprobs)
        if with_entropy:
            with torch.no_grad():  # row by row: its temporaries are as wide as the vocabulary
                for row, row_logits in enumerate(logits.detach()):
                    entropy[row] = token_entropy(row_logits[None], temperature=temperature)[0]
        return PolicyOutput(logprobs, entropy)

    def call_unsharded(self, function: Callable[[PreTrainedModel], Result]) -> Result:
        """Call `function` on the transformers model with every parameter whole on this rank.

        Without FSDP2 this only calls it. Under FSDP2 it runs as a forward of the root (see
        `sharding.shard_policy`), gathers all layers once, and shards them again; the ranks may do
        different amounts of work in between, such as decoding to different lengths.

        Args:
            function: gets the transformers model, adapters in place.

        Returns:
            What the function returns.
        """
        from torch.distributed.fsdp import FSDPModule

        _, *inner = self.modules()
        shards = [module for module in inner if isinstance(module, FSDPModule)]
        for shard in shards:
            shard.unshard()
            shard.set_reshard_after_forward(False, recurse=False)
        try:
            return function(self.causal_lm)
        finally:
            for shard in shards:
                shard.set_reshard_after_forward(True, recurse=False)
                shard.reshard()

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[None]:
        """The base model of a LoRA policy, which is its frozen reference."""
        if not isinstance(self.model, PeftModel):
            raise ValueError("only a LoRA policy has an adapter to switch off")
        with self.model.disable_adapter():
            yield

    @property
    def max_positions(self) -> int | None:
        """Longest sequence in tokens that the model's positions allow, if it has such a limit."""
        config = self.causal_lm.config
        for name in ("max_position_embeddings", "n_positions"):
            if getattr(config, name, None):
                return int(getattr(config, name))
        return None


def load_policy(
    name_or_path: str,
    *,
    num_tokens: int,
    init: Literal["pretrained", "random"] = "pretrained",
    revision: str | None = None,
    dtype: Dtype = "float32",
    attn_implementation: str | None = None,
    lora: Lora | None = None,
    activation_checkpointing: bool = False,
    dropout: bool = False,
) -> Policy:
    """Load a causal LM as a policy; no code from the model's folder is ever run.

    Args:
        name_or_path: a name on the Hub, a local folder, or `package://` data.
        num_tokens: tokens the tokenizer knows.
        init: take the folder's weights, or only its configuration and draw the weights.
        revision: branch, tag or commit of a Hub name.
        dtype: of the parameters.
        attn_implementation: as in transformers ("sdpa", "eager", "flash_attention_2", ...).
        lora: train adapters only.
        activation_checkpointing: recompute activations in the backward pass.
        dropout: keep the model's dropout during the update.

    Returns:
        The policy, on the CPU.

    Raises:
        ValueError: the tokenizer knows more tokens than the model embeds.
    """
    path = resolve_package_path(name_or_path)
    options: dict[str, Any] = {"trust_remote_code": False}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    torch_dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    if init == "random":
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        if dtype != "auto":
            options["dtype"] = torch_dtype
        model = AutoModelForCausalLM.from_config(config, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype=torch_dtype, **options
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    if vocabulary < num_tokens:
        raise ValueError(
            f"model.name_or_path {name_or_path!r} embeds {vocabulary} tokens but its tokenizer "
            f"has {num_tokens}: use the tokenizer that belongs to the model"
        )
    if not dropout:
        _zero_dropout(model)
    if activation_checkpointing:
        # Renamed in transformers 5; the old name goes in 6.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if lora is not None:
        model = _add_adapter(model, lora)
    return Policy(model, num_tokens)


def _zero_dropout(model: nn.Module) -> None:
    # In the modules and not in the configuration, which is what an export writes.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _add_adapter(model: PreTrainedModel, lora: Lora) -> PeftModel:
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft divides it, a float is fine
        lora_dropout=0.0,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)  # type: ignore[return-value]


def eos_token_ids(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: those of the generation config and the tokenizer's.

    Args:
        policy: whose generation config is read.
        tokenizer: whose EOS is added.

    Returns:
        Sorted ids; empty when neither knows one.
    """
    config = policy.causal_lm.generation_config
    ids = getattr(config, "eos_token_id", None)
    found = set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return sorted(int(i) for i in found)

"""The policy: a causal language model, its log-probs, and how it is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lightning_grpo.adapters import Lora, adapter_in_use, lora_config, same_adapter
from lightning_grpo.logprobs import Entropy
from lightning_grpo.output_layer import (
    check_plain,
    is_plain,
    logprobs_of_model,
    logprobs_of_states,
    takes_num_logits,
)
from lightning_grpo.packing import PackedLayout
from lightning_grpo.paths import resolve_package_path
from lightning_grpo.trunk import (
    checkpoint_activations,
    completion_states,
    keep_activations,
    layout_for,
    padded_inputs,
    zero_dropout,
)

Dtype = Literal["float32", "bfloat16", "auto"]
Result = TypeVar("Result")


class PolicyOutput(NamedTuple):
    """What one forward says about the completion tokens."""

    logprobs: Tensor
    """(B, C) at least float32."""
    entropy: Tensor
    """(B, C) entropy of the distribution each token was drawn from."""
    hidden: Tensor | None = None
    """(B, C + 1, H) last hidden states: those that predict each token, and that of the last."""


class Policy(nn.Module):
    """A causal LM that answers with log-probs of completions.

    Everything that touches a parameter happens inside `forward`, so that this module can be the
    root of FSDP2.

    Args:
        model: a transformers model, or a peft model around one.
        num_tokens: tokens the tokenizer knows; logits past them are rows of padding in the
            embedding and are never sampled nor counted.
    """

    is_packing: bool
    """Whether a forward takes each prompt once and no padding, see packing.py."""
    has_plain_output: bool
    """Whether the logits are one linear layer of the last hidden states, and need not be held."""

    def __init__(self, model: PreTrainedModel | PeftModel, num_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.num_tokens = num_tokens
        self.is_checkpointing_activations = False
        self.is_packing = False
        self.has_plain_output = is_plain(self.causal_lm)
        # By name: sharding exchanges the parameters, and a critic may add an adapter or freeze us.
        self.trainable_names = frozenset(n for n, p in self.named_parameters() if p.requires_grad)

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
    def trunk(self) -> nn.Module:
        """The transformers model without its output layer."""
        model = self.causal_lm
        return getattr(model, model.base_model_prefix)  # type: ignore[no-any-return]

    @property
    def rounds_small_updates(self) -> bool:
        """Whether weights that are trained have fewer bits than float32."""
        trained = [p.dtype for p in self.trainable().values()]
        return any(torch.finfo(dtype).bits < 32 for dtype in trained)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of what reinforcement learning moves, whether it is frozen now or not.

        All parameters, or under LoRA those of the policy's own adapter.
        """
        named = self.named_parameters()
        return {name: p for name, p in named if name in self.trainable_names}

    def base_names(self) -> list[str]:
        """Names of the parameters and buffers that belong to no adapter."""
        return [name for name in self.state_dict() if ".lora_" not in name]

    def freeze(self, is_frozen: bool) -> None:
        """Keep the policy where it is, for as long as only its critic learns.

        Args:
            is_frozen: whether its parameters take no gradients.
        """
        gather_no_more(self)  # the parameters that stay are the sharded ones
        for parameter in self.trainable().values():
            parameter.requires_grad_(not is_frozen)

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        temperature: float = 1.0,
        entropy: Entropy = "none",
        with_hidden: bool = False,
        group_ids: Tensor | None = None,
    ) -> PolicyOutput:
        """Log-probs and entropies of completion tokens given their prompts.

        logprob_t = log softmax(logits_{P-1+t} / temperature)[completion_t]

        Args:
            prompt_ids: (B, P) left-padded.
            prompt_mask: (B, P) bool, True = real token.
            completion_ids: (B, C) right-padded.
            completion_mask: (B, C) bool, True = real token.
            temperature: the sampling temperature, > 0.
            entropy: whether to compute the entropy, which costs as much as the log-probs, and
                whether with gradients.
            with_hidden: return the last hidden states too.
            group_ids: (B,) the group of each row, whose prompt a packed forward takes once.

        Returns:
            Log-probs and entropies, (B, C) each, 0 off the mask.
        """
        rows = (prompt_ids, prompt_mask, completion_ids, completion_mask)
        layer: Any = self.causal_lm.get_output_embeddings()
        options: dict[str, Any] = {
            "num_tokens": self.num_tokens,
            "temperature": temperature,
            "entropy": entropy,
        }
        hidden: Tensor | None
        if self.has_plain_output:
            layout = self.layout(self.trunk, *rows, group_ids)
            hidden = completion_states(self.trunk, *rows, layout)
            selected = None if layout is None else completion_mask
            logprobs, entropies = logprobs_of_states(
                layer, hidden[:, :-1], completion_ids, selected, **options
            )
        else:
            inputs = self.inputs(*rows)
            if takes_num_logits(self.causal_lm):
                inputs["logits_to_keep"] = completion_ids.shape[1] + 1
            logprobs, entropies, hidden = logprobs_of_model(
                self.model, layer, inputs, completion_ids, with_hidden=with_hidden, **options
            )
        logprobs, entropies = (torch.where(completion_mask, x, 0.0) for x in (logprobs, entropies))
        return PolicyOutput(logprobs, entropies, hidden if with_hidden else None)

    def hidden_states(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        adapter: str | None = None,
        group_ids: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states of completions, without the output layer.

        Args:
            prompt_ids: (B, P) left-padded.
            prompt_mask: (B, P) bool, True = real token.
            completion_ids: (B, C) right-padded.
            completion_mask: (B, C) bool, True = real token.
            adapter: a LoRA adapter in place of the policy's own.
            group_ids: (B,) the group of each row.

        Returns:
            (B, C + 1, H): those that predict each token, and that of the last token.
        """
        rows = (prompt_ids, prompt_mask, completion_ids, completion_mask)
        with self.adapter(adapter) if adapter else contextlib.nullcontext():
            return completion_states(self.trunk, *rows, self.layout(self.trunk, *rows, group_ids))

    def layout(self, trunk: nn.Module, *rows: Any) -> PackedLayout | None:
        """How to forward rows packed through a trunk of the policy's kind, or None for not so.

        Args:
            trunk: the policy's, or that of a separate critic.
            *rows: of `layout_for`.
        """
        if not self.is_packing or type(trunk) is not type(self.trunk):
            return None
        return layout_for(trunk, *rows)

    def inputs(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
    ) -> dict[str, Any]:
        """What a transformers model is called with for prompts and their completions."""
        rows = (prompt_ids, prompt_mask, completion_ids, completion_mask)
        return padded_inputs(self.causal_lm, *rows)

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

    def adapter(self, name: str | None) -> contextlib.AbstractContextManager[None]:
        """A LoRA policy with another of its adapters, or (None) with the base model alone."""
        return adapter_in_use(self.model, name)

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass, with the adapter of the forward."""
        checkpoint_activations(self.causal_lm, lambda: same_adapter(self.model))
        self.is_checkpointing_activations = True

    def keep_activations(self) -> None:
        """Keep activations from the forward to the backward pass."""
        keep_activations(self.causal_lm)
        self.is_checkpointing_activations = False

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
        zero_dropout(model)
    if lora is not None:
        model = get_peft_model(model, lora_config(lora))  # type: ignore[assignment]
    policy = Policy(model, num_tokens)
    if policy.has_plain_output:
        policy.has_plain_output = check_plain(policy.causal_lm, policy.trunk)
    if activation_checkpointing:
        policy.checkpoint_activations()
    return policy


def gather_no_more(module: nn.Module) -> None:
    """Shard what FSDP2 has left whole on this rank; the root stays so after a forward."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


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

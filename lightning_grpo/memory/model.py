"""A model without its weights: what it is made of, counted on the meta device."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from lightning_grpo.adapters import Lora, lora_config
from lightning_grpo.critic import CriticSettings, critic_parameters, make_critic
from lightning_grpo.paths import resolve_package_path
from lightning_grpo.policy import Policy
from lightning_grpo.trunk import zero_dropout


@dataclass(frozen=True)
class ModelSpec:
    """All that decides how many bytes a model takes; equal specs are measured once.

    Args:
        config_json: configuration of transformers, as JSON.
        dtype: of the parameters as loaded.
        is_converted: whether the adapters are converted to that dtype too, as a trainer whose
            precision is bf16-true does; peft keeps them in float32 otherwise.
        lora: adapters in place of full fine-tuning.
        activation_checkpointing: recompute activations in the backward pass.
        attn_implementation: of transformers; null for its default.
        num_tokens: tokens the tokenizer knows; 0 for all that the model embeds.
        dropout: keep the model's dropout.
        critic: of PPO; null has none.
        critic_config_json: configuration of a separate critic that comes from a reward model.
    """

    config_json: str
    dtype: torch.dtype = torch.float32
    is_converted: bool = False
    lora: Lora | None = None
    activation_checkpointing: bool = False
    attn_implementation: str | None = None
    num_tokens: int = 0
    dropout: bool = False
    critic: CriticSettings | None = None
    critic_config_json: str | None = None

    def __hash__(self) -> int:
        # Lists inside of the settings have no hash.
        return hash((self.config_json, self.dtype, self.activation_checkpointing, repr(self.lora)))

    @property
    def config(self) -> PretrainedConfig:
        """A new configuration object."""
        return config_from_json(self.config_json)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(self.config.num_hidden_layers)

    @property
    def vocab_size(self) -> int:
        """Rows of the output embedding."""
        return int(self.config.vocab_size)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return int(self.config.hidden_size)

    def with_layers(self, num_layers: int) -> ModelSpec:
        """The same models with fewer layers."""
        critic = self.critic_config_json
        return replace(
            self,
            config_json=_cut(self.config_json, num_layers),
            critic_config_json=None if critic is None else _cut(critic, num_layers),
        )


def _cut(config_json: str, num_layers: int) -> str:
    config = config_from_json(config_json)
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    return config_as_json(config)


def config_as_json(config: PretrainedConfig) -> str:
    """A configuration as text that can be compared."""
    return json.dumps(config.to_dict(), sort_keys=True, default=str)


def config_from_json(text: str) -> PretrainedConfig:
    """What `config_as_json` was given."""
    options = json.loads(text)
    config: PretrainedConfig = AutoConfig.for_model(options.pop("model_type"), **options)
    return config


def spec_from_config(
    config: PretrainedConfig, *, dtype: str = "float32", **options: Any
) -> ModelSpec:
    """Make a spec.

    Args:
        config: of transformers.
        dtype: a name of torch, or auto for the configuration's own.
        **options: further fields of `ModelSpec`.

    Returns:
        The spec.
    """
    own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    torch_dtype = own if dtype == "auto" else getattr(torch, dtype)
    config.dtype = None  # it would only make equal models differ
    return ModelSpec(config_as_json(config), dtype=torch_dtype, **options)


def read_config(name_or_path: str, revision: str | None = None) -> PretrainedConfig:
    """The configuration of a name on the Hub, a local folder, or `package://` data."""
    path = resolve_package_path(name_or_path)
    found: PretrainedConfig = AutoConfig.from_pretrained(
        path, revision=revision, trust_remote_code=False
    )
    return found


class Models(NamedTuple):
    """A policy and its critic, if it has one."""

    policy: Policy
    critic: nn.Module | None


def build_on_meta(spec: ModelSpec) -> Models:
    """The policy as `load_policy` makes it, and its critic, with shapes but no memory.

    Args:
        spec: of the policy.

    Returns:
        Both on the meta device, in training mode.
    """
    with torch.device("meta"):
        policy = _policy_on_meta(spec)
        if spec.critic is None:
            return Models(policy, None)
        base = policy
        if spec.critic_config_json is not None:
            # Of a reward model only the trunk counts, which is that of a causal LM.
            base = _policy_on_meta(replace(spec, config_json=spec.critic_config_json, lora=None))
        settings = replace(spec.critic, name_or_path=None)
        return Models(policy, make_critic(settings, base, tokenizer=None).train())


def _policy_on_meta(spec: ModelSpec) -> Policy:
    options = {"attn_implementation": spec.attn_implementation} if spec.attn_implementation else {}
    model: Any = AutoModelForCausalLM.from_config(
        spec.config, dtype=spec.dtype, trust_remote_code=False, **options
    )
    if not spec.dropout:
        zero_dropout(model)
    if spec.lora is not None:
        model = get_peft_model(model, lora_config(spec.lora))
    if spec.is_converted:
        model = model.to(spec.dtype)
    policy = Policy(model, spec.num_tokens or spec.vocab_size).train()
    if spec.activation_checkpointing:
        policy.checkpoint_activations()
    return policy


class Counts(NamedTuple):
    """Parameters of a model, in bytes where not said otherwise."""

    weights: int
    """All parameters."""
    trainable: int
    """Those that get gradients."""
    num_trainable: dict[torch.dtype, int]
    """How many numbers of each dtype that is."""
    largest_trainable: int
    """The largest parameter with a gradient."""
    layer: int
    """The largest decoder layer."""
    rest: int
    """What is outside of the decoder layers: embeddings and the last norm."""
    has_equal_layers: bool
    """Whether every layer has the same parameters, so that two stand for all."""


NOTHING = Counts(0, 0, {}, 0, 0, 0, True)


class ModelCounts(NamedTuple):
    """Parameters of the policy and of what its critic adds."""

    policy: Counts
    critic: Counts


@functools.lru_cache(maxsize=64)
def count_parameters(spec: ModelSpec) -> ModelCounts:
    """Count the parameters of a policy and its critic; tied ones once.

    Args:
        spec: of both.

    Returns:
        Counts in bytes.
    """
    policy, critic = build_on_meta(spec)
    added = critic_parameters(critic, policy) if critic is not None else []
    own = {id(p) for p in added}
    parameters = [p for p in policy.parameters() if id(p) not in own]
    types = getattr(spec.config, "layer_types", None) or []
    counts = _counts(parameters, _decoder_layers(policy, spec.num_layers))
    counts = counts._replace(has_equal_layers=counts.has_equal_layers and len(set(types)) <= 1)
    if critic is None:
        return ModelCounts(counts, NOTHING)
    for parameter in added:
        parameter.requires_grad_(True)  # an adapter that is not in use has none
    num_layers = spec.num_layers
    if spec.critic_config_json is not None:
        num_layers = int(config_from_json(spec.critic_config_json).num_hidden_layers)
    return ModelCounts(counts, _counts(added, _decoder_layers(critic, num_layers)))


def _counts(parameters: list[nn.Parameter], layers: list[nn.Module]) -> Counts:
    trainable = [p for p in parameters if p.requires_grad]
    layer_bytes = [_num_bytes(layer.parameters()) for layer in layers]
    num_trainable: dict[torch.dtype, int] = {}
    for parameter in trainable:
        dtype = parameter.dtype
        num_trainable[dtype] = num_trainable.get(dtype, 0) + parameter.numel()
    total = _num_bytes(parameters)
    return Counts(
        weights=total,
        trainable=_num_bytes(trainable),
        num_trainable=num_trainable,
        largest_trainable=max(_num_bytes([p]) for p in trainable),
        layer=max(layer_bytes, default=0),
        rest=total - min(sum(layer_bytes), total),
        has_equal_layers=bool(layer_bytes) and len(set(layer_bytes)) == 1,
    )


def _num_bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _decoder_layers(module: nn.Module, num_layers: int) -> list[nn.Module]:
    for inner in module.modules():
        if isinstance(inner, nn.ModuleList) and len(inner) == num_layers:
            kinds = {type(layer) for layer in inner}
            if len(kinds) == 1 and not kinds & {nn.Linear, nn.ModuleList}:
                return list(inner)
    return []

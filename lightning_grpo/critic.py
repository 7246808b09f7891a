"""The critic: what a state is worth, in three forms that share one interface.

A critic gives the value of the state before each completion token, and of the state after the last
one. Its head is one linear layer in float32 that starts at zero, so that a fresh critic says 0
everywhere, unless it comes from a reward model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from lightning_grpo.adapters import Lora, add_adapter, remove_adapter
from lightning_grpo.paths import resolve_package_path
from lightning_grpo.policy import Policy
from lightning_grpo.tokenizing import load_tokenizer
from lightning_grpo.trunk import checkpoint_activations, completion_states, zero_dropout
from lightning_grpo.types import Rollout

CriticForm = Literal["head", "lora", "separate"]
CRITIC_ADAPTER = "critic"


@dataclass(frozen=True)
class CriticSettings:
    """How the critic of PPO is made and trained.

    Args:
        form: head, one linear layer on the policy's last hidden states, whose gradients reach the
            policy; lora, adapters of its own on the frozen base of a LoRA policy; separate, a
            model of its own.
        name_or_path: of a separate critic: the name or folder of a reward model with the policy's
            vocabulary; null copies the policy as it is when the critic is built.
        lora: adapters of a lora critic.
        learning_rate: of the critic, constant over the run.
        max_grad_norm: the critic's gradient is clipped to this norm, apart from the policy's; null
            never clips it.
        num_warmup_iterations: iterations at the start of a PPO run in which the critic learns and
            the policy does not move; on the way from GRPO, the least for which the critic learns
            beside it.
    """

    form: CriticForm = "head"
    name_or_path: str | None = None
    lora: Lora = field(default_factory=Lora)
    learning_rate: float = 1e-5
    max_grad_norm: float | None = 1.0
    num_warmup_iterations: int = 0

    def __post_init__(self) -> None:
        if self.form not in ("head", "lora", "separate"):
            raise ValueError(f"model.critic.form must be head, lora or separate, got {self.form!r}")
        if self.name_or_path is not None and self.form != "separate":
            raise ValueError(
                f"model.critic.name_or_path is that of a separate critic, but form is {self.form}"
            )
        if not self.learning_rate > 0:
            raise ValueError(
                f"model.critic.learning_rate must be positive, got {self.learning_rate}"
            )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(
                f"model.critic.max_grad_norm must be positive or null, got {self.max_grad_norm}"
            )
        if self.num_warmup_iterations < 0:
            raise ValueError(
                "model.critic.num_warmup_iterations must be at least 0, got "
                f"{self.num_warmup_iterations}"
            )


class Critic(Protocol):
    """What the update and the scoring ask of a critic, which is an nn.Module."""

    needs_policy_hidden: bool
    """Whether it reads the policy's own hidden states, and not a forward of its own."""

    def __call__(self, policy: Policy, rows: Rollout, hidden: Tensor | None) -> Tensor:
        """Values (B, C + 1) of the states before each token and after the last position."""
        ...


class ValueHead(nn.Module):
    """One linear layer from hidden states to values, in float32.

    V = h . w + b,  w = 0 and b = 0 at first

    Source: N Implementation Details of RLHF with PPO, which starts it at zero too.

    Args:
        hidden_size: H, width of the hidden states.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        # Explicit: the default may be that of a half precision run.
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    def _apply(self, fn: Any, recurse: bool = True) -> ValueHead:
        # What casts a model to half precision does not mean this layer: its updates would be lost.
        def not_half(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            is_cut = torch.finfo(moved.dtype).bits < torch.finfo(tensor.dtype).bits
            return tensor.to(moved.device) if is_cut else moved

        super()._apply(not_half, recurse)
        return self

    def forward(self, hidden: Tensor) -> Tensor:
        """Values (B, T) of hidden states (B, T, H)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.to(self.weight.dtype) @ self.weight + self.bias


class HeadCritic(nn.Module):
    """A value head on the policy's last hidden states."""

    needs_policy_hidden = True

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.head = ValueHead(hidden_size_of(policy))

    def forward(self, policy: Policy, rows: Rollout, hidden: Tensor | None) -> Tensor:
        """Values (B, C + 1) from the policy's hidden states (B, C + 1, H)."""
        if hidden is None:
            raise ValueError("a value head needs the policy's hidden states")
        values: Tensor = self.head(hidden)
        return values


class LoraCritic(nn.Module):
    """Adapters of its own on the base that a LoRA policy shares, and a value head.

    The adapters live inside the policy's model, under a name of their own.
    """

    needs_policy_hidden = False

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.head = ValueHead(hidden_size_of(policy))

    def forward(self, policy: Policy, rows: Rollout, hidden: Tensor | None) -> Tensor:
        """Values (B, C + 1) from the shared base with the critic's adapters."""
        states = policy.hidden_states(
            rows.prompt_ids,
            rows.prompt_mask,
            rows.completion_ids,
            rows.completion_mask,
            adapter=CRITIC_ADAPTER,
            group_ids=rows.group_ids,
        )
        values: Tensor = self.head(states)
        return values


class SeparateCritic(nn.Module):
    """A trunk and a value head of its own.

    Args:
        trunk: a transformers model without an output layer.
        head: on top of it.
    """

    needs_policy_hidden = False

    def __init__(self, trunk: nn.Module, head: ValueHead) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, policy: Policy, rows: Rollout, hidden: Tensor | None) -> Tensor:
        """Values (B, C + 1) from its own forward."""
        ids = (rows.prompt_ids, rows.prompt_mask, rows.completion_ids, rows.completion_mask)
        layout = policy.layout(self.trunk, *ids, rows.group_ids)
        values: Tensor = self.head(completion_states(self.trunk, *ids, layout))
        return values


def hidden_size_of(policy: Policy) -> int:
    """H, the width of the hidden states that the output layer reads."""
    layer = policy.causal_lm.get_output_embeddings()
    return int(layer.weight.shape[1])


def make_critic(settings: CriticSettings, policy: Policy, tokenizer: Any) -> nn.Module:
    """Make a critic on the CPU, with its own weights where it has any.

    The trunk of a separate critic that copies the policy still has to be filled, by `copy_trunk`,
    once both are sharded alike. A lora critic adds its adapters to the policy.

    Args:
        settings: which form.
        policy: whose states are valued.
        tokenizer: the policy's.

    Returns:
        A `Critic`.

    Raises:
        ValueError: a lora critic of a policy without adapters, or a reward model that does not fit.
    """
    if settings.form == "head":
        return HeadCritic(policy)
    if settings.form == "lora":
        if not policy.is_lora:
            raise ValueError(
                "model.critic.form lora puts the critic's adapters on the base of a LoRA policy, "
                "but model.lora is not set: set it, or use form head or separate"
            )
        add_adapter(policy.model, CRITIC_ADAPTER, settings.lora)  # type: ignore[arg-type]
        return LoraCritic(policy)
    if settings.name_or_path is not None:
        trunk, head = _load_reward_model(settings.name_or_path, policy, tokenizer)
    else:
        config = policy.causal_lm.config
        dtype = next(policy.trunk.parameters()).dtype
        trunk = AutoModel.from_config(config, dtype=dtype, trust_remote_code=False)
        head = ValueHead(hidden_size_of(policy))
    zero_dropout(trunk)
    if policy.is_checkpointing_activations:
        checkpoint_activations(trunk)
    return SeparateCritic(trunk, head)


def own_layers(critic: nn.Module, policy: Policy) -> list[nn.Module]:
    """The layers that a critic has inside the policy: the adapters of a lora critic."""
    if not isinstance(critic, LoraCritic):
        return []
    named = policy.named_modules()
    mine = [m for name, m in named if ".lora_" in name and name.endswith(f".{CRITIC_ADAPTER}")]
    return [module for module in mine if any(True for _ in module.parameters())]


def critic_parameters(critic: nn.Module, policy: Policy) -> list[nn.Parameter]:
    """The parameters of a critic, with those that it has inside the policy."""
    modules = (critic, *own_layers(critic, policy))
    return [parameter for module in modules for parameter in module.parameters()]


def remove_critic(critic: nn.Module, policy: Policy) -> None:
    """Take what a critic has put into the policy out again."""
    if isinstance(critic, LoraCritic):
        remove_adapter(policy.model, CRITIC_ADAPTER)  # type: ignore[arg-type]


def check_reward_model(path: str, tokenizer: Any) -> Any:
    """Refuse a folder whose model cannot start a critic, without reading its weights.

    Args:
        path: of `model.critic.name_or_path`.
        tokenizer: the policy's.

    Returns:
        Its configuration.

    Raises:
        ValueError: nothing is there, or a model with another vocabulary or several outputs.
    """
    try:
        theirs = load_tokenizer(resolve_package_path(path))
        config = AutoConfig.from_pretrained(resolve_package_path(path), trust_remote_code=False)
    except OSError as error:
        raise ValueError(f"model.critic.name_or_path {path!r} cannot be read: {error}") from error
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"model.critic.name_or_path {path!r} has another vocabulary than the policy "
            f"({len(theirs)} tokens against {len(tokenizer)}), but a critic reads the policy's "
            "token ids: use a reward model of the policy's family, or null to copy the policy"
        )
    if config.num_labels != 1:
        raise ValueError(
            f"model.critic.name_or_path {path!r} has {config.num_labels} outputs (num_labels); a "
            "reward model has one"
        )
    return config


def _load_reward_model(path: str, policy: Policy, tokenizer: Any) -> tuple[nn.Module, ValueHead]:
    config = check_reward_model(path, tokenizer)
    path = resolve_package_path(path)
    dtype = next(policy.trunk.parameters()).dtype
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        path, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True
    )
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"]))
        raise ValueError(
            f"model.critic.name_or_path {path!r} is no trained reward model: it lacks the weights "
            f"{missing}"
        )
    trunk = getattr(model, model.base_model_prefix)
    layer = next(m for m in model.children() if isinstance(m, nn.Linear))
    head = ValueHead(layer.in_features)
    with torch.no_grad():
        head.weight.copy_(layer.weight[0])
        if layer.bias is not None:
            head.bias.copy_(layer.bias)
    return trunk, head

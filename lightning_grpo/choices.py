"""What a run chooses from its machine, or by checking itself: once, and the same when it resumes.

Another choice is another order of summation, and so another run in the last bits. What an option
says counts more than what a checkpoint says, and that more than what is found here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_grpo.critic import SeparateCritic
from lightning_grpo.generation import EngineName, NativeEngine
from lightning_grpo.memory.run import refuse_what_cannot_fit
from lightning_grpo.packing_check import Packing, settle_packing
from lightning_grpo.policy import Policy
from lightning_grpo.trunk import checkpoint_activations, keep_activations
from lightning_grpo.types import Rollout

if TYPE_CHECKING:
    from lightning_grpo.module import GRPOModule

Auto = Literal["auto"]
OldLogprobs = Literal["recompute", "sampler"]
# The sampler's log-probs may stand for the training forward's when they are this close, in nats.
SAMPLER_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Choices:
    """What has been chosen; None where nothing is yet."""

    decoder: str | None = None
    """Of the native engine; transformers where none of its own passes its check."""
    is_packing: bool | None = None
    """Whether a forward takes each prompt once for its group, and no padding."""
    microbatch_tokens: int | None = None
    """Most tokens of one forward with gradients."""
    is_checkpointing: bool | None = None
    """Whether activations are recomputed in the backward pass."""
    old_logprobs: OldLogprobs | None = None
    """Where the old log-probs come from; stays None where no step needs any."""

    def over(self, others: Choices) -> Choices:
        """These choices, and those of others where nothing is chosen here."""
        return replace(others, **{k: v for k, v in asdict(self).items() if v is not None})


def chosen_by_options(
    microbatch_tokens: int | Auto,
    activation_checkpointing: bool | Auto,
    packing: Packing,
    old_logprobs: OldLogprobs | Auto,
) -> Choices:
    """What options of the module say; `auto` says nothing.

    Args:
        microbatch_tokens: most tokens of one forward with gradients, >= 1.
        activation_checkpointing: whether to recompute activations in the backward pass.
        packing: off never packs.
        old_logprobs: where the old log-probs come from.

    Returns:
        The choices.

    Raises:
        ValueError: a budget of nothing.
    """
    if microbatch_tokens != "auto" and microbatch_tokens < 1:
        raise ValueError(f"model.microbatch_tokens must be >= 1, got {microbatch_tokens}")
    return Choices(
        is_packing=False if packing == "off" else None,
        microbatch_tokens=None if microbatch_tokens == "auto" else microbatch_tokens,
        is_checkpointing=None if activation_checkpointing == "auto" else activation_checkpointing,
        old_logprobs=None if old_logprobs == "auto" else old_logprobs,
    )


def settle_forwards(module: GRPOModule, policy: Policy) -> None:
    """Let a policy recompute activations as chosen, and forward packed if all ranks find it can.

    Args:
        module: with the choice of activation checkpointing; gets that of packing.
        policy: of the module, not sharded.
    """
    if module.choices.is_checkpointing:
        policy.checkpoint_activations()
    settle_packing(policy, "off" if module.choices.is_packing is False else "auto")
    num_off = float(module.sum_over_ranks(torch.tensor(float(not policy.is_packing))))
    policy.is_packing = num_off == 0
    module.choices = replace(module.choices, is_packing=policy.is_packing)
    module.is_forward_settled = True


def resume_choices(module: GRPOModule, saved: dict[str, Any]) -> None:
    """Go on with the choices of the run that is resumed; those that cannot be kept are named.

    Args:
        module: in fit, with its policy, and perhaps a critic.
        saved: of the checkpoint, as `asdict` gave it.

    Raises:
        ValueError: with these choices the run does not fit into the memory of this machine.
    """
    found = module.choices
    wanted = module.option_choices.over(Choices(**saved).over(found))
    if wanted.is_packing and not found.is_packing:
        rank_zero_warn(
            "the run that is resumed forwarded prompts packed, which this machine or this version "
            "cannot: it goes on without, and not to the same bits"
        )
        wanted = replace(wanted, is_packing=False)
    is_open = module.option_choices.old_logprobs is None
    if is_open and wanted.old_logprobs == "sampler" and not _sampler_can_be_exact(module):
        rank_zero_warn(
            "the run that is resumed took old log-probs from its sampler, which this precision or "
            "sampling does not allow: they are recomputed"
        )
        wanted = replace(wanted, old_logprobs="recompute")
    module.choices = wanted
    module._engine = None  # the next one begins with the decoder of the checkpoint
    module.policy.is_packing = bool(wanted.is_packing)
    if wanted.is_checkpointing != found.is_checkpointing:
        _recompute_activations(module, bool(wanted.is_checkpointing))
    if module.check_memory:
        refuse_what_cannot_fit(module, module.trainer)


def settle_decoder(module: GRPOModule) -> None:
    """Agree over the ranks on the decoder that each has found, after its first rollout. Collective.

    Args:
        module: with its engine; gets the choice.
    """
    engine = module.engine
    if not isinstance(engine, NativeEngine):
        return
    names = engine.decoder_names
    # The last that any rank has come to works for all.
    own = torch.tensor(float(names.index(engine.decoder_name or names[0])))
    engine.decoder_name = names[int(module.max_over_ranks(own))]
    module.choices = replace(module.choices, decoder=engine.decoder_name)


def settle_old_logprobs(module: GRPOModule, rollout: Rollout, recomputed: Tensor) -> None:
    """Decide once whether the sampler's log-probs can serve as the old ones. Collective.

    Args:
        module: whose sampling and precision count; gets the choice.
        rollout: with the sampler's log-probs.
        recomputed: (B, C) of the training forward.
    """
    difference = (rollout.sampler_logprobs - recomputed).abs()
    difference = torch.where(rollout.completion_mask, difference, 0.0)
    # A NaN compares as not close enough.
    is_far = not float(difference.max()) <= SAMPLER_TOLERANCE
    num_far = float(module.sum_over_ranks(torch.tensor(float(is_far))))
    choice: OldLogprobs = "recompute"
    if num_far == 0 and _sampler_can_be_exact(module):
        choice = "sampler"
    rank_zero_info(
        f"old log-probs: {choice} (sampler against training forward: at most "
        f"{float(difference.max()):.1e} nats apart, precision {module.trainer.precision})"
    )
    module.choices = replace(module.choices, old_logprobs=choice)


def text_of(choices: Choices, engine: EngineName) -> str:
    """All choices in one line.

    Args:
        choices: after the first rollout was scored.
        engine: that the options ask for.

    Returns:
        What to print.
    """
    made = engine if engine == "transformers" else f"native ({choices.decoder})"
    if engine == "native" and choices.decoder == "transformers":
        made = "transformers, in place of native"
    parts = {
        "engine": made,
        "packing": _on(choices.is_packing),
        "token budget": choices.microbatch_tokens,
        "activation checkpointing": _on(choices.is_checkpointing),
        "old log-probs": choices.old_logprobs or "none needed",
    }
    return "choices: " + ", ".join(f"{name} {value}" for name, value in parts.items())


def _on(is_on: bool | None) -> str:
    return "on" if is_on else "off"


def _sampler_can_be_exact(module: GRPOModule) -> bool:
    """Whether the sampler draws from the very distribution that the loss differentiates."""
    is_restricted = module.settings.restricts_tokens
    return module.trainer.precision == "32-true" and not is_restricted


def _recompute_activations(module: GRPOModule, is_on: bool) -> None:
    if is_on:
        module.policy.checkpoint_activations()
    else:
        module.policy.keep_activations()
    if isinstance(module.critic, SeparateCritic):
        (checkpoint_activations if is_on else keep_activations)(module.critic.trunk)

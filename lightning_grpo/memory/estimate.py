"""What a run takes in memory, part by part and phase by phase, before it takes any.

    rollout    completions are generated, in training or validation; gradients do not exist
    scoring    log-probs of the reference and of the policy that acted, values of the critic
    update     forward and backward of micro-batches
    step       the optimizer moves the weights; activations do not exist

An estimate of bytes in tensors, for the longest prompts and completions. Not counted: the CUDA
context, the allocator's fragmentation, workspaces of kernels and communication, reward models, the
Python process, and the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from lightning_grpo.generation import EngineName
from lightning_grpo.memory.activations import PassShape, measure_pass
from lightning_grpo.memory.model import Counts, ModelSpec, count_parameters
from lightning_grpo.memory.rollout import RolloutShape, decoder_of, measure_rollout
from lightning_grpo.memory.state import moment_bytes
from lightning_grpo.optimization import adamw

Phase = Literal["rollout", "scoring", "update", "step"]
PHASES: tuple[Phase, ...] = ("rollout", "scoring", "update", "step")
Sharding = Literal["none", "ddp", "fsdp2"]
NOT_COUNTED = (
    "Counted: tensors, at the longest prompts and completions. Not counted: the CUDA context, "
    "fragmentation of the allocator, workspaces of kernels and of communication, reward models, "
    "the Python process, data, and a cold start."
)


@dataclass(frozen=True)
class MemorySettings:
    """All of a run that decides what it takes on one device.

    Args:
        model: the policy, and the critic when PPO runs.
        prompt_tokens: P, the longest prompt in tokens.
        completion_tokens: C, the longest completion in tokens.
        prompts: prompts of an iteration on this device.
        group_size: G, completions per prompt.
        val_prompts: prompts of a batch of validation on this device; 0 without validation.
        num_val_samples: completions of each.
        num_minibatches: M, minibatches of a rollout.
        engine: that makes the rollouts; native is taken to pass its check.
        max_rows: rows decoded at a time; 0 decodes all at once.
        microbatch_tokens: most tokens of one forward with gradients.
        is_packed: whether a forward takes each prompt once for its group, and no padding.
        temperature: of sampling.
        has_entropy_bonus: whether the loss holds the entropy, with gradients.
        is_autocast: whether forwards run under bfloat16 autocast (precision bf16-mixed).
        has_reference: whether there is a frozen reference (beta > 0).
        keeps_old_weights: whether the old policy is kept as weights.
        make_optimizer: makes the optimizer from parameter groups.
        has_master: whether the optimizer keeps float32 copies beside bfloat16 weights; ours never
            does, others do.
        sharding: none on one device; ddp replicates; fsdp2 divides.
        num_devices: data-parallel ranks.
        is_cuda: whether the devices are CUDA GPUs.
    """

    model: ModelSpec
    prompt_tokens: int = 256
    completion_tokens: int = 256
    prompts: int = 32
    group_size: int = 8
    val_prompts: int = 0
    num_val_samples: int = 1
    num_minibatches: int = 1
    engine: EngineName = "native"
    max_rows: int = 0
    microbatch_tokens: int = 16384
    is_packed: bool = False
    temperature: float = 1.0
    has_entropy_bonus: bool = False
    is_autocast: bool = False
    has_reference: bool = True
    keeps_old_weights: bool = False
    make_optimizer: Callable[[Any], Optimizer] = adamw
    has_master: bool = False
    sharding: Sharding = "none"
    num_devices: int = 1
    is_cuda: bool = False

    @property
    def row_tokens(self) -> int:
        """T, tokens of the longest row."""
        return self.prompt_tokens + self.completion_tokens

    def packed_tokens(self, num_rows: int) -> int:
        """Tokens of so many rows with each prompt once for its group."""
        num_prompts = -(-num_rows // self.group_size)
        return num_prompts * self.prompt_tokens + num_rows * self.completion_tokens

    @property
    def packed_share(self) -> float:
        """Tokens that a micro-batch forwards, as a part of those of its padded rows."""
        if not self.is_packed:
            return 1.0
        rows = self.microbatch_rows
        return self.packed_tokens(rows) / (rows * self.row_tokens)

    @property
    def rollouts(self) -> list[RolloutShape]:
        """That of training, and a batch of validation."""
        sizes = [(self.prompts, self.group_size), (self.val_prompts, self.num_val_samples)]
        return [
            RolloutShape(
                num_prompts,
                group_size,
                self.max_rows,
                self.prompt_tokens,
                self.completion_tokens,
                self.temperature,
                self.is_autocast,
            )
            for num_prompts, group_size in sizes
        ]

    @property
    def rows_decoded(self) -> int:
        """Rows decoded at a time."""
        return max(rollout.num_rows for rollout in self.rollouts)

    @property
    def microbatch_rows(self) -> int:
        """Rows of a micro-batch of the longest rows, cut as `replay.split_microbatches` does."""
        fitting = max(self.microbatch_tokens // self.row_tokens, 1)
        if self.is_packed:
            whole = self.microbatch_tokens // self.packed_tokens(self.group_size)
            part = (self.microbatch_tokens - self.prompt_tokens) // self.completion_tokens
            fitting = max(whole * self.group_size, min(part, self.group_size), 1)
        if fitting > self.group_size:
            fitting -= fitting % self.group_size  # whole groups
        groups = max(self.prompts // self.num_minibatches, 1)
        return min(fitting, groups * self.group_size)


@dataclass
class MemoryEstimate:
    """Bytes on one device.

    Args:
        settings: what was estimated.
        parts: part -> phase -> bytes.
    """

    settings: MemorySettings
    parts: dict[str, dict[Phase, int]] = field(default_factory=dict)

    def add(self, part: str, **phases: float) -> None:
        """Count a part in some phases.

        Args:
            part: its name.
            **phases: bytes in each phase; `always` stands for all of them.
        """
        always = phases.pop("always", None)
        found = dict.fromkeys(PHASES, always) if always is not None else phases
        row = self.parts.setdefault(part, dict.fromkeys(PHASES, 0))
        for phase, value in found.items():
            row[phase] += int(value)  # type: ignore[index]

    def total(self, phase: Phase) -> int:
        """Bytes of a phase."""
        return sum(row[phase] for row in self.parts.values())

    @property
    def peak_phase(self) -> Phase:
        """The phase that takes most."""
        return max(PHASES, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes of that phase."""
        return self.total(self.peak_phase)

    def as_dict(self) -> dict[str, Any]:
        """Numbers for a file."""
        return {
            "parts_bytes": {part: dict(row) for part, row in self.parts.items()},
            "total_bytes": {phase: self.total(phase) for phase in PHASES},
            "peak_bytes": self.peak,
            "peak_phase": self.peak_phase,
        }


def estimate_memory(settings: MemorySettings) -> MemoryEstimate:
    """Estimate what a run takes on one device.

    Args:
        settings: of the run.

    Returns:
        Bytes by part and phase.
    """
    estimate = MemoryEstimate(settings)
    policy, critic = count_parameters(settings.model)
    moments = {
        dtype: moment_bytes(settings.make_optimizer, dtype)
        for dtype in {*policy.num_trainable, *critic.num_trainable}
    }
    _add_state(estimate, "policy", policy, moments)
    _add_state(estimate, "critic", critic, moments)
    estimate.add(
        "optimizer workspace",
        step=max(_step_workspace(settings, counts) for counts in (policy, critic)),
    )
    _add_snapshots(estimate, policy)
    _add_gathered(estimate, policy)
    _add_gathered(estimate, critic)
    _add_passes(estimate)
    return MemoryEstimate(
        settings, {part: row for part, row in estimate.parts.items() if any(row.values())}
    )


def _shards(settings: MemorySettings) -> int:
    return settings.num_devices if settings.sharding == "fsdp2" else 1


def _add_state(
    estimate: MemoryEstimate, owner: str, counts: Counts, moments: Mapping[torch.dtype, float]
) -> None:
    settings = estimate.settings
    shards = _shards(settings)
    kept = sum(n * moments[dtype] for dtype, n in counts.num_trainable.items())
    estimate.add(f"{owner} weights", always=counts.weights / shards)
    gradients = counts.trainable / shards
    estimate.add(f"{owner} gradients", update=gradients, step=gradients)
    estimate.add(f"{owner} optimizer moments", always=kept / shards)
    if settings.has_master:
        narrow = sum(n for dtype, n in counts.num_trainable.items() if dtype.itemsize < 4)
        estimate.add(f"{owner} master copy", always=narrow * 4 / shards)
    if settings.sharding == "ddp" and settings.num_devices > 1:
        estimate.add("DDP buckets", always=counts.trainable)


def _step_workspace(settings: MemorySettings, counts: Counts) -> float:
    # On a GPU torch's optimizers take all tensors of a group at once, and AdamW has one
    # intermediate result as large as all of them.
    at_once = counts.trainable if settings.is_cuda else 2 * counts.largest_trainable
    return at_once / _shards(settings)


def _add_snapshots(estimate: MemoryEstimate, policy: Counts) -> None:
    settings = estimate.settings
    shards = _shards(settings)
    if settings.has_reference and settings.model.lora is None:
        estimate.add("reference snapshot", always=policy.trainable / shards)
        estimate.add("reference exchange", scoring=policy.largest_trainable / shards)
    if settings.keeps_old_weights:
        estimate.add("old policy snapshot", always=policy.trainable / shards)


def _add_gathered(estimate: MemoryEstimate, counts: Counts) -> None:
    settings = estimate.settings
    if settings.sharding != "fsdp2" or settings.num_devices == 1:
        return
    # The layer at work, the next one on its way, and what is outside of the layers.
    gathered = min(2 * counts.layer + counts.rest, counts.weights)
    share = counts.trainable / counts.weights if counts.weights else 0.0
    estimate.add(
        "FSDP2 gathered layers",
        rollout=counts.weights if counts.layer else gathered,
        scoring=gathered,
        update=gathered * (1 + share),  # with their gradients before they are divided
    )


def _packed(settings: MemorySettings, kept: float) -> float:
    """What a packed forward keeps, from what the padded forward of the same rows keeps."""
    if not settings.is_packed:
        return kept
    model, config, rows = settings.model, settings.model.config, settings.microbatch_rows
    width = 2 if settings.is_autocast else model.dtype.itemsize
    # Beside its share it keeps the states of each row, which are taken out of the packed stream,
    states = rows * (settings.completion_tokens + 1) * model.hidden_size * width
    # but keys and values that heads share only once.
    num_heads = int(config.num_attention_heads)
    num_shared = num_heads - int(getattr(config, "num_key_value_heads", None) or num_heads)
    repeated = 2 * num_shared * (model.hidden_size // num_heads) * width
    if model.activation_checkpointing:
        repeated = 0
    repeated *= settings.packed_tokens(rows) * model.num_layers
    return kept * settings.packed_share + states - repeated


def _add_passes(estimate: MemoryEstimate) -> None:
    settings = estimate.settings
    shape = PassShape(
        num_rows=settings.microbatch_rows,
        num_prompt=settings.prompt_tokens,
        num_completion=settings.completion_tokens,
        temperature=settings.temperature,
        is_autocast=settings.is_autocast,
        entropy="gradient" if settings.has_entropy_bonus else "detached",
        is_cuda=settings.is_cuda,
    )
    form = settings.model.critic.form if settings.model.critic else None
    alone = replace(settings.model, critic=None, critic_config_json=None)
    shared = replace(settings.model, critic_config_json=None) if form == "head" else alone
    decoder = decoder_of(alone) if settings.engine == "native" else "transformers"
    rollout = max((measure_rollout(alone, r, decoder) for r in settings.rollouts), key=sum)
    scoring = measure_pass(alone, shape, "scoring")
    update = measure_pass(shared, shape, "policy")
    copies, kept, workspace = update.weight_copies, 0, update.workspace
    if form in ("lora", "separate"):
        own = measure_pass(settings.model, shape, "critic")
        copies += own.weight_copies
        kept = own.kept
        workspace = max(workspace, own.workspace)
    estimate.add("KV cache", rollout=rollout.kept)
    estimate.add("policy activations", update=_packed(settings, update.kept))
    estimate.add("critic activations", update=_packed(settings, kept) if kept else 0)
    estimate.add(
        "copies of weights",
        rollout=rollout.weight_copies,
        scoring=scoring.weight_copies,
        update=copies,
    )
    estimate.add(
        "logits and workspace",
        rollout=rollout.workspace,
        scoring=scoring.workspace,
        update=workspace,
    )

"""What forwards and backwards hold for a while, measured by running them on fake tensors.

A fake tensor has a shape, a dtype and a device but no memory, so that the real code of the model
runs, with the attention kernel it would choose, whatever the model's size. It is measured as on the
CPU, also for a GPU: the fused attention kernels of both keep the same tensors for the backward
pass. Layers are alike, so that one and two of them stand for all.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lightning_grpo import logprobs
from lightning_grpo.generation.protocol import Sampling
from lightning_grpo.generation.sampling import sample_tokens
from lightning_grpo.logprobs import Entropy
from lightning_grpo.memory.model import (
    Models,
    ModelSpec,
    build_on_meta,
    config_from_json,
    count_parameters,
)
from lightning_grpo.memory.tracking import LiveBytes, SavedBytes
from lightning_grpo.policy import Policy
from lightning_grpo.trunk import takes_positions
from lightning_grpo.types import Rollout

PassKind = Literal["policy", "critic", "scoring", "rollout", "decode"]


@dataclass(frozen=True)
class PassShape:
    """The tokens of one forward.

    Args:
        num_rows: rows of it.
        num_prompt: P, prompt tokens.
        num_completion: C, completion tokens.
        temperature: other than 1 it costs a copy of the logits.
        is_autocast: whether it runs under bfloat16 autocast.
        entropy: what the update asks of the policy; with gradients it costs copies of the logits.
        is_cuda: whether a GPU is to run it, which takes more logits at a time.
    """

    num_rows: int
    num_prompt: int
    num_completion: int
    temperature: float = 1.0
    is_autocast: bool = False
    entropy: Entropy = "detached"
    is_cuda: bool = False


class PassBytes(NamedTuple):
    """Bytes that one pass needs on top of the weights."""

    kept: int
    """Activations that autograd keeps for the backward pass; in a rollout the KV cache."""
    weight_copies: int
    """Copies of the weights in another dtype that autocast makes and keeps."""
    workspace: int
    """What is alive beside these at the worst moment: logits, their gradient, one layer."""


@functools.lru_cache(maxsize=256)
def measure_pass(spec: ModelSpec, shape: PassShape, kind: PassKind) -> PassBytes:
    """Bytes of one pass through a model.

    Args:
        spec: of the model.
        shape: rows and tokens.
        kind: policy, forward and backward of the log-probs, and of the values of a critic that is
            a head; critic, forward and backward of a critic with a forward of its own; scoring,
            log-probs without gradients; rollout, prefill and the last decoding step; decode, that
            step alone.

    Returns:
        Bytes, in which gradients of parameters are not counted.
    """
    depth = spec.num_layers
    if kind == "critic" and spec.critic_config_json is not None:
        depth = int(config_from_json(spec.critic_config_json).num_hidden_layers)
    with _few_chunks(shape.is_cuda):
        if depth <= 2 or not count_parameters(spec).policy.has_equal_layers:
            return run_pass(fake_models(spec), shape, kind)
        one, two = (run_pass(fake_models(spec.with_layers(n)), shape, kind) for n in (1, 2))
    more = depth - 2
    return PassBytes(
        kept=two.kept + more * (two.kept - one.kept),
        weight_copies=two.weight_copies + more * (two.weight_copies - one.weight_copies),
        workspace=two.workspace,  # of one layer at a time
    )


@contextlib.contextmanager
def _few_chunks(is_cuda: bool) -> Iterator[None]:
    """Let the output layer skip all chunks of tokens but three, which take as much as all do.

    The numbers that the others would make are not there on fake tensors anyway.

    Args:
        is_cuda: whether the chunks are those of a GPU.
    """
    cut = logprobs._chunks

    def few(hidden: Tensor, width: int, device: str | None = None) -> list[slice]:
        slices = cut(hidden, width, "cuda" if is_cuda else "cpu")
        return slices[:2] + slices[2:][-1:]

    logprobs._chunks = few
    try:
        yield
    finally:
        logprobs._chunks = cut


class RunnableModels(NamedTuple):
    """Models, and the mode in which their tensors work."""

    models: Models
    mode: contextlib.AbstractContextManager[Any]


def fake_models(spec: ModelSpec) -> RunnableModels:
    """Make a policy and its critic of fake tensors, as if on the CPU.

    Args:
        spec: of both.

    Returns:
        The models and their mode.
    """
    mode = FakeTensorMode()
    models = build_on_meta(spec)
    fakes: dict[int, Tensor] = {}
    with mode:
        for model in models:
            for module in model.modules() if model is not None else ():
                for group in (module._parameters, module._buffers):
                    _exchange_for_fakes(group, fakes)  # type: ignore[arg-type]
    return RunnableModels(models, mode)


def _exchange_for_fakes(group: dict[str, Tensor | None], fakes: dict[int, Tensor]) -> None:
    for name, tensor in group.items():
        if tensor is None:
            continue
        if id(tensor) not in fakes:  # tied ones stay tied
            fake: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            fakes[id(tensor)] = fake
        group[name] = fakes[id(tensor)]


def run_pass(runnable: RunnableModels, shape: PassShape, kind: PassKind) -> PassBytes:
    """Run a pass; with real tensors and a null context it measures the same.

    Args:
        runnable: the models.
        shape: rows and tokens.
        kind: see `measure_pass`.

    Returns:
        Bytes.
    """
    with runnable.mode:
        if kind == "scoring":
            return _run_scoring(runnable.models.policy, shape)
        if kind in ("rollout", "decode"):
            return _run_rollout(runnable.models.policy, shape, with_prefill=kind == "rollout")
        return _run_update(runnable.models, shape, kind)


def autocast(is_on: bool) -> contextlib.AbstractContextManager[Any]:
    """The precision context of a pass."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_on)


def _run_update(models: Models, shape: PassShape, kind: PassKind) -> PassBytes:
    modules = nn.ModuleList([model for model in models if model is not None])
    for parameter in modules.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    saved, live = SavedBytes(modules), LiveBytes(modules)
    # The backward of all micro-batches but the last runs inside the trainer's autocast.
    with live, autocast(shape.is_autocast):
        with saved.collecting():
            loss = critic_loss(models, shape) if kind == "critic" else policy_loss(models, shape)
        copies = live.copies_now
        kept = sum(n for key, n in saved.kept.items() if key not in live.copies)
        loss.backward()
    return PassBytes(kept, copies, max(live.peak - kept - copies, 0))


def _drop_gradient(parameter: Tensor) -> None:
    # Counted by itself; here it would hide what else is alive at the peak.
    parameter.grad = None


def policy_loss(models: Models, shape: PassShape) -> Tensor:
    """A loss of the log-probs, and of the values of a critic that reads the same forward."""
    policy, critic = models
    needs_hidden = bool(getattr(critic, "needs_policy_hidden", False))
    rows = rollout_of(shape)
    output = policy(
        rows.prompt_ids,
        rows.prompt_mask,
        rows.completion_ids,
        rows.completion_mask,
        temperature=shape.temperature,
        entropy=shape.entropy,
        with_hidden=needs_hidden,
    )
    loss = torch.where(rows.completion_mask, output.logprobs.exp(), 0.0).sum()
    if shape.entropy == "gradient":
        loss = loss - output.entropy.sum()
    if critic is not None and needs_hidden:
        loss = loss + critic(policy, rows, output.hidden).square().sum()
    return loss


def critic_loss(models: Models, shape: PassShape) -> Tensor:
    """A loss of the values of a critic with a forward of its own."""
    assert models.critic is not None
    values: Tensor = models.critic(models.policy, rollout_of(shape), None)
    return values.square().sum()


def _run_scoring(policy: Policy, shape: PassShape) -> PassBytes:
    rows = rollout_of(shape)
    policy.eval()
    with torch.no_grad(), LiveBytes(policy) as live, autocast(shape.is_autocast):
        policy(
            rows.prompt_ids,
            rows.prompt_mask,
            rows.completion_ids,
            rows.completion_mask,
            temperature=shape.temperature,
        )
        copies = live.copies_now
    return PassBytes(0, copies, live.peak - copies)


def _run_rollout(policy: Policy, shape: PassShape, *, with_prefill: bool) -> PassBytes:
    policy.eval()
    prefill = 0
    with torch.no_grad(), LiveBytes(policy) as live, autocast(shape.is_autocast):
        if with_prefill:
            cache = fill_cache(policy, shape.num_rows, shape.num_prompt)
            prefill = live.peak - live.now  # the cache of the prompts is a part of what is kept
        # One token short of the end: the step to measure adds the last.
        cache = fill_cache(policy, shape.num_rows, shape.num_prompt + shape.num_completion - 1)
        live.peak = live.now
        decode_step(policy, cache, shape)
        copies = live.copies_now  # with that of the output layer, which the prefill left out
        kept = live.now - copies
    return PassBytes(kept, copies, max(prefill, live.peak - kept - copies, 0))


def fill_cache(policy: Policy, num_rows: int, num_tokens: int) -> Any:
    """Forward some tokens through the trunk, and keep their keys and values."""
    ids = torch.zeros(num_rows, num_tokens, dtype=torch.int64)
    no_completion = ids[:, :0]
    mask = padded_mask(ids)
    inputs = policy.inputs(ids, mask, no_completion, no_completion == 0)
    return policy.trunk(**inputs | {"use_cache": True}).past_key_values


def decode_step(policy: Policy, cache: Any, shape: PassShape) -> None:
    """Forward one token of each row and draw the next."""
    length = shape.num_prompt + shape.num_completion
    ids = torch.zeros(shape.num_rows, 1, dtype=torch.int64)
    mask = torch.ones(shape.num_rows, length, dtype=torch.int64)
    inputs = {"position_ids": ids} if takes_positions(policy.causal_lm) else {}
    logits = policy.causal_lm(
        input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **inputs
    ).logits
    scores = logits[:, -1].to(copy=True, dtype=torch.float32)
    uniforms = torch.zeros(shape.num_rows, dtype=torch.float64)
    sample_tokens(scores[:, : policy.num_tokens], Sampling(shape.temperature), uniforms)


def rollout_of(shape: PassShape) -> Rollout:
    """Rows of the shape, with padding in front of the first prompt."""
    prompt_ids = torch.zeros(shape.num_rows, shape.num_prompt, dtype=torch.int64)
    completion_ids = torch.zeros(shape.num_rows, shape.num_completion, dtype=torch.int64)
    zeros = completion_ids.float()
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=padded_mask(prompt_ids),
        completion_ids=completion_ids,
        completion_mask=completion_ids == 0,
        action_mask=completion_ids == 0,
        sampler_logprobs=zeros,
        group_ids=prompt_ids[:, 0],
        truncated=prompt_ids[:, 0] == 0,
        prompts=[],
        completions=[],
        columns={},
    )


def padded_mask(ids: Tensor) -> Tensor:
    """True except for the first token: without padding other attention kernels may run."""
    mask = ids == 0
    if mask.shape[1] > 1:
        mask[0, 0] = False
    return mask

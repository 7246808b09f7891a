"""Which settings fit into a device: those that a run leaves open, and the nearest that would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from lightning_grpo.adapters import Lora
from lightning_grpo.critic import CriticSettings
from lightning_grpo.memory.estimate import MemoryEstimate, MemorySettings, estimate_memory

GB = 1e9
_MOST_DEVICES = 64
# Token budgets are looked for from the first down to the second. More fill no CPU and hardly a GPU;
# with fewer a GPU idles by more than it costs to recompute activations.
_MOST_TOKENS = {"cpu": 16384, "cuda": 65536}
_FEWEST_TOKENS = 4096
_FEWEST_TOKENS_AT_ALL = 1024


class Change(NamedTuple):
    """Settings that differ from those of a run in one thing."""

    text: str
    settings: MemorySettings


def choose(
    settings: MemorySettings,
    limit: int,
    *,
    microbatch_tokens: int | None,
    is_checkpointing: bool | None,
) -> MemorySettings:
    """Settle a token budget and whether activations are recomputed, where that is open.

    The largest budget, a power of two, whose estimate fits; without recomputation, if that leaves
    a budget worth having.

    Args:
        settings: of a run, but for these two.
        limit: bytes that the run may plan to use.
        microbatch_tokens: the budget; None where it is open.
        is_checkpointing: whether activations are recomputed; None where it is open.

    Returns:
        The first settings that fit, or those that need least.
    """
    found = settings
    for found in _choices(settings, microbatch_tokens, is_checkpointing):
        if is_far_below(found, limit) or estimate_memory(found).peak <= limit:
            break
    return found


def _choices(
    settings: MemorySettings, microbatch_tokens: int | None, is_checkpointing: bool | None
) -> Iterator[MemorySettings]:
    for recomputes in (False, True) if is_checkpointing is None else (is_checkpointing,):
        model = replace(settings.model, activation_checkpointing=recomputes)
        is_last = recomputes or is_checkpointing is not None
        fewest = _FEWEST_TOKENS_AT_ALL if is_last else _FEWEST_TOKENS
        tokens = microbatch_tokens or _MOST_TOKENS["cuda" if settings.is_cuda else "cpu"]
        while True:
            yield replace(settings, model=model, microbatch_tokens=tokens)
            tokens //= 2
            if microbatch_tokens is not None or tokens < fewest:
                break


def check_fits(estimate: MemoryEstimate, limit: int) -> None:
    """Refuse a run that does not fit, and name the nearest change with which it would.

    Args:
        estimate: of the run.
        limit: bytes of a device.

    Raises:
        ValueError: the peak is above the limit.
    """
    if estimate.peak <= limit:
        return
    phase = estimate.peak_phase
    rows = sorted(estimate.parts.items(), key=lambda item: -item[1][phase])
    largest = ", ".join(f"{part} {row[phase] / GB:.3g}" for part, row in rows[:4])
    raise ValueError(
        f"the run would need about {_gb(estimate.peak)} GB on a device with {_gb(limit)} GB, in "
        f"its {phase} phase (GB: {largest}, ...); "
        f"{advice(estimate.settings, limit)}. It is an estimate: model.check_memory false goes on"
    )


def advice(settings: MemorySettings, limit: int) -> str:
    """What to change in a run that does not fit.

    Args:
        settings: of the run.
        limit: bytes of a device.

    Returns:
        Options and the peak that each way would have.
    """
    found = nearest_that_fits(settings, limit)
    if found is None:
        return "no change of settings that is looked for makes it fit: take a smaller model"
    changes, fitting = found
    text = f"it would fit with {', '.join(changes)}: {_gb(fitting.peak)} GB"
    if not any("lora" in change for change in changes):
        return text
    # Adapters are another training; more devices are the same one.
    for change in _more_devices(settings):
        peak = estimate_memory(change.settings).peak
        if peak <= limit:
            return f"{text}; or with {change.text}: {_gb(peak)} GB"
    return text


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / GB:.1f}" if num_bytes >= GB else f"{num_bytes / GB:.3f}"


def nearest_that_fits(
    settings: MemorySettings, limit: int
) -> tuple[list[str], MemoryEstimate] | None:
    """Look for the nearest change that fits; each one is estimated anew.

    In this order: a smaller `model.microbatch_tokens`, activation checkpointing, fewer rows
    decoded at a time, a critic that costs less, LoRA. First one change alone, the smallest of its
    kind that is enough; then several together; then more devices under FSDP2 as well.

    Args:
        settings: of a run that does not fit.
        limit: bytes of a device.

    Returns:
        The changes as option and value, and the estimate with them; None if nothing fits.
    """
    for step in STEPS:
        for change in step(settings):
            estimate = estimate_memory(change.settings)
            if estimate.peak <= limit:
                return [change.text], estimate
    made: dict[str, str] = {}
    estimate = estimate_memory(settings)
    # Twice: what a later change has shrunk may leave another phase as the largest.
    for step in (*STEPS, *STEPS, _more_devices):
        best = None
        for change in step(estimate.settings):
            candidate = estimate_memory(change.settings)
            if candidate.peak < (best[1] if best else estimate).peak:
                best = (change.text, candidate)
            if candidate.peak <= limit:
                break
        if best is not None:
            made[best[0].rpartition(" ")[0]] = best[0]
            estimate = best[1]
        if estimate.peak <= limit:
            return list(made.values()), estimate
    return None


def _smaller_microbatches(settings: MemorySettings) -> Iterator[Change]:
    tokens = min(
        settings.microbatch_tokens,
        settings.row_tokens * settings.microbatch_rows,
    )
    while tokens > settings.row_tokens:
        tokens = max(tokens // 2, settings.row_tokens)
        yield Change(
            f"model.microbatch_tokens {tokens}", replace(settings, microbatch_tokens=tokens)
        )


def _checkpointing(settings: MemorySettings) -> Iterator[Change]:
    if not settings.model.activation_checkpointing:
        model = replace(settings.model, activation_checkpointing=True)
        yield Change("model.activation_checkpointing true", replace(settings, model=model))


def _fewer_rows(settings: MemorySettings) -> Iterator[Change]:
    rows = settings.rows_decoded
    while rows > 1:
        rows //= 2
        yield Change(f"rollout.max_rows {rows}", replace(settings, max_rows=rows))


def _cheaper_critic(settings: MemorySettings) -> Iterator[Change]:
    critic = settings.model.critic
    if critic is None or critic.form != "separate":
        return
    form = "head" if settings.model.lora is None else "lora"
    cheaper = CriticSettings(form=form, lora=critic.lora)  # type: ignore[arg-type]
    model = replace(settings.model, critic=cheaper, critic_config_json=None)
    yield Change(f"model.critic.form {form}", replace(settings, model=model))


def _adapters(settings: MemorySettings) -> Iterator[Change]:
    if settings.model.lora is None:
        model = replace(settings.model, lora=Lora())
        yield Change(f"model.lora.rank {Lora.rank}", replace(settings, model=model))


def _more_devices(settings: MemorySettings) -> Iterator[Change]:
    if not settings.is_cuda:
        return  # processes on one machine share its memory
    now = settings.num_devices
    num_devices = now if settings.sharding != "fsdp2" and now > 1 else 2 * now
    while num_devices <= _MOST_DEVICES:
        prompts = max(settings.prompts * now // num_devices, 1)
        yield Change(
            f"ModelParallelStrategy (FSDP2) on {num_devices} devices",
            replace(settings, sharding="fsdp2", num_devices=num_devices, prompts=prompts),
        )
        num_devices *= 2


STEPS: tuple[Callable[[MemorySettings], Iterator[Change]], ...] = (
    _smaller_microbatches,
    _checkpointing,
    _fewer_rows,
    _cheaper_critic,
    _adapters,
)


def is_far_below(settings: MemorySettings, limit: int) -> bool:
    """Whether a bound that is cheap to compute, and far above any estimate, is below the limit.

    Args:
        settings: of a run.
        limit: bytes.

    Returns:
        True where there is nothing to measure.
    """
    config = settings.model.config
    depth, hidden = settings.model.num_layers, settings.model.hidden_size
    inner = max(getattr(config, "intermediate_size", None) or 0, 4 * hidden)
    vocabulary = settings.model.vocab_size
    heads = int(config.num_attention_heads)
    length = settings.row_tokens
    tokens = max(settings.microbatch_rows, settings.rows_decoded) * length
    parameters = depth * (8 * hidden * hidden + 4 * hidden * inner) + 2 * hidden * vocabulary
    activations = tokens * (depth * (64 * hidden + 16 * inner + 4 * heads * length))
    logits = tokens * vocabulary * 16
    # Full state with copies and snapshots, policy and critic; everything in float32, twice.
    return 2 * (parameters * 64 + (activations + logits) * 4) < limit

"""The tables that the memory tool prints."""

from __future__ import annotations

from rich import box
from rich.table import Table

from lightning_grpo.memory.estimate import NOT_COUNTED, PHASES, MemoryEstimate
from lightning_grpo.memory.fit import advice


def memory_table(estimate: MemoryEstimate) -> Table:
    """Parts by phases.

    Args:
        estimate: to show.

    Returns:
        A table to print.
    """
    unit, size = ("GB", 1e9) if estimate.peak >= 1e9 else ("MB", 1e6)
    settings = estimate.settings
    recomputed = ", activations recomputed" if settings.model.activation_checkpointing else ""
    table = Table(
        title=f"memory of one device in {unit} ({settings.microbatch_rows} rows of "
        f"{settings.prompt_tokens} + {settings.completion_tokens} tokens a micro-batch of at most "
        f"{settings.microbatch_tokens}{recomputed}, {settings.rows_decoded} rows decoded at a "
        f"time, {settings.num_devices} device(s))"
    )
    table.add_column("part")
    for phase in PHASES:
        table.add_column(phase, justify="right")
    for part, row in estimate.parts.items():
        table.add_row(
            part, *(f"{row[phase] / size:,.3f}" if row[phase] else "" for phase in PHASES)
        )
    table.add_section()
    table.add_row("total", *(f"{estimate.total(phase) / size:,.3f}" for phase in PHASES))
    return table


def notes(estimate: MemoryEstimate, limit: int) -> list[str]:
    """Peak, limit and what to change, and what the numbers leave out.

    Args:
        estimate: of the run.
        limit: bytes of a device.

    Returns:
        Lines of text.
    """
    peak = f"peak {readable(estimate.peak)} in the {estimate.peak_phase} phase"
    lines = [f"{peak}, {estimate.peak / limit:.1%} of the device's {readable(limit)}"]
    if estimate.peak > limit:
        lines.append(f"it does not fit; {advice(estimate.settings, limit)}")
    if estimate.settings.is_cuda:
        lines.append("Activations are those of the fused attention kernels' CPU counterparts.")
    return [*lines, NOT_COUNTED]


def critic_table(critics: dict[str, MemoryEstimate | None]) -> Table:
    """What each form of critic adds.

    Args:
        critics: name -> estimate, that of GRPO first.

    Returns:
        A table to print.
    """
    base = next(iter(critics.values()))
    assert base is not None
    kinds = ("weights", "gradients", "optimizer moments", "activations")
    table = Table(title="what a critic costs", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for name in ("", "weights", "gradients", "moments", "activations", "peak", "over GRPO"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, found in critics.items():
        if found is None:
            table.add_row(name, *["-"] * 6)
            table.caption = "a lora critic needs model.lora"
            continue
        parts = [max(found.parts.get(f"critic {kind}", {"": 0}).values()) for kind in kinds]
        cells = [*parts, found.peak, found.peak - base.peak]
        table.add_row(name, *(readable(cell) if cell else "-" for cell in cells))
    return table


def readable(num_bytes: float) -> str:
    """Bytes with a unit, as in 1.5 GB."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} B"

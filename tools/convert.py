"""convert: weights of this project and of others as transformers folders, peft folders, or ours."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from lightning_grpo.adapters import Lora
from lightning_grpo.checkpoint_paths import run_dir_of
from lightning_grpo.checkpoints import write_checkpoint
from lightning_grpo.checkpoints.folder import kind_of, next_serial
from lightning_grpo.checkpoints.places import locate, names_in
from lightning_grpo.importing import (
    LoraSettings,
    Matched,
    ModelFiles,
    Source,
    WantedModel,
    Weights,
    check_free,
    local_folder,
    lora_of_config,
    match_names,
    merge_lora,
    open_source,
    planned_files,
    read_model_folder,
    wanted_model,
    write_adapter_folder,
    write_model_folder,
)
from lightning_grpo.importing.disk_names import as_on_disk, loads_as_it_is
from lightning_grpo.run_files import newest_config

Target = Literal["transformers", "peft", "checkpoint"]
Dtype = Literal["keep", "float32", "bfloat16", "float16"]


def convert(
    source: str,
    out: str,
    to: Target = "transformers",
    like: str | None = None,
    base: str | None = None,
    prefix: str | None = None,
    lora_alpha: float | None = None,
    dtype: Dtype = "keep",
    max_shard_gb: float = 5.0,
    dry_run: bool = False,
) -> None:
    """Turn a checkpoint into a folder of transformers or peft, or into one file of this project.

    Reads checkpoints of this project of any number of ranks; folders of transformers and peft, as
    TRL and OpenRLHF leave them; Lightning's files and its folders of FSDP1 and FSDP2; FSDP shards
    of verl. Nothing is unpickled and no code of a folder is run.

    A run starts from a transformers folder with `--model.name_or_path`, and goes on from a
    checkpoint with `--ckpt_path`.

    Args:
        source: file, folder or URL to read.
        out: folder to write, which is not there yet.
        to: transformers: a whole model, adapters merged in; peft: the adapters alone; checkpoint:
            a checkpoint of this project with all tensors whole, for any number of ranks.
        like: folder or Hub name of the configuration and the tokenizer; those of the source or of
            its run when null.
        base: folder or Hub name of the model under adapters; as the source says when null.
        prefix: what the names of the model's tensors begin with in the source; found when null.
        lora_alpha: scale of the adapters, where the source does not say it.
        dtype: of the weights.
        max_shard_gb: largest file of a transformers folder, in units of 1e9 bytes.
        dry_run: read names and shapes, say what would be written, and write nothing.
    """
    lines = convert_quietly(
        source,
        out,
        to,
        like=like,
        base=base,
        prefix=prefix,
        lora_alpha=lora_alpha,
        dtype=dtype,
        max_shard_gb=max_shard_gb,
        dry_run=dry_run,
    )
    print("\n".join(lines))


def convert_quietly(
    source: str,
    out: str,
    to: Target = "transformers",
    *,
    like: str | None = None,
    base: str | None = None,
    prefix: str | None = None,
    lora_alpha: float | None = None,
    dtype: Dtype = "keep",
    max_shard_gb: float = 5.0,
    dry_run: bool = False,
) -> list[str]:
    """Do what `convert` does, with the same arguments, and return what there is to say of it."""
    found = open_source(source)
    if to == "checkpoint":
        return [_to_checkpoint(found, out, dry_run=dry_run)]
    target = Path(out)
    check_free(out)
    origin = find_origin(found, like, base, lora_alpha)
    wanted = wanted_model(origin.files.config)
    own, weights = _weights(found, wanted, origin, prefix, None if dtype == "keep" else dtype)
    if to == "peft":
        weights = {}
        if not own.pairs:
            raise ValueError(f"{source} holds no adapters: --to peft has nothing to write")
    tensors = [t for p in own.pairs.values() for t in (p.a, p.b)] if to == "peft" else []
    num_bytes = sum(tensor.num_bytes for tensor in [*weights.values(), *tensors])
    about = (
        f"{found.place}: {found.kind}; {wanted.class_name} under {own.prefix!r}, "
        f"{len(own.pairs)} adapters, {own.num_others} other tensors left out"
    )
    summary = f"{out}: {len(weights) or len(tensors)} tensors, {num_bytes / 1e9:.3f} GB"
    torch_dtype = None if dtype == "keep" else getattr(torch, dtype)
    max_shard_bytes = int(max_shard_gb * 1e9)
    if dry_run:
        planned = planned_files(
            weights, origin.files, dtype=torch_dtype, max_shard_bytes=max_shard_bytes
        )
        return [about, f"would write {summary}", *file_lines(planned)]
    if to == "peft":
        assert origin.lora is not None
        write_adapter_folder(own.pairs, origin.lora, origin.base or "", origin.files, target)
    else:
        with _progress(num_bytes) as advance:
            write_model_folder(
                weights,
                origin.files,
                target,
                class_name=wanted.class_name,
                dtype=torch_dtype,
                max_shard_bytes=max_shard_bytes,
                on_bytes=advance,
            )
    return [about, f"wrote {summary}"]


def file_lines(planned: dict[str, int | None]) -> list[str]:
    """One line for each file that would be written.

    Args:
        planned: of `planned_files`.
    """
    return [
        f"  {name}" + ("" if size is None else f"  {size:,} bytes of tensors")
        for name, size in sorted(planned.items())
    ]


@dataclass(frozen=True)
class Origin:
    """What belongs to a source and is not in it."""

    files: ModelFiles
    base: str | None
    """Model under its adapters."""
    revision: str | None
    lora: LoraSettings | None


def find_origin(
    source: Source, like: str | None, base: str | None, lora_alpha: float | None
) -> Origin:
    """Find the configuration, the tokenizer and the base of a source.

    Args:
        source: of `open_source`.
        like: as of `convert`.
        base: as of `convert`.
        lora_alpha: as of `convert`.

    Returns:
        What the options, the source and its run say, in this order.

    Raises:
        ValueError: nothing says which model it is.
    """
    section = run_section(source.place)
    revision = None if base else section.get("revision")
    adapter = source.adapter_config or {}
    if base is None:
        base = adapter.get("base_model_name_or_path")
        if base is None and section.get("init") != "random":
            base = section.get("name_or_path")
    name = like or source.folder or base or section.get("name_or_path")
    if name is None:
        raise ValueError(
            f"{source.place} is a {source.kind}, which does not say what model it is: name a "
            "folder with its config.json and tokenizer with --like"
        )
    config = local_folder(str(name), None if like or source.folder else revision)
    beside = Path(source.place) / "tokenizer_config.json"
    tokenizer = config
    if like is None and section.get("tokenizer"):
        tokenizer = local_folder(section["tokenizer"])
    elif like is None and beside.is_file():
        tokenizer = beside.parent
    lora = lora_of_config(adapter) if adapter else None
    if lora is None and section.get("lora"):
        lora = LoraSettings(float(section["lora"].get("alpha", Lora().alpha)))
    if lora_alpha is not None:
        lora = replace(lora or LoraSettings(lora_alpha), alpha=lora_alpha)
    return Origin(ModelFiles(config, tokenizer), base, revision, lora)


def run_section(place: str) -> dict[str, Any]:
    """What the configuration of the run around a checkpoint says of its model.

    It is read as plain values: nothing that it names is imported.

    Args:
        place: path of the checkpoint.

    Returns:
        The section `model`; empty when there is no run around it.
    """
    run_dir = run_dir_of(place)
    path = newest_config(run_dir) if run_dir is not None else None
    if path is None:
        return {}
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    section = content.get("model") if isinstance(content, dict) else None
    return section if isinstance(section, dict) else {}


def _weights(
    source: Source, wanted: WantedModel, origin: Origin, prefix: str | None, dtype: str | None
) -> tuple[Matched, Weights]:
    """The source's tensors by the names of the model, and the whole weights."""
    if source.is_plain and prefix is None:
        try:
            own = match_names(source.tensors, wanted, "")
        except ValueError:
            if not loads_as_it_is(Path(source.place)):
                raise
            return Matched("", source.tensors, {}, 0), source.tensors
    else:
        own = match_names(source.tensors, wanted, prefix, is_partial=True)
    if not own.pairs:
        return own, as_on_disk(own.weights, wanted.model)
    if origin.lora is None:
        raise ValueError(f"{source.place} does not say how strong its adapters are: --lora_alpha")
    under = own.weights
    if not under:
        if origin.base is None:
            raise ValueError(f"{source.place} holds adapters only: name their model with --base")
        folder = local_folder(origin.base, origin.revision, has_weights=True)
        under = match_names(read_model_folder(folder), wanted, "").weights
    merged_dtype = None if dtype is None else getattr(torch, dtype)
    merged = merge_lora(under, own.pairs, origin.lora, wanted, merged_dtype)
    return own, as_on_disk(merged, wanted.model)


def _to_checkpoint(source: Source, out: str, *, dry_run: bool) -> str:
    if source.checkpoint is None:
        raise ValueError(
            f"{source.place} is a {source.kind}, and a run goes on from its own checkpoints only: "
            "convert it to transformers, and start a run from that with --model.name_or_path"
        )
    place = locate(out)
    if names_in(place):
        raise ValueError(f"--out {out} is there already, and is not overwritten")
    manifest = replace(
        source.checkpoint.manifest,
        kind=kind_of(place.name),
        serial=next_serial(str(place.parent)),
        files={},
    )
    summary = f"{out}: {len(source.tensors)} tensors of step {manifest.step}"
    if dry_run:
        return f"would write {summary}"
    write_checkpoint(out, source.checkpoint.read_all(), manifest)
    return f"wrote {summary}"


@contextmanager
def _progress(num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing anywhere else."""
    console = Console(file=sys.stderr)
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("writing", total=num_bytes)
        yield lambda done: progress.advance(task, done)

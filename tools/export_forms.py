"""What `export` can make of a checkpoint: its policy whole or as adapters, its critic."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lightning_grpo.export.proof import Proof, prove
from lightning_grpo.export.values import (
    ExpectedValues,
    Head,
    ValueProof,
    classifier_of,
    expect_values,
    prove_values,
)
from lightning_grpo.importing import (
    ModelFiles,
    Weights,
    open_source,
    planned_files,
    write_model_folder,
)
from lightning_grpo.importing.disk_names import as_on_disk
from lightning_grpo.importing.lazy import of_tensor
from lightning_grpo.policy import load_policy
from lightning_grpo.prompts import prepare_prompts
from lightning_grpo.sources import read_rows
from lightning_grpo.tools.convert import convert_quietly, file_lines, find_origin
from lightning_grpo.tools.generate import format_of
from lightning_grpo.tools.trained_policy import Trained, load_trained

Form = Literal["merged", "adapter", "token_values", "sequence_value"]
Dtype = Literal["keep", "float32", "bfloat16", "float16"]

_NUM_SAMPLE_PROMPTS = 4
_KINDS: dict[Form, Literal["transformers", "peft"]] = {"merged": "transformers", "adapter": "peft"}
_HEADS: dict[Form, Head] = {"token_values": "tokens", "sequence_value": "sequence"}


@dataclass(frozen=True)
class Wanted:
    """What is to be exported; see `export`."""

    ckpt_path: str
    form: Form = "merged"
    dtype: Dtype = "keep"
    max_shard_gb: float = 5.0
    config: str | None = None


def make(wanted: Wanted, folder: Path, *, is_written: bool) -> tuple[str, Proof | ValueProof]:
    """Write all files of an export but its card, and prove that they are what they should be.

    Args:
        wanted: what of which checkpoint.
        folder: that is not there yet.
        is_written: the folder is there, and is proved only.

    Returns:
        Place of the checkpoint, and the proof.

    Raises:
        ValueError: the checkpoint does not hold what is asked for, or the folder is not the same.
    """
    if wanted.form in _HEADS:
        return _make_values(wanted, folder, is_written=is_written)
    if not is_written:
        _convert(wanted, str(folder))
    trained = load_trained(wanted.ckpt_path, wanted.config)
    load_base = (lambda: base_of(trained)) if wanted.form == "adapter" else None
    prompts = sample_prompts(trained)
    proof = prove(folder, trained.policy, trained.tokenizer, prompts, load_base=load_base)
    return trained.place, proof


def planned_lines(wanted: Wanted, out: str | None) -> list[str]:
    """What an export would write, but for its card.

    Args:
        wanted: what of which checkpoint.
        out: folder to write; None for one that is not kept.
    """
    if wanted.form in _HEADS:
        values = _load_values(wanted)
        planned = planned_files(values.weights, values.files, **_writing(wanted))
        planned.pop("generation_config.json", None)
        return [f"would write {out or 'a folder'}: {values.class_name}", *file_lines(planned)]
    with staged(None) as place:
        lines = _convert(wanted, str(place) if out is None else out, dry_run=True)
        return [line.replace(str(place), "a folder") for line in lines]


@contextmanager
def staged(target: Path | None) -> Iterator[Path]:
    """Where a folder can be written that gets its name later, or goes.

    Args:
        target: where it is to be in the end; None when it is not kept.

    Yields:
        A path that is not there yet, on the same disk.
    """
    parent = None if target is None else target.parent
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=parent) as staging:
        yield Path(staging) / (target.name if target is not None else "export")


def _convert(wanted: Wanted, out: str, *, dry_run: bool = False) -> list[str]:
    return convert_quietly(
        wanted.ckpt_path,
        out,
        _KINDS[wanted.form],
        dtype=wanted.dtype,
        max_shard_gb=wanted.max_shard_gb,
        dry_run=dry_run,
    )


@dataclass(frozen=True)
class _Values:
    """A critic as a classifier, and what its folder is compared with."""

    trained: Trained
    model: Any
    expected: ExpectedValues
    weights: Weights
    files: ModelFiles

    @property
    def class_name(self) -> str:
        """Of transformers."""
        return type(self.model).__name__


def _load_values(wanted: Wanted) -> _Values:
    trained = load_trained(wanted.ckpt_path, wanted.config, with_critic=True)
    assert trained.critic is not None
    # In half precision a merge rounds small changes away.
    policy, critic = trained.policy.float(), trained.critic.float()
    expected = expect_values(critic, policy)
    model = classifier_of(critic, policy, trained.tokenizer, _HEADS[wanted.form])
    weights = {name: of_tensor(tensor) for name, tensor in model.state_dict().items()}
    files = find_origin(open_source(wanted.ckpt_path), None, None, None).files
    return _Values(trained, model, expected, as_on_disk(weights, model), files)


def _make_values(wanted: Wanted, folder: Path, *, is_written: bool) -> tuple[str, ValueProof]:
    values = _load_values(wanted)
    if not is_written:
        write_model_folder(
            values.weights, values.files, folder, class_name=values.class_name, **_writing(wanted)
        )
        (folder / "generation_config.json").unlink(missing_ok=True)
        config = values.model.config
        config.architectures = [values.class_name]
        config.dtype = _writing(wanted)["dtype"]
        config.save_pretrained(folder)
    trained = values.trained
    return trained.place, prove_values(folder, values.model, values.expected, trained.tokenizer)


def _writing(wanted: Wanted) -> dict[str, Any]:
    # A critic's head is in float32.
    dtype = "float32" if wanted.dtype == "keep" else wanted.dtype
    return {"dtype": getattr(torch, dtype), "max_shard_bytes": int(wanted.max_shard_gb * 1e9)}


def base_of(trained: Trained) -> nn.Module:
    """The model that the adapters of a run belong to, as transformers loads it."""
    assert trained.run is not None
    options = trained.run.model
    policy = load_policy(
        options.name_or_path,
        num_tokens=len(trained.tokenizer),
        revision=options.revision,
        dtype=options.dtype,
    )
    return policy.causal_lm


def sample_prompts(trained: Trained) -> list[list[int]]:
    """Token ids of the first prompts of the run's data, where it can be read here."""
    assert trained.run is not None
    data = trained.run.data
    try:
        rows: Any = read_rows(data.train_data, dataset_config=data.dataset_config)
        first = [rows[i] for i in range(min(len(rows), _NUM_SAMPLE_PROMPTS))]
        return prepare_prompts(first, format_of(trained), trained.tokenizer).prompt_ids
    except (ValueError, OSError):  # the data of the run need not be where the checkpoint is
        return []

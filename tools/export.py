"""export: the policy of a checkpoint as a folder of transformers or peft, proved to be the same."""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lightning_grpo.export.card import write_card
from lightning_grpo.export.proof import Proof, prove
from lightning_grpo.importing import check_free
from lightning_grpo.policy import load_policy
from lightning_grpo.prompts import prepare_prompts
from lightning_grpo.run_files import run_dir_of
from lightning_grpo.saved_run import KEY, read_checkpoint
from lightning_grpo.sources import read_rows
from lightning_grpo.tools.convert import convert_quietly
from lightning_grpo.tools.generate import format_of
from lightning_grpo.tools.trained_policy import Trained, load_trained

_NUM_SAMPLE_PROMPTS = 4


def export(
    ckpt_path: str,
    out: str,
    form: Literal["merged", "adapter"] = "merged",
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep",
    max_shard_gb: float = 5.0,
    config: str | None = None,
    dry_run: bool = False,
) -> Proof | None:
    """Write the policy of a checkpoint as a folder of transformers, and prove that it is the same.

    The folder is read again with transformers (or peft) alone. Logits and greedy completions are
    compared with those of the checkpoint on sample prompts, and so are the tokens; where they
    differ the export fails and leaves nothing behind. The numbers stand in the model card.

    Args:
        ckpt_path: a checkpoint of a run.
        out: folder to write, which is not there yet.
        form: merged is a whole model, adapters merged into it in float32; adapter is a peft folder
            of a LoRA run.
        dtype: of the weights of a whole model.
        max_shard_gb: largest file, in units of 1e9 bytes.
        config: the run's configuration; the one beside the checkpoint when null.
        dry_run: say what would be written, and write nothing.

    Returns:
        What the comparison gave; None for a dry run.
    """
    check_free(out)
    target = Path(out).absolute()
    to: Literal["transformers", "peft"] = "transformers" if form == "merged" else "peft"
    if dry_run:
        lines = convert_quietly(
            ckpt_path, out, to, dtype=dtype, max_shard_gb=max_shard_gb, dry_run=True
        )
        print("\n".join(lines))
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as staging:
        folder = Path(staging) / target.name
        convert_quietly(ckpt_path, str(folder), to, dtype=dtype, max_shard_gb=max_shard_gb)
        trained = load_trained(ckpt_path, config)
        load_base = (lambda: base_of(trained)) if form == "adapter" else None
        prompts = sample_prompts(trained)
        proof = prove(folder, trained.policy, trained.tokenizer, prompts, load_base=load_base)
        describe(folder, trained, ckpt_path, proof)
        if target.is_dir():
            target.rmdir()  # it is empty
        shutil.move(folder, target)
    print("\n".join([f"wrote {out}, compared with {ckpt_path}:", *proof.as_lines()]))
    return proof


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


def describe(folder: Path, trained: Trained, ckpt_path: str, proof: Proof) -> None:
    """Write the card of an exported folder.

    Args:
        folder: of the export.
        trained: with the configuration of the run.
        ckpt_path: the checkpoint.
        proof: of the folder.
    """
    assert trained.run is not None
    state = read_checkpoint(Path(ckpt_path))
    record = state[KEY]
    run_dir = run_dir_of(Path(ckpt_path))
    write_card(
        folder,
        options=plain({k: v for k, v in trained.run.as_dict().items() if k != "config"}),
        about={
            "optimizer_steps": record["counters"]["optimizer_steps"],
            "iterations": record["counters"]["iterations"],
            "completions": record["counters"]["completions"],
            "stage": record["stage"],
        },
        proof=proof,
        metrics_file=None if run_dir is None else run_dir / "metrics.csv",
        command=["python -m lightning_grpo", *map(shlex.quote, sys.argv[1:])],
    )


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


def plain(tree: Any) -> Any:
    """A configuration in which everything is a plain value."""
    if isinstance(tree, dict):
        return {str(key): plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [plain(value) for value in tree]
    return tree if tree is None or isinstance(tree, (bool, int, float, str)) else str(tree)

"""export: the policy or critic of a checkpoint as a folder that proves itself, and to the Hub."""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lightning_grpo.export.card import CARD, card_text, read_rows_of_metrics
from lightning_grpo.export.hub import check_login, check_name, files_to_send, push_folder
from lightning_grpo.export.kept_copy import original_path
from lightning_grpo.export.proof import Proof, prove
from lightning_grpo.importing import check_free
from lightning_grpo.policy import load_policy
from lightning_grpo.prompts import prepare_prompts
from lightning_grpo.run_files import run_dir_of
from lightning_grpo.saved_run import KEY, read_checkpoint
from lightning_grpo.sources import read_rows
from lightning_grpo.tools.convert import convert_quietly
from lightning_grpo.tools.generate import format_of
from lightning_grpo.tools.trained_policy import Trained, config_of, load_trained

_NUM_SAMPLE_PROMPTS = 4
_KINDS: dict[str, Literal["transformers", "peft"]] = {"merged": "transformers", "adapter": "peft"}


def export(
    ckpt_path: str,
    out: str | None = None,
    form: Literal["merged", "adapter"] = "merged",
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep",
    max_shard_gb: float = 5.0,
    config: str | None = None,
    push_to_hub: str | None = None,
    public: bool = False,
    dry_run: bool = False,
) -> Proof | None:
    """Write the policy of a checkpoint as a folder of transformers, and prove that it is the same.

    The folder is read again with transformers (or peft) alone. Logits and greedy completions are
    compared with those of the checkpoint on sample prompts, and so are the tokens; where they
    differ the export fails and leaves nothing behind. The numbers stand in the model card.

    Args:
        ckpt_path: a checkpoint of a run.
        out: folder to write. With push_to_hub it may be left out, or be there from an earlier
            export: it is then compared and sent as it is, with a card of its own.
        form: merged is a whole model, adapters merged into it in float32; adapter is a peft folder
            of a LoRA run.
        dtype: of the weights of a whole model.
        max_shard_gb: largest file, in units of 1e9 bytes.
        config: the run's configuration; the one beside the checkpoint when null.
        push_to_hub: user/name on the Hub to send the folder to, in a private repository. The token
            is that of `hf auth login` or HF_TOKEN. After an interruption the same command sends
            what is missing.
        public: make the repository one that everybody can read.
        dry_run: say what would be written and sent, and do neither.

    Returns:
        What the comparison gave; None for a dry run.

    Raises:
        ValueError: the checkpoint does not hold what is asked for, or the folder is not the same.
        OSError: it could not be written or sent.
    """
    options = dict(locals())
    if out is None and push_to_hub is None:
        raise ValueError("say where to: --out FOLDER, --push_to_hub user/name, or both")
    if push_to_hub is not None:
        check_name(push_to_hub)
    target = None if out is None else Path(out).absolute()
    is_written = push_to_hub is not None and target is not None and is_export(target)
    if out is not None and not is_written:
        check_free(out)
    conversion: Any = {"dtype": dtype, "max_shard_gb": max_shard_gb}
    if dry_run:
        kept = out if out is not None and not is_written else None
        lines = planned_lines(ckpt_path, kept, form, conversion)
        if is_written and target is not None:
            lines = [f"would compare {out}", *(f"  {p.name}" for p in files_to_send(target))]
        print("\n".join(lines))
        if push_to_hub is not None:
            kind = "public" if public else "private"
            print(f"would send these files to the {kind} repository {push_to_hub}, and no others")
        return None
    if push_to_hub is not None:
        check_login()
    with staged(target) as folder:
        if is_written and target is not None:
            folder = target
        else:
            convert_quietly(ckpt_path, str(folder), _KINDS[form], **conversion)
        trained = load_trained(ckpt_path, config)
        load_base = (lambda: base_of(trained)) if form == "adapter" else None
        prompts = sample_prompts(trained)
        proof = prove(folder, trained.policy, trained.tokenizer, prompts, load_base=load_base)
        describe(folder, trained.place, options, proof)
        print("\n".join([f"compared with {ckpt_path}:", *proof.as_lines()]))
        if target is not None and not is_written:
            if target.is_dir():
                target.rmdir()  # it is empty
            folder = Path(shutil.move(folder, target))
        if out is not None:
            print(f"wrote {out}")
        if push_to_hub is not None:
            push(folder, push_to_hub, f"Export ({form})", is_public=public)
    return proof


def planned_lines(ckpt_path: str, out: str | None, form: str, conversion: Any) -> list[str]:
    """What an export would write.

    Args:
        ckpt_path: the checkpoint.
        out: folder to write; None for one that is not kept.
        form: of the export.
        conversion: further options of `convert_quietly`.
    """
    with staged(None) as place:
        target = str(place) if out is None else out
        lines = convert_quietly(ckpt_path, target, _KINDS[form], dry_run=True, **conversion)
        return [*(line.replace(str(place), "a folder") for line in lines), f"  {CARD}"]


def is_export(folder: Path) -> bool:
    """Whether a folder may be an export, of whatever."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


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


def push(folder: Path, repo_id: str, message: str, *, is_public: bool) -> None:
    """Send an export, and say where it is.

    Args:
        folder: of the export.
        repo_id: user/name.
        message: of the commit.
        is_public: whether everybody may read it.
    """

    def warn(text: str) -> None:
        print(f"warning: {text}", file=sys.stderr, flush=True)

    url = push_folder(folder, repo_id, is_public=is_public, message=message, warn=warn)
    print(f"sent to {'public' if is_public else 'private'} {repo_id}: {url}")


def command_of(options: dict[str, Any]) -> list[str]:
    """The command that makes an export, word by word; what has its default is left out.

    Args:
        options: of `export`, by name.
    """
    defaults = {name: p.default for name, p in signature(export).parameters.items()}
    words = ["python", "-m", "lightning_grpo", "export"]
    for name, value in {**options, "ckpt_path": original_path(options["ckpt_path"])}.items():
        if value is True:
            words.append(f"--{name}")
        elif value != defaults[name]:
            words += [f"--{name}", shlex.quote(str(value))]
    return words


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


def describe(folder: Path, checkpoint: str, options: dict[str, Any], proof: Proof) -> None:
    """Write the card of an exported folder.

    Args:
        folder: of the export.
        checkpoint: that was opened.
        options: of `export`, by name.
        proof: of the folder.
    """
    state = read_checkpoint(Path(checkpoint))
    record = state[KEY]
    run_dir = run_dir_of(Path(checkpoint))
    text = card_text(
        form=options["form"],
        options=config_of(checkpoint, options["config"]),
        about={
            "stage": record["stage"],
            "optimizer_steps": record["counters"]["optimizer_steps"],
            "iterations": record["counters"]["iterations"],
            "completions": record["counters"]["completions"],
        },
        step=state["global_step"],
        rows=read_rows_of_metrics(None if run_dir is None else run_dir / "metrics.csv"),
        proof=proof.as_lines(),
        command=command_of(options),
    )
    (folder / CARD).write_text(text, encoding="utf-8")


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

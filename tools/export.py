"""export: the policy or critic of a checkpoint as a folder that proves itself, and to the Hub."""

from __future__ import annotations

import shlex
import shutil
import sys
from inspect import signature
from pathlib import Path
from typing import Any

from lightning_grpo.checkpoint_paths import run_dir_of
from lightning_grpo.export.card import CARD, card_text, read_rows_of_metrics
from lightning_grpo.export.hub import check_login, check_name, files_to_send, push_folder
from lightning_grpo.export.kept_copy import original_path
from lightning_grpo.export.proof import Proof
from lightning_grpo.export.values import ValueProof
from lightning_grpo.importing import check_free
from lightning_grpo.saved_run import KEY, read_checkpoint
from lightning_grpo.tools.export_forms import Dtype, Form, Wanted, make, planned_lines, staged
from lightning_grpo.tools.trained_policy import config_of


def export(
    ckpt_path: str,
    out: str | None = None,
    form: Form = "merged",
    dtype: Dtype = "keep",
    max_shard_gb: float = 5.0,
    config: str | None = None,
    push_to_hub: str | None = None,
    public: bool = False,
    dry_run: bool = False,
) -> Proof | ValueProof | None:
    """Write the policy of a checkpoint as a folder of transformers, and prove that it is the same.

    The folder is read again with transformers (or peft) alone. Logits and greedy completions are
    compared with those of the checkpoint on sample prompts, or a critic's values, and so are the
    tokens; where they differ the export fails and leaves nothing behind. The numbers stand in the
    model card.

    Args:
        ckpt_path: a checkpoint of a run.
        out: folder to write. With push_to_hub it may be left out, or be there from an earlier
            export: it is then compared and sent as it is, with a card of its own.
        form: merged is a whole model, adapters merged into it in float32; adapter is a peft folder
            of a LoRA run; token_values is the critic as a token classifier, whose output at each
            token is the value of the state after it; sequence_value is the critic as a sequence
            classifier, whose output is the value of the last state, as that of a reward model.
        dtype: of the weights of a whole model; a critic's are kept in float32.
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
    wanted = Wanted(ckpt_path, form, dtype, max_shard_gb, config)
    if out is None and push_to_hub is None:
        raise ValueError("say where to: --out FOLDER, --push_to_hub user/name, or both")
    if push_to_hub is not None:
        check_name(push_to_hub)
    target = None if out is None else Path(out).absolute()
    is_written = push_to_hub is not None and target is not None and is_export(target)
    if out is not None and not is_written:
        check_free(out)
    if dry_run:
        say_plan(wanted, out, push_to_hub, is_written=is_written, is_public=public)
        return None
    if push_to_hub is not None:
        check_login()
    with staged(target) as stage:
        folder = target if is_written and target is not None else stage
        place, proof = make(wanted, folder, is_written=is_written)
        describe(folder, place, options, proof)
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


def is_export(folder: Path) -> bool:
    """Whether a folder may be an export, of whatever."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def say_plan(
    wanted: Wanted, out: str | None, repo_id: str | None, *, is_written: bool, is_public: bool
) -> None:
    """Print what an export would write and send.

    Args:
        wanted: what of which checkpoint.
        out: folder to write, or that is written; None for one that is not kept.
        repo_id: user/name; None when nothing is sent.
        is_written: the folder is there.
        is_public: whether everybody may read it.
    """
    if is_written and out is not None:
        names = {path.name for path in files_to_send(Path(out))} | {CARD}
        lines = [f"would compare {out}", *(f"  {name}" for name in sorted(names))]
    else:
        lines = [*planned_lines(wanted, out), f"  {CARD}"]
    print("\n".join(lines))
    if repo_id is not None:
        kind = "public" if is_public else "private"
        print(f"would send these files to the {kind} repository {repo_id}, and no others")


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


def describe(
    folder: Path, checkpoint: str, options: dict[str, Any], proof: Proof | ValueProof
) -> None:
    """Write the card of an exported folder.

    Args:
        folder: of the export.
        checkpoint: that was opened.
        options: of `export`, by name.
        proof: of the folder.
    """
    state = read_checkpoint(checkpoint)
    record = state[KEY]
    run_dir = run_dir_of(checkpoint)
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

"""generate: try prompts on what a run has made."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightning_grpo.generation import NativeEngine
from lightning_grpo.generation.protocol import Sampling, SamplingKey
from lightning_grpo.policy import eos_token_ids
from lightning_grpo.prompts import PromptFormat, prepare_prompts
from lightning_grpo.rollout import collect_rollout
from lightning_grpo.sources import read_rows
from lightning_grpo.tools.trained_policy import Trained, load_exported, load_trained
from lightning_grpo.types import PromptBatch, Rollout

_NUM_PROMPTS_AT_A_TIME = 64


def generate(
    ckpt_path: str | None = None,
    name_or_path: str | None = None,
    prompts: str | None = None,
    out: str | None = None,
    num_samples: int = 1,
    temperature: float | None = None,
    max_completion_tokens: int | None = None,
    seed: int = 0,
    config: str | None = None,
) -> None:
    """Complete prompts with a checkpoint or with an exported model.

    Without a file of prompts they are read from the terminal, one a line, until it ends (Ctrl-D).
    What the run's configuration says of prompts and of validation's sampling holds here too.

    Args:
        ckpt_path: a checkpoint's folder or URL, or .../checkpoints/last, best or auto.
        name_or_path: instead of it a transformers folder or a name on the Hub.
        prompts: .jsonl, .json, .csv or .parquet with prompts, or .txt with one a line.
        out: .jsonl to write prompts and completions to, instead of to the terminal.
        num_samples: completions of each prompt.
        temperature: divides the logits, 0 for greedy; that of validation when null, or 1.
        max_completion_tokens: longest completion in tokens; that of the run when null, or 256.
        seed: of the draws.
        config: the run's configuration; the one beside the checkpoint when null.
    """
    if (ckpt_path is None) == (name_or_path is None):
        raise ValueError("generate needs either --ckpt_path or --name_or_path")
    if num_samples < 1:
        raise ValueError(f"--num_samples must be at least 1, got {num_samples}")
    if ckpt_path is not None:
        trained = load_trained(ckpt_path, config)
    else:
        trained = load_exported(str(name_or_path))
    sampling = sampling_of(trained, temperature, max_completion_tokens)
    completer = Completer(trained, sampling, num_samples, seed)
    with ExitStack() as stack:
        file = stack.enter_context(open(out, "w", encoding="utf-8")) if out is not None else None
        for batch in prompt_batches(prompts, trained):
            rollout = completer.complete(batch)
            for row in range(len(rollout)):
                record = {"prompt": rollout.prompts[row], "completion": text_of(rollout, row)}
                if file is not None:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                elif prompts is None:
                    print(record["completion"], flush=True)
                else:
                    print(f"{shown(record['prompt'])}\n  -> {record['completion']}", flush=True)
    if out is not None:
        print(f"wrote {out}")


class Completer:
    """Completes prompts with one policy.

    Args:
        trained: policy and tokenizer.
        sampling: what to draw from.
        num_samples: completions of each prompt.
        seed: of the draws.
    """

    def __init__(self, trained: Trained, sampling: Sampling, num_samples: int, seed: int) -> None:
        policy, self.tokenizer = trained.policy, trained.tokenizer
        self.engine = NativeEngine(policy, self.tokenizer, eos_token_ids(policy, self.tokenizer))
        self.sampling = sampling
        self.num_samples = num_samples
        self.seed = seed
        self.num_prompts = 0

    def complete(self, batch: PromptBatch) -> Rollout:
        """Draw the completions of some prompts, whose draws no earlier ones have had."""
        ids = range(self.num_prompts, self.num_prompts + len(batch))
        self.num_prompts += len(batch)
        with torch.no_grad():
            return collect_rollout(
                self.engine,
                self.tokenizer,
                replace(batch, group_ids=list(ids)),
                self.sampling,
                self.num_samples,
                key=SamplingKey(self.seed, 0),
            )


def sampling_of(
    trained: Trained, temperature: float | None, max_completion_tokens: int | None
) -> Sampling:
    """What to draw from: what is asked for, else as in the run's validation.

    Args:
        trained: with the run's configuration, if there is one.
        temperature: asked for.
        max_completion_tokens: asked for.

    Returns:
        The settings.
    """
    if trained.run is None:
        found = Sampling()
    else:
        rollout = trained.run.rollout
        is_own = rollout.val_temperature is not None
        found = Sampling(
            temperature=rollout.val_temperature if is_own else rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            max_completion_tokens=rollout.max_completion_tokens,
            stop_strings=rollout.stop_strings or [],
        )
    if temperature is not None:
        found = replace(found, temperature=temperature)
    if max_completion_tokens is not None:
        found = replace(found, max_completion_tokens=max_completion_tokens)
    return found


def prompt_batches(source: str | None, trained: Trained) -> Iterator[PromptBatch]:
    """Prompts of a file in batches, or of the terminal one by one.

    Args:
        source: a file; None for the terminal.
        trained: whose tokenizer and prompt format count.

    Yields:
        Prompts; a line of the terminal that is no prompt is told of and left out.
    """
    if source is not None:
        rows: Any = lines_of(source) if source.endswith(".txt") else read_rows(source)
        found = prepare_prompts(rows, format_of(trained), trained.tokenizer)
        for start in range(0, len(found), _NUM_PROMPTS_AT_A_TIME):
            indices = list(range(len(found)))[start : start + _NUM_PROMPTS_AT_A_TIME]
            yield found.select(indices, indices)
        return
    for line in terminal_lines():
        row = {"prompt": line}
        own = replace(format_of(trained), prompt_column="prompt", prompt_template=None)
        try:
            yield prepare_prompts([row], own, trained.tokenizer).select([0], [0])
        except ValueError as error:
            print(error, file=sys.stderr)


def terminal_lines() -> Iterator[str]:
    """Lines that are typed, or come through a pipe."""
    is_typed = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if is_typed else "")
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip():
            yield line


def lines_of(file: str) -> Sequence[dict[str, str]]:
    """Rows of a text file with one prompt a line; empty lines are none."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return [{"prompt": line} for line in lines if line.strip()]


def format_of(trained: Trained) -> PromptFormat:
    """How the run made prompts of rows."""
    if trained.run is None:
        return PromptFormat()
    data = trained.run.data
    return PromptFormat(
        prompt_column=data.prompt_column,
        prompt_template=data.prompt_template,
        system_prompt=data.system_prompt,
        chat=data.chat,
    )


def text_of(rollout: Rollout, row: int) -> str:
    """A completion as text."""
    completion = rollout.completions[row]
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def shown(prompt: Any) -> str:
    """A prompt as one line of text: of a chat its last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])

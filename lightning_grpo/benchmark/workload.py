"""What every contestant gets: the same weights, tokenizer, prompts, and reward."""

from __future__ import annotations

import random
import zlib
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from lightning_grpo.benchmark.regimes import SHAPES, Regime


def bench_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of words w1, w2, ... whose EOS has an id that no model of this size can draw.

    No completion ends before its limit then, without a logits processor that would cost time.

    Args:
        vocab_size: V of the model; the ids of words go from 1 to V - 2, that of EOS is V.

    Returns:
        V tokens, one of them <pad>.
    """
    vocabulary = {"<pad>": 0, "<eos>": vocab_size}
    vocabulary |= {f"w{i}": i for i in range(1, vocab_size - 1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def stopping_ids(vocab_size: int, mean_tokens: int) -> list[int]:
    """Ids that end a completion of a model whose logits are near uniform after a mean length.

    k / V = 1 / mean_tokens

    Args:
        vocab_size: V.
        mean_tokens: mean of the geometric length, in tokens, the stopping one included.

    Returns:
        k ids, at least one.
    """
    num_ids = max(round(vocab_size / mean_tokens), 1)
    return list(range(1, num_ids + 1))


def write_model(folder: Path, regime: Regime, seed: int = 0) -> None:
    """Write random weights and the tokenizer as a transformers folder.

    Args:
        folder: where to write.
        regime: gives the shape, and which ids end a completion.
        seed: of the weights.
    """
    shape = SHAPES[regime.shape]
    tokenizer = bench_tokenizer(shape.vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model: Any = Qwen2ForCausalLM(shape.config())
    ids: Any = tokenizer.eos_token_id
    if regime.length == "variable":
        ids = stopping_ids(shape.vocab_size, regime.mean_tokens)
    model.generation_config.eos_token_id = ids
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prompt_rows(regime: Regime, num_steps: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompts of P random words, other ones in every step.

    Args:
        regime: gives P, N and V.
        num_steps: steps to make prompts for.
        seed: of the words.

    Returns:
        N * num_steps rows with a column `prompt`.
    """
    draw = random.Random(seed)
    last = SHAPES[regime.shape].vocab_size - 2
    return [
        {"prompt": " ".join(f"w{draw.randint(1, last)}" for _ in range(regime.prompt_tokens))}
        for _ in range(regime.num_prompts * num_steps)
    ]


def varied_reward(completions: list[str], **columns: Any) -> list[float]:
    """A reward in [0, 1) that costs nothing and differs between siblings."""
    return [zlib.crc32(text.encode()) % 1000 / 1000 for text in completions]

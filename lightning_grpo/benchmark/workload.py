"""What every contestant gets: the same weights, tokenizer, prompts, lengths and reward."""

from __future__ import annotations

import random
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

Length = Literal["fixed", "variable"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2 with tied embeddings."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int

    def config(self, max_positions: int) -> Qwen2Config:
        """The configuration of transformers."""
        return Qwen2Config(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            max_position_embeddings=max_positions,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )


SHAPES = {
    "tiny": Shape(128, 4, 4, 2, 352, 512),
    "30m": Shape(512, 8, 8, 2, 1408, 4096),
    "0.5b": Shape(896, 24, 14, 2, 4864, 151936),
}


@dataclass(frozen=True)
class Regime:
    """Sizes of one training step.

    Args:
        shape: name of the model's shape.
        prompt_tokens: P, of every prompt.
        completion_tokens: C, the longest completion.
        length: whether every completion has C tokens, or ends by itself before.
        mean_tokens: mean length of completions that end by themselves, C unbounded.
        group_size: G, completions per prompt.
        num_completions: B, completions per step.
    """

    shape: str
    prompt_tokens: int
    completion_tokens: int
    length: Length
    mean_tokens: int
    group_size: int
    num_completions: int

    @property
    def num_prompts(self) -> int:
        """N, prompts per step."""
        return self.num_completions // self.group_size

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)


def bench_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of words w0, w1, ... whose EOS has an id that no model of this size can draw.

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
        regime: gives shape, positions, and which ids end a completion.
        seed: of the weights.
    """
    shape = SHAPES[regime.shape]
    tokenizer = bench_tokenizer(shape.vocab_size)
    torch.manual_seed(seed)
    model: Any = Qwen2ForCausalLM(shape.config(regime.prompt_tokens + regime.completion_tokens))
    ids = (
        stopping_ids(shape.vocab_size, regime.mean_tokens)
        if regime.length == "variable"
        else tokenizer.eos_token_id
    )
    model.generation_config.eos_token_id = ids
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prompt_rows(regime: Regime, num_steps: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompts of P random words, different in every step and group.

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

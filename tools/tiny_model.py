"""Make small Qwen2-shaped models with a tokenizer of their own, as plain transformers folders."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def char_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character.

    Args:
        characters: the alphabet; anything else becomes <unk>.

    Returns:
        A tokenizer with <pad>, <eos> and <unk>, and no chat template.
    """
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    for character in characters:
        vocabulary.setdefault(character, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on texts, with a chat template.

    Args:
        texts: what to train on.
        vocab_size: tokens, the three special ones included, >= 259.

    Returns:
        A tokenizer with <|endoftext|> as padding and <|im_end|> as EOS.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def tiny_config(tokenizer: PreTrainedTokenizerFast, **sizes: Any) -> Qwen2Config:
    """The configuration of a small Qwen2 with tied embeddings.

    Args:
        tokenizer: gives vocabulary and special ids.
        **sizes: of Qwen2Config, such as hidden_size and num_hidden_layers.

    Returns:
        The configuration.
    """
    defaults: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    return Qwen2Config(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **(defaults | sizes),
    )


def write_tiny_model(
    folder: str,
    texts_file: str | None = None,
    text_column: str = "question",
    characters: str | None = None,
    vocab_size: int = 2048,
    hidden_size: int = 128,
    intermediate_size: int = 352,
    num_layers: int = 4,
    num_heads: int = 4,
    max_positions: int = 512,
    weights: bool = True,
    seed: int = 0,
) -> None:
    """Write a small randomly initialised model and its tokenizer as a transformers folder.

    With `characters` the tokenizer has one token per character; otherwise it is a BPE trained on
    a column of a JSONL file, with a chat template.

    Args:
        folder: where to write.
        texts_file: JSONL file whose texts train the BPE.
        text_column: its column.
        characters: the alphabet of a character tokenizer.
        vocab_size: tokens of the BPE.
        hidden_size: width.
        intermediate_size: width of the feed-forward layers.
        num_layers: decoder layers.
        num_heads: attention heads, of queries and of keys.
        max_positions: longest sequence in tokens.
        weights: write random weights too, not only the configuration.
        seed: of the weights.
    """
    if (texts_file is None) == (characters is None):
        raise ValueError("give either texts_file (for a BPE) or characters")
    if characters is not None:
        tokenizer = char_tokenizer(characters)
    else:
        assert texts_file is not None
        lines = Path(texts_file).read_text(encoding="utf-8").splitlines()
        tokenizer = bpe_tokenizer((json.loads(line)[text_column] for line in lines), vocab_size)
    config = tiny_config(
        tokenizer,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max_positions,
    )
    tokenizer.save_pretrained(folder)
    if weights:
        torch.manual_seed(seed)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    else:
        config.architectures = ["Qwen2ForCausalLM"]
        config.save_pretrained(folder)
        GenerationConfig(
            eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        ).save_pretrained(folder)

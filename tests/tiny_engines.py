"""Tiny models of every kind that an engine meets, and rollouts to compare engines with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lightning_grpo.generation import Sampling, SamplingKey
from lightning_grpo.policy import Policy
from lightning_grpo.tools.tiny_model import char_tokenizer
from lightning_grpo.types import Completions, PromptBatch

KEY = SamplingKey(seed=3, iteration=5)
TOKENIZER = char_tokenizer("0123456789= abcdefghijklmnopqrstuvwxyz")
PROMPTS = ["12=", "3=", "777777=abcde", "9", "12="]
SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GPT2_SIZES = {"max_position_embeddings": 44}  # the others have the same names there
GEMMA3_LAYERS = ["sliding_attention", "full_attention"]
# What a model is, and the decoder that it gets.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}, "fused"),
    "qwen2-untied": ("qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 4}, "fused"),
    "qwen3": ("qwen3", {"head_dim": 16}, "fused"),
    "llama": ("llama", {"rope_parameters": LLAMA3_ROPE, "attention_bias": True}, "fused"),
    "llama-dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "cached",
    ),
    "mistral": ("mistral", {"sliding_window": None}, "fused"),
    "mistral-window": ("mistral", {"sliding_window": 6}, "cached"),
    "gemma": ("gemma", {"head_dim": 8}, "cached"),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 8, "sliding_window": 5, "layer_types": GEMMA3_LAYERS},
        "cached",
    ),
    "gpt2": ("gpt2", GPT2_SIZES, "cached"),
}
# EOS ids, sampling, max_rows.
ALL_IDS = list(range(len(TOKENIZER)))
OWN = [
    Sampling(max_completion_tokens=11),
    Sampling(0.0, max_completion_tokens=4),
    Sampling(0.7, 3, 0.8, max_completion_tokens=20, min_completion_tokens=7),
    Sampling(2.0, top_p=0.5, max_completion_tokens=1),
    Sampling(max_completion_tokens=20),
]
CASES: dict[str, tuple[list[int], Any, int]] = {
    "no-eos-greedy": ([], Sampling(0.0, max_completion_tokens=12), 0),
    "ragged": (list(range(1, 9)), Sampling(0.7, max_completion_tokens=30), 0),
    "refill": (list(range(1, 6)), Sampling(max_completion_tokens=30), 7),
    "refill-splits-groups": ([1, 2, 3], Sampling(max_completion_tokens=9), 3),
    "top-k-and-stops": (
        [1],
        Sampling(0.7, 5, 0.9, max_completion_tokens=16, stop_strings=["7", "ab"]),
        5,
    ),
    "eos-at-once": (ALL_IDS, Sampling(), 0),
    "one-token": ([1], Sampling(max_completion_tokens=1), 6),
    "bad-words": (
        [1, 2, 3],
        Sampling(
            max_completion_tokens=20,
            stop_strings=["1"],
            bad_words=["7", "ab", "3b4", "c "],
            min_completion_tokens=4,
        ),
        7,
    ),
    "own": (list(range(1, 7)), OWN, 6),
}


def tiny_model(name: str) -> PreTrainedModel:
    """A random model with weights large enough that its distribution is far from uniform."""
    model_type, options, _ = MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(SIZES | options))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" not in parameter_name and "ln_" not in parameter_name:
                parameter.mul_(8)
    return model


def tiny_policy(name: str = "qwen2-tied") -> Policy:
    """The same as a policy."""
    return Policy(tiny_model(name), len(TOKENIZER)).eval()


def batch_of(texts: list[str], tokenizer: PreTrainedTokenizerBase = TOKENIZER) -> PromptBatch:
    """Prompts with group ids that are not their positions."""
    ids = [tokenizer(text).input_ids for text in texts]
    return PromptBatch(list(texts), ids, {}, [3 * i + 2 for i in range(len(texts))])


def assert_same(first: Completions, second: Completions, tolerance: float = 1e-5) -> None:
    """The same tokens and ends, and log-probs up to rounding."""
    assert torch.equal(first.completion_mask, second.completion_mask)
    assert torch.equal(first.completion_ids, second.completion_ids)
    assert torch.equal(first.truncated, second.truncated)
    difference = (first.sampler_logprobs - second.sampler_logprobs).abs().max()
    assert float(difference) <= tolerance

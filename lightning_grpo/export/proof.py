"""Whether an exported folder, read by transformers alone, is the policy it was made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lightning_grpo.policy import Policy

# Most that the next-token distributions may differ, in nats of KL per token: rounding of another
# order of summation, and that of half precision weights.
_MAX_KL = {32: 1e-6, 16: 2e-2}
_NUM_TOKENS, _NUM_GREEDY = 24, 16
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


class ExportMismatchError(ValueError):
    """The folder is not the policy."""


@dataclass(frozen=True)
class Proof:
    """What the comparison of a folder with its source gave."""

    num_prompts: int
    num_tokens: int
    """Positions whose distributions were compared."""
    max_logit_difference: float
    mean_kl: float
    """Of the source's next-token distribution to the folder's, nats per token."""
    num_greedy_equal: int
    """Prompts whose greedy completions are the same."""
    tokenizer_class: str
    """Class of transformers that cuts texts as in training."""

    def as_lines(self) -> list[str]:
        """The numbers as sentences."""
        return [
            f"logits at {self.num_tokens} positions of {self.num_prompts} prompts: at most "
            f"{self.max_logit_difference:.1e} apart",
            f"KL of the next-token distributions: {self.mean_kl:.1e} nats per token",
            f"greedy completions of {_NUM_GREEDY} tokens: {self.num_greedy_equal} of "
            f"{self.num_prompts} the same",
            tokenizer_line(self.tokenizer_class),
        ]


def prove(
    folder: Path,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]] = (),
    *,
    load_base: Callable[[], nn.Module] | None = None,
) -> Proof:
    """Read a folder with transformers and compare it with the policy.

    Args:
        folder: as written.
        policy: its source, on the CPU.
        tokenizer: the source's.
        prompts: token ids of sample prompts, besides random ones.
        load_base: makes the model that an adapter in the folder belongs to; None for a whole model.

    Returns:
        The numbers.

    Raises:
        ExportMismatchError: tokens, logits or greedy completions differ.
    """
    tokenizer_class = compare_tokenizers(folder, tokenizer)
    model: Any
    if load_base is None:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    else:
        model = PeftModel.from_pretrained(load_base(), str(folder))  # type: ignore[arg-type]
    num_bits = min(torch.finfo(p.dtype).bits for p in model.parameters())
    model = model.float().eval()
    samples = [*prompts, *_random_prompts(policy.num_tokens)]
    found = [_compare(policy.model, model, ids) for ids in samples]
    proof = Proof(
        num_prompts=len(samples),
        num_tokens=sum(len(ids) for ids in samples),
        max_logit_difference=max(difference for difference, _, _ in found),
        mean_kl=sum(kl for _, kl, _ in found) / sum(len(ids) for ids in samples),
        num_greedy_equal=sum(is_same for _, _, is_same in found),
        tokenizer_class=tokenizer_class,
    )
    is_exact = num_bits >= 32
    if not proof.mean_kl <= _MAX_KL[32 if is_exact else 16]:
        raise ExportMismatchError(
            f"the model in {folder} is not the policy: its next-token distributions are "
            f"{proof.mean_kl:.1e} nats apart (logits up to {proof.max_logit_difference:.1e})"
        )
    if is_exact and proof.num_greedy_equal < len(samples):
        raise ExportMismatchError(
            f"the model in {folder} is not the policy: {len(samples) - proof.num_greedy_equal} of "
            f"{len(samples)} greedy completions differ"
        )
    return proof


@torch.no_grad()
def _compare(source: Any, model: Any, ids: list[int]) -> tuple[float, float, bool]:
    """Largest difference of logits, KL summed over positions, and whether greedy tokens agree."""
    tokens = torch.tensor([ids])
    ours = source(input_ids=tokens).logits[0].float()
    theirs = model(input_ids=tokens).logits[0].float()
    logprobs, others = ours.log_softmax(-1), theirs.log_softmax(-1)
    kl = float((logprobs.exp() * (logprobs - others)).sum())
    is_same = _greedy(source, ids) == _greedy(model, ids)
    return float((ours - theirs).abs().max()), kl, is_same


def _greedy(model: Any, ids: list[int]) -> list[int]:
    for _ in range(_NUM_GREEDY):
        logits: Tensor = model(input_ids=torch.tensor([ids])).logits[0, -1]
        ids = [*ids, int(logits.argmax())]
    return ids


def _random_prompts(num_tokens: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(num_tokens, (3, _NUM_TOKENS), generator=generator)
    return [row.tolist() for row in ids]


def tokenizer_line(tokenizer_class: str) -> str:
    """What `compare_tokenizers` gave as a sentence."""
    return (
        f"special tokens, chat template and the cutting of texts: the same with {tokenizer_class}"
    )


def compare_tokenizers(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """The class that reads the folder's tokenizer as the source's: AutoTokenizer where it can.

    Args:
        folder: as written.
        tokenizer: the source's.

    Returns:
        Name of a class of transformers.

    Raises:
        ExportMismatchError: special tokens, chat template or the tokens of a text differ.
    """
    again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for name in (*_SPECIAL, "chat_template"):
        ours, theirs = getattr(tokenizer, name, None), getattr(again, name, None)
        if ours != theirs:
            raise ExportMismatchError(
                f"the tokenizer in {folder} has {name} {theirs!r}, and the policy's has {ours!r}"
            )
    ids = list(range(0, len(tokenizer), max(len(tokenizer) // 64, 1)))
    text = tokenizer.decode(ids)
    # AutoTokenizer puts the pre-tokenizer of some model families in the place of a folder's own.
    loaders: dict[str, Any] = {
        "AutoTokenizer": AutoTokenizer,
        "PreTrainedTokenizerFast": PreTrainedTokenizerFast,
    }
    for name, loader in loaders.items():
        if loader.from_pretrained(folder).encode(text) == tokenizer.encode(text):
            return name
    raise ExportMismatchError(f"the tokenizer in {folder} cuts text into other tokens")

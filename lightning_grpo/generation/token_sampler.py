"""Draws the next tokens of rows that may differ in their settings, from what they may draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_grpo.generation.protocol import OWN_SETTINGS, Sampling
from lightning_grpo.generation.sampling import OwnSettings, sample_own_tokens, sample_tokens

_DISTRIBUTION = ("temperature", "top_k", "top_p")
# An id that is no token: where a row has not drawn so many yet.
NO_TOKEN = torch.iinfo(torch.int64).max


class TokenSampler:
    """Draws the next token of each row.

    Args:
        samplings: B, one for each row; stop strings and bad words are those of the first.
        bad_sequences: lists of token ids that no completion may contain.
        eos_token_ids: every id that ends a completion.
        num_tokens: V, tokens that can be drawn.
        device: of the rows.

    Raises:
        ValueError: no token is left to draw.
    """

    def __init__(
        self,
        samplings: Sequence[Sampling],
        *,
        bad_sequences: Sequence[Sequence[int]],
        eos_token_ids: Sequence[int],
        num_tokens: int,
        device: torch.device,
    ) -> None:
        self.common = samplings[0] if samplings else Sampling()
        self.max_completion_tokens = max((s.max_completion_tokens for s in samplings), default=1)
        self.own: dict[str, Tensor] = {}
        """(B,) of the settings that differ between rows; those that do not are in `common`."""
        differing = {
            name for name in OWN_SETTINGS if len({getattr(s, name) for s in samplings}) > 1
        }
        if differing & {*_DISTRIBUTION}:
            differing |= {*_DISTRIBUTION}
        for name in OWN_SETTINGS:
            if name in differing:
                dtype = torch.float32 if name in ("temperature", "top_p") else torch.int64
                values = [getattr(s, name) for s in samplings]
                self.own[name] = torch.tensor(values, dtype=dtype, device=device)
        self.truncates = any(s.top_k > 0 or s.top_p < 1 for s in samplings)
        has_minimum = any(s.min_completion_tokens > 1 for s in samplings)

        bad_sequences = [ids for ids in bad_sequences if max(ids) < num_tokens]
        self.num_recent = max((len(ids) - 1 for ids in bad_sequences), default=0)
        """How many of the last tokens of a row decide what it may draw next."""
        eos = [i for i in eos_token_ids if i < num_tokens] if has_minimum else []
        never = {ids[0] for ids in bad_sequences if len(ids) == 1}
        if len(never.union(eos)) >= num_tokens:
            raise ValueError("bad_words and min_completion_tokens leave no token to draw")
        padded = [[NO_TOKEN] * (self.num_recent + 1 - len(ids)) + [*ids] for ids in bad_sequences]
        ids = torch.tensor(padded, dtype=torch.int64, device=device)
        ids = ids.reshape(len(padded), self.num_recent + 1)
        self.before, self.last = ids[:, :-1], ids[:, -1]  # (S, W) and (S,) of the bad sequences
        self.eos = torch.tensor(eos, dtype=torch.int64, device=device)

    @property
    def kind(self) -> tuple[object, ...]:
        """What a draw depends on besides tensors."""
        common = {k: v for k, v in asdict(self.common).items() if k not in self.own}
        sizes = self.max_completion_tokens, self.before.shape, self.eos.shape
        return (common, *self.own, self.truncates, *sizes)

    def move(self, hold: Callable[[str, Tensor], Tensor]) -> None:
        """Let `draw` read what all rows share from other places.

        Args:
            hold: gives a tensor of the same values for a name and a tensor.
        """
        for name in ("before", "last", "eos"):
            setattr(self, name, hold(f"sampler.{name}", getattr(self, name)))

    def draw(
        self,
        logits: Tensor,
        uniforms: Tensor,
        *,
        drawn: Tensor | int,
        recent: Tensor,
        own: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Draw one token per row.

        Args:
            logits: (R, V) float32.
            uniforms: (R,) float64 in [0, 1).
            drawn: (R,) tokens that each row has drawn before, or the same number for all.
            recent: (R, W) the last of them, `num_recent` or more, NO_TOKEN where there are fewer.
            own: what `self.own` has for these rows, (R,) each.

        Returns:
            As `sample_tokens`: log-probs are those of the distribution drawn from.
        """
        if len(self.last) or len(self.eos):
            logits = self._restricted(logits, drawn, recent, own)
        if "temperature" not in own:
            return sample_tokens(logits, self.common, uniforms)
        settings = OwnSettings(*(own[name] for name in _DISTRIBUTION))
        return sample_own_tokens(logits, settings, uniforms, truncates=self.truncates)

    def may_stop(self, drawn: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """Which rows are long enough to end, (R,) bool.

        Args:
            drawn: (R,) tokens that each row has drawn, those that could end it included.
            own: as in `draw`.
        """
        return drawn >= own.get("min_completion_tokens", self.common.min_completion_tokens)

    def _restricted(
        self, logits: Tensor, drawn: Tensor | int, recent: Tensor, own: Mapping[str, Tensor]
    ) -> Tensor:
        """Logits with -inf for tokens that would complete a bad sequence or end a row too soon."""
        num_rows, width = len(logits), self.before.shape[1]
        last = recent[:, recent.shape[1] - width :].unsqueeze(1)  # (R, 1, W)
        is_bad = ((last == self.before) | (self.before == NO_TOKEN)).all(dim=2)  # (R, S)
        least = own.get("min_completion_tokens", self.common.min_completion_tokens)
        is_short = torch.as_tensor(drawn + 1 < least, device=logits.device)
        is_short = is_short.reshape(-1, 1).expand(num_rows, len(self.eos))
        tokens = torch.cat([self.last, self.eos]).expand(num_rows, -1)
        is_never = torch.cat([is_bad, is_short], dim=1)
        ceiling = logits.new_full(tokens.shape, torch.inf).masked_fill(is_never, -torch.inf)
        # The least over all that have something to say of a token.
        return logits.scatter_reduce(1, tokens, ceiling, "amin")


def bad_sequences(words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The token ids of bad words, as each stands and behind a space.

    Args:
        words: texts.
        tokenizer: of the policy.

    Returns:
        Lists of token ids, each once.

    Raises:
        ValueError: the tokenizer makes no token of a word.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word, f" {word}"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if not ids:
                raise ValueError(f"the tokenizer makes no token of the bad word {word!r}")
            found[tuple(ids)] = None
    return [list(ids) for ids in found]

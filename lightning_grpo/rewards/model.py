"""A reward model of transformers as a reward function."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_grpo.tokenizing import load_tokenizer
from lightning_grpo.types import CompletionText, Prompt


class RewardModel:
    """Scores completions with a sequence classifier that has one output, over its own tokenizer.

    The model never sees the policy's token ids: it gets the text of prompt and completion, in its
    own chat template if they are messages. It is loaded by `to`, or on the first call.

    A text longer than the model can take loses its beginning, so that the completion stays as whole
    as it can; the share of such rows is logged as `<name>/truncated_frac`.

    Source: own.

    Args:
        name_or_path: name or folder of the model; its last part names the reward.
        dtype: of the weights.
        batch_size: texts per forward, at least 1.
        max_length: tokens per text, at least 1; never more than the positions of the model.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        name_or_path: str,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        batch_size: int = 16,
        max_length: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, not {max_length}")
        self.name_or_path = str(name_or_path)
        self.dtype = dtype
        self.batch_size = batch_size
        self.max_length = max_length
        self.__name__ = PurePath(self.name_or_path).name or type(self).__name__
        self._model: Any = None
        self._tokenizer: Any = None

    def to(self, device: torch.device | str) -> RewardModel:
        """Load the model if it is not yet, and move it.

        Args:
            device: where to score.

        Returns:
            The same object.

        Raises:
            ValueError: the model is not a reward model, or its tokenizer does not fit it.
        """
        if self._model is None:
            self._load()
        self._model.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompts: list[Prompt],
        completions: list[CompletionText],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Score completions.

        Args:
            prompts: B prompts, strings or messages.
            completions: B completions of the same form.
            log_metric: takes the share of rows that were cut.
            columns: other arguments, not used.

        Returns:
            B outputs of the model.

        Raises:
            ValueError: messages, and the tokenizer has no chat template.
        """
        if self._model is None:
            self.to("cpu")
        rows, num_truncated = self._encode(prompts, completions)
        if log_metric is not None and rows:
            log_metric(f"{self.__name__}/truncated_frac", num_truncated / len(rows))
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        scores = [0.0] * len(rows)
        for start in range(0, len(rows), self.batch_size):
            picked = by_length[start : start + self.batch_size]
            for i, score in zip(picked, self._score([rows[i] for i in picked]).tolist()):
                scores[i] = score
        return scores

    def _load(self) -> None:
        tokenizer = _load_tokenizer(self.name_or_path)
        model = _load_model(self.name_or_path, self.dtype)
        num_embeddings = model.get_input_embeddings().num_embeddings
        if len(tokenizer) > num_embeddings:
            raise ValueError(
                f"the tokenizer of reward model {self.name_or_path} has {len(tokenizer)} tokens, "
                f"but its model only {num_embeddings}; they do not belong together"
            )
        # The model scores at the last token of a row that is not this id.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        self._tokenizer, self._model = tokenizer, model

    def _encode(
        self, prompts: Sequence[Prompt], completions: Sequence[CompletionText]
    ) -> tuple[list[list[int]], int]:
        rows: list[list[int]] = []
        num_truncated = 0
        limit = min(self.max_length or sys.maxsize, self._num_positions())
        for prompt, completion in zip(prompts, completions):
            text = self._text(prompt, completion)
            # A chat template writes the special tokens itself.
            options: dict[str, Any] = {
                "add_special_tokens": isinstance(prompt, str),
                "verbose": False,
            }
            ids = self._tokenizer(text, **options)["input_ids"]
            if len(ids) > limit:
                num_truncated += 1
                options.update(truncation=True, max_length=limit)
                ids = self._tokenizer(text, **options)["input_ids"]
            rows.append(ids)
        return rows, num_truncated

    def _num_positions(self) -> int:
        config = self._model.config.get_text_config()
        positions: int = getattr(config, "max_position_embeddings", None) or sys.maxsize
        return min(positions, int(self._tokenizer.model_max_length))

    def _text(self, prompt: Prompt, completion: CompletionText) -> str:
        if isinstance(prompt, str) and isinstance(completion, str):
            return prompt + completion
        if isinstance(prompt, str) or isinstance(completion, str):
            raise ValueError("prompts and completions must both be strings or both be messages")
        if self._tokenizer.chat_template is None:
            raise ValueError(
                f"the tokenizer of reward model {self.name_or_path} has no chat template, and the "
                "prompts are messages; use prompts that are strings, or a reward model for chats"
            )
        return str(self._tokenizer.apply_chat_template([*prompt, *completion], tokenize=False))

    def _score(self, rows: list[list[int]]) -> Tensor:
        lengths = torch.tensor([len(ids) for ids in rows])
        width = int(lengths.max())
        pad_id = self._tokenizer.pad_token_id
        input_ids = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids in rows])
        mask = torch.arange(width) < lengths[:, None]
        device = self._model.device
        logits: Tensor = self._model(
            input_ids=input_ids.to(device), attention_mask=mask.long().to(device)
        ).logits
        return logits[:, 0].float()


def _load_tokenizer(name_or_path: str) -> Any:
    tokenizer = load_tokenizer(name_or_path, truncation_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer of reward model {name_or_path} has neither a pad nor an EOS token; "
            "set its pad_token"
        )
    return tokenizer


def _load_model(name_or_path: str, dtype: str) -> Any:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    if config.num_labels != 1:
        raise ValueError(
            f"{name_or_path} has {config.num_labels} outputs (num_labels); a reward model has one"
        )
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        name_or_path,
        config=config,
        dtype=getattr(torch, dtype),
        trust_remote_code=False,
        output_loading_info=True,
    )
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"]))
        raise ValueError(
            f"{name_or_path} is no trained reward model: it lacks the weights {missing}"
        )
    return model.eval()

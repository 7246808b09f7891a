"""From rendered prompts to token ids: strings, chats, and what is left of a prompt too long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_grpo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(name_or_path: str, **options: Any) -> Any:
    """Load the tokenizer that was saved, and not another of the same model family.

    Beside a Qwen2 model, and some others, AutoTokenizer puts that model's own pre-tokenizer in
    the place of the one in the folder, and then splits texts otherwise than in training.

    Args:
        name_or_path: a name on the Hub or a local folder.
        **options: of `from_pretrained`, such as revision.

    Returns:
        A tokenizer; no code from the folder is run.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    declared = get_tokenizer_config(name_or_path, revision=options.get("revision"))
    is_generic = declared.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
    loader = PreTrainedTokenizerFast if is_generic else AutoTokenizer
    return loader.from_pretrained(name_or_path, trust_remote_code=False, **options)


def tokenize_prompts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Tokenize strings as the tokenizer does, and chats with its template.

    A string gets the special tokens that the tokenizer adds, but no second BOS where the text
    has one already, and no EOS, after which there is nothing to complete. A chat gets those
    of the template only.

    Args:
        prompts: strings and chats, in any mixture.
        tokenizer: of the policy.

    Returns:
        One list of token ids per prompt.

    Raises:
        ValueError: the tokenizer has no chat template, or it refuses a chat; no token is left.
    """
    texts = [
        prompt if isinstance(prompt, str) else _chat_text(prompt, tokenizer, f"row {number}")
        for number, prompt in enumerate(prompts, start=1)
    ]
    prompt_ids: list[list[int]] = [[] for _ in prompts]
    for is_chat in (False, True):
        chosen = [i for i, prompt in enumerate(prompts) if isinstance(prompt, list) == is_chat]
        if not chosen:
            continue
        encoded = tokenizer([texts[i] for i in chosen], add_special_tokens=not is_chat)
        for i, ids in zip(chosen, encoded["input_ids"], strict=True):
            prompt_ids[i] = ids if is_chat else _without_added_eos(texts[i], ids, tokenizer)
    bos = tokenizer.bos_token_id
    for number, ids in enumerate(prompt_ids, start=1):
        if bos is not None and ids[:2] == [bos, bos]:
            del ids[0]
        if not ids:
            raise ValueError(f"row {number}: the tokenizer makes no token of its prompt")
    return prompt_ids


def _chat_text(
    messages: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    place: str,
    *,
    opens_answer: bool = True,
) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{place} is a chat, but the tokenizer has no chat template: put a "
            "chat_template.jinja beside the model, or use string prompts without chat and "
            "system_prompt"
        )
    from jinja2 import TemplateError  # transformers needs it for every chat template

    try:
        return str(
            tokenizer.apply_chat_template(
                messages, add_generation_prompt=opens_answer, tokenize=False
            )
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"{place}: the chat template refuses it: {error}") from error


def _without_added_eos(text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    eos = tokenizer.eos_token_id
    if eos is None or ids[-1:] != [eos] or text.endswith(str(tokenizer.eos_token)):
        return ids
    return ids[:-1]


def left_truncate(
    prompt: Prompt, ids: list[int], limit: int, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Keep the last tokens of a prompt, and a BOS in front if it has one.

    Args:
        prompt: as rendered.
        ids: its token ids, more than `limit`.
        limit: tokens to keep, BOS included, >= 1.
        tokenizer: that made the ids.

    Returns:
        `limit` token ids.

    Raises:
        ValueError: of a chat, not even the end of the template, which opens the answer, is kept.
    """
    has_bos = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    num_kept = limit - has_bos
    if isinstance(prompt, list):
        num_needed = len(_answer_opening(prompt, tokenizer)) + 1
        if num_kept < num_needed:
            raise ValueError(
                f"max_prompt_tokens={limit} would cut into the end of the chat template, which "
                f"opens the answer: at least {num_needed + has_bos} are needed"
            )
    return ids[:has_bos] + ids[len(ids) - num_kept :]


def _answer_opening(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    opened = _chat_text(messages, tokenizer, "the prompt")
    closed = _chat_text(messages, tokenizer, "the prompt", opens_answer=False)
    if not opened.startswith(closed) or opened == closed:
        return []
    encoded = tokenizer([opened[len(closed) :]], add_special_tokens=False)
    return list(encoded["input_ids"][0])

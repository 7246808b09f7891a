"""Reads answers out of completions: the text of a completion, and the numbers in a text.

A number is returned in one canonical form ("1,234.50", "$1234.5" and "+1234.5" all give "1234.5"),
so two numbers are equal exactly when their strings are, and strings can be counted for a majority
vote. Completions are not to be trusted: every pattern runs in linear time, over a bounded piece of
the text.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from numbers import Real
from typing import Any

from lightning_grpo.types import CompletionText

_SEARCHED_CHARACTERS = 4000
"""Only the end of a text is searched; it also bounds how long a number can be."""

# A minus directly after a letter, digit, closing bracket, percent sign or another minus joins two
# operands ("10-5", "pages 3-7"): it is not a sign. "\u2212" is the typographic minus.
_SIGN = r"(?<![A-Za-z0-9_)\]}%\u2212-])(?P<sign>[-\u2212])"
_CURRENCY = r"(?:\\?[$\u20ac\u00a3\u00a5\u20b9])?"
# Digits after a Latin letter are part of a name or a unit (x1, H2O, m2).
_DIGITS = r"(?<![A-Za-z0-9_])(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
_BARE_FRACTION = r"(?<![A-Za-z0-9_.])\.[0-9]+"
_EXPONENT = r"(?:[eE][-+]?[0-9]{1,3}(?![A-Za-z0-9_]))?"
_NUMBER = rf"(?:{_SIGN}{_CURRENCY})?(?P<size>(?:{_DIGITS}|{_BARE_FRACTION}){_EXPONENT})"

_ANY_NUMBER = re.compile(_NUMBER)
# "#### 1/2" or "#### 10-5" gives no number rather than its first half.
_MARKED_NUMBER = re.compile(
    rf"(?<!#)####(?!#)[ \t]{{0,20}}{_CURRENCY}{_NUMBER}(?![-+*/^,.:]?[0-9])"
)


def completion_text(completion: CompletionText) -> str:
    """Return the text of a completion.

    Args:
        completion: a string, or messages, of which those of the assistant count. The content of
            a message is a string, a list of parts ({"type": "text", "text": ...}), or None.

    Returns:
        The text; several messages are joined by newlines.

    Raises:
        ValueError: the completion is neither text nor messages.
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, list) or not all(isinstance(m, dict) for m in completion):
        raise ValueError(f"a completion is a string or a list of messages, not {completion!r}")
    own = [m for m in completion if m.get("role", "assistant") == "assistant"]
    return "\n".join(_content_text(message.get("content")) for message in own)


def extract_gsm8k_strict(text: str) -> str | None:
    """Find the number of the last `#### n` of a text, the way GSM8K marks its answers.

    Source: GSM8K (arXiv:2110.14168), format of the answers.
    Departs: a currency sign may stand before the number.

    Args:
        text: any text; its last 4000 characters are read.

    Returns:
        The number in canonical form; None if there is none.
    """
    matches = list(_MARKED_NUMBER.finditer(text[-_SEARCHED_CHARACTERS:]))
    return _canonical_match(matches[-1]) if matches else None


def extract_last_number(text: str) -> str | None:
    """Find the last number of a text.

    A number may have a sign, thousands separators, decimals, an exponent of up to three digits, and
    a currency sign or unit around it. A minus is a sign unless it directly follows an operand: "is
    -5" gives -5, "10-5" gives 5. Digits right after a Latin letter are part of a name (x1, m2). A
    fraction is two numbers.

    Source: own.

    Args:
        text: any text; its last 4000 characters are read.

    Returns:
        The number in canonical form; None if there is none.
    """
    matches = list(_ANY_NUMBER.finditer(text[-_SEARCHED_CHARACTERS:]))
    return _canonical_match(matches[-1]) if matches else None


def gold_number(answer: Any) -> str | None:
    """Read the number of an answer column.

    Args:
        answer: a number; a text with one number in it; a solution that ends in `#### n`; or None.

    Returns:
        The number in canonical form; None for None.

    Raises:
        ValueError: the answer is none of these.
    """
    if answer is None:
        return None
    if isinstance(answer, str):
        number = extract_gsm8k_strict(answer) if "####" in answer else _only_number(answer)
        if number is not None:
            return number
    elif _is_finite_number(answer):
        return _canonical(Decimal(str(answer)))
    raise ValueError(
        f"the answer {str(answer)[:80]!r} is neither a number, nor a text with exactly one number, "
        "nor a solution that ends in '#### n'"
    )


def _is_finite_number(answer: Any) -> bool:
    is_number = isinstance(answer, (Real, Decimal)) and not isinstance(answer, bool)
    return is_number and math.isfinite(answer)


def _only_number(text: str) -> str | None:
    matches = list(_ANY_NUMBER.finditer(text[-_SEARCHED_CHARACTERS:]))
    return _canonical_match(matches[0]) if len(matches) == 1 else None


def _canonical_match(match: re.Match[str]) -> str:
    size = Decimal(match["size"].replace(",", ""))
    # Not `-size`, which would round to the precision of the decimal context.
    return _canonical(size.copy_negate() if match["sign"] else size)


def _canonical(value: Decimal) -> str:
    text = format(value, "f")  # exact, whatever the precision of the decimal context
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _content_text(content: Any) -> str:
    if content is None:  # a message that only calls a tool
        return ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)

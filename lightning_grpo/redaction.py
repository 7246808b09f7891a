"""Secrets: what looks like one, and text without them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "<hidden>"

# Each pattern is linear in the length of the text.
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_|api_org_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AKIA|ASIA)"
    r"[A-Za-z0-9_-]{12,}"
)
_USER_INFO = re.compile(r"(?<=://)[^\s/@:\"']{0,256}:[^\s/@\"']{1,256}(?=@)")
_PASSWORD_WORDS = r"secret|passw(?:or)?d|pwd|credentials?|api_?key|access_?key|private_?key"
_PASSWORD_NAME = re.compile(rf"(?i)(?:^|[^a-z])(?:{_PASSWORD_WORDS})$")
_TOKEN_NAME = re.compile(r"(?i)(?:^|[^a-z])(?:token|auth|authorization)$")
_WORDS = rf"{_PASSWORD_WORDS}|token|signature"
_ASSIGNED = re.compile(rf"(?i)((?:{_WORDS})[\"']?\s{{0,4}}[=:]\s{{0,4}}[\"']?)([^\s\"',}}&]+)")
_OPTION = re.compile(rf"(?i)(--[\w.]{{0,200}}(?:{_WORDS})\s+)([^\s-]\S*)")
_ENVIRONMENT_NAME = re.compile(rf"(?i){_PASSWORD_WORDS}|token(?!izer)")
_MIN_LENGTH = 8


def redacted(text: str) -> str:
    """Text without secrets.

    Args:
        text: a command line, a configuration, a message.

    Returns:
        The same with `<hidden>` in the place of tokens, of passwords in URLs, of the values of
        options that are named after secrets, and of the secrets in this process's environment.
    """
    for value in _environment_secrets():
        text = text.replace(value, HIDDEN)
    text = _USER_INFO.sub(HIDDEN, _TOKEN.sub(HIDDEN, text))
    return _OPTION.sub(rf"\1{HIDDEN}", _ASSIGNED.sub(rf"\1{HIDDEN}", text))


def refuse_secrets(options: Mapping[str, Any]) -> None:
    """Refuse options that hold a secret, because they are written to files.

    Args:
        options: nested dicts and lists.

    Raises:
        ValueError: they do; the message has the name of the option and not the value.
    """
    known = _environment_secrets()
    for name, value in _strings(options, ""):
        if _is_secret(name, value) or any(secret in value for secret in known):
            raise ValueError(
                f"{name} holds a token or a password, and options are written to files: give it "
                "in the environment (HF_TOKEN, AWS_SECRET_ACCESS_KEY, ...) or by `hf auth login`"
            )


def _is_secret(name: str, value: str) -> bool:
    if _TOKEN.search(value) or _USER_INFO.search(value) or _PASSWORD_NAME.search(name):
        return bool(value)
    if "://" in value and _ASSIGNED.search(value):
        return True
    if not _TOKEN_NAME.search(name) or not re.fullmatch(r"[\w.+/=-]{8,}", value):
        return False  # such as eos_token: <|im_end|>
    return any(c.isdigit() for c in value) and any(c.isalpha() for c in value)


def _environment_secrets() -> list[str]:
    found = {
        value
        for name, value in os.environ.items()
        # A path or a number is not the secret itself.
        if _ENVIRONMENT_NAME.search(name)
        and len(value) >= _MIN_LENGTH
        and not value.startswith(("/", "~", "."))
        and not value.isdigit()
    }
    return sorted(found, key=len, reverse=True)


def _strings(tree: Any, name: str) -> Iterator[tuple[str, str]]:
    if hasattr(tree, "as_dict"):  # of jsonargparse
        tree = tree.as_dict()
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _strings(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _strings(value, name)
    elif isinstance(tree, str):
        yield name, tree

"""Sending an export to the Hub: private unless asked otherwise, only files that belong to it."""

from __future__ import annotations

import fnmatch
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from lightning_grpo.redaction import redacted

# What an export consists of. Anything else in its folder stays there.
_FILES = (
    *("README.md", "config.json", "generation_config.json", "adapter_config.json"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json"),
)
# Weights of an earlier export in other files would be read beside the new ones.
_REPLACED = ("model*.safetensors", "model.safetensors.index.json", "adapter_*")
_WAITS_S = (1.0, 4.0, 16.0)
_CHUNK_BYTES = 1 << 20


def check_name(repo_id: str) -> None:
    """Refuse what is no name of a repository.

    Args:
        repo_id: user/name.

    Raises:
        ValueError: it is none.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository of the Hub: {error}") from error
    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id!r} is no name of a repository of the Hub: write user/name")


def check_login() -> None:
    """Refuse to send anything without a token.

    Raises:
        ValueError: there is none, or the Hub is switched off.
    """
    if constants.HF_HUB_OFFLINE:
        raise ValueError("HF_HUB_OFFLINE is set, and nothing is sent: unset it")
    if get_token() is None:
        raise ValueError(
            "the Hub wants a token with write access: log in with `hf auth login`, or set HF_TOKEN "
            "in the environment; it is taken from nowhere else"
        )


def is_sent(name: str) -> bool:
    """Whether a file of this name belongs to an export."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _FILES)


def files_to_send(folder: Path) -> list[Path]:
    """The files of a folder that belong to an export, sorted; no links and no folders."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and not path.is_symlink() and is_sent(path.name)
    )


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    is_public: bool = False,
    message: str = "Upload an export of lightning_grpo",
    warn: Callable[[str], None] = print,
) -> str:
    """Send an export to the Hub in one commit, and compare what arrived.

    What was sent before an interruption is not sent again: the Hub knows it by its hash.

    Args:
        folder: of the export.
        repo_id: user/name; it is made if it is not there.
        is_public: whether everybody may read it.
        message: of the commit.
        warn: told of attempts that failed.

    Returns:
        URL of the commit.

    Raises:
        ValueError: the repository is there and public, and `is_public` is not set.
        OSError: it could not be sent, or something else arrived.
    """
    check_name(repo_id)
    check_login()
    api = HfApi()  # with the token of the environment or of the login
    files = files_to_send(folder)
    names = [path.name for path in files]
    _retried(lambda: api.create_repo(repo_id, private=not is_public, exist_ok=True), warn)
    info: Any = _retried(lambda: api.repo_info(repo_id), warn)
    if not is_public and not info.private:
        raise ValueError(
            f"--push_to_hub {repo_id}: it is there already and everybody can read it; name "
            "another, or add --public"
        )
    stale = [name for name in _replaced(info) if name not in names]
    commit: Any = _retried(lambda: _commit(api, repo_id, files, stale, message), warn)
    arrived: Any = _retried(
        lambda: api.get_paths_info(repo_id, names, revision=commit.oid),
        warn,
    )
    found = {entry.path: entry for entry in arrived}
    for path in files:
        if not _is_same(path, found.get(path.name)):
            raise OSError(f"{path.name} is not in {repo_id} as it was sent; send it again")
    return str(commit.commit_url)


def _replaced(info: Any) -> list[str]:
    names = [sibling.rfilename for sibling in info.siblings or []]
    return [n for n in names if any(fnmatch.fnmatchcase(n, pattern) for pattern in _REPLACED)]


def _commit(api: HfApi, repo_id: str, files: list[Path], stale: list[str], message: str) -> Any:
    # One for each attempt: they remember what has become of them.
    operations: list[Any] = [CommitOperationAdd(path.name, path) for path in files]
    operations += [CommitOperationDelete(name) for name in stale]
    return api.create_commit(repo_id, operations, commit_message=message)


def _is_same(path: Path, entry: Any) -> bool:
    if entry is None or entry.size != path.stat().st_size:
        return False
    if entry.lfs is not None:
        return _digest(path, hashlib.sha256()) == str(entry.lfs.sha256)
    as_git = hashlib.sha1(b"blob %d\0" % entry.size)
    return _digest(path, as_git) == str(entry.blob_id)


def _digest(path: Path, digest: Any) -> str:
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return str(digest.hexdigest())


def _retried(action: Callable[[], Any], warn: Callable[[str], None]) -> Any:
    for wait_s in (*_WAITS_S, None):
        try:
            return action()
        except Exception as error:  # of the HTTP library, wrapped or not
            if wait_s is None or not _may_pass(error):
                raise OSError(f"the Hub: {_reason(error)}") from None
            warn(f"the Hub: {_reason(error)}; trying again in {wait_s:.0f} s")
            time.sleep(wait_s)
    raise AssertionError("unreachable")


def _may_pass(error: BaseException) -> bool:
    """Whether another attempt may do better: not when the Hub has understood and refused."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            return cause.response.status_code >= 500 or cause.response.status_code in (408, 429)
        cause = cause.__cause__
    return not isinstance(error, ValueError)


def _reason(error: BaseException) -> str:
    # A traceback would have the headers of the request, with the token, in its variables.
    errors = [e for e in (error, error.__cause__) if e is not None]
    text = " ".join(str(e) or type(e).__name__ for e in errors)
    return " ".join(redacted(text).split())[:500]

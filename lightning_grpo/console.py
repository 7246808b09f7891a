"""What the command line says and does not say: errors in one line, warnings, no noise."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from lightning_grpo.redaction import redacted
from lightning_grpo.rewards.scorer import RewardError

# Set to anything, it shows where an error came from that is otherwise one line.
TRACEBACK_VARIABLE = "LIGHTNING_GRPO_TRACEBACK"


def is_mendable(error: Exception) -> bool:
    """Whether the message of an error says all that its reader needs.

    It does when this package or Lightning refused an option or the data, and when a file is
    missing or cannot be written.

    Args:
        error: as caught.

    Returns:
        False for a ValueError out of the depth of a library.
    """
    if not isinstance(error, ValueError):
        return True
    modules = [f.f_globals.get("__name__", "") for f, _ in traceback.walk_tb(error.__traceback__)]
    return bool(modules) and modules[-1].startswith(("lightning_grpo.", "lightning.pytorch."))


def error_text(error: Exception) -> str:
    """What to print of an error: its message last, and above it what a user's function did.

    Args:
        error: as caught.

    Returns:
        Lines of text.
    """
    lines = [f"tip: {TRACEBACK_VARIABLE}=1 shows where it was raised", f"error: {error}"]
    if isinstance(error, RewardError) and error.__cause__ is not None:
        lines.insert(0, "".join(traceback.format_exception(error.__cause__)).rstrip())
    return redacted("\n".join(lines))


def redact_tracebacks() -> None:
    """Keep secrets out of the traceback that ends this process."""
    sys.excepthook = lambda kind, error, trace: print(
        redacted("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr
    )


def quiet_libraries() -> None:
    """Keep messages off the console that a user of this program can do nothing about."""
    noise = ("litlogger", "litmodels", "TPU available", "to estimate number of stepping batches")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(word in record.getMessage() for word in noise)
    )
    warnings.formatwarning = _format_warning
    transformers_logging.disable_progress_bar()
    for message in (
        r".*does not have many workers.*",
        r".*eval mode at the start of training.*",
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
        r"`is_gradient_checkpointing` is deprecated.*",
        r"Detected an existing checkpoint.*",
        r"Total length of `list` across ranks is zero.*",
        r"FSDP2-wrapped module .* returned a view tensor.*",  # nothing here changes one in place
    ):
        warnings.filterwarnings("ignore", message=message)


def _format_warning(
    message: Any, category: type, filename: str, lineno: int, line: Any = None
) -> str:
    if "lightning_grpo" in Path(filename).parts:
        return f"warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"

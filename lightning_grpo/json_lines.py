"""A file of JSON lines that a resumed run continues where its checkpoint was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from upath import UPath


class JsonLines:
    """Appends entries, and counts them, so that a checkpoint can say how many there were.

    Args:
        name: of the file, in the run's folder.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.num_lines = 0
        """Lines that belong to the run; others in the file are those of a future that is undone."""
        self._is_whole = True

    def append(self, folder: UPath, entry: dict[str, Any]) -> None:
        """Write an entry.

        Args:
            folder: of the run; it is made when it is not there.
            entry: what to write.
        """
        self.cut(folder)
        append_text(folder / self.name, json.dumps(entry) + "\n")
        self.num_lines += 1

    def cut(self, folder: UPath) -> None:
        """Drop what a run has written after the checkpoint it is resumed from, once.

        Args:
            folder: of the run.
        """
        path = folder / self.name
        is_whole, self._is_whole = self._is_whole, True
        if is_whole or not path.exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if len(lines) > self.num_lines:
            path.write_text("".join(lines[: self.num_lines]), encoding="utf-8")

    def begin(self) -> None:
        """Begin a new run."""
        self.num_lines, self._is_whole = 0, True

    def resume(self, num_lines: int) -> None:
        """Go on with a run.

        Args:
            num_lines: that its checkpoint says there were.
        """
        self.num_lines, self._is_whole = num_lines, False


def append_text(path: UPath, text: str) -> None:
    """Append to a file, which is made with its folder when it is not there.

    Args:
        path: local, or on a store, where it is written again as a whole: few can append.
        text: what to add.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(path, Path):
        with path.open("a", encoding="utf-8") as stream:
            stream.write(text)
        return
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(before + text, encoding="utf-8")

"""A file of JSON lines that a resumed run continues where its checkpoint was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


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

    def append(self, folder: Path, entry: dict[str, Any]) -> None:
        """Write an entry.

        Args:
            folder: of the run; it is made when it is not there.
            entry: what to write.
        """
        self.cut(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / self.name).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        self.num_lines += 1

    def cut(self, folder: Path) -> None:
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

"""The few changes of files that checkpoints are made by, on local disks and object stores.

Every change of a local disk goes through `os` in this file, so that a test can let each one fail.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from typing import Any

from lightning_grpo.checkpoints.places import CHUNK_BYTES, FileRecord, Place, names_in


class NewFile:
    """A file that is being written, hashed on its way.

    Args:
        place: where no file is yet.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._digest = hashlib.sha256()
        self._num_bytes = 0
        self._descriptor: int | None = None
        self._stream: Any = None
        if place.is_local:
            self._descriptor = os.open(place.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        else:
            self._stream = place.fs.open(place.path, "wb")

    def write(self, content: bytes | bytearray | memoryview) -> None:
        """Append bytes."""
        view = memoryview(content)
        for begin in range(0, len(view), CHUNK_BYTES):
            chunk = view[begin : begin + CHUNK_BYTES]
            self._digest.update(chunk)
            self._num_bytes += len(chunk)
            if self._descriptor is None:
                self._stream.write(chunk)
                continue
            while len(chunk):
                chunk = chunk[os.write(self._descriptor, chunk) :]

    def close(self) -> FileRecord:
        """Let the disk or the store have it for good.

        Returns:
            Its size, and the hash of what was meant to be written.
        """
        if self._descriptor is None:
            self._stream.close()
        else:
            os.fsync(self._descriptor)
            os.close(self._descriptor)
        return FileRecord(self._num_bytes, self._digest.hexdigest())

    def abandon(self) -> None:
        """Let go of a file whose writing failed; what is there of it stays."""
        with contextlib.suppress(Exception):  # the failure that led here is the one to tell of
            if self._descriptor is None:
                self._stream.discard()
                self._stream.closed = True  # or it would be uploaded when it is collected
            else:
                os.close(self._descriptor)


@contextlib.contextmanager
def new_file(place: Place) -> Iterator[NewFile]:
    """A file to write, which is abandoned when the block raises; else `close` it."""
    file = NewFile(place)
    try:
        yield file
    except BaseException:
        file.abandon()
        raise


def make_folder(folder: Place) -> None:
    """Make a folder and those it is in; an object store needs none."""
    if folder.is_local and not os.path.isdir(folder.path):
        make_folder(folder.parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder.path)
        sync_folder(folder.parent)


def make_new_folder(folder: Place) -> None:
    """Make a local folder that is not there, in one that is."""
    os.mkdir(folder.path)


def sync_folder(folder: Place) -> None:
    """Let the disk have the names in a local folder for good."""
    descriptor = os.open(folder.path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network mounts cannot
            raise
    finally:
        os.close(descriptor)


def rename(source: Place, target: Place) -> None:
    """Give a local folder another name on the same filesystem, at once."""
    os.rename(source.path, target.path)


def remove_tree(folder: Place) -> None:
    """Remove a folder and all that is in it; nothing to do when it is gone.

    A link is removed, and not what it leads to.
    """
    if not folder.is_local:
        # Not fs.rm, which takes `*` and `[` in a name for a pattern.
        for path in folder.fs.find(folder.path):
            remove_file(Place(folder.fs, path))
        with contextlib.suppress(OSError, NotImplementedError):  # a store has no folders
            folder.fs.rmdir(folder.path)
        return
    try:
        if not stat.S_ISDIR(os.lstat(folder.path).st_mode):
            os.unlink(folder.path)
            return
        for name in names_in(folder):
            remove_tree(folder / name)
        os.rmdir(folder.path)
    except FileNotFoundError:
        pass  # another process was faster


def remove_file(file: Place) -> None:
    """Remove one file of an object store; nothing to do when it is gone."""
    with contextlib.suppress(FileNotFoundError):
        file.fs.rm_file(file.path)

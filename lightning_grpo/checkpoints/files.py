"""The few operations on files that checkpoints are made of, on local disks and object stores.

Every change to a local disk goes through `os` in this file, so that a test can let each one fail.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from lightning_grpo.checkpoints.errors import BrokenCheckpointError

CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Place:
    """A file or folder on a filesystem of fsspec; as a string, its local path or its URL."""

    fs: AbstractFileSystem
    path: str

    @property
    def is_local(self) -> bool:
        """Whether it is on a disk that this machine has mounted."""
        return isinstance(self.fs, LocalFileSystem)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> Place:
        """The folder it is in."""
        path = self.path.rpartition("/")[0]
        return Place(self.fs, path or "/" if self.is_local else path)

    def __truediv__(self, name: str) -> Place:
        return Place(self.fs, f"{self.path.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.path if self.is_local else str(self.fs.unstrip_protocol(self.path))


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of a file."""

    num_bytes: int
    sha256: str


def locate(url: str | os.PathLike[str]) -> Place:
    """The place that a path or URL names.

    Args:
        url: a local path, `file://...`, or a URL of any filesystem that fsspec knows.

    Returns:
        The place, which need not exist.

    Raises:
        ValueError: the URL chains filesystems, or its filesystem is unknown or not installed.
    """
    text = os.fspath(url)
    if "::" in text:
        raise ValueError(f"{text}: a URL that chains filesystems cannot hold checkpoints")
    try:
        fs, path = url_to_fs(text)
    except ImportError as error:
        raise ValueError(f"{text}: {error}") from error
    return Place(fs, path.rstrip("/"))


def names_in(folder: Place) -> list[str]:
    """Names of what is in a folder, sorted; none when there is no such folder."""
    if folder.is_local:
        try:
            return sorted(os.listdir(folder.path))
        except (FileNotFoundError, NotADirectoryError):
            return []
    folder.fs.invalidate_cache(folder.path)  # others may have written since
    try:
        paths = folder.fs.ls(folder.path, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    inside = [path.rstrip("/") for path in paths]
    return sorted(p.rpartition("/")[2] for p in inside if p.rpartition("/")[0] == folder.path)


def num_bytes(file: Place) -> int | None:
    """Size of a file; None when there is none. A symbolic link is no file."""
    if file.is_local:
        try:
            status = os.lstat(file.path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None
    file.fs.invalidate_cache(file.parent.path)
    try:
        info = file.fs.info(file.path)
    except FileNotFoundError:
        return None
    return int(info["size"]) if info["type"] == "file" else None


def open_to_read(file: Place) -> IO[bytes]:
    """A stream of a file's bytes that can seek."""
    if file.is_local:
        return open(file.path, "rb")  # the caller closes it
    stream: IO[bytes] = file.fs.open(file.path, "rb")
    return stream


def read_exactly(stream: IO[bytes], size: int, where: object) -> bytearray:
    """Read a known number of bytes, in chunks so that there is no second copy of them.

    Args:
        stream: at the first of them.
        size: how many.
        where: the file, for the error.

    Returns:
        The bytes.

    Raises:
        BrokenCheckpointError: the file ends before.
    """
    content = bytearray(size)
    view, done = memoryview(content), 0
    while done < size:
        count = stream.readinto(view[done : done + CHUNK_BYTES])  # type: ignore[attr-defined]
        if not count:
            raise BrokenCheckpointError(f"{where} ends after {done} of {size} bytes")
        done += count
    return content


def map_bytes(file: Place, begin: int, size: int) -> memoryview:
    """A part of a local file as memory that can be written, without changing the file.

    Args:
        file: local.
        begin: first byte.
        size: number of bytes, > 0.

    Returns:
        The bytes, which are read from the disk when they are used.
    """
    start = begin - begin % mmap.ALLOCATIONGRANULARITY
    with open(file.path, "rb") as stream:
        mapped = mmap.mmap(
            stream.fileno(), begin - start + size, access=mmap.ACCESS_COPY, offset=start
        )
    return memoryview(mapped)[begin - start :]


def sha256_of(file: Place) -> str:
    """SHA-256 of a file's bytes as they are read back, in hexadecimal."""
    digest = hashlib.sha256()
    with open_to_read(file) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


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
        with contextlib.suppress(FileNotFoundError):
            folder.fs.rm(folder.path, recursive=True)
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

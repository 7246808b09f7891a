"""Files and folders on local disks and object stores: where they are, and reading them."""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from dataclasses import dataclass
from typing import IO

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
    return sorted(_entries_of(folder))


def folders_in(folder: Place) -> list[str]:
    """Names of the folders in a folder, sorted."""
    return sorted(name for name, size in _entries_of(folder).items() if size is None)


def file_sizes(folder: Place) -> dict[str, int]:
    """Name -> bytes of the files in a folder, which one look at it gives.

    A symbolic link is no file.
    """
    return {name: size for name, size in _entries_of(folder).items() if size is not None}


def _entries_of(folder: Place) -> dict[str, int | None]:
    """Name -> bytes of a file, or None for anything else."""
    try:
        if folder.is_local:
            with os.scandir(folder.path) as entries:
                status = {e.name: e.stat(follow_symlinks=False) for e in entries}
            return {n: s.st_size if stat.S_ISREG(s.st_mode) else None for n, s in status.items()}
        folder.fs.invalidate_cache(folder.path)  # others may have written since
        found = folder.fs.ls(folder.path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    inside = {Place(folder.fs, entry["name"].rstrip("/")): entry for entry in found}
    return {
        place.name: int(entry["size"]) if entry["type"] == "file" else None
        for place, entry in inside.items()
        if place.parent.path == folder.path  # of a file, some stores list the file itself
    }


def is_file(place: Place) -> bool:
    """Whether a place is a file and no folder."""
    if place.is_local:
        return os.path.isfile(place.path)
    place.fs.invalidate_cache(place.parent.path)
    return bool(place.fs.isfile(place.path))


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


def read_back(file: Place) -> FileRecord:
    """Read all of a file.

    Args:
        file: to read.

    Returns:
        Its size and hash as they are.

    Raises:
        FileNotFoundError: there is none.
    """
    digest, size = hashlib.sha256(), 0
    with open_to_read(file) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size, digest.hexdigest())

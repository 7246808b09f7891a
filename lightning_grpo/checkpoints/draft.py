"""Writing a checkpoint so that nobody takes it for one before it is whole.

A local one is written beside its target, on the same filesystem, and renamed when all of it is on
the disk and was read back. A store has no rename: there the manifest, which appears at once, is
written when everything else has been read back.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from lightning_grpo.checkpoints.errors import BrokenCheckpointError, failed_write
from lightning_grpo.checkpoints.files import (
    FileRecord,
    NewFile,
    Place,
    locate,
    make_folder,
    make_new_folder,
    names_in,
    new_file,
    num_bytes,
    remove_tree,
    rename,
    sha256_of,
    sync_folder,
)
from lightning_grpo.checkpoints.manifest import MANIFEST, Manifest
from lightning_grpo.checkpoints.tensor_file import Shard, TensorFile, write_tensors


class Draft:
    """A checkpoint that is being written: `commit` makes it one.

    Args:
        target: where it will be.
        folder: where it is until then; the target itself on a store.
    """

    def __init__(self, target: Place, folder: Place) -> None:
        self.target = target
        self.folder = folder
        self.records: dict[str, FileRecord] = {}

    @classmethod
    def begin(cls, url: str | os.PathLike[str]) -> Draft:
        """Make room for a new checkpoint.

        Args:
            url: where nothing is yet.

        Returns:
            A draft without files.

        Raises:
            FileExistsError: something is there. A checkpoint is never replaced.
        """
        target = locate(url)
        if names_in(target) or num_bytes(target) is not None:
            raise FileExistsError(f"{target} is there already: give each checkpoint its own name")
        if not target.is_local:
            return cls(target, target)
        folder = target.parent / staging_name(target.name)
        make_folder(target.parent)
        remove_tree(folder)  # of an attempt of this process that could not be cleaned up
        make_new_folder(folder)
        return cls(target, folder)

    def add_tensors(
        self, name: str, tensors: Mapping[str, Tensor], shards: Mapping[str, Shard] | None = None
    ) -> None:
        """Write a safetensors file and read it back.

        Args:
            name: of the file.
            tensors: name -> tensor.
            shards: of those that are parts of larger tensors.
        """
        with new_file(self.folder / name) as file:
            write_tensors(file, tensors, shards)
            self._close(file)
        TensorFile(self.folder / name)

    def add_bytes(self, name: str, content: bytes) -> None:
        """Write any other file and read it back."""
        with new_file(self.folder / name) as file:
            file.write(content)
            self._close(file)

    def _close(self, file: NewFile) -> None:
        record = file.close()
        found = num_bytes(file.place)
        if found != record.num_bytes or sha256_of(file.place) != record.sha256:
            raise BrokenCheckpointError(
                f"{file.place} reads back differently from what was written ({found} bytes of "
                f"{record.num_bytes}): the disk or the store is at fault"
            )
        self.records[file.place.name] = record

    def commit(self, manifest: Manifest) -> Manifest:
        """Write the manifest and give the checkpoint its name. One process does it.

        Args:
            manifest: whose files are those of this draft, and those that it names already.

        Returns:
            The manifest with all files.
        """
        manifest = replace(manifest, files={**manifest.files, **self.records})
        for name, record in manifest.files.items():
            if num_bytes(self.folder / name) != record.num_bytes:
                raise BrokenCheckpointError(
                    f"{self.folder / name} is not there as it was written: checkpoints of a run on "
                    "several nodes need a folder that all of them share, or a URL"
                )
        self.add_bytes(MANIFEST, manifest.to_json())
        if self.target.is_local:
            sync_folder(self.folder)
            rename(self.folder, self.target)
            sync_folder(self.target.parent)
        return manifest

    def abandon(self) -> None:
        """Remove what is there of it."""
        with contextlib.suppress(OSError):  # what cannot be removed now is at the next start
            remove_tree(self.folder)


@contextlib.contextmanager
def drafting(url: str | os.PathLike[str]) -> Iterator[Draft]:
    """Write a checkpoint, which is removed again when the block raises.

    Args:
        url: where nothing is yet.

    Yields:
        A draft to fill and to commit.

    Raises:
        OSError: it could not be written; the message has the path and what to do.
    """
    draft: Draft | None = None
    try:
        draft = Draft.begin(url)
        yield draft
    except FileExistsError:
        raise
    except BaseException as error:
        if draft is not None:
            draft.abandon()
        if isinstance(error, Exception) and not isinstance(error, (TypeError, ValueError)):
            raise failed_write(error, str(locate(url))) from error
        raise


def staging_name(name: str) -> str:
    """Name of the folder in which a checkpoint is written, which says by whom."""
    return f".tmp-{name}@{socket.gethostname()}-{os.getpid()}"

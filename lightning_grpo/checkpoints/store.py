"""Checkpoints as folders: written so that a failure costs none, read without unpickling.

    <kind>-<step>/
      weights.safetensors     the module's state_dict
      optimizer.safetensors   "<parameter>/exp_avg" and the like
      state.safetensors       all other tensors, under their path
      state.json              everything that is no tensor
      manifest.json           sizes and hashes; written last

Over several ranks each writes weights and optimizer files of its own, such as
`weights-00000-of-00002.safetensors`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lightning_grpo.checkpoints.codec import decode, encode
from lightning_grpo.checkpoints.draft import drafting
from lightning_grpo.checkpoints.errors import BrokenCheckpointError
from lightning_grpo.checkpoints.files import locate, num_bytes, open_to_read, sha256_of
from lightning_grpo.checkpoints.manifest import MANIFEST, Manifest, read_manifest
from lightning_grpo.checkpoints.shards import TensorInfo, TensorSet
from lightning_grpo.checkpoints.tensor_file import TensorFile

STATE = "state.json"
Section = Literal["weights", "optimizer", "state"]


@dataclass(frozen=True)
class Sections:
    """A checkpoint's content in the three parts that are stored apart."""

    state: dict[str, Any]
    """All but weights and optimizers."""
    weights: dict[str, Any] | None = None
    """The module's state_dict."""
    optimizers: list[dict[str, Any]] | None = None
    """State_dicts of the optimizers, with the names of parameters in the place of indices."""

    def encode(self) -> tuple[bytes, dict[Section, dict[str, Tensor]]]:
        """The content of state.json, and the tensors of each part."""
        plain: dict[str, Any] = {}
        tensors: dict[Section, dict[str, Tensor]] = {}
        plain["state"], tensors["state"] = encode(self.state)
        if self.weights is not None:
            plain["weights"], tensors["weights"] = encode(self.weights)
        if self.optimizers is not None:
            plain["optimizers"], tensors["optimizer"] = [], {}
            for number, state in enumerate(self.optimizers):
                encoded = {}
                for key, value in state.items():
                    # The first one's tensors have the name of their parameter and nothing before.
                    root = (f"optimizer_{number}",) * (number > 0) + (key,) * (key != "state")
                    encoded[key], found = encode(value, root)
                    tensors["optimizer"] |= found
                plain["optimizers"].append(encoded)
        return json.dumps(plain, allow_nan=False).encode(), tensors


def write_checkpoint(
    url: str | os.PathLike[str], sections: Sections, manifest: Manifest
) -> Checkpoint:
    """Write a checkpoint from one process.

    Args:
        url: where nothing is yet; its folder is made.
        sections: what it holds.
        manifest: what it is; its files are filled in.

    Returns:
        The checkpoint, which has been read back.

    Raises:
        TypeError: it would hold something that is neither plain nor a tensor.
        OSError: it could not be written; the checkpoints before it are as they were.
    """
    text, tensors = sections.encode()
    with drafting(url) as draft:
        for section, found in tensors.items():
            draft.add_tensors(f"{section}.safetensors", found)
        draft.add_bytes(STATE, text)
        return Checkpoint(str(draft.target), draft.commit(manifest))


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, whose files have the sizes that its manifest says."""

    url: str
    manifest: Manifest

    def read_state(self) -> dict[str, Any]:
        """All but weights and optimizers, checked against its hash.

        Returns:
            The tree, with tensors on the CPU.
        """
        state: dict[str, Any] = self._decode(self._read_plain()["state"], "state")
        return state

    def read_weights(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Weights, one after the other, so that one at a time has to be in memory.

        Args:
            names: which of them; None for all, which are then checked against their hash.

        Yields:
            Name and tensor on the CPU; of local files views of them, which may be changed without
            changing the files.
        """
        if names is None:
            yield from self._read_section("weights", owned=False)
            return
        found = self.tensors("weights")
        for name in names:
            yield name, found.read(name)

    def read_all(self) -> Sections:
        """Everything, checked against its hashes; weights of local files as views of them."""
        plain = self._read_plain()
        weights, optimizers = plain.get("weights"), plain.get("optimizers")
        return Sections(
            self._decode(plain["state"], "state"),
            None if weights is None else self._decode(weights, "weights"),
            None if optimizers is None else self._decode(optimizers, "optimizer"),
        )

    def tensor_info(self, section: Section = "weights") -> dict[str, TensorInfo]:
        """Types, shapes and files of the tensors of a part, which are not read.

        Args:
            section: weights, optimizer or state.

        Returns:
            Name -> what is known of the tensor.
        """
        return self.tensors(section).info

    def tensors(self, section: Section) -> TensorSet:
        """The tensors of a part, to read by name. What is read so is not checked by hash."""
        folder = locate(self.url)
        return TensorSet([TensorFile(folder / name) for name in self.file_names(section)])

    def file_names(self, section: Section) -> list[str]:
        """Names of the tensor files of a part."""
        pattern = re.compile(rf"{section}(-\d+-of-\d+)?\.safetensors")
        return sorted(name for name in self.manifest.files if pattern.fullmatch(name))

    def problem_of(self, name: str) -> str | None:
        """What is wrong with a file, whose bytes are all read.

        Args:
            name: of the manifest.

        Returns:
            A sentence that names the file; None when it is as it was written.
        """
        place = locate(self.url) / name
        record = self.manifest.files[name]
        if num_bytes(place) is None:
            return f"{place} is missing"
        if num_bytes(place) != record.num_bytes:
            return f"{place} has {num_bytes(place)} bytes and not {record.num_bytes}"
        if sha256_of(place) != record.sha256:
            return f"{place} is damaged: its SHA-256 is another one"
        return None

    def _read_section(self, section: Section, *, owned: bool) -> Iterator[tuple[str, Tensor]]:
        found = self.tensors(section)
        hashes = {name: record.sha256 for name, record in self.manifest.files.items()}
        if not found.is_sharded:
            for file in found.files:
                yield from file.read_all(hashes[file.place.name], owned=owned)
            return
        for file in found.files:
            if problem := self.problem_of(file.place.name):
                raise BrokenCheckpointError(problem)
        for name in found.info:
            yield name, found.read(name)

    def _read_plain(self) -> dict[str, Any]:
        place = locate(self.url) / STATE
        with open_to_read(place) as stream:
            text = stream.read()
        if hashlib.sha256(text).hexdigest() != self.manifest.files[STATE].sha256:
            raise BrokenCheckpointError(f"{place} is damaged: its SHA-256 is another one")
        try:
            plain: dict[str, Any] = json.loads(text)
            if "state" not in plain:
                raise ValueError("it has no state")
        except (ValueError, TypeError, RecursionError) as error:
            raise BrokenCheckpointError(f"{place} is damaged: {error}") from error
        return plain

    def _decode(self, plain: Any, section: Section) -> Any:
        tensors = dict(self._read_section(section, owned=section != "weights"))
        try:
            return decode(plain, tensors.__getitem__)
        except (BrokenCheckpointError, RecursionError) as error:
            raise BrokenCheckpointError(f"{self.url}/{STATE} is damaged: {error}") from error


def open_checkpoint(url: str | os.PathLike[str], *, check_sha256: bool = False) -> Checkpoint:
    """Open a checkpoint and look whether it is complete.

    Args:
        url: of its folder.
        check_sha256: also read all of its bytes.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: there is none.
        BrokenCheckpointError: a file is missing, cut or damaged, or the manifest is.
    """
    place = locate(url)
    if num_bytes(place) is not None:
        raise BrokenCheckpointError(
            f"{place} is a file, and a checkpoint is a folder with a {MANIFEST}"
        )
    checkpoint = Checkpoint(str(place), read_manifest(place))
    if STATE not in checkpoint.manifest.files:
        raise BrokenCheckpointError(f"{place / MANIFEST} names no {STATE}")
    for name, record in checkpoint.manifest.files.items():
        found = num_bytes(place / name)
        if found is None:
            raise BrokenCheckpointError(f"{place / name} is missing")
        if found != record.num_bytes:
            raise BrokenCheckpointError(
                f"{place / name} has {found} bytes and not {record.num_bytes}"
            )
    if check_sha256 and (problems := verify(checkpoint)):
        raise BrokenCheckpointError("; ".join(problems))
    return checkpoint


def verify(checkpoint: Checkpoint) -> list[str]:
    """Read all bytes of a checkpoint and compare them with its manifest.

    Args:
        checkpoint: of `open_checkpoint`.

    Returns:
        What is wrong with it, each with the name of the file; nothing when it is whole.
    """
    found = [checkpoint.problem_of(name) for name in checkpoint.manifest.files]
    return [problem for problem in found if problem is not None]

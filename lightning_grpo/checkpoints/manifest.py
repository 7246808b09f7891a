"""The manifest of a checkpoint: what it is, size and hash of each of its files, its own hash."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lightning_grpo import __version__
from lightning_grpo.checkpoints.errors import BrokenCheckpointError
from lightning_grpo.checkpoints.files import FileRecord, Place, num_bytes, open_to_read

MANIFEST = "manifest.json"
FORMAT = "lightning_grpo checkpoint"
FORMAT_VERSION = 1
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MAX_MANIFEST_BYTES = 1 << 26
_PACKAGES = ("torch", "lightning", "transformers", "peft")


@dataclass(frozen=True)
class Metric:
    """The measurement for which a checkpoint was kept."""

    name: str
    value: float


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is."""

    kind: str
    """last, best, iteration; other when its name says nothing."""
    step: int
    """Optimizer steps behind it, skipped ones included."""
    serial: int
    """Larger than that of every checkpoint that was in its folder before."""
    files: dict[str, FileRecord]
    iteration: int | None = None
    stage: str | None = None
    """Which algorithm moved the policy, and what the critic did: see stages.py."""
    algorithm: str | None = None
    """Name of the algorithm that the run had for its policy."""
    world_size: int = 1
    metric: Metric | None = None
    versions: dict[str, str] | None = None

    def to_json(self) -> bytes:
        """The file's content."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        if self.metric is not None and not math.isfinite(self.metric.value):
            content["metric"]["value"] = None
        return json.dumps({**content, "sha256": _sha256(content)}, indent=2).encode()


def _sha256(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what a checkpoint means."""
    found = {"lightning_grpo": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # found on the path without having been installed
            continue
    return found


def read_manifest(folder: Place) -> Manifest:
    """Read and check a checkpoint's manifest, not the files that it names.

    Args:
        folder: of the checkpoint.

    Returns:
        The manifest.

    Raises:
        FileNotFoundError: there is none, so this is no checkpoint, or one that was never finished.
        BrokenCheckpointError: it is damaged, or of a later version of this format.
    """
    place = folder / MANIFEST
    size = num_bytes(place)
    if size is None:
        raise FileNotFoundError(f"{folder} is no complete checkpoint: it has no {MANIFEST}")
    if size > _MAX_MANIFEST_BYTES:
        raise BrokenCheckpointError(f"{place} has {size} bytes, more than a manifest can have")
    with open_to_read(place) as stream:
        text = stream.read()
    try:
        content = json.loads(text)
        own_hash = content.pop("sha256")
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        found = content["format_version"]
        if found != FORMAT_VERSION:
            raise BrokenCheckpointError(
                f"{folder} has format version {found}, and this version of lightning_grpo reads "
                f"{FORMAT_VERSION}: install the one that wrote it ({content.get('versions')})"
            )
        if own_hash != _sha256(content):
            raise ValueError("its SHA-256 is another one")
        return _manifest(content)
    except BrokenCheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise BrokenCheckpointError(f"{place} is damaged ({error!r})") from error


def _manifest(content: dict[str, Any]) -> Manifest:
    values = {field.name: content[field.name] for field in fields(Manifest)}
    for name in ("step", "serial", "world_size"):
        if type(values[name]) is not int or values[name] < 0:
            raise ValueError(f"{name} is {values[name]!r}")
    values["files"] = {
        check_file_name(name): FileRecord(int(record["num_bytes"]), str(record["sha256"]))
        for name, record in content["files"].items()
    }
    if (metric := content["metric"]) is not None:
        value = math.nan if metric["value"] is None else float(metric["value"])
        values["metric"] = Metric(str(metric["name"]), value)
    return Manifest(**values)


def check_file_name(name: str) -> str:
    """Refuse a name that could lead out of the checkpoint's folder.

    Args:
        name: of a file of a checkpoint.

    Returns:
        The name.

    Raises:
        ValueError: it is more than letters, digits, dots, dashes and underscores.
    """
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a file of a checkpoint")
    return name

"""Reading data into rows: files of any fsspec URL, package data, `datasets` names, sequences.

A row is a dict from column name to value. Nothing here unpickles or runs code from the data.
"""

from __future__ import annotations

import csv
import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import IO, Any, Protocol, cast, runtime_checkable

import fsspec
from fsspec.utils import infer_compression

from lightning_grpo.paths import resolve_package_path

Row = Mapping[str, Any]


@runtime_checkable
class Rows(Protocol):
    """Anything with a length and rows by index: a list of dicts, a task, a `datasets.Dataset`."""

    # Any, and not int and dict: jsonargparse takes a class_path only if the annotations agree.
    def __len__(self) -> Any:
        """Return the number of rows."""

    def __getitem__(self, index: Any, /) -> Any:
        """Return the row at `index`, from 0."""


def read_rows(
    source: str | os.PathLike[str] | Rows,
    *,
    dataset_config: str | None = None,
    split: str | None = None,
) -> Sequence[Row]:
    """Read the rows of one data source.

    Args:
        source: a sequence of dicts, which is returned as it is; a path or fsspec URL that ends in
            .jsonl, .ndjson, .json (list of objects, or object of columns), .csv or .parquet, with
            .gz and the like after it where compressed; `package://name/path` for a file inside an
            installed package; or else a name or local folder for `datasets.load_dataset`.
        dataset_config: configuration of a `datasets` name.
        split: split of a `datasets` name; a file has none and does not look at it.

    Returns:
        One dict per row. Values of a CSV file are strings.

    Raises:
        ValueError: the source is missing, empty, malformed (with file and line) or needs a package.
    """
    if isinstance(source, Mapping):
        raise ValueError(
            f"a mapping with the keys {sorted(map(str, source))} holds several splits or columns: "
            "give one of them, as a sequence of dicts"
        )
    rows: Sequence[Row]
    if isinstance(source, (str, os.PathLike)):
        rows = _read_named(os.fspath(source), dataset_config, split)
    elif isinstance(source, Rows):
        rows = cast("Sequence[Row]", source)
    else:
        raise ValueError(f"a {type(source).__name__} is no sequence of rows: it needs a length")
    if len(rows) == 0:
        raise ValueError(f"{_shown(source)} has no rows")
    return rows


def _read_named(source: str, dataset_config: str | None, split: str | None) -> Sequence[Row]:
    source = resolve_package_path(source)
    name = source.partition("?")[0] if "://" in source else source
    compression = infer_compression(name)
    path = PurePosixPath(name)
    suffix = (path.with_suffix("") if compression else path).suffix.lower()
    if suffix in _READERS:
        return _read_file(source, suffix, compression)
    if "://" in source or os.path.isfile(source):
        raise ValueError(
            f"{_shown(source)} has an unknown ending {suffix!r}: one of {', '.join(_READERS)} "
            "is needed, and .gz may follow it"
        )
    if source.lstrip().startswith("{"):
        raise ValueError(f"{source} names no class with these init_args: check their names")
    return _load_dataset(source, dataset_config, split)


def _read_file(source: str, suffix: str, compression: str | None) -> Sequence[Row]:
    shown = _shown(source)
    try:
        with fsspec.open(source, "rb", compression=compression) as file:
            return _READERS[suffix](file, shown)
    except FileNotFoundError:
        place = " (or no connection)" if "://" in source else f" (looked in {os.getcwd()})"
        raise ValueError(f"no such file: {shown}{place}") from None
    except (ImportError, OSError, EOFError, zlib.error) as error:
        # No driver or pyarrow, no permission or network, broken compression. What comes with a
        # URL that holds a password or a key may repeat it, hence also `from None`.
        reason = f"{type(error).__name__}: {error}" if shown == source else type(error).__name__
        raise ValueError(f"cannot read {shown}: {reason}") from None


def _read_jsonl(file: IO[bytes], shown: str) -> list[Row]:
    rows = []
    for number, line in enumerate(file, start=1):
        if line.strip():
            rows.append(_parse_object(line, f"{shown}, line {number}"))
    return rows


def _parse_object(line: bytes, place: str) -> Row:
    row = _parse_json(line, place)
    if not isinstance(row, dict):
        raise ValueError(f"{place}: an object is needed, got a {type(row).__name__}")
    return row


def _parse_json(text: bytes, place: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError(f"{place}: nested too deeply") from None
    except ValueError as error:  # malformed JSON, not UTF-8, or a number of thousands of digits
        raise ValueError(f"{place}: not valid JSON: {error}") from error


def _read_json(file: IO[bytes], shown: str) -> list[Row]:
    try:
        content = _parse_json(file.read(), shown)
    except ValueError as error:
        hint = (
            "; a file with one object per line ends in .jsonl" if "Extra data" in str(error) else ""
        )
        raise ValueError(f"{error}{hint}") from error
    if isinstance(content, dict):
        return _rows_of_columns(content, shown)
    if not isinstance(content, list):
        raise ValueError(f"{shown}: a list of objects is needed, got a {type(content).__name__}")
    for number, row in enumerate(content, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{shown}, row {number}: got a {type(row).__name__}, no object")
    return content


def _rows_of_columns(columns: dict[str, Any], shown: str) -> list[Row]:
    for name, column in columns.items():
        if not isinstance(column, list):
            raise ValueError(
                f"{shown}: a list of objects, or one object with a list per column, is needed; "
                f"{name!r} holds a {type(column).__name__}"
            )
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{shown}: the columns differ in length: {lengths}")
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def _read_csv(file: IO[bytes], shown: str) -> list[Row]:
    # newline="" leaves line ends inside quoted fields to the csv module.
    reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
    try:
        return list(_csv_rows(reader, shown))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{shown}, after line {reader.line_num}: {error}") from error


def _csv_rows(reader: Any, shown: str) -> Iterator[Row]:
    header: list[str] = next(reader, [])
    if len(set(header)) < len(header):
        raise ValueError(f"{shown}, line 1: a column name occurs twice: {header}")
    for values in reader:
        if not values:
            continue
        if len(values) != len(header):
            raise ValueError(
                f"{shown}, line {reader.line_num}: {len(values)} fields, "
                f"but the header has {len(header)}: {header}"
            )
        yield dict(zip(header, values))


def _read_parquet(file: IO[bytes], shown: str) -> list[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow: pip install pyarrow") from error
    try:
        return cast("list[Row]", parquet.read_table(file).to_pylist())
    except ArrowException as error:
        raise ValueError(f"{shown}: not a readable Parquet file: {error}") from error


_READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _load_dataset(name: str, dataset_config: str | None, split: str | None) -> Sequence[Row]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"no such file: {name} (looked in {os.getcwd()}; a file ends in one of "
            f"{', '.join(_READERS)}). If it is a dataset of the Hub or a folder: pip install "
            "datasets. If it is a class: write class_path: " + name
        ) from None
    try:
        return cast("Sequence[Row]", load_dataset(name, dataset_config, split=split))
    except (OSError, ValueError) as error:  # not there, no network, unknown configuration or split
        raise ValueError(
            f"datasets.load_dataset({name!r}, {dataset_config!r}, split={split!r}) failed: {error}"
        ) from error


def _shown(source: Any) -> str:
    """Return a name for messages: without password, and without a query, which may be a key."""
    if not isinstance(source, (str, os.PathLike)):
        return f"this {type(source).__name__}"
    text = os.fspath(source)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return text
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path.partition('?')[0]}"

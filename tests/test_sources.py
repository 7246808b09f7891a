"""Reading rows: every format gives the same rows, every fault is named with its place."""

from __future__ import annotations

import gzip
import json
import sys

import fsspec
import pytest

from lightning_grpo.sources import Rows, read_rows

ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": 'say, "hi"\nyou', "answer": "h\u2028i"}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
COLUMNS = {name: [row[name] for row in ROWS] for name in ("prompt", "answer")}
CSV = 'prompt,answer\n1+1=,2\n"say, ""hi""\nyou",h\u2028i\n'
TEXTS = {
    "a.jsonl": JSONL,
    "a.ndjson": JSONL,
    "bom.jsonl": "\ufeff" + JSONL,
    "crlf.jsonl": JSONL.replace("}\n", "}\r\n"),
    "blank.jsonl": "\n" + JSONL.replace("}\n{", "}\n  \n{") + "\n",
    "noend.JSONL": JSONL.rstrip("\n"),
    "list.json": json.dumps(ROWS),
    "columns.json": json.dumps(COLUMNS),
    "a.csv": CSV,
    "bom.csv": "\ufeff" + CSV + "\n",
}


@pytest.mark.parametrize("name", TEXTS)
def test_every_text_format_gives_the_same_rows(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(TEXTS[name].encode())
    assert list(read_rows(str(path))) == ROWS
    assert list(read_rows(path)) == ROWS


def test_compressed_files_are_read(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(JSONL.encode()))
    assert list(read_rows(str(path))) == ROWS


def test_parquet_gives_the_same_rows_and_nested_messages(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"prompt": [{"role": "user", "content": "a"}], "n": 1}, {"prompt": [], "n": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_rows(str(tmp_path / "a.parquet")) == rows


def test_an_fsspec_url_is_read():
    with fsspec.open("memory://bucket/a.jsonl.gz", "wb", compression="gzip") as file:
        file.write(JSONL.encode())
    assert list(read_rows("memory://bucket/a.jsonl.gz")) == ROWS


def test_a_file_inside_a_package_is_read(tmp_path, monkeypatch):
    folder = tmp_path / "some_data_package" / "files"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "a.jsonl").write_text(JSONL, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert list(read_rows("package://some_data_package/files/a.jsonl")) == ROWS
    with pytest.raises(ValueError, match=r"some_data_package.*b\.jsonl"):
        read_rows("package://some_data_package/files/b.jsonl")
    with pytest.raises(ValueError, match="no_such_package"):
        read_rows("package://no_such_package/a.jsonl")


def test_a_sequence_is_returned_as_it_is():
    assert read_rows(ROWS) is ROWS
    assert read_rows(tuple(ROWS)) == tuple(ROWS)
    assert isinstance(ROWS, Rows)


FAULTS = {
    "broken.jsonl": (JSONL + '{"prompt": "x"\n', r"broken\.jsonl, line 3: not valid JSON"),
    "after_blank.jsonl": ('{"a": 1}\n\n{"a": 2,}\n', r"after_blank\.jsonl, line 3"),
    "list.jsonl": ('{"a": 1}\n["x"]\n', r"line 2: an object is needed, got a list"),
    "deep.jsonl": ("[" * 100_000 + "\n", r"line 1: (nested too deeply|not valid JSON)"),
    "empty.jsonl": ("", r"empty\.jsonl has no rows"),
    "blank.jsonl": ("\n  \n", r"blank\.jsonl has no rows"),
    "lines.json": (JSONL, r"lines\.json: not valid JSON.*ends in \.jsonl"),
    "empty.json": ("", r"empty\.json: not valid JSON"),
    "no_rows.json": ("[]", r"no_rows\.json has no rows"),
    "no_columns.json": ("{}", r"no_columns\.json has no rows"),
    "number.json": ("3", r"number\.json: a list of objects is needed, got a int"),
    "mixed.json": ('[{"a": 1}, 2]', r"mixed\.json, row 2: got a int"),
    "ragged.json": ('{"a": [1, 2], "b": [1]}', r"differ in length: \{'a': 2, 'b': 1\}"),
    "index.json": ('{"a": {"0": 1}}', r"'a' holds a dict"),
    "long.csv": ("a,b\n1,2\n3,4,5\n", r"long\.csv, line 3: 3 fields, but the header has 2"),
    "short.csv": ("a,b\n1\n", r"short\.csv, line 2: 1 fields"),
    "quote.csv": ('a,b\n1,"2\n', r"quote\.csv, after line 2: unexpected end of data"),
    "twice.csv": ("a,a\n1,2\n", r"twice\.csv, line 1: a column name occurs twice"),
    "empty.csv": ("", r"empty\.csv has no rows"),
    "header.csv": ("a,b\n", r"header\.csv has no rows"),
    "text.txt": ("hello", r"text\.txt has an unknown ending '\.txt'"),
    "not.jsonl.gz": ("hello", r"cannot read .*not\.jsonl\.gz: BadGzipFile"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_file_is_named_with_its_place(tmp_path, name):
    content, message = FAULTS[name]
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rows(str(path))


@pytest.mark.parametrize(("name", "place"), [("a.jsonl", "line 2"), ("a.csv", "after line")])
def test_bytes_that_are_not_utf8_are_named_with_their_place(tmp_path, name, place):
    path = tmp_path / name
    path.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(ValueError, match=rf"{name}, {place}.*utf-8"):
        read_rows(str(path))


def test_a_cut_off_gzip_file_is_refused(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(JSONL.encode() * 100)[:-20])
    with pytest.raises(ValueError, match=r"cannot read .*EOFError"):
        read_rows(str(path))


def test_a_broken_parquet_file_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 this is none PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet"):
        read_rows(str(tmp_path / "a.parquet"))


def test_parquet_without_pyarrow_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="pip install pyarrow"):
        read_rows(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/a.jsonl", r"no such file: nowhere/a\.jsonl \(looked in /"),
        ("memory://nowhere/a.jsonl", r"no such file: memory://nowhere/a\.jsonl"),
        ("nosuchscheme://x/a.jsonl", "nosuchscheme"),
        ("memory://x/a.pickle", r"unknown ending '\.pickle'"),
        ('{"class_path": "a.B", "init_args": {"c": 1}}', "init_args"),
    ],
)
def test_a_source_that_is_not_there_is_named(source, message):
    with pytest.raises(ValueError, match=message):
        read_rows(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "has no rows"),
        ({"train": ROWS}, r"keys \['train'\]"),
        ((row for row in ROWS), "a generator is no sequence of rows"),
        (3, "a int is no sequence of rows"),
    ],
)
def test_an_object_without_rows_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        read_rows(source)


def test_a_password_in_a_url_is_not_repeated():
    fsspec.filesystem("memory").mkdirs("/user:secret@somewhere/folder.jsonl")
    for source in (
        "memory://user:secret@nowhere/a.jsonl",
        "memory://user:secret@nowhere/a.jsonl?key=secret",
        "memory://user:secret@somewhere/folder.jsonl",
        "memory://user:secret@nowhere/a.txt?key=secret",
    ):
        with pytest.raises(ValueError, match="where/") as caught:
            read_rows(source)
        assert "secret" not in str(caught.value)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_line_ends_inside_a_quoted_csv_field_are_kept(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'prompt,answer\r\n"1\r\n2",3\r\n')
    assert list(read_rows(str(tmp_path / "a.csv"))) == [{"prompt": "1\r\n2", "answer": "3"}]


def test_a_dataset_name_without_the_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"no such file: openai/gsm8k.*pip install\s+datasets"):
        read_rows("openai/gsm8k", dataset_config="main", split="train")


def test_a_folder_is_read_with_datasets(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text(JSONL, encoding="utf-8")
    rows = read_rows(str(tmp_path), split="train")
    assert [rows[i] for i in range(len(rows))] == ROWS
    with pytest.raises(ValueError, match="split='nope'"):
        read_rows(str(tmp_path), split="nope")

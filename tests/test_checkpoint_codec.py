"""Trees and tensors on disk: the same to the bit when they come back, and nothing that runs code."""

from __future__ import annotations

import collections
import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lightning_grpo.checkpoints import BrokenCheckpointError
from lightning_grpo.checkpoints.codec import decode, encode
from lightning_grpo.checkpoints.files import locate, new_file
from lightning_grpo.checkpoints.tensor_file import DTYPES, TensorFile, write_tensors


def round_trip(tree: Any) -> Any:
    plain, tensors = encode(tree)
    return decode(json.loads(json.dumps(plain, allow_nan=False)), tensors.__getitem__)


def test_plain_values_come_back_with_their_types():
    tree = {
        "none": None,
        "flags": [True, False],
        "numbers": (1, -(2**70), 0.1, -0.0, 1e-310),
        "text": 'ä \ud800 \n "',
        "bytes": b"\x00\xff",
        "empty": [{}, [], (), "", b""],
        1: {(2, "x"): 3, None: 4, True: 5},
        "ordered": collections.OrderedDict(b=1, a=2),
        "$tensor": {"$float": "nan"},
    }
    back = round_trip(tree)
    assert back == tree
    assert type(back["numbers"]) is tuple and type(back["ordered"]) is collections.OrderedDict
    assert list(back["ordered"]) == ["b", "a"] and list(back[1]) == [(2, "x"), None, True]
    assert math.copysign(1, back["numbers"][3]) == -1


def test_numbers_that_json_does_not_know_come_back():
    back = round_trip([math.nan, math.inf, -math.inf])
    assert math.isnan(back[0]) and back[1:] == [math.inf, -math.inf]


def test_tensors_leave_under_their_path():
    first, second, third = torch.ones(2), torch.zeros(3), torch.arange(4)
    plain, tensors = encode({"a": {"b": [first, second]}, "a/b": {"0": third}})
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "a/b/0": [1, 1],
        "a/b/1": [0, 0, 0],
        "a/b/0#2": [0, 1, 2, 3],
    }
    back = decode(plain, tensors.__getitem__)
    assert back["a"]["b"][0] is first and back["a/b"]["0"] is third


class Secret(dict):
    pass


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, Secret(), Path("x"), torch.float32, torch.Size([1]), print, 1j]
)
def test_anything_else_is_refused_with_its_path(value):
    with pytest.raises(TypeError, match=r"at callbacks/Mine/0/x: turn it into plain"):
        encode({"callbacks": {"Mine": [{"x": value}]}})


@pytest.mark.parametrize(
    "plain",
    [
        {"$pickle": "gASV"},
        {"$tensor": "none"},
        {"$tensor": ["a"]},
        {"$float": "1e3"},
        {"$bytes": "%%%"},
        {"$tuple": 3},
        {"$dict": [[1]]},
        {"$dict": [[[], 1]]},
        {"$tuple": [], "more": 1},
    ],
)
def test_what_encode_cannot_have_written_is_broken(plain):
    with pytest.raises(BrokenCheckpointError):
        decode([plain], {}.__getitem__)


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {name: (torch.rand(3, 5) * 9).to(dtype) for name, dtype in DTYPES.items()}
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.empty(0, 4)
    tensors["transposed"] = torch.rand(4, 3).t()
    tensors["odd bytes"] = torch.arange(3, dtype=torch.uint8)
    tensors["nan"] = torch.tensor([math.nan, -0.0, math.inf])
    return tensors


def write(path: Path, tensors: dict[str, torch.Tensor]) -> TensorFile:
    with new_file(locate(path)) as file:
        write_tensors(file, tensors)
        file.close()
    return TensorFile(locate(path))


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (first, second)]
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(*as_bytes)


@pytest.mark.parametrize("owned", [True, False])
def test_tensors_of_every_type_come_back(tmp_path: Path, owned):
    tensors = some_tensors()
    file = write(tmp_path / "x.safetensors", tensors)
    back = dict(file.read_all(None, owned=owned))
    assert back.keys() == tensors.keys()
    assert all(same(back[name], tensors[name]) for name in tensors)
    assert all(same(file.read(name), tensors[name]) for name in tensors)
    assert same(file.read("transposed", (1, 3)), tensors["transposed"][1:3])


def test_the_library_reads_what_is_written_here_and_the_other_way_round(tmp_path: Path):
    tensors = some_tensors()
    write(tmp_path / "ours.safetensors", tensors)
    theirs = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    assert theirs.keys() == tensors.keys()
    assert all(same(theirs[name], tensors[name]) for name in tensors)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(whole, tmp_path / "theirs.safetensors", {"format": "pt"})
    ours = dict(TensorFile(locate(tmp_path / "theirs.safetensors")).read_all(None, owned=False))
    assert all(same(ours[name], tensors[name]) for name in tensors)


def test_the_bytes_are_those_of_the_library(tmp_path: Path):
    tensors = {name: torch.rand(3) for name in ("b", "a", "ü")}
    write(tmp_path / "x.safetensors", tensors)
    assert (tmp_path / "x.safetensors").read_bytes() == safetensors.torch.save(tensors)


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path: Path):
    weight = torch.rand(100, 10)
    file = write(tmp_path / "x.safetensors", {"embed": weight, "head": weight, "part": weight[:50]})
    assert set(safetensors.torch.load_file(tmp_path / "x.safetensors")) == {"embed", "part"}
    back = dict(file.read_all(None, owned=True))
    assert back["head"] is back["embed"] and torch.equal(back["embed"], weight)
    assert torch.equal(back["part"], weight[:50]) and torch.equal(file.read("head"), weight)


def test_changing_what_was_read_leaves_the_file_alone(tmp_path: Path):
    file = write(tmp_path / "x.safetensors", {"a": torch.ones(4)})
    before = (tmp_path / "x.safetensors").read_bytes()
    for tensor in (dict(file.read_all(None, owned=False))["a"], file.read("a")):
        tensor.zero_()
    assert (tmp_path / "x.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "tensor", [torch.ones(2, dtype=torch.complex64), torch.empty(2, device="meta")]
)
def test_tensors_that_the_format_does_not_know_are_refused_by_name(tmp_path: Path, tensor):
    with pytest.raises(TypeError, match="the tensor odd of"):
        write(tmp_path / "x.safetensors", {"odd": tensor})


def with_header(header: Any, num_bytes: int = 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * num_bytes


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        with_header(b"[]"),
        with_header(b"\x80\x04\x95"),
        with_header(b"[" * 200_000),
        with_header({"a": ENTRY}, 15),
        with_header({"a": ENTRY}, 17),
        with_header({"a": ENTRY | {"dtype": "PICKLE"}}),
        with_header({"a": ENTRY | {"shape": [5]}}),
        with_header({"a": ENTRY | {"shape": [-4]}}),
        with_header({"a": ENTRY | {"shape": "4"}}),
        with_header({"a": ENTRY | {"data_offsets": [-16, 0]}}),
        with_header({"a": ENTRY | {"data_offsets": [4, 20]}}, 20),
        with_header({"a": ENTRY, "b": ENTRY}),
        with_header({"a": 3}),
        with_header({"a": ENTRY, "__metadata__": {"aliases": '{"b": "c"}'}}),
        with_header({"a": ENTRY, "__metadata__": {"shards": '{"a": {}}'}}),
        with_header({"a": ENTRY, "__metadata__": []}),
    ],
)
def test_a_file_that_is_not_as_the_format_says_is_broken(tmp_path: Path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(BrokenCheckpointError, match=r"x\.safetensors"):
        TensorFile(locate(tmp_path / "x.safetensors"))

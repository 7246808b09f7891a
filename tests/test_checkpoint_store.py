"""Checkpoint folders on disks and stores: what comes back, which one is meant, what is removed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from fsspec.implementations.memory import MemoryFileSystem

from lightning_grpo.checkpoints import (
    BrokenCheckpointError,
    Metric,
    clean_litter,
    list_checkpoints,
    new_url,
    open_checkpoint,
    prune,
    resolve_checkpoint,
    verify,
)
from lightning_grpo.checkpoints.io import FolderCheckpointIO

FILES = [
    *("manifest.json", "optimizer.safetensors", "state.json"),
    *("state.safetensors", "weights.safetensors"),
]


@pytest.fixture(params=["local", "file", "memory"])
def folder(request, tmp_path: Path) -> Any:
    """A folder for checkpoints on each kind of filesystem."""
    MemoryFileSystem.store.clear()
    yield {
        "local": str(tmp_path / "run/checkpoints"),
        "file": f"file://{tmp_path}/run/checkpoints",
        "memory": "memory://bucket/run/checkpoints",
    }[request.param]
    MemoryFileSystem.store.clear()


def content(step: int = 3) -> dict[str, Any]:
    """A small dict as Lightning makes it; the numbers tell the step."""
    weight = torch.full((4, 3), float(step))
    return {
        "global_step": step,
        "state_dict": {"policy.a": weight, "policy.b": torch.arange(5), "policy.tied": weight},
        "optimizer_states": [
            {
                "state": {"policy.a": {"step": torch.tensor(1.0), "exp_avg": weight + 1}},
                "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "params": ["policy.a"]}],
            }
        ],
        "callbacks": {"Mine": {"score": math.inf, "rng": torch.arange(6, dtype=torch.uint8)}},
        "lightning_grpo": {"counters": {"iterations": step // 2}, "stage": "grpo"},
    }


def save(folder: str, kind: Any, step: int, metric: Metric | None = None) -> str:
    url = new_url(folder, kind, step)
    FolderCheckpointIO().save_checkpoint(content(step), url, metric)
    return url


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)) and type(first) is type(second):
        return len(first) == len(second) and all(equal(a, b) for a, b in zip(first, second))
    return type(first) is type(second) and first == second


def test_what_is_saved_comes_back(folder):
    url = save(folder, "last", 3)
    back = FolderCheckpointIO().load_checkpoint(url)
    assert equal(back, content(3))
    assert back["state_dict"]["policy.tied"] is back["state_dict"]["policy.a"]
    assert verify(open_checkpoint(url)) == []


def test_a_save_without_optimizers_has_none_when_it_comes_back(folder):
    only_weights = {"state_dict": {"a": torch.ones(2)}, "global_step": 1}
    FolderCheckpointIO().save_checkpoint(only_weights, f"{folder}/weights")
    assert equal(FolderCheckpointIO().load_checkpoint(f"{folder}/weights"), only_weights)


def test_the_folder_holds_safetensors_and_json(tmp_path: Path):
    url = Path(save(str(tmp_path), "last", 3))
    assert url.name == "last-000003"
    assert sorted(path.name for path in url.iterdir()) == FILES
    weights = safetensors.torch.load_file(url / "weights.safetensors")
    assert weights.keys() == {"policy.a", "policy.b"}
    moments = safetensors.torch.load_file(url / "optimizer.safetensors")
    assert moments.keys() == {"policy.a/step", "policy.a/exp_avg"}
    rest = safetensors.torch.load_file(url / "state.safetensors")
    assert rest["callbacks/Mine/rng"].tolist() == [0, 1, 2, 3, 4, 5]


def test_the_manifest_says_what_it_is(tmp_path: Path):
    url = Path(save(str(tmp_path), "best", 7, Metric("val/pass_at_1", 0.5)))
    manifest = json.loads((url / "manifest.json").read_text())
    said = {name: manifest[name] for name in ("kind", "step", "iteration", "stage", "world_size")}
    assert said == {"kind": "best", "step": 7, "iteration": 3, "stage": "grpo", "world_size": 1}
    assert manifest["metric"] == {"name": "val/pass_at_1", "value": 0.5}
    assert manifest["versions"]["torch"] == torch.__version__
    size = (url / "weights.safetensors").stat().st_size
    assert manifest["files"]["weights.safetensors"]["num_bytes"] == size
    assert open_checkpoint(url).manifest.metric == Metric("val/pass_at_1", 0.5)


def test_weights_are_found_and_read_one_by_one(folder):
    checkpoint = open_checkpoint(save(folder, "last", 3))
    info = checkpoint.tensor_info()["policy.a"]
    assert info == (torch.float32, (4, 3), ("weights.safetensors",))
    assert checkpoint.tensor_info("optimizer").keys() == {"policy.a/step", "policy.a/exp_avg"}
    found = dict(checkpoint.read_weights(["policy.tied", "policy.b"]))
    assert found["policy.b"].tolist() == [0, 1, 2, 3, 4]
    assert found["policy.tied"].tolist() == [[3.0] * 3] * 4
    assert checkpoint.read_state().keys() == {"global_step", "callbacks", "lightning_grpo"}


def test_two_states_never_have_one_name(folder):
    names = [save(folder, "last", 3).rpartition("/")[2] for _ in range(3)]
    assert names == ["last-000003", "last-000003-1", "last-000003-2"]
    with pytest.raises(FileExistsError, match="give each checkpoint its own name"):
        FolderCheckpointIO().save_checkpoint(content(), f"{folder}/last-000003")
    assert prune(folder, "last", 1) == ["last-000003-1", "last-000003"]
    assert save(folder, "last", 3).endswith("last-000003-3")


def test_last_best_and_auto_are_the_newest_of_their_kind(folder):
    for kind, step in [("best", 2), ("last", 2), ("best", 4), ("last", 5), ("iteration", 6)]:
        save(folder, kind, step)
    found = {name: resolve_checkpoint(f"{folder}/{name}") for name in ("last", "best", "auto")}
    names = {name: url.rpartition("/")[2] for name, url in found.items()}
    assert names == {"last": "last-000005", "best": "best-000004", "auto": "iteration-000006"}
    assert resolve_checkpoint(f"{folder}/best-000002").endswith("best-000002")
    assert FolderCheckpointIO().load_checkpoint(f"{folder}/best")["global_step"] == 4


def test_after_a_resume_from_an_earlier_one_the_newest_is_what_was_written_last(folder):
    for step in (100, 200, 150):
        save(folder, "last", step)
    assert resolve_checkpoint(f"{folder}/last").endswith("last-000150")
    assert prune(folder, "last", 1) == ["last-000200", "last-000100"]


def test_what_is_not_there_is_an_error(folder):
    for name in ("last", "auto", "last-000001"):
        with pytest.raises(FileNotFoundError, match=r"checkpoints.*no (complete|such) checkpoint"):
            resolve_checkpoint(f"{folder}/{name}")
    save(folder, "best", 1)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint of kind last"):
        FolderCheckpointIO().load_checkpoint(f"{folder}/last")


def test_a_file_is_no_checkpoint(tmp_path: Path):
    torch.save({}, tmp_path / "last.ckpt")
    with pytest.raises(BrokenCheckpointError, match=r"last\.ckpt is a file"):
        FolderCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")
    assert list_checkpoints(tmp_path) == []


def test_urls_that_chain_filesystems_are_refused():
    with pytest.raises(ValueError, match="chains filesystems"):
        resolve_checkpoint("simplecache::memory://bucket/last-000001")


def flip(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[-2] ^= 1
    path.write_bytes(damaged)


DAMAGE = {
    "flip": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "grow": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "remove": Path.unlink,
    "link": lambda path: path.symlink_to(path.rename(path.with_suffix(".moved"))),
}


@pytest.mark.parametrize(
    ("name", "damage"),
    [(n, d) for n in FILES for d in DAMAGE if (n, d) != ("manifest.json", "grow")],  # by a space
)
def test_damage_is_found_and_auto_takes_the_one_before(tmp_path: Path, name, damage):
    before, newest = (Path(save(str(tmp_path), "last", step)) for step in (1, 2))
    file = newest / name
    DAMAGE[damage](file)
    is_gone = name == "manifest.json" and damage in ("remove", "link")
    expected = FileNotFoundError if is_gone else BrokenCheckpointError
    with pytest.raises(expected, match=name.replace(".", r"\.")):
        FolderCheckpointIO().load_checkpoint(newest)
    with pytest.raises(expected, match=name):
        open_checkpoint(newest, check_sha256=True)
    with pytest.warns(UserWarning, match=rf"last-000002 is left out: .*{name}"):
        assert resolve_checkpoint(tmp_path / "auto") == str(before)


def edit_manifest(checkpoint: Path, **changes: Any) -> None:
    """Change a manifest as someone would who knows the format."""
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    del manifest["sha256"]
    text = json.dumps(manifest, sort_keys=True)
    path.write_text(json.dumps(manifest | {"sha256": hashlib.sha256(text.encode()).hexdigest()}))


def record_of(path: Path) -> dict[str, Any]:
    text = path.read_bytes()
    return {"num_bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", "", "a\0b", "C:\\x", "~"])
def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path: Path, name):
    path = Path(save(str(tmp_path), "last", 1))
    files = json.loads((path / "manifest.json").read_text())["files"]
    edit_manifest(path, files=files | {name: files["weights.safetensors"]})
    with pytest.raises(BrokenCheckpointError, match="no name of a file of a checkpoint"):
        open_checkpoint(path)


def test_a_changed_number_in_the_manifest_is_found(tmp_path: Path):
    path = Path(save(str(tmp_path), "last", 1)) / "manifest.json"
    path.write_text(path.read_text().replace('"step": 1', '"step": 3'))
    with pytest.raises(BrokenCheckpointError, match=r"manifest\.json is damaged"):
        open_checkpoint(path.parent)


def test_a_later_format_is_refused_with_what_to_install(tmp_path: Path):
    path = Path(save(str(tmp_path), "last", 1))
    edit_manifest(path, format_version=2, something_new=[])
    with pytest.raises(BrokenCheckpointError, match=r"format version 2.*'lightning_grpo': '0"):
        open_checkpoint(path)


class Payload:
    def __reduce__(self) -> Any:
        return (open, ("sentinel", "w"))


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_the_place_of_a_file_is_not_run(tmp_path: Path, name):
    path = Path(save(str(tmp_path / "x"), "last", 1))
    torch.save(Payload(), path / name)
    if name != "manifest.json":
        files = json.loads((path / "manifest.json").read_text())["files"]
        edit_manifest(path, files=files | {name: record_of(path / name)})
    with pytest.raises(BrokenCheckpointError, match=name.replace(".", r"\.")):
        FolderCheckpointIO().load_checkpoint(path)
    assert not Path("sentinel").exists()


def test_pruning_keeps_the_newest_and_the_other_kinds(folder):
    for step in (1, 2, 3):
        save(folder, "last", step)
        save(folder, "best", step)
    assert prune(folder, "last", 2) == ["last-000001"]
    assert prune(folder, "best", 1) == ["best-000002", "best-000001"]
    assert prune(folder, "iteration", 1) == []
    left = sorted(c.url.rpartition("/")[2] for c in list_checkpoints(folder))
    assert left == ["best-000003", "last-000002", "last-000003"]
    with pytest.raises(ValueError, match="at least one checkpoint has to stay"):
        prune(folder, "last", 0)


def test_pruning_removes_a_broken_one_only_when_whole_ones_stay(tmp_path: Path):
    for step in (1, 2):
        (Path(save(str(tmp_path), "last", step)) / "weights.safetensors").unlink()
    assert prune(tmp_path, "last", 1) == []
    save(str(tmp_path), "last", 3)
    assert prune(tmp_path, "last", 1) == ["last-000001", "last-000002"]


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_only_what_dead_processes_left_is_litter(tmp_path: Path):
    save(str(tmp_path), "last", 1)
    host, dead = socket.gethostname(), dead_pid()
    litter = [f".tmp-last-000002@{host}-{dead}", f".trash-best-000001@{host}-{os.getpid()}"]
    old = ".tmp-last-000002@elsewhere-1"
    others = [f".tmp-last-000002@{host}-{os.getppid()}", ".tmp-last-000003@elsewhere-1", "notes"]
    for name in (*litter, *others, old):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_bytes(b"half")
    os.utime(tmp_path / old, (0, 0))
    assert clean_litter(tmp_path) == sorted([*litter, old])
    assert {path.name for path in tmp_path.iterdir()} == {*others, "last-000001"}


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("x")
    link = tmp_path / f".trash-x@{socket.gethostname()}-{dead_pid()}"
    link.symlink_to(tmp_path / "precious")
    assert clean_litter(tmp_path) == [link.name]
    assert (tmp_path / "precious/file").exists() and not link.is_symlink()


def test_on_a_store_what_has_no_manifest_is_litter():
    MemoryFileSystem.store.clear()
    save("memory://b/c", "last", 1)
    for name in ("last-000002/weights.safetensors", "notes/file"):
        MemoryFileSystem().pipe_file(f"/b/c/{name}", b"half")
    assert len(list_checkpoints("memory://b/c")) == 1
    assert clean_litter("memory://b/c") == ["last-000002"]
    assert MemoryFileSystem().exists("/b/c/notes/file")
    MemoryFileSystem.store.clear()


def memory_growth_of(work: Any) -> float:
    """MB by which the peak of this process rises above where it stands."""
    Path("/proc/self/clear_refs").write_text("5")

    def measure(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) // 1024

    before = measure("VmRSS")
    work()
    return measure("VmHWM") - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_second_copy_of_the_weights_is_in_memory(tmp_path: Path):
    weights = {f"layer_{i}": torch.ones(2 << 20) for i in range(16)}  # 128 MB
    given = {"state_dict": weights, "global_step": 1}
    url = tmp_path / "last-000001"
    assert memory_growth_of(lambda: FolderCheckpointIO().save_checkpoint(given, url)) < 64

    def copy_all() -> None:
        for name, tensor in open_checkpoint(url).read_weights():
            weights[name].copy_(tensor)

    assert memory_growth_of(copy_all) < 64

"""Every operation of a save fails in every way; the run's last checkpoint is whole after each."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from lightning_grpo.checkpoints import (
    BrokenCheckpointError,
    clean_litter,
    list_checkpoints,
    new_url,
    prune,
    resolve_checkpoint,
)
from lightning_grpo.checkpoints import files as checkpoint_files
from lightning_grpo.checkpoints.folder import survey
from lightning_grpo.checkpoints.io import FolderCheckpointIO

CHANGES = ("mkdir", "open", "write", "fsync", "close", "rename", "unlink", "rmdir")
CURES = {
    errno.ENOSPC: "No space left on device.*free space there",
    errno.EIO: "Input/output error.*check it",
    errno.EACCES: "Permission denied.*let this user write there",
}


class FailingOs:
    """The module `os` for which the n-th change of the disk fails, a write when half is written."""

    def __init__(self, fail_at: int = -1, fail: Callable[[], None] = lambda: None) -> None:
        self.fail_at = fail_at
        self.fail = fail
        self.done: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name not in CHANGES:
            return getattr(os, name)

        def change(*args: Any) -> Any:
            self.done.append(name)
            if len(self.done) - 1 == self.fail_at:
                if name == "write":
                    os.write(args[0], args[1][: len(args[1]) // 2])
                self.fail()
            return getattr(os, name)(*args)

        return change


def content(step: int) -> dict[str, Any]:
    return {
        "global_step": step,
        "state_dict": {"a": torch.full((64,), float(step))},
        "optimizer_states": [{"state": {"a": {"exp_avg": torch.ones(3)}}, "param_groups": []}],
        "rng": torch.arange(3),
    }


def save(folder: Path | str, step: int) -> None:
    """What a run does at a save."""
    FolderCheckpointIO().save_checkpoint(content(step), new_url(folder, "last", step))
    prune(folder, "last", 1)


def step_of_last(folder: Path | str) -> int:
    """The step of a whole last checkpoint; 0 when there is none."""
    try:
        last = FolderCheckpointIO().load_checkpoint(resolve_checkpoint(f"{folder}/last"))
    except FileNotFoundError:
        return 0
    step = last["global_step"]
    assert torch.equal(last["state_dict"]["a"], content(step)["state_dict"]["a"])
    assert last["optimizer_states"][0]["state"]["a"]["exp_avg"].tolist() == [1, 1, 1]
    return int(step)


def fresh(folder: Path, *, has_one: bool) -> Path:
    if has_one:
        save(folder, 1)
    return folder


def assert_whole(folder: Path, steps: tuple[int, int]) -> int:
    """The next start finds the old or the new one and no litter, and can save."""
    clean_litter(folder)
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    assert not [name for name in names if name.startswith(".")]
    assert len(list_checkpoints(folder)) == len(names)
    step = step_of_last(folder)
    assert step in steps
    save(folder, 9)
    assert step_of_last(folder) == 9 and len(list_checkpoints(folder)) == 1
    return step


def operations_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_one: bool) -> list:
    folder = fresh(tmp_path / "counted/checkpoints", has_one=has_one)
    counting = FailingOs()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "os", counting)
        save(folder, 2)
    return counting.done


def pruning_fails() -> Any:
    return pytest.warns(UserWarning, match="is of no use any more and could not be removed")


@pytest.mark.parametrize("has_one", [True, False])
@pytest.mark.parametrize("code", CURES)
def test_an_error_in_any_operation_costs_no_checkpoint(tmp_path, monkeypatch, code, has_one):
    done = operations_of_a_save(tmp_path, monkeypatch, has_one)
    assert {"mkdir", "open", "write", "fsync", "close", "rename"} <= set(done)
    if has_one:
        assert {"unlink", "rmdir"} <= set(done)

    renames = [number for number, name in enumerate(done) if name == "rename"]
    first_of_pruning = renames[1] if has_one else len(done)

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    found = []
    for number in range(len(done)):
        folder = fresh(tmp_path / f"{number}/checkpoints", has_one=has_one)
        failing = FailingOs(number, fail)
        is_saved = False
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_files, "os", failing)
            try:
                # Pruning may fail, and a run goes on with a warning.
                with pruning_fails() if number >= first_of_pruning else contextlib.nullcontext():
                    save(folder, 2)
                is_saved = True
            except OSError as error:
                assert error.errno == code
                assert str(folder) in str(error)
                assert re.search(CURES[code], str(error))
                assert not folder.exists() or not list(folder.glob(".tmp-*"))
        step = assert_whole(folder, (1, 2) if has_one else (0, 2))
        assert step == 2 or not is_saved
        found.append(step)
    assert 2 in found and (1 if has_one else 0) in found


@pytest.mark.parametrize("has_one", [True, False])
def test_a_kill_in_any_operation_costs_no_checkpoint(tmp_path, monkeypatch, has_one):
    done = operations_of_a_save(tmp_path, monkeypatch, has_one)
    found = []
    for number in range(len(done)):
        folder = fresh(tmp_path / f"{number}/checkpoints", has_one=has_one)
        child = os.fork()
        if child == 0:
            killing = FailingOs(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            checkpoint_files.os = killing
            save(folder, 2)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        found.append(assert_whole(folder, (1, 2) if has_one else (0, 2)))
    assert 2 in found and (1 if has_one else 0) in found


def test_all_is_on_the_disk_before_the_checkpoint_gets_its_name(tmp_path, monkeypatch):
    done = operations_of_a_save(tmp_path, monkeypatch, has_one=True)
    before, after = done[: done.index("rename")], done[done.index("rename") + 1 :]
    files = " ".join(before).split("open")[1:]
    assert len(files) == 5 + 1  # the folder itself last
    assert all(file.split()[-2:] == ["fsync", "close"] for file in files)
    assert "write" not in files[-1]
    assert after[:3] == ["open", "fsync", "close"]  # the folder around it


class LyingOs:
    """The module `os` on a disk that writes something else than it is given, or less."""

    def __init__(self, lie: Callable[[bytes], bytes]) -> None:
        self.lie = lie

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, descriptor: int, data: memoryview) -> int:
        os.write(descriptor, self.lie(bytes(data)))
        return len(data)


@pytest.mark.parametrize("lie", [lambda data: data[:-1], lambda data: data[:-1] + b"?"])
def test_a_disk_that_writes_something_else_is_found_out(tmp_path, monkeypatch, lie):
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "os", LyingOs(lie))
        with pytest.raises(BrokenCheckpointError, match="reads back differently"):
            save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["last-000001"]
    assert step_of_last(tmp_path) == 1


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a second filesystem")
def test_no_file_passes_through_the_folder_for_temporary_files(tmp_path, monkeypatch):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        assert os.stat(elsewhere).st_dev != os.stat(tmp_path).st_dev
        for temporary, folder in [(elsewhere, tmp_path), (tmp_path, Path(elsewhere))]:
            monkeypatch.setenv("TMPDIR", str(temporary))
            monkeypatch.setattr(tempfile, "tempdir", None)
            for name in ("mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryFile"):
                monkeypatch.setattr(tempfile, name, None)
            save(folder / "checkpoints", 1)
            save(folder / "checkpoints", 2)
            assert step_of_last(folder / "checkpoints") == 2
            monkeypatch.undo()


class Store:
    """Changes of fsspec's store in memory, of which the n-th fails, or it and all that follow."""

    def __init__(self, fail_at: int = -1, *, is_gone: bool = False) -> None:
        self.fail_at = fail_at
        self.is_gone = is_gone
        self.done: list[str] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for owner, name in [
            (MemoryFileSystem, "_open"),
            (MemoryFile, "write"),
            (MemoryFile, "close"),
            (MemoryFileSystem, "rm_file"),
            (MemoryFileSystem, "rmdir"),
        ]:
            patch.setattr(owner, name, self.changing(name, getattr(owner, name)))

    def changing(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **kwargs: Any) -> Any:
            if name == "_open" and kwargs.get("mode") != "wb":
                return function(*args, **kwargs)
            self.done.append(name)
            number = len(self.done) - 1
            if number == self.fail_at or (self.is_gone and number > self.fail_at >= 0):
                if name == "write" and number == self.fail_at:
                    function(args[0], args[1][: len(args[1]) // 2])
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return function(*args, **kwargs)

        return change


@pytest.mark.parametrize("is_gone", [False, True])
def test_an_object_store_that_fails_costs_no_checkpoint(monkeypatch, is_gone):
    folder = "memory://bucket/checkpoints"
    number, found = 0, []
    while True:
        MemoryFileSystem.store.clear()
        save(folder, 1)
        store = Store(number, is_gone=is_gone)
        with monkeypatch.context() as patch, contextlib.suppress(OSError):
            store.install(patch)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                save(folder, 2)
        if len(store.done) <= number:
            break
        clean_litter(folder)
        if store.done[number].startswith("rm"):
            assert survey(folder)[1] == []
        with warnings.catch_warnings():  # here, unlike on S3, half a manifest can be seen
            warnings.simplefilter("ignore")
            found.append(step_of_last(folder))
        assert found[-1] in (1, 2)
        save(folder, 9)
        assert len(list_checkpoints(folder)) == 1 and step_of_last(folder) == 9
        left = {path.split("/")[3] for path in MemoryFileSystem.store}
        assert left == {"last-000009"}
        number += 1
    MemoryFileSystem.store.clear()
    assert {"_open", "write", "close", "rm_file"} <= set(store.done)
    assert {1, 2} == set(found)

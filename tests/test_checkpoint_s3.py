"""Checkpoints on an object store: a server on this machine that speaks S3, and s3fs."""

from __future__ import annotations

import csv
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_lines import run, write_config
from distributed_runs import on_two_ranks
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
from s3fs import S3FileSystem
from test_checkpoint_sharded import sharded, state_of, train
from test_checkpoint_store import content, equal, flip, save
from transformers import AutoModelForCausalLM

from lightning_grpo.checkpoints import (
    BrokenCheckpointError,
    clean_litter,
    list_checkpoints,
    open_checkpoint,
    prune,
    resolve_checkpoint,
    verify,
)
from lightning_grpo.checkpoints import files as checkpoint_files
from lightning_grpo.checkpoints.folder import survey
from lightning_grpo.checkpoints.io import FolderCheckpointIO


@pytest.fixture(scope="module")
def store() -> Iterator[S3FileSystem]:
    """An S3 server with a bucket, which every process that starts now finds by its environment."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "someone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        S3FileSystem.clear_instance_cache()
        fs = S3FileSystem()
        fs.mkdir("bucket")
        yield fs
    S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def folder(store: S3FileSystem, request: pytest.FixtureRequest) -> str:
    return f"s3://bucket/{request.node.name}/checkpoints"


def test_what_is_saved_comes_back_from_the_store(folder):
    url = save(folder, "last", 3)
    assert url == f"{folder}/last-000003"
    assert equal(FolderCheckpointIO().load_checkpoint(url), content(3))
    assert verify(open_checkpoint(url)) == []
    assert open_checkpoint(url).tensor_info()["policy.a"].shape == (4, 3)


def test_a_large_tensor_goes_up_and_comes_back_in_parts(folder, store, monkeypatch):
    monkeypatch.setattr(store, "default_block_size", 5 << 20)
    monkeypatch.setattr(checkpoint_files, "CHUNK_BYTES", 1 << 20)
    big = torch.randn(3 << 20)
    url = f"{folder}/last-000001"
    FolderCheckpointIO().save_checkpoint({"state_dict": {"big": big}}, url)
    assert store.info(f"{url}/weights.safetensors")["ETag"].endswith('-3"')  # parts
    assert torch.equal(dict(open_checkpoint(url).read_weights())["big"], big)
    rows = open_checkpoint(url).tensors("weights").read_box("big", (7,), (9,))
    assert torch.equal(rows, big[7:16])


def test_last_best_and_pruning(folder):
    for kind, step in [("best", 1), ("last", 1), ("last", 2), ("best", 2), ("last", 3)]:
        save(folder, kind, step)
    found = {name: resolve_checkpoint(f"{folder}/{name}") for name in ("last", "best", "auto")}
    assert found == {
        "last": f"{folder}/last-000003",
        "best": f"{folder}/best-000002",
        "auto": f"{folder}/last-000003",
    }
    assert prune(folder, "last", 1) == ["last-000002", "last-000001"]
    names = [c.url.rpartition("/")[2] for c in list_checkpoints(folder)]
    assert names == ["last-000003", "best-000002", "best-000001"]


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("is_gone", [False, True])
def test_a_broken_object_is_found_and_auto_takes_the_one_before(
    folder, store, tmp_path: Path, name, is_gone
):
    before, newest = (save(folder, "last", step) for step in (1, 2))
    if is_gone:
        store.rm_file(f"{newest}/{name}")
    else:
        (tmp_path / name).write_bytes(store.cat_file(f"{newest}/{name}"))
        flip(tmp_path / name)
        store.pipe_file(f"{newest}/{name}", (tmp_path / name).read_bytes())
    with pytest.raises((BrokenCheckpointError, FileNotFoundError), match=name):
        FolderCheckpointIO().load_checkpoint(newest)
    with pytest.warns(UserWarning, match=f"last-000002 is left out: .*{name}"):
        assert resolve_checkpoint(f"{folder}/auto") == before


def test_a_name_is_no_pattern(store):
    folders = [f"s3://bucket/{name}/checkpoints" for name in ("run[12]*", "run1", "run2x")]
    for folder in folders:
        save(folder, "last", 1)
        save(folder, "last", 2)
    assert prune(folders[0], "last", 1) == ["last-000001"]
    assert [len(list_checkpoints(folder)) for folder in folders] == [1, 2, 2]


def test_what_others_have_written_since_is_seen(folder):
    save(folder, "last", 1)
    assert len(list_checkpoints(folder)) == 1
    other = S3FileSystem(skip_instance_cache=True)
    for name in other.ls(f"{folder}/last-000001".removeprefix("s3://"), detail=False):
        other.copy(name, name.replace("last-000001", "last-000007"))
    assert len(list_checkpoints(folder)) == 2
    other.rm(f"{folder}/last-000001", recursive=True)
    assert resolve_checkpoint(f"{folder}/last").endswith("last-000007")


KILLED = """
import os, signal, sys
from test_checkpoint_store import save
from lightning_grpo.checkpoints import files
class Killed(files.NewFile):
    def close(self):
        if self.place.name == "manifest.json":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().close()
files.NewFile = Killed
save(sys.argv[1], "last", 2)
"""


def test_a_process_that_is_killed_before_the_manifest_leaves_litter_only(folder, store):
    save(folder, "last", 1)
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    run = subprocess.run([sys.executable, "-c", KILLED, folder], env=env, timeout=60)
    assert run.returncode == -signal.SIGKILL
    assert len(store.ls(f"{folder}/last-000002", refresh=True)) == 4
    with pytest.warns(UserWarning, match="last-000002 is left out: .*no manifest"):
        assert resolve_checkpoint(f"{folder}/last").endswith("last-000001")
    assert clean_litter(folder) == ["last-000002"]
    assert survey(folder)[1] == [] and not store.exists(f"{folder}/last-000002")


def test_a_store_that_refuses_is_named_with_what_to_do(store):
    with pytest.raises(OSError, match=r"s3://nowhere/c/last-000001 could not be written: .*check"):
        FolderCheckpointIO().save_checkpoint(content(), "s3://nowhere/c/last-000001")


def on_ranks(folder: str) -> dict[str, Any]:
    trainer, module = train(3, **sharded())
    trainer.save_checkpoint(f"{folder}/last-000003")
    saved = state_of(trainer, module)
    return {"saved": saved, "loaded": state_of(*train(3, f"{folder}/last", **sharded()))}


def test_two_ranks_write_their_shards_to_the_store_and_read_them(folder, store, tmp_path: Path):
    both = on_two_ranks(on_ranks, tmp_path, folder)
    for found in both:
        assert isinstance(found, dict), found
        assert equal(found["loaded"], found["saved"])
    assert not [path for path in tmp_path.rglob("*") if "safetensors" in path.name]
    names = open_checkpoint(f"{folder}/last-000003", check_sha256=True).manifest.files
    assert {f"weights-0000{rank}-of-00002.safetensors" for rank in (0, 1)} < names.keys()
    back = FolderCheckpointIO().load_checkpoint(f"{folder}/last")
    assert equal(back["state_dict"], both[0]["saved"]["weights"])


def test_a_run_on_the_store_is_killed_goes_on_and_is_exported(
    char_model, store, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["__main__.py"])
    config = write_config(
        char_model,
        run={"root_dir": "s3://bucket/runs"},
        checkpoint={"every_n_iterations": 1},
        trainer={"max_steps": 8, "enable_progress_bar": False},
    )
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    command = [sys.executable, "-m", "lightning_grpo", "fit", "--config", config]
    command.append("--trainer.callbacks+=command_lines.Killer")
    first = subprocess.run(command, env=environment, timeout=120, capture_output=True, text=True)
    assert first.returncode == -signal.SIGKILL, first.stdout + first.stderr
    version_0 = "s3://bucket/runs/small/version_0"
    assert resolve_checkpoint(f"{version_0}/checkpoints/auto").endswith("last-000004")
    run("fit", "--config", config, "--ckpt_path", "auto")
    rows = list(csv.DictReader(store.cat(f"{version_0}/metrics.csv").decode().splitlines()))
    assert [row["step"] for row in rows if row["policy/loss"]] == list("01234567")
    files = {path.rpartition("/")[2] for path in store.find(version_0)}
    assert {"config.yaml", "config_resume_1.yaml", "metrics.csv"} < files
    assert any(name.startswith("events.out.tfevents") for name in files)
    last = f"{version_0}/checkpoints/last"
    run("validate", "--ckpt_path", last)
    assert store.exists(f"{version_0}/validate/metrics.csv")
    run("export", "--ckpt_path", last, "--out", "exported")
    exported = AutoModelForCausalLM.from_pretrained("exported").state_dict()
    weights = dict(open_checkpoint(resolve_checkpoint(last)).read_weights())
    assert torch.equal(
        exported["model.embed_tokens.weight"], weights["policy.model.model.embed_tokens.weight"]
    )

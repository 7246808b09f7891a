"""Exports go to the Hub: all of them or nothing, private, and runs go on while they do."""

from __future__ import annotations

import os
import time
import traceback
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from command_lines import run, write_config
from hub_server import Failure, Hub, Repo, hub_server
from saved import read_saved
from saved_runs import write_run
from transformers import AutoModelForCausalLM

from lightning_grpo.callbacks import PushToHub
from lightning_grpo.callbacks.push_to_hub import Push
from lightning_grpo.checkpoints import resolve_checkpoint
from lightning_grpo.export.hub import files_to_send, push_folder
from lightning_grpo.export.kept_copy import keep_copy, original_path, remove_left_copies
from lightning_grpo.export.proof import ExportMismatchError
from lightning_grpo.tools.export import export


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server that this process takes for the Hub, and no waiting between attempts."""
    with hub_server() as server:
        for name, value in (("ENDPOINT", server.url), ("HF_HUB_OFFLINE", False)):
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        # Xet is another protocol, of a binary of its own: files go the way of Git LFS.
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setattr("lightning_grpo.export.hub._WAITS_S", (0.0, 0.0, 0.0))
        yield server


def write_folder(folder: Path) -> Path:
    """Something like an export, with files that do not belong to one."""
    folder.mkdir()
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# Card\n")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 20)
    (folder / "optimizer.safetensors").write_bytes(b"moments" * 400)
    (folder / "events.out.tfevents.1").write_text("curves")
    (folder / "vocab.json").symlink_to("/etc/hostname")
    (folder / "config.json.txt").write_text("notes")
    (folder / "checkpoints").mkdir()
    return folder


SENT = ["README.md", "config.json", "model.safetensors"]


def test_an_export_arrives_whole_and_private(hub: Hub, char_model: str, tmp_path: Path, capsys):
    path = write_run(char_model)
    before = sorted(os.listdir("."))
    command = ("export", "--ckpt_path", path, "--push-to-hub", "me/model")
    run(*command, "--max_shard_gb", "0.00005")
    assert "sent to private me/model" in capsys.readouterr().out
    repo = hub.repos["me/model"]
    assert repo.private and len(repo.commits) == 1, "one commit"
    assert len([name for name in repo.files if name.endswith(".safetensors")]) > 1
    got = hub.write("me/model", tmp_path / "got")
    model = AutoModelForCausalLM.from_pretrained(got)
    saved = read_saved(path)["state_dict"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[f"policy.model.{name}"]), name
    assert "--push_to_hub me/model --max_shard_gb" not in (got / "README.md").read_text()
    assert "--max_shard_gb 5e-05 --push_to_hub me/model" in (got / "README.md").read_text()
    assert sorted(os.listdir(".")) == sorted([*before, "got"]), "nothing is kept here"
    run(*command)
    assert "model.safetensors.index.json" not in repo.files, "shards of before do not stay"
    again = AutoModelForCausalLM.from_pretrained(hub.write("me/model", tmp_path / "again"))
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, saved[f"policy.model.{name}"]), name


def test_an_export_that_is_there_is_compared_again_and_sent(hub: Hub, char_model: str, capsys):
    path = write_run(char_model)
    hub.failures = [Failure("commit", 403)]
    command = ("export", "--ckpt_path", path, "--out", "out", "--push_to_hub", "me/model")
    with pytest.raises(SystemExit, match="the Hub: .*403"):
        run(*command)
    assert not hub.repos["me/model"].files and Path("out/model.safetensors").exists()
    num_uploads = len(hub.uploads)
    run(*command)
    sent = hub.repos["me/model"].files
    assert len(hub.uploads) == num_uploads, "what had arrived is not sent again"
    assert sent == {p.name: p.read_bytes() for p in Path("out").iterdir()}
    weights = Path("out/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-400:] = bytes(400)
    weights.write_bytes(content)
    with pytest.raises(ExportMismatchError):
        export(path, "out", push_to_hub="me/model")
    assert hub.repos["me/model"].files == sent


def test_only_the_files_of_an_export_are_sent(hub: Hub, tmp_path: Path):
    folder = write_folder(tmp_path / "out")
    assert [path.name for path in files_to_send(folder)] == SENT
    push_folder(folder, "me/model")
    assert hub.repos["me/model"].commits == [SENT]


FAILURES = [
    [Failure("POST /api/repos/create", 503)],
    [Failure("preupload", 500), Failure("batch", 502)],
    [Failure("PUT /lfs", None), Failure("PUT /lfs", 500)],
    [Failure("POST /verify", 500)],
    [Failure("commit", 500), Failure("commit", None)],
    [Failure("paths-info", 500)],
]


@pytest.mark.parametrize("part_num_bytes", [None, 2000])
@pytest.mark.parametrize("failures", FAILURES, ids=lambda found: found[0].path)
def test_a_push_survives_failures_in_its_middle(failures, part_num_bytes, hub: Hub, tmp_path: Path):
    hub.failures, hub.part_num_bytes = list(failures), part_num_bytes
    if part_num_bytes and "lfs" in failures[0].path:
        hub.failures.append(Failure(r"PUT /lfs/\w+/2", None))
    folder = write_folder(tmp_path / "out")
    push_folder(folder, "me/model", warn=lambda message: None)
    assert not hub.failures, "each has happened"
    files = hub.repos["me/model"].files
    assert files == {name: (folder / name).read_bytes() for name in SENT}
    assert len(hub.repos["me/model"].commits) == 1


def test_what_has_arrived_is_not_sent_again(hub: Hub, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("lightning_grpo.export.hub._WAITS_S", ())
    folder = write_folder(tmp_path / "out")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"another" * 500)
    hub.failures = [Failure("commit")]
    with pytest.raises(OSError, match="the Hub: .*500"):
        push_folder(folder, "me/model")
    assert len(hub.uploads) == 2 and not hub.repos["me/model"].files
    push_folder(folder, "me/model")
    assert len(hub.uploads) == 2 and len(hub.repos["me/model"].files) == 4


def test_a_refusal_is_told_at_once_and_without_the_token(hub: Hub, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_canaryCanaryCanary")
    with pytest.raises(OSError, match="the Hub: .*401") as caught:
        push_folder(write_folder(tmp_path / "out"), "me/model")
    assert hub.requests[0] == "POST /api/repos/create" and len(hub.requests) <= 2
    assert "anary" not in "".join(traceback.format_exception(caught.value))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="hf auth login"):
        push_folder(tmp_path / "out", "me/model")


def test_the_login_of_the_hub_counts_as_well_as_the_environment(hub: Hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(hub.token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    push_folder(write_folder(tmp_path / "out"), "me/model")
    assert len(hub.repos["me/model"].files) == 3


def test_a_public_repository_is_written_to_only_when_asked_for(hub: Hub, tmp_path: Path):
    folder = write_folder(tmp_path / "out")
    hub.repos["me/model"] = Repo(private=False)
    with pytest.raises(ValueError, match="everybody can read it"):
        push_folder(folder, "me/model")
    assert not hub.uploads and not hub.repos["me/model"].files
    push_folder(folder, "me/model", is_public=True)
    push_folder(folder, "me/other", is_public=True)
    assert not hub.repos["me/other"].private and len(hub.repos["me/model"].files) == 3


def test_what_arrives_damaged_is_noticed(hub: Hub, tmp_path: Path, monkeypatch):
    folder = write_folder(tmp_path / "out")
    monkeypatch.setattr("hub_server._git", lambda content: "0" * 40)
    with pytest.raises(OSError, match=r"README.md is not in me/model as it was sent"):
        push_folder(folder, "me/model")


def test_a_dry_run_says_what_would_be_sent_and_asks_the_hub_for_nothing(
    hub: Hub, char_model: str, monkeypatch, capsys
):
    monkeypatch.delenv("HF_TOKEN")
    path = write_run(char_model)
    export(path, push_to_hub="me/model", dry_run=True)
    planned = capsys.readouterr().out
    assert "would send these files to the private repository me/model, and no others" in planned
    names = {line.split()[0] for line in planned.splitlines() if line.startswith("  ")}
    assert not hub.requests
    monkeypatch.setenv("HF_TOKEN", hub.token)
    export(path, push_to_hub="me/model")
    assert set(hub.repos["me/model"].files) == names


def test_a_name_that_is_none_is_refused_before_anything_is_done(char_model: str):
    with pytest.raises(ValueError, match="write user/name"):
        PushToHub("model")
    with pytest.raises(SystemExit, match="write user/name"):
        run("export", "--ckpt_path", "nothing", "--push_to_hub", "model")
    with pytest.raises(SystemExit, match="say where to"):
        run("export", "--ckpt_path", "nothing")


def small_run(model: str, *callbacks: dict[str, Any], max_steps: int = 4) -> str:
    """A configuration of a fit that keeps a best checkpoint, at each validation a better one."""
    trainer = {
        "callbacks": list(callbacks),
        "max_steps": max_steps,
        "max_epochs": -1,
        "accelerator": "cpu",
        "devices": 1,
        "check_val_every_n_epoch": None,
        "val_check_interval": 2,
    }
    return write_config(
        model,
        validation={"at_start": False},
        checkpoint={"monitor": "val/pass_at_k", "on_exception": False},
        reward={"functions": ["runs.spread_reward"], "success_threshold": 0.0},
        trainer=trainer,
    )


def push_callback(**options: Any) -> dict[str, Any]:
    init = {"repo_id": "me/model", "max_wait_s": 60.0, "retry_after_s": 0.0, **options}
    return {"class_path": "lightning_grpo.callbacks.PushToHub", "init_args": init}


def left_copies() -> list[Path]:
    """What the callback may leave in the folder of the run."""
    run_dir = Path("runs/small/version_0")
    return [*(run_dir / "checkpoints").glob(".*"), *run_dir.glob(".*")]


def test_a_run_sends_its_best_checkpoint_while_it_goes_on(
    hub: Hub, char_model, tmp_path: Path, monkeypatch, caplog
):
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("lightning_grpo.callbacks.push_to_hub._NICENESS", 0)
    hub.failures = [Failure("PUT /lfs", None)]
    run("fit", "--config", small_run(char_model, push_callback(max_wait_s=300.0), max_steps=2))
    run_dir = Path("runs/small/version_0")
    repo = hub.repos["me/model"]
    assert repo.private and not hub.failures
    card = repo.files["README.md"].decode()
    assert f"--ckpt_path {run_dir}/checkpoints/best" in card and ".push" not in card
    assert "--push_to_hub me/model" in card and "| `val/pass_at_k` |" in card
    assert "to me/model" in caplog.text
    model = AutoModelForCausalLM.from_pretrained(hub.write("me/model", tmp_path / "got"))
    saved = read_saved(run_dir / "checkpoints" / "best")["state_dict"]
    assert torch.equal(model.model.norm.weight, saved["policy.model.model.norm.weight"])
    assert not left_copies()


class Pusher(PushToHub):
    """Runs a program of the test in the place of an export."""

    program = "raise SystemExit(0)"

    def command(self, push: Push) -> list[str]:
        python, *_ = super().command(push)
        program = f"import os, sys, time; source = {str(push.copy)!r}\n{self.program}"
        return [python, "-S", "-c", program]


def pusher(**options: Any) -> dict[str, Any]:
    return push_callback(**options) | {"class_path": "test_push_to_hub.Pusher"}


def test_failures_are_warned_of_and_tried_again_and_the_run_goes_on(
    hub: Hub, char_model, monkeypatch
):
    monkeypatch.setattr(Pusher, "program", "sys.exit('error: the Hub is not there')")
    with pytest.warns(UserWarning, match="best.* was not sent.*the Hub is not there") as seen:
        run("fit", "--config", small_run(char_model, pusher(num_retries=2), max_steps=2))
    told = [str(w.message) for w in seen if "was not sent" in str(w.message)]
    assert len(told) == 3 and sum("trying again" in message for message in told) == 2
    assert resolve_checkpoint("runs/small/version_0/checkpoints/last")
    assert not left_copies()


def test_the_end_of_a_run_waits_no_longer_than_it_may(hub: Hub, char_model, monkeypatch):
    monkeypatch.setattr(Pusher, "program", "open(os.environ['TMPDIR'] + '/x', 'w'); time.sleep(60)")
    start = time.monotonic()
    with pytest.warns(UserWarning, match="is not on the Hub .not sent within") as seen:
        run("fit", "--config", small_run(char_model, pusher(max_wait_s=0.3)))
    assert time.monotonic() - start < 30
    told = [str(w.message) for w in seen if "is not on the Hub" in str(w.message)]
    assert len(told) == 2, "the one that ran and the one that waited"
    assert not left_copies()


def test_a_checkpoint_that_the_run_replaces_can_still_be_sent(hub: Hub, char_model, monkeypatch):
    monkeypatch.setattr(
        Pusher,
        "program",
        "print(os.path.getsize(source + '/weights.safetensors'), source.rsplit('@')[1], flush=True)",
    )
    run("fit", "--config", small_run(char_model, pusher()))
    lines = Path("runs/small/version_0/push_to_hub.log").read_text().splitlines()
    assert len(lines) == 2 and all(int(line.split()[0]) > 1000 for line in lines)


def test_a_run_that_nobody_is_logged_in_for_is_warned_of_at_its_start(
    hub: Hub, char_model, tmp_path, monkeypatch
):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.warns(UserWarning, match="nothing will be sent to me/model: .*hf auth login"):
        run("fit", "--config", small_run(char_model, pusher(), max_steps=2))


def test_a_copy_is_the_checkpoint_and_goes_with_the_next_start(tmp_path: Path):
    folder = tmp_path / "best-000050"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    (folder / "weights.safetensors").write_bytes(b"weights")
    copy = keep_copy(folder)
    assert (copy / "weights.safetensors").stat().st_nlink == 2, "a link takes no room"
    assert original_path(str(copy)) == str(folder)
    assert original_path("s3://bucket/a@b") == "s3://bucket/a@b"
    remove_left_copies(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["best-000050"]
    assert (folder / "weights.safetensors").read_bytes() == b"weights"

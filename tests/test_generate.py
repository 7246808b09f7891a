"""generate completes prompts with what a run has made."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from command_lines import run, write_config, write_jsonl

from lightning_grpo.adapters import Lora
from lightning_grpo.checkpoints import Manifest, Sections, open_checkpoint, write_checkpoint
from lightning_grpo.policy import load_policy
from lightning_grpo.tokenizing import load_tokenizer

RECORD = {"reference": {}, "is_lora": False}


@pytest.fixture
def folder(char_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The model, with the test in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return char_model


def write_trained(folder: str, lora: Lora | None = None) -> Path:
    """A checkpoint of a policy that is far from the model it started from."""
    write_config(
        folder, **({"model": {"name_or_path": folder, "lora": {"rank": 4}}} if lora else {})
    )
    policy = load_policy(folder, num_tokens=len(load_tokenizer(folder)), lora=lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.5)
    state = {f"policy.{n}": t for n, t in policy.state_dict().items() if not lora or "lora_" in n}
    path = Path("run/checkpoints/last-000004")
    manifest = Manifest(kind="last", step=4, serial=1, files={})
    write_checkpoint(path, Sections({"lightning_grpo": RECORD}, state), manifest)
    Path("config.yaml").rename("run/config.yaml")
    return path


def greedy(model: torch.nn.Module, ids: list[int]) -> list[int]:
    """The next 4 tokens by whole forwards of the model."""
    for _ in range(4):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-4:]


def test_prompts_of_a_file_are_completed_greedily_and_written(folder: str, capsys):
    write_trained(folder)
    prompts = write_jsonl("prompts.jsonl", [{"prompt": "1="}, {"prompt": "23="}])
    options = ["--prompts", prompts, "--out", "out.jsonl", "--temperature", "0"]
    run("generate", "--ckpt_path", "run/checkpoints/last", *options, "--num_samples", "2")
    records = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["1=", "1=", "23=", "23="]
    assert records[0]["completion"] == records[1]["completion"]
    assert {len(record["completion"]) for record in records} == {4}  # of the configuration
    assert "wrote out.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize("lora", [None, Lora(4)])
def test_the_completion_is_that_of_the_checkpoint_s_weights(folder: str, lora, capsys):
    path = write_trained(folder, lora)
    tokenizer = load_tokenizer(folder)
    Path("prompts.txt").write_text("12=\n\n")
    run("generate", "--ckpt_path", str(path), "--prompts", "prompts.txt", "--temperature", "0")
    prompt, completion = capsys.readouterr().out.splitlines()
    policy = load_policy(folder, num_tokens=len(tokenizer), lora=lora)
    weights = {n.removeprefix("policy."): t for n, t in open_checkpoint(path).read_weights()}
    policy.load_state_dict(weights, strict=lora is None)
    expected = greedy(policy.model.eval(), tokenizer.encode("12="))
    assert prompt == "12="
    assert completion == "  -> " + tokenizer.decode(expected, skip_special_tokens=True)


def test_lines_of_the_terminal_are_prompts(folder: str, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("1=\n\n2=\n"))
    run("generate", "--name_or_path", folder, "--max_completion_tokens", "3")
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_samples_differ_and_a_seed_repeats_them(folder: str, capsys):
    Path("prompts.txt").write_text("12=\n")
    options = ["--prompts", "prompts.txt", "--num_samples", "4", "--max_completion_tokens", "8"]
    outputs = []
    for seed in ("0", "0", "1"):
        run("generate", "--name_or_path", folder, *options, "--seed", seed)
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert len(set(outputs[0].splitlines())) > 2


def test_a_checkpoint_of_another_model_is_refused(folder: str):
    path = write_trained(folder)
    manifest = Manifest(kind="last", step=5, serial=2, files={})
    other = {"policy.model.other.weight": torch.ones(2)}
    write_checkpoint(
        path.parent / "last-000005", Sections({"lightning_grpo": RECORD}, other), manifest
    )
    with pytest.raises(SystemExit, match="does not fit the run's configuration"):
        run("generate", "--ckpt_path", "run/checkpoints/last", "--prompts", "prompts.txt")

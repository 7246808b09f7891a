"""An exported folder loads with transformers and peft alone, and has been shown to be the policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_lines import run
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from saved import read_saved
from saved_runs import ARCHITECTURES, write_model, write_run
from transformers import AutoModelForCausalLM, pipeline

import lightning_grpo.tools.export as tool
import lightning_grpo.tools.export_forms as forms
from lightning_grpo.adapters import Lora
from lightning_grpo.export.card import block, card_text, code, front_matter
from lightning_grpo.export.proof import ExportMismatchError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("dtype", "is_tied"), [("float32", True), ("bfloat16", False)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_architecture_leaves_as_a_folder_that_transformers_loads(
    architecture, dtype, is_tied, char_model: str, here: Path, capsys
):
    model = write_model(architecture, char_model, here / "base", is_tied=is_tied)
    path = write_run(model)
    run("export", "--ckpt_path", path, "--out", "out", "--dtype", dtype)
    assert "wrote out" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained("out")
    saved = read_saved(path)["state_dict"]
    weights = loaded.state_dict()
    assert {t.dtype for t in weights.values()} == {getattr(torch, dtype)}
    for name, tensor in weights.items():
        expected = saved[f"policy.model.{name}"].to(tensor.dtype)
        assert torch.equal(tensor, expected), name
    text = pipeline("text-generation", model="out", tokenizer="out")("12=", max_new_tokens=2)
    assert text[0]["generated_text"].startswith("12=")


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_adapters_leave_merged_in_float32_or_as_a_peft_folder(
    architecture, char_model: str, here: Path
):
    model = write_model(architecture, char_model, here / "base", is_tied=True)
    path = write_run(model, lora=Lora(rank=2, alpha=8.0))
    run("export", "--ckpt_path", path, "--out", "merged")
    run("export", "--ckpt_path", path, "--out", "adapter", "--form", "adapter")
    ids = torch.tensor([[3, 5, 7, 9]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained("merged")(ids).logits
        adapted = AutoPeftModelForCausalLM.from_pretrained("adapter")(ids).logits
        base = AutoModelForCausalLM.from_pretrained(model)(ids).logits
    assert torch.allclose(merged, adapted, atol=1e-5)
    assert float((merged - base).abs().max()) > 1e-2
    assert json.loads(Path("adapter/adapter_config.json").read_text())["r"] == 2


def test_an_export_that_is_not_the_policy_fails_and_leaves_nothing(
    char_model: str, here: Path, monkeypatch
):
    path = write_run(char_model)
    write = forms.convert_quietly

    def damage(source: str, out: str, *args: Any, **kwargs: Any) -> list[str]:
        lines = write(source, out, *args, **kwargs)
        file = Path(out) / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.1.mlp.down_proj.weight"] *= 1.01
        save_file(tensors, file, metadata={"format": "pt"})
        return lines

    monkeypatch.setattr(forms, "convert_quietly", damage)
    with pytest.raises(ExportMismatchError, match="is not the policy"):
        tool.export(path, "out")
    assert sorted(p.name for p in here.iterdir()) == ["run", "train.jsonl", "val.jsonl"]


def test_a_tokenizer_with_another_end_is_found(char_model: str, here: Path, monkeypatch):
    path = write_run(char_model)
    write = forms.convert_quietly

    def change(source: str, out: str, *args: Any, **kwargs: Any) -> list[str]:
        lines = write(source, out, *args, **kwargs)
        file = Path(out) / "tokenizer_config.json"
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | {"eos_token": content["pad_token"]}))
        return lines

    monkeypatch.setattr(forms, "convert_quietly", change)
    with pytest.raises(ExportMismatchError, match="eos_token_id"):
        tool.export(path, "out")


def test_a_tokenizer_that_autotokenizer_reads_otherwise_is_told_of(char_model: str, here: Path):
    proof = tool.export(write_run(char_model), "out")
    assert proof is not None
    assert proof.tokenizer_class == "PreTrainedTokenizerFast"
    assert "the same with PreTrainedTokenizerFast" in Path("out/README.md").read_text()


def test_a_dry_run_writes_nothing_and_a_full_folder_is_not_overwritten(
    char_model: str, here: Path, capsys
):
    path = write_run(char_model)
    run("export", "--ckpt_path", path, "--out", "out", "--dry-run", "--max-shard-gb", "0.00005")
    said = capsys.readouterr().out
    assert "would write out" in said
    for name in ("model-00002-of-", "model.safetensors.index.json", "config.json", "README.md"):
        assert f"\n  {name}" in said
    assert not Path("out").exists()
    Path("out").mkdir()
    Path("out/mine.txt").write_text("kept")
    with pytest.raises(SystemExit, match="--out out is there already"):
        run("export", "--ckpt_path", path, "--out", "out")
    assert Path("out/mine.txt").read_text() == "kept"


def test_the_card_has_data_configuration_curves_evaluation_proof_and_command(
    char_model: str, here: Path
):
    tool.export(write_run(char_model), "out", max_shard_gb=1.0)
    card = Path("out/README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lightning_grpo", "reinforcement-learning"],
    }
    for line in (
        "- training data: `train.jsonl`",
        "- validation data: `val.jsonl`",
        "- rewards: `[runs.spread_reward]`",
        "- optimizer steps: `4`",
        "| metric | step 0 | step 4 |",  # and not the validation of step 5
        "| `val/pass_at_1` | 0.25 | 0.75 |",
        "| step | reward/mean | val/pass_at_1 | ref/kl |",
        "| 3 | 0.6 | 0.5 | 0.002 |",
        "python -m lightning_grpo export --ckpt_path run/checkpoints/last-000004 --out out "
        "--max_shard_gb 1.0",
    ):
        assert line in body.splitlines(), line
    assert "KL of the next-token distributions" in body
    assert "  group_size: 2" in body.splitlines()


EVIL = "x\n---\nlicense: evil\n---\n```\n<img src=x onerror=alert(1)>|`` ` ```` \x1b]0;title\x07"


def test_names_and_options_cannot_leave_their_place_in_a_card():
    text = card_text(
        form="merged",
        options={"model": {"name_or_path": EVIL}, "data": {"train_data": EVIL}},
        about={"stage": EVIL},
        step=2,
        rows=[{"step": "1", "reward/mean": "0.5", "val/`|<b>": "0.25"}],
        proof=["a line"],
        command=["python", EVIL],
    )
    _, front, body = text.split("---\n", 2)
    assert "license" not in yaml.safe_load(front)
    assert "\x1b" not in text and "\x07" not in text
    fence = None
    for line in body.splitlines():  # all that is evil stands between fences or in a span of code
        if fence is None and line.startswith("```"):
            fence = line
        elif fence is not None and line == fence:
            fence = None
        elif fence is None:
            outside = "".join(line.split("`")[::2])
            assert "onerror" not in outside and "<b>" not in outside and "---" not in outside[:3]
            assert line.count("`") % 2 == 0
    assert fence is None
    assert code("a" * 1000).count("a") == 300
    assert block("````")[0] == "`````"


def test_only_a_name_of_the_hub_is_called_the_base_model(char_model: str):
    assert front_matter(char_model, "merged").get("base_model") is None
    assert front_matter("Qwen/Qwen2.5-0.5B", "merged")["base_model_relation"] == "finetune"
    front = front_matter("Qwen/Qwen2.5-0.5B", "adapter")
    assert front["library_name"] == "peft" and "base_model_relation" not in front

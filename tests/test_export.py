"""An exported folder loads with transformers and peft alone, and has been shown to be the policy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_lines import run, write_config
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    pipeline,
)

import lightning_grpo.tools.export as tool
from lightning_grpo.adapters import Lora
from lightning_grpo.export.card import fenced, literal, redacted
from lightning_grpo.export.proof import ExportMismatchError
from lightning_grpo.policy import load_policy
from lightning_grpo.tokenizing import load_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
GPT2_SIZES: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
ARCHITECTURES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, SIZES),
    "qwen2": (Qwen2Config, SIZES),
    "qwen3": (Qwen3Config, SIZES),
    "gemma2": (Gemma2Config, SIZES),
    "gpt2": (GPT2Config, GPT2_SIZES),
}


def write_model(name: str, char_model: str, folder: Path, *, is_tied: bool) -> str:
    """A model of another architecture with the tokenizer of the small one."""
    kind, sizes = ARCHITECTURES[name]
    tokenizer = load_tokenizer(char_model)
    config = kind(
        **sizes,
        vocab_size=len(tokenizer),
        tie_word_embeddings=is_tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in Path(char_model).glob("token*.json"):
        shutil.copy(file, folder)
    return str(folder)


def write_run(model: str, *, lora: Lora | None = None) -> str:
    """A run's folder with the checkpoint of a policy that has moved away from its model."""
    adapters = {"lora": {"rank": lora.rank, "alpha": lora.alpha}} if lora else {}
    write_config(model, model={"name_or_path": model, **adapters})
    Path("run/checkpoints").mkdir(parents=True)
    Path("config.yaml").rename("run/config.yaml")
    policy = load_policy(model, num_tokens=len(load_tokenizer(model)), lora=lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    state = {f"policy.{n}": t for n, t in policy.state_dict().items() if not lora or "lora_" in n}
    counters = {"iterations": 2, "optimizer_steps": 4, "completions": 16, "tokens": 64}
    record = {"counters": counters, "stage": "grpo", "is_lora": lora is not None, "reference": {}}
    path = "run/checkpoints/last.ckpt"
    torch.save({"state_dict": state, "lightning_grpo": record, "global_step": 4}, path)
    return path


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
    saved = torch.load(path, weights_only=True)["state_dict"]
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
    write = tool.convert_quietly

    def damage(source: str, out: str, *args: Any, **kwargs: Any) -> list[str]:
        lines = write(source, out, *args, **kwargs)
        file = Path(out) / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.1.mlp.down_proj.weight"] *= 1.01
        save_file(tensors, file, metadata={"format": "pt"})
        return lines

    monkeypatch.setattr(tool, "convert_quietly", damage)
    with pytest.raises(ExportMismatchError, match="is not the policy"):
        tool.export(path, "out")
    assert sorted(p.name for p in here.iterdir()) == ["run", "train.jsonl", "val.jsonl"]


def test_a_tokenizer_with_another_end_is_found(char_model: str, here: Path, monkeypatch):
    path = write_run(char_model)
    write = tool.convert_quietly

    def change(source: str, out: str, *args: Any, **kwargs: Any) -> list[str]:
        lines = write(source, out, *args, **kwargs)
        file = Path(out) / "tokenizer_config.json"
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | {"eos_token": content["pad_token"]}))
        return lines

    monkeypatch.setattr(tool, "convert_quietly", change)
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
    run("export", "--ckpt_path", path, "--out", "out", "--dry_run", "true")
    assert "would write out" in capsys.readouterr().out
    assert not Path("out").exists()
    Path("out").mkdir()
    Path("out/mine.txt").write_text("kept")
    with pytest.raises(SystemExit, match="--out out is there already"):
        run("export", "--ckpt_path", path, "--out", "out")
    assert Path("out/mine.txt").read_text() == "kept"


def test_the_card_has_the_proof_and_no_secret(char_model: str, here: Path, monkeypatch):
    canary = "hf_" + "CanaryCanary123"
    monkeypatch.setenv("HF_TOKEN", canary)
    monkeypatch.setattr("sys.argv", ["x", "export", "--note", canary, "--token=abc"])
    tool.export(write_run(char_model), "out")
    card = Path("out/README.md").read_text()
    assert "KL of the next-token distributions" in card
    assert "optimizer steps: `4`" in card
    assert "--token=<secret>" in card
    assert all(canary.encode() not in p.read_bytes() for p in Path("out").iterdir())


def test_names_cannot_break_out_of_the_card():
    assert literal("a`b\n---\nlicense: x") == "`a'b --- license: x`"
    assert fenced("a\n```\nb") == ["````", "a\n```\nb", "````"]
    assert redacted("--api_key sk-123456789abc x") == "--api_key <secret> x"

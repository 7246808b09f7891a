"""The critic as a folder of transformers gives the critic's values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_lines import run, write_config
from safetensors.torch import load_file, save_file
from saved import read_saved
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
)

import lightning_grpo.tools.export_forms as forms
from lightning_grpo.adapters import Lora
from lightning_grpo.checkpoints.io import FolderCheckpointIO
from lightning_grpo.critic import CriticSettings, critic_parameters, make_critic
from lightning_grpo.export.proof import ExportMismatchError
from lightning_grpo.export.values import ValueProof
from lightning_grpo.lifecycle import copy_trunk
from lightning_grpo.policy import Policy, load_policy
from lightning_grpo.tokenizing import load_tokenizer
from lightning_grpo.tools.export import export
from lightning_grpo.types import Rollout

FORMS = ("head", "lora", "separate")
PATH = "run/checkpoints/last"


def write_run(model: str, form: Any, *, stage: str = "ppo") -> tuple[Policy, Any]:
    """The folder of a PPO run whose policy and critic have moved by random amounts."""
    lora = Lora(4) if form == "lora" else None
    sections: dict[str, Any] = {"critic": {"form": form}}
    sections |= {"lora": {"rank": 4}} if lora else {}
    write_config(model, model=sections)
    Path("run/checkpoints").mkdir(parents=True)
    Path("config.yaml").rename("run/config.yaml")
    tokenizer = load_tokenizer(model)
    policy = load_policy(model, num_tokens=len(tokenizer), lora=lora).eval()
    critic = make_critic(CriticSettings(form=form), policy, tokenizer).eval()
    if form == "separate":
        copy_trunk(critic, policy)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in [*policy.trainable().values(), *critic_parameters(critic, policy)]:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    state = {f"policy.{n}": t for n, t in policy.state_dict().items() if not lora or "lora_" in n}
    state |= {f"critic.{name}": tensor for name, tensor in critic.state_dict().items()}
    counters = {"iterations": 2, "optimizer_steps": 4, "completions": 16, "tokens": 64}
    record = {"counters": counters, "stage": stage, "is_lora": lora is not None, "reference": {}}
    content = {"state_dict": state, "lightning_grpo": record, "global_step": 4}
    FolderCheckpointIO().save_checkpoint(content, f"{PATH}-000004")
    return policy, critic


@torch.no_grad()
def values_of(critic: Any, policy: Policy, ids: torch.Tensor) -> torch.Tensor:
    """Values (B, T) of the states after each token but the first."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    num_rows, num_tokens = ids.shape
    rows = Rollout(
        prompt_ids=ids[:, :1],
        prompt_mask=mask[:, :1],
        completion_ids=ids[:, 1:],
        completion_mask=mask[:, 1:],
        action_mask=mask[:, 1:],
        sampler_logprobs=torch.zeros(num_rows, num_tokens - 1),
        group_ids=torch.arange(num_rows),
        truncated=torch.zeros(num_rows, dtype=torch.bool),
    )
    hidden = policy.hidden_states(ids[:, :1], mask[:, :1], ids[:, 1:], mask[:, 1:])
    values: torch.Tensor = critic(policy, rows, hidden)
    return values


@pytest.mark.parametrize("form", FORMS)
def test_a_critic_leaves_as_a_classifier_of_tokens_or_of_texts(char_model, form, tmp_path: Path):
    policy, critic = write_run(char_model, form)
    run("export", "--ckpt_path", PATH, "--out", "tokens", "--form", "token_values")
    run("export", "--ckpt_path", PATH, "--out", "text", "--form", "sequence_value")
    tokenizer = PreTrainedTokenizerFast.from_pretrained("tokens")
    ids = tokenizer("314159=", return_tensors="pt")["input_ids"]
    expected = values_of(critic, policy, ids)
    assert float(expected.std()) > 0.01
    with torch.no_grad():
        found = AutoModelForTokenClassification.from_pretrained("tokens")(ids).logits
        last = AutoModelForSequenceClassification.from_pretrained("text")(ids).logits
    assert found.shape == (1, 7, 1) and last.shape == (1, 1)
    assert torch.allclose(found[..., 0], expected, atol=1e-5)
    bias = float(critic.head.bias)
    assert torch.allclose(last + bias, expected[:, -1:], atol=1e-5)
    card = Path("text/README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "lower than the critic's" in card
    assert "- 18 values of states: at most" in Path("tokens/README.md").read_text()


def test_a_critic_can_be_rounded_and_cut_into_shards(char_model, tmp_path: Path, capsys):
    write_run(char_model, "head")
    options: dict[str, Any] = {"form": "token_values", "dtype": "bfloat16", "max_shard_gb": 2e-5}
    export(PATH, "out", dry_run=True, **options)
    planned = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line[0] == " "}
    proof = export(PATH, "out", **options)
    assert isinstance(proof, ValueProof)
    assert proof.max_difference < 1e-5 < proof.rounding < 0.1
    assert {p.name for p in Path("out").iterdir()} == planned
    assert len(list(Path("out").glob("*.safetensors"))) > 1
    config = json.loads(Path("out/config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["Qwen2ForTokenClassification"]
    assert {t.dtype for f in Path("out").glob("*.safetensors") for t in load_file(f).values()} == {
        torch.bfloat16
    }


def test_values_that_are_not_those_of_the_critic_are_refused(char_model, monkeypatch):
    write_run(char_model, "head")
    write = forms.write_model_folder

    def damage(weights: Any, files: Any, out: Path, **options: Any) -> list[str]:
        names = write(weights, files, out, **options)
        tensors = load_file(out / "model.safetensors")
        tensors["score.weight"] *= 1.01
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return names

    monkeypatch.setattr(forms, "write_model_folder", damage)
    with pytest.raises(ExportMismatchError, match="is not the critic"):
        export(PATH, "out", form="token_values")
    assert not Path("out").exists()


def test_the_policy_of_a_run_with_a_critic_leaves_without_it(char_model):
    policy, _ = write_run(char_model, "lora")
    export(PATH, "out")
    ids = torch.tensor([[3, 5, 7, 9]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained("out")(ids).logits
        expected = policy.model(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(found, expected, atol=1e-4)


def test_the_critic_of_a_real_run_is_exported_by_one_command(char_model, capsys):
    critic = {"form": "head", "learning_rate": 1e-2}
    run("fit", "--config", write_config(char_model, model={"critic": critic}, switch=PPO))
    checkpoint = "runs/small/version_0/checkpoints/last"
    run("export", "--ckpt_path", checkpoint, "--out", "critic", "--form", "token_values")
    assert "wrote critic" in capsys.readouterr().out
    bias = read_saved(checkpoint)["state_dict"]["critic.head.bias"]
    model = AutoModelForTokenClassification.from_pretrained("critic")
    assert torch.equal(model.score.bias.detach(), bias) and float(bias.abs()) > 0


PPO = {"algorithm": "ppo"}


def test_a_checkpoint_without_a_critic_is_refused(char_model):
    write_run(char_model, "head", stage="grpo")
    with pytest.raises(SystemExit, match="holds no critic"):
        run("export", "--ckpt_path", PATH, "--out", "critic", "--form", "token_values")
    assert not Path("critic").exists()

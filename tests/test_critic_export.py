"""A critic leaves the project as a token classifier that transformers loads by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_lines import run, write_config
from saved import read_saved
from transformers import AutoModelForTokenClassification, AutoTokenizer

from lightning_grpo.adapters import Lora
from lightning_grpo.critic import CriticSettings, critic_parameters, make_critic
from lightning_grpo.critic_export import write_critic
from lightning_grpo.lifecycle import copy_trunk
from lightning_grpo.policy import load_policy
from lightning_grpo.tokenizing import load_tokenizer

FORMS = ["head", "lora", "separate"]


@pytest.mark.parametrize("form", FORMS)
def test_the_folder_gives_the_values_of_the_critic(char_model, form, tmp_path: Path):
    tokenizer = load_tokenizer(char_model)
    lora = Lora(4) if form == "lora" else None
    policy = load_policy(char_model, num_tokens=len(tokenizer), lora=lora).eval()
    critic = make_critic(CriticSettings(form=form), policy, tokenizer).eval()
    if form == "separate":
        copy_trunk(critic, policy)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in critic_parameters(critic, policy):
            parameter += torch.randn(parameter.shape, generator=generator) * 0.3
    difference = write_critic(critic, policy, tokenizer, tmp_path / "out")
    assert difference < 1e-4

    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "out").eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("314159=", return_tensors="pt")
    with torch.no_grad():
        values = model(input_ids=ids["input_ids"]).logits
    assert values.shape == (1, 7, 1)
    assert float(values.std()) > 0.1


def test_a_folder_with_other_values_is_refused(char_model, tmp_path: Path, monkeypatch):
    tokenizer = load_tokenizer(char_model)
    policy = load_policy(char_model, num_tokens=len(tokenizer)).eval()
    critic = make_critic(CriticSettings(), policy, tokenizer)
    monkeypatch.setattr("lightning_grpo.critic_export._values", lambda *args: torch.ones(2, 9))
    with pytest.raises(ValueError, match="gives other values than the critic"):
        write_critic(critic, policy, tokenizer, tmp_path / "out")


@pytest.mark.parametrize("form", FORMS)
def test_the_critic_of_a_checkpoint_is_exported_by_one_command(
    char_model, form, tmp_path: Path, capsys
):
    lora = {"lora": {"rank": 4}} if form == "lora" else {}
    config = write_config(
        char_model,
        model={"critic": {"form": form, "learning_rate": 1e-2}, **lora},
        switch={"algorithm": "ppo"},
    )
    run("fit", "--config", config)
    checkpoint = "runs/small/version_0/checkpoints/last"
    run("export_critic", "--ckpt_path", checkpoint, "--out", "critic")
    assert "wrote critic: its values are within" in capsys.readouterr().out
    bias = read_saved(checkpoint)["state_dict"]["critic.head.bias"]
    model = AutoModelForTokenClassification.from_pretrained("critic")
    assert torch.equal(model.score.bias.detach(), bias) and float(bias.abs()) > 0


def test_a_checkpoint_without_a_critic_is_refused(char_model, tmp_path: Path, capsys):
    run("fit", "--config", write_config(char_model))
    with pytest.raises(SystemExit, match="holds no critic"):
        run(
            "export_critic",
            "--ckpt_path",
            "runs/small/version_0/checkpoints/last",
            "--out",
            "critic",
        )
    with pytest.raises(SystemExit, match="there is no such checkpoint"):
        run("export_critic", "--ckpt_path", "nowhere", "--out", "critic")

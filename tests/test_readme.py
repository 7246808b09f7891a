"""What the README shows works as it is shown."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from command_lines import run, write_jsonl
from runs import make_data, make_module, make_trainer

from lightning_grpo.critic import CriticSettings
from lightning_grpo.evidence import measure_evidence

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_of(name: str) -> str:
    """The Python block of the README that begins with the comment `# name`."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return next(block for block in blocks if block.startswith(f"# {name}\n"))


def module_of(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Write a block to a file and import it, as a user would."""
    (folder / name).write_text(code_of(name))
    monkeypatch.syspath_prepend(str(folder))
    module = name.removesuffix(".py")
    sys.modules.pop(module, None)
    return importlib.import_module(module)


def test_the_custom_reward_of_the_readme_trains(tmp_path, monkeypatch, char_model):
    reward = module_of("my_rewards.py", tmp_path, monkeypatch).short_and_right
    logged: list[tuple[str, float]] = []
    rewards = reward(
        completions=["3", "33", "4", "x"],
        answer=["3", "3", None, "x"],
        log_metric=lambda name, value: logged.append((name, value)),
    )
    assert rewards == [pytest.approx(1.1), 0.0, None, pytest.approx(1.1)]
    assert logged == [("reward/num_right", 2)]
    trainer = make_trainer(reward=reward)
    trainer.fit(make_module(char_model), datamodule=make_data())
    assert "reward/short_and_right" in trainer.callback_metrics
    assert "reward/num_right" in trainer.callback_metrics


def test_the_custom_callback_of_the_readme_is_called_and_stops_the_run(
    tmp_path, monkeypatch, char_model
):
    callback = module_of("my_callbacks.py", tmp_path, monkeypatch).LongestCompletion
    eager, patient = callback(stop_at_reward=0.0), callback(stop_at_reward=9.0)
    trainer = make_trainer(callbacks=[eager], max_epochs=-1, max_steps=5)
    trainer.fit(make_module(char_model), datamodule=make_data())
    assert trainer.global_step == 1
    assert len(eager.longest) > 2
    trainer = make_trainer(callbacks=[patient], max_epochs=-1, max_steps=5)
    trainer.fit(make_module(char_model), datamodule=make_data())
    assert trainer.global_step == 5


def test_the_switch_rule_of_the_readme_switches(tmp_path, monkeypatch, char_model):
    rule = module_of("my_rules.py", tmp_path, monkeypatch).critic_is_better
    evidence = {
        "iteration": 0,
        "stage": "grpo",
        "rewards": torch.tensor([0.0, 0.0, 1.0, 0.0]),
        "group_ids": torch.tensor([0, 0, 1, 1]),
        "baseline_rewards": torch.tensor([0.0, 0.0, 1.0, 0.0]),
        "baseline_group_ids": torch.tensor([0, 0, 1, 1]),
        "prompt_values": None,
        "value_explained_var": None,
    }
    assert rule(measure_evidence(**evidence)) == "grpo"  # half the groups are dead, not more
    dead = evidence | {"rewards": torch.zeros(4)}
    assert rule(measure_evidence(**dead)) == "ppo"
    switch = {"rule": rule, "patience": 1, "min_stay_iterations": 0}
    trainer = make_trainer(switch=switch, max_epochs=-1, max_steps=3)
    module = make_module(char_model, critic=CriticSettings())
    trainer.fit(module, datamodule=make_data())
    assert module.counters.iterations == 3


def test_the_python_program_of_the_readme_runs(tmp_path, monkeypatch):
    program = module_of("train.py", tmp_path, monkeypatch)
    assert program.trainer.global_step == 2
    assert program.module.counters.iterations == 2


def test_the_scores_of_the_readme_are_diagnosed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"{i}=", "completion": str(i % 3 and k), "answer": "0"}
        for i in range(24)
        for k in range(4)
    ]
    write_jsonl("predictions.jsonl", rows)
    module_of("my_scores.py", tmp_path, monkeypatch)
    command = re.search(r"python -m lightning_grpo (diagnose --scores .*)", README)
    run(*command[1].split())
    assert "groups of 4" in capsys.readouterr().out
    assert (tmp_path / "diagnosis/diagnosis.html").exists()


def test_every_file_that_the_readme_names_exists():
    linked = re.findall(r"\]\(([^)#]+)\)", README)
    assert linked
    tree = README.partition("## Files")[2].partition("```")[2].partition("```")[0]
    folder = ""
    named = []
    for line in tree.splitlines():
        if not line.strip():
            continue
        path = line.split()[0]
        if not line.startswith(" "):
            folder = path if path.endswith("/") else ""
            named.append(path)
        else:
            named.append(folder + path)
    assert len(named) > 40
    missing = [path for path in [*linked, *named] if not (ROOT / path).exists()]
    assert not missing


def test_every_python_file_is_in_the_tree_of_the_readme():
    tree = README.partition("## Files")[2]
    folders = ("lightning_grpo", "callbacks", "tools", "conf")
    files = [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml")
        and path.name not in ("__init__.py", "__main__.py")
        and not any(parent.is_symlink() for parent in path.parents)
    ]
    assert len(files) > 40
    assert not [path.name for path in files if path.name not in tree]

"""Every preset trains on top of a configuration, as the algorithm that it is named after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from command_lines import run, train_rows, write_config

from lightning_grpo.paths import resolve_package_path

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "dr_grpo": ("GRPO", {"scale": "none", "reduction": "constant"}),
    "dapo": ("GRPO", {"clip_high": 0.28, "reduction": "token", "mask_truncated": True}),
    "gspo": ("GSPO", {"sequence_clip_low": 3e-4, "sequence_clip_high": 4e-4}),
    "cispo": ("CISPO", {"max_weight": 5.0}),
    "rloo": ("GRPO", {"baseline": "leave_one_out", "scale": "none", "reduction": "constant"}),
    "reinforce_pp": ("ReinforcePlusPlus", {"subtract_group_mean": False}),
    "reinforce_pp_baseline": (
        "ReinforcePlusPlus",
        {"subtract_group_mean": True, "kl_estimator": "k2"},
    ),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_on_top_of_a_configuration(char_model, name):
    preset = f"package://lightning_grpo/conf/{name}.yaml"
    run("fit", "--config", write_config(char_model), "--config", preset)
    run_dir = Path("runs/small/version_0")
    assert len(train_rows(run_dir / "metrics.csv")) == 4
    used = yaml.safe_load((run_dir / "config.yaml").read_text())["model"]
    class_name, options = PRESETS[name]
    assert used["algorithm"]["class_path"].split(".")[-1] == class_name
    for option, value in options.items():
        assert used["algorithm"]["init_args"][option] == value
    assert used["kl_in"] == ("reward" if name in ("rloo", "reinforce_pp") else "loss")


def test_the_soft_penalty_on_length_is_added_as_the_preset_says(char_model):
    run(
        "fit",
        "--config",
        write_config(char_model),
        "--config",
        "package://lightning_grpo/conf/dapo.yaml",
        "--reward.functions+=lightning_grpo.rewards.SoftOverlong",
        "--reward.functions.max_completion_tokens=4",
        "--reward.functions.buffer_tokens=2",
    )
    penalties = train_rows(Path("runs/small/version_0/metrics.csv"), "reward/SoftOverlong")
    assert len(penalties) == 4 and all(-1 <= value <= 0 for _, value in penalties)
    text = Path(resolve_package_path("package://lightning_grpo/conf/dapo.yaml")).read_text()
    assert "--reward.functions+=lightning_grpo.rewards.SoftOverlong" in text


def test_the_ppo_configuration_trains(monkeypatch):
    run(
        "fit",
        "--config",
        "package://lightning_grpo/conf/ppo.yaml",
        "--trainer.max_steps=8",
        "--cold_start.num_steps=2",
        "--data.prompts_per_iteration=4",
        "--data.val_data.init_args.num_prompts=8",
    )
    file = Path("runs/ppo/version_0/metrics.csv")
    assert [value for _, value in train_rows(file, "algorithm/is_ppo")][-1] == 1
    assert train_rows(file, "value/explained_var")

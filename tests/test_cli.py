from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import command_lines
import pytest
import torch
import yaml
from command_lines import run, train_rows, write_config, write_jsonl
from saved import read_saved

from lightning_grpo.cli import SECTIONS, with_config
from lightning_grpo.run_files import Run, find_checkpoint
from lightning_grpo.tool_commands import with_flags
from lightning_grpo.tools.export import export

REPOSITORY = Path(__file__).parent.parent
VERSION_0 = Path("runs/small/version_0")


@pytest.fixture(autouse=True)
def own_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["__main__.py"])


def printed_config(capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    with pytest.raises(SystemExit) as stop:
        run(*args, "--print_config")
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


# Which configuration holds


def test_only_a_fit_without_a_configuration_gets_the_quickstart():
    args = with_config(["fit", "--trainer.max_steps", "3"])
    assert args[:2] == ["fit", "--config"]
    assert args[2].endswith("conf/quickstart.yaml") and Path(args[2]).is_file()
    assert args[3:] == ["--trainer.max_steps", "3"]
    for given in (
        ["fit", "--config", "a.yaml"],
        ["fit", "--config=a.yaml"],
        ["fit", "-c", "a.yaml"],
        ["validate", "--trainer.devices", "1"],
        ["--help"],
        [],
    ):
        assert with_config(given) == given


def test_a_configuration_inside_the_package_can_be_named():
    args = with_config(["fit", "--config", "package://lightning_grpo/conf/quickstart.yaml"])
    assert Path(args[2]).is_file()


def test_every_section_and_option_can_be_set_on_the_command_line(capsys):
    config = printed_config(
        capsys,
        *["fit", "--model.algorithm.clip_high", "0.28", "--model.optimizer.lr", "0.002"],
        *["--rollout.group_size", "5", "--reward.functions+=lightning_grpo.rewards.format_reward"],
        *["--trainer.callbacks+=command_lines.Announcer", "--trainer.callbacks.word", "hello"],
        *["--kl.stop_above_nats_per_token", "0.05", "--checkpoint.every_n_iterations", "7"],
    )
    assert set(SECTIONS) | {"run", "model", "data", "trainer"} <= set(config)
    assert config["model"]["algorithm"]["class_path"] == "lightning_grpo.GRPO"
    assert config["model"]["algorithm"]["init_args"]["clip_high"] == 0.28
    assert config["model"]["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert config["model"]["optimizer"]["init_args"]["lr"] == 0.002
    assert config["rollout"]["group_size"] == 5
    assert [name.split(".")[-1] for name in config["reward"]["functions"]] == [
        "sorted_exactly",
        "format_reward",
    ]
    assert config["trainer"]["callbacks"] == [
        {
            "class_path": "command_lines.Announcer",
            "init_args": {"word": "hello", "times": 1},
        }
    ]
    assert config["kl"]["stop_above_nats_per_token"] == 0.05
    assert config["checkpoint"]["every_n_iterations"] == 7


def test_later_files_win_over_earlier_ones_and_options_over_files(capsys, char_model):
    first = write_config(char_model)
    Path("second.yaml").write_text("rollout: {group_size: 6, temperature: 0.5}\n")
    config = printed_config(
        capsys, "fit", "--config", first, "--config", "second.yaml", "--rollout.temperature", "0.7"
    )
    assert config["rollout"]["group_size"] == 6
    assert config["rollout"]["temperature"] == 0.7
    assert config["rollout"]["max_completion_tokens"] == 4
    assert config["cold_start"]["num_steps"] == 0  # nothing of the quickstart


def test_help_names_every_option_with_its_description(capsys):
    with pytest.raises(SystemExit) as stop:
        run("fit", "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: python -m lightning_grpo fit [--config FILE] [options]\n")
    words = " ".join(text.split())
    for option, description in (
        ("--rollout.group_size", "G, completions per prompt in training."),
        ("--model.beta", "weight of the KL to the reference; 0 loads no reference."),
        ("--run.name", "folder of runs of one kind"),
        ("--replay.num_epochs", "K, passes over each rollout."),
        ("--checkpoint.monitor", "validation metric that decides which checkpoint is best-*"),
    ):
        assert option in words and description in words


def test_a_data_file_on_the_command_line_is_not_read_as_arguments(capsys, char_model):
    config = write_config(char_model)
    Path("rows.csv").write_text("prompt,answer\n" + "".join(f"{i}=,{i}\n" for i in range(8)))
    Path("one.jsonl").write_text('{"prompt": "1=", "completion": "1"}\n')
    options = ["--data.train_data", "rows.csv", "--cold_start.demonstrations", "one.jsonl"]
    printed = printed_config(capsys, "fit", "--config", config, *options)
    assert printed["data"]["train_data"] == "rows.csv"
    assert printed["cold_start"]["demonstrations"] == "one.jsonl"
    run("fit", "--config", config, *options, "--cold_start.num_steps", "1")
    assert find_checkpoint("last", Run(name="small"))


# What a run leaves behind


def test_a_fit_writes_its_files_and_calls_callbacks_of_the_user(capsys, char_model):
    config = write_config(char_model)
    Path("callbacks.yaml").write_text(
        "trainer: {callbacks: [{class_path: command_lines.Announcer, init_args: {word: yaml}}]}\n"
    )
    options = ["--trainer.callbacks+=command_lines.Announcer", "--trainer.callbacks.times=2"]
    run("fit", "--config", config, "--config", "callbacks.yaml", *options)
    names = {path.name for path in VERSION_0.rglob("*") if path.is_file()}
    assert {"metrics.csv", "config.yaml"} <= names
    checkpoints = sorted(path.name for path in (VERSION_0 / "checkpoints").iterdir())
    assert checkpoints == ["best-000004", "last-000004"]
    assert any(name.startswith("events.out.tfevents") for name in names)
    out, err = capsys.readouterr()
    announced = [line for line in out.splitlines() if line.startswith("ANNOUNCED")]
    assert announced == ["ANNOUNCED yaml 1 8", "ANNOUNCED iteration 2 8"] * 2
    assert "2 iterations, 4 optimizer steps (0 skipped), 16 completions" in out
    assert "val/pass_at_1" in out and f"checkpoint  {VERSION_0}/checkpoints/last-000004" in out
    assert "iteration 2/2 reward" in err
    saved = yaml.safe_load((VERSION_0 / "config.yaml").read_text())
    assert saved["trainer"]["callbacks"][1]["init_args"] == {"word": "iteration", "times": 2}
    assert [step for step, _ in train_rows(VERSION_0 / "metrics.csv", "policy/loss")] == [
        0,
        1,
        2,
        3,
    ]


def test_the_saved_configuration_makes_the_same_run_again(char_model):
    run("fit", "--config", write_config(char_model))
    run("fit", "--config", str(VERSION_0 / "config.yaml"))
    first = train_rows(VERSION_0 / "metrics.csv", "policy/loss")
    assert first == train_rows(Path("runs/small/version_1/metrics.csv"), "policy/loss")


def test_fast_dev_run_as_a_module_needs_no_network_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "lightning_grpo", "fit", "--trainer.fast_dev_run", "true"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--cold_start.num_steps", "2"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


# Resume


def test_a_resumed_run_goes_on_in_its_folder_as_if_it_had_not_stopped(char_model):
    config = write_config(char_model, validation={"at_end": False})
    run("fit", "--config", config, "--trainer.max_steps", "8", "--run.name", "whole")
    run("fit", "--config", config)
    run("fit", "--config", config, "--ckpt_path", "last", "--trainer.max_steps", "8")
    assert [path.name for path in Path("runs/small").iterdir()] == ["version_0"]
    assert (VERSION_0 / "config.yaml").exists()
    resumed = yaml.safe_load((VERSION_0 / "config_resume_1.yaml").read_text())
    assert resumed["trainer"]["max_steps"] == 8
    whole = Path("runs/whole/version_0/metrics.csv")
    for column in ("policy/loss", "policy/grad_norm", "reward/mean"):
        rows = train_rows(VERSION_0 / "metrics.csv", column)
        assert rows == train_rows(whole, column)
    assert [step for step, _ in train_rows(whole, "policy/loss")] == list(range(8))


@pytest.mark.parametrize("name", ["iteration-000002", "best-000004"])
def test_a_resume_at_an_earlier_checkpoint_drops_the_rows_behind_it(char_model, name):
    config = write_config(
        char_model,
        checkpoint={"keep_every_n_iterations": 1, "monitor": "val/completion_tokens"},
        validation={"at_start": False, "at_end": False},
    )
    options = ["--trainer.max_steps", "6", "--trainer.val_check_interval", "4"]
    run("fit", "--config", config, *options)
    before = train_rows(VERSION_0 / "metrics.csv", "policy/loss")
    checkpoint = VERSION_0 / "checkpoints" / name
    saved_step = read_saved(checkpoint)["global_step"]
    assert saved_step == int(name[-6:])
    run("fit", "--config", config, "--ckpt_path", str(checkpoint), *options)
    assert train_rows(VERSION_0 / "metrics.csv", "policy/loss") == before


def test_a_resume_without_a_configuration_takes_that_of_the_run(capsys, char_model):
    run("fit", "--config", write_config(char_model, model={"beta": 0.125}))
    Path("config.yaml").unlink()
    options = ["--run.name", "small", "--ckpt_path", "last", "--trainer.max_steps", "6"]
    run("fit", *options)
    resumed = yaml.safe_load((VERSION_0 / "config_resume_1.yaml").read_text())
    assert resumed["model"]["beta"] == 0.125
    assert resumed["trainer"]["max_steps"] == 6


def resumed_state(*options: str) -> dict:
    run("fit", "--config", "config.yaml", "--ckpt_path", "last", *options)
    return read_saved(VERSION_0 / "checkpoints/last")


def test_options_win_over_what_the_checkpoint_was_made_with(char_model):
    run("fit", "--config", write_config(char_model))
    options = ["--trainer.max_steps", "6", "--rollout.group_size", "4", "--model.beta", "0.5"]
    optimizer = ["--model.optimizer.lr", "5e-4", "--model.optimizer.weight_decay", "0.25"]
    state = resumed_state(*options, *optimizer)
    group, _ = state["optimizer_states"][0]["param_groups"]
    assert (group["lr"], group["initial_lr"], group["weight_decay"]) == (5e-4, 5e-4, 0.25)
    assert state["lr_schedulers"][0]["base_lrs"][0] == 5e-4
    assert state["lightning_grpo"]["beta"] == 0.5
    assert state["lightning_grpo"]["counters"]["completions"] == 2 * 4 * 2 + 4 * 4
    state = resumed_state("--trainer.max_steps", "8", "--model.beta", "0.5", *optimizer)
    assert state["lightning_grpo"]["beta"] == 0.5


def test_a_resume_keeps_what_the_run_has_adapted(char_model):
    model = {"beta": 0.25, "lr_schedule": "linear", "num_warmup_steps": 10}
    kl = {"target_nats_per_completion": 10.0, "horizon_completions": 50}
    run("fit", "--config", write_config(char_model, model=model, kl=kl))
    last = VERSION_0 / "checkpoints/last"
    before = read_saved(last)["lightning_grpo"]["beta"]
    assert before < 0.25
    state = resumed_state("--trainer.max_steps", "6", "--model.optimizer.lr", "2e-3")
    assert state["lightning_grpo"]["beta"] < before
    # Six of the ten steps of the warm-up are done, at the new rate.
    assert state["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(6 / 10 * 2e-3)


def test_ctrl_c_in_the_middle_saves_and_the_run_goes_on(caplog, char_model):
    config = write_config(char_model)
    interrupt = ["--trainer.callbacks+=command_lines.Interrupter", "--trainer.callbacks.step", "3"]
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        run("fit", "--config", config, "--trainer.max_steps", "8", *interrupt)
    signal.signal(signal.SIGINT, handler)
    assert stop.value.code == 1
    last = VERSION_0 / "checkpoints/last-000003"
    assert f"stopped at step 3; resume with --ckpt_path {last}" in caplog.text
    run("fit", "--config", config, "--ckpt_path", str(last), "--trainer.max_steps", "8")
    steps = [step for step, _ in train_rows(VERSION_0 / "metrics.csv", "policy/loss")]
    assert steps == list(range(8))


def test_a_process_that_gets_sigint_writes_a_checkpoint(tmp_path, char_model):
    config = write_config(char_model)
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_grpo", "fit", "--config", config]
        + ["--trainer.max_steps", "100000"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    events = Path("runs/small/version_0/metrics.csv")
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if events.exists() and len(train_rows(events, "policy/loss")) > 2:
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1, out
    assert "Traceback" not in out
    checkpoint = read_saved(VERSION_0 / "checkpoints/last")
    assert checkpoint["global_step"] >= 2


def test_sigterm_saves_and_is_no_success(char_model):
    terminate = "--trainer.callbacks+=command_lines.Terminator"
    with pytest.raises(SystemExit) as stop:
        run("fit", "--config", write_config(char_model), "--trainer.max_steps", "8", terminate)
    assert stop.value.code == 143
    checkpoint = read_saved(VERSION_0 / "checkpoints/last")
    assert checkpoint["global_step"] == 2


def test_other_data_and_another_model_are_refused_on_resume(tmp_path, char_model):
    config = write_config(char_model)
    run("fit", "--config", config)
    resume = ["fit", "--config", config, "--ckpt_path", "last", "--trainer.max_steps", "6"]
    write_jsonl("other.jsonl", [{"prompt": f"{i}=", "answer": "1"} for i in range(16)])
    metrics = (VERSION_0 / "metrics.csv").read_text()
    with pytest.raises(SystemExit, match="other training prompts: prompts_sha256"):
        run(*resume, "--data.train_data", "other.jsonl")
    assert (VERSION_0 / "metrics.csv").read_text() == metrics
    from lightning_grpo.tools.tiny_model import write_tiny_model

    alphabet = "0123456789= abcdefghijklmnopqrstuvwxyz"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2}
    write_tiny_model("same_shape", characters=alphabet, max_positions=64, seed=1, **sizes)
    with pytest.raises(SystemExit, match="made with another base model .model.name_or_path"):
        run(*resume, "--model.name_or_path", "same_shape")


def test_a_checkpoint_that_is_not_there_never_means_a_new_run(char_model):
    config = write_config(char_model)
    for name, message in (
        ("last", "no run in runs/small has a checkpoint of that kind"),
        ("best", "no run in runs/small has a checkpoint of that kind"),
        ("nowhere", "there is no such checkpoint"),
    ):
        with pytest.raises(SystemExit, match=f"error: --ckpt_path {name}: .*{message}"):
            run("fit", "--config", config, "--ckpt_path", name)
    assert not Path("runs").exists()


# Measuring a checkpoint


def test_validate_test_and_predict_measure_a_checkpoint_with_the_configuration_of_its_run(
    capsys, char_model
):
    run("fit", "--config", write_config(char_model))
    Path("config.yaml").unlink()
    metrics = (VERSION_0 / "metrics.csv").read_text()
    last = str(VERSION_0 / "checkpoints/last")
    after = train_rows(VERSION_0 / "metrics.csv", "val/reward")[-1][1]
    capsys.readouterr()
    run("validate", "--ckpt_path", last)
    assert "val/pass_at_1" in capsys.readouterr().out
    validated = train_rows(VERSION_0 / "validate/metrics.csv", "val/reward")
    assert [value for _, value in validated] == [after]
    run("test", "--ckpt_path", last, "--data.test_data", "val.jsonl")
    tested = train_rows(VERSION_0 / "test/metrics.csv", "test/reward")
    assert [value for _, value in tested] == [after]
    assert (VERSION_0 / "metrics.csv").read_text() == metrics


def test_predict_writes_a_line_of_json_per_completion(char_model):
    run("fit", "--config", write_config(char_model))
    last = str(VERSION_0 / "checkpoints/last")
    run("predict", "--ckpt_path", last, "--data.predict_data", "val.jsonl")
    lines = (VERSION_0 / "predict/predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["prompt"] for row in rows] == [
        "00=",
        "00=",
        "17=",
        "17=",
        "24=",
        "24=",
        "31=",
        "31=",
    ]
    assert [row["answer"] for row in rows] == ["0", "0", "1", "1", "2", "2", "3", "3"]
    for row in rows:
        assert isinstance(row["completion"], str) and row["logprob"] < 0
        assert 1 <= row["num_tokens"] <= 4
        assert row["is_truncated"] is (row["num_tokens"] == 4) or not row["is_truncated"]


# Errors


def test_a_mendable_error_is_one_last_line_and_its_traceback_is_a_variable_away(
    monkeypatch, char_model
):
    config = write_config(char_model)
    with pytest.raises(SystemExit) as stop:
        run("fit", "--config", config, "--rollout.group_size", "1")
    assert str(stop.value.code).splitlines()[-1].startswith("error: rollout.group_size is 1")
    monkeypatch.setenv("LIGHTNING_GRPO_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"rollout\.group_size is 1"):
        run("fit", "--config", config, "--rollout.group_size", "1")


def test_an_error_in_code_of_the_user_keeps_its_traceback(char_model):
    failer = "--trainer.callbacks+=command_lines.Failer"
    with pytest.raises(ValueError, match="an error of the user's own"):
        run("fit", "--config", write_config(char_model), failer)


def test_an_interval_that_lightning_refuses_is_one_line(char_model):
    with pytest.raises(SystemExit, match="val_check_interval"):
        run("fit", "--config", write_config(char_model), "--trainer.val_check_interval", "40")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--rollout.group_sise", "4"], "unrecognized arguments: --rollout.group_sise"),
        (["--rollout.engine", "vlmm"], 'Parser key "rollout.engine"'),
        (["--model.algorithm.clip_hihg", "0.3"], "Option 'clip_hihg' is not accepted"),
        (
            ["--trainer.callbacks+=command_lines.NoCallback"],
            "not correspond to a subclass of Callback",
        ),
        (["--trainer.callbacks+=command_lines.Nothing"], "no attribute 'Nothing'"),
        (["--reward.functions", "[command_lines.nothing]"], 'Parser key "reward.functions"'),
        (["--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_an_option_that_does_not_exist_is_named_in_a_few_lines(capsys, char_model, args, message):
    assert not hasattr(command_lines, "Nothing")
    with pytest.raises(SystemExit) as stop:
        run("fit", "--config", write_config(char_model), *args)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) < 20


def test_an_unknown_key_in_a_file_is_named(capsys, char_model):
    config = write_config(char_model, rollout={"group_sise": 4})
    with pytest.raises(SystemExit) as stop:
        run("fit", "--config", config)
    assert stop.value.code == 2
    assert "group_sise" in capsys.readouterr().err


def test_the_number_of_threads_is_set(char_model):
    before = torch.get_num_threads()
    try:
        config = write_config(char_model)
        run("fit", "--config", config, "--run.num_threads", "2", "--trainer.fast_dev_run=1")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_resume_that_fails_to_start_leaves_the_run_as_it_was(char_model):
    config = write_config(char_model)
    run("fit", "--config", config)
    last = VERSION_0 / "checkpoints/last"
    files = {path: path.read_bytes() for path in VERSION_0.rglob("*") if path.is_file()}
    # Some of these fail when a part of the checkpoint is restored already.
    for options in (["--model.lora.rank", "4"], ["--data.seed", "7"], ["--model.beta", "x"]):
        with pytest.raises(SystemExit):
            run("fit", "--ckpt_path", str(last), "--trainer.max_steps", "8", *options)
        kept = {path: path.read_bytes() for path in VERSION_0.rglob("*") if path.is_file()}
        assert {path: kept.get(path) for path in files} == files
        assert not [path for path in kept if path.name.startswith("config_resume")]
    run("fit", "--ckpt_path", str(last), "--trainer.max_steps", "8")
    assert read_saved(last)["global_step"] == 8


def test_the_option_of_the_readme_names_a_reward(char_model):
    config = write_config(char_model)
    reward = "--reward.functions=[command_lines.short]"
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert "--reward.functions='[my_rewards.short_and_right]'" in readme
    run("fit", "--config", config, "--trainer.max_steps", "1", reward)
    assert train_rows(VERSION_0 / "metrics.csv", "reward/short")


def test_processes_that_the_trainer_does_not_count_are_refused(char_model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        run("fit", "--config", write_config(char_model))
    assert "2 processes were launched, but the Trainer has 1" in str(stop.value.code)


def test_an_option_of_a_tool_may_be_spelled_with_hyphens_and_stand_alone_when_it_is_on():
    assert with_flags([], export) == []
    given = ["--ckpt-path", "a-b", "--dry-run", "--push-to-hub=me/a-b", "--public"]
    expected = ["--ckpt_path", "a-b", "--dry_run", "true", "--push_to_hub=me/a-b"]
    assert with_flags(given, export) == [*expected, "--public", "true"]
    assert with_flags(["--public", "false"], export) == ["--public", "false"]
    assert with_flags(["--no-such", "x"], export) == ["--no-such", "x"]

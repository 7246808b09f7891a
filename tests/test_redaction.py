"""Secrets land nowhere, and code of others is not run."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_lines import run, write_config
from saved import read_saved
from saved_runs import change_config, write_model, write_run

from lightning_grpo.adapters import Lora
from lightning_grpo.console import redact_tracebacks
from lightning_grpo.redaction import redacted, refuse_secrets
from lightning_grpo.tools.export import export

CANARY = "hf_CanaryCanaryCanary12"
SPELLINGS = ("CanaryCanary", "CANARYCANARY", "canarycanary")
SECRETS = {
    "HF_TOKEN": CANARY,
    "AWS_SECRET_ACCESS_KEY": "CanaryCanary/of+aws",
    "WANDB_API_KEY": "canarycanary0123",
}


def files_with_a_canary(folder: Path) -> list[str]:
    """Files whose content has the canary, as it is or inside other bytes."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            if any(spelling.encode() in content for spelling in SPELLINGS):
                found.append(str(path))
    return found


def test_secrets_of_the_environment_are_in_no_file_of_a_run_or_an_export(
    char_model, tmp_path: Path, monkeypatch, capfd
):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    run("fit", "--config", write_config(char_model, trainer={"max_steps": 2}))
    run_dir = Path("runs/small/version_0")
    run("export", "--ckpt_path", str(run_dir / "checkpoints" / "last"), "--out", "out")
    with pytest.raises(SystemExit):
        run("export", "--ckpt_path", f"{run_dir}/{CANARY}", "--out", "other")
    for path in (run_dir / "config.yaml", run_dir / "metrics.csv", Path("out/README.md")):
        assert path.exists()
    assert list(run_dir.glob("checkpoints/*")) and list(run_dir.glob("events.out*"))
    assert files_with_a_canary(tmp_path) == []
    said = "".join(capfd.readouterr())
    assert not any(spelling in said for spelling in SPELLINGS)


def telling_reward(completions: list[str], **columns: Any) -> list[float]:
    """A reward of a user whose service repeats the token in its error."""
    raise ConnectionError(f"refused: Authorization: Bearer {CANARY}")


def test_an_error_that_has_a_token_in_it_is_told_without_it(char_model, tmp_path: Path, capfd):
    reward = {"functions": ["test_redaction.telling_reward"]}
    with pytest.raises(SystemExit, match="refused: Authorization: Bearer <hidden>"):
        run("fit", "--config", write_config(char_model, reward=reward))
    assert files_with_a_canary(tmp_path) == []
    assert not any(spelling in "".join(capfd.readouterr()) for spelling in SPELLINGS)


def test_a_traceback_that_ends_the_process_has_no_token_in_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    redact_tracebacks()
    try:
        raise RuntimeError(f"https://me:CanaryCanary@host said {CANARY} is wrong")
    except RuntimeError:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.endswith("RuntimeError: https://<hidden>@host said <hidden> is wrong\n")


LOGGER = {
    "class_path": "lightning.pytorch.loggers.CSVLogger",
    "init_args": {"save_dir": ".", "prefix": "sk-CanaryCanaryCanary"},
}


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"train_data": "https://me:CanaryCanary@host/train.jsonl"}},
        {"data": {"train_data": "https://host/train.jsonl?token=CanaryCanary"}},
        {"run": {"name": CANARY}},
        {"trainer": {"logger": [LOGGER]}},
    ],
    ids=["password", "query", "name", "logger"],
)
def test_an_option_with_a_secret_is_refused_and_not_repeated(changes, char_model, capfd):
    with pytest.raises(SystemExit, match="holds a token or a password") as caught:
        run("fit", "--config", write_config(char_model, **changes))
    assert "Canary" not in str(caught.value) + "".join(capfd.readouterr())
    assert not Path("runs").exists()


def test_a_secret_of_the_environment_is_refused_as_an_option(char_model, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_API_KEY", "plain words of canarycanary")
    with pytest.raises(SystemExit, match="data.system_prompt holds a token"):
        secret = {"system_prompt": "plain words of canarycanary"}
        run("fit", "--config", write_config(char_model, data=secret))


def test_tools_refuse_options_with_secrets():
    for option in ("--ckpt_path", "--out"):
        url = "s3://me:CanaryCanary@bucket/x"
        arguments = {"--ckpt_path": "x", "--out": "y", option: url}
        with pytest.raises(SystemExit, match=f"{option} holds a token") as caught:
            run("export", *(word for pair in arguments.items() for word in pair))
        assert "Canary" not in str(caught.value)
    with pytest.raises(SystemExit, match="holds a token"):
        run("memory", "--data.train_data", "https://me:CanaryCanary@host/train.jsonl")


def test_what_looks_like_a_secret_is_hidden(monkeypatch):
    hidden = {
        f"--token {CANARY} --x 1": "--token <hidden> --x 1",
        "--trainer.logger.api_key abcdef": "--trainer.logger.api_key <hidden>",
        "api_key: abcdef\nname: x": "api_key: <hidden>\nname: x",
        '{"password": "abcdef", "a": 1}': '{"password": "<hidden>", "a": 1}',
        "s3://key:secret@bucket/a": "s3://<hidden>@bucket/a",
        "https://h/a?X-Amz-Signature=abc&b=1": "https://h/a?X-Amz-Signature=<hidden>&b=1",
        "ghp_0123456789abcdef": "<hidden>",
    }
    assert {text: redacted(text) for text in hidden} == hidden
    kept = (
        "max_completion_tokens: 128",
        "tokenizer: some/folder",
        "the token cannot be read",
        "--model.tokenizer folder --rollout.max_completion_tokens 6",
        "git@host:repo, mail me@host",
        "s3://bucket/a@b:c",
    )
    assert [redacted(text) for text in kept] == list(kept)
    monkeypatch.setenv("MY_SECRET", "of this process")
    assert redacted("it says: of this process") == "it says: <hidden>"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "whatever it is")
    assert redacted("whatever it is") == "whatever it is"


def test_options_that_are_no_secrets_are_taken():
    refuse_secrets(
        {
            "rollout": {"stop_token": "<|im_end|>", "max_completion_tokens": 6},
            "model": {"tokenizer": "folder", "name_or_path": "sk-learn/model"},
            "eos_token": "endoftext",
            "callbacks": [{"init_args": {"repo_id": "me/model"}}],
        }
    )
    for secret in ({"a": [{"hub_token": "abcdefgh12345"}]}, {"password": "x"}):
        with pytest.raises(ValueError, match="holds a token or a password"):
            refuse_secrets(secret)


def test_redaction_takes_linear_time():
    for text in ("token" * 20_000, "://" + "a:" * 50_000, "--" + "a." * 50_000, "secret=" * 15_000):
        start = time.perf_counter()
        redacted(text)
        assert time.perf_counter() - start < 1.0


def test_a_card_has_no_secret_of_the_configuration_in_it(char_model: str):
    path = write_run(char_model)
    change_config(data={"train_data": "https://host/x?token=CanaryCanary"}, hub={"token": CANARY})
    export(path, "out")
    card = Path("out/README.md").read_text()
    assert "https://host/x?token=<hidden>" in card
    assert files_with_a_canary(Path("out")) == []


def test_code_in_a_models_folder_is_neither_run_nor_copied(tmp_path: Path, char_model: str):
    base = Path(write_model("qwen2", char_model, tmp_path / "m", is_tied=True))
    evil = f"open({str(tmp_path / 'sentinel')!r}, 'w').close()\n"
    (base / "evil.py").write_text(evil + "class Evil: pass\n")
    for name, keys in {
        "config.json": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
        "tokenizer_config.json": {"AutoTokenizer": ["evil.Evil", None]},
        "generation_config.json": {"AutoModel": "evil.Evil"},
    }.items():
        content = json.loads((base / name).read_text())
        content |= {"auto_map": keys, "custom_generate": "evil.Evil"}
        (base / name).write_text(json.dumps(content))
    path = write_run(str(base), lora=Lora(rank=2))
    export(path, "merged")
    export(path, "adapter", form="adapter")
    assert not (tmp_path / "sentinel").exists()
    for file in [*Path("merged").iterdir(), *Path("adapter").iterdir()]:
        assert file.suffix != ".py" and b"evil" not in file.read_bytes(), file


def test_what_a_configuration_names_is_not_imported_by_an_export(char_model: str, tmp_path: Path):
    sentinel = tmp_path / "sentinel"
    Path("evil.py").write_text(f"open({str(sentinel)!r}, 'w').close()\nclass Evil: pass\n")
    path = write_run(char_model)
    evil = {"class_path": "evil.Evil"}
    change_config(reward={"functions": ["evil.Evil"]}, trainer={"callbacks": [evil]})
    sys.path.insert(0, str(tmp_path))
    try:
        export(path, "out")
        config = Path("run/config.yaml")
        config.write_text(config.read_text() + "x: !!python/object/apply:evil.Evil []\n")
        with pytest.raises(yaml.YAMLError):
            export(path, "other")
    finally:
        sys.path.remove(str(tmp_path))
    assert not sentinel.exists() and not Path("other").exists()


def test_names_that_lead_out_of_a_folder_are_not_followed(char_model: str, tmp_path: Path):
    base = Path(write_model("llama", char_model, tmp_path / "m", is_tied=True))
    path = write_run(str(base), lora=Lora(rank=2))
    (base / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../secret.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names"):
        export(path, "out")
    assert not Path("out").exists()
    assert read_saved(path)["global_step"] == 4

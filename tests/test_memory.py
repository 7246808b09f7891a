from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import runs
import torch
from command_lines import run, write_config
from transformers import GPT2Config, Qwen2Config

from lightning_grpo.adapters import Lora
from lightning_grpo.critic import CriticSettings, critic_parameters, make_critic
from lightning_grpo.forward import forward_rows
from lightning_grpo.memory import run as memory_run
from lightning_grpo.memory.activations import PassShape, RunnableModels, measure_pass, run_pass
from lightning_grpo.memory.estimate import MemorySettings, estimate_memory
from lightning_grpo.memory.fit import advice, check_fits, nearest_that_fits
from lightning_grpo.memory.model import (
    build_on_meta,
    count_parameters,
    read_config,
    spec_from_config,
)
from lightning_grpo.memory.run import device_limit, is_far_below, refuse_what_cannot_fit
from lightning_grpo.memory.state import moment_bytes, state_bytes
from lightning_grpo.packing_check import settle_packing
from lightning_grpo.policy import load_policy
from lightning_grpo.reference import Reference
from lightning_grpo.tool_commands import split_overrides
from lightning_grpo.tools.memory import memory
from lightning_grpo.tools.run_config import ModelShape
from lightning_grpo.types import Rollout

CONFIGS = {
    "qwen2": Qwen2Config(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(
        n_embd=48,
        n_layer=3,
        n_head=4,
        vocab_size=90,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=1,
    ),
}


def rows_of(num_rows: int, num_prompt: int, num_completion: int) -> Rollout:
    prompt_mask = torch.ones(num_rows, num_prompt, dtype=torch.bool)
    prompt_mask[0, :2] = False
    completion = torch.randint(0, 80, (num_rows, num_completion))
    mask = torch.ones_like(completion, dtype=torch.bool)
    return Rollout(
        prompt_ids=torch.randint(0, 80, (num_rows, num_prompt)),
        prompt_mask=prompt_mask,
        completion_ids=completion,
        completion_mask=mask,
        action_mask=mask,
        sampler_logprobs=completion.float(),
        group_ids=torch.zeros(num_rows, dtype=torch.int64),
        truncated=mask[:, 0],
        prompts=[],
        completions=[],
        columns={},
    )


def bytes_of(tensors) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def measured(
    folder: str, spec, settings: MemorySettings, is_packed: bool = False
) -> dict[str, int]:
    """Bytes of a real update: real weights, real gradients, one step of a real AdamW."""
    policy = load_policy(
        folder,
        init="random",
        num_tokens=spec.config.vocab_size,
        lora=spec.lora,
        activation_checkpointing=spec.activation_checkpointing,
    ).train()
    settle_packing(policy, "auto" if is_packed else "off")
    assert policy.is_packing == is_packed
    reference = Reference(policy)
    critic = None if spec.critic is None else make_critic(spec.critic, policy, None).train()
    added = [] if critic is None else critic_parameters(critic, policy)
    own = [p for p in policy.parameters() if all(p is not q for q in added)]
    weights = {p.untyped_storage()._cdata for p in [*own, *added]}
    weights |= {b.untyped_storage()._cdata for b in policy.buffers()}
    weights |= {b.untyped_storage()._cdata for b in critic.buffers()} if critic else set()
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    rows = rows_of(settings.microbatch_rows, settings.prompt_tokens, settings.completion_tokens)
    if is_packed:
        first = torch.arange(len(rows)) // settings.group_size * settings.group_size
        mask = torch.ones_like(rows.prompt_mask)
        rows = rows.replace(group_ids=first, prompt_ids=rows.prompt_ids[first], prompt_mask=mask)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward = forward_rows(policy, critic, rows, temperature=1.0, entropy="detached")
        loss = forward.output.logprobs.exp().sum()
        if forward.values is not None:
            loss = loss + forward.values.square().sum()
    found = {"activations": bytes_of(kept.values())}
    loss.backward()
    optimizer = torch.optim.AdamW([p for p in [*own, *added] if p.requires_grad])
    optimizer.step()
    for name, parameters in (("policy", own), ("critic", added)):
        state = [t for p in parameters for t in optimizer.state.get(p, {}).values() if t.ndim]
        found[f"{name} weights"] = bytes_of(parameters)
        found[f"{name} gradients"] = bytes_of(p.grad for p in parameters if p.grad is not None)
        found[f"{name} optimizer moments"] = bytes_of(state)
    copies = reference.snapshot.copies.values() if reference.snapshot else []
    found["reference snapshot"] = bytes_of(copies)
    return found


@pytest.mark.parametrize(
    ("name", "form", "options", "tokens"),
    [
        ("qwen2", None, {}, (20, 30)),
        ("qwen2", "head", {"activation_checkpointing": True}, (20, 30)),
        ("qwen2", "separate", {}, (40, 100)),
        ("qwen2", "lora", {"lora": Lora(rank=4)}, (20, 30)),
        ("qwen2", None, {"lora": Lora(rank=4), "activation_checkpointing": True}, (10, 60)),
        ("gpt2", None, {"activation_checkpointing": True}, (20, 30)),
        ("gpt2", "head", {}, (20, 30)),
        ("gpt2", "separate", {"lora": Lora(rank=2)}, (5, 100)),
        ("gpt2", "lora", {"lora": Lora(rank=2)}, (20, 30)),
    ],
)
def test_the_estimate_agrees_with_tensors_counted_in_a_real_update(name, form, options, tokens):
    CONFIGS[name].save_pretrained("model")
    critic = None if form is None else CriticSettings(form, lora=Lora(rank=3))
    spec = spec_from_config(read_config("model"), critic=critic, **options)
    settings = MemorySettings(spec, *tokens, prompts=2, group_size=3)
    parts = estimate_memory(settings).parts
    real = measured("model", spec, settings)
    estimated = {part: max(row.values()) for part, row in parts.items()}
    estimated["activations"] = sum(
        estimated.get(f"{owner} activations", 0) for owner in ("policy", "critic")
    )
    assert settings.microbatch_rows == 6 and real["activations"] > 100_000
    for part, value in real.items():
        assert estimated.get(part, 0) == pytest.approx(value, rel=0.1), part
    # The weights of every part are counted to the byte.
    assert estimated["policy weights"] == real["policy weights"]
    assert estimated.get("critic weights", 0) == real["critic weights"]


@pytest.mark.parametrize(
    ("name", "form", "options"),
    [
        ("qwen2", None, {}),
        ("qwen2", "head", {"activation_checkpointing": True}),
        ("qwen2", "separate", {}),
        ("gpt2", None, {}),
        ("gpt2", "head", {"activation_checkpointing": True}),
    ],
)
@pytest.mark.parametrize(("tokens", "sizes"), [((20, 30), (2, 3)), ((60, 30), (4, 8))])
def test_the_activations_of_a_packed_update_agree_with_counted_ones(
    name, form, options, tokens, sizes
):
    CONFIGS[name].save_pretrained("model")
    critic = None if form is None else CriticSettings(form)
    spec = spec_from_config(read_config("model"), critic=critic, **options)
    prompts, group_size = sizes
    settings = MemorySettings(spec, *tokens, prompts=prompts, group_size=group_size, is_packed=True)
    parts = estimate_memory(settings).parts
    estimated = sum(
        max(parts.get(f"{owner} activations", {"update": 0}).values())
        for owner in ("policy", "critic")
    )
    real = measured("model", spec, settings, is_packed=True)["activations"]
    assert estimated == pytest.approx(real, rel=0.1)
    assert settings.microbatch_rows == prompts * group_size
    packed = prompts * tokens[0] + prompts * group_size * tokens[1]
    assert settings.packed_share == packed / (prompts * group_size * sum(tokens))


def test_a_cache_and_the_peak_of_an_update_agree_with_real_tensors():
    # See run_pass: with real tensors and no mode it follows real storages.
    spec = spec_from_config(CONFIGS["qwen2"])
    for is_autocast in (False, True):
        shape = PassShape(4, 16, 24, is_autocast=is_autocast)
        for kind in ("policy", "scoring", "rollout"):
            models = build_on_meta(spec)
            models.policy.to_empty(device="cpu")
            for parameter in models.policy.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
            real = run_pass(RunnableModels(models, contextlib.nullcontext()), shape, kind)
            assert tuple(measure_pass(spec, shape, kind)) == pytest.approx(tuple(real), rel=0.1)
    assert measure_pass(spec, shape, "scoring").weight_copies > 0
    # The last shape is under autocast, where the rotation of the keys makes the cache float32.
    assert measure_pass(spec, shape, "rollout").kept == 4 * (16 + 24) * 5 * 2 * 2 * 16 * 4


# Known figures


def test_seven_billion_parameters_take_what_is_known_of_them():
    def gb(value: float) -> float:
        return round(value / 1e9, 2)

    full = state_bytes(7.0e9, per_weight=2, has_master=True)
    assert [gb(part) for part in full] == [14.0, 14.0, 56.0, 28.0] and gb(full.total) == 112.0
    assert gb(state_bytes(7.0e9, per_weight=2, per_gradient=4).gradients) == 28.0
    assert gb(state_bytes(7.0e9, per_weight=2).total) == 84.0
    assert gb(state_bytes(7.0e9).total) == 112.0  # float32 under autocast: 4 + 4 + 8
    own_base = state_bytes(7.04e9, num_trainable=40e6, per_weight=2, per_trainable=4)
    assert gb(own_base.total) == 14.64
    assert gb(state_bytes(40e6).total) == 0.64
    assert state_bytes(3585).total == 57_360
    assert gb(state_bytes(7.0e9, per_weight=2, per_moments=2).moments) == 14.0


def test_the_shape_of_qwen_7b_is_counted_as_it_is():
    spec = spec_from_config(ModelShape().config(), dtype="bfloat16")
    shape = PassShape(4, 256, 256)
    assert count_parameters(spec).policy.weights == 2 * 7_615_616_512
    assert measure_pass(spec, shape, "rollout").kept == 57_344 * 4 * 512
    one, two = (measure_pass(spec.with_layers(n), shape, "policy").kept for n in (1, 2))
    assert (two - one) / (4 * 512) == pytest.approx(225e3, rel=0.1)
    settings = MemorySettings(replace(spec, critic=CriticSettings("head")), 256, 256, is_cuda=True)
    parts = estimate_memory(settings).parts
    assert parts["reference snapshot"]["rollout"] == 2 * 7_615_616_512
    head = sum(
        max(parts[f"critic {p}"].values()) for p in ("weights", "gradients", "optimizer moments")
    )
    assert head == 57_360
    lora = replace(spec, lora=Lora(rank=16), critic=CriticSettings("lora"))
    policy, critic = count_parameters(lora)
    assert policy.num_trainable == {torch.float32: 40_370_176}
    assert critic.num_trainable == {torch.float32: 40_370_176 + 3585}
    parts = estimate_memory(replace(settings, model=lora)).parts
    assert "reference snapshot" not in parts
    adapter = [
        max(parts[f"critic {p}"].values()) for p in ("weights", "gradients", "optimizer moments")
    ]
    assert sum(adapter) / 1e9 == pytest.approx(0.64, rel=0.02)
    separate = replace(spec, critic=CriticSettings("separate"))
    assert count_parameters(separate).critic.weights == 2 * 7_070_619_136 + 4 * 3585


def test_moments_are_those_that_the_optimizer_makes():
    assert moment_bytes(torch.optim.AdamW, torch.float32) == 8
    assert moment_bytes(torch.optim.AdamW, torch.bfloat16) == 4
    assert moment_bytes(lambda p: torch.optim.SGD(p, lr=0.1), torch.float32) == 0
    assert moment_bytes(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), torch.float32) == 4


# Phases and devices


def small(**options) -> MemorySettings:
    critic = options.pop("critic", None)
    spec = spec_from_config(CONFIGS["qwen2"], critic=CriticSettings(critic) if critic else None)
    spec = spec.with_layers(options.pop("layers", 2))
    defaults = {"prompt_tokens": 20, "completion_tokens": 40, "prompts": 8, "group_size": 8}
    few = {"prompts": 1, "group_size": 2}
    defaults |= few if options.pop("is_few", False) else {}
    return MemorySettings(spec, **defaults | options)


def test_nothing_is_held_in_a_phase_that_does_not_need_it():
    parts = estimate_memory(small()).parts
    weights = parts["policy weights"]["rollout"]
    assert parts["policy gradients"] == {
        "rollout": 0,
        "scoring": 0,
        "update": weights,
        "step": weights,
    }
    assert set(parts["policy optimizer moments"].values()) == {2 * weights}
    assert parts["KV cache"]["update"] == parts["policy activations"]["rollout"] == 0
    assert set(parts["reference snapshot"].values()) == {weights}
    assert parts["reference exchange"]["scoring"] == 300 * 64 * 4
    assert "reference snapshot" not in estimate_memory(small(has_reference=False)).parts
    assert "old policy snapshot" in estimate_memory(small(keeps_old_weights=True)).parts


def test_fsdp2_divides_and_ddp_adds_its_buckets():
    one = estimate_memory(small(is_cuda=True, layers=5)).parts
    ddp = estimate_memory(small(is_cuda=True, sharding="ddp", num_devices=4, layers=5)).parts
    fsdp = estimate_memory(small(is_cuda=True, sharding="fsdp2", num_devices=4, layers=5)).parts
    for part in (
        "policy weights",
        "policy gradients",
        "policy optimizer moments",
        "reference snapshot",
    ):
        assert ddp[part] == one[part]
        assert fsdp[part]["update"] == one[part]["update"] // 4
    assert set(ddp["DDP buckets"].values()) == {one["policy weights"]["update"]}
    gathered = fsdp["FSDP2 gathered layers"]
    assert gathered["rollout"] == one["policy weights"]["rollout"] > gathered["scoring"] > 0


def test_rows_of_a_microbatch_are_cut_as_the_replay_cuts_them():
    settings = small(microbatch_tokens=60 * 20)
    assert settings.row_tokens == 60 and settings.microbatch_rows == 16
    assert replace(settings, microbatch_tokens=60 * 5).microbatch_rows == 5
    assert replace(settings, microbatch_tokens=10).microbatch_rows == 1
    assert replace(settings, microbatch_tokens=10**6, num_minibatches=4).microbatch_rows == 16
    assert settings.rows_decoded == 64 and replace(settings, max_rows=10).rows_decoded == 10


# What does not fit


def test_what_does_not_fit_is_refused_with_the_nearest_change_that_would():
    settings = small(max_rows=1)
    estimate = estimate_memory(settings)
    check_fits(estimate, estimate.peak)
    half = replace(settings, microbatch_tokens=60 * 64 // 2)
    fitting = estimate_memory(half)
    with pytest.raises(ValueError, match="model.microbatch_tokens 1920: ") as refused:
        check_fits(estimate, fitting.peak)
    assert f"{estimate.peak / 1e9:.3f} GB" in str(refused.value)
    assert f"1920: {fitting.peak / 1e9:.3f} GB" in str(refused.value)
    assert "update phase" in str(refused.value)


def test_changes_are_looked_for_in_their_order_and_then_together():
    # The rollout takes most: only fewer rows help.
    rollout = small(microbatch_tokens=1, group_size=2, engine="transformers")
    limit = estimate_memory(replace(rollout, max_rows=8)).peak
    assert nearest_that_fits(rollout, limit)[0] == ["rollout.max_rows 8"]
    # The state of a separate critic takes most.
    state = small(is_few=True, microbatch_tokens=1, max_rows=1, critic="separate")
    limit = int(estimate_memory(replace(state, model=small().model)).peak * 1.05)
    assert nearest_that_fits(state, limit)[0] == ["model.critic.form head"]
    # One change alone is not enough.
    both = small(is_few=True, critic="separate")
    changes, found = nearest_that_fits(both, limit)
    assert len(changes) >= 2 and changes[0].startswith("model.microbatch_tokens")
    assert found.peak <= limit and found.settings.model.critic.form == "head"
    with pytest.raises(ValueError, match="take a smaller model"):
        check_fits(estimate_memory(small(prompts=1, group_size=2, microbatch_tokens=1)), 1000)


def test_more_devices_are_named_beside_adapters_and_only_on_gpus():
    settings = small(is_cuda=True, max_rows=1, microbatch_tokens=1)
    wide = ModelShape(256, 2, 4, 4, 1024, 512).config()
    settings = replace(settings, model=spec_from_config(wide))
    sharded = replace(settings, sharding="fsdp2", num_devices=4, prompts=2)
    limit = estimate_memory(sharded).peak
    text = advice(settings, limit)
    assert text.startswith("it would fit with model.lora.rank 16: ")
    assert text.endswith(
        f"; or with ModelParallelStrategy (FSDP2) on 4 devices: {limit / 1e9:.3f} GB"
    )
    assert "devices" not in advice(replace(settings, is_cuda=False), limit)


@pytest.mark.parametrize("options", [{}, {"critic": "separate", "keeps_old_weights": True}])
def test_the_bound_that_saves_a_measurement_is_above_the_estimate(options):
    settings = small(**options)
    assert not is_far_below(settings, estimate_memory(settings).peak)
    assert is_far_below(settings, 10**12)


def test_the_memory_of_a_cpu_is_shared_by_its_processes():
    limit = device_limit(torch.device("cpu"))
    assert limit > 10**8 and device_limit(torch.device("cpu"), 4) == limit // 4


class Refuser(L.Callback):
    def on_fit_start(self, trainer, module):
        refuse_what_cannot_fit(module, trainer)


def fit(char_model: str) -> None:
    module = runs.make_module(char_model, init="random")
    runs.make_trainer(max_steps=1, callbacks=[Refuser()]).fit(module, datamodule=runs.make_data())


def test_a_fit_is_refused_only_when_its_device_is_too_small(char_model, monkeypatch):
    fit(char_model)
    monkeypatch.setattr(memory_run, "device_limit", lambda *args: 1_500_000)
    with pytest.raises(
        ValueError, match=r"the run would need about .* GB on a device with 0.002 GB"
    ):
        fit(char_model)


def test_a_model_that_cannot_be_estimated_is_left_alone(char_model, monkeypatch):
    def fail(settings):
        raise RuntimeError("data dependent")

    monkeypatch.setattr(memory_run, "device_limit", lambda *args: 1)
    monkeypatch.setattr(memory_run, "estimate_memory", fail)
    fit(char_model)


# The tool


def test_the_tool_prints_tables_and_writes_numbers(capsys, char_model, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["__main__.py"])
    config = write_config(char_model)
    options = ["--rollout.max_rows", "2", "--model.beta=0", "--prompt_tokens", "9"]
    run("memory", "--config", config, *options, "--json", "numbers.json")
    text = capsys.readouterr().out
    for word in ("policy weights", "KV cache", "rollout", "peak", "PPO, separate", "Not counted"):
        assert word in text
    assert "reference" not in text and "2 rows decoded at a time" in " ".join(text.split())
    numbers = json.loads(Path("numbers.json").read_text())
    assert numbers["parts_bytes"]["KV cache"]["rollout"] == (9 + 2 * 4) * 2 * 2 * 32 * 4
    assert numbers["peak_bytes"] == max(numbers["total_bytes"].values())
    assert numbers["critics"]["PPO, lora"] is None
    assert numbers["critics"]["PPO, separate"]["peak_bytes"] > numbers["peak_bytes"]
    assert numbers["limit_bytes"] == device_limit(torch.device("cpu"))


def test_the_tool_is_a_function_too(char_model):
    found = memory(
        write_config(char_model),
        shape=ModelShape(64, 3, 4, 2, 128, 500),
        prompt_tokens=12,
        device_memory_gb=10,
        overrides=["--model.critic.form=head", "--model.optimizer=SGD", "--model.optimizer.lr=0.1"],
    )
    assert found.settings.model.num_layers == 3 and found.settings.model.critic.form == "head"
    assert (
        found.parts["policy weights"]["step"]
        == count_parameters(found.settings.model).policy.weights
    )
    assert "policy optimizer moments" not in found.parts


def test_an_error_of_the_tool_is_a_message(capsys, char_model, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["__main__.py"])
    for args in (["--prompt_tokens", "many"], ["--rollout.group_sizes", "3"]):
        with pytest.raises(SystemExit) as stop:
            run("memory", *args)
        assert stop.value.code == 2
        text = capsys.readouterr().err
        assert args[0].strip("-") in text and "usage" not in text and "Traceback" not in text


def test_options_of_fit_are_told_from_those_of_the_tool():
    given = [
        "--devices",
        "2",
        "--model.beta",
        "0",
        "--json=a",
        "--data.x=1",
        "--shape.hidden_size",
        "8",
    ]
    own, overrides = split_overrides(given, {"model", "data"})
    assert own == ["--devices", "2", "--json=a", "--shape.hidden_size", "8"]
    assert overrides == ["--model.beta", "0", "--data.x=1"]

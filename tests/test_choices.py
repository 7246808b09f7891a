"""What a run chooses from its machine or by checking itself: once, printed, and kept."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from distributed_runs import on_two_ranks, strategy_options
from runs import make_data, make_module, make_trainer

from lightning_grpo import choices
from lightning_grpo.choices import Choices, chosen_by_options
from lightning_grpo.generation import NativeEngine
from lightning_grpo.generation.cached_decoder import CachedDecoder
from lightning_grpo.memory import run as memory_run
from lightning_grpo.memory.estimate import estimate_memory
from lightning_grpo.memory.run import settings_of_run
from lightning_grpo.module import GRPOModule

STOPS = {"stop_strings": list("012345")}
LINE = (
    "choices: engine native (fused), packing on, token budget 16384, activation checkpointing off, "
    "old log-probs sampler"
)


def fit(model: str, *, ckpt_path: str | None = None, max_steps: int = 4, **options: Any) -> Any:
    """Iterations of two steps each."""
    module = options.pop("module", None) or make_module(model, **options.pop("model_options", {}))
    limits = {"max_steps": max_steps, "max_epochs": -1}
    trainer = make_trainer(num_minibatches=2, rollout=STOPS, **limits, **options)
    trainer.fit(module, datamodule=make_data(), ckpt_path=ckpt_path)
    return trainer, module


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    for module in (choices, memory_run):
        monkeypatch.setattr(module, "rank_zero_info", lines.append)
    monkeypatch.setattr("lightning_grpo.callbacks.replay.rank_zero_info", lines.append)
    return lines


@pytest.fixture
def saved(char_model, tmp_path: Path) -> str:
    """A checkpoint of a run on a machine with plenty of memory."""
    trainer, _ = fit(char_model, max_steps=2)
    trainer.save_checkpoint("saved.ckpt")
    return str(tmp_path / "saved.ckpt")


def give(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(memory_run, "memory_at_hand", lambda *args: num_bytes)


class Peaks(L.Callback):
    """What the run is estimated at, with its own choices and with activations recomputed."""

    def on_fit_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        settings = settings_of_run(module, trainer)
        self.plain, self.recomputed = (
            estimate_memory(
                replace(settings, model=replace(settings.model, activation_checkpointing=is_on))
            ).peak
            for is_on in (False, True)
        )


def test_options_count_more_than_a_checkpoint_and_that_more_than_what_is_found():
    options = chosen_by_options("auto", True, "auto", "recompute")
    assert options == Choices(is_checkpointing=True, old_logprobs="recompute")
    checkpoint = Choices("cached", False, 4096, False, "sampler")
    found = Choices("fused", True, 16384, False, None)
    assert options.over(checkpoint.over(found)) == Choices("cached", False, 4096, True, "recompute")
    assert Choices().over(found) == found
    off = chosen_by_options(512, False, "off", "auto")
    assert off.over(found) == Choices("fused", False, 512, False, None)


def test_a_budget_of_nothing_is_refused(char_model):
    with pytest.raises(ValueError, match="model.microbatch_tokens must be >= 1, got 0"):
        make_module(char_model, microbatch_tokens=0)


def test_a_run_prints_its_choices_once_and_saves_them(char_model, printed, tmp_path: Path):
    trainer, module = fit(char_model)
    assert module.counters.iterations == 2
    assert [line for line in printed if line.startswith("choices")] == [LINE]
    trainer.save_checkpoint("some.ckpt")
    record = torch.load("some.ckpt", weights_only=True)["lightning_grpo"]["choices"]
    assert Choices(**record) == Choices("fused", True, 16384, False, "sampler") == module.choices


def test_what_is_set_explicitly_is_printed_too(char_model, printed):
    options = {"packing": "off", "microbatch_tokens": 99, "activation_checkpointing": True}
    trainer = make_trainer(rollout=STOPS | {"engine": "transformers"}, max_steps=1)
    module = make_module(char_model, **options)
    trainer.fit(module, datamodule=make_data())
    assert printed[-1] == (
        "choices: engine transformers, packing off, token budget 99, activation checkpointing on, "
        "old log-probs none needed"
    )
    assert module.policy.is_checkpointing_activations and not module.policy.is_packing


def test_activations_are_recomputed_where_the_memory_asks_for_it(char_model, printed, monkeypatch):
    peaks = Peaks()
    fit(char_model, callbacks=[peaks], max_steps=2, model_options={"check_memory": False})
    assert peaks.recomputed < peaks.plain
    for limit, is_on in ((peaks.plain, False), (peaks.plain - 1, True), (peaks.recomputed, True)):
        give(monkeypatch, limit)
        _, module = fit(char_model, max_steps=1)
        assert module.policy.is_checkpointing_activations == is_on
        assert module.choices == Choices("fused", True, 16384, is_on, "sampler")
        assert any(line.startswith("memory: a token budget of 16384 with") for line in printed)
    give(monkeypatch, peaks.plain - 1)
    _, module = fit(char_model, max_steps=1, model_options={"activation_checkpointing": False})
    assert not module.policy.is_checkpointing_activations
    assert module.microbatch_tokens < 16384


def test_a_resumed_run_keeps_its_choices_on_another_machine(char_model, saved, monkeypatch):
    give(monkeypatch, 1)  # for which a new run recomputes, in the smallest parts
    _, module = fit(char_model, max_steps=1)
    assert module.choices.is_checkpointing and module.choices.microbatch_tokens == 1024
    _, module = fit(char_model, ckpt_path=saved)
    assert module.counters.iterations == 2
    assert module.choices == Choices("fused", True, 16384, False, "sampler")
    assert not module.policy.is_checkpointing_activations
    options = {"microbatch_tokens": 2048, "old_logprobs": "recompute", "packing": "off"}
    _, module = fit(char_model, ckpt_path=saved, model_options=options)
    assert module.choices == Choices("fused", False, 2048, False, "recompute")
    assert not module.policy.is_packing


def test_a_run_that_recomputed_activations_goes_on_so(char_model, tmp_path: Path, monkeypatch):
    give(monkeypatch, 1)
    trainer, first = fit(char_model, max_steps=2)
    trainer.save_checkpoint("small.ckpt")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    _, module = fit(char_model, ckpt_path="small.ckpt")
    assert module.choices == first.choices and module.microbatch_tokens == 1024
    assert module.policy.is_checkpointing_activations


def test_a_resumed_run_that_does_not_fit_any_more_is_refused_with_the_option_to_set(
    char_model, saved, monkeypatch
):
    peaks = Peaks()
    fit(char_model, callbacks=[peaks], max_steps=1, model_options={"check_memory": False})
    limit = (peaks.plain + peaks.recomputed) // 2
    give(monkeypatch, limit)
    monkeypatch.setattr(memory_run, "device_limit", lambda *args: limit)
    fit(char_model, max_steps=1)  # a new run takes what fits
    with pytest.raises(ValueError, match="it would fit with model.microbatch_tokens"):
        fit(char_model, ckpt_path=saved)
    fit(char_model, ckpt_path=saved, model_options={"check_memory": False})
    fit(char_model, ckpt_path=saved, model_options={"activation_checkpointing": True})


def edited(path: str, **changes: Any) -> str:
    """The checkpoint with other choices."""
    content = torch.load(path, weights_only=True)
    content["lightning_grpo"]["choices"].update(changes)
    torch.save(content, "edited.ckpt")
    return "edited.ckpt"


def test_the_decoder_and_the_packing_of_a_checkpoint_are_kept(char_model, saved, printed):
    path = edited(saved, decoder="cached", is_packing=False, old_logprobs="recompute")
    _, module = fit(char_model, ckpt_path=path)
    assert module.engine.decoder_name == "cached"
    assert not module.policy.is_packing
    assert "engine native (cached), packing off" in printed[-1]
    assert printed[-1].endswith("old log-probs recompute")
    _, module = fit(char_model, ckpt_path=edited(saved, decoder="transformers"))
    assert module.engine.decoder_name == "transformers"
    assert "engine transformers, in place of native" in printed[-1]


def test_choices_of_a_checkpoint_that_do_not_work_here_are_named(char_model, saved, monkeypatch):
    with pytest.warns(UserWarning, match="decoder of the run that is resumed .* fused takes its"):
        _, module = fit(char_model, ckpt_path=edited(saved, decoder="of another machine"))
    assert module.choices.decoder == "fused"
    with pytest.warns(UserWarning, match="old log-probs from its sampler, .* does not allow"):
        _, module = fit(char_model, ckpt_path=saved, precision="bf16-mixed")
    assert module.choices.old_logprobs == "recompute"
    monkeypatch.setattr(choices, "settle_packing", lambda *args: None)  # finds that it cannot
    with pytest.warns(UserWarning, match="forwarded prompts packed, which .* cannot"):
        _, module = fit(char_model, ckpt_path=saved)
    assert module.choices.is_packing is False and not module.policy.is_packing


def test_a_validation_uses_the_decoder_of_the_run(char_model, saved):
    path, data = edited(saved, decoder="cached"), make_data(val_data=[{"prompt": "1="}])
    names = []
    for ckpt_path in (path, None):
        module, trainer = make_module(char_model), make_trainer(rollout=STOPS)
        trainer.validate(module, data, ckpt_path=ckpt_path, verbose=False)
        names.append(module.engine.decoder_name)
    assert names == ["cached", "fused"]
    # A fit after a validation does as its checkpoint says.
    fit(char_model, ckpt_path=path, module=module)
    assert module.engine.decoder_name == "cached" and module.policy.is_packing


def choose_on_this_rank(model: str) -> Choices:
    """Rank 1 has less memory, and a decoder and a packed forward that do not work."""
    rank = int(os.environ["LOCAL_RANK"])
    memory_run.memory_at_hand = lambda *args: 1 if rank else 10**12
    if rank:
        choices.settle_packing = lambda *args: None
        build = NativeEngine.__init__

        def build_without_fused(self: NativeEngine, *args: Any, **options: Any) -> None:
            build(self, *args, **options)
            self.decoders = {"fused": refuse, "cached": CachedDecoder}

        NativeEngine.__init__ = build_without_fused
    _, module = fit(model, max_steps=2, **strategy_options("ddp"))
    return module.choices


def refuse(*args: Any) -> Any:
    raise NotImplementedError("not on this rank")


def test_ranks_choose_together_what_works_on_all(char_model, tmp_path: Path):
    first, second = on_two_ranks(choose_on_this_rank, tmp_path, char_model)
    assert first == second == Choices("cached", False, 1024, True, "sampler"), first

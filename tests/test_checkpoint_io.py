"""Lightning saves to checkpoint folders and resumes from them; optimizers keep parameter names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from runs import make_data, make_module, make_trainer
from test_checkpoint_store import equal

from lightning_grpo.checkpoints import list_checkpoints
from lightning_grpo.checkpoints.io import FolderCheckpointIO
from lightning_grpo.checkpoints.optimizer_names import parameter_names, with_names, with_numbers


class InFolders(Checkpoint):
    """Stores what Lightning saves in folders: once after two iterations, behind all callbacks."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.given: dict[str, Any] = {}

    def setup(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        trainer.strategy.checkpoint_io = FolderCheckpointIO()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        if self.path and not module.queue and module.counters.iterations == 2:
            trainer.save_checkpoint(self.path, weights_only=False)

    def on_save_checkpoint(self, trainer: L.Trainer, module: Any, checkpoint: Any) -> None:
        self.given = copy.deepcopy(checkpoint)


def fit(model: str, *, save_to: Path | None = None, resume_from: Path | None = None) -> Any:
    """4 iterations of 2 minibatches."""
    in_folders = InFolders(save_to)
    trainer = make_trainer(
        callbacks=[in_folders],
        enable_checkpointing=True,
        num_minibatches=2,
        max_epochs=-1,
        max_steps=8,
    )
    module = make_module(model, lr_schedule="cosine", beta=0.1, learning_rate=1e-2)
    trainer.fit(module, make_data(), ckpt_path=resume_from)
    return trainer, module, in_folders.given


def test_a_run_saved_to_a_folder_goes_on_to_the_same_bits(char_model, tmp_path: Path):
    folder = tmp_path / "checkpoints"
    whole, module, given = fit(char_model, save_to=folder / "last-000004")
    back = FolderCheckpointIO().load_checkpoint(folder / "last")
    # Callbacks are asked before the module, which adds its own key.
    assert equal({name: back[name] for name in given}, given)
    assert back.keys() - given.keys() == {"lightning_grpo"}
    assert {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks"} <= back.keys()
    manifest = list_checkpoints(folder)[0].manifest
    assert (manifest.kind, manifest.step, manifest.iteration) == ("last", 4, 2)
    resumed, resumed_module, _ = fit(char_model, resume_from=folder / "last-000004")
    assert equal(dict(resumed_module.state_dict()), dict(module.state_dict()))
    states = [trainer.optimizers[0].state_dict() for trainer in (whole, resumed)]
    assert equal(*states)
    data = make_data(val_data=[{"prompt": "1=", "answer": "1"}])
    metrics = resumed.validate(resumed_module, data, ckpt_path=folder / "last", verbose=False)
    assert "val/reward" in metrics[0]
    assert equal(dict(resumed_module.state_dict()), back["state_dict"])


class Net(torch.nn.Module):
    def __init__(self, names: str) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, torch.nn.Parameter(torch.ones(2) * ord(name)))


def adam(net: Net, *groups: str) -> torch.optim.Optimizer:
    named = dict(net.named_parameters())
    return torch.optim.AdamW(
        [{"params": [named[name] for name in group], "lr": 0.1} for group in groups]
    )


def stepped(net: Net, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    sum((p * ord(name)).sum() for name, p in net.named_parameters()).backward()
    optimizer.step()
    return optimizer


def test_moments_find_their_parameters_by_name():
    net, other = Net("abc"), Net("cab")
    optimizer = stepped(net, adam(net, "ab", "c"))
    names = parameter_names(optimizer, net.named_parameters())
    assert names == ["a", "b", "c"]
    saved = with_names(optimizer.state_dict(), names)
    assert [group["params"] for group in saved["param_groups"]] == [["a", "b"], ["c"]]
    assert saved["state"].keys() == {"a", "b", "c"}
    fresh = adam(other, "ba", "c")
    fresh.load_state_dict(with_numbers(saved, parameter_names(fresh, other.named_parameters())))
    first, second = dict(net.named_parameters()), dict(other.named_parameters())
    for name in "abc":
        moments = [o.state[p[name]]["exp_avg"] for o, p in ((optimizer, first), (fresh, second))]
        assert torch.equal(*moments) and moments[0][0] == pytest.approx(0.1 * ord(name))


def test_an_empty_group_stays_empty():
    net = Net("ab")
    optimizer = stepped(net, adam(net, "ab", ""))
    names = parameter_names(optimizer, net.named_parameters())
    saved = with_names(optimizer.state_dict(), names)
    assert [group["params"] for group in saved["param_groups"]] == [["a", "b"], []]
    fresh = adam(net, "ab", "")
    fresh.load_state_dict(with_numbers(saved, names))
    assert fresh.state.keys() == optimizer.state.keys()


def test_an_optimizer_of_other_parameters_is_refused_by_name():
    net = Net("abc")
    saved = with_names(adam(net, "ab").state_dict(), ["a", "b"])
    with pytest.raises(ValueError, match="it lacks c and has b besides"):
        with_numbers(saved, ["a", "c"])
    with pytest.raises(ValueError, match="in other groups"):
        with_numbers(
            with_names(adam(net, "ab", "c").state_dict(), ["a", "b", "c"]), ["a", "c", "b"]
        )
    with pytest.raises(ValueError, match="parameters that the module has not"):
        parameter_names(adam(net, "ab"), [("a", net.a)])

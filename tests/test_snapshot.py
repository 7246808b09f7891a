"""Snapshots of weights, and the reference that a run can find again."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from distributed_runs import same_bits

from lightning_grpo.policy import Lora, Policy, load_policy
from lightning_grpo.reference import (
    Reference,
    frozen_reference_hash,
    settle_reference,
    weights_hash,
)
from lightning_grpo.snapshot import WeightSnapshot, local_weights


def policy_of(model: str, **options: object) -> Policy:
    torch.manual_seed(0)
    return load_policy(model, num_tokens=10, **options)  # type: ignore[arg-type]


def copies(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


@torch.no_grad()
def move(policy: Policy, by: float = 0.125) -> None:
    for weight in local_weights(policy).values():
        weight.add_(by)


def test_in_place_exchanges_the_weights_and_brings_them_back(char_model):
    policy = policy_of(char_model)
    start = copies(policy)
    snapshot = WeightSnapshot(policy)
    move(policy)
    moved = copies(policy)
    with snapshot.in_place():
        assert same_bits(copies(policy), start)
    assert same_bits(copies(policy), moved)
    with snapshot.in_place():
        assert same_bits(copies(policy), start)
    assert same_bits(copies(policy), moved)


def test_in_place_brings_the_weights_back_after_an_exception(char_model):
    policy = policy_of(char_model)
    start = copies(policy)
    snapshot = WeightSnapshot(policy)
    move(policy)
    moved = copies(policy)
    with pytest.raises(KeyError), snapshot.in_place():
        raise KeyError
    assert same_bits(copies(policy), moved)
    assert same_bits({f"{n}": c for n, c in snapshot.copies.items()}, start)


def test_restore_goes_back_to_the_last_refresh(char_model):
    policy = policy_of(char_model)
    snapshot = WeightSnapshot(policy)
    move(policy)
    snapshot.refresh()
    refreshed = copies(policy)
    move(policy)
    snapshot.restore()
    assert same_bits(copies(policy), refreshed)


def test_a_snapshot_follows_the_policy_to_another_dtype(char_model):
    policy = policy_of(char_model)
    snapshot = WeightSnapshot(policy)
    policy.double()
    start = copies(policy)
    move(policy)
    with snapshot.in_place():
        assert same_bits(copies(policy), start)


def test_a_lora_snapshot_holds_the_adapter_alone(char_model):
    snapshot = WeightSnapshot(policy_of(char_model, lora=Lora(rank=2)))
    assert snapshot.copies and all("lora_" in name for name in snapshot.copies)


def test_the_reference_of_lora_is_the_base_model(char_model):
    policy = policy_of(char_model, lora=Lora(rank=2)).eval()
    ids, mask = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool)
    before = policy(ids, mask, ids, mask).logprobs
    move(policy)
    assert not torch.equal(policy(ids, mask, ids, mask).logprobs, before)
    with Reference(policy).in_place():
        assert torch.equal(policy(ids, mask, ids, mask).logprobs, before)
    assert not torch.equal(policy(ids, mask, ids, mask).logprobs, before)


# Finding it again


def test_the_hash_sees_names_shapes_dtypes_and_values():
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    hashes = {
        weights_hash(base),
        weights_hash({"b": base["a"], "a": base["b"]}),
        weights_hash(base | {"a": base["a"].reshape(2, 1)}),
        weights_hash(base | {"a": base["a"].bfloat16()}),
        weights_hash(base | {"a": torch.tensor([1.0, 2.0000002])}),
    }
    assert len(hashes) == 5
    assert weights_hash(dict(reversed(base.items()))) == weights_hash(base)


class OneRank:
    """The ranks of a single process."""

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def settle(policy: Policy, record: dict, folder: Path, origin, initial_hash="") -> tuple:
    reference = Reference(policy)
    found = settle_reference(
        reference,
        record,
        folder=folder,
        initial_hash=initial_hash or frozen_reference_hash(policy),
        origin=origin,
        is_main=True,
        ranks=OneRank(),
    )
    return reference, found


def test_a_pretrained_reference_is_named_by_its_hash_and_not_written(char_model, tmp_path):
    policy = policy_of(char_model)
    _, record = settle(policy, {}, tmp_path / "reference", "pretrained")
    assert record == {"folder": "", "sha256": frozen_reference_hash(policy)}
    assert not (tmp_path / "reference").exists()
    _, again = settle(policy_of(char_model), record, tmp_path / "reference", "pretrained")
    assert again == record


def test_a_resume_with_another_model_is_refused(char_model, tmp_path):
    _, record = settle(policy_of(char_model), {}, tmp_path, "pretrained")
    other = policy_of(char_model)
    move(other)
    with pytest.raises(ValueError, match="resume with the model that the run started from"):
        settle(other, record, tmp_path, "pretrained")


@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["full", "lora"])
def test_a_reference_that_no_folder_holds_is_written_and_read_again(char_model, tmp_path, lora):
    folder = tmp_path / "reference"
    policy = policy_of(char_model, lora=lora)
    move(policy)
    learnt = {n: w.clone() for n, w in local_weights(policy).items()}
    _, record = settle(policy, {}, folder, "cold_start")
    assert record["folder"] == "reference"
    resumed = policy_of(char_model, lora=lora)
    move(resumed, by=3.0)
    reference, _ = settle(resumed, record, folder, "pretrained")
    with reference.in_place():
        assert same_bits(dict(local_weights(resumed)), learnt)
    assert not same_bits(dict(local_weights(resumed)), learnt)


def test_a_full_reference_is_a_folder_that_transformers_can_load(char_model, tmp_path):
    policy = policy_of(char_model)
    move(policy)
    settle(policy, {}, tmp_path / "reference", "random")
    assert same_bits(copies(policy_of(str(tmp_path / "reference"))), copies(policy))


def test_a_changed_or_missing_reference_is_refused(char_model, tmp_path):
    folder = tmp_path / "reference"
    _, record = settle(policy_of(char_model), {}, folder, "random")
    with pytest.raises(ValueError, match="its hash differs"):
        settle(policy_of(char_model), record | {"sha256": "0"}, folder, "random")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="reference is missing: no safetensors in"):
        settle(policy_of(char_model), record, folder, "random")


def test_a_ctrl_c_while_weights_are_exchanged_leaves_the_policy_its_own(char_model, monkeypatch):
    policy = load_policy(char_model, num_tokens=41)
    snapshot = WeightSnapshot(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    own = {name: p.detach().clone() for name, p in policy.named_parameters()}
    copies = {name: copy.clone() for name, copy in snapshot.copies.items()}
    copy_of = snapshot._copy_of
    num_calls = 0

    def interrupting(name, weight):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            signal.raise_signal(signal.SIGINT)
        return copy_of(name, weight)

    monkeypatch.setattr(snapshot, "_copy_of", interrupting)
    with pytest.raises(KeyboardInterrupt), snapshot.in_place():
        raise AssertionError("the block must not run")
    assert num_calls == 2 * len(copies)  # it waited for the end of the exchange, and back
    assert all(torch.equal(p, own[name]) for name, p in policy.named_parameters())
    assert all(torch.equal(copy, copies[name]) for name, copy in snapshot.copies.items())


def test_an_error_in_the_middle_of_an_exchange_is_taken_back(char_model, monkeypatch):
    policy = load_policy(char_model, num_tokens=41)
    snapshot = WeightSnapshot(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    own = {name: p.detach().clone() for name, p in policy.named_parameters()}
    copy_of = snapshot._copy_of
    calls = []

    def failing(name, weight):
        calls.append(name)
        if len(calls) == 3:
            raise MemoryError
        return copy_of(name, weight)

    monkeypatch.setattr(snapshot, "_copy_of", failing)
    with pytest.raises(MemoryError), snapshot.in_place():
        raise AssertionError("the block must not run")
    assert all(torch.equal(p, own[name]) for name, p in policy.named_parameters())

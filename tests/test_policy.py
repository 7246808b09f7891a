"""The policy: log-probs against a plain forward, loading, LoRA, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lightning_grpo.policy import Lora, eos_token_ids, load_policy


def gpt2_model(dropout: float = 0.0) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    return GPT2LMHeadModel(config)


@pytest.fixture
def gpt2_folder(tmp_path: Path) -> str:
    gpt2_model(dropout=0.5).save_pretrained(tmp_path / "gpt2")
    return str(tmp_path / "gpt2")


def prefix_logprobs(model, ids: list[int], num_prompt: int, temperature: float) -> list[float]:
    """Log-prob of each completion token from a forward over its unpadded prefix alone."""
    found = []
    for end in range(num_prompt, len(ids)):
        logits = model(input_ids=torch.tensor([ids[:end]])).logits[0, -1].double()
        scaled = logits / temperature
        found.append(float(scaled[ids[end]] - torch.logsumexp(scaled, 0)))
    return found


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("num_pad", [0, 1, 7])
@pytest.mark.parametrize("kind", ["char", "gpt2"])
def test_logprobs_equal_those_of_every_unpadded_prefix(
    kind: str, num_pad: int, temperature: float, char_model: str, gpt2_folder: str
):
    folder = char_model if kind == "char" else gpt2_folder
    policy = load_policy(folder, num_tokens=40 if kind == "gpt2" else 41, dtype="float32").double()
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    prompt, completion = [5, 6, 7], [8, 9, 10, 11]
    with torch.no_grad():
        expected = prefix_logprobs(model, prompt + completion, 3, temperature)
        output = policy.eval()(
            torch.tensor([[3] * num_pad + prompt]),
            torch.tensor([[False] * num_pad + [True] * 3]),
            torch.tensor([completion + [2, 2]]),
            torch.tensor([[True] * 4 + [False] * 2]),
            temperature=temperature,
        )
    assert output.logprobs[0, :4].tolist() == pytest.approx(expected, abs=1e-9)


def test_entropy_is_that_of_the_sampled_distribution(char_model: str):
    policy = load_policy(char_model, num_tokens=41).eval()
    ids = torch.tensor([[5, 6]])
    mask = torch.ones_like(ids).bool()
    with torch.no_grad():
        output = policy(ids, mask, ids, mask, temperature=2.0, entropy="detached")
        logits = policy.causal_lm(input_ids=torch.tensor([[5, 6, 5]])).logits[0, 1:, :41] / 2.0
    p = logits.softmax(-1)
    expected = -(p * p.log()).sum(-1)
    assert torch.allclose(output.entropy[0], expected, atol=1e-5)
    assert not output.entropy.requires_grad


def test_dropout_is_off_in_the_update_unless_asked_for(gpt2_folder: str):
    ids = torch.tensor([[5, 6, 7]])
    mask = torch.ones_like(ids).bool()
    for dropout in (False, True):
        policy = load_policy(gpt2_folder, num_tokens=40, dropout=dropout).train()
        first = policy(ids, mask, ids, mask).logprobs
        second = policy(ids, mask, ids, mask).logprobs
        assert torch.equal(first, second) == (not dropout)
        assert policy.causal_lm.config.resid_pdrop == 0.5  # what an export will write


def test_activation_checkpointing_changes_memory_and_not_gradients(char_model: str):
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = torch.ones_like(ids).bool()
    gradients = []
    for checkpointing in (False, True):
        policy = load_policy(char_model, num_tokens=41, activation_checkpointing=checkpointing)
        policy.train()
        num_saved = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal num_saved
            num_saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            loss = policy(ids, mask, ids, mask).logprobs.sum()
        loss.backward()
        gradients.append((num_saved, [p.grad.clone() for p in policy.parameters()]))
    assert gradients[1][0] < gradients[0][0] / 2
    for plain, recomputed in zip(gradients[0][1], gradients[1][1]):
        assert torch.allclose(plain, recomputed, atol=1e-6)


def test_random_initialisation_takes_only_the_configuration(char_model: str):
    torch.manual_seed(1)
    fresh = load_policy(char_model, num_tokens=41, init="random")
    stored = load_policy(char_model, num_tokens=41)
    names = [n for n, p in fresh.named_parameters() if p.ndim == 2]
    assert names
    differ = [
        not torch.equal(dict(fresh.named_parameters())[n], dict(stored.named_parameters())[n])
        for n in names
    ]
    assert all(differ)


def test_lora_trains_adapters_and_its_base_is_the_reference(char_model: str):
    policy = load_policy(char_model, num_tokens=41, lora=Lora(rank=4, alpha=8.0))
    plain = load_policy(char_model, num_tokens=41)
    trainable = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    ids = torch.tensor([[5, 6, 7]])
    mask = torch.ones_like(ids).bool()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        base = plain.eval()(ids, mask, ids, mask).logprobs
        assert not torch.allclose(policy.eval()(ids, mask, ids, mask).logprobs, base, atol=1e-3)
        with policy.adapter(None):
            assert torch.equal(policy(ids, mask, ids, mask).logprobs, base)


def test_a_tokenizer_larger_than_the_embedding_is_refused(char_model: str):
    with pytest.raises(ValueError, match="its tokenizer has 100"):
        load_policy(char_model, num_tokens=100)


def test_code_in_a_model_folder_is_not_run(tmp_path: Path, char_model: str):
    sentinel = tmp_path / "was_run"
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"model_type": "evil", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": '
        '"code.M"}}'
    )
    (folder / "code.py").write_text(f"open({str(sentinel)!r}, 'w').close()\n")
    with pytest.raises((ValueError, OSError)):
        load_policy(str(folder), num_tokens=3)
    assert not sentinel.exists()


def test_eos_ids_are_those_of_the_generation_config_and_the_tokenizer(char_model: str):
    policy = load_policy(char_model, num_tokens=41)
    tokenizer = AutoTokenizer.from_pretrained(char_model)
    policy.causal_lm.generation_config.eos_token_id = [7, 5]
    assert eos_token_ids(policy, tokenizer) == [1, 5, 7]
    policy.causal_lm.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    assert eos_token_ids(policy, tokenizer) == []

"""The packed forward: the same numbers as row by row, with each prompt once and no padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from lightning_grpo.adapters import Lora, add_adapter, lora_config
from lightning_grpo.critic import CriticSettings, make_critic
from lightning_grpo.output_layer import check_plain
from lightning_grpo.packed_attention import MergedAttention, concat_attention, packed_attention
from lightning_grpo.packing import PackedLayout, num_packed_tokens, pack_rows
from lightning_grpo.packing_check import settle_packing
from lightning_grpo.policy import Policy
from lightning_grpo.types import Rollout

NUM_TOKENS = 50
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = GPT2Config(
    vocab_size=64,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=64,
    bos_token_id=1,
    eos_token_id=2,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
)
ARCHITECTURES = {
    "qwen2": Qwen2Config(**SMALL),
    "qwen2 tied": Qwen2Config(**SMALL | {"tie_word_embeddings": True}),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "llama without gqa": LlamaConfig(**SMALL | {"num_key_value_heads": 4}),
    "mistral": MistralConfig(**SMALL, sliding_window=64),
    "gemma": GemmaConfig(**SMALL, head_dim=8),
    "gpt2": GPT2,
}
# (group, prompt tokens, completion tokens): ragged, single tokens, an empty completion, groups
# of different sizes, the rows of a group apart from each other.
ROWS = [(7, 5, 3), (3, 1, 1), (7, 5, 9), (3, 1, 6), (3, 1, 0), (9, 8, 20), (7, 5, 1)]


def rows_of(shapes: list[tuple[int, int, int]], seed: int = 0) -> dict[str, Tensor]:
    """Random rows with two columns of padding more than needed."""
    generator = torch.Generator().manual_seed(seed)
    groups, prompts, completions = (torch.tensor(column) for column in zip(*shapes))
    num_prompt, num_completion = int(prompts.max()) + 2, int(completions.max()) + 2
    of_group = torch.randint(NUM_TOKENS, (10, num_prompt), generator=generator)
    ids = torch.randint(NUM_TOKENS, (len(shapes), num_completion), generator=generator)
    return {
        "prompt_ids": of_group[groups],
        "prompt_mask": torch.arange(num_prompt) >= num_prompt - prompts.unsqueeze(1),
        "completion_ids": ids,
        "completion_mask": torch.arange(num_completion) < completions.unsqueeze(1),
        "group_ids": groups,
    }


def policy_of(config: Any, dtype: torch.dtype = torch.float32, lora: bool = False) -> Policy:
    """A policy whose attention matters: its weights are larger than those of a fresh model."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    if lora:
        model = get_peft_model(model, lora_config(Lora(rank=4)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Policy(model.to(dtype), NUM_TOKENS).train()


def forward_and_gradient(policy: Policy, rows: dict[str, Tensor], is_packed: bool) -> list[Tensor]:
    """Log-probs, entropies, states, and the gradient of a function of all three."""
    policy.is_packing = is_packed
    policy.zero_grad()
    output = policy(**rows, temperature=0.8, entropy="gradient", with_hidden=True)
    mask = rows["completion_mask"]
    assert output.hidden is not None
    states = torch.where(mask.unsqueeze(-1), output.hidden[:, 1:], 0.0)
    weights = torch.linspace(-1, 2, mask.numel(), dtype=states.dtype).view(mask.shape)
    loss = (weights * output.logprobs).sum() + output.entropy.sum() + states[:, ::2].sin().sum()
    loss = loss + output.hidden[:, 0].cos().sum()
    loss.backward()
    found = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
    first = output.hidden[:, 0]
    return [output.logprobs, output.entropy, states, first, torch.cat(found).clone()]


def assert_close(packed: list[Tensor], padded: list[Tensor], tolerance: float) -> None:
    for one, other in zip(packed, padded, strict=True):
        assert float((one - other).norm() / other.norm()) <= tolerance


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_rows_give_the_numbers_and_gradients_of_padded_ones(name):
    policy = policy_of(ARCHITECTURES[name])
    settle_packing(policy, "auto")
    assert policy.is_packing
    rows = rows_of(ROWS)
    packed = forward_and_gradient(policy, rows, True)
    assert_close(packed, forward_and_gradient(policy, rows, False), 5e-6)
    assert not packed[0][~rows["completion_mask"]].any()


def test_in_float64_they_agree_to_the_last_digits():
    # Of these architectures, GPT-2 alone computes nothing in float32 inside.
    policy = policy_of(GPT2, torch.float64)
    packed, padded = (forward_and_gradient(policy, rows_of(ROWS), flag) for flag in (True, False))
    assert_close(packed, padded, 1e-12)


def test_adapters_and_checkpointing_leave_the_numbers_the_same():
    policy = policy_of(ARCHITECTURES["qwen2"], lora=True)
    add_adapter(policy.model, "critic", Lora(rank=2))
    rows = rows_of(ROWS)
    plain = forward_and_gradient(policy, rows, False)
    assert_close(forward_and_gradient(policy, rows, True), plain, 5e-6)
    once = forward_and_gradient(policy, rows, True)
    policy.checkpoint_activations()
    for one, other in zip(forward_and_gradient(policy, rows, True), once, strict=True):
        assert torch.equal(one, other)
    assert policy.causal_lm.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("form", ["lora", "separate"])
def test_a_critic_of_its_own_is_forwarded_packed_too(form, monkeypatch):
    policy = policy_of(ARCHITECTURES["qwen2"], lora=form == "lora")
    policy.checkpoint_activations()
    critic: Any = make_critic(CriticSettings(form=form), policy, tokenizer=None).train()
    with torch.no_grad():
        critic.head.weight.normal_()
    rows = rows_of(ROWS)
    masks = dict.fromkeys(("action_mask", "sampler_logprobs"), rows["completion_mask"])
    rollout = Rollout(**rows, **masks, truncated=rows["group_ids"] == 0)
    found = []
    for policy.is_packing in (False, True):
        values = critic(policy, rollout, None)
        there = torch.where(rollout.completion_mask, values[:, 1:], 0.0)
        (there.sin().sum() + values[:, 0].sum()).backward()
        grads = [p.grad for m in (critic, policy) for p in m.parameters() if p.grad is not None]
        found.append([there, values[:, 0], torch.cat([g.flatten() for g in grads]).clone()])
        critic.zero_grad()
        policy.zero_grad()
    assert_close(found[1], found[0], 5e-6)


def test_a_group_that_is_split_repeats_its_prompt_and_gives_the_same_gradient():
    policy = policy_of(ARCHITECTURES["qwen3"])
    rows = rows_of(ROWS)
    policy.is_packing = True
    weights = torch.linspace(-1, 2, len(ROWS)).unsqueeze(1)
    found = []
    for parts in ([list(range(7))], [[0, 1, 3], [2, 4, 5, 6]]):
        policy.zero_grad()
        logprobs = torch.zeros(rows["completion_ids"].shape)
        for part in parts:
            output = policy(**{name: x[part] for name, x in rows.items()})
            (weights[part] * output.logprobs).sum().backward()
            logprobs[part] = output.logprobs.detach()
        gradients = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
        found.append([logprobs, torch.cat(gradients).clone()])
    assert_close(found[1], found[0], 5e-6)


def test_what_lies_under_the_masks_changes_no_bit():
    policy = policy_of(ARCHITECTURES["llama without gqa"])
    rows = rows_of(ROWS)
    junk = dict(rows)
    for name in ("prompt", "completion"):
        ids, mask = rows[f"{name}_ids"], rows[f"{name}_mask"]
        junk[f"{name}_ids"] = torch.where(mask, ids, 10**9)
    for one, other in zip(
        forward_and_gradient(policy, rows, True), forward_and_gradient(policy, junk, True)
    ):
        assert torch.equal(one, other)


def test_the_trunk_sees_each_prompt_once_and_no_padding():
    policy = policy_of(ARCHITECTURES["qwen2"])
    seen: list[Tensor] = []
    policy.trunk.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    policy.is_packing = True
    policy(**rows_of(ROWS))
    # Prompts of 5, 1 and 8 tokens; completions of 40.
    assert seen[0].shape == (1, 5 + 1 + 8 + 40)
    columns = [list(column) for column in zip(*ROWS)]
    assert num_packed_tokens(*columns) == 54


def test_positions_and_states_are_those_of_each_row_by_itself():
    rows = rows_of([(0, 3, 2), (1, 1, 1), (0, 3, 1)])
    layout = pack_rows(*rows.values())
    assert layout.position_ids.tolist() == [[0, 1, 2, 0, 3, 4, 3, 1]]
    # The last token of a prompt predicts the first of each of its completions.
    assert layout.state_index[:, :3].tolist() == [[2, 4, 5], [3, 7, 7], [2, 6, 6]]
    assert layout.state_mask.sum(1).tolist() == [3, 2, 2]


def test_rows_with_one_group_id_and_different_prompts_are_not_mixed_up():
    rows = rows_of([(0, 3, 2), (0, 3, 1), (0, 3, 1)])
    rows["prompt_ids"][1, -1] += 1
    assert len(pack_rows(*rows.values()).groups) == 2
    without_ids = pack_rows(*list(rows.values())[:4])
    assert len(without_ids.groups) == 3


def random_heads(layout: PackedLayout, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    shape = (1, layout.token_ids.shape[1])
    heads = [torch.randn(*shape, n, 8, dtype=dtype).transpose(1, 2) for n in (4, 2, 2)]
    return [x.requires_grad_() for x in heads]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    """With a mask over the whole stream, written out."""
    length = q.shape[2]
    mask = torch.zeros(length, length, dtype=torch.bool)
    starts = layout.state_index[:, 0]
    for group in layout.groups:
        for i in range(length)[group.prompt]:
            mask[i, group.prompt.start : i + 1] = True
    for row, last in enumerate(starts.tolist()):
        prompt = next(g.prompt for g in layout.groups if g.prompt.stop - 1 == last)
        places = layout.state_index[row, 1:][layout.state_mask[row, 1:]].tolist()
        for n, i in enumerate(places):
            mask[i, prompt] = True
            mask[i, places[: n + 1]] = True
    scores = 0.7 * q @ k.repeat_interleave(2, 1).transpose(2, 3)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)


@pytest.mark.parametrize("function", [MergedAttention.apply, concat_attention])
def test_attention_is_that_of_a_dense_mask(function: Callable[..., Tensor]):
    layout = pack_rows(*rows_of(ROWS).values())
    heads = random_heads(layout, torch.float64)
    out, expected = function(*heads, layout, 0.7), dense_attention(*heads, layout)
    weights = torch.randn_like(expected)
    gradients, right = (torch.autograd.grad((x * weights).sum(), heads) for x in (out, expected))
    for one, other in zip([out, *gradients], [expected, *right]):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_large_scores_stay_finite():
    layout = pack_rows(*rows_of(ROWS).values())
    heads = [(300 * x).detach().requires_grad_() for x in random_heads(layout, torch.float32)]
    out = MergedAttention.apply(*heads, layout, None)
    gradients = torch.autograd.grad(out.sum(), heads)
    assert all(torch.isfinite(x).all() for x in (out, *gradients))


# What is not packed


def printed(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("lightning_grpo.packing_check.rank_zero_info", lines.append)
    settle_packing(policy, "auto")
    return lines


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma2Config(**SMALL, head_dim=8), "output layer is not a plain linear layer"),
        (CohereConfig(**SMALL), "output layer is not a plain linear layer"),
        (Qwen2Config(**SMALL, attention_dropout=0.1), "dropout would hit a shared prompt once"),
    ],
    ids=["gemma2", "cohere", "dropout"],
)
def test_what_cannot_be_packed_says_so_once(config, reason, monkeypatch):
    policy = policy_of(config)
    (line,) = printed(policy, monkeypatch)
    assert line.startswith("packing: off") and reason in line
    assert not policy.is_packing


def test_a_packed_forward_that_gives_other_numbers_is_not_used(monkeypatch):
    def slightly_larger(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        out, _ = packed_attention(*args, **kwargs)
        return out * 1.01, None

    from transformers import AttentionInterface

    monkeypatch.setitem(
        AttentionInterface._global_mapping, "lightning_grpo_packed", slightly_larger
    )
    (line,) = printed(policy_of(ARCHITECTURES["qwen2"]), monkeypatch)
    assert "its log-probs differ by" in line


def test_rows_longer_than_a_window_are_forwarded_row_by_row():
    policy = policy_of(MistralConfig(**SMALL, sliding_window=20))
    policy.is_packing = True
    assert policy.layout(policy.trunk, *rows_of(ROWS).values()) is None
    assert policy.layout(policy.trunk, *rows_of(ROWS[:5]).values()) is not None
    padded, packed = (forward_and_gradient(policy, rows_of(ROWS), flag) for flag in (False, True))
    assert all(torch.equal(one, other) for one, other in zip(padded, packed))


def test_off_means_off():
    policy = policy_of(ARCHITECTURES["qwen2"])
    settle_packing(policy, "off")
    assert not policy.is_packing


@pytest.mark.parametrize(("name", "is_as_it_seems"), [("qwen2", True), ("gemma2", False)])
def test_a_layer_behind_the_output_layer_is_found_by_running_it(name, is_as_it_seems):
    config = ARCHITECTURES.get(name) or Gemma2Config(**SMALL, head_dim=8)
    model = AutoModelForCausalLM.from_config(config)
    assert check_plain(model, model.model) == is_as_it_seems


def test_a_critic_of_another_architecture_is_not_packed():
    policy = policy_of(ARCHITECTURES["qwen2"])
    policy.is_packing = True
    other = policy_of(ARCHITECTURES["mistral"]).trunk
    assert policy.layout(other, *rows_of(ROWS).values()) is None

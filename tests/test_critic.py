"""The critic in its three forms: what its values are, what it shares, and how it is stored."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_runs import same_bits
from lightning.pytorch import Trainer
from runs import make_data, make_module, make_trainer
from saved import read_saved
from switch_runs import STOPS, switching_fit
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from lightning_grpo.adapters import Lora
from lightning_grpo.algorithms import GRPO, PPO
from lightning_grpo.critic import (
    CriticSettings,
    SeparateCritic,
    critic_parameters,
    make_critic,
    remove_critic,
)
from lightning_grpo.forward import forward_rows
from lightning_grpo.lifecycle import copy_trunk
from lightning_grpo.module import GRPOModule
from lightning_grpo.policy import Policy, load_policy
from lightning_grpo.scoring import score_rollout
from lightning_grpo.stages import Stage
from lightning_grpo.tools.tiny_model import char_tokenizer
from lightning_grpo.types import Minibatch, Rollout
from lightning_grpo.update import Learners, microbatch_loss

FORMS = ["head", "lora", "separate"]
FAMILIES = ["qwen2", "gpt2"]
NUM_TOKENS = 24
# Prompts and completions of different lengths; nothing in them is the padding's 0.
ROWS = [([3, 4, 5, 6, 7], [8, 9]), ([9], [10, 11, 12, 13]), ([14, 15, 16], [17])]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model of each family, with weights that are far from their small beginnings."""
    root = tmp_path_factory.mktemp("families")
    models: dict[str, nn.Module] = {
        "qwen2": Qwen2ForCausalLM(qwen2_config()),
        "gpt2": GPT2LMHeadModel(
            GPT2Config(vocab_size=NUM_TOKENS, n_positions=32, n_embd=16, n_layer=2, n_head=2)
        ),
    }
    for name, model in models.items():
        randomize(model, scale=0.3)
        model.save_pretrained(root / name)  # type: ignore[operator]
    return {name: str(root / name) for name in models}


def qwen2_config(**options: Any) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=NUM_TOKENS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        **options,
    )


@torch.no_grad()
def randomize(module: nn.Module, scale: float = 0.5, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_(noise.to(parameter.dtype), alpha=scale)


@torch.no_grad()
def randomize_critic(critic: nn.Module, policy: Policy) -> None:
    generator = torch.Generator().manual_seed(2)
    for parameter in critic_parameters(critic, policy):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_(noise.to(parameter.dtype), alpha=0.3)


def policy_and_critic(
    folder: str, form: Any, *, checkpointing: bool = False, double: bool = True
) -> tuple[Policy, nn.Module]:
    torch.manual_seed(0)
    policy = load_policy(
        folder,
        num_tokens=NUM_TOKENS,
        lora=Lora(4) if form == "lora" else None,
        activation_checkpointing=checkpointing,
    )
    critic = make_critic(CriticSettings(form, lora=Lora(3)), policy, tokenizer=None)
    if isinstance(critic, SeparateCritic):
        copy_trunk(critic, policy)
    if double:
        policy.double()
        critic.double()
    return policy.train(), critic.train()


def rollout_of(rows: list[tuple[list[int], list[int]]]) -> Rollout:
    width = max(len(prompt) for prompt, _ in rows)
    length = max(len(completion) for _, completion in rows)

    def table(lists: list[list[int]], width: int, on_left: bool) -> Tensor:
        pads = [[0] * (width - len(ids)) for ids in lists]
        return torch.tensor([p + x if on_left else x + p for x, p in zip(lists, pads)])

    prompt_ids = table([prompt for prompt, _ in rows], width, True)
    completion_ids = table([completion for _, completion in rows], length, False)
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_ids > 0,
        completion_ids=completion_ids,
        completion_mask=completion_ids > 0,
        action_mask=completion_ids > 0,
        sampler_logprobs=torch.zeros(completion_ids.shape),
        group_ids=torch.arange(len(rows)) // 2,
        truncated=torch.zeros(len(rows)).bool(),
        rewards=torch.zeros(len(rows)),
    )


def values_of(policy: Policy, critic: nn.Module, rollout: Rollout) -> Tensor:
    with torch.no_grad():
        forward = forward_rows(policy, critic, rollout, temperature=1.0)  # type: ignore[arg-type]
    assert forward.values is not None
    return forward.values


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_a_new_critic_says_exactly_0(folders, form, family):
    policy, critic = policy_and_critic(folders[family], form, double=False)
    values = values_of(policy, critic, rollout_of(ROWS))
    assert torch.equal(values, torch.zeros(3, 5))
    assert values.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_values_of_a_padded_batch_are_those_of_rows_alone(folders, form, family):
    policy, critic = policy_and_critic(folders[family], form)
    randomize_critic(critic, policy)
    values = values_of(policy, critic, rollout_of(ROWS))
    for row, (prompt, completion) in enumerate(ROWS):
        alone = values_of(policy, critic, rollout_of([(prompt, completion)]))[0].tolist()
        assert len(set(alone)) == len(completion) + 1
        assert values[row, : len(alone)].tolist() == pytest.approx(alone, abs=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_a_value_is_that_of_the_state_before_its_token(folders, form, family):
    policy, critic = policy_and_critic(folders[family], form)
    randomize_critic(critic, policy)
    prompt, completion = [3, 4, 5], [6, 7, 8, 9]
    before = values_of(policy, critic, rollout_of([(prompt, completion)]))[0]
    for t in range(4):
        changed = [*completion[:t], 20, *completion[t + 1 :]]
        after = values_of(policy, critic, rollout_of([(prompt, changed)]))[0]
        is_same = (after - before).abs() < 1e-12
        assert is_same.tolist() == [True] * (t + 1) + [False] * (4 - t)
    after = values_of(policy, critic, rollout_of([([3, 4, 21], completion)]))[0]
    assert not ((after - before).abs() < 1e-12).any()


@pytest.mark.parametrize("form", FORMS)
def test_values_are_the_head_on_the_last_hidden_states(folders, form):
    """The same numbers from a plain transformers forward over each unpadded prefix."""
    policy, critic = policy_and_critic(folders["qwen2"], form)
    if form != "lora":
        randomize_critic(critic, policy)
    randomize(critic.head)  # a lora critic keeps B = 0, and so the states of the base
    model = Qwen2ForCausalLM.from_pretrained(folders["qwen2"]).double().eval()
    if form == "separate":
        model.model.load_state_dict(critic.trunk.state_dict())
    values = values_of(policy, critic, rollout_of(ROWS))
    for row, (prompt, completion) in enumerate(ROWS):
        for t in range(len(completion) + 1):
            ids = torch.tensor([prompt + completion[:t]])
            with torch.no_grad():
                state = model.model(input_ids=ids).last_hidden_state[0, -1]
            expected = sum(s * w for s, w in zip(state.tolist(), critic.head.weight.tolist()))
            expected += critic.head.bias.item()
            assert float(values[row, t]) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_scoring_a_rollout_puts_every_value_in_its_place(folders, form):
    policy, critic = policy_and_critic(folders["qwen2"], form)
    randomize_critic(critic, policy)
    rollout = rollout_of(ROWS)
    parts = [torch.tensor([2, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([1])]
    scored = score_rollout(policy, rollout, parts, temperature=1.0, critic=critic)  # type: ignore[arg-type]
    assert scored.values is not None and scored.final_values is not None
    for row, (prompt, completion) in enumerate(ROWS):
        alone = values_of(policy, critic, rollout_of([(prompt, completion)]))[0].tolist()
        end = len(completion)
        assert scored.values[row, :end].tolist() == pytest.approx(alone[:-1], abs=1e-12)
        assert not scored.values[row, end:].any()
        # The value after its last token, and not that after the longest completion.
        assert float(scored.final_values[row]) == pytest.approx(alone[-1], abs=1e-12)
    without = score_rollout(
        policy,
        rollout,
        parts,
        temperature=1.0,
        critic=critic,  # type: ignore[arg-type]
        with_logprobs=False,
    )
    assert without.logprobs is None and without.values is not None
    assert without.values.tolist() == [pytest.approx(row) for row in scored.values.tolist()]


# A separate critic


@pytest.mark.parametrize("lora", [None, Lora(4)])
def test_a_critic_copied_from_the_policy_has_its_trunk_as_it_is_then(folders, lora):
    policy = load_policy(folders["qwen2"], num_tokens=NUM_TOKENS, lora=lora)
    randomize(policy)
    critic = make_critic(CriticSettings("separate"), policy, tokenizer=None)
    assert isinstance(critic, SeparateCritic)
    copy_trunk(critic, policy)
    theirs = {
        name.replace(".base_layer", ""): p.detach().clone()
        for name, p in policy.trunk.named_parameters()
        if ".lora_" not in name
    }
    mine = {name: p.detach() for name, p in critic.trunk.named_parameters()}
    assert same_bits(mine, theirs)
    assert all(p.requires_grad for p in critic.parameters())
    randomize(policy)  # and stays so when the policy moves on
    assert same_bits({name: p.detach() for name, p in critic.trunk.named_parameters()}, theirs)


def save_reward_model(folder: Path, **options: Any) -> Qwen2ForSequenceClassification:
    model = Qwen2ForSequenceClassification(
        qwen2_config(**({"num_labels": 1, "pad_token_id": 0} | options))
    )
    randomize(model, scale=0.3, seed=3)
    model.save_pretrained(folder)
    char_tokenizer("0123456789abcdefghijk").save_pretrained(folder)
    return model.eval()


def critic_from(folder: Path, policy_folder: str) -> tuple[Policy, SeparateCritic]:
    policy = load_policy(policy_folder, num_tokens=NUM_TOKENS)
    tokenizer = char_tokenizer("0123456789abcdefghijk")
    settings = CriticSettings("separate", name_or_path=str(folder))
    critic = make_critic(settings, policy, tokenizer)
    assert isinstance(critic, SeparateCritic)
    return policy, critic


def test_a_reward_model_becomes_a_critic_that_gives_its_scores(folders, tmp_path: Path):
    model = save_reward_model(tmp_path)
    policy, critic = critic_from(tmp_path, folders["qwen2"])
    assert torch.equal(critic.head.weight, model.score.weight[0])
    assert torch.equal(critic.head.bias, torch.zeros(1))
    assert same_bits(dict(critic.trunk.named_parameters()), dict(model.model.named_parameters()))
    scored = score_rollout(
        policy,
        rollout_of(ROWS),
        [torch.arange(3)],
        temperature=1.0,
        critic=critic,
    )
    with torch.no_grad():
        scores = [
            float(model(input_ids=torch.tensor([prompt + completion])).logits[0, 0])
            for prompt, completion in ROWS
        ]
    assert scored.final_values is not None
    assert scored.final_values.tolist() == pytest.approx(scores, abs=1e-5)
    assert len(set(scores)) == 3


def test_a_reward_model_that_does_not_fit_is_refused(folders, tmp_path: Path):
    save_reward_model(tmp_path / "two", num_labels=2)
    with pytest.raises(ValueError, match=r"two' has 2 outputs \(num_labels\); a reward model has"):
        critic_from(tmp_path / "two", folders["qwen2"])
    save_reward_model(tmp_path / "other")
    char_tokenizer("0123456789abcdefghij!").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other' has another vocabulary than the policy"):
        critic_from(tmp_path / "other", folders["qwen2"])
    # A language model, which has no head for a score: a random one must not pass for trained.
    model = Qwen2ForCausalLM(qwen2_config(num_labels=1))
    model.save_pretrained(tmp_path / "untrained")
    char_tokenizer("0123456789abcdefghijk").save_pretrained(tmp_path / "untrained")
    with pytest.raises(ValueError, match=r"is no trained reward model: it lacks .*score.weight"):
        critic_from(tmp_path / "untrained", folders["qwen2"])


# A critic beside the policy's adapters


def test_a_lora_critic_leaves_the_policy_as_it_was(folders):
    policy = load_policy(folders["qwen2"], num_tokens=NUM_TOKENS, lora=Lora(4)).double()
    randomize(policy)
    rollout = rollout_of(ROWS)
    ids = (rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids, rollout.completion_mask)

    def state() -> dict[str, Any]:
        with torch.no_grad():
            with policy.adapter(None):
                reference = policy(*ids).logprobs
            return {
                "logprobs": policy(*ids).logprobs,
                "reference": reference,
                "flags": {n: p.requires_grad for n, p in policy.trainable().items()},
                "base": [policy.get_parameter(n).requires_grad for n in base],
            }

    base = [n for n, _ in policy.named_parameters() if ".lora_" not in n]
    names = {n for n, _ in policy.named_parameters()}
    before = state()
    assert not torch.equal(before["logprobs"], before["reference"])

    critic = make_critic(CriticSettings("lora", lora=Lora(3)), policy, tokenizer=None).double()
    for is_random in (False, True):
        if is_random:
            randomize_critic(critic, policy)
            assert values_of(policy, critic, rollout).any()
        after = state()
        assert torch.equal(after["logprobs"], before["logprobs"])
        assert torch.equal(after["reference"], before["reference"])
        assert after["flags"] == before["flags"] and all(after["flags"].values())
        assert after["base"] == before["base"] and not any(after["base"])
    mine = critic_parameters(critic, policy)
    assert all(p.requires_grad for p in mine)
    # A and B of 7 linear layers in each of 2 layers, weight and bias of the head.
    assert len(mine) == 2 * 2 * 7 + 2
    assert not {id(p) for p in mine} & {id(p) for p in policy.trainable().values()}

    policy.freeze(True)  # as in the warm-up, in which the critic alone learns
    assert all(p.requires_grad for p in critic_parameters(critic, policy))
    policy.freeze(False)
    remove_critic(critic, policy)
    assert {n for n, _ in policy.named_parameters()} == names
    assert same_bits(
        {"x": state()["logprobs"], "y": state()["reference"]},
        {"x": before["logprobs"], "y": before["reference"]},
    )
    assert state()["flags"] == before["flags"]
    assert state()["base"] == before["base"]
    # And again: a later switch makes another.
    make_critic(CriticSettings("lora", lora=Lora(3)), policy, tokenizer=None)
    assert torch.equal(state()["logprobs"], before["logprobs"])


def test_a_lora_critic_needs_a_lora_policy(folders):
    policy = load_policy(folders["qwen2"], num_tokens=NUM_TOKENS)
    with pytest.raises(ValueError, match=r"model.critic.form lora .* model.lora is not set"):
        make_critic(CriticSettings("lora"), policy, tokenizer=None)


# Gradients


def gradients_in(
    policy: Policy, critic: nn.Module, stage: Stage, *, advantage: float
) -> dict[str, Tensor]:
    """Gradients of one micro-batch whose value targets are 1."""
    rollout = rollout_of([*ROWS, ([4, 5], [6, 7, 8])])
    shape = rollout.completion_ids.shape
    rollout = rollout.replace(
        values=torch.zeros(shape),
        returns=torch.ones(shape),
        advantages=torch.full(shape, advantage),
    )
    minibatch = Minibatch(rollout, [torch.arange(4)], 1.0, 0, 0, True)
    policy.freeze(stage == "warmup")
    ppo = PPO(value_clip=None)
    algorithm = ppo if stage in ("warmup", "ppo") else GRPO()
    learners = Learners(policy, algorithm, critic, ppo, stage)  # type: ignore[arg-type]
    loss = microbatch_loss(
        learners,
        minibatch,
        torch.arange(4),
        beta=0.0,
        temperature=1.0,
        max_completion_tokens=8,
    ).loss_sum
    for parameter in [*policy.parameters(), *critic.parameters()]:
        parameter.grad = None
    loss.backward()
    named = itertools.chain(policy.named_parameters("policy"), critic.named_parameters("critic"))
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("stage", ["handover", "warmup", "ppo"])
@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_of_a_value_reaches_the_policy_only_through_a_head_and_only_in_ppo(
    folders, form, stage
):
    policy, critic = policy_and_critic(folders["qwen2"], form)
    randomize(critic.head)
    # Without an advantage, the policy's own loss has no gradient: what is there is the critic's.
    found = gradients_in(policy, critic, stage, advantage=0.0)
    is_policy = {name: bool(g.any()) for name, g in found.items() if name.startswith("policy.")}
    mine = {name: on for name, on in is_policy.items() if ".critic." not in name}
    assert any(mine.values()) == (form == "head" and stage == "ppo")
    if stage == "warmup":
        assert not mine
    others = {name: g for name, g in found.items() if name.startswith("critic.")}
    assert others and all(bool(g.any()) for g in others.values())
    if form == "lora":  # B = 0 at first, so that A has no gradient yet
        adapters = [on for name, on in is_policy.items() if ".lora_B.critic." in name]
        assert len(adapters) == 14 and all(adapters)


@pytest.mark.parametrize("form", FORMS)
def test_recomputed_activations_give_the_same_gradients(folders, form):
    found = []
    for checkpointing in (False, True):
        policy, critic = policy_and_critic(folders["qwen2"], form, checkpointing=checkpointing)
        randomize_critic(critic, policy)
        with torch.no_grad():
            for name, parameter in policy.trainable().items():
                if ".lora_" in name:
                    parameter.add_(0.1)
        num_saved = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal num_saved
            num_saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            gradients = gradients_in(policy, critic, "ppo", advantage=1.0)
        found.append((num_saved, gradients))
    (much, plain), (little, recomputed) = found
    assert little < much
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert gradient.any(), name
        assert torch.allclose(recomputed[name], gradient, rtol=1e-9, atol=1e-12), name


# Checkpoints


def ppo_module(model: str, form: Any) -> GRPOModule:
    lora = {"lora": Lora(4)} if form == "lora" else {}
    settings = CriticSettings(form, learning_rate=1e-2)
    return make_module(model, critic=settings, learning_rate=1e-2, beta=0.0, **lora)


def ppo_trainer(**options: Any) -> Trainer:
    return make_trainer(
        rollout=STOPS | {"num_val_samples": 2},
        switch={"algorithm": "ppo"},
        max_steps=2,
        max_epochs=-1,
        **options,
    )


def everything(module: GRPOModule) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("form", FORMS)
def test_a_critic_is_in_the_checkpoint_and_in_nobodys_way(char_model, form, tmp_path: Path):
    module, trainer = ppo_module(char_model, form), ppo_trainer()
    trainer.fit(module, datamodule=make_data())
    path = str(tmp_path / "a")
    trainer.save_checkpoint(path)
    assert module.critic is not None
    mine = {id(p) for p in critic_parameters(module.critic, module.policy)}
    names = [name for name, p in module.named_parameters() if id(p) in mine]
    assert len(names) == {"head": 2, "lora": 30, "separate": 28}[form]
    saved = read_saved(path)["state_dict"]
    weights = everything(module)
    for name in names:
        assert torch.equal(saved[name], weights[name]) and saved[name].any(), name

    resumed, again = ppo_module(char_model, form), ppo_trainer()
    again.fit(resumed, datamodule=make_data(), ckpt_path=path)
    assert same_bits(everything(resumed), weights)
    moments = [trainer.optimizers[0].state_dict(), again.optimizers[0].state_dict()]
    assert moments[0]["state"].keys() == moments[1]["state"].keys()
    for index, state in moments[0]["state"].items():
        assert same_bits(moments[1]["state"][index], state)

    prompts = [{"prompt": f"{i}=", "answer": str(i)} for i in range(5)]
    data = make_data(val_data=prompts, predict_data=prompts)
    before = trainer.validate(module, datamodule=data, verbose=False)
    for fresh in (
        ppo_module(char_model, form),
        make_module(char_model, beta=0.0, lora=module.load_options["lora"]),
    ):
        found = ppo_trainer().validate(fresh, datamodule=data, ckpt_path=path, verbose=False)
        assert found == before
        assert fresh.critic is None
        predicted = ppo_trainer().predict(fresh, datamodule=data, ckpt_path=path)
        assert predicted
        theirs = {n: p for n, p in everything(fresh).items() if n.startswith("policy.")}
        expected = {n: weights[n] for n in weights if n.startswith("policy.") and n not in names}
        assert same_bits(theirs, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "value"}, "model.critic.form must be head, lora or separate, got 'value'"),
        ({"form": "head", "name_or_path": "x"}, "name_or_path is that of a separate critic"),
        ({"form": "lora", "name_or_path": "x"}, "name_or_path is that of a separate critic"),
        ({"learning_rate": 0.0}, "model.critic.learning_rate must be positive"),
        ({"max_grad_norm": 0.0}, "model.critic.max_grad_norm must be positive or null"),
        ({"num_warmup_iterations": -1}, "num_warmup_iterations must be at least 0, got -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CriticSettings(**options)


def test_a_module_that_was_fitted_can_be_measured_from_a_checkpoint_with_a_critic(
    char_model, tmp_path
):
    rows = [{"prompt": f"{i}=", "answer": str(i)} for i in range(4)]
    for num_iterations, stage in ((4, "ppo"), (7, "grpo")):
        trainer, module, *_ = switching_fit(
            char_model, num_iterations=num_iterations, save_to=f"{tmp_path}/{stage}"
        )
        assert module.stage == stage
        for iteration in (1, 4):
            path = f"{tmp_path}/{stage}/{iteration}"
            data = make_data(val_data=rows)
            trainer.validate(module, datamodule=data, ckpt_path=path, verbose=False)
            saved = read_saved(path)["state_dict"]
            name = "policy.model.model.norm.weight"
            assert torch.equal(module.state_dict()[name], saved[name])
            assert (module.critic is not None) == (stage == "ppo")


def test_a_module_that_was_validated_first_is_fitted_as_if_it_was_new(char_model):
    rows = [{"prompt": f"{i}=", "answer": str(i)} for i in range(4)]
    weights = []
    for is_validated in (False, True):
        module = make_module(char_model, critic=CriticSettings(), beta=0.1)
        data = make_data(val_data=rows)
        if is_validated:
            make_trainer().validate(module, datamodule=data, verbose=False)
        trainer = make_trainer(switch={"algorithm": "ppo"}, max_epochs=-1, max_steps=2)
        trainer.fit(module, datamodule=make_data())
        assert module.stage == "ppo" and module.reference is not None
        weights.append({name: p.detach().clone() for name, p in module.named_parameters()})
    assert same_bits(*weights)


def test_a_reward_model_that_is_not_there_is_refused_before_the_run(char_model, tmp_path):
    critic = CriticSettings("separate", name_or_path=str(tmp_path / "nothing"))
    trainer = make_trainer(switch={"algorithm": "grpo", "num_iterations": 2})
    with pytest.raises(ValueError, match=r"model.critic.name_or_path .* cannot be read"):
        trainer.fit(make_module(char_model, critic=critic), datamodule=make_data())


def test_ppo_in_the_place_of_a_group_algorithm_is_refused(char_model):
    with pytest.raises(ValueError, match="for PPO set switch.algorithm to ppo"):
        make_trainer().fit(make_module(char_model, algorithm=PPO()), datamodule=make_data())


def test_a_warmup_as_long_as_ppo_lasts_is_refused(char_model):
    critic = CriticSettings(num_warmup_iterations=3)
    trainer = make_trainer(switch={"algorithm": "ppo", "num_iterations": 3})
    with pytest.raises(ValueError, match="3 is as long as PPO lasts"):
        trainer.fit(make_module(char_model, critic=critic), datamodule=make_data())

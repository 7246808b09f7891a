from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import make_data, make_module, make_trainer

from lightning_grpo.callbacks import ColdStart
from lightning_grpo.callbacks.cold_start import demonstration_loss, split_demonstrations

ROWS = [{"prompt": f"{i}=", "completion": str(9 - i)} for i in range(10)]


def fit(char_model: str, cold_start: ColdStart, **options: Any) -> Any:
    module = make_module(char_model, **options.pop("module", {}))
    trainer = make_trainer(callbacks=[cold_start], max_steps=1, **options)
    trainer.fit(module, make_data())
    return module


def test_the_loss_is_the_mean_negative_log_likelihood_of_each_prefix(char_model):
    module = fit(char_model, ColdStart(ROWS, num_steps=1), module={"beta": 0.0})
    batch = [([5, 13], [7, 1]), ([3, 4, 5, 13], [9, 8, 1])]
    module.policy.eval()
    causal_lm = module.policy.causal_lm
    expected = torch.zeros(())
    for prompt, completion in batch:
        for length, token in enumerate(completion):
            prefix = torch.tensor([prompt + completion[:length]])
            with torch.no_grad():
                logits = causal_lm(input_ids=prefix).logits[0, -1]
            expected -= torch.log_softmax(logits, dim=-1)[token]
    loss = demonstration_loss(module.policy, batch)
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_the_policy_learns_the_demonstrations(char_model, caplog):
    cold_start = ColdStart(ROWS, num_steps=60, batch_size=10, learning_rate=1e-2)
    with caplog.at_level(logging.INFO):
        module = fit(char_model, cold_start, module={"beta": 0.0})
    assert module.is_cold_started
    eos = module.tokenizer.eos_token_id
    prompt_ids = module.tokenizer(["3="])["input_ids"][0]
    answer = module.tokenizer(["6"])["input_ids"][0]
    with torch.no_grad():
        logprob = -demonstration_loss(module.policy, [(prompt_ids, [*answer, eos])])
    assert float(logprob) > -0.7  # both tokens, of 40 each
    assert "cold start: 60 steps on demonstrations, loss 3." in caplog.text


def test_demonstrations_are_rendered_as_the_prompts_of_the_run_and_end_with_eos(char_model):
    seen = []

    class Watched(ColdStart):
        def train(self, trainer: Any, module: Any, rows: Any) -> list[float]:
            seen.extend(rows)
            return super().train(trainer, module, rows)

    rows = [{"question": "1+2", "solution": "3"}]
    cold_start = Watched(rows, completion_column="solution", num_steps=1)
    module = make_module(char_model)
    trainer = make_trainer(callbacks=[cold_start], max_steps=1)
    data = make_data([{"question": str(i)} for i in range(8)], prompt_template="q {question}=")
    trainer.fit(module, data)
    ((prompt, completion),) = seen
    assert module.tokenizer.decode(prompt) == "q 1<unk>2="
    assert completion[-1] == module.tokenizer.eos_token_id
    assert module.tokenizer.decode(completion[:-1]) == "3"


def test_small_forwards_give_the_same_weights(char_model):
    weights = []
    for microbatch_tokens in (10_000, 8):
        module = fit(
            char_model,
            ColdStart(ROWS, num_steps=3, batch_size=8, learning_rate=1e-3),
            module={"beta": 0.0, "microbatch_tokens": microbatch_tokens, "learning_rate": 0.0},
        )
        weights.append({n: p.detach().clone() for n, p in module.policy.named_parameters()})
    largest = max(float((weights[0][n] - weights[1][n]).abs().max()) for n in weights[0])
    assert largest < 1e-6
    assert len(split_demonstrations([([1] * 3, [2] * 2)] * 8, 10)) == 4
    assert len(split_demonstrations([([1] * 3, [2] * 2)] * 8, 1)) == 8


def test_the_reference_is_the_policy_after_the_cold_start(char_model):
    module = fit(
        char_model,
        ColdStart(ROWS, num_steps=5, batch_size=10, learning_rate=1e-2),
        module={"learning_rate": 0.0},
    )
    assert module.reference.snapshot is not None
    for name, copy in module.reference.snapshot.copies.items():
        assert torch.equal(copy, dict(module.policy.named_parameters())[name])


def test_a_resumed_run_is_not_started_cold_again(char_model, tmp_path):
    checkpoint = str(tmp_path / "a")
    module = make_module(char_model)
    trainer = make_trainer(callbacks=[ColdStart(ROWS, num_steps=2)], max_steps=1, max_epochs=-1)
    trainer.fit(module, make_data())
    trainer.save_checkpoint(checkpoint)
    calls = []

    class Counted(ColdStart):
        def train(self, *args: Any) -> list[float]:
            calls.append(1)
            return super().train(*args)

    again = make_module(char_model)
    trainer = make_trainer(callbacks=[Counted(ROWS, num_steps=2)], max_steps=2, max_epochs=-1)
    trainer.fit(again, make_data(), ckpt_path=checkpoint)
    assert calls == [] and again.is_cold_started and trainer.global_step == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "1="}], "no column 'completion'.*set cold_start.completion_column"),
        ([{"prompt": "1=", "completion": None}], "row 1 has no text in 'completion', but None"),
        (
            [{"prompt": "1=", "completion": "1"}, {"prompt": "1=", "completion": "1" * 70}],
            "row 2 has 73 tokens, but the model has only 64 positions",
        ),
        ([{"question": "1="}], "no column 'prompt'"),
        ("absent.jsonl", "no such file: absent.jsonl"),
    ],
)
def test_faulty_demonstrations_are_named(char_model, rows, message):
    with pytest.raises(ValueError, match=message):
        fit(char_model, ColdStart(rows, num_steps=1))
    assert not Path("reference").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 3}, "cold_start.num_steps is set, but cold_start.demonstrations is not"),
        ({"demonstrations": ROWS, "num_steps": -1}, "cold_start.num_steps must be >= 0"),
        ({"demonstrations": ROWS, "num_steps": 1, "batch_size": 0}, "cold_start.batch_size >= 1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ColdStart(**options)

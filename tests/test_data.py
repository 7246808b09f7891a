"""Which prompts come when: the stream, its resume in a real Trainer, and the evaluation loaders."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_grpo.data import PromptDataModule
from lightning_grpo.loaders import EvalBatch, EvalLoader, PromptStream, Slot, SlotLoader
from lightning_grpo.prompts import PromptFormat, prepare_prompts
from lightning_grpo.tasks import SortDigits
from lightning_grpo.types import PromptBatch

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = [{"prompt": f"p{i}", "answer": i} for i in range(13)]
SLOTS = 2  # slots per prompt batch; with 4 prompts per iteration an epoch has 6


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789=p"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )


TOKENIZER = make_tokenizer()


class QueueModule(L.LightningModule):
    """Takes prompts as the real callbacks do: when its queue is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = TOKENIZER
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.queue: list[tuple[int, list[str]]] = []
        self.trace: list[tuple[int, list[str]]] = []
        self.taken: list[PromptBatch] = []
        self.batches: list[EvalBatch] = []

    def on_train_batch_start(self, batch, batch_idx):
        assert type(batch) is Slot and batch.minibatch is None
        if not self.queue:
            prompts = self.trainer.datamodule.next_prompts()
            self.taken.append(prompts)
            self.queue = [(i, prompts.prompts) for i in range(SLOTS)]
        batch.minibatch = self.queue.pop(0)

    def training_step(self, batch, batch_idx):
        self.trace.append(batch.minibatch)
        return (self.weight - 1) ** 2

    def validation_step(self, batch, batch_idx):
        self.batches.append(batch)

    test_step = validation_step
    predict_step = validation_step

    def on_save_checkpoint(self, checkpoint):
        checkpoint["queue"] = self.queue

    def on_load_checkpoint(self, checkpoint):
        self.queue = checkpoint["queue"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_data(train=ROWS, *args, **options) -> PromptDataModule:
    data = PromptDataModule(train, *args, **{"prompts_per_iteration": 4, "seed": 3, **options})
    data.slots_per_iteration = SLOTS
    return data


def make_trainer(save: ModelCheckpoint | None = None, **flags) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=save is not None,
        callbacks=[save] if save else [],
        num_sanity_val_steps=0,
        **flags,
    )


def fit(data=None, save=None, ckpt_path=None, **flags) -> QueueModule:
    module = QueueModule()
    trainer = make_trainer(save, **flags)
    trainer.fit(module, data or make_data(), ckpt_path=ckpt_path, weights_only=True)
    return module


# The stream


def test_an_unshuffled_stream_repeats_the_rows_and_drops_the_ragged_tail():
    stream = PromptStream(7, 3, shuffle=False, seed=0)
    batches = [stream.next_batch() for _ in range(5)]
    assert batches == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert (stream.epoch, stream.index) == (2, 3)


def test_each_epoch_is_another_permutation_without_repetition():
    stream = PromptStream(8, 2, shuffle=True, seed=0)
    epochs = [[row for _ in range(4) for row in stream.next_batch()] for _ in range(5)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_the_order_is_pinned_for_resumes_on_other_machines():
    stream = PromptStream(8, 8, shuffle=True, seed=3)
    assert stream.next_batch() == PINNED_EPOCH_0
    assert stream.next_batch() == PINNED_EPOCH_1


PINNED_EPOCH_0 = [7, 0, 5, 2, 4, 6, 1, 3]
PINNED_EPOCH_1 = [0, 4, 2, 1, 7, 6, 3, 5]


def test_another_seed_is_another_order():
    first, second = (PromptStream(64, 64, shuffle=True, seed=seed) for seed in (0, 1))
    assert first.next_batch() != second.next_batch()


def test_the_position_alone_decides_what_comes_next():
    stream = PromptStream(13, 4, shuffle=True, seed=3)
    batches = [stream.next_batch() for _ in range(9)]
    for number in range(9):
        other = PromptStream(13, 4, shuffle=True, seed=3)
        other.epoch, other.index = divmod(number, 3)[0], number % 3 * 4
        assert other.next_batch() == batches[number]


def test_global_random_state_is_neither_used_nor_touched():
    import random

    random.seed(1)
    torch.manual_seed(1)
    first = PromptStream(9, 9, shuffle=True, seed=0).next_batch()
    after = (random.random(), torch.rand(()).item())
    random.seed(1)
    torch.manual_seed(1)
    assert (random.random(), torch.rand(()).item()) == after
    random.seed(2)
    assert PromptStream(9, 9, shuffle=True, seed=0).next_batch() == first


# Training


def test_an_epoch_has_one_prompt_batch_per_slots_and_no_prompt_twice():
    module = fit(max_epochs=1)
    assert len(module.trace) == 3 * SLOTS
    assert [number for number, _ in module.trace] == [0, 1] * 3
    prompts = [prompt for batch in module.taken for prompt in batch.prompts]
    assert len(set(prompts)) == 12


def test_prompts_come_with_ids_columns_and_positions_as_groups():
    batch = fit(max_steps=1).taken[0]
    numbers = [int(prompt[1:]) for prompt in batch.prompts]
    assert batch.columns == {"answer": numbers}
    letter, zero = 13, 2
    assert batch.prompt_ids == [[letter, *(zero + int(c) for c in str(n))] for n in numbers]
    assert batch.group_ids == [0, 1, 2, 3]


def test_the_loader_shows_neither_dataset_nor_sampler():
    loader = SlotLoader(3, 2)
    assert len(loader) == 6 and len(list(loader)) == 6
    assert not hasattr(loader, "dataset") and not hasattr(loader, "sampler")
    first, second = list(loader)[:2]
    assert first is not second
    assert first.to("cpu") is first


UNTIL = {"max_steps": 18}
SAVED = [
    ({"save_on_train_epoch_end": True}, {"max_epochs": 1}, {"max_epochs": 3}),
    ({"save_on_train_epoch_end": True}, {"max_steps": 6}, UNTIL),
    ({"every_n_train_steps": 6}, {"max_epochs": 1}, {"max_epochs": 3}),
    ({"every_n_train_steps": 6}, {"max_steps": 6}, UNTIL),
    ({"every_n_train_steps": 1}, {"max_epochs": 1}, {"max_epochs": 3}),
    ({"every_n_train_steps": 2}, {"max_steps": 2}, UNTIL),
    ({"every_n_train_steps": 3}, {"max_steps": 3}, UNTIL),
    ({"every_n_train_steps": 5}, {"max_epochs": 1}, {"max_epochs": 3}),
    ({"every_n_train_steps": 9}, {"max_epochs": 2}, {"max_epochs": 3}),
]


@pytest.fixture(scope="module")
def uninterrupted() -> list[tuple[int, list[str]]]:
    return fit(max_steps=18).trace


@pytest.mark.parametrize(("saving", "first", "second"), SAVED, ids=str)
def test_a_resumed_run_gets_the_next_prompts_exactly(
    tmp_path, uninterrupted, saving, first, second
):
    save = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{step}", **saving)
    before = fit(save=save, **first).trace
    path = min(tmp_path.iterdir(), key=lambda path: int(path.stem.partition("=")[2]))
    num_done = torch.load(path, weights_only=True)["global_step"]
    after = fit(ckpt_path=path, **second).trace
    assert before[:num_done] + after == uninterrupted


def test_another_trainer_starts_at_the_first_prompt_and_the_same_one_goes_on(uninterrupted):
    data = make_data()
    assert fit(data, max_steps=2).trace == uninterrupted[:2]
    assert fit(data, max_steps=2).trace == uninterrupted[:2]
    module, trainer = QueueModule(), make_trainer(max_epochs=1)
    trainer.fit(module, data)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data)
    assert module.trace == uninterrupted[:12]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train": ROWS[1:]}, "num_rows was 13, and is 12"),
        ({"train": [*ROWS[:-1], {"prompt": "p99", "answer": 0}]}, "prompts_sha256"),
        ({"seed": 4}, "seed was 3, and is 4"),
        ({"shuffle": False}, "shuffle was True, and is False"),
    ],
)
def test_a_resume_with_other_prompts_or_another_order_is_refused(tmp_path, changed, message):
    fit(save=ModelCheckpoint(dirpath=tmp_path, filename="a"), max_steps=2)
    with pytest.raises(ValueError, match=message):
        fit(make_data(**changed), ckpt_path=tmp_path / "a.ckpt", max_steps=4)


def test_a_resume_with_another_batch_size_goes_on_at_the_same_row(tmp_path):
    fit(save=ModelCheckpoint(dirpath=tmp_path, filename="a"), max_steps=2)
    whole = [p for batch in fit(max_steps=6).taken for p in batch.prompts]
    data = make_data(prompts_per_iteration=2)
    resumed = fit(data, ckpt_path=tmp_path / "a.ckpt", max_steps=6)
    assert [p for batch in resumed.taken for p in batch.prompts] == whole[4:8]


def test_validation_of_a_checkpoint_ignores_its_place_in_other_data(tmp_path):
    fit(save=ModelCheckpoint(dirpath=tmp_path, filename="a"), max_steps=2)
    module, trainer = QueueModule(), make_trainer()
    data = make_data(ROWS[:5], ROWS[:3])
    trainer.validate(module, data, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert len(module.batches) == 1


@pytest.mark.parametrize(
    ("flags", "num_slots", "num_taken"),
    [
        ({"limit_train_batches": 4, "max_epochs": 2}, 8, 4),
        ({"limit_train_batches": 0.5, "max_epochs": 1}, 3, 2),
        ({"fast_dev_run": True}, 1, 1),
        ({"accumulate_grad_batches": 2, "max_epochs": 1}, 6, 3),
        ({"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2}, 12, 6),
    ],
)
def test_trainer_flags_count_slots(flags, num_slots, num_taken, uninterrupted):
    module = fit(**flags)
    assert len(module.trace) == num_slots
    assert len(module.taken) == num_taken
    assert module.trace == uninterrupted[:num_slots]


@pytest.mark.parametrize("overfit", [4, 0.67])
def test_overfit_batches_repeats_the_first_prompts(overfit):
    module = fit(overfit_batches=overfit, max_epochs=3)
    assert len(module.trace) == 3 * 4
    two_batches = [["p0", "p1", "p2", "p3"], ["p4", "p5", "p6", "p7"]]
    assert [batch.prompts for batch in module.taken] == two_batches * 3


def test_overfit_batches_that_end_within_an_iteration_repeat_the_whole_iteration():
    module = fit(overfit_batches=3, max_epochs=2)
    assert [batch.prompts[0] for batch in module.taken] == ["p0", "p4", "p0"]


def test_another_tokenizer_prepares_the_prompts_anew_and_starts_at_the_first():
    data, trainer, module = make_data(), make_trainer(max_epochs=1), QueueModule()
    trainer.fit(QueueModule(), data)
    module.tokenizer = make_tokenizer()
    module.tokenizer.add_tokens(["p1"])
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data)
    batch = module.taken[0]
    assert batch.prompts == ["p0", "p10", "p6", "p4"]
    zero, letter, new = 2, 13, len(TOKENIZER)
    assert batch.prompt_ids == [[letter, zero], [new, zero], [letter, zero + 6], [letter, zero + 4]]


def test_the_module_knows_its_longest_prompt_and_its_columns():
    data = make_data(ROWS, [{"prompt": "p12345"}, {"prompt": "p", "answer": 1, "other": 2}])
    fit(data, max_steps=1)
    assert data.longest_prompt == 6
    assert data.column_names == ["answer"]
    assert data.num_prompt_batches == 3


def test_prompts_to_predict_need_no_columns_for_rewards():
    data = make_data(ROWS, None, None, [{"prompt": "p"}])
    fit(data, max_steps=1)
    make_trainer().predict(QueueModule(), data)
    assert data.column_names == ["answer"]


def test_what_was_read_is_reported(caplog):
    rows = [*ROWS, {"prompt": "p12345"}]
    data = make_data(rows, max_prompt_tokens=3, overlong_prompts="drop")
    trainer = make_trainer(max_steps=1)
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger=logger.name):
        trainer.fit(QueueModule(), data)
    logger.removeHandler(caplog.handler)
    assert (
        "data.train_data: 13 prompts, the longest has 3 tokens; 1 over max_prompt_tokens=3 "
        "dropped; 1 left over in each epoch, others each time"
    ) in caplog.text


# Evaluation


def prepared(num_rows: int):
    return prepare_prompts(ROWS[:num_rows], PromptFormat(), TOKENIZER)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_rows", [1, 4, 5, 13])
def test_ranks_share_the_rows_without_repetition_in_equally_many_batches(num_rows, world_size):
    loaders = [EvalLoader(prepared(num_rows), 2, rank, world_size) for rank in range(world_size)]
    batches = [list(loader) for loader in loaders]
    assert len({len(own) for own in batches}) == 1
    assert [len(loader) for loader in loaders] == [len(own) for own in batches]
    rows = [
        (g, p)
        for own in batches
        for b in own
        for g, p in zip(b.prompts.group_ids, b.prompts.prompts)
    ]
    assert sorted(rows) == [(i, f"p{i}") for i in range(num_rows)]
    assert all(len(batch.prompts) <= 2 for own in batches for batch in own)


def test_a_rank_without_rows_gets_empty_batches():
    batches = list(EvalLoader(prepared(5), 2, 1, 2))
    assert [batch.prompts.group_ids for batch in batches] == [[1, 3], []]
    assert batches[1].prompts.columns == {"answer": []}
    assert not hasattr(EvalLoader(prepared(5), 2, 0, 1), "dataset")


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_batches_pass_through_the_trainer_untouched(stage, precision):
    module, trainer = QueueModule(), make_trainer(precision=precision)
    data = make_data(ROWS, ROWS[:5], ROWS[:5], ROWS[:5], val_prompts_per_batch=2)
    getattr(trainer, stage)(module, data)
    assert [batch.prompts.prompts for batch in module.batches] == [
        ["p0", "p1"],
        ["p2", "p3"],
        ["p4"],
    ]
    assert [batch.prompts.group_ids for batch in module.batches] == [[0, 1], [2, 3], [4]]


def test_only_the_first_validation_prompts_are_used_on_request():
    module = QueueModule()
    make_trainer().validate(module, make_data(ROWS, ROWS, max_val_prompts=3))
    assert [batch.prompts.prompts for batch in module.batches] == [["p0", "p1", "p2"]]
    module = QueueModule()
    make_trainer().test(module, make_data(ROWS, None, ROWS, max_val_prompts=3))
    assert [len(batch.prompts) for batch in module.batches] == [13]


def test_fit_validates_when_there_is_validation_data_and_not_otherwise():
    assert fit(max_epochs=1).batches == []
    assert len(fit(make_data(ROWS, ROWS[:2]), max_epochs=2).batches) == 2


def test_dropped_rows_do_not_shift_the_groups_of_others():
    rows = [{"prompt": "p1"}, {"prompt": "p123"}, {"prompt": "p2"}]
    module = QueueModule()
    data = make_data(ROWS, rows, max_prompt_tokens=3, overlong_prompts="drop")
    make_trainer().validate(module, data)
    assert module.batches[0].prompts.group_ids == [0, 2]


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts_per_iteration": 0}, "prompts_per_iteration must be at least 1, got 0"),
        ({"val_prompts_per_batch": 0}, "val_prompts_per_batch must be at least 1"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens must be at least 1"),
        ({"max_val_prompts": -1}, "max_val_prompts must be at least 1"),
        ({"overlong_prompts": "cut"}, "overlong_prompts must be one of"),
    ],
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PromptDataModule(ROWS, **options)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (make_data(ROWS[:3]), r"data\.train_data has 3 prompts.*prompts_per_iteration=4"),
        (make_data("nowhere.jsonl"), r"data\.train_data: no such file: nowhere\.jsonl"),
        (make_data([{"q": "1"}] * 4), r"data\.train_data: row 1 of 4: no column 'prompt'"),
        (make_data(ROWS, [{"prompt": ""}]), r"data\.val_data: row 1 of 1: the prompt is empty"),
        (make_data(chat=True), r"data\.train_data: row 1 is a chat.*no chat template"),
        (make_data(max_prompt_tokens=2), r"data\.train_data: row 11 has a prompt of 3 tokens"),
    ],
)
def test_a_fit_with_bad_data_stops_at_the_start(data, message):
    with pytest.raises(ValueError, match=message):
        fit(data, max_steps=1)


@pytest.mark.parametrize(
    ("stage", "split"), [("validate", "val"), ("test", "test"), ("predict", "predict")]
)
def test_a_stage_without_its_data_says_which_option_is_missing(stage, split):
    with pytest.raises(ValueError, match=rf"trainer\.{stage} needs data\.{split}_data"):
        getattr(make_trainer(), stage)(QueueModule(), make_data())


def test_the_data_module_alone_says_that_it_needs_a_trainer():
    with pytest.raises(ValueError, match="inside a Trainer"):
        make_data().setup("fit")
    assert make_data().state_dict() == {}


# Configuration


def parse(*args: str) -> PromptDataModule:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PromptDataModule, "data")
    return parser.instantiate(parser.parse_args(list(args))).data


def test_a_file_or_a_task_can_be_named_in_a_configuration():
    name = "lightning_grpo.tasks.SortDigits"
    given = f'{{"class_path": "{name}", "init_args": {{"num_prompts": 5}}}}'
    data = parse("--data.train_data=a.jsonl", f"--data.val_data={given}")
    assert data.sources["train"] == ("a.jsonl", "train")
    task = data.sources["val"][0]
    assert isinstance(task, SortDigits) and len(task) == 5
    data = parse(f"--data.train_data={name}", "--data.train_data.num_prompts=6")
    assert len(data.sources["train"][0]) == 6


# Ranks

TWO_RANKS = """
import json
import sys
sys.path[:0] = {path!r}
from test_data import ROWS, QueueModule, make_data, make_trainer

module = QueueModule()
trainer = make_trainer(devices=2, strategy="ddp", max_steps=6, use_distributed_sampler=False)
errors = []
rows_that_differ = ROWS[trainer.local_rank :]
for data in (make_data(prompts_per_iteration=3), make_data(rows_that_differ)):
    try:
        trainer.fit(module, data)
    except ValueError as error:
        errors.append(str(error))
trainer.fit(module, make_data(ROWS, ROWS[:5], val_prompts_per_batch=2))
result = {{
    "errors": errors,
    "taken": [(batch.group_ids, batch.prompts) for batch in module.taken],
    "validated": [batch.prompts.group_ids for batch in module.batches],
}}
with open({out!r} + str(trainer.global_rank), "w") as file:
    json.dump(result, file)
"""


def test_two_ranks_share_each_batch_of_one_process_and_refuse_together(tmp_path):
    alone = [batch.prompts for batch in fit(max_steps=6).taken]
    here = Path(__file__).resolve().parent
    script = tmp_path / "script.py"
    script.write_text(
        TWO_RANKS.format(path=[str(here), str(here.parent)], out=str(tmp_path / "rank"))
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1))
    pairs = list(zip(first["taken"], second["taken"], strict=True))
    assert [own[1] + other[1] for own, other in pairs] == alone
    assert all([own[0], other[0]] == [[0, 1], [2, 3]] for own, other in pairs)
    assert first["validated"] == [[0, 2], [4]]
    assert second["validated"] == [[1, 3], []]
    for result in (first, second):
        assert "prompts_per_iteration=3 must be a multiple of the 2" in result["errors"][0]
        assert "data.train_data differs between the ranks" in result["errors"][1]

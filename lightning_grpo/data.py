"""PromptDataModule: which prompts come next, on which rank, and where a resumed run goes on."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_grpo.loaders import EvalLoader, PromptStream, SlotLoader
from lightning_grpo.prompts import Overlong, PromptFormat, PromptSet, prepare_prompts
from lightning_grpo.run_state import global_seed
from lightning_grpo.sources import Rows, read_rows
from lightning_grpo.types import PromptBatch

Split = Literal["train", "val", "test", "predict"]

# The data that a stage of the Trainer reads; fit may go without validation.
_SPLITS_OF_STAGE: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}


class PromptDataModule(LightningDataModule):
    """Prompts for training and evaluation, from files, `datasets` names or built-in tasks.

    Data is a path or fsspec URL (.jsonl, .json, .csv, .parquet, compressed or not), a
    `package://` file, the name of a dataset for `datasets`, or a class_path whose instance has a
    length and gives rows as dicts. All columns but the prompt go to the reward functions.

    Args:
        train_data: prompts that the policy learns on.
        val_data: prompts that validation measures on; none skips it.
        test_data: prompts of `test`.
        predict_data: prompts of `predict`.
        dataset_config: configuration of a `datasets` name.
        train_split: split of a `datasets` name for training.
        val_split: the same for validation.
        test_split: the same for test.
        predict_split: the same for predict.
        prompts_per_iteration: N over all ranks; a multiple of the number of data-parallel ranks.
        val_prompts_per_batch: prompts per evaluation batch and rank.
        prompt_column: column with the prompt: a string, or a list of chat messages.
        prompt_template: text with columns in braces, used in place of the prompt column, such as
            "Question: {question}"; a literal brace is written twice.
        system_prompt: put before every chat that has no system message of its own; implies chat.
        chat: make string prompts the user message of a chat.
        max_prompt_tokens: longest prompt in tokens; null sets no bound.
        overlong_prompts: what to do with a longer one: stop, drop the row, or keep its last
            tokens (after a BOS). Counted and reported at start.
        shuffle: permute the training prompts anew in every epoch.
        seed: of these permutations; sampling has its own. seed_everything when null.
        max_val_prompts: use only the first rows of the validation data.
    """

    def __init__(
        self,
        train_data: str | Rows,
        val_data: str | Rows | None = None,
        test_data: str | Rows | None = None,
        predict_data: str | Rows | None = None,
        *,
        dataset_config: str | None = None,
        train_split: str = "train",
        val_split: str = "test",
        test_split: str = "test",
        predict_split: str = "test",
        prompts_per_iteration: int = 32,
        val_prompts_per_batch: int = 64,
        prompt_column: str = "prompt",
        prompt_template: str | None = None,
        system_prompt: str | None = None,
        chat: bool = False,
        max_prompt_tokens: int | None = None,
        overlong_prompts: Overlong = "error",
        shuffle: bool = True,
        seed: int | None = None,
        max_val_prompts: int | None = None,
    ) -> None:
        super().__init__()
        counts = {
            "prompts_per_iteration": prompts_per_iteration,
            "val_prompts_per_batch": val_prompts_per_batch,
            "max_prompt_tokens": max_prompt_tokens,
            "max_val_prompts": max_val_prompts,
        }
        for option, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"{option} must be at least 1, got {count}")
        if overlong_prompts not in get_args(Overlong):
            raise ValueError(
                f"overlong_prompts must be one of {get_args(Overlong)}, got {overlong_prompts!r}"
            )
        self.sources: dict[Split, tuple[str | Rows | None, str]] = {
            "train": (train_data, train_split),
            "val": (val_data, val_split),
            "test": (test_data, test_split),
            "predict": (predict_data, predict_split),
        }
        self.dataset_config = dataset_config
        self.prompts_per_iteration = prompts_per_iteration
        self.val_prompts_per_batch = val_prompts_per_batch
        self.prompt_format = PromptFormat(prompt_column, prompt_template, system_prompt, chat)
        self.max_prompt_tokens = max_prompt_tokens
        self.overlong_prompts: Overlong = overlong_prompts
        self.shuffle = shuffle
        self.seed = seed
        self.max_val_prompts = max_val_prompts

        self.slots_per_iteration = 1
        """Lightning batches per prompt batch, K x M; a callback sets it before the fit starts."""
        self._prompts: dict[Split, PromptSet] = {}
        self._tokenizer: Any = None
        self._train_sha256 = ""
        self._stream: PromptStream | None = None

    # Set-up

    def setup(self, stage: str) -> None:
        """Read, render and tokenize what the stage needs; twice does no harm.

        Args:
            stage: fit, validate, test or predict.
        """
        tokenizer: Any = self._attached_trainer().lightning_module.tokenizer
        if tokenizer is not self._tokenizer:
            self._tokenizer = tokenizer
            self._prompts.clear()
            self._stream = None
        for split in _SPLITS_OF_STAGE[stage]:
            source, _ = self.sources[split]
            if source is not None and split not in self._prompts:
                self._prompts[split] = self._prepare(split)
            elif source is None and stage != "fit":
                raise ValueError(f"trainer.{TrainerFn(stage).value} needs data.{split}_data")
        if stage == "fit":
            self._start_stream()

    def _prepare(self, split: Split) -> PromptSet:
        source, split_name = self.sources[split]
        name = f"data.{split}_data"
        if source is None:
            raise ValueError(f"{name} is not set")
        try:
            rows: Any = read_rows(source, dataset_config=self.dataset_config, split=split_name)
            if split == "val" and self.max_val_prompts is not None:
                rows = [rows[i] for i in range(min(len(rows), self.max_val_prompts))]
            prompts = prepare_prompts(
                rows,
                self.prompt_format,
                self._tokenizer,
                max_prompt_tokens=self.max_prompt_tokens,
                overlong_prompts=self.overlong_prompts,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        rank_zero_info(self._report(name, prompts))
        return prompts

    def _report(self, name: str, prompts: PromptSet) -> str:
        report = f"{name}: {len(prompts)} prompts, the longest has {prompts.longest} tokens"
        if self.max_prompt_tokens is not None:
            treated = "dropped" if self.overlong_prompts == "drop" else "left-truncated"
            report += (
                f"; {prompts.num_overlong} over max_prompt_tokens={self.max_prompt_tokens} "
                f"{treated}"
            )
        left_over = len(prompts) % self.prompts_per_iteration
        if name == "data.train_data" and left_over:
            which = "others each time" if self.shuffle else "always the last ones"
            report += f"; {left_over} left over in each epoch, {which}"
        return report

    def _start_stream(self) -> None:
        num_rows = len(self._prompts["train"])
        _, world_size = self._rank_and_world_size()
        if self.prompts_per_iteration % world_size:
            raise ValueError(
                f"data.prompts_per_iteration={self.prompts_per_iteration} must be a multiple of "
                f"the {world_size} data-parallel ranks"
            )
        if num_rows < self.prompts_per_iteration:
            raise ValueError(
                f"data.train_data has {num_rows} prompts, fewer than "
                f"data.prompts_per_iteration={self.prompts_per_iteration}: lower it"
            )
        trainer = self._attached_trainer()
        sha256 = self._prompts["train"].sha256()
        is_same = trainer.strategy.broadcast(sha256) == sha256
        if not trainer.strategy.reduce_boolean_decision(is_same):
            raise ValueError("data.train_data differs between the ranks: give all the same data")
        self._train_sha256 = sha256
        # Another fit of the same trainer goes on; a new trainer starts at the first prompt.
        if self._stream is None or trainer.global_step == 0:
            self._stream = PromptStream(
                num_rows, self.prompts_per_iteration, shuffle=self.shuffle, seed=self.order_seed
            )

    def _attached_trainer(self) -> Trainer:
        if self.trainer is None:
            raise ValueError("PromptDataModule works inside a Trainer: fit(module, datamodule=...)")
        return self.trainer

    def _rank_and_world_size(self) -> tuple[int, int]:
        # Under ModelParallelStrategy these are the data-parallel rank and size.
        kwargs = self._attached_trainer().distributed_sampler_kwargs
        return (kwargs["rank"], kwargs["num_replicas"]) if kwargs else (0, 1)

    # Training prompts

    @property
    def order_seed(self) -> int:
        """The seed of the prompts' order."""
        return global_seed() if self.seed is None else self.seed

    @property
    def num_prompt_batches(self) -> int:
        """Iterations in one pass over the training prompts; a ragged tail is left over."""
        return len(self._prompts["train"]) // self.prompts_per_iteration

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that was read so far, in any split."""
        return max((prompts.longest for prompts in self._prompts.values()), default=0)

    @property
    def column_names(self) -> list[str]:
        """Columns that reward functions can count on: all data that is scored has them."""
        scored = [prompts for split, prompts in self._prompts.items() if split != "predict"]
        first = scored[0].columns if scored else {}
        return [name for name in first if all(name in prompts.columns for prompts in scored)]

    def column(self, split: Split, name: str) -> list[Any] | None:
        """One column of data that was read, None in rows that lack it; None where no row has it."""
        return self._prompts[split].columns.get(name) if split in self._prompts else None

    def next_prompts(self) -> PromptBatch:
        """Take this rank's part of the next global batch of training prompts.

        Returns:
            N / ranks prompts; group ids are positions in the global batch, from 0 to N - 1.
        """
        rank, world_size = self._rank_and_world_size()
        num_own = self.prompts_per_iteration // world_size
        positions = range(rank * num_own, (rank + 1) * num_own)
        batch = self._fit_stream().next_batch()
        return self._prompts["train"].select([batch[i] for i in positions], positions)

    def _fit_stream(self) -> PromptStream:
        if self._stream is None:
            raise ValueError("training prompts exist after setup('fit')")
        return self._stream

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the stream of training prompts, and what it is a place in."""
        if self._stream is None:
            return {}
        place = {"epoch": self._stream.epoch, "index": self._stream.index}
        return place | self._order_fingerprint()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was; validate, test and predict have no place to restore.

        Args:
            state_dict: of `state_dict`.

        Raises:
            ValueError: the checkpoint was made with other training prompts or another order.
        """
        if self._attached_trainer().state.fn != TrainerFn.FITTING:
            return
        for option, value in self._order_fingerprint().items():
            if state_dict[option] != value:
                raise ValueError(
                    f"the checkpoint was made with other training prompts: {option} was "
                    f"{state_dict[option]}, and is {value} with the present data.* options. "
                    "Resume with the options and the data of the first run, or start a new run "
                    "from the weights"
                )
        stream = self._fit_stream()
        stream.epoch, stream.index = state_dict["epoch"], state_dict["index"]

    def _order_fingerprint(self) -> dict[str, Any]:
        return {
            "num_rows": len(self._prompts["train"]),
            "prompts_sha256": self._train_sha256,
            "shuffle": self.shuffle,
            "seed": self.order_seed,
        }

    # Loaders

    def train_dataloader(self) -> SlotLoader:
        """Return the slots of one pass over the training prompts."""
        stream = self._fit_stream()
        loader = SlotLoader(self.num_prompt_batches, self.slots_per_iteration)
        overfit: int | float = self._attached_trainer().overfit_batches  # type: ignore[attr-defined]
        if overfit:
            num_slots = overfit if isinstance(overfit, int) else int(len(loader) * overfit)
            wanted = max(1, math.ceil(num_slots / self.slots_per_iteration))
            stream.restrict(min(wanted, self.num_prompt_batches))
        return loader

    def val_dataloader(self) -> EvalLoader | list[EvalLoader]:
        """Return this rank's part of the validation prompts, or nothing if there are none."""
        return self._eval_loader("val") if "val" in self._prompts else []

    def test_dataloader(self) -> EvalLoader:
        """Return this rank's part of the test prompts."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> EvalLoader:
        """Return this rank's part of the prompts to complete."""
        return self._eval_loader("predict")

    def _eval_loader(self, split: Split) -> EvalLoader:
        rank, world_size = self._rank_and_world_size()
        return EvalLoader(self._prompts[split], self.val_prompts_per_batch, rank, world_size)

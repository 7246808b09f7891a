"""The LightningModule: one minibatch becomes one loss and, at a window's end, one step.

One iteration, and who does each part:

    RolloutGeneration   N prompts -> N x G completions               rollout.py, generation/
    RewardScoring       completions -> rewards                       rewards/
    AlgorithmSwitch     evidence -> GRPO or PPO, and its critic      separability.py, switching.py
    InnerEpochReplay    old and reference log-probs, values,
                        advantages, K epochs x M minibatches         scoring.py, algorithms/
    GRPOModule          minibatch -> loss -> optimizer step          losses.py, masking.py
    KLMonitor           adaptive beta, early stop, rollback          kl.py
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MetricCollection
from transformers import PreTrainedTokenizerBase, TrainerState

from lightning_grpo.adapters import Lora
from lightning_grpo.algorithms import GRPO, PPO, Algorithm
from lightning_grpo.building import make_policy, make_ready_to_fit
from lightning_grpo.choices import Auto, Choices, OldLogprobs, chosen_by_options, resume_choices
from lightning_grpo.critic import CriticSettings, critic_parameters
from lightning_grpo.distributed import failing_together, gather_rows
from lightning_grpo.evaluation import Judge, update_metrics, validation_metrics
from lightning_grpo.generation import Engine, SamplingKey, build_engine
from lightning_grpo.lifecycle import call_before_loading, enter_stage
from lightning_grpo.loaders import EvalBatch, Slot
from lightning_grpo.memory.run import refuse_what_cannot_fit, settle_memory
from lightning_grpo.metrics import MetricSums
from lightning_grpo.nonfinite import NonfiniteGuard
from lightning_grpo.optimization import (
    LRSchedule,
    adamw,
    clip_gradients,
    gradient_norm,
    make_lr_scheduler,
    make_optimizer,
)
from lightning_grpo.packing_check import Packing
from lightning_grpo.paths import resolve_package_path
from lightning_grpo.policy import Dtype, Policy, eos_token_ids
from lightning_grpo.reference import Reference, settle_reference
from lightning_grpo.rewards import EarlyScores, Scorer, Scores
from lightning_grpo.rollout import RolloutSettings, collect_rollout
from lightning_grpo.run_state import Counters, Phase
from lightning_grpo.saved_run import KEY, check_record, read_checkpoint, record_of, restore_record
from lightning_grpo.scoring import score_completions, start_scoring
from lightning_grpo.snapshot import WeightSnapshot
from lightning_grpo.stages import Stage, is_ppo, moves_policy
from lightning_grpo.startup import refuse_unsupported, warn_of_idle_kl, warn_of_lost_updates
from lightning_grpo.tokenizing import load_tokenizer
from lightning_grpo.types import Minibatch, PromptBatch, Rollout
from lightning_grpo.update import Learners, microbatch_loss

# Keys of validation draws never meet those of training.
_VAL_SEED_OFFSET = 1_000_003
NO_CALLBACKS = (
    "the module got no {what}: give the Trainer lightning_grpo.callbacks.standard(...) as callbacks"
)


class GRPOModule(L.LightningModule):
    """Policy, frozen reference and old policy, and the loss that moves the policy.

    Args:
        name_or_path: the model: a name on the Hub, a local folder, or `package://` data.
        tokenizer: name or folder of the tokenizer; the model's own when null.
        init: take the model's weights (pretrained), or only its configuration (random).
        revision: branch, tag or commit of a Hub name.
        dtype: of the parameters; float32 parameters under `trainer.precision: bf16-mixed` are
            the usual choice on a GPU.
        attn_implementation: of transformers, such as sdpa, eager or flash_attention_2.
        lora: train low-rank adapters instead of all weights; the reference is then free.
        activation_checkpointing: recompute activations in the backward pass: slower, and less
            memory (auto: only where the estimated memory does not fit without).
        dropout: keep the model's dropout during the update.
        packing: forward the prompt of a group once for all its completions, and no padding (auto:
            where the architecture allows it and a check at the start agrees), or row by row (off).
        algorithm: of the GRPO family: turns rewards into advantages and log-probs into a loss.
        ppo: the same with a critic, for the iterations that `switch` gives to PPO.
        critic: the critic of PPO; null allows none.
        beta: weight of the KL to the reference; 0 loads no reference.
        kl_in: add beta times the KL to the loss, or take it from the reward of each token (k1, of
            the policy that sampled), for whichever algorithm runs.
        optimizer: made from the trainable parameters.
        lr_schedule: course of the learning rate over the optimizer steps of the run, after a
            linear warm-up; linear and cosine end at 0.
        num_warmup_steps: optimizer steps over which the learning rate rises from 0.
        microbatch_tokens: most tokens of one forward with gradients, padding counted where there
            is any (auto: the largest power of two that fits, at most 16384 on a CPU and 65536 on a
            GPU). It changes memory and speed, never the gradient.
        old_policy: keep the old policy as log-probs, or as a copy of the weights too, which a
            rollback needs.
        old_logprobs: recompute the old log-probs with a forward, trust the sampler's, or (auto)
            trust them in fp32 when the first rollout shows that they agree within 1e-5.
        max_nonfinite_steps: stop after so many skipped steps in a row.
        check_memory: refuse a fit whose estimated memory is above that of its device.
    """

    stage: Stage = "grpo"
    """Which algorithm moves the policy now, and what the critic does: see stages.py."""
    critic_failure: str | None = None
    """What is wrong with the critic, until it is freed for it."""
    num_critic_failures: int = 0
    """Critics that were freed because they gave no finite numbers."""
    is_forward_settled: bool = False
    """Whether the policy forwards as it will in a fit."""
    _is_ready_to_fit: bool = False
    may_use_critic: bool = True
    """Whether PPO can come up at all in this run."""
    num_critic_warmup_iterations: int = 0
    """Iterations at the start of the run in which the critic alone learns."""
    is_step_skipped: bool = False
    """Whether the last optimizer step did not happen."""
    is_cold_started: bool = False
    """Whether a supervised phase came before."""
    initial_hash: str = ""
    """Of the weights that the model's folder gave."""
    early_scores: EarlyScores | None = None
    """Of the rows of a rollout that is not scored yet."""
    print_above_bar: Callable[..., None] | None = None
    """Set by a progress bar that others must not print into."""

    def __init__(
        self,
        name_or_path: str,
        tokenizer: str | None = None,
        init: Literal["pretrained", "random"] = "pretrained",
        revision: str | None = None,
        dtype: Dtype = "float32",
        attn_implementation: str | None = None,
        lora: Lora | None = None,
        activation_checkpointing: bool | Auto = "auto",
        dropout: bool = False,
        packing: Packing = "auto",
        algorithm: Algorithm | None = None,
        ppo: PPO = PPO(),  # noqa: B008  # frozen
        critic: CriticSettings | None = None,
        beta: float = 0.04,
        kl_in: Literal["loss", "reward"] = "loss",
        optimizer: OptimizerCallable = adamw,
        lr_schedule: LRSchedule = "constant",
        num_warmup_steps: int = 0,
        microbatch_tokens: int | Auto = "auto",
        old_policy: Literal["logprobs", "weights"] = "logprobs",
        old_logprobs: OldLogprobs | Auto = "auto",
        max_nonfinite_steps: int = 3,
        check_memory: bool = True,
    ) -> None:
        super().__init__()
        if beta < 0:
            raise ValueError(f"model.beta must be >= 0, got {beta}")
        self.name_or_path = name_or_path
        self.init = init
        self.load_options: dict[str, Any] = {
            "init": init,
            "revision": revision,
            "dtype": dtype,
            "attn_implementation": attn_implementation,
            "lora": lora,
            "dropout": dropout,
        }
        self.option_choices = chosen_by_options(
            microbatch_tokens, activation_checkpointing, packing, old_logprobs
        )
        self.choices = self.option_choices
        self.algorithm: Algorithm = algorithm or GRPO()
        self.ppo = ppo
        self.critic_settings = critic
        self.beta = beta
        self.kl_in = kl_in
        self.make_optimizer = optimizer
        self.lr_schedule = lr_schedule
        self.num_warmup_steps = num_warmup_steps
        self.old_policy_form = old_policy
        self.check_memory = check_memory

        path = resolve_package_path(tokenizer or name_or_path)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(
            path, revision=None if tokenizer else revision
        )
        self.policy: Policy = None  # type: ignore[assignment]  # made in configure_model
        self.critic: nn.Module | None = None
        self.reference: Reference | None = None
        self.old_policy: WeightSnapshot | None = None
        self.reference_record: dict[str, str] = {}

        # Set by the callbacks before the run starts.
        self.rollout_settings: RolloutSettings | None = None
        self.scorer: Scorer | None = None
        self.judge = Judge()

        # The state of the run.
        self.rollout: Rollout | None = None
        self.queue: deque[Minibatch] = deque()
        self.counters = Counters()
        self.phase = Phase()
        self.minibatch_metrics: dict[str, float] = {}
        self.nonfinite_guard = NonfiniteGuard(max_nonfinite_steps)
        self._engine: Engine | None = None
        self.val_metrics = validation_metrics("val/")
        self.test_metrics = validation_metrics("test/")

    def setup(self, stage: str) -> None:
        """Refuse what cannot work, and find out where the run writes (on rank 0, for all)."""
        refuse_unsupported(self.trainer, stage)
        if stage == "fit":
            settle_memory(self, self.trainer)
            if self.check_memory:
                refuse_what_cannot_fit(self, self.trainer)
            call_before_loading(self.trainer.strategy, self._make_room_for)
        self.run_dir = Path(self.trainer.log_dir or self.trainer.default_root_dir)

    def configure_model(self) -> None:
        """Load the policy, shard it under FSDP2; for a fit take the reference, make the critic."""
        if self.policy is None:
            make_policy(self)
        if self.trainer.state.fn == "fit":
            if not self._is_ready_to_fit:
                make_ready_to_fit(self)
                self._is_ready_to_fit = True
            enter_stage(self, self.stage)

    def _make_room_for(self, path: Path) -> None:
        """Do as the run of a checkpoint did, and make or free the critic: weights come next."""
        if self.trainer.state.fn != "fit":
            return
        saved = read_checkpoint(path)[KEY]
        check_record(self, saved)
        resume_choices(self, saved["choices"])
        enter_stage(self, saved["stage"])

    def configure_optimizers(self) -> Any:
        """One optimizer with a group for the policy and one for the critic, and its schedule."""
        optimizer = make_optimizer(
            self.make_optimizer,
            list(self.policy.trainable().values()),
            [] if self.critic is None else critic_parameters(self.critic, self.policy),
            critic_lr=self.critic_settings.learning_rate if self.critic_settings else None,
        )
        scheduler = make_lr_scheduler(
            optimizer,
            self.lr_schedule,
            num_warmup_steps=self.num_warmup_steps,
            num_steps=self.trainer.estimated_stepping_batches - self.num_critic_warmup_steps,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_fit_start(self) -> None:
        """Warn of settings that train nothing or not what they seem to."""
        warn_of_lost_updates(self.policy, self.trainer.optimizers[0])
        algorithms: dict[str, object] = {"model.algorithm": self.algorithm}
        if self.critic_settings is not None and self.may_use_critic:
            algorithms["model.ppo"] = self.ppo
        warn_of_idle_kl(algorithms, self.loss_beta)

    def on_train_start(self) -> None:
        """Settle the reference, after a checkpoint was loaded or a cold start was made."""
        if self.reference is None:
            return
        is_dry_run = self.trainer.fast_dev_run  # type: ignore[attr-defined]
        if is_dry_run and not self.reference_record:
            if self.is_cold_started:
                self.reference.retake()
            return  # such a run leaves no files
        self.reference_record = settle_reference(
            self.reference,
            self.reference_record,
            folder=self.run_dir / "reference",
            initial_hash=self.initial_hash,
            origin="cold_start" if self.is_cold_started else self.init,
            is_main=self.trainer.is_global_zero,
            ranks=self,
        )

    # One minibatch

    def training_step(self, slot: Slot, batch_idx: int) -> Tensor:
        """Turn the minibatch in the slot into a loss.

        All micro-batches but the last have their backward here; Lightning runs the last one's
        and divides only that one by `accumulate_grad_batches`.
        """
        minibatch = slot.minibatch
        if minibatch is None:
            raise RuntimeError(NO_CALLBACKS.format(what="a minibatch"))
        sums = MetricSums()
        for rows in minibatch.microbatches[:-1]:
            loss = self._scaled_loss(minibatch, rows, sums)
            self.trainer.strategy.backward(loss, self.trainer.optimizers[0])
        loss = self._scaled_loss(minibatch, minibatch.microbatches[-1], sums)
        self.minibatch_metrics = sums.reduce(self.sum_over_ranks)
        # Without the critic's: what it does wrong must not keep the policy from its step.
        self.nonfinite_guard.note_loss(self.minibatch_metrics.get("policy/loss", 0.0))
        self.log_dict(self.minibatch_metrics, batch_size=1)
        return loss * self.trainer.accumulate_grad_batches

    def _scaled_loss(self, minibatch: Minibatch, rows: Tensor, sums: MetricSums) -> Tensor:
        learners = Learners(
            self.policy,
            self.acting_algorithm,
            self.critic,  # type: ignore[arg-type]
            self.ppo,
            self.stage,
        )
        result = microbatch_loss(
            learners,
            minibatch,
            rows,
            beta=self.loss_beta,
            temperature=self.settings.sampling.temperature,
            max_completion_tokens=self.settings.sampling.max_completion_tokens,
        )
        sums.add(result.metrics)
        self.nonfinite_guard.note_rows(result.rows, result.is_finite)
        # DDP and FSDP2 average gradients over ranks; the denominator already counts all ranks.
        return result.loss_sum * (self.num_ranks / minibatch.denominator)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the gradient norms; drop the step, on all ranks, when something is not finite."""
        policy, critic = optimizer.param_groups
        norm = gradient_norm(policy["params"])
        numbers = {"policy/lr": policy["lr"]}
        if moves_policy(self.stage):
            numbers["policy/grad_norm"] = norm
        if self.critic is not None:
            critic_norm = gradient_norm(critic["params"])
            numbers |= {"value/grad_norm": critic_norm, "value/lr": critic["lr"]}
            if not math.isfinite(critic_norm):
                self.critic_failure = f"its gradient has norm {critic_norm}"
                for parameter in critic["params"]:
                    parameter.grad = None
        self.log_dict(numbers, batch_size=1)
        name = f"step_{self.trainer.global_step}_rank_{self.global_rank}.jsonl"
        path = self.run_dir / "nonfinite" / name
        self.is_step_skipped = self.nonfinite_guard.must_skip(norm, path)
        if self.is_step_skipped:
            # None and not zero: AdamW moves weights on a zero gradient too.
            optimizer.zero_grad(set_to_none=True)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the policy as the Trainer says and the critic as model.critic says."""
        clip_gradients(
            optimizer,
            policy_clip=gradient_clip_val,
            is_clipped_by_value=gradient_clip_algorithm == "value",
            critic_max_norm=self.critic_settings.max_grad_norm if self.critic_settings else None,
        )

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step, and free the gradients, so that none are held during the next rollout."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # Counted when Lightning has counted too: a Ctrl-C before leaves both as they were.
        if self.is_step_skipped:
            self.counters.skipped_steps += 1
        else:
            self.counters.optimizer_steps += 1
        optimizer.zero_grad(set_to_none=True)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Do nothing: Lightning calls this after micro-batches have had their backward."""

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step the schedule with every step that the policy made."""
        if not self.is_step_skipped and moves_policy(self.stage):
            super().lr_scheduler_step(scheduler, metric)

    # Completions

    def make_rollout(
        self, prompts: PromptBatch, *, is_training: bool, is_scored: bool = True
    ) -> Rollout:
        """Complete prompts with the policy as it is.

        Args:
            prompts: N prompts.
            is_training: with the training settings and the iteration's draws, or those of
                validation, which are the same at every validation.
            is_scored: reward functions may begin with rows that have ended; `score` ends it.

        Returns:
            A rollout without rewards.
        """
        settings = self.settings
        key = SamplingKey(settings.seed, self.counters.iterations)
        if not is_training:
            key = SamplingKey(settings.seed + _VAL_SEED_OFFSET, 0)
        group_size = settings.group_size if is_training else settings.num_val_samples
        early = EarlyScores({})
        if is_scored and self.scorer is not None:
            early = start_scoring(self.scorer, prompts, group_size, self.trainer_state())
        num_rows, num_done = len(prompts) * group_size, 0

        def on_completed(rows: Sequence[int], *completed: Any) -> None:
            nonlocal num_done
            num_done += len(rows)
            self.phase.advance(num_done, num_rows)
            early.add(rows, *completed)

        with early:
            rollout = collect_rollout(
                self.engine,
                self.tokenizer,
                prompts,
                settings.sampling_of(prompts, is_training=is_training),
                group_size,
                key=key,
                on_completed=on_completed,
            )
        self.early_scores = early
        return rollout

    def score(self, rollout: Rollout) -> Scores:
        """Give a rollout's completions to the reward functions.

        Args:
            rollout: B rows, made by `make_rollout` and perhaps changed.

        Returns:
            Rewards of B rows and what the functions logged.
        """
        early, self.early_scores = self.early_scores, None
        return score_completions(self.required_scorer, rollout, self.trainer_state(), early)

    @property
    def engine(self) -> Engine:
        """The rollout engine, made when it is first needed."""
        if self._engine is None:
            self._engine = build_engine(
                self.settings.engine,
                self.policy,
                self.tokenizer,
                eos_token_ids(self.policy, self.tokenizer),
                max_rows=self.settings.max_rows,
                first_decoder=self.choices.decoder,
            )
        return self._engine

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> None:
        """Complete and score a batch of validation prompts."""
        self._evaluate(batch.prompts, self.val_metrics, "validating")

    def test_step(self, batch: EvalBatch, batch_idx: int) -> None:
        """Complete and score a batch of test prompts."""
        self._evaluate(batch.prompts, self.test_metrics, "testing")

    def predict_step(self, batch: EvalBatch, batch_idx: int) -> Rollout:
        """Complete a batch of prompts."""
        return self.make_rollout(batch.prompts, is_training=False, is_scored=False)

    def _evaluate(self, prompts: PromptBatch, metrics: MetricCollection, phase: str) -> None:
        self.phase.enter(phase)
        rollout = self.make_rollout(prompts, is_training=False)
        with failing_together(self, "scoring completions"):
            scores = self.score(rollout)
            successes = self.judge.successes(scores.function_rewards) if len(rollout) else []
            answers = self.judge.answers(rollout.completions)
        update_metrics(
            metrics,
            num_samples=self.settings.num_val_samples,
            k=self.settings.pass_k,
            successes=successes,
            answers=answers,
            rewards=scores.rewards.to(self.device),
            num_tokens=rollout.completion_mask.sum(1),
            truncated=rollout.truncated,
        )
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=1)

    # State

    def trainer_state(self) -> TrainerState:
        """Where the run stands, in the form that reward functions written for TRL expect."""
        return TrainerState(
            global_step=self.trainer.global_step,
            max_steps=self.trainer.max_steps,
            epoch=float(self.trainer.current_epoch),
            is_world_process_zero=self.trainer.is_global_zero,
        )

    @property
    def settings(self) -> RolloutSettings:
        """The rollout settings that RolloutGeneration brought."""
        if self.rollout_settings is None:
            raise RuntimeError(NO_CALLBACKS.format(what="rollout settings"))
        return self.rollout_settings

    @property
    def required_scorer(self) -> Scorer:
        """The scorer that RewardScoring brought."""
        if self.scorer is None:
            raise RuntimeError(NO_CALLBACKS.format(what="reward functions"))
        return self.scorer

    @property
    def acting_algorithm(self) -> Algorithm:
        """The algorithm whose advantages count now."""
        return self.ppo if is_ppo(self.stage) else self.algorithm

    @property
    def microbatch_tokens(self) -> int:
        """Most tokens of one forward with gradients, as chosen."""
        assert self.choices.microbatch_tokens is not None
        return self.choices.microbatch_tokens

    @property
    def uses_group_baseline(self) -> bool:
        """Whether a group without spread teaches nothing now."""
        return not is_ppo(self.stage)

    @property
    def loss_beta(self) -> float:
        """Weight of the KL in the loss."""
        return self.beta if self.kl_in == "loss" else 0.0

    @property
    def reward_beta(self) -> float:
        """Weight of the KL in the reward."""
        return self.beta if self.kl_in == "reward" else 0.0

    @property
    def num_critic_warmup_steps(self) -> int:
        """Optimizer steps of the run in which the critic alone learns."""
        slots = int(self.trainer.datamodule.slots_per_iteration)  # type: ignore[attr-defined]
        return self.num_critic_warmup_iterations * slots // self.trainer.accumulate_grad_batches

    @property
    def critic_seed(self) -> int:
        """Decides the random weights of a critic."""
        return self.settings.seed

    @property
    def num_ranks(self) -> int:
        """Data-parallel ranks."""
        mesh = self.device_mesh
        return mesh["data_parallel"].size() if mesh is not None else self.trainer.world_size

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Add a tensor over all ranks; the tensor itself stays as it is."""
        return self._reduced(tensor, "sum")

    def max_over_ranks(self, tensor: Tensor) -> Tensor:
        """The largest of a tensor's values over all ranks, each by itself."""
        return self._reduced(tensor, "max")

    def _reduced(self, tensor: Tensor, operation: str) -> Tensor:
        strategy = self.trainer.strategy  # its device: before the fit our own is still the CPU
        return strategy.reduce(tensor.to(strategy.root_device, copy=True), reduce_op=operation)  # type: ignore[arg-type]

    def gather_rows(self, values: Tensor) -> Tensor:
        """The rows (B,) of all ranks, in float64, those of rank 0 first."""
        return gather_rows(values, self.global_rank, self.num_ranks, self.sum_over_ranks)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add counters, beta, stage and what is known of the reference."""
        checkpoint[KEY] = record_of(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back what `on_save_checkpoint` added; to measure a policy, leave its critic out."""
        restore_record(self, checkpoint[KEY])
        self.queue.clear()
        self.rollout = None
        if self.trainer.state.fn == "fit":
            return
        self.choices = Choices(**checkpoint[KEY]["choices"])
        if "state_dict" in checkpoint:
            saved, own = checkpoint["state_dict"], self.state_dict()
            policy = {k: v for k, v in saved.items() if not k.startswith("critic.")}
            critic = {k: v for k, v in own.items() if k.startswith("critic.")}
            checkpoint["state_dict"] = policy | critic

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The weights of policy and critic; of what is under LoRA the adapters only."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        if self.policy is None or not self.policy.is_lora:
            return state
        base = {f"policy.{name}" for name in self.policy.base_names()}
        return {name: value for name, value in state.items() if name not in base}

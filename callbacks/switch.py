"""AlgorithmSwitch: GRPO or PPO, from the start, by a schedule, or by a rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_grpo.algorithms import PPO
from lightning_grpo.critic import check_reward_model
from lightning_grpo.distributed import failing_together
from lightning_grpo.evidence import Evidence, measure_evidence
from lightning_grpo.json_lines import JsonLines
from lightning_grpo.lifecycle import enter_stage, give_up_critic
from lightning_grpo.loaders import Slot
from lightning_grpo.module import GRPOModule
from lightning_grpo.snapshot import interrupts_deferred
from lightning_grpo.stages import Stage, has_critic, is_ppo
from lightning_grpo.switching import Decision, SwitchOptions, SwitchState, decide, enter, restored
from lightning_grpo.types import Minibatch, MinibatchOutput, Rollout

WORDS: dict[Stage, str] = {
    "grpo": "GRPO without a critic",
    "handover": "GRPO, while a critic learns beside it",
    "warmup": "the critic's warm-up, in which the policy rests",
    "ppo": "PPO",
}


class AlgorithmSwitch(L.Callback):
    """Choose between GRPO and PPO, and make and free the critic that PPO needs.

    From GRPO to PPO, a critic is made and learns while GRPO goes on, and takes over when its
    squared error at the prompt, on rollouts it has not learned from, is small enough beside that
    of the siblings' mean. From PPO to GRPO, it is freed with its gradients and moments. Every
    switch is printed with its evidence, and written to <run>/switches.jsonl.

    Args:
        algorithm: what the run begins with: grpo (model.algorithm) or ppo (model.ppo, which needs
            model.critic).
        num_iterations: a schedule: after so many iterations the other algorithm; null stays.
        rule: function of the evidence of an iteration (see evidence.Evidence) that returns grpo or
            ppo; an import path, or class_path and init_args of a callable.
        patience: iterations in a row in which the rule has to ask for a change.
        min_stay_iterations: iterations that a rule's choice lasts at least.
        handover_ratio: PPO takes over when the critic's squared error at the prompt is at most
            this many times that of the siblings' mean, and it explains some of the variance of
            the rewards or of the returns; null does not ask.
        max_handover_iterations: when it is not so after so many iterations, stay with GRPO for the
            rest of the run.
    """

    def __init__(
        self,
        algorithm: Literal["grpo", "ppo"] = "grpo",
        num_iterations: int | None = None,
        rule: Callable | None = None,
        patience: int = 3,
        min_stay_iterations: int = 10,
        handover_ratio: float | None = 1.25,
        max_handover_iterations: int = 100,
    ) -> None:
        if algorithm not in ("grpo", "ppo"):
            raise ValueError(f"switch.algorithm must be grpo or ppo, got {algorithm!r}")
        if rule is not None and num_iterations is not None:
            raise ValueError("switch.rule and switch.num_iterations do not go together: leave one")
        for name, value, least in (
            ("num_iterations", num_iterations, 1),
            ("patience", patience, 1),
            ("min_stay_iterations", min_stay_iterations, 0),
            ("max_handover_iterations", max_handover_iterations, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"switch.{name} must be at least {least}, got {value}")
        if handover_ratio is not None and not handover_ratio > 0:
            raise ValueError(f"switch.handover_ratio must be positive, got {handover_ratio}")
        self.options = SwitchOptions(
            algorithm,
            num_iterations,
            rule,
            patience,
            min_stay_iterations,
            handover_ratio,
            max_handover_iterations,
        )
        self.state = SwitchState()
        self.next_stage: Stage | None = None
        self._stage: Stage = "grpo"
        self._reason = ""
        self._evidence_text = ""
        self._evidence_numbers: dict[str, float] = {}
        self._sampled: dict[str, Any] | None = None
        self._notes = JsonLines("switches.jsonl")

    def setup(self, trainer: L.Trainer, module: GRPOModule, stage: str) -> None:
        """Check that what may come up can work, and say what the run begins with."""
        if stage != "fit":
            return
        self._sampled = None
        self._notes.begin()
        critic = module.critic_settings
        if critic is not None:
            num_warmup = critic.num_warmup_iterations
            self.options = dataclasses.replace(self.options, num_warmup_iterations=num_warmup)
        check_options(self.options, module)
        module.may_use_critic = self.options.may_use_ppo
        if module.counters.iterations == 0:
            module.stage = self.options.first_stage
        is_warmup_first = self.options.first_stage == "warmup"
        num_warmup = self.options.num_warmup_iterations
        module.num_critic_warmup_iterations = num_warmup if is_warmup_first else 0

    def on_fit_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Refuse a warm-up that the run ends in."""
        num_steps = trainer.estimated_stepping_batches
        num_warmup_steps = module.num_critic_warmup_steps
        if num_warmup_steps and num_steps <= num_warmup_steps and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise ValueError(
                f"model.critic.num_warmup_iterations {self.options.num_warmup_iterations} makes "
                f"{num_warmup_steps} optimizer steps, but the run has only {num_steps:.0f}: the "
                "policy would never move"
            )

    def on_train_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Note the stage, after a checkpoint was loaded."""
        self._stage = module.stage

    def on_rewards_end(self, trainer: L.Trainer, module: GRPOModule, rollout: Rollout) -> None:
        """Keep the rewards of what was sampled first, before groups are dropped or replaced."""
        iteration = module.counters.iterations
        has_any = self._sampled is not None and self._sampled["iteration"] == iteration
        if not has_any and rollout.rewards is not None:
            self._sampled = {
                "iteration": iteration,
                "rewards": module.gather_rows(rollout.rewards),
                "group_ids": module.gather_rows(rollout.group_ids).long(),
            }

    def on_train_batch_start(
        self, trainer: L.Trainer, module: GRPOModule, batch: Slot, batch_idx: int
    ) -> None:
        """Carry out between two rollouts what was decided."""
        if trainer.is_global_zero:
            self._notes.cut(module.run_dir)
        if module.queue:
            return
        with interrupts_deferred():  # from the critic that was made to the mark that knows of it
            if module.critic_failure is not None:
                self._note_failure(module, module.counters.iterations)
            if self.next_stage is not None and self.next_stage != module.stage:
                self._switch(module, self.next_stage)
            self.next_stage = None
            module.marks.after_rollout(module)

    def on_minibatch_end(
        self, trainer: L.Trainer, module: GRPOModule, minibatch: Minibatch, output: MinibatchOutput
    ) -> None:
        """Leave the rest of a rollout when the critic is broken."""
        is_broken = module.critic is not None and module.critic_failure is not None
        if is_broken and minibatch.is_window_end:
            module.queue.clear()

    def on_iteration_end(self, trainer: L.Trainer, module: GRPOModule, rollout: Rollout) -> None:
        """Measure the iteration, and decide what comes next."""
        if module.critic_failure is not None and module.critic is None:
            self._note_failure(module, module.counters.iterations - 1)
        evidence = self.measure(trainer, module, rollout)
        self._evidence_text, self._evidence_numbers = str(evidence), evidence.numbers()
        stage = {
            "algorithm/is_ppo": float(is_ppo(module.stage)),
            "algorithm/has_critic": float(has_critic(module.stage)),
        }
        module.log_dict(self._evidence_numbers | stage, batch_size=1)
        decision = Decision("grpo", "")
        with failing_together(module, "asking switch.rule"):
            decision = decide(
                self.options,
                self.state,
                evidence,
                is_critic_barred=module.num_critic_failures > 0,
            )
        # A rule may draw at random, or look at what differs between the ranks.
        decision, self.state = trainer.strategy.broadcast((decision, self.state))
        self.next_stage, self._reason = decision.stage, decision.reason

    def measure(self, trainer: L.Trainer, module: GRPOModule, rollout: Rollout) -> Evidence:
        """The evidence of an iteration, over all ranks."""
        assert rollout.rewards is not None
        sampled, self._sampled = self._sampled, None
        assert sampled is not None
        group_ids = module.gather_rows(rollout.group_ids).long()
        baseline_rewards, values = rollout.rewards, None
        if rollout.values is not None:
            baseline_rewards, values = module.ppo.at_prompt(rollout, beta=module.reward_beta)
        explained = trainer.callback_metrics.get("value/explained_var")
        return measure_evidence(
            iteration=module.counters.iterations - 1,
            stage=module.stage,
            rewards=sampled["rewards"],
            group_ids=sampled["group_ids"],
            baseline_rewards=module.gather_rows(baseline_rewards),
            baseline_group_ids=group_ids,
            prompt_values=None if values is None else module.gather_rows(values),
            value_explained_var=None if values is None or explained is None else float(explained),
        )

    def _switch(self, module: GRPOModule, stage: Stage) -> None:
        before = module.stage
        enter_stage(module, stage)
        self._take_note(module, before, module.counters.iterations)

    def _note_failure(self, module: GRPOModule, iteration: int) -> None:
        """Free a critic that does not work, where that has not been done, and write it down."""
        reason = str(module.critic_failure)
        if module.critic is not None:
            give_up_critic(module, reason)
        module.critic_failure = None
        self.next_stage, self._reason = None, f"the critic is of no use: {reason}"
        self._take_note(module, self._stage, iteration)

    def _take_note(self, module: GRPOModule, before: Stage, number: int) -> None:
        stage = self._stage = module.stage
        enter(self.state, before, stage)
        if not has_critic(stage):
            for prefix in ("value/", "evidence/critic_", "evidence/mse_ratio"):
                forget_metrics(module.trainer, prefix)
        rank_zero_info(
            f"iteration {number}: {WORDS[before]} -> {WORDS[stage]}: {self._reason}. "
            f"{self._evidence_text}"
        )
        if module.trainer.is_global_zero and module.trainer.loggers:
            entry: dict[str, Any] = {"iteration": number, "from": before, "to": stage}
            entry["reason"] = self._reason
            entry["evidence"] = self._evidence_numbers
            self._notes.append(module.run_dir, entry)

    def state_dict(self) -> dict[str, Any]:
        """What was decided and not carried out yet, and the counters behind it."""
        return {
            "state": self.state.state_dict(),
            "next_stage": self.next_stage,
            "reason": self._reason,
            "evidence_text": self._evidence_text,
            "evidence_numbers": self._evidence_numbers,
            "sampled": self._sampled,
            "num_notes": self._notes.num_lines,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.state = restored(state_dict["state"])
        self.next_stage, self._reason = state_dict["next_stage"], state_dict["reason"]
        self._evidence_text = state_dict["evidence_text"]
        self._evidence_numbers = state_dict["evidence_numbers"]
        self._sampled = state_dict["sampled"]
        self._notes.resume(state_dict["num_notes"])


def forget_metrics(trainer: L.Trainer, prefix: str) -> None:
    """Drop what was logged under some names, which Lightning would repeat with every later step.

    Args:
        trainer: in fit.
        prefix: of the names.
    """
    results: Any = trainer._results
    for key in [key for key in results if f".{prefix}" in key]:  # hook.name
        del results[key]
    for metrics in (trainer.callback_metrics, trainer.logged_metrics):
        for name in [name for name in metrics if name.startswith(prefix)]:
            del metrics[name]


def check_options(options: SwitchOptions, module: GRPOModule) -> None:
    """Refuse a choice of algorithms that cannot work with the module's options.

    Args:
        options: of the switch.
        module: with its rollout settings.

    Raises:
        ValueError: groups that are too small, or a critic that is missing or cannot be made.
    """
    if isinstance(module.algorithm, PPO):
        raise ValueError(
            "model.algorithm is that of the GRPO family: for PPO set switch.algorithm to ppo, "
            "its options in model.ppo, and model.critic.form"
        )
    if options.may_use_grpo:
        module.algorithm.check_group_size(module.settings.group_size)
    if not options.may_use_ppo:
        return
    num_ppo = options.num_iterations if options.first_stage == "warmup" else None
    if num_ppo is not None and options.num_warmup_iterations >= num_ppo:
        raise ValueError(
            f"model.critic.num_warmup_iterations {options.num_warmup_iterations} is as long as PPO "
            f"lasts (switch.num_iterations {num_ppo}): the policy would never move under PPO"
        )
    module.ppo.check_group_size(module.settings.group_size)
    if module.critic_settings is None:
        raise ValueError(
            "switch may use PPO (switch.algorithm, num_iterations or rule), but there is no "
            "critic: set model.critic.form to head, lora or separate"
        )
    if module.critic_settings.name_or_path is not None:
        check_reward_model(module.critic_settings.name_or_path, module.tokenizer)
    if module.critic_settings.form == "lora" and module.load_options["lora"] is None:
        raise ValueError(
            "model.critic.form lora puts the critic's adapters on the base of a LoRA policy, but "
            "model.lora is not set: set it, or use form head or separate"
        )

"""Our own hooks, called on every callback of the Trainer that defines them.

    on_rollout_end(trainer, module, rollout)            completions are there, rewards are not
    on_rewards_end(trainer, module, rollout)            rewards are there, advantages are not
    on_minibatch_end(trainer, module, minibatch, output)  after its backward, and its step if any
    on_iteration_end(trainer, module, rollout)          every minibatch of the rollout is used up

A callback that returns a `Rollout` from `on_rollout_end` or `on_rewards_end` replaces the rollout.
"""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_grpo.types import Rollout


def call_hook(trainer: L.Trainer, name: str, module: L.LightningModule, *args: Any) -> None:
    """Call one of our hooks on every callback that has it.

    Args:
        trainer: whose callbacks are called, in order.
        name: the hook.
        module: passed on.
        *args: passed on.
    """
    for callback in _callbacks(trainer):
        if hasattr(callback, name):
            getattr(callback, name)(trainer, module, *args)


def pass_through_hook(
    trainer: L.Trainer, name: str, module: L.LightningModule, rollout: Rollout
) -> Rollout:
    """Call a hook on every callback that has it; each may return a changed rollout.

    Args:
        trainer: whose callbacks are called, in order.
        name: the hook.
        module: passed on.
        rollout: passed to the first; the next gets what the one before returned.

    Returns:
        The rollout after the last callback.
    """
    for callback in _callbacks(trainer):
        if hasattr(callback, name):
            changed = getattr(callback, name)(trainer, module, rollout)
            if isinstance(changed, Rollout):
                rollout = changed
    return rollout


def _callbacks(trainer: L.Trainer) -> list[L.Callback]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]

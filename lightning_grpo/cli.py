"""The command line: LightningCLI over the module, the data, and the callbacks' sections."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import lazy_instance
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from transformers.utils import logging as transformers_logging

from lightning_grpo.algorithms import GRPO
from lightning_grpo.callbacks import (
    ColdStart,
    HealthWarnings,
    InnerEpochReplay,
    IterationCheckpoint,
    IterationProgress,
    KLMonitor,
    PredictionWriter,
    RewardScoring,
    RolloutGeneration,
    RunSummary,
    SampleTable,
    ValidateAtEnds,
)
from lightning_grpo.data import PromptDataModule
from lightning_grpo.module import GRPOModule
from lightning_grpo.run_files import (
    Run,
    choose_run_dir,
    config_file_name,
    find_checkpoint,
    run_dir_of,
    run_loggers,
    saved_step,
)

# The sections of the configuration, in the order in which their callbacks run.
SECTIONS: dict[str, type[L.Callback]] = {
    "cold_start": ColdStart,
    "validation": ValidateAtEnds,
    "rollout": RolloutGeneration,
    "reward": RewardScoring,
    "replay": InnerEpochReplay,
    "kl": KLMonitor,
    "samples": SampleTable,
    "health": HealthWarnings,
    "predictions": PredictionWriter,
    "checkpoint": IterationCheckpoint,
}

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 1,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "inference_mode": False,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}


class GRPOCLI(LightningCLI):
    """`fit`, `validate`, `test` and `predict` over one YAML file."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add a section for each callback that is always there."""
        for section, callback in SECTIONS.items():
            parser.add_lightning_class_args(callback, section)
        parser.add_class_arguments(Run, "run")
        parser.set_defaults({"model.algorithm": lazy_instance(GRPO)})

    def _parse_ckpt_path(self) -> None:
        # Lightning would let hyperparameters in the checkpoint win over the command line.
        pass

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint and the run's folder before anything is made."""
        config = self.config[self.subcommand]
        run = Run(**config.run.as_dict())
        checkpoint = find_checkpoint(config.ckpt_path, run) if config.ckpt_path else None
        is_resume = checkpoint is not None and self.subcommand == "fit"
        self.run_dir = choose_run_dir(run, checkpoint)
        self.resume_step = saved_step(checkpoint) if checkpoint and is_resume else None
        if checkpoint is not None:
            config.ckpt_path = str(checkpoint)
        self.save_config_kwargs["config_filename"] = config_file_name(self.run_dir)
        if self.subcommand != "fit":
            self.save_config_callback = None

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Make the Trainer with our loggers and progress bar, where none are asked for."""
        trainer_config = self._get(self.config_init, "trainer")
        if trainer_config.get("logger") in (None, True):
            kwargs["logger"] = self._loggers()
        extra = [RunSummary()]
        if trainer_config.get("enable_progress_bar") is not False:
            extra.append(IterationProgress())
        self.trainer_defaults = {**TRAINER_DEFAULTS, "callbacks": extra}
        return super().instantiate_trainer(**kwargs)

    def _loggers(self) -> list[Any]:
        if self.subcommand == "fit":
            return run_loggers(self.run_dir, self.resume_step)
        # Measuring a checkpoint must not touch the curves of the run that made it.
        return run_loggers(self.run_dir / str(self.subcommand), None)[1:]


def with_config(args: Sequence[str]) -> list[str]:
    """Add the configuration that a command line without one means.

    That of the run a checkpoint belongs to, if `--ckpt_path` names a file in a run's folder;
    else, for `fit`, conf/quickstart.yaml.

    Args:
        args: the command line without the program's name.

    Returns:
        The command line, with `--config` where it was missing.
    """
    args = list(args)
    names = [arg.split("=")[0] for arg in args]
    if not args or args[0].startswith("-") or "--config" in names or "-c" in names:
        return args
    quickstart = str(files("lightning_grpo").joinpath("conf/quickstart.yaml"))
    config = quickstart if args[0] == "fit" else None
    checkpoint = _value_of("--ckpt_path", args)
    if checkpoint is not None and Path(checkpoint).exists():
        run_dir = run_dir_of(Path(checkpoint))
        if run_dir is not None and (run_dir / "config.yaml").exists():
            config = str(run_dir / "config.yaml")
    elif checkpoint is not None:
        config = quickstart
    return args if config is None else [args[0], "--config", config, *args[1:]]


def _value_of(option: str, args: Sequence[str]) -> str | None:
    for position, arg in enumerate(args):
        if arg == option and position + 1 < len(args):
            return args[position + 1]
        if arg.startswith(f"{option}="):
            return arg.partition("=")[2]
    return None


def main(args: Sequence[str] | None = None) -> None:
    """Run a command line.

    Args:
        args: without the program's name; those of the process when None.
    """
    sys.argv[1:] = with_config(sys.argv[1:] if args is None else args)
    quiet_libraries()
    GRPOCLI(
        GRPOModule,
        PromptDataModule,
        save_config_kwargs={"overwrite": True},
        trainer_defaults=TRAINER_DEFAULTS,
        seed_everything_default=0,
        auto_configure_optimizers=False,
    )


def quiet_libraries() -> None:
    """Keep messages off the console that a user of this program can do nothing about."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
        and "litmodels" not in record.getMessage()
    )
    transformers_logging.disable_progress_bar()
    for message in (
        r".*does not have many workers.*",
        r".*eval mode at the start of training.*",
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
        r"Total length of `list` across ranks is zero.*",
    ):
        warnings.filterwarnings("ignore", message=message)

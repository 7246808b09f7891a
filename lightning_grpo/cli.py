"""The command line: LightningCLI over the module, the data, and the callbacks' sections."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import lazy_instance
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from upath import UPath

from lightning_grpo.algorithms import GRPO
from lightning_grpo.callbacks import (
    AlgorithmSwitch,
    ColdStart,
    DynamicSampling,
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
from lightning_grpo.checkpoint_paths import run_dir_of
from lightning_grpo.console import (
    TRACEBACK_VARIABLE,
    error_text,
    is_mendable,
    quiet_libraries,
    redact_tracebacks,
)
from lightning_grpo.data import PromptDataModule
from lightning_grpo.distributed import TrainingStopped
from lightning_grpo.module import GRPOModule
from lightning_grpo.paths import resolve_package_path
from lightning_grpo.redaction import refuse_secrets
from lightning_grpo.run_files import (
    Run,
    choose_run_dir,
    config_file_name,
    find_checkpoint,
    newest_config,
    remove_if_nothing_ran,
    resume_point,
    run_loggers,
)
from lightning_grpo.tool_commands import TOOLS, run_tool

# The sections of the configuration, in the order in which their callbacks run.
SECTIONS: dict[str, type[L.Callback]] = {
    "cold_start": ColdStart,
    "validation": ValidateAtEnds,
    "rollout": RolloutGeneration,
    "reward": RewardScoring,
    "switch": AlgorithmSwitch,
    "dynamic_sampling": DynamicSampling,
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


class RunParser(LightningArgumentParser):
    """A parser that leaves data files alone, and prints no 150 lines of usage above an error."""

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        """Add the arguments of a class, whose values never are files of arguments.

        Lightning allows that, and a CSV file would be read as YAML and its text taken as the name.
        """
        names: list[str] = super().add_class_arguments(*args, **kwargs | {"sub_configs": False})
        return names

    def print_usage(self, file: Any = None) -> None:
        """Print nothing: the message names the option, and `--help` lists all."""


class GRPOCLI(LightningCLI):
    """`fit`, `validate`, `test` and `predict` over one YAML file."""

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our own sections, then the Trainer's, whose help is long."""
        parser.add_lightning_class_args(GRPOModule, "model")
        parser.add_lightning_class_args(PromptDataModule, "data")
        for section, callback in SECTIONS.items():
            parser.add_lightning_class_args(callback, section)
        parser.add_class_arguments(Run, "run")
        parser.add_lightning_class_args(L.Trainer, "trainer")
        parser.set_defaults({f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()})
        parser.set_defaults({"model.algorithm": lazy_instance(GRPO)})

    def _parse_ckpt_path(self) -> None:
        # Lightning would let hyperparameters in the checkpoint win over the command line.
        pass

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint and the run's folder before anything is made."""
        config = self.config[self.subcommand]
        refuse_secrets(config.as_dict())
        run = Run(**config.run.as_dict())
        if run.num_threads is not None:
            torch.set_num_threads(run.num_threads)
        checkpoint = self._find_checkpoint(config.ckpt_path, run)
        is_resume = checkpoint is not None and self.subcommand == "fit"
        self.run_dir = choose_run_dir(run, checkpoint)
        self.is_new_dir = not self.run_dir.exists()
        self.resume = resume_point(checkpoint) if checkpoint and is_resume else None
        config.ckpt_path = checkpoint
        self.save_config_kwargs["config_filename"] = config_file_name(self.run_dir)
        if self.subcommand != "fit":
            self.save_config_callback = None

    def _find_checkpoint(self, ckpt_path: str | None, run: Run) -> str | None:
        if not ckpt_path:
            return None
        found = find_checkpoint(ckpt_path, run)
        if found is None:
            message = f"--ckpt_path {ckpt_path}: no run in {run.folder} has any"
            if self.subcommand != "fit":
                raise ValueError(message)
            rank_zero_info(f"{message}: a new run begins")
        elif ckpt_path == "auto":
            rank_zero_info(f"--ckpt_path {ckpt_path}: {found}")
        return found

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Make the Trainer with our loggers and progress bar, where none are asked for."""
        trainer_config = self._get(self.config_init, "trainer")
        if trainer_config.get("logger") in (None, True):
            kwargs["logger"] = self._loggers()
        extra: list[L.Callback] = [RunSummary()]
        if trainer_config.get("enable_progress_bar") is not False:
            extra.append(IterationProgress())
        self.trainer_defaults = {"callbacks": extra}
        trainer = super().instantiate_trainer(**kwargs)
        num_launched = int(os.environ.get("WORLD_SIZE", trainer.world_size))
        if num_launched != trainer.world_size:
            raise ValueError(
                f"{num_launched} processes were launched, but the Trainer has "
                f"{trainer.world_size}: set trainer.devices (and trainer.num_nodes) to match, and "
                "trainer.strategy to ddp or fsdp2"
            )
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            if self.trainer.is_global_zero:
                self._forget_attempt()
            raise

    def _forget_attempt(self) -> None:
        # A later resume takes the newest configuration; that of an attempt that never began to
        # train is none.
        if self.is_new_dir:
            remove_if_nothing_ran(self.run_dir)
        elif self.resume is not None and self.trainer.global_step <= self.resume.step:
            (self.run_dir / self.save_config_kwargs["config_filename"]).unlink(missing_ok=True)

    def _loggers(self) -> list[Any]:
        if self.subcommand == "fit":
            return run_loggers(self.run_dir, self.resume)
        # Measuring a checkpoint must not touch the curves of the run that made it.
        return run_loggers(self.run_dir / str(self.subcommand), None)[1:]


def with_config(args: Sequence[str]) -> list[str]:
    """Add the configuration that a command line without one means.

    That of the run a checkpoint belongs to, if `--ckpt_path` names one; else, for `fit`,
    conf/quickstart.yaml.

    Args:
        args: the command line without the program's name.

    Returns:
        The command line, with `--config` where it was missing and `package://` names resolved.

    Raises:
        ValueError: the checkpoint is not there.
    """
    args = resolve_config_names(args)
    names = [arg.split("=")[0] for arg in args]
    if not args or args[0].startswith("-") or "--config" in names or "-c" in names:
        return args
    config = _implied_config(args)
    return args if config is None else [args[0], "--config", str(config), *args[1:]]


def _implied_config(args: Sequence[str]) -> Path | UPath | None:
    quickstart = Path(str(files("lightning_grpo").joinpath("conf/quickstart.yaml")))
    ckpt_path = _value_of("--ckpt_path", args)
    if ckpt_path is None:
        return quickstart if args[0] == "fit" else None
    root_dir, name = (_value_of(f"--run.{option}", args) for option in ("root_dir", "name"))
    run = Run(root_dir or Run.root_dir, name or "quickstart")
    checkpoint = find_checkpoint(ckpt_path, run)
    run_dir = run_dir_of(checkpoint) if checkpoint is not None else None
    return (newest_config(run_dir) if run_dir is not None else None) or quickstart


def resolve_config_names(args: Sequence[str]) -> list[str]:
    """A command line with the `package://` names of its configurations as paths."""
    resolved = list(args)
    for position, arg in enumerate(resolved):
        option, equals, value = arg.partition("=")
        if equals and option in ("--config", "-c"):
            resolved[position] = f"{option}={resolve_package_path(value)}"
        elif position and resolved[position - 1] in ("--config", "-c"):
            resolved[position] = resolve_package_path(arg)
    return resolved


def _value_of(option: str, args: Sequence[str]) -> str | None:
    value = None
    for position, arg in enumerate(args):
        if arg == option and position + 1 < len(args):
            value = args[position + 1]
        elif arg.startswith(f"{option}="):
            value = arg.partition("=")[2]
    return value


def main(args: Sequence[str] | None = None) -> None:
    """Run a command line.

    An error that the user can mend is one line on stderr and exit code 1; set
    LIGHTNING_GRPO_TRACEBACK to see where it came from. All others keep their traceback.

    Args:
        args: without the program's name; those of the process when None.
    """
    quiet_libraries()
    redact_tracebacks()
    try:
        given = list(sys.argv[1:] if args is None else args)
        if given and given[0] in TOOLS:
            run_tool(given, {"model", "data", "run", "trainer", *SECTIONS})
            return
        # Processes that Lightning launches for other ranks repeat sys.argv.
        sys.argv[1:] = with_config(given)
        run_command_line()
    except SIGTERMException:
        sys.exit(128 + 15)  # Lightning would report success
    except KeyboardInterrupt:  # before or after Lightning, which has its own message
        sys.exit("interrupted")
    except (ValueError, OSError, MisconfigurationException, TrainingStopped) as error:
        if os.environ.get(TRACEBACK_VARIABLE) or not is_mendable(error):
            raise
        sys.exit(error_text(error))


def run_command_line() -> None:
    """Parse sys.argv and run what it asks for."""
    program = Path(sys.argv[0]).name
    program = "python -m lightning_grpo" if program == "__main__.py" else program
    parser: dict[str, Any] = {
        command: {"usage": f"{program} {command} [--config FILE] [options]"}
        for command in GRPOCLI.subcommands()
    }
    GRPOCLI(
        GRPOModule,
        PromptDataModule,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_class=RunParser,
        parser_kwargs=parser | {"prog": program},
    )

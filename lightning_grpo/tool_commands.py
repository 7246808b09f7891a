"""Tools as subcommands: a typed function of the same name, whose docstring is the help."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser

from lightning_grpo.redaction import refuse_secrets

# Subcommand -> module that holds the function of that name.
TOOLS = {
    "memory": "lightning_grpo.tools.memory",
    "benchmark": "lightning_grpo.tools.benchmark",
    "diagnose": "lightning_grpo.tools.diagnose",
    "inspect": "lightning_grpo.tools.inspect",
    "diff": "lightning_grpo.tools.diff",
    "average": "lightning_grpo.tools.average",
    "export": "lightning_grpo.tools.export",
    "convert": "lightning_grpo.tools.convert",
    "generate": "lightning_grpo.tools.generate",
}


class ToolParser(ArgumentParser):
    """A parser that prints no usage above an error."""

    def print_usage(self, file: Any = None) -> None:
        """Print nothing: the message names the option, and `--help` lists all."""


def run_tool(args: Sequence[str], fit_sections: Collection[str]) -> None:
    """Run a tool.

    Args:
        args: name of the tool and its options; a tool with a parameter `overrides` takes options
            of `fit` too.
        fit_sections: sections that the options of `fit` begin with.
    """
    name, *options = args
    function = getattr(import_module(TOOLS[name]), name)
    program = Path(sys.argv[0]).name
    program = "python -m lightning_grpo" if program == "__main__.py" else program
    parser = ToolParser(
        prog=f"{program} {name}",
        usage=f"{program} {name} [options]",
        description=inspect.getdoc(function).split("\nArgs:")[0].strip(),  # type: ignore[union-attr]
    )
    keywords: dict[str, Any] = {}
    if "overrides" in inspect.signature(function).parameters:
        options, keywords["overrides"] = split_overrides(options, fit_sections)
    options = named_values(options, function)
    parser.add_function_arguments(function, skip=set(keywords), sub_configs=False)
    parsed = parser.parse_args(with_flags(options, function))
    given = {f"--{option}": value for option, value in parsed.as_dict().items()}
    refuse_secrets(given | {"the command line": keywords.get("overrides")})
    function(**parser.instantiate_classes(parsed), **keywords)


def named_values(options: Sequence[str], function: Callable[..., Any]) -> list[str]:
    """Give names to values that a command line begins with, in the order of the parameters.

    Args:
        options: a command line.
        function: whose parameters these options are; when its first is a list, that takes all.

    Returns:
        The command line with a name before each value.
    """
    names = list(inspect.signature(function).parameters)
    is_option = [word.startswith("-") for word in options] + [True]
    values, rest = options[: is_option.index(True)], options[is_option.index(True) :]
    if get_type_hints(function)[names[0]] == list[str]:
        return [word for value in values for word in (f"--{names[0]}+", value)] + list(rest)
    if len(values) > len(names):
        raise ValueError(f"{values[len(names)]} is one value more than there are options")
    return [word for name, value in zip(names, values) for word in (f"--{name}", value)] + [*rest]


def with_flags(options: Sequence[str], function: Callable[..., Any]) -> list[str]:
    """Let an option that is on or off stand without a value, and be spelled with hyphens.

    Args:
        options: a command line.
        function: whose parameters these options are.

    Returns:
        The command line as the parser takes it: `--dry-run` is `--dry_run true`.
    """
    hints = get_type_hints(function)
    found: list[str] = []
    for word, following in pairwise([*options, "--"]):
        option, equals, value = word.partition("=")
        name = option[2:].replace("-", "_") if option.startswith("--") else ""
        found.append(f"--{name}{equals}{value}" if name in hints else word)
        if hints.get(name) is bool and not equals and following.startswith("--"):
            found.append("true")
    return found


def split_overrides(
    options: Sequence[str], fit_sections: Collection[str]
) -> tuple[list[str], list[str]]:
    """Tell the options of `fit` from a tool's own.

    Args:
        options: a command line, each value behind its option or joined with `=`.
        fit_sections: such as model and rollout.

    Returns:
        The tool's own, and those of `fit`; a second `--config` and later ones are of `fit`, which
        reads them on top of the first.
    """
    own: list[str] = []
    overrides: list[str] = []
    current, num_configs = own, 0
    for word in options:
        if word.startswith("--"):
            section = word[2:].partition("=")[0].partition(".")[0]
            num_configs += section == "config"
            is_later_config = section == "config" and num_configs > 1
            current = overrides if section in fit_sections or is_later_config else own
        current.append(word)
    return own, overrides

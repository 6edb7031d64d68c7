"""The options that commands share, one definition each, and the decorator that makes a function a command.

Every option's parameter has the option's own long name: that is what makes LORATOOLS_<COMMAND>_<OPTION> come out right.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from loratools.cli.console import Output
from loratools.errors import UsageError
from loratools.tensors.dtypes import dtype_named

F = TypeVar("F", bound=Callable[..., Any])

PATH = click.Path(path_type=Path, readable=False)  # what cannot be read is a bad input, not wrong usage
COMMON = ("json", "quiet", "debug")


def dtype_name(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """A dtype in any usual spelling as its safetensors name. Raises click.BadParameter."""
    try:
        return dtype_named(value)
    except UsageError as error:
        raise click.BadParameter(error.message) from error


def finite(_context: click.Context, _parameter: click.Parameter, value: float | None) -> float | None:
    """A number that is neither NaN nor infinite. Raises click.BadParameter."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number.")
    return value


def not_zero(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """A finite number other than 0. Raises click.BadParameter."""
    if value == 0:
        raise click.BadParameter("alpha must not be 0: it would take the whole adapter away; an alpha equal to the rank is a scale of 1.")
    return finite(context, parameter, value)


def tolerance(_context: click.Context, _parameter: click.Parameter, value: float) -> float:
    """A finite number that is not negative. Raises click.BadParameter."""
    if not (math.isfinite(value) and value >= 0):
        raise click.BadParameter(f"{value} is not a finite number of 0 or more.")
    return value


class Weighted(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases only
    """`PATH` or `PATH:0.8`: an adapter and its weight. The last colon followed by a number is the weight; a file of that name wins.

    Raises UsageError for a weight that is no finite number, where the path before it exists.
    """

    name = "adapter"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Path, float]:
        if isinstance(value, tuple):
            return value
        head, colon, tail = str(value).rpartition(":")
        if not colon or not head or Path(value).exists():
            return Path(value), 1.0
        weight = _number(tail)
        if weight is None and not Path(head).exists():
            return Path(value), 1.0
        if weight is None or not math.isfinite(weight):
            likely = _number(tail.replace(",", "."))
            example = "0.8" if likely is None or not math.isfinite(likely) else f"{likely:g}"
            told = f"{value!r}: what follows the last colon is the weight, and {tail!r} is no finite number"
            raise UsageError(told, fix=f"{head}:{example}")
        return Path(head), weight


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


WEIGHTED = Weighted()


def registry_names(registry: str) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """Shell completion from a registry of `loratools formats`: "dialects", "architectures" or "kinds"."""

    def complete(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from loratools.operations.formats import formats

        entries = formats().get(registry, [])
        return [CompletionItem(entry["name"], help=entry.get("title")) for entry in entries if entry["name"].startswith(incomplete)]

    return complete


class Command(click.Command):
    """A command whose help has the shared options apart and ends with examples."""

    def __init__(self, *args: Any, examples: str = "", **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Options": [], "Common options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                shared = parameter.name in COMMON or "--help" in parameter.opts
                sections["Common options" if shared else "Options"].append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for line in self.examples.strip().splitlines():
                formatter.write(f"{'':>{formatter.current_indent}}{line.strip()}\n")


def command(name: str, *, examples: str) -> Callable[[Callable[..., int]], click.Command]:
    """Make `function(output, **options) -> exit code` the command `name`, with the options every command has."""

    def decorate(function: Callable[..., int]) -> click.Command:
        @functools.wraps(function)
        def callback(*, json: bool, quiet: bool, debug: bool, **options: Any) -> int:
            return function(Output(json=json, quiet=quiet), **options)

        for option in (
            click.option("--debug", is_flag=True, help="Show the traceback of an error."),
            click.option("-q", "--quiet", is_flag=True, help="Print only errors."),
            click.option("--json", is_flag=True, help="One JSON object on stdout; everything else goes to stderr."),
        ):
            callback = option(callback)
        parameters = getattr(callback, "__click_params__", [])
        shared = [parameter for parameter in parameters if parameter.name in COMMON]
        callback.__click_params__ = [*shared, *(p for p in parameters if p.name not in COMMON)]  # type: ignore[attr-defined]
        return click.command(name, cls=Command, examples=examples)(callback)

    return decorate


def force(function: F) -> F:
    return click.option("--force", is_flag=True, help="Overwrite an existing output.")(function)


def dry_run(function: F) -> F:
    return click.option("--dry-run", is_flag=True, help="Check everything that headers can tell, print the plan, write nothing.")(function)


def arch(function: F) -> F:
    return click.option(
        "--arch",
        metavar="NAME",
        shell_complete=registry_names("architectures"),
        help="The architecture, where the keys cannot settle it (see `loratools formats`).",
    )(function)


def alpha(function: F) -> F:
    return click.option("--alpha", type=float, callback=not_zero, metavar="A", help="The alpha of a file that records none.")(function)


def dtype(function: F) -> F:
    return click.option("--dtype", callback=dtype_name, metavar="DTYPE", help="dtype of the output: fp32, fp16, bf16, fp64.")(function)


def base(function: F) -> F:
    told = "The base model: its names and weights settle what keys alone cannot."
    return click.option("--base", type=PATH, metavar="MODEL", help=told)(function)


def device(function: F) -> F:
    choice = click.Choice(["auto", "cpu", "cuda"])
    return click.option("--device", type=choice, default="auto", show_default=True, help="Where the numbers are computed.")(function)


def threads(function: F) -> F:
    told = "Sites computed at the same time; the output's bytes do not depend on it."
    return click.option("--threads", type=click.IntRange(min=1), metavar="N", help=told)(function)


def seed(function: F) -> F:
    told = "Seed of what is random."
    return click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help=told)(function)

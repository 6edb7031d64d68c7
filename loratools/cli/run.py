"""One road out of every command: an exit code, and an error that says what to do.

    0 done · 1 failed while running · 2 wrong usage · 3 input not usable · 4 a check did not hold

An error is its message, all its details and the fix, on stderr; with `--json` it is one object on stdout instead. A traceback
is shown with `--debug` only. A closed pipe (`loratools formats | head`) ends quietly.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import click

from loratools.cli.console import Output, clean, colour
from loratools.errors import LoraToolsError


@dataclass(frozen=True)
class Failure:
    """What is told about an error, whatever raised it."""

    code: str
    message: str
    exit_code: int
    details: Sequence[str] = field(default_factory=tuple)
    fix: str | None = None
    usage: str | None = None

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"code": self.code, "message": self.message, "details": list(self.details)}
        return {**found, "fix": self.fix} if self.fix else found


def failure_of(error: BaseException) -> Failure:
    """The failure an exception stands for."""
    if isinstance(error, LoraToolsError):
        return Failure(error.code, error.message, error.exit_code, tuple(error.details), error.fix)
    if isinstance(error, click.ClickException):
        return _usage_failure(error)
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return Failure("interrupted", "interrupted; no unfinished output was left behind", 1)
    if isinstance(error, MemoryError):
        return Failure("out-of-memory", "out of memory", 1)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return Failure("failed", f"{where}{error.strerror or error}", 1)
    return Failure("internal", f"unexpected {type(error).__name__}: {error}", 1, fix="run again with --debug and report the traceback")


SHOWN = 40  # details on a terminal; a refused file of a thousand modules would push the message off the screen


def _usage_failure(error: click.ClickException) -> Failure:
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None:
        return Failure("usage", error.format_message(), 2)
    return Failure("usage", error.format_message(), 2, (), f"{context.command_path} --help", context.get_usage())


def show_error(failure: Failure, *, as_json: bool) -> None:
    """Print a failure: JSON on stdout, or text on stderr."""
    if as_json:
        Output(json=True).emit({"error": failure.as_json()})
        return
    red, green = click.style("error:", fg="red", bold=True), click.style("fix:", fg="green")
    lines = [*(failure.usage.splitlines() if failure.usage else []), f"{red} {clean(failure.message, keep=chr(10))}"]
    lines += [f"  - {clean(detail)}" for detail in failure.details[:SHOWN]]
    if len(failure.details) > SHOWN:
        lines.append(f"  - and {len(failure.details) - SHOWN} more (--json lists all)")
    lines += [f"{green} {clean(failure.fix)}"] if failure.fix else []
    click.echo("\n".join(lines), err=True, color=colour())


def flag_given(flag: str, arguments: Sequence[str]) -> bool:
    """Was `--flag` asked for, on the command line or through the environment? Needed before the arguments are parsed."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if f"--{flag}" in own:
        return True
    command = next((word for word in own if not word.startswith("-")), "")
    value = os.environ.get(f"LORATOOLS_{command}_{flag}".upper().replace("-", "_"), "")
    return value.strip().lower() in {"1", "true", "t", "yes", "y", "on"}


def _end_as_interrupted() -> None:
    """A job that is ended (SIGTERM) cleans up as one that is interrupted does."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def run(action: Callable[[], Any], arguments: Sequence[str]) -> int:
    """Run a command to its exit code; no exception leaves this function except SystemExit."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # a locale that lacks a character shows its escape instead of failing
            reconfigure(errors="backslashreplace")
    _end_as_interrupted()
    try:
        code = action()
        if sys.stdout is not None:  # closed by the caller (>&-)
            sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:  # the reader has seen enough (`| head`); the work is done, or was never more than printing
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not complain either
        return 0
    except (Exception, KeyboardInterrupt) as error:
        failure = failure_of(error)
        if flag_given("debug", arguments):
            click.echo(clean("".join(traceback.format_exception(error)), keep="\n"), err=True)
        try:
            show_error(failure, as_json=flag_given("json", arguments))
        except OSError:  # stdout itself is what cannot be written
            show_error(failure, as_json=False)
        return failure.exit_code

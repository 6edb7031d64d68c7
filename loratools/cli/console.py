"""Where the command line writes: one JSON object, or text for people; names from files never reach the terminal raw.

Invariants: with `--json` stdout carries one JSON object and nothing else, everything else goes to stderr; a character that
could move the cursor, hide text or reverse it is printed as its escape (`\\x1b`). rich is imported when something is drawn.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console


def clean(value: object, keep: str = "") -> str:
    """`value` as text in which every unprintable character is its escape; those in `keep` stay as they are."""
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)


def jsonable(value: Any) -> Any:
    """`value` as JSON has it: tuples are lists, paths text, and NaN and infinity, which JSON lacks, null."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def colour() -> bool | None:
    """False where NO_COLOR is set, None where the stream decides."""
    return False if os.environ.get("NO_COLOR") else None


@dataclass(frozen=True)
class Output:
    """The output of one command, as its options `--json` and `--quiet` want it."""

    json: bool = False
    quiet: bool = False

    def emit(self, result: Mapping[str, Any]) -> None:
        """The JSON object: indented on a terminal, one line elsewhere; pure ASCII, so that any locale can carry it."""
        click.echo(json.dumps(jsonable(result), indent=2 if sys.stdout.isatty() else None))

    def result(self, result: Mapping[str, Any], show: Callable[[], None]) -> None:
        """What a command found: its warnings, then the JSON object or, for people, what `show` draws."""
        for warning in result.get("warnings", ()):
            self.warn(warning)
        if self.json:
            self.emit(result)
        elif not self.quiet:
            show()

    def value(self, text: object) -> None:
        """One value that was asked for by name: printed with `--quiet` too; its line breaks stay."""
        click.echo(clean(text, keep="\n\t"))

    def say(self, text: str) -> None:
        """One line for people."""
        if not self.quiet:
            click.echo(clean(text), err=self.json)

    def note(self, text: str) -> None:
        """One line about the run, on stderr."""
        if not self.quiet:
            click.echo(clean(text), err=True)

    def error_line(self, path: str, message: str) -> None:
        """One failed input of a batch that goes on, on stderr."""
        told = f"{clean(path)}: {clean(message.removeprefix(f'{path}: '))}"
        click.echo(f"{click.style('error:', fg='red', bold=True)} {told}", err=True, color=colour())

    def warn(self, text: str) -> None:
        """One warning, on stderr."""
        if not self.quiet:
            click.echo(f"{click.style('warning:', fg='yellow')} {clean(text)}", err=True, color=colour())

    def console(self) -> Console:
        """What tables are drawn on: stdout, or stderr with `--json`. Text is never read as markup."""
        from rich.console import Console

        return Console(stderr=self.json, quiet=self.quiet, markup=False, emoji=False, highlight=False, soft_wrap=False)

    @contextlib.contextmanager
    def working(self, label: str) -> Iterator[None]:
        """A spinner on stderr while something long runs; nothing where stderr is no terminal."""
        if self.quiet or not sys.stderr.isatty():
            yield
            return
        from rich.console import Console

        with Console(stderr=True, markup=False).status(clean(label)):
            yield

    @contextlib.contextmanager
    def progress(self, label: str) -> Iterator[Callable[[int, int], None] | None]:
        """A bar on stderr, moved by the function it gives (bytes done, bytes in all); None where stderr is no terminal."""
        if self.quiet or not sys.stderr.isatty():
            yield None
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True, markup=False), transient=True) as bar:
            task = bar.add_task(clean(label), total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def size(number: int | float) -> str:
    """Bytes as people read them: 1536 → "1.5 KiB"."""
    amount = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def cost(result: Mapping[str, Any]) -> str:
    """What a long command took: "12.3 s, peak memory 340 MB"."""
    memory = "" if result["peak_rss_mb"] is None else f", peak memory {number(result['peak_rss_mb'])} MB"
    return f"{number(result['seconds'])} s{memory}"


def file_size(path: Path) -> int | None:
    """Bytes of a file or of all files of a folder; None where it cannot be told."""
    try:
        return sum(item.stat().st_size for item in path.rglob("*") if item.is_file()) if path.is_dir() else path.stat().st_size
    except OSError:
        return None


def number(value: object) -> str:
    """A number without noise: 16.0 → "16", 1.23456e-7 → "1.23e-07"; "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.3g}"
    return clean(value)

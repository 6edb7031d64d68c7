"""The pages of the documentation as programs: their commands are run, their output is compared.

A `console` block holds commands (`$ loratools …`, with `# exit N` behind it where N is not 0) and what each prints. A line `...`
stands for any lines. A `pycon` block is a doctest. Both run in the page's order, in one folder with the example files.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner

from loratools.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]
GENERATED = {"cli.md", "formats.md"}  # `make docs`
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(path for path in ROOT.glob("docs/*.md") if path.name not in GENERATED)])
WIDTH = 100

_FENCE = re.compile(r"^```(\w*)$")
_EXIT = re.compile(r"\s+# exit (\d)$")
_NOISE = re.compile(r"\b\d(?:\.\d+)?e-(?:0[89]|[1-9]\d)\b")
_ZERO = re.compile(r'(?<=relative error )0\b|(?<=relative_error": )0\.0\b')
_LONG = re.compile(r"\b\d+\.\d{7,}\b")
_MEASURED = re.compile(
    r'(?<= in )[\d.e-]+(?= s, peak memory)|(?<=peak memory )[\d.e+]+(?= MB)|(?<="seconds": )[\d.]+|(?<="peak_rss_mb": )[\d.]+'
)


@dataclass(frozen=True)
class Block:
    """A fenced block. line: of its opening fence, from 1."""

    page: Path
    line: int
    language: str
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        return "".join(line + "\n" for line in self.lines)


@dataclass(frozen=True)
class Step:
    """One command of a console block: as it stands there, its exit code, and the lines printed below it."""

    command: str
    exit_code: int
    shown: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        return shlex.split(_EXIT.sub("", self.command))


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    start, language, lines = 0, "", list[str]()
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if not start and fence:
            start, language, lines = number, fence[1], []
        elif start and line == "```":
            yield Block(page, start, language, tuple(lines))
            start = 0
        elif start:
            lines.append(line)
    assert not start, f"{page.name}:{start}: this block is never closed"


def steps(block: Block) -> list[Step]:
    """The commands of a console block."""
    found: list[tuple[str, list[str]]] = []
    for line in block.lines:
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            assert found, f"{block.page.name}:{block.line}: output before the first command"
            found[-1][1].append(line)
    return [Step(command, int(code[1]) if (code := _EXIT.search(command)) else 0, tuple(shown)) for command, shown in found]


def run(step: Step) -> tuple[int, tuple[str, ...]]:
    """(exit code, lines printed) of a command, in the current folder."""
    program, *arguments = step.words
    assert program == "loratools", f"only loratools is run, not {step.command}"
    result = CliRunner().invoke(cli, arguments, env={"COLUMNS": str(WIDTH), "NO_COLOR": "1"})
    return result.exit_code, tidy(result.output, as_json="--json" in arguments)


def tidy(output: str, *, as_json: bool = False) -> tuple[str, ...]:
    """Output as a page shows it: JSON as on a terminal, no space at the end of a line, no empty lines around."""
    lines: list[str] = []
    for line in output.splitlines():
        lines += json.dumps(json.loads(line), indent=2).splitlines() if as_json and line.startswith("{") else [line.rstrip()]
    return tuple("\n".join(lines).strip("\n").splitlines())


def same(shown: tuple[str, ...], printed: tuple[str, ...]) -> bool:
    """Is this what the page shows? `...` is any lines; rounding noise, digits past the sixth, time and memory are not compared."""
    if not shown:
        return not printed
    first, *rest = shown
    if first.strip() == "...":
        return any(same(tuple(rest), printed[skipped:]) for skipped in range(len(printed) + 1))
    return bool(printed) and _plain(first) == _plain(printed[0]) and same(tuple(rest), printed[1:])


def _plain(line: str) -> str:
    """A line without what another processor may round differently, and without the width of a table that holds it."""
    line = _MEASURED.sub("~", line)
    line = _LONG.sub(lambda match: f"{float(match[0]):.6g}", _ZERO.sub("~0", _NOISE.sub("~0", line)))
    return re.sub(r"[ ─]+", " ", line).strip()

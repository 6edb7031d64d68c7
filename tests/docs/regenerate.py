"""Write into the pages what the commands print now: python -m tests.docs.regenerate [PAGE...].

Output that is shown in part (`...`) is left alone while it fits, and keeps as many lines at either end where it does not; everything
else is replaced. Read the difference before you keep it: a page that changed is a program that changed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from fixtures import examples
from tests.docs.pages import PAGES, Step, blocks, run, same, steps


def renewed(page: Path) -> str:
    """The page with the output of its commands as it is now. The current folder must hold the example files."""
    text = page.read_text(encoding="utf-8").splitlines()
    for block in reversed([(block, _renewed(steps(block))) for block in blocks(page) if block.language == "console"]):
        found, lines = block
        text[found.line : found.line + len(found.lines)] = lines
    return "\n".join(text) + "\n"


def _renewed(commands: list[Step]) -> list[str]:
    lines: list[str] = []
    for step in commands:
        code, printed = run(step)
        bare = step.command.partition(" # exit ")[0].rstrip()
        lines.append(f"$ {bare}" + (f"  # exit {code}" if code else ""))
        lines += step.shown if same(step.shown, printed) else _abridged(step.shown, printed)
    return lines


def _abridged(shown: tuple[str, ...], printed: tuple[str, ...]) -> tuple[str, ...]:
    """What is printed, with as many lines before the first `...` and after the last as are shown now."""
    if "..." not in shown:
        return printed
    head, tail = shown.index("..."), shown[::-1].index("...")
    return (*printed[:head], "...", *printed[len(printed) - tail :])


def main(pages: list[Path]) -> None:
    for page in pages:
        with tempfile.TemporaryDirectory() as folder:
            examples.write(Path(folder))
            os.chdir(folder)
            page.write_text(renewed(page), encoding="utf-8")


if __name__ == "__main__":
    main([Path(argument).resolve() for argument in sys.argv[1:]] or PAGES)

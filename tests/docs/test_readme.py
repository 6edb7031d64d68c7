"""The README's tree and promises, and the changelog, against the files that are there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from loratools import __version__
from loratools.cli.main import COMMANDS
from loratools.errors import LoraToolsError
from tests.docs.pages import ROOT, blocks

README = ROOT / "README.md"
LISTED_FULLY = ("loratools", "fixtures", "docs", "benchmarks")


def tree() -> dict[str, str]:
    """path → its words, from the block under "File structure"; folders end in a slash."""
    text = README.read_text(encoding="utf-8")
    start = text[: text.index("## File structure")].count("\n") + 1
    block = next(block for block in blocks(README) if block.line > start)
    found: dict[str, str] = {}
    parents: list[str] = []
    for line in block.lines:
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, words = line.strip().partition(" ")
        parents[depth:] = [name]
        path = "".join(parents)
        assert path not in found, path
        found[path] = words.strip()
    return found


def files() -> set[str]:
    """The files of the project: those git knows or would take, or simply those that are there."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.split("\n") if listed.returncode == 0 else [str(path.relative_to(ROOT)) for path in ROOT.rglob("*")]
    return {name for name in names if name and (ROOT / name).is_file() and "__pycache__" not in name}


def worth_a_line(name: str) -> bool:
    """Not the empty ones (`__init__.py` of a package without words of its own, py.typed), and not the results of a benchmark."""
    return not name.startswith("benchmarks/results/") and not (
        name.endswith(("__init__.py", "py.typed")) and len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 1
    )


def test_the_tree_is_the_tree() -> None:
    shown = {path for path in tree() if not path.endswith("/")}
    there = {name for name in files() if name.startswith(tuple(f"{folder}/" for folder in LISTED_FULLY)) and worth_a_line(name)}
    top = {path for path in shown if "/" not in path}
    assert shown - top == there
    assert top <= files()
    assert top >= {name for name in files() if name.endswith(".md") and "/" not in name}


def test_the_folders_of_tests_are_the_folders_of_tests() -> None:
    shown = {path for path in tree() if path.startswith("tests/") and path != "tests/"}
    assert shown == {"/".join(Path(name).parts[:2]) + "/" for name in files() if name.startswith("tests/") and name.count("/") > 1}


def test_every_line_of_the_tree_says_something() -> None:
    for path, words in tree().items():
        assert words or path in ("loratools/", "fixtures/", "docs/", "tests/", "benchmarks/"), path


def test_promises_name_tests_that_are_there() -> None:
    section = README.read_text(encoding="utf-8").partition("| promise |")[2].partition("\n\n")[0]
    rows = [line for line in section.splitlines() if line.startswith("| **")]
    assert len(rows) == 10
    for row in rows:
        places = re.findall(r"tests/[\w/.]*", row)
        assert places, row
        for place in places:
            assert any(name.startswith(place.rstrip(".")) and "/test_" in name for name in files()), place


@pytest.mark.parametrize("code", range(5))
def test_exit_codes_are_those_of_the_errors(code: int) -> None:
    known = {0} | {error.exit_code for error in [LoraToolsError, *every_child(LoraToolsError)]}
    section = README.read_text(encoding="utf-8").partition("## Exit codes")[2].partition("\n## ")[0]
    assert known == {0, 1, 2, 3, 4}
    assert f"| {code} |" in section


def every_child(error: type[LoraToolsError]) -> list[type[LoraToolsError]]:
    return [found for child in error.__subclasses__() for found in (child, *every_child(child))]


def test_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in (README, ROOT / "CONTRIBUTING.md"):
        named = set(re.findall(r"^make (\w+)|`make (\w+)", page.read_text(encoding="utf-8"), re.MULTILINE))
        for first, second in named:
            assert re.search(rf"^{first or second}:", makefile, re.MULTILINE), first or second


def test_the_changelog_is_of_this_version_and_names_every_command() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {__version__}" in text
    assert all(f"`{name}" in text for name in COMMANDS)

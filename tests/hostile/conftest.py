"""A folder with a sound adapter in it, and the proof that a command refused a bad one without a trace."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.operations.conftest import digest, peft, randn, run, save
from tests.operations.made import four, kohya_file

__all__ = ["digest", "peft", "randn", "run", "save"]


@pytest.fixture
def good(save: Any, randn: Any) -> Path:
    """A small SD1 adapter of kohya's, beside which the bad ones are put."""
    path: Path = save("good.safetensors", kohya_file(four(randn)))
    return path


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder; of files the bytes too, of anything else None."""
    found: dict[str, bytes | None] = {}
    for where, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(where, name)
            found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() and not path.is_symlink() else None
    return found


@pytest.fixture
def refused(run: Any, good: Path, tmp_path: Path) -> Callable[..., None]:
    """`refused(path, "words", …)`: every command says no with exit 3, these words and no traceback, and leaves all as it was.

    inspect=False: `inspect` may describe the file all the same (it exits 0 then).
    """

    def check(path: Path, *words: str, inspect: bool = True, flags: tuple[str, ...] = ()) -> None:
        out = tmp_path / "out" / "out.safetensors"
        out.parent.mkdir(exist_ok=True)
        commands: dict[str, list[object]] = {
            "convert": ["convert", path, out, "--to", "comfy", *flags],
            "convert to a folder": ["convert", path, out.parent / "folder", "--to", "peft", *flags],
            "convert beside": ["convert", path, "--to", "comfy", *flags],
            "compare": ["compare", path, good],
            "compare, second": ["compare", good, path],
        }
        if inspect:
            commands |= {"inspect": ["inspect", path], "metadata": ["metadata", path], "check": ["inspect", path, "--check", "--spectrum"]}
        before = tree(tmp_path)
        for name, arguments in commands.items():
            result = run(*arguments)
            assert result.exit_code == 3, (name, result.output)
            told = result.stdout + result.stderr
            assert "Traceback" not in told, name
            assert "unexpected" not in told, name
            for word in words:
                assert word in told, (name, word, told)
            assert tree(tmp_path) == before, name
        if not inspect:
            described = run("inspect", path)
            assert described.exit_code == 0, described.output

    return check

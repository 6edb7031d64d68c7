"""Paths as people give them: files, folders, quoted globs, and `-` for a list on stdin."""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from loratools.errors import InputError, LoraToolsError

_MAGIC = frozenset("*?[")


def is_pattern(path: Path) -> bool:
    """Does the argument stand for a list of paths? An existing file named `a[1].safetensors` stands for itself."""
    return str(path) == "-" or (not _MAGIC.isdisjoint(str(path)) and not path.exists())


def expand(paths: Sequence[Path]) -> Iterator[tuple[Path, LoraToolsError | None]]:
    """Every path meant, in order; globs sorted. One that matches nothing comes with its error, so that a batch goes on."""
    for path in paths:
        if str(path) == "-":
            lines = (line.rstrip("\r\n") for line in sys.stdin)
            yield from ((Path(line), None) for line in lines if line.strip())
        elif is_pattern(path):
            found = sorted(glob.glob(str(path), recursive=True))
            yield from ((Path(name), None) for name in found)
            if not found:
                yield path, InputError(f"{path}: no file matches this pattern")
        else:
            yield path, None

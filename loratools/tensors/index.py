"""Shards with an index, and the rules by which a folder's members may be opened at all.

    *.index.json = {"metadata": {"total_size": n}, "weight_map": {tensor name: shard file}}

A shard is a member of the index's own folder: its name is looked up in the listing and never builds a path. A symbolic
link may not leave the folder, except as the hub cache does (snapshots/<revision>/x → ../../blobs/<hash>). Everything
that is no regular file is refused unopened. Invariant: each tensor is mapped to exactly the one shard that holds it.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loratools.errors import InputError, LoraToolsError, MalformedError, UnsafeError
from loratools.report import Finding
from loratools.tensors.header import printable
from loratools.tensors.source import TensorSource, open_payload, read_json

_INDEX_NAME = re.compile(r".+\.index(\.[\w-]+)?\.json")


def is_index(name: str) -> bool:
    """True for the file name of a shard index, with or without a variant (`.index.fp16.json`)."""
    return _INDEX_NAME.fullmatch(name) is not None


def list_folder(folder: Path) -> set[str]:
    """The names in a folder. Raises InputError."""
    try:
        return set(os.listdir(folder))
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}") from error


def leaves_folder(path: Path, root: Path) -> bool:
    """True when `path`, links followed, lies outside `root` and is no blob of the hub cache that `root` belongs to."""
    real, base = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    if base == real or base in real.parents:
        return False
    caches = [parent.parent / "blobs" for parent in (base, *base.parents) if parent.name == "snapshots"]
    return real.parent not in caches


def check_members(folder: Path, names: Iterable[str], root: Path) -> None:
    """Refuse members that are hostile (UnsafeError), missing or no regular files (MalformedError), all at once, unopened."""
    unsafe, wrong = member_problems(folder, names, root)
    if unsafe:
        raise UnsafeError(f"{folder}: {unsafe[0]}", details=unsafe + wrong)
    if wrong:
        raise MalformedError(f"{folder}: {wrong[0]}", details=wrong)


def member_problems(folder: Path, names: Iterable[str], root: Path) -> tuple[list[str], list[str]]:
    """(what would leave the folder, what is missing or cannot be read as a file), found without opening anything."""
    listing = list_folder(folder)
    unsafe: list[str] = []
    wrong: list[str] = []
    for name in names:
        shown = printable(name)
        if not name or name in (".", "..") or any(char in name for char in "/\\\0") or re.match(r"[A-Za-z]:", name):
            unsafe.append(f"'{shown}' is not the name of a file in this folder")
        elif name not in listing:
            wrong.append(f"{shown} is missing")
        elif leaves_folder(folder / name, root):
            unsafe.append(f"{shown} is a link that leaves the folder")
        elif not (folder / name).exists():
            wrong.append(f"{shown} is a link to nothing")
        elif not stat.S_ISREG((folder / name).stat().st_mode):
            wrong.append(f"{shown} is not a regular file")
    return unsafe, wrong


def open_index(path: Path, root: Path | None = None) -> TensorSource:
    """All shards of an index as one source. Raises MalformedError or UnsafeError that lists every problem."""
    folder = path.parent
    check_members(folder, [path.name], root or folder)
    index = read_json(path)
    weight_map = _weight_map(path, index)
    shards = sorted(set(weight_map.values()))
    unsafe, problems = member_problems(folder, shards, root or folder)
    if unsafe:
        raise UnsafeError(f"{path}: {unsafe[0]}", details=unsafe + problems)
    source = TensorSource(path, "shards", index=index)
    missing = {name for name in shards if any(problem.startswith(f"{printable(name)} is ") for problem in problems)}
    for name in shards:
        if name in missing:
            continue
        try:
            part = open_payload(folder / name)
        except LoraToolsError as error:
            problems += error.details or [error.message]
            missing.add(name)
            continue
        problems += _mismatches(name, part, weight_map, source)
        source.add(part)
    readable = {key: name for key, name in weight_map.items() if name not in missing}
    problems += [
        f"{printable(key)}: mapped to {printable(name)}, which does not hold it"
        for key, name in readable.items()
        if source.file_of.get(key, folder / name) != folder / name or key not in source.tensors
    ]
    if problems:
        fix = "download the missing or changed files"
        raise MalformedError(f"{path}: index and shards do not fit: {problems[0]}", details=problems, fix=fix)
    _check_total(path, index, source)
    return source


def _mismatches(name: str, part: TensorSource, weight_map: dict[str, str], source: TensorSource) -> list[str]:
    """Tensors of one shard that the index does not map to it."""
    problems = []
    for key in part.tensors:
        if key in source.tensors:
            problems.append(f"{printable(key)}: stands in two shards, {printable(source.file_of[key].name)} and {printable(name)}")
        elif weight_map.get(key) is None:
            problems.append(f"{printable(key)}: is in {printable(name)} but not in the index")
    return problems


def _weight_map(path: Path, index: dict[str, Any]) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MalformedError(f"{path}: no index of shards: weight_map is absent, empty or not an object")
    bad = [f"weight_map.{printable(key)}: not a file name" for key, value in weight_map.items() if not isinstance(value, str)]
    if bad:
        raise MalformedError(f"{path}: {bad[0]}", details=bad)
    return weight_map


def _check_total(path: Path, index: dict[str, Any], source: TensorSource) -> None:
    header = index.get("metadata")
    total = header.get("total_size") if isinstance(header, dict) else None
    if total is not None and total != source.nbytes:
        message = f"{path.name}: total_size is {printable(str(total)[:40])}, the shards hold {source.nbytes} bytes"
        source.warnings.append(Finding("warning", "total-size", None, message))

"""Opening an input, whatever it is: a file, shards with an index, a folder. Headers only; tensors come when asked for.

The content decides, not the suffix; the folder rules are in `folders`, those of indexes in `index`.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from loratools.errors import InputError
from loratools.tensors.folders import open_folder
from loratools.tensors.header import check_regular, printable
from loratools.tensors.index import is_index, open_index
from loratools.tensors.source import TensorSource, open_payload

__all__ = ["TensorSource", "open_source"]


def open_source(path: Path | str) -> TensorSource:
    """Open a weights file, a shard index or a folder.

    Raises InputError (missing, nothing to open), MalformedError, UnsafeError, AmbiguousError; nothing is executed, and
    nothing but the files that belong to the input is opened.
    """
    path = Path(path)
    _check_there(path)
    if path.is_dir():
        return open_folder(path)
    check_regular(path)
    if is_index(path.name):
        return open_index(path)
    return open_payload(path)


def _check_there(path: Path) -> None:
    """Raise InputError that names a missing path and what lies near it."""
    try:
        if path.exists():
            return
        folder = path.parent
        names = os.listdir(folder) if folder.is_dir() else []
    except (OSError, ValueError) as error:
        raise InputError(f"{printable(str(path))}: {error}") from error
    near = [printable(name) for name in difflib.get_close_matches(path.name, names, n=3)]
    if path.is_symlink():
        raise InputError(f"{path}: a link to {os.readlink(path)}, which does not exist", fix="restore what the link points to")
    where = "" if folder.is_dir() else f": the folder {folder} does not exist"
    fix = f"did you mean {', '.join(near)}?" if near else "check the path"
    raise InputError(f"{printable(str(path))}: no such file or folder{where}", fix=fix)

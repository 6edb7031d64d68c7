"""The types of configuration values that pydantic has no word for: places, file names, dialects, ways to start.

Each refuses with what it expected instead ("a file name without folders"), which is what the reader of a file is shown.
Invariant: a path is absolute once it was read from a file, and can be written as UTF-8.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, Strict, ValidationInfo
from pydantic_core import PydanticCustomError

from loratools.mapping.dialects import DIALECTS

FOLDER = "folder"  # key of the validation context: what relative paths are relative to
_INITS = ("default", "gaussian", "orthogonal", "pissa", "olora", "loftq")
_WRITABLE = tuple(name for name, dialect in DIALECTS.items() if dialect.writable)


def expected(words: str) -> PydanticCustomError:
    """The refusal of a value where `words` were expected."""
    return PydanticCustomError("expected", "expected {words}", {"words": words})


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(f"'{name}'" for name in names[:-1]) + f" or '{names[-1]}'"


def _location(value: object, info: ValidationInfo) -> Path:
    """A path as it stands in a file, put under the folder of the validation context; ~ is the home folder."""
    text = str(value) if isinstance(value, str | Path) else ""
    if not text or "\0" in text:
        raise expected("a path")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:  # ~nobody
        raise expected("a path below a home folder that exists") from error
    placed = (info.context or {}).get(FOLDER, Path()) / path
    if any("\ud800" <= char <= "\udfff" for char in str(placed)):  # bytes of a file system that are no text
        raise expected("a path that is UTF-8 throughout")
    return Path(placed)


def _file_name(value: str) -> str:
    if not value.isprintable() or value.strip(" .") != value or not value or re.search(r'[\\/:*?"<>|]', value):
        raise expected("a file name without folders")
    return value


def _extension(value: str) -> str:
    if not re.fullmatch(r"\.[\w.-]+", value):
        raise expected("an extension such as '.txt'")
    return value


def _init(value: str) -> str:
    if value not in _INITS and not re.fullmatch(r"pissa_niter_[1-9][0-9]{0,3}", value):
        raise expected(f"{_listed(_INITS)}, or pissa_niter_N")
    return value


def _dialect(value: str) -> str:
    if value not in _WRITABLE:
        raise expected(f"a dialect: {_listed(_WRITABLE)}")
    return value


def _unique(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(values)) < len(values):
        raise expected("each entry once")
    return values


unique = AfterValidator(_unique)
Location = Annotated[Path, BeforeValidator(_location)]
FileName = Annotated[str, AfterValidator(_file_name)]
Extension = Annotated[str, AfterValidator(_extension)]
Init = Annotated[str, AfterValidator(_init)]
Dialect = Annotated[str, AfterValidator(_dialect)]
Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Strict(False)]

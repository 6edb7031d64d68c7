"""Which pictures a run sees, and with which words.

A caption is, in this order: the picture's row in a `metadata.jsonl` (`file_name` with `text` or `caption`, as Hugging Face's
imagefolder writes it), the text file of the same stem beside it, the folder's `prompt`. Row and file must not disagree.
Prefix and suffix are put around whatever it is.
Invariants: headers of pictures only; sorted by relative path, whatever order the file system has; a name from a file is looked up
among the files found and never becomes a path; what is not used is told (`Dataset.unused`).
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from loratools.errors import InputError, MalformedError, UnsupportedError, counted
from loratools.tensors.header import open_bytes, parse_json, printable
from loratools.training.data.pictures import SUFFIXES, picture_size

METADATA = "metadata.jsonl"
_TEXT_KEYS = ("text", "caption")


@dataclass(frozen=True)
class Folder:
    """A folder of pictures, searched with its subfolders. `repeats`: how often an epoch shows each picture."""

    path: Path
    repeats: int = 1
    caption_extension: str = ".txt"
    prompt: str | None = None  # for pictures without a caption of their own
    prefix: str = ""
    suffix: str = ""


@dataclass(frozen=True)
class Sample:
    """One picture. `width` and `height` are as shown (EXIF orientation applied).

    `id`: the path below its folder, with / and in NFC; from the second folder on with the folder's number before it ("2:cat.png"), so
    that moving a folder, or adding one at the end, changes no id.
    """

    id: str
    path: Path
    caption: str
    width: int
    height: int
    repeats: int
    folder: Path


@dataclass(frozen=True)
class Dataset:
    """`samples` in order of folder and relative path. `unused`: files that are neither picture, caption of one, nor metadata."""

    samples: tuple[Sample, ...]
    unused: tuple[Path, ...]


@dataclass
class _Reading:
    """A folder while it is read: its files by relative path, the captions of its metadata, what is used, what is wrong."""

    folder: Folder
    files: dict[str, Path]
    rows: dict[str, str | None] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def read_folders(folders: Sequence[Folder]) -> Dataset:
    """The pictures of all folders, described.

    Raises InputError that lists every problem: no pictures, a picture without a caption or with two, a broken picture, a text that
    is not UTF-8, the same file twice, a row of metadata that names nothing; UnsupportedError without pillow.
    """
    samples: list[Sample] = []
    unused: list[Path] = []
    problems: list[str] = [] if folders else ["no folder is given"]
    for number, folder in enumerate(folders, 1):
        reading = _read_folder(folder, "" if number == 1 else f"{number}:", samples)
        problems += reading.problems
        unused += [path for name, path in reading.files.items() if name not in reading.used]
    problems += _duplicates(samples)
    if problems:
        raise InputError(f"{counted(len(problems), 'problem')} in the training data", details=[printable(line) for line in problems])
    return Dataset(tuple(samples), tuple(unused))


def _read_folder(folder: Folder, mark: str, samples: list[Sample]) -> _Reading:
    """Append the samples of one folder; problems are in what comes back."""
    reading = _Reading(folder, {})
    if folder.repeats < 1:
        reading.problems.append(f"{folder.path}: repeats is {folder.repeats}, expected 1 or more")
    if folder.caption_extension in ("", ".") or "/" in folder.caption_extension:
        reading.problems.append(f"{folder.path}: {folder.caption_extension!r} is no caption extension, expected one like .txt")
        return reading
    if not folder.path.is_dir():
        reading.problems.append(f"{folder.path}: {'not a folder' if folder.path.exists() else 'no such folder'}")
        return reading
    _list_files(reading)
    pictures = [name for name in reading.files if PurePosixPath(name).suffix.lower() in SUFFIXES]
    _read_metadata(reading, set(pictures))
    if not pictures:
        reading.problems.append(f"{folder.path}: no pictures; looked for {' '.join(sorted(SUFFIXES))}")
    for name in pictures:
        reading.used.add(name)
        caption = _caption(reading, name)
        try:
            width, height = picture_size(reading.files[name])
        except UnsupportedError:
            raise  # pillow is missing: nothing about this picture
        except InputError as error:
            reading.problems.append(error.message)
            continue
        samples.append(Sample(mark + name, reading.files[name], caption, width, height, folder.repeats, folder.path))
    return reading


def _list_files(reading: _Reading) -> None:
    """All files below the folder but hidden ones, sorted by relative path; a folder that links lead to twice is read once."""
    seen: set[str] = set()

    def unreadable(error: OSError) -> None:
        reading.problems.append(f"{error.filename}: {error.strerror}")

    found: list[tuple[str, Path]] = []
    root = reading.folder.path
    for place, folders, names in os.walk(root, onerror=unreadable, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(place, name) for name in names if not name.startswith(".")]
        found += [(unicodedata.normalize("NFC", path.relative_to(root).as_posix()), path) for path in paths]
    for name, path in sorted(found):
        if not name.isascii() and any("\ud800" <= char <= "\udfff" for char in name):
            reading.problems.append(f"{path}: the name is not UTF-8; rename the file")
        elif name in reading.files:
            reading.problems.append(f"{path}: the same name as another file in a different Unicode form; rename one of them")
        else:
            reading.files[name] = path


def _read_metadata(reading: _Reading, pictures: set[str]) -> None:
    """Captions from every metadata.jsonl; a row speaks of files below the folder its metadata.jsonl is in."""
    for name, path in reading.files.items():
        if PurePosixPath(name).name != METADATA:
            continue
        reading.used.add(name)
        for number, line in enumerate(_content(reading, path).removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                file_name, caption = _row(parse_json(line, where), where)
            except MalformedError as error:
                reading.problems.append(error.message)
                continue
            target = _normal(PurePosixPath(name).parent / PurePosixPath(file_name.replace("\\", "/")))
            if target not in pictures:
                reason = "is no picture that can be read" if target in reading.files else "is not there"
                reading.problems.append(f"{where}: {file_name} {reason}")
            elif target in reading.rows:
                reading.problems.append(f"{where}: {file_name} has a row already")
            else:
                reading.rows[target] = caption


def _row(row: Any, where: str) -> tuple[str, str | None]:
    """The picture a row names and its caption, None when it has none. Raises MalformedError."""
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise MalformedError(f"{where}: expected an object with a file_name")
    texts = [row[key] for key in _TEXT_KEYS if row.get(key) is not None]
    if not all(isinstance(text, str) for text in texts) or len(set(texts)) > 1:
        raise MalformedError(f"{where}: expected one caption, a string under {' or '.join(_TEXT_KEYS)}")
    return row["file_name"], _one_line(texts[0]) if texts else None


def _normal(path: PurePosixPath) -> str:
    """A relative name without . and .. steps, as files are listed; one that leaves the folder matches no file."""
    return unicodedata.normalize("NFC", os.path.normpath(path))


def _caption(reading: _Reading, name: str) -> str:
    """A picture's caption with prefix and suffix; a problem is noted where there is none or where two differ."""
    folder = reading.folder
    beside = str(PurePosixPath(name).with_suffix("." + folder.caption_extension.removeprefix(".")))
    row, text = reading.rows.get(name), None
    if beside in reading.files and beside != name:
        reading.used.add(beside)
        text = _read_text(reading, reading.files[beside])
    if row is not None and text is not None and row != text:
        reading.problems.append(f"{reading.files[name]}: its row in {METADATA} and {reading.files[beside].name} differ; keep one of them")
    caption = next((choice for choice in (row, text, folder.prompt) if choice is not None), None)
    if caption is None:
        reading.problems.append(f"{reading.files[name]}: no caption: no {PurePosixPath(beside).name}, no row in {METADATA}, no prompt")
    return f"{folder.prefix}{caption}{folder.suffix}"


def _read_text(reading: _Reading, path: Path) -> str:
    try:
        return _one_line(_content(reading, path).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        reading.problems.append(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8")
    return ""


def _content(reading: _Reading, path: Path) -> bytes:
    """A small file whole; empty, and a problem, where it cannot be read."""
    try:
        file, size = open_bytes(path)
        return file.read(0, size)
    except InputError as error:
        reading.problems.append(error.message)
    return b""


def _one_line(text: str) -> str:
    """A caption has no line ends: tokenizers treat them as spaces or as words, depending on which."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _duplicates(samples: Sequence[Sample]) -> list[str]:
    """The same file reached twice, by a link or through two folders, and two files that have come to one id."""
    files: dict[str, Path] = {}
    ids: dict[str, Path] = {}
    problems = []
    for sample in samples:
        same = files.setdefault(os.path.realpath(sample.path), sample.path)
        namesake = ids.setdefault(sample.id, sample.path)
        if same is not sample.path:
            problems.append(f"{sample.path}: the same file as {same}; use repeats to show a picture more often")
        elif namesake is not sample.path:
            problems.append(f"{sample.path}: has the id {sample.id}, as {namesake} has; rename one of them")
    return problems

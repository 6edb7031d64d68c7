"""Outputs that appear under their name complete or not at all.

A file or folder is made as a sibling `.<name>.<pid>.loratools-partial`, forced to disk, and renamed; on any exception
it is removed, after `kill -9` the next run with the same output removes it. Invariant: at every moment the output's name
is absent, or the old content, or the whole new content. Modes come from the umask, a linked output is written where the
link points, inputs are never overwritten. Every failure of the operating system is a WriteError. No torch.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from loratools.errors import LoraToolsError, OutputExistsError, WriteError
from loratools.tensors.header import open_bytes
from loratools.tensors.lazy import CHUNK

_PARTIAL, _REPLACED = "loratools-partial", "loratools-replaced"
_LEFTOVER = re.compile(rf"\.(?P<name>.+)\.(?P<pid>\d+)\.(?P<kind>{_PARTIAL}|{_REPLACED})", re.DOTALL)
_ACTIVE: set[Path] = set()  # temporaries of this process, so that another sink does not take them for leftovers
_REASONS = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}


@dataclass(frozen=True)
class WriteResult:
    """What was written: `bytes` and `sha256` of the file at `path` (of shards: all bytes, the index's sha256).

    `sha256` is None where it would cost a pass of its own: of a copy, and where hashes were stamped into the header afterwards.
    """

    path: Path
    bytes: int
    sha256: str | None
    files: tuple[Path, ...] = field(default=())


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into a WriteError that names the output and the reason."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
        raise WriteError(f"{path}: cannot write: {reason}", fix="free some space or choose another folder for the output") from error


def resolve_output(path: Path | str) -> Path:
    """Where an output is really written: a symbolic link is followed, never replaced."""
    path = Path(path)
    with write_errors(path):
        if not path.name or path.name == "..":
            path = path.resolve()
        return Path(os.path.realpath(path)) if path.is_symlink() else path


def output_problems(out: Path | str, inputs: Iterable[Path | str] = (), *, force: bool = False, nbytes: int = 0) -> list[LoraToolsError]:
    """Everything that stands against writing `nbytes` to `out`, most important first; empty when nothing does."""
    out = Path(out)
    target = resolve_output(out)
    problems: list[LoraToolsError] = []
    clash = next((str(source) for source in inputs if _clashes(target, Path(source))), None)
    if clash is not None:
        fix = "choose another name; an input is never overwritten"
        problems.append(OutputExistsError(f"{out}: the output is the input {clash}", fix=fix))
    elif os.path.lexists(target) and not force:
        problems.append(OutputExistsError(f"{out}: already there", fix="--force overwrites it"))
    elif os.path.lexists(target) and not (target.is_file() or target.is_dir()):
        problems.append(OutputExistsError(f"{out}: neither a file nor a folder, not overwritten"))
    elif target.is_dir() and Path.cwd().is_relative_to(os.path.realpath(target)):
        problems.append(OutputExistsError(f"{out}: is the working directory or holds it", fix="choose another name"))
    folder = target.parent
    if not folder.is_dir():
        problems.append(WriteError(f"{out}: the folder {folder} does not exist", fix=f"mkdir -p {folder}"))
    elif not os.access(folder, os.W_OK | os.X_OK):
        problems.append(WriteError(f"{out}: the folder {folder} cannot be written to"))
    elif nbytes and (problem := _space_problem(out, folder, nbytes)):
        problems.append(problem)
    return problems


# What a folder of PEFT adapters holds. A folder with anything else in it is kept under another name when it is replaced.
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def kept_aside(folder: Path | str, coming: Collection[Path] = ()) -> Path | None:
    """Where an existing folder will go when it is replaced by one with the files `coming` (relative paths).

    None if it will be removed: it holds nothing but adapters and files that the new one has too.
    """
    folder = resolve_output(Path(folder))
    if not folder.is_dir():
        return None
    files = _files_below(folder)
    if all(file in coming or (file.name in _ADAPTER_FILES and len(file.parts) <= 2) for file in files):
        return None
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    return next(path for number in numbers if not os.path.lexists(path := folder.with_name(f"{folder.name}.replaced{number}")))


def _files_below(folder: Path) -> set[Path]:
    return {Path(place, name).relative_to(folder) for place, _, names in os.walk(folder) for name in names}


def check_output(out: Path | str, inputs: Iterable[Path | str] = (), force: bool = False, nbytes: int = 0) -> None:
    """Refuse an output that is an input (even with `force`), exists without `force`, or cannot be written.

    `inputs`: every path given and every file opened (`TensorSource.files`). Raises OutputExistsError or WriteError;
    `details` lists all problems.
    """
    problems = output_problems(out, inputs, force=force, nbytes=nbytes)
    if problems:
        problems[0].details = [problem.message for problem in problems] if len(problems) > 1 else []
        raise problems[0]


def _clashes(target: Path, source: Path) -> bool:
    """True when writing `target` would change or remove `source`: the same file by any name, or one inside the other."""
    try:
        if target.exists() and source.exists() and os.path.samefile(target, source):
            return True
        here, there = Path(os.path.realpath(target)), Path(os.path.realpath(source))
        if here == there or here in there.parents:
            return True
        return there.is_dir() and there in here.parents and here.exists()
    except (OSError, ValueError):
        return False  # an input that cannot be looked at is reported where it is opened


def _space_problem(out: Path, folder: Path, nbytes: int) -> WriteError | None:
    with write_errors(out):
        disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if free >= nbytes:
        return None
    return WriteError(f"{out}: the disk is full: {nbytes} bytes needed, {free} free in {folder}", fix="free some space or write elsewhere")


def partial_name(target: Path, kind: str = _PARTIAL) -> Path:
    stem = os.fsencode(target.name)[:200].decode("utf-8", "ignore")  # with the rest within the 255 bytes of a name
    return target.with_name(f".{stem}.{os.getpid()}.{kind}")


def remove_leftovers(target: Path) -> None:
    """Clear away what a killed run with the same output left; bring back an old folder it had moved aside."""
    stem = os.fsencode(target.name)[:200].decode("utf-8", "ignore")
    for name in os.listdir(target.parent):
        match = _LEFTOVER.fullmatch(name)
        if not match or match["name"] != stem:
            continue
        leftover = target.parent / name
        if leftover in _ACTIVE or (int(match["pid"]) != os.getpid() and _alive(int(match["pid"]))):
            continue
        if match["kind"] == _REPLACED and not os.path.lexists(target):
            os.rename(leftover, target)
        else:
            remove_tree(leftover)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def remove_tree(path: Path) -> None:
    """Remove a file or folder if it is there; what cannot be removed stays (the output itself is not concerned)."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Force a rename to disk. Where a file system cannot do that, the file is complete all the same: no error."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class AtomicFile:
    """A file written at any offset under a temporary name; `commit` gives it its own, `abort` removes it.

    Raises OutputExistsError when the target is there without `force`, WriteError when it cannot be made or written.
    """

    def __init__(self, path: Path | str, *, force: bool = False, nbytes: int = 0) -> None:
        self.path, self.force = Path(path), force
        self.target = resolve_output(path)
        check_output(self.path, (), force, nbytes)
        if self.target.is_dir():
            raise OutputExistsError(f"{path}: is a folder; the output is a file", fix="remove the folder or choose another name")
        self.temporary = partial_name(self.target)
        with write_errors(self.path):
            remove_leftovers(self.target)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
            self.descriptor = os.open(self.temporary, flags, 0o666)
        _ACTIVE.add(self.temporary)

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        with write_errors(self.path):
            while view:
                written = os.pwrite(self.descriptor, view, offset)
                if written <= 0:
                    raise OSError(errno.EIO, "nothing was written")
                view, offset = view[written:], offset + written

    def read_at(self, offset: int, size: int) -> bytes:
        with write_errors(self.path):
            return os.pread(self.descriptor, size, offset)

    def finish(self) -> None:
        """Everything on disk, the file closed, still under its temporary name."""
        with write_errors(self.path):
            os.fsync(self.descriptor)
            self._close()
            if not self.force and os.path.lexists(self.target):
                raise OutputExistsError(f"{self.path}: appeared while it was being written", fix="--force overwrites it")

    def _close(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def commit(self) -> None:
        self.finish()
        with write_errors(self.path):
            os.replace(self.temporary, self.target)
        _ACTIVE.discard(self.temporary)
        sync_folder(self.target.parent)

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._close()
        if self.temporary in _ACTIVE:
            remove_tree(self.temporary)
            _ACTIVE.discard(self.temporary)

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.abort()  # nothing left to do after a commit that worked


def commit_together(files: list[AtomicFile], remove: Iterable[Path] = ()) -> None:
    """Put several finished files in place and take `remove` away; on a failure the old state comes back."""
    moved: list[tuple[Path, Path]] = []
    created: list[Path] = []
    try:
        for old in dict.fromkeys([*remove, *(file.target for file in files)]):
            if os.path.lexists(old):
                with write_errors(old):
                    aside = partial_name(old, _REPLACED)
                    os.rename(old, aside)
                _ACTIVE.add(aside)
                moved.append((old, aside))
        for file in files:
            with write_errors(file.path):
                os.rename(file.temporary, file.target)
            created.append(file.target)
    except BaseException:
        for target in created:
            remove_tree(target)
        for old, aside in reversed(moved):
            with contextlib.suppress(OSError):
                os.replace(aside, old)
            _ACTIVE.discard(aside)
        raise
    for file in files:
        _ACTIVE.discard(file.temporary)
    for _, aside in moved:
        remove_tree(aside)
        _ACTIVE.discard(aside)
    for folder in {file.target.parent for file in files}:
        sync_folder(folder)


@contextlib.contextmanager
def output_folder(path: Path | str, *, force: bool = False) -> Iterator[Path]:
    """An empty folder to fill; when the block ends without an exception it gets its name, else it is removed.

    With `force` an old folder (or file) is moved aside and removed only when the new one is in place; one that holds files the
    new one does not have stays, as `kept_aside` says. Raises OutputExistsError, WriteError.
    """
    path = Path(path)
    target = resolve_output(path)
    check_output(path, (), force)
    temporary, aside = partial_name(target), partial_name(target, _REPLACED)
    with write_errors(path):
        remove_leftovers(target)
        os.mkdir(temporary, 0o777)
    _ACTIVE.update((temporary, aside))
    try:
        yield temporary
        kept = kept_aside(target, _files_below(temporary))
        _move_in(path, temporary, target, aside, force)
        if kept is not None:
            os.rename(aside, kept)
    finally:
        remove_tree(temporary)
        if os.path.lexists(target):
            remove_tree(aside)
        _ACTIVE.difference_update((temporary, aside))


def _move_in(path: Path, temporary: Path, target: Path, aside: Path, force: bool) -> None:
    for folder, _, _ in os.walk(temporary):
        sync_folder(Path(folder))
    with write_errors(path):
        if os.path.lexists(target):
            if not force:
                raise OutputExistsError(f"{path}: appeared while it was being written", fix="--force overwrites it")
            os.rename(target, aside)
        try:
            os.rename(temporary, target)
        except BaseException:
            if os.path.lexists(aside):
                os.rename(aside, target)
            raise
    sync_folder(target.parent)


def write_text_file(path: Path | str, text: str, *, force: bool = False) -> WriteResult:
    """UTF-8 text with line ends as they are, atomic and forced to disk."""
    return write_bytes_file(path, text.encode("utf-8"), force=force)


def write_bytes_file(path: Path | str, data: bytes, *, force: bool = False) -> WriteResult:
    """Bytes as they are, atomic and forced to disk."""
    with AtomicFile(path, force=force, nbytes=len(data)) as file:
        file.write_at(0, data)
    return WriteResult(Path(path), len(data), hashlib.sha256(data).hexdigest(), (Path(path),))


def copy_file(source: Path | str, target: Path | str, *, force: bool = False) -> WriteResult:
    """The bytes of `source` under another name, atomic. Raises InputError, OutputExistsError (also for itself), WriteError."""
    data, size = open_bytes(Path(source))
    check_output(target, [source], force, size)
    with AtomicFile(target, force=force, nbytes=size) as file:
        for offset in range(0, size, CHUNK):
            file.write_at(offset, data.read(offset, min(CHUNK, size - offset)))
    return WriteResult(Path(target), size, None, (Path(target),))

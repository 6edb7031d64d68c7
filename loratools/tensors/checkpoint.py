"""A checkpoint written again, file by file, with some tensors replaced or added.

    weights files: tensors = the file's own, in its order, some replaced → added ones at the end
    indexes:       weight_map and total_size of what was written, every other entry kept

A weights file without a change is copied whole (a pickle is always turned into safetensors), and so is an index. The
untouched tensors of a changed file are copied bit for bit. Which files there are is decided in `layout`. Invariants: OUT
appears complete or not at all, after `check` has seen it; the same inputs give the same bytes, whatever `threads`;
memory is the blocks in the making.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loratools.errors import LoraToolsError, MalformedError, UnsafeError
from loratools.tensors.ahead import write_all
from loratools.tensors.atomic import AtomicFile, WriteResult, check_output, output_folder, write_errors, write_text_file
from loratools.tensors.header import open_bytes, printable
from loratools.tensors.layout import CONVERTED, Layout
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.payload import STAMPS, copy_range, look_at
from loratools.tensors.source import TensorSource, open_payload, read_json
from loratools.tensors.writer import TensorSink, index_text

Header = Callable[[Mapping[str, str]], Mapping[str, str]]
Check = Callable[[Path], None]


def write_checkpoint(
    layout: Layout,
    out: Path,
    *,
    replaced: Mapping[str, LazyTensor],
    added: Mapping[str, tuple[Path, LazyTensor]] = {},
    metadata: Header,
    texts: Mapping[Path, str] = {},
    extra_files: Mapping[Path, Path] = {},
    force: bool,
    threads: int,
    check: Check | None = None,
    progress: Callable[[int], None] | None = None,
) -> WriteResult:
    """Write the checkpoint of `layout` to `out`, a file or a folder as the source is one.

    replaced: key of the source → its new tensor; dtype and shape may differ.
    added: key (with the prefix of the file's other keys) → the weights file of OUT that takes it at its end, and the tensor.
    metadata: the old header of a file with changed tensors → its new one; hashes in it are set to those of what is written.
    texts, extra_files: relative path in OUT → the text, or the file, that is put there in place of a copy or beside them.
    check: sees the finished file or folder under its temporary name; what it raises leaves no output.
    progress: called with the bytes written so far, of `layout.nbytes` and what the changes add to it.
    Raises OutputExistsError, WriteError, InputError, LoraToolsError.
    """
    work = _Rewriting(layout, replaced, _by_file(layout, added), metadata, threads, progress)
    _refuse_unknown(layout, replaced, {**texts, **extra_files})
    inputs = [layout.root, *layout.source.files, *extra_files.values()]
    check_output(out, inputs, force, work.nbytes())
    if not layout.folder:
        return work.weights(layout.source.files[0], Path(out), force, check)
    with output_folder(out, force=force) as folder:
        for file, name in layout.weights.items():
            work.weights(file, _place(folder, name))
        for index, name in layout.indexes.items():
            work.index(index, _place(folder, name))
        others = {name: layout.root / name for name in layout.copies} | dict(extra_files)
        for name in sorted(others.keys() - texts.keys()):
            work.copy(others[name], _place(folder, name))
        for name, text in sorted(texts.items()):
            write_text_file(_place(folder, name), text)
        if check is not None:
            check(folder)
    names = [*layout.weights.values(), *layout.indexes.values(), *sorted(others.keys() | texts.keys())]
    files = tuple(Path(out) / name for name in names)
    return WriteResult(Path(out), sum(file.stat().st_size for file in files), None, files)


def _by_file(layout: Layout, added: Mapping[str, tuple[Path, LazyTensor]]) -> dict[Path, dict[str, LazyTensor]]:
    """Weights file of the source → the tensors it gets."""
    source_of = {target: file for file, target in layout.weights.items()}
    strangers = [f"{printable(key)}: {target}" for key, (target, _) in added.items() if target not in source_of]
    strangers += [f"{printable(key)}: is there already" for key in added if key in layout.source.tensors]
    if strangers:
        raise LoraToolsError(f"{len(strangers)} added tensors have no place (a defect in loratools)", details=strangers)
    chosen: dict[Path, dict[str, LazyTensor]] = defaultdict(dict)
    for key, (target, tensor) in added.items():
        chosen[source_of[target]][key] = tensor
    return chosen


def _refuse_unknown(layout: Layout, replaced: Mapping[str, LazyTensor], others: Mapping[Path, object]) -> None:
    unknown = [printable(key) for key in replaced if key not in layout.source.tensors]
    if unknown:
        raise LoraToolsError(f"{len(unknown)} replaced tensors are not in {layout.source.path} (a defect in loratools)", details=unknown)
    unsafe = [printable(str(path)) for path in others if path.is_absolute() or ".." in path.parts or not path.parts]
    if unsafe:
        raise UnsafeError(f"{unsafe[0]}: not a path inside the output", details=unsafe)
    weights = {*layout.weights.values(), *layout.indexes.values()}
    taken = [str(path) for path in others if path in weights or not layout.folder]
    if taken:
        raise LoraToolsError(f"{taken[0]}: has no place beside the weights (a defect in loratools)", details=taken)


def _place(folder: Path, name: Path) -> Path:
    """A path in the new folder; its own folders are made."""
    target = folder / name
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    return target


class _Rewriting:
    """The files of one checkpoint being written: what changes, and what has been written of each weights file."""

    def __init__(
        self,
        layout: Layout,
        replaced: Mapping[str, LazyTensor],
        added: Mapping[Path, Mapping[str, LazyTensor]],
        metadata: Header,
        threads: int,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.layout, self.replaced, self.added, self.metadata = layout, replaced, added, metadata
        self.threads, self.progress = threads, progress
        self.done = 0
        self.payload: dict[Path, int] = {}  # weights file of the source → bytes of tensors written
        self.new_names: dict[Path, list[str]] = {}  # and the names it got

    def nbytes(self) -> int:
        """Bytes of everything that will be written."""
        old = self.layout.source.tensors
        grown = sum(tensor.nbytes - old[key].nbytes for key, tensor in self.replaced.items())
        return self.layout.nbytes + grown + sum(tensor.nbytes for part in self.added.values() for tensor in part.values())

    def weights(self, file: Path, target: Path, force: bool = False, check: Check | None = None) -> WriteResult:
        """One weights file with its changes, or whole when it has none."""
        part = open_payload(file)
        prefix = self._prefix(file, part)
        changed = {name: self.replaced[prefix + name] for name in part.tensors if prefix + name in self.replaced}
        new = {self._without(prefix, key): tensor for key, tensor in self.added.get(file, {}).items()}
        tensors = {**part.tensors, **changed, **new}
        self.payload[file] = sum(tensor.nbytes for tensor in tensors.values())
        self.new_names[file] = list(new)
        if not changed and not new and part.container == "safetensors":
            return self.copy(file, target, force, check)
        old = dict(CONVERTED if part.container == "pickle" else part.metadata)
        header = dict(self.metadata(old)) if changed or new else old
        with TensorSink(target, header, force=force, stamp_hashes=STAMPS.keys() & header.keys(), digest=False) as sink:
            for name, tensor in tensors.items():
                sink.declare(name, tensor.dtype, tuple(tensor.shape))
            write_all(sink, tensors, self.threads, self._tell)
            sink.commit(check)
        self._finished(sink.result.bytes)
        return sink.result

    def _prefix(self, file: Path, part: TensorSource) -> str:
        """What the reader put before a file's names: nothing, or the component's folder."""
        keys, names = self.layout.keys_of(file), list(part.tensors)
        prefix = keys[0][: len(keys[0]) - len(names[0])] if keys and names else ""
        if keys != [prefix + name for name in names]:
            raise MalformedError(f"{file}: changed while it was being read")
        return prefix

    def _without(self, prefix: str, key: str) -> str:
        if not key.startswith(prefix):
            raise LoraToolsError(f"{printable(key)}: expected a key that begins with {printable(prefix)} (a defect in loratools)")
        return key.removeprefix(prefix)

    def index(self, path: Path, target: Path) -> None:
        """An index as it is, or with the names and the size of what was written."""
        index = read_json(path)
        files = [file for file in self.layout.weights if file.parent == path.parent]
        named = {file.name: self.layout.weights[file].name for file in files}
        weight_map = {name: named[shard] for name, shard in index["weight_map"].items()}
        for file in files:
            weight_map.update(dict.fromkeys(self.new_names[file], named[file.name]))
        entries: Mapping[str, Any] = index["metadata"] if isinstance(index.get("metadata"), dict) else {}
        total = sum(self.payload[file] for file in files)
        if weight_map == index["weight_map"] and entries.get("total_size", total) == total:
            self.copy(path, target)
            return
        rest = {key: value for key, value in index.items() if key not in ("metadata", "weight_map")}
        self._finished(write_text_file(target, index_text(weight_map, total, entries, rest)).bytes)

    def copy(self, path: Path, target: Path, force: bool = False, check: Check | None = None) -> WriteResult:
        """The bytes of a file."""
        data, size = open_bytes(path)
        with AtomicFile(target, force=force, nbytes=size) as file:
            copy_range(data, 0, size, file, 0)
            look_at(file, check)
        self._finished(size)
        return WriteResult(target, size, None, (target,))

    def _tell(self, nbytes: int) -> None:
        if self.progress is not None:
            self.progress(self.done + nbytes)

    def _finished(self, nbytes: int) -> None:
        self.done += nbytes
        self._tell(0)

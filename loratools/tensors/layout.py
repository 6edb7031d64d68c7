"""The files a checkpoint is made of, and under which names the same checkpoint is written again.

    one file → one file;  a folder (or an index, for the folder that holds it) → a complete folder:
    every file = weights that were opened | their index | copied byte for byte | left out, with the reason

What is written is safetensors: a pickle gets the name its library gives those (pytorch_model.bin → model.safetensors). Left
out is what holds the same weights a second time and would still be the old ones: variants and second containers the
reader passed over, single files beside a pipeline, other formats (ONNX, Flax, GGUF …), folders of exports. The
version-control and download folders of `SKIPPED` are not looked into. Symbolic links obey `index.leaves_folder`: those
of a hub cache are copied by content, others that leave the folder are refused. Invariant: names from a file never build
a path, every path was found in a listing. No torch, no weights file is opened; the writing is `checkpoint`'s.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from loratools.errors import MalformedError, UnsafeError
from loratools.tensors.folders import choose_weights
from loratools.tensors.header import printable, render_header
from loratools.tensors.index import is_index, leaves_folder, list_folder, member_problems
from loratools.tensors.source import TensorSource

SKIPPED = frozenset([".git", ".cache", ".huggingface"])  # folders: history and download records, not the model

# suffix → the format: the same weights for another runtime, wherever the file lies
_FORMATS = {
    ".onnx": "ONNX",
    ".onnx_data": "ONNX",
    ".msgpack": "Flax",
    ".h5": "TensorFlow",
    ".tflite": "TensorFlow Lite",
    ".ot": "Rust",
    ".gguf": "GGUF",
    ".ggml": "GGML",
    ".mlmodel": "Core ML",
    ".pth": "a torch pickle",
}
_EXPORTS = frozenset(["original", "onnx", "openvino", "metal", "coreml"])  # folders of the same weights in another form
_WEIGHTS = frozenset([".safetensors", ".bin", ".pt", ".ckpt"])
_NO_WEIGHTS = frozenset(["training_args.bin"])  # the options of transformers' Trainer, under a suffix of weights

CONVERTED = {"format": "pt"}  # the header of a file made from a pickle, which has none: transformers asks for it
_PICKLE_NAME = re.compile(r"(?P<stem>.+)\.(bin|pt|pth|ckpt)(?P<index>\.index(\.[\w-]+)?\.json)?")
_OLD_STEM = re.compile(r"pytorch_model(?=$|[.-])")  # transformers' own stem before safetensors; today's is "model"


@dataclass(frozen=True)
class Layout:
    """The files of `source`, and where each goes relative to OUT (for one file: OUT itself, the empty path).

    `weights` and `indexes`: the files opened. `copies`: every other file of the folder, copied byte for byte. `left_out`:
    files with unchanged weights in another form, and why. `nbytes` of everything that is written when nothing changes its size.
    """

    source: TensorSource
    folder: bool
    weights: Mapping[Path, Path]
    indexes: Mapping[Path, Path]
    copies: tuple[Path, ...]
    left_out: tuple[tuple[Path, str], ...]
    nbytes: int

    @property
    def root(self) -> Path:
        """The folder the relative paths start from; of a single file, the file."""
        return _root(self.source)

    def keys_of(self, file: Path) -> list[str]:
        """The keys of the source that lie in one weights file, in its order."""
        return [key for key, path in self.source.file_of.items() if path == file]


def layout_of(source: TensorSource) -> Layout:
    """The layout of an opened checkpoint. Raises UnsafeError or MalformedError for files of the folder that cannot be copied."""
    root = _root(source)
    if not root.is_dir():
        return Layout(source, False, {source.files[0]: Path()}, {}, (), (), _weights_bytes(source))
    indexes = _indexes(source)
    weights = {file: _target(file, root) for file in source.files}
    names = {index: _target(index, root) if _shards_renamed(index, weights) else index.relative_to(root) for index in indexes}
    copies, left_out = _other_files(root, {*weights, *indexes})
    _refuse_clashes(root, [*weights.values(), *names.values(), *copies])
    others = [*indexes, *(root / name for name in copies)]
    nbytes = _weights_bytes(source) + sum(path.stat().st_size for path in others)
    return Layout(source, True, weights, names, tuple(copies), tuple(left_out), nbytes)


def _root(source: TensorSource) -> Path:
    return source.path.parent if not source.path.is_dir() and is_index(source.path.name) else source.path


def _indexes(source: TensorSource) -> list[Path]:
    """The index of every folder whose weights were opened through one: the reader's own choice."""
    if is_index(source.path.name) and not source.path.is_dir():
        return [source.path]
    found = []
    for folder in dict.fromkeys(file.parent for file in source.files):
        names = {name for name in list_folder(folder) if source.container != "peft" or name.startswith("adapter_model.")}
        name, _ = choose_weights(folder, names)
        if name is not None and is_index(name):
            found.append(folder / name)
    return found


def _target(path: Path, root: Path) -> Path:
    """Where a weights file or an index goes: its own place, under the name of a safetensors file."""
    match = _PICKLE_NAME.fullmatch(path.name)
    if match is None:
        return path.relative_to(root)
    stem = _OLD_STEM.sub("model", match["stem"], count=1) if _OLD_STEM.match(match["stem"]) else match["stem"]
    return path.relative_to(root).with_name(f"{stem}.safetensors{match['index'] or ''}")


def _shards_renamed(index: Path, weights: Mapping[Path, Path]) -> bool:
    return any(file.name != target.name for file, target in weights.items() if file.parent == index.parent)


def _refuse_clashes(root: Path, targets: Iterable[Path]) -> None:
    twice = [printable(str(path)) for path, count in Counter(targets).items() if count > 1]
    if twice:
        raise MalformedError(f"{root}: two files would be written as {twice[0]}", details=twice)


def _weights_bytes(source: TensorSource) -> int:
    """Bytes of the weights files as written: a pickle's tensors each on their own, under a header."""
    pickled = {file for file in source.files if source.container == "pickle" or _PICKLE_NAME.fullmatch(file.name)}
    total = sum(file.stat().st_size for file in source.files if file not in pickled)
    for file in pickled:
        tensors = {key: source.tensors[key] for key, path in source.file_of.items() if path == file}
        payload = sum(tensor.nbytes for tensor in tensors.values())
        entries = {key: (tensor.dtype, tensor.shape, payload, payload) for key, tensor in tensors.items()}
        total += payload + len(render_header(entries, CONVERTED))
    return total


def _other_files(root: Path, opened: Collection[Path]) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Every file below `root` but the opened ones (weights and indexes): (copied, left out and why), relative to `root`, sorted.

    Raises UnsafeError (a link leaves the folder), MalformedError (no regular file, a link to nothing or in a circle); all at once.
    """
    homes = {root: "", **{path.parent: path.name for path in sorted(opened, reverse=True)}}  # folder → what was read of it
    copies: list[Path] = []
    left_out: list[tuple[Path, str]] = []
    unsafe: list[str] = []
    wrong: list[str] = []
    for folder, names, problems in _walk(root, root, ()):
        unsafe += problems[0]
        wrong += problems[1]
        kept = []
        for name in names:
            path = folder / name
            if path in opened:
                continue
            reason = _stale(path.relative_to(root), homes.get(folder))
            if reason is None:
                kept.append(name)
            else:
                left_out.append((path.relative_to(root), reason))
        refused = member_problems(folder, kept, root)
        unsafe += refused[0]
        wrong += refused[1]
        copies.extend(folder.relative_to(root) / name for name in kept)
    if unsafe:
        raise UnsafeError(f"{root}: {unsafe[0]}", details=unsafe + wrong)
    if wrong:
        raise MalformedError(f"{root}: {wrong[0]}", details=wrong)
    return sorted(copies), sorted(left_out)


def _walk(folder: Path, root: Path, above: tuple[str, ...]) -> Iterator[tuple[Path, list[str], tuple[list[str], list[str]]]]:
    """(folder, its files, problems of its sub-folders: unsafe and wrong), sorted; links to folders inside `root` are followed."""
    above = (*above, os.path.realpath(folder))
    files, folders, unsafe, wrong = [], [], [], []
    for name in sorted(list_folder(folder)):
        path = folder / name
        shown = printable(str(path.relative_to(root)))
        if not path.is_dir():
            files.append(name)
        elif name in SKIPPED:
            continue
        elif leaves_folder(path, root):
            unsafe.append(f"{shown} is a link that leaves the folder")
        elif os.path.realpath(path) in above:
            wrong.append(f"{shown} is a link to a folder it lies in")
        else:
            folders.append(path)
    yield folder, files, (unsafe, wrong)
    for path in folders:
        yield from _walk(path, root, above)


def _stale(path: Path, read: str | None) -> str | None:
    """Why a file would hold old weights beside changed ones; None when it does not.

    path: relative to the model's folder; read: the weights file that was opened in the same folder, "" for a model's folder where
    only its sub-folders have some, None anywhere else.
    """
    suffix, name = path.suffix.lower(), path.name.lower()
    if suffix in _FORMATS:
        return f"the unchanged weights in another format ({_FORMATS[suffix]})"
    if name.startswith("openvino_") and suffix in (".bin", ".xml"):
        return "the unchanged weights in another format (OpenVINO)"
    if (suffix not in _WEIGHTS and not is_index(name)) or name in _NO_WEIGHTS:
        return None
    if _EXPORTS.intersection(path.parts[:-1]):
        return "the unchanged weights in another form"
    if read is None:
        return None
    return f"unchanged weights: {printable(read)} beside it was read" if read else "unchanged weights beside the model, no part of it"

"""Tensors in torch pickles (.pt, .bin, .ckpt), read without executing them and without loading them.

    zip form:    <stem>/data.pkl, <stem>/data/<key> one stored (uncompressed) record a storage
    legacy form: magic, version, system pickles; the object; the storage keys; then count (8 bytes) ++ bytes of each storage

`unpickle` gives descriptions; here they are bound to the byte ranges of the file they lie in. Invariant: a tensor is
refused before anything of its size is allocated unless its bytes are in the file, once each: compressed records, views
that repeat values or leave their storage, and tensors without storage are refused by name.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratools.errors import MalformedError, UnsafeError, UnsupportedError
from loratools.report import Finding
from loratools.tensors.dtypes import DTYPES
from loratools.tensors.header import open_bytes, printable
from loratools.tensors.lazy import ByteFile, ComputedTensor, LazyTensor, StoredTensor, tensor_from_bytes
from loratools.tensors.unpickle import Refused, StorageRef, Stream, TensorRef, run, scan

MAX_PICKLE = 1 << 26  # bytes of instructions; the tensors' values are not among them
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_MAX_DEPTH = 32


@dataclass(frozen=True)
class PickleContent:
    """The tensors of a state dict, findings for what was left out, and the bytes of all storages, each counted once."""

    tensors: dict[str, LazyTensor]
    warnings: list[Finding] = field(default_factory=list)
    nbytes: int = 0


def open_pickle(path: Path | str) -> dict[str, LazyTensor]:
    """The tensors of a torch pickle by name. Raises UnsafeError, MalformedError, UnsupportedError; never executes it."""
    return read_pickle(path).tensors


def read_pickle(path: Path | str) -> PickleContent:
    """A state dict: the inner one of {"state_dict": …}, nested dicts joined by dots. Raises like `open_pickle`."""
    path = Path(path)
    container, tree = _load(path)
    if not isinstance(tree, dict):
        raise UnsupportedError(f"{path}: expected a dict of tensors, found {_kind(tree)}")
    walk = _Flattened(path)
    inner = tree.get("state_dict")
    if isinstance(inner, dict):
        walk.extras += [str(key) for key in tree if key != "state_dict"]
        walk.take(inner, "")
    else:
        walk.take(tree, "")
    tensors: dict[str, LazyTensor] = {}
    for name, ref in walk.refs.items():
        try:
            tensors[name] = container.bind(ref)
        except MalformedError as error:
            walk.problems.append(f"{printable(name)}: {error.message}")
    if walk.problems:
        raise MalformedError(f"{path}: {walk.problems[0]}", details=walk.problems)
    warnings = []
    if walk.extras:
        names = ", ".join(printable(name) for name in walk.extras[:10])
        warnings.append(Finding("warning", "no-tensor", None, f"left out of the pickle what is no tensor ({len(walk.extras)}): {names}"))
    used = {ref.storage.key: ref.storage for ref in walk.refs.values()}
    return PickleContent(tensors, warnings, sum(_nbytes(storage) for storage in used.values()))


def read_tree(path: Path | str) -> Any:
    """The pickled object as it is, dicts, lists and tuples with LazyTensor leaves (optimizer and scheduler states)."""
    container, tree = _load(Path(path))
    return _Bound(container, Path(path)).copy(tree, "", 0)


def scan_pickle(path: Path | str, extra: Iterable[str] = ()) -> None:
    """Refuse a torch pickle (either form, or a bare one) that names a global which is neither known nor in `extra`."""
    path = Path(path)
    file, size = open_bytes(path)
    if file.read(0, min(4, size)) == b"PK\x03\x04":
        scan(_ZipContainer(path, file, size).pickle(), str(path), extra)
        return
    stream = _Clamped(file, size)
    while stream.tell() < size and file.read(stream.tell(), 1) == b"\x80":
        scan(stream, str(path), extra)


def _load(path: Path) -> tuple[_Container, Any]:
    file, size = open_bytes(path)
    if file.read(0, min(4, size)) == b"PK\x03\x04":
        archive = _ZipContainer(path, file, size)
        scan(archive.pickle(), str(path))
        return archive, run(archive.pickle(), str(path))[0]
    return _load_legacy(path, file, size)


class _Flattened:
    """Tensors of a nested dict by their joined names; every container is entered once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.refs: dict[str, TensorRef] = {}
        self.extras: list[str] = []
        self.problems: list[str] = []
        self.entered: set[int] = set()

    def take(self, tree: dict[Any, Any], prefix: str, depth: int = 0) -> None:
        self.entered.add(id(tree))
        for key, value in tree.items():
            if not isinstance(key, str):
                self.problems.append(f"{printable(prefix)}{printable(str(key)[:40])}: the key is no text but {_kind(key)}")
                continue
            name = prefix + key
            if isinstance(value, TensorRef):
                if name in self.refs:
                    self.problems.append(f"{printable(name)}: two tensors have this name")
                self.refs[name] = value
            elif isinstance(value, dict):
                if id(value) in self.entered or depth > _MAX_DEPTH:
                    self.problems.append(f"{printable(name)}: refers back to itself, stands twice or is nested too deeply")
                else:
                    self.take(value, name + ".", depth + 1)
            elif isinstance(value, str | int | float | bytes | None):
                self.extras.append(name)
            else:
                self.problems.append(f"{printable(name)}: expected a tensor, found {_kind(value)}")


def _kind(value: Any) -> str:
    if isinstance(value, Refused):
        return value.reason
    names = {dict: "a dict", list: "a list", tuple: "a tuple", TensorRef: "a tensor", int: "a number", StorageRef: "a storage"}
    return names.get(type(value), f"a {type(value).__name__.lstrip('_')}")


class _Bound:
    """A copy of a tree with lazy tensors in place of their descriptions; what stands twice is copied once."""

    def __init__(self, container: _Container, path: Path) -> None:
        self.container, self.path = container, path
        self.copies: dict[int, Any] = {}

    def copy(self, value: Any, name: str, depth: int) -> Any:
        if isinstance(value, TensorRef):
            return self.container.bind(value)
        if isinstance(value, str | int | float | bytes | None):
            return value
        if not isinstance(value, dict | list | tuple):
            raise UnsupportedError(f"{self.path}: {printable(name)}: {_kind(value)}")
        if id(value) not in self.copies:
            self.copies[id(value)] = None  # until it is complete: met again inside itself
            if depth > _MAX_DEPTH:
                raise MalformedError(f"{self.path}: {printable(name)}: nested too deeply")
            if isinstance(value, dict):
                copied: Any = {key: self.copy(item, f"{name}.{key}", depth + 1) for key, item in value.items()}
            else:
                copied = type(value)(self.copy(item, name, depth + 1) for item in value)
            self.copies[id(value)] = copied
        elif self.copies[id(value)] is None:
            raise MalformedError(f"{self.path}: {printable(name)}: refers back to itself")
        return self.copies[id(value)]


def _nbytes(storage: StorageRef) -> int:
    return storage.numel * DTYPES[storage.dtype][0] // 8


class _Container:
    """Where the storages of a pickle lie."""

    file: ByteFile

    def locate(self, storage: StorageRef) -> int:
        """The offset of a storage in the file, its whole size checked. Raises MalformedError."""
        raise NotImplementedError

    def bind(self, ref: TensorRef) -> LazyTensor:
        """The tensor over its bytes in the file. Raises MalformedError for a view that is not what it claims."""
        start = self.locate(ref.storage)
        size = DTYPES[ref.dtype][0] // 8
        room = _nbytes(ref.storage) // size
        count, last, contiguous = _extent(ref)
        if count and (ref.offset + last >= room or count > room):
            raise MalformedError(f"the view {list(ref.shape)} with strides {list(ref.stride)} leaves its storage of {room} elements")
        if any(stride == 0 and length > 1 for stride, length in zip(ref.stride, ref.shape, strict=True)) and count:
            raise MalformedError(f"the view {list(ref.shape)} repeats values (stride 0): it is no stored tensor")
        offset = start + ref.offset * size
        if contiguous:
            return StoredTensor(self.file, offset, ref.dtype, ref.shape)
        span, file, dtype = last + 1, self.file, ref.dtype
        shape, stride = ref.shape, ref.stride
        return ComputedTensor(
            dtype, shape, lambda: tensor_from_bytes(file.read(offset, span * size), dtype, (span,)).as_strided(shape, stride).contiguous()
        )


def _extent(ref: TensorRef) -> tuple[int, int, bool]:
    """(elements, index of the last one from the offset, whether they lie row-major without gaps)."""
    count, last, contiguous = 1, 0, True
    for length, stride in zip(reversed(ref.shape), reversed(ref.stride), strict=True):
        if length != 1 and stride != count:
            contiguous = False
        last += max(length - 1, 0) * stride
        count *= length
    return count, last, contiguous or count == 0


class _ZipContainer(_Container):
    """The zip form; only data.pkl and the records it refers to are ever looked at, and never extracted."""

    def __init__(self, path: Path, file: ByteFile, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, OSError, OverflowError) as error:
            raise MalformedError(f"{path}: broken or cut zip archive: {error}", fix="download or copy the file again") from error
        self.members: dict[str, zipfile.ZipInfo] = {}
        self.doubled: set[str] = set()
        for member in members:
            if member.filename in self.members:
                self.doubled.add(member.filename)
            self.members[member.filename] = member
        self._check_names()
        self.stem = self._stem()

    def _check_names(self) -> None:
        parts = {name: name.replace("\\", "/").split("/") for name in self.members}
        bad = [printable(name) for name, pieces in parts.items() if ".." in pieces or pieces[0] == "" or pieces[0].endswith(":")]
        if bad:
            raise UnsafeError(f"{self.path}: a member of the archive would leave its folder: {bad[0]}", details=bad)

    def _stem(self) -> str:
        stems = [name.removesuffix("data.pkl") for name in self.members if name == "data.pkl" or name.endswith("/data.pkl")]
        stems = [stem for stem in stems if stem.count("/") <= 1]
        if len(stems) != 1:
            raise MalformedError(f"{self.path}: a zip archive, but no torch file: {len(stems)} members are named data.pkl")
        stem = stems[0]
        if stem + "constants.pkl" in self.members or any(name.startswith(stem + "code/") for name in self.members):
            raise UnsafeError(f"{self.path}: a TorchScript module holds code: refused", fix="save its state_dict() instead")
        if stem + "byteorder" in self.members and self._record(stem + "byteorder") != b"little":
            raise MalformedError(f"{self.path}: stored big-endian: not supported")
        return stem

    def pickle(self) -> Stream:
        size = self.members[self.stem + "data.pkl"].file_size
        if size > MAX_PICKLE:
            raise MalformedError(f"{self.path}: {size} bytes of pickle instructions, the limit is {MAX_PICKLE}")
        return io.BytesIO(self._record(self.stem + "data.pkl"))

    def _record(self, name: str) -> bytes:
        start, size = self._range(name)
        return self.file.read(start, size)

    def _range(self, name: str) -> tuple[int, int]:
        """Where the stored bytes of a member lie: after its local header, whose name and extra field have their own length."""
        member = self.members.get(name)
        if member is None:
            raise MalformedError(f"the record {printable(name)} is missing")
        if name in self.doubled:
            raise MalformedError(f"the record {printable(name)} stands twice in the archive")
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size or member.flag_bits & 1:
            raise MalformedError(f"the record {printable(name)} is compressed or encrypted; torch stores records as they are")
        if not 0 <= member.header_offset <= self.size - 30:
            raise MalformedError(f"the record {printable(name)} lies outside the file")
        local = self.file.read(member.header_offset, 30)
        start = member.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        if local[:4] != b"PK\x03\x04" or start + member.file_size > self.size:
            raise MalformedError(f"the record {printable(name)} is cut off or damaged")
        return start, member.file_size

    def locate(self, storage: StorageRef) -> int:
        start, size = self._range(f"{self.stem}data/{storage.key}")
        if size < _nbytes(storage):
            raise MalformedError(f"its record has {size} bytes, the storage needs {_nbytes(storage)}")
        return start


class _LegacyContainer(_Container):
    """The form before torch 1.6: storages one after the other behind the pickles."""

    def __init__(self, file: ByteFile, places: dict[str, tuple[int, int]]) -> None:
        self.file, self.places = file, places

    def locate(self, storage: StorageRef) -> int:
        if storage.key not in self.places:
            raise MalformedError(f"its storage {printable(storage.key)} is missing")
        start, size = self.places[storage.key]
        if size < _nbytes(storage):
            raise MalformedError(f"its storage has {size} bytes, the tensor needs {_nbytes(storage)}")
        return start


class _Clamped:
    """The pickles at the head of a file, read without ever asking for more than there is."""

    def __init__(self, file: ByteFile, size: int) -> None:
        self.raw = io.BytesIO(file.read(0, min(size, MAX_PICKLE)))

    def read(self, size: int, /) -> bytes:
        return self.raw.read(size)

    def readline(self) -> bytes:
        return self.raw.readline()

    def tell(self) -> int:
        return self.raw.tell()


def _load_legacy(path: Path, file: ByteFile, size: int) -> tuple[_Container, Any]:
    stream = _Clamped(file, size)
    parts: list[Any] = []
    storages: dict[str, StorageRef] = {}
    for number in range(5):
        start = stream.tell()
        scan(stream, str(path))
        stream.raw.seek(start)
        value, found = run(stream, str(path))
        parts.append(value)
        storages.update(found)
        if number == 0 and parts[0] != _MAGIC:
            raise UnsafeError(f"{path}: a bare pickle, not a file of torch.save: refused", fix="save the tensors as safetensors")
    _, protocol, system, tree, keys = parts
    if protocol != _PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise MalformedError(f"{path}: legacy torch file of an unknown protocol or byte order")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise MalformedError(f"{path}: legacy torch file without its list of storages")
    return _LegacyContainer(file, _legacy_places(path, file, size, stream.tell(), keys, storages)), tree


def _legacy_places(
    path: Path, file: ByteFile, size: int, position: int, keys: list[str], storages: dict[str, StorageRef]
) -> dict[str, tuple[int, int]]:
    """key → (offset, bytes) of the storages that follow the pickles, in the order of `keys`."""
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        storage = storages.get(key)
        if storage is None:
            raise MalformedError(f"{path}: the storage {printable(key)} belongs to no tensor")
        nbytes = _nbytes(storage)
        if position + 8 + nbytes > size:
            behind = position + 8 + nbytes - size
            raise MalformedError(f"{path}: truncated: the storage {printable(key)} ends {behind} bytes behind the file")
        if int.from_bytes(file.read(position, 8), "little") != storage.numel:
            raise MalformedError(f"{path}: the storage {printable(key)} has another size than its tensor says")
        places[key] = (position + 8, nbytes)
        position += 8 + nbytes
    return places

"""The header of a safetensors file: strict to read, byte for byte the library's form to write.

    file = n (8 bytes, little-endian) ++ JSON (n bytes) ++ payload
    JSON = {"__metadata__": {str: str}?, name: {"dtype", "shape", "data_offsets": [start, end]}}

Source: the safetensors format (huggingface/safetensors, 0.8). Python's `json` is laxer than the library's parser
(duplicate keys, NaN, `true` for 1, lone surrogates, -0), so each of these is looked for here. Invariant: a header this
module accepts describes the payload completely, every byte of it once; whatever safetensors refuses is refused.
Pure Python, no torch; linear in the number of tensors.
"""

from __future__ import annotations

import gc
import json
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from loratools.errors import InputError, MalformedError, counted
from loratools.report import Finding
from loratools.tensors.dtypes import DTYPES
from loratools.tensors.lazy import ByteFile

MAX_HEADER = 100_000_000  # bytes; the library's own limit
Entry = tuple[str, tuple[int, ...], int, int]  # dtype, shape, start, end: what `render_header` writes of a tensor
_LIMIT = (1 << 64) - 1  # every number of a header is an unsigned 64-bit integer
_TORCH_LIMIT = (1 << 62) - 1  # a dimension above it opens nowhere but in the header
_METADATA = "__metadata__"

# first bytes → what the file is instead; looked at only when it is no safetensors file
_MAGICS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git-LFS pointer: the file itself was never downloaded; run `git lfs pull`"),
    (b"PK\x03\x04", "a zip archive (torch.save writes one): a pickle under another name, or not a tensor file"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"GGUF", "a GGUF file: not supported, use the safetensors file it was made from"),
    (b"\x1f\x8b", "gzip-compressed: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"\x89PNG", "a PNG image"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x03", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"<", "HTML or XML: a web page was saved in place of the file"),
    (b"{", "JSON text without the 8-byte header length: a stripped header, or an index or configuration file"),
    (b"[", "JSON text"),
)


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a header. `start` and `end` count bytes from the beginning of the payload."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A valid header; `tensors` and `metadata` in the header's own order, the payload starts at byte `data_start`."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    warnings: list[Finding] = field(default_factory=list)


def printable(text: str) -> str:
    """A name from a file as it may be shown: control characters, line ends and surrogates escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def identify(head: bytes) -> str | None:
    """What a file that is not safetensors is, by its first bytes; None when they say nothing."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    return next((words for magic, words in _MAGICS if head.startswith(magic) or text.startswith(magic)), None)


def check_regular(path: Path) -> None:
    """Refuse what cannot be read as a file (folder, FIFO, device, socket) without opening it."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error
    if stat.S_ISREG(mode):
        return
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"))
    kind = next((words for test, words in kinds if test(mode)), "a device")
    raise MalformedError(f"{path}: expected a file, found {kind}")


def open_bytes(path: Path) -> tuple[ByteFile, int]:
    """A regular file opened for positional reads, and its size. Raises InputError."""
    check_regular(path)
    try:
        return ByteFile(path), path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def read_header(path: Path | str) -> Header:
    """The header of the safetensors file at `path`. Raises MalformedError with every problem, InputError if unreadable."""
    return parse_header(*open_bytes(Path(path)))


def parse_header(file: ByteFile, size: int) -> Header:
    """The header of an open file of `size` bytes. Raises MalformedError that lists every problem found."""
    if size < 8:
        _refuse_file(file, size, f"{size} bytes, but the header length alone takes 8")
    length = int.from_bytes(file.read(0, 8), "little")
    if length == 0:
        _refuse_file(file, size, "header length 0")
    if length > MAX_HEADER:
        _refuse_file(file, size, f"header length {length} is above the limit of {MAX_HEADER} (file: {size} bytes)")
    if length > size - 8:
        _refuse_file(file, size, f"header length {length}, but only {size - 8} bytes follow it")
    with _collector_off():
        return _Parser(str(file.path), file.read(8, length), size).parse()


@contextmanager
def _collector_off() -> Iterator[None]:
    """No garbage collection for a while: it would walk all tensors again and again while they pile up."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _refuse_file(file: ByteFile, size: int, problem: str) -> NoReturn:
    what = identify(file.read(0, min(size, 64)))
    if size == 0:
        what, problem = None, "the file is empty (0 bytes)"
    raise MalformedError(
        f"{file.path}: not a safetensors file: {problem}",
        details=[f"it is {what}"] if what else [],
        fix=None if what else "download or copy the file again",
    )


class Repeated(dict[str, Any]):
    """A JSON object in which keys stand more than once; the last value is the dict's, `duplicates` names them."""

    duplicates: list[str]


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    repeated = Repeated(value)
    seen: set[str] = set()
    repeated.duplicates = [key for key, _ in pairs if key in seen or seen.add(key)]  # type: ignore[func-returns-value]
    return repeated


def duplicates_of(value: dict[str, Any]) -> list[str]:
    """The keys that stand more than once in an object read by `parse_json`."""
    return list(value.duplicates) if isinstance(value, Repeated) else []


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")


def _integer(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)  # serde reads -0 as a float, so it is no dimension


_DECODER = json.JSONDecoder(object_pairs_hook=_json_object, parse_constant=_refuse_constant)
_CAREFUL_DECODER = json.JSONDecoder(object_pairs_hook=_json_object, parse_constant=_refuse_constant, parse_int=_integer)
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(raw: bytes, where: str, offset: int = 0) -> Any:
    """Strict JSON: no NaN, no lone surrogates, nothing after the value. Raises MalformedError.

    An object with a key twice comes as a `Repeated` dict: it is for the caller to say whether that is an error.
    `where` is named in the error, `offset` is where `raw` starts in its file.
    """
    try:
        text = raw.decode("utf-8")
        value = (_CAREFUL_DECODER if b"-0" in raw else _DECODER).decode(text)
    except UnicodeDecodeError as error:
        raise MalformedError(f"{where}: not UTF-8 at byte {offset + error.start}") from error
    except json.JSONDecodeError as error:
        position = offset + len(text[: error.pos].encode())
        raise MalformedError(f"{where}: not JSON at byte {position}: {error.msg}") from error
    except RecursionError:
        raise MalformedError(f"{where}: JSON nested too deeply") from None
    except ValueError as error:
        raise MalformedError(f"{where}: not JSON: {error}") from error
    if _SURROGATE_ESCAPE.search(raw):
        for string in _strings(value):
            if any("\ud800" <= char <= "\udfff" for char in string):
                raise MalformedError(f"{where}: lone surrogate in '{printable(string)}': not text")
    return value


def _strings(value: Any) -> Iterator[str]:
    """Every string anywhere in a parsed value, without recursion."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


class _Parser:
    """One pass over a parsed header that collects every problem before it refuses."""

    def __init__(self, path: str, raw: bytes, size: int) -> None:
        self.path, self.raw, self.size = path, raw, size
        self.data_start = 8 + len(raw)
        self.problems: list[str] = []
        self.warnings: list[Finding] = []
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}

    def parse(self) -> Header:
        top = parse_json(self.raw, f"{self.path}: header", 8)
        if not isinstance(top, dict):
            raise MalformedError(f"{self.path}: the header is JSON but no object")
        duplicates = duplicates_of(top)
        self.problems += [f"{printable(name)}: stands twice in the header" for name in duplicates]
        for name, value in top.items():
            if name == _METADATA:
                self._read_metadata(value)
                continue
            info = self._read_tensor(name, value)
            if info is not None:
                self.tensors[name] = info
        if not self.problems:
            self._check_coverage()
        if self.problems:
            raise MalformedError(f"{self.path}: invalid safetensors header: {self.problems[0]}", details=self.problems)
        self._warn_form()
        return Header(self.tensors, self.metadata, self.data_start, self.warnings)

    def _warn(self, code: str, message: str, site: str | None = None) -> None:
        self.warnings.append(Finding("warning", code, site, message))

    def _read_metadata(self, value: Any) -> None:
        if value is None:
            return
        if not isinstance(value, dict):
            self.problems.append(f"{_METADATA}: expected an object of strings, found {type(value).__name__}")
            return
        for key in duplicates_of(value):
            self._warn("duplicate-metadata", f"metadata key {printable(key)} stands twice; the last value is used", key)
        for key, text in value.items():
            if not isinstance(text, str):
                self.problems.append(f"{_METADATA}.{printable(key)}: not a string; store numbers and structures as JSON text")
            else:
                self.metadata[key] = text

    def _read_tensor(self, name: str, value: Any) -> TensorInfo | None:
        if not isinstance(value, dict):
            self.problems.append(f"{printable(name)}: expected an object with dtype, shape and data_offsets")
            return None
        problem = _field_problem(value)
        if problem:
            self.problems.append(f"{printable(name)}: {problem}")
            return None
        dtype, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        problem = _size_problem(dtype, shape, start, end)
        if problem:
            self.problems.append(f"{printable(name)}: {problem}")
        if len(value) > 3:
            extra = ", ".join(printable(key) for key in value if key not in ("dtype", "shape", "data_offsets"))
            self._warn("unknown-field", f"{printable(name)}: unknown header fields ignored: {extra}", name)
        if max(shape, default=0) > _TORCH_LIMIT:
            self._warn("huge-dimension", f"{printable(name)}: shape {list(shape)} is empty but has a dimension no library can hold", name)
        return TensorInfo(dtype, shape, start, end)

    def _check_coverage(self) -> None:
        """Every payload byte belongs to exactly one tensor."""
        expected = 0
        for name, info in sorted(self.tensors.items(), key=lambda item: (item[1].start, item[1].end)):
            if info.start != expected:
                kind = "overlaps the tensor before it" if info.start < expected else "leaves a hole before it"
                self.problems.append(f"{printable(name)}: {kind}: starts at {info.start}, expected {expected}")
            expected = info.end
        payload = self.size - self.data_start
        if payload < expected:
            missing = expected - payload
            told = f"truncated, {counted(missing, 'byte')} missing: the header describes {expected}, the file holds {payload}"
            self.problems.append(told)
        elif payload > expected:
            self.problems.append(f"{payload - expected} bytes too many after the last tensor")

    def _warn_form(self) -> None:
        if self.raw[:1] != b"{":
            self._warn("leading-space", "white space before the header's opening brace")
        if self.data_start % 8:
            self._warn("unaligned-header", f"the payload starts at byte {self.data_start}, not at a multiple of 8")
        odd = [name for name, info in self.tensors.items() if info.start * 8 % DTYPES[info.dtype][0]]
        if odd:
            message = f"{counted(len(odd), 'tensor')} not at a multiple of the element size, first {printable(odd[0])}"
            self._warn("misaligned", message, odd[0])


def _field_problem(fields: dict[str, Any]) -> str | None:
    """What is wrong with the fields of one entry, None when all three have their type."""
    if isinstance(fields, Repeated):
        return f"field {printable(fields.duplicates[0])} stands twice"
    for key in ("dtype", "shape", "data_offsets"):
        if key not in fields:
            return f"{key} is missing"
    dtype = fields["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"unknown dtype '{printable(str(dtype)[:40])}'"
    for key in ("shape", "data_offsets"):
        numbers = fields[key]
        if type(numbers) is not list:
            return f"{key} is not a list of numbers"
        for number in numbers:
            if type(number) is not int or not 0 <= number <= _LIMIT:  # bool is no int here
                return f"{key} holds '{printable(str(number)[:40])}', expected an integer from 0 to 2^64-1"
    if len(fields["data_offsets"]) != 2:
        return f"data_offsets has {len(fields['data_offsets'])} numbers, expected 2"
    return None


def _size_problem(dtype: str, shape: tuple[int, ...], start: int, end: int) -> str | None:
    """What is wrong with the size of one entry: bytes = elements x bits / 8, all within 64 bits."""
    if start > end:
        return f"data_offsets [{start}, {end}] run backwards"
    elements = 1
    for dimension in shape:
        elements *= dimension
        if elements > _LIMIT:
            return f"shape {list(shape)} overflows 64 bits"
    bits = elements * DTYPES[dtype][0]
    if bits > _LIMIT:
        return f"shape {list(shape)} of {dtype} overflows 64 bits"
    if bits % 8:
        return f"{elements} elements of {dtype} do not fill whole bytes"
    if bits // 8 != end - start:
        return f"{dtype} {list(shape)} takes {bits // 8} bytes, data_offsets give {end - start}"
    return None


def render_header(entries: Mapping[str, Entry], metadata: Mapping[str, str], *, keep_empty: bool = False) -> bytes:
    """Length and JSON of a header as the safetensors library writes it, padded with spaces to a multiple of 8.

    `entries` in the order to write. Empty metadata leave no trace unless `keep_empty` (what the library does for {}
    in place of None). Raises InputError for text that is no Unicode.
    """
    quote = json.encoder.encode_basestring
    parts: list[str] = []
    if metadata or keep_empty:
        inner = ",".join(f"{quote(key)}:{quote(value)}" for key, value in metadata.items())
        parts.append(f'"{_METADATA}":{{{inner}}}')
    for name, (dtype, shape, start, end) in entries.items():
        dims = ",".join(map(str, shape))
        parts.append(f'{quote(name)}:{{"dtype":"{dtype}","shape":[{dims}],"data_offsets":[{start},{end}]}}')
    try:
        raw = ("{" + ",".join(parts) + "}").encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"'{printable(error.object[error.start : error.end])}' in a name or a metadata value is not text") from error
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw

"""What an input is, once opened: names, shapes, dtypes and lazy tensors, whatever holds them.

`open_payload` opens one weights file by its content, never by its suffix. Invariant: opening reads headers only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratools.errors import MalformedError
from loratools.report import Finding
from loratools.tensors.header import MAX_HEADER, Repeated, open_bytes, parse_header, parse_json, printable
from loratools.tensors.lazy import ByteFile, LazyTensor, StoredTensor

_LEGACY_TORCH = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # pickle of torch's magic number


@dataclass
class TensorSource:
    """An opened input.

    `container`: safetensors | peft | diffusers | pickle | shards. `tensors` in the order of the file's offsets.
    `config`: the adapter_config.json of a PEFT folder ({subfolder: config} when there is one a component).
    `files`: the weights files opened; `file_of` says which of them holds a tensor. `nbytes`: payload, shared storage
    counted once. `index`: the parsed index of shards.
    """

    path: Path
    container: str
    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    files: list[Path] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    nbytes: int = 0
    file_of: dict[str, Path] = field(default_factory=dict)
    index: dict[str, Any] | None = None

    def add(self, part: TensorSource, prefix: str = "") -> None:
        """Take in the tensors of another source under `prefix`; of the metadata only what agrees stays."""
        self.tensors.update({prefix + name: tensor for name, tensor in part.tensors.items()})
        self.file_of.update({prefix + name: path for name, path in part.file_of.items()})
        first = not self.files
        self.metadata = dict(part.metadata) if first else {k: v for k, v in self.metadata.items() if part.metadata.get(k) == v}
        self.files += part.files
        self.nbytes += part.nbytes
        self.warnings += [Finding(w.severity, w.code, prefix + w.site if w.site else w.site, w.message) for w in part.warnings]


def open_payload(path: Path) -> TensorSource:
    """One weights file: safetensors or a torch pickle, told apart by the content. Raises MalformedError."""
    file, size = open_bytes(path)
    head = file.read(0, min(size, 16))
    length = int.from_bytes(head[:8], "little")
    plausible = length <= size - 8 and head[8:9] in (b"{", b" ", b"\t", b"\n", b"\r")  # a length may look like a pickle's first bytes
    if _is_pickle(head) and not plausible:
        return _open_pickle(path)
    return _open_safetensors(path, file, size)


def _is_pickle(head: bytes) -> bool:
    """Zip (torch.save), torch's legacy magic, or a bare pickle, which is refused by name where pickles are read."""
    return head.startswith((b"PK\x03\x04", _LEGACY_TORCH)) or (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"))


def _open_safetensors(path: Path, file: ByteFile, size: int) -> TensorSource:
    header = parse_header(file, size)
    ordered = sorted(header.tensors.items(), key=lambda item: (item[1].start, item[1].end))
    tensors: dict[str, LazyTensor] = {
        name: StoredTensor(file, header.data_start + info.start, info.dtype, info.shape) for name, info in ordered
    }
    source = TensorSource(path, "safetensors", tensors, dict(header.metadata), files=[path], warnings=list(header.warnings))
    source.nbytes, source.file_of = size - header.data_start, dict.fromkeys(tensors, path)
    return source


def _open_pickle(path: Path) -> TensorSource:
    from loratools.tensors.pickles import read_pickle  # only where there is one: inspect must stay instant

    content = read_pickle(path)
    source = TensorSource(path, "pickle", content.tensors, files=[path], warnings=list(content.warnings))
    source.nbytes, source.file_of = content.nbytes, dict.fromkeys(content.tensors, path)
    return source


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that must be one object, without a key twice anywhere. Raises MalformedError."""
    file, size = open_bytes(path)
    if size > MAX_HEADER:
        raise MalformedError(f"{path}: {size} bytes of JSON are above the limit of {MAX_HEADER}")
    value = parse_json(file.read(0, size), str(path))
    if not isinstance(value, dict):
        raise MalformedError(f"{path}: expected a JSON object, found {type(value).__name__}")
    twice = _repeated_keys(value)
    if twice:
        raise MalformedError(f"{path}: keys that stand twice: {', '.join(twice[:5])}", details=twice)
    return value


def _repeated_keys(value: Any) -> list[str]:
    stack, found = [value], []
    while stack:
        item = stack.pop()
        if isinstance(item, Repeated):
            found += [printable(key) for key in item.duplicates]
        if isinstance(item, dict | list):
            stack.extend(item.values() if isinstance(item, dict) else item)
    return found

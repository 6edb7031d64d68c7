"""The hashes that adapter files carry and are found by, all streamed.

    sshs_model_hash  = sha256(everything after the header)
    sshs_legacy_hash = sha256(blob[0x100000 : 0x110000])[:8],  blob = the file with only its `ss_*` metadata
                       (64 KiB at 1 MiB, an old web UI's habit; a blob under 1 MiB gives e3b0c442, sha256 of nothing)

Source: sd-scripts, train_util.py, precalculate_safetensors_hashes. The legacy hash depends on the metadata only through
the length of the header, so the blob is never built. Invariant: memory is one chunk. No torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from loratools.report import Finding
from loratools.tensors.header import Entry, Header, open_bytes, parse_header, printable, render_header
from loratools.tensors.lazy import CHUNK, ByteFile

LEGACY_WINDOW = (0x100000, 0x110000)
MODEL_HASH, LEGACY_HASH = "sshs_model_hash", "sshs_legacy_hash"
MODELSPEC_HASH = "modelspec.hash_sha256"  # 0x + sha256 of everything after the header (Stability's modelspec)


def sha256_file(path: Path | str) -> str:
    """Hex sha256 of a whole file. Raises InputError if it cannot be read."""
    file, size = open_bytes(Path(path))
    return digest_range(file, 0, size)


def sha256_header(path: Path | str) -> str:
    """Hex sha256 of the header of a safetensors file, its length included. Raises MalformedError."""
    file, size = open_bytes(Path(path))
    return digest_range(file, 0, parse_header(file, size).data_start)


def sshs_model_hash(path: Path | str) -> str:
    """Hex sha256 of the payload of a safetensors file. Raises MalformedError."""
    file, size = open_bytes(Path(path))
    return digest_range(file, parse_header(file, size).data_start, size)


def sshs_legacy_hash(path: Path | str) -> str:
    """The 8 hex digits of the legacy hash of a safetensors file. Raises MalformedError."""
    file, size = open_bytes(Path(path))
    return legacy_of_file(file, (header := parse_header(file, size)), size, header.metadata)


def legacy_hash(entries: Mapping[str, Entry], metadata: Mapping[str, str], read_payload: Callable[[int, int], bytes]) -> str:
    """The legacy hash of a file described by its entries and metadata; `read_payload(start, end)` clips at the end."""
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    header = render_header(entries, training, keep_empty=True)
    first, last = LEGACY_WINDOW
    window = header[first:last]  # a header past 1 MiB (a tag list) reaches into the window itself
    window += read_payload(max(0, first - len(header)), max(0, last - len(header)))
    return hashlib.sha256(window).hexdigest()[:8]


def stored_hash_problems(path: Path | str, metadata: Mapping[str, str]) -> list[Finding]:
    """A finding for each hash in `metadata` that is not the file's own: bytes changed after it was taken.

    An error for those of sd-scripts; a warning for modelspec's, which some writers take of something else.
    """
    if not metadata.keys() & {MODEL_HASH, LEGACY_HASH, MODELSPEC_HASH}:
        return []
    file, size = open_bytes(Path(path))
    header = parse_header(file, size)
    truth: dict[str, Callable[[], str]] = {
        MODEL_HASH: lambda: digest_range(file, header.data_start, size),
        LEGACY_HASH: lambda: legacy_of_file(file, header, size, metadata),
        MODELSPEC_HASH: lambda: "0x" + digest_range(file, header.data_start, size),
    }
    findings = []
    for key in sorted(truth.keys() & metadata.keys()):
        if metadata[key] != (value := truth[key]()):
            stored = printable(metadata[key][:64])
            message = f"stored {key} {stored} is not the file's: {value}; it was copied, or taken before the last change"
            findings.append(Finding("warning" if key == MODELSPEC_HASH else "error", "stale-hash", key, message))
    return findings


def digest_range(file: ByteFile, start: int, end: int) -> str:
    """Hex sha256 of the bytes [start, end) of an open file."""
    digest = hashlib.sha256()
    for offset in range(start, end, CHUNK):
        digest.update(file.read(offset, min(CHUNK, end - offset)))
    return digest.hexdigest()


def legacy_of_file(file: ByteFile, header: Header, size: int, metadata: Mapping[str, str]) -> str:
    """The legacy hash of an open file under the given metadata."""

    def read_payload(start: int, end: int) -> bytes:
        begin, stop = (min(header.data_start + place, size) for place in (start, end))
        return file.read(begin, stop - begin)

    entries = {name: (info.dtype, info.shape, info.start, info.end) for name, info in header.tensors.items()}
    return legacy_hash(entries, metadata, read_payload)

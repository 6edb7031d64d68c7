"""One safetensors file in the making: reserved header, payload at fixed offsets, running hash, and bytes copied in the kernel.

    file = header (length known from the entries) ++ payload;  hashes in the header have a fixed length and are filled in last

Untouched bytes go from file to file by copy_file_range where no hash has to see them. POSIX_FADV_DONTNEED on a range just
written starts its write-back: the disk works while the next range is made, and the fsync at the end finds little to do.
Writes are cut to 256 KiB: whole chunks took up to twice the time (measured, ext4 on Linux 6.18, 2 GB in the page cache).
Invariant: the bytes do not depend on the way they took. No torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

from loratools.errors import LoraToolsError
from loratools.tensors.atomic import AtomicFile, WriteResult, write_errors
from loratools.tensors.hashes import LEGACY_HASH, MODEL_HASH, MODELSPEC_HASH, legacy_hash
from loratools.tensors.header import Entry, printable, render_header
from loratools.tensors.lazy import CHUNK, ByteFile, LazyTensor, StoredTensor

# header key of a hash → a value of its length, until the payload is known
STAMPS = {LEGACY_HASH: "0" * 8, MODEL_HASH: "0" * 64, MODELSPEC_HASH: "0x" + "0" * 64}
_COALESCE = 1 << 20  # bytes of small tensors gathered before they are written
_SLICE = 1 << 18  # bytes of one write
_WRITEBACK = 1 << 25  # bytes after which the disk is told to begin


class Payload:
    """A file that takes its tensors in any order; `seal` completes it under its temporary name.

    `entries` in the order of the file, `stamps` the keys of STAMPS to fill in. `digest`: also give the sha256 of the
    whole file, for which every byte must pass through this process.
    """

    def __init__(
        self, path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str], *, force: bool, stamps: Collection[str], digest: bool
    ) -> None:
        self.path, self.entries, self.stamps = path, entries, stamps
        self.metadata = {**metadata, **{key: blank for key, blank in STAMPS.items() if key in stamps}}
        self.header = render_header(entries, self.metadata)
        self.nbytes = len(self.header) + max((end for *_, end in entries.values()), default=0)
        self.file = AtomicFile(path, force=force, nbytes=self.nbytes)
        # of the payload alone when it goes into the header: a second pass for the whole file is not worth it
        self.digest = hashlib.sha256(b"" if stamps else self.header) if stamps or digest else None
        self.position = len(self.header)  # everything before it has gone through the digest
        self.in_order = True
        self.pending = bytearray(b"" if stamps else self.header)
        self.pending_at = self.position if stamps else 0
        self.started = 0  # everything before it is on its way to the disk

    def write(self, first: str, last: str, source: LazyTensor | Iterable[bytes | memoryview]) -> None:
        """The bytes of one tensor, or of a run of them that follow each other in the file, `first` to `last`."""
        start, end = self.entries[first][2], self.entries[last][3]
        offset = len(self.header) + start
        if self.digest is None and isinstance(source, StoredTensor) and source.nbytes == end - start >= _COALESCE:
            self._flush()
            copy_range(source.file, source.offset, source.nbytes, self.file, offset)
            self.pending_at = self.started = offset + source.nbytes
            return
        for piece in _checked_pieces(first, source.chunks() if isinstance(source, LazyTensor) else source, end - start):
            if self.digest is not None and self.in_order:
                self._hash(self.digest, offset, piece)
            self._put(offset, piece)
            offset += len(piece)

    def seal(self) -> WriteResult:
        """Payload and header complete, hashes known; the file still has its temporary name."""
        self._flush()
        if self.digest is None:
            return WriteResult(self.path, self.nbytes, None, (self.path,))
        if not self.stamps:
            whole = self.digest.hexdigest() if self.in_order else self._digest_from(0)
            return WriteResult(self.path, self.nbytes, whole, (self.path,))
        payload = self.digest.hexdigest() if self.in_order else self._digest_from(len(self.header))
        self.metadata.update(stamped(self.stamps, payload, lambda: legacy_hash(self.entries, self.metadata, self._read_payload)))
        self.header = render_header(self.entries, self.metadata)
        self.file.write_at(0, self.header)
        return WriteResult(self.path, self.nbytes, None, (self.path,))

    def _hash(self, digest: hashlib._Hash, offset: int, piece: bytes | memoryview) -> None:
        self.in_order = offset == self.position
        if self.in_order:
            digest.update(piece)
            self.position += len(piece)

    def _put(self, offset: int, piece: bytes | memoryview) -> None:
        if offset != self.pending_at + len(self.pending):
            self._flush()
            self.pending_at = offset
        if len(piece) >= _COALESCE:
            self._flush()
            self._write_out(offset, memoryview(piece))
            self.pending_at = offset + len(piece)
            return
        self.pending += piece
        if len(self.pending) >= _COALESCE:
            self._flush()

    def _flush(self) -> None:
        if self.pending:
            self._write_out(self.pending_at, memoryview(self.pending))
            self.pending_at += len(self.pending)
            self.pending = bytearray()

    def _write_out(self, offset: int, view: memoryview) -> None:
        for place in range(0, len(view), _SLICE):
            self.file.write_at(offset + place, view[place : place + _SLICE])
        end = offset + len(view)
        if not 0 <= end - self.started < _WRITEBACK:
            start_writeback(self.file, min(self.started, offset), end)
            self.started = end

    def _read_payload(self, start: int, end: int) -> bytes:
        return self.file.read_at(len(self.header) + start, end - start)

    def _digest_from(self, start: int) -> str:
        digest = hashlib.sha256()
        for offset in range(start, self.nbytes, CHUNK):
            digest.update(self.file.read_at(offset, min(CHUNK, self.nbytes - offset)))
        return digest.hexdigest()


def stamped(keys: Collection[str], payload: str, legacy: Callable[[], str]) -> dict[str, str]:
    """The values of the hash keys among `keys`. `payload`: hex sha256 of all bytes after the header."""
    values: dict[str, Callable[[], str]] = {LEGACY_HASH: legacy, MODEL_HASH: lambda: payload, MODELSPEC_HASH: lambda: "0x" + payload}
    return {key: value() for key, value in values.items() if key in keys}


def _checked_pieces(name: str, pieces: Iterable[bytes | memoryview], nbytes: int) -> Iterator[bytes | memoryview]:
    """The tensor's bytes, exactly `nbytes` of them. Raises LoraToolsError when it cannot be read or has another size."""
    total = 0
    try:
        for piece in pieces:
            total += len(piece)
            if total > nbytes:
                break
            yield piece
    except OSError as error:
        raise LoraToolsError(f"{printable(name)}: cannot read the tensor: {error.strerror or error}") from error
    if total != nbytes:
        raise LoraToolsError(f"{printable(name)}: declared {nbytes} bytes, the tensor gave another number (a defect in loratools)")


def copy_range(source: ByteFile, start: int, size: int, target: AtomicFile, offset: int) -> None:
    """`size` bytes of `source` from `start`, to `offset` of `target`: in the kernel as far as that goes, the rest through memory.

    Raises WriteError, MalformedError (the source became shorter), LoraToolsError (it cannot be read).
    """
    done = _copy_in_kernel(source.descriptor, start, size, target, offset)
    while done < size:
        try:
            piece = memoryview(source.read(start + done, min(CHUNK, size - done)))
        except OSError as error:
            raise LoraToolsError(f"{source.path}: cannot read: {error.strerror or error}") from error
        for place in range(0, len(piece), _SLICE):
            target.write_at(offset + done + place, piece[place : place + _SLICE])
        start_writeback(target, offset + done, offset + done + len(piece))
        done += len(piece)


def _copy_in_kernel(descriptor: int, start: int, size: int, target: AtomicFile, offset: int) -> int:
    """How many bytes the kernel copied. Whatever stops it (another file system, a full disk) is told by the copy through memory."""
    done = 0
    if not hasattr(os, "copy_file_range"):
        return done
    while done < size:
        try:
            copied = os.copy_file_range(descriptor, target.descriptor, min(_WRITEBACK, size - done), start + done, offset + done)
        except OSError:
            return done
        if not copied:
            return done
        start_writeback(target, offset + done, offset + done + copied)
        done += copied
    return done


def start_writeback(file: AtomicFile, start: int, end: int) -> None:
    """Ask the system to begin writing [start, end) to disk. Advice only: nothing is lost where it is not taken."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(file.descriptor, start, end - start, os.POSIX_FADV_DONTNEED)


def look_at(file: AtomicFile, check: Callable[[Path], None] | None) -> None:
    """Everything to disk, then `check(temporary path)`: what it raises keeps the file from getting its name."""
    if check is not None:
        with write_errors(file.path):
            os.fsync(file.descriptor)
        check(file.temporary)

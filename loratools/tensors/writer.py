"""Writing safetensors files: declare every tensor, stream them one at a time, commit.

    declare(name, dtype, shape)*  →  write(name, tensor)*  →  commit (fsync, rename, fsync of the folder)

The header is a function of the declarations, so it is complete before the first byte of payload; hashes that describe
the payload have a fixed length and are filled in at the end (`payload`). Invariants: the same tensors and metadata give
the same bytes; one chunk is held in memory; nothing is left behind by a failure (`atomic`). No torch unless a tensor
has to be computed. The state machine follows gguf-py's writer. `ahead` computes tensors while earlier ones are written.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path

from loratools.errors import LoraToolsError, OutputExistsError, UsageError
from loratools.tensors.atomic import (
    AtomicFile,
    WriteResult,
    check_output,
    commit_together,
    copy_file,
    kept_aside,
    output_folder,
    output_problems,
    resolve_output,
    write_text_file,
)
from loratools.tensors.dtypes import DTYPES
from loratools.tensors.hashes import LEGACY_HASH, MODEL_HASH, MODELSPEC_HASH, digest_range, legacy_of_file
from loratools.tensors.header import Entry, open_bytes, parse_header, printable, render_header
from loratools.tensors.lazy import CHUNK, LazyTensor
from loratools.tensors.payload import STAMPS, Payload, look_at, stamped

__all__ = [
    "TensorSink",
    "WriteResult",
    "check_output",
    "copy_file",
    "index_text",
    "kept_aside",
    "output_folder",
    "output_problems",
    "rewrite_metadata",
    "write_safetensors",
    "write_text_file",
]

_SHARD = "{stem}-{number:05d}-of-{count:05d}{suffix}"  # transformers' and diffusers' name of a shard


class _State(Enum):
    DECLARE = "declare every tensor first"
    WRITE = "write the declared tensors"
    DONE = "the file is finished"


class TensorSink:
    """A safetensors file (or shards with an index) written tensor by tensor.

    Declare everything, then write everything, in the declared order for one sequential pass or in any other. Used as a
    context manager it commits at the end of the block and removes every trace on an exception; `result` is set then.
    `max_shard_bytes`: payload bound of one file; with more than one, `path` OUT.safetensors becomes
    OUT-00001-of-0000N.safetensors and OUT.safetensors.index.json. `stamp_hashes`: the keys of `payload.STAMPS` whose values
    are to be those of what is written, True for the two sshs hashes (one file only); modelspec.hash_sha256 always is when the
    metadata has it. `digest`: give the sha256 of the file; without it untouched bytes may stay in the kernel.
    """

    result: WriteResult

    def __init__(
        self,
        path: Path | str,
        metadata: Mapping[str, str],
        *,
        force: bool = False,
        stamp_hashes: bool | Collection[str] = False,
        max_shard_bytes: int | None = None,
        digest: bool = True,
    ) -> None:
        if stamp_hashes and max_shard_bytes is not None:
            raise UsageError(f"{path}: the sshs hashes belong to one file and cannot be written to shards")
        self.path, self.metadata, self.force = Path(path), dict(metadata), force
        asked = (MODEL_HASH, LEGACY_HASH) if stamp_hashes is True else stamp_hashes or ()
        self.stamps = frozenset(asked) | ({MODELSPEC_HASH} & self.metadata.keys())
        self.max_shard_bytes, self.digest = max_shard_bytes, digest
        self.state = _State.DECLARE
        self.declared: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.written: set[str] = set()
        self.payloads: list[Payload] = []
        self.payload_of: dict[str, Payload] = {}

    def declare(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """Announce a tensor: its safetensors dtype and its shape. The order of the calls is the order in the file."""
        self._expect(_State.DECLARE)
        if name in self.declared or name == "__metadata__":
            raise LoraToolsError(f"{printable(name)}: declared twice or reserved; every tensor needs a name of its own")
        if dtype not in DTYPES or math.prod(shape) * DTYPES[dtype][0] % 8:
            raise LoraToolsError(f"{printable(name)}: {dtype} {list(shape)} has no place in a safetensors file")
        self.declared[name] = (dtype, tuple(shape))

    def write(self, name: str, tensor: LazyTensor) -> None:
        """Stream one declared tensor; its dtype and shape must be the declared ones."""
        self.fits(name, tensor)
        self.write_run([name], tensor)

    def fits(self, name: str, tensor: LazyTensor) -> None:
        """Raise LoraToolsError unless `tensor` is what was declared as `name`."""
        if name not in self.declared:
            raise LoraToolsError(f"{printable(name)}: was not declared")
        if (tensor.dtype, tuple(tensor.shape)) != self.declared[name]:
            raise LoraToolsError(f"{printable(name)}: declared {self.declared[name]}, found {(tensor.dtype, tuple(tensor.shape))}")

    def write_run(self, names: Sequence[str], source: LazyTensor | Iterable[bytes | memoryview]) -> None:
        """Stream the bytes of declared tensors that follow each other in one file; `fits` is for the caller to ask."""
        self.open()
        self._expect(_State.WRITE)
        twice = [printable(name) for name in names if name in self.written]
        if twice:
            raise LoraToolsError(f"{twice[0]}: written twice", details=twice)
        self.payload_of[names[0]].write(names[0], names[-1], source)
        self.written.update(names)

    def commit(self, check: Callable[[Path], None] | None = None) -> WriteResult:
        """Everything written: to disk and under its name.

        `check` sees each finished file under its temporary name, before any of them is renamed; what it raises leaves no output.
        """
        self.open()
        self._expect(_State.WRITE)
        missing = [printable(name) for name in self.declared if name not in self.written]
        if missing:
            raise LoraToolsError(f"{self.path}: {len(missing)} declared tensors were not written", details=missing)
        results = [payload.seal() for payload in self.payloads]
        for payload in self.payloads:
            look_at(payload.file, check)
        if len(results) == 1 and not self._rivals():
            self.payloads[0].file.commit()
            self.result = results[0]
        else:
            self.result = self._commit_all(results)
        self.state = _State.DONE
        return self.result

    def abort(self) -> None:
        """Remove the temporaries; nothing was put in place."""
        for payload in self.payloads:
            payload.file.abort()
        self.state = _State.DONE

    def __enter__(self) -> TensorSink:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self.state is not _State.DONE:
                self.commit()
        finally:
            self.abort()

    def _expect(self, state: _State) -> None:
        if self.state is not state:
            raise LoraToolsError(f"{self.path}: expected to {state.value}, but the state is {self.state.name}")

    def open(self) -> None:
        """Nothing more is declared: fix all offsets, open the files; what can fail for want of space or rights fails here."""
        if self.state is not _State.DECLARE:
            return
        self.state = _State.WRITE
        plan = _plan_shards(self.declared, self.max_shard_bytes)
        if len(plan) > 1 or self._rivals():
            check_output(self.path, (), self.force, sum(_nbytes(*item) for item in self.declared.values()))
            self._refuse_rivals()
        for number, names in enumerate(plan, 1):
            entries: dict[str, Entry] = {}
            position = 0
            for name in names:
                dtype, shape = self.declared[name]
                entries[name] = (dtype, shape, position, position + _nbytes(dtype, shape))
                position = entries[name][3]
            path = self._shard_path(number, len(plan))
            payload = Payload(path, entries, self.metadata, force=self.force, stamps=self.stamps, digest=self.digest)
            self.payloads.append(payload)
            self.payload_of.update(dict.fromkeys(names, payload))

    def _shard_path(self, number: int, count: int) -> Path:
        if count == 1:
            return self.path
        target = resolve_output(self.path)
        return target.with_name(_SHARD.format(stem=target.stem, number=number, count=count, suffix=target.suffix))

    def _index_path(self) -> Path:
        target = resolve_output(self.path)
        return target.with_name(target.name + ".index.json")

    def _rivals(self) -> list[Path]:
        """Files of an earlier run in the other form: shards and index beside a single file, or the other way round."""
        if self.max_shard_bytes is None:
            return []
        target = resolve_output(self.path)
        shard = re.compile(re.escape(target.stem) + r"-\d{5}-of-\d{5}" + re.escape(target.suffix))
        found = [target.parent / name for name in os.listdir(target.parent) if shard.fullmatch(name)]
        return sorted(found + [path for path in (target, self._index_path()) if path.exists()])

    def _refuse_rivals(self) -> None:
        rivals = self._rivals()
        if rivals and not self.force:
            details = [str(path) for path in rivals]
            raise OutputExistsError(f"{self.path}: an earlier output is in the way", details=details, fix="--force replaces it")

    def _commit_all(self, results: list[WriteResult]) -> WriteResult:
        """Shards first, index last, the files of an earlier run away."""
        files = [payload.file for payload in self.payloads]
        outcome = results[0]
        index: AtomicFile | None = None
        try:
            if len(files) > 1:
                total = sum(_nbytes(*item) for item in self.declared.values())
                text = index_text({name: self.payload_of[name].path.name for name in self.declared}, total).encode()
                index = AtomicFile(self._index_path(), force=self.force)
                index.write_at(0, text)
                files.append(index)
                paths = tuple(file.path for file in files)
                outcome = WriteResult(index.path, sum(result.bytes for result in results), hashlib.sha256(text).hexdigest(), paths)
            for file in files:
                file.finish()
            commit_together(files, self._rivals())
        finally:
            if index is not None:
                index.abort()
        return outcome


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPES[dtype][0] // 8


def _plan_shards(declared: Mapping[str, tuple[str, tuple[int, ...]]], limit: int | None) -> list[list[str]]:
    """Names in the declared order, cut where a file would exceed `limit`; a larger tensor has a file of its own."""
    plan: list[list[str]] = [[]]
    size = 0
    for name, item in declared.items():
        nbytes = _nbytes(*item)
        if limit is not None and plan[-1] and size + nbytes > limit:
            plan.append([])
            size = 0
        plan[-1].append(name)
        size += nbytes
    return plan


def index_text(
    weight_map: Mapping[str, str],
    total_size: int,
    metadata: Mapping[str, object] | None = None,
    rest: Mapping[str, object] | None = None,
) -> str:
    """The JSON of a shard index as transformers and diffusers write it.

    `metadata` are further entries of its header, `rest` further entries beside header and map.
    """
    header = {**(metadata or {}), "total_size": total_size}
    index = {**(rest or {}), "metadata": header, "weight_map": dict(weight_map)}
    return json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write_safetensors(
    path: Path | str,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str],
    *,
    force: bool = False,
    stamp_hashes: bool | Collection[str] = False,
) -> WriteResult:
    """Write tensors and metadata in the order given, one tensor in memory at a time. Raises WriteError, OutputExistsError."""
    with TensorSink(path, metadata, force=force, stamp_hashes=stamp_hashes) as sink:
        for name, tensor in tensors.items():
            sink.declare(name, tensor.dtype, tuple(tensor.shape))
        for name, tensor in tensors.items():
            sink.write(name, tensor)
    return sink.result


def rewrite_metadata(path: Path | str, out: Path | str, metadata: Mapping[str, str], force: bool = False) -> WriteResult:
    """Another metadata header before the same payload: entries keep their order and offsets, the payload is copied as bytes.

    The hashes of STAMPS among `metadata` are set to what they are of the result (the legacy one depends on the ss_* keys).
    """
    file, size = open_bytes(Path(path))
    header = parse_header(file, size)
    check_output(out, [path], force, size)
    entries = {name: (info.dtype, info.shape, info.start, info.end) for name, info in header.tensors.items()}
    metadata = dict(metadata)
    stamps = STAMPS.keys() & metadata.keys()
    model = digest_range(file, header.data_start, size) if stamps - {LEGACY_HASH} else ""
    metadata.update(stamped(stamps, model, lambda: legacy_of_file(file, header, size, metadata)))
    head = render_header(entries, metadata)
    payload = size - header.data_start
    digest = hashlib.sha256(head)
    with AtomicFile(out, force=force, nbytes=len(head) + payload) as target:
        target.write_at(0, head)
        for offset in range(0, payload, CHUNK):
            piece = file.read(header.data_start + offset, min(CHUNK, payload - offset))
            digest.update(piece)
            target.write_at(len(head) + offset, piece)
    return WriteResult(Path(out), len(head) + payload, digest.hexdigest(), (Path(out),))

"""What frozen models make of the data, computed once: latents (mean and std) of pictures, embeddings of captions.

An entry is found by what it was made of, never by its place in a batch or a folder:

    latents   sha256 of the picture's file, bucket, resized size, crop, flip
    text      sha256 of the caption's variant as the text encoder gets it

and by the settings it was made with (VAE, text encoder, dtype …), so that an edited picture or another model is simply not there,
and two samples with one caption share an entry. Entries lie in packs, one safetensors file for each `put_all`, atomic: a pack is
complete or not there, and a run that was killed while it cached goes on where it stopped. Opening reads the headers, reading an entry
reads its bytes and no others. The folder also holds the dataset.json it was last used for: what has changed since is told (`notes`),
and packs in which nothing is of use any more are removed.
Invariants: no NaN or Inf is ever kept; one entry is the same bytes whichever pack it is in; no file but its own packs is touched.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.errors import InputError, MalformedError, NotFiniteError, counted
from loratools.tensors.atomic import write_errors
from loratools.tensors.finite import FiniteTensor
from loratools.tensors.header import TensorInfo, open_bytes, parse_json, read_header
from loratools.tensors.lazy import StoredTensor, from_torch
from loratools.tensors.writer import write_safetensors
from loratools.training.data.fingerprint import Fingerprint, differences, read_fingerprint, write_fingerprint
from loratools.training.data.transform import Placement

if TYPE_CHECKING:
    import torch

LATENTS, TEXT = "latents", "text"
_RECORD = "loratools.cache"  # the metadata key of a pack: its settings' digest, and of each entry digest → kind and content
_PACK = re.compile(r"pack-[0-9a-f]{32}\.safetensors")  # nothing else in the folder is ever removed
_LAST_USE = "dataset.json"


@dataclass(frozen=True)
class Key:
    """What an entry was made of: its kind, the hex sha256 of the content, and how the content was prepared."""

    kind: str
    content: str
    variant: str = ""


@dataclass(frozen=True)
class _Stored:
    """Where an entry lies: its tensors by name, and where their pack's payload starts."""

    path: Path
    data_start: int
    tensors: Mapping[str, TensorInfo]


@dataclass(frozen=True)
class _Pack:
    """A pack's header: the digest of its settings, and of each entry (by its digest) kind, content and place."""

    settings: str
    made_of: Mapping[str, tuple[str, str]]
    stored: Mapping[str, _Stored]


def text_key(text: str) -> Key:
    """The key of a caption, as the text encoder gets it."""
    return Key(TEXT, hashlib.sha256(text.encode()).hexdigest())


class Cache:
    """The cache in `folder` for the data and settings of `fingerprint`; the folder is made if it is not there.

    `fingerprint.settings` must name all that shapes the values beside the keys: the models, their dtype, the length of prompts. Two
    runs with different settings need two folders. `notes`: what was found stale or broken, in words. Raises WriteError.
    """

    def __init__(self, folder: Path, fingerprint: Fingerprint) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self.notes: list[str] = []
        self._settings = fingerprint.settings_digest
        self._pictures = {item.id: item.sha256 for item in fingerprint.items}
        self._index: dict[str, _Stored] = {}
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._compare()
        self._open_packs()

    def latents_key(self, sample: str, placement: Placement) -> Key:
        """The key of a crop of a sample, by its id. Raises KeyError for an id that is not in the fingerprint."""
        spot = (placement.resized, placement.bucket, placement.left, placement.top, placement.flip)
        return Key(LATENTS, self._pictures[sample], json.dumps(spot))

    def has(self, key: Key) -> bool:
        return self._digest(key) in self._index

    def get(self, key: Key) -> dict[str, torch.Tensor]:
        """The tensors of an entry, fresh, on the CPU. Raises InputError where there is none or its file is gone."""
        stored = self._index.get(self._digest(key))
        if stored is None:
            raise InputError(f"{self.folder}: no {key.kind} of that content in the cache", fix="cache the data again")
        file, _ = open_bytes(stored.path)
        return {
            name: StoredTensor(file, stored.data_start + info.start, info.dtype, info.shape).load() for name, info in stored.tensors.items()
        }

    def put(self, key: Key, value: Mapping[str, torch.Tensor]) -> None:
        """Keep one entry; `put_all` is faster for many."""
        self.put_all({key: value})

    def put_all(self, entries: Mapping[Key, Mapping[str, torch.Tensor]]) -> None:
        """Keep several entries in one pack, all or none of them; one that is there already stays as it is.

        Raises NotFiniteError that names the tensor (a VAE overflows in fp16), WriteError, ValueError for an entry without tensors.
        """
        new = {self._digest(key): key for key in entries if not self.has(key)}
        if not new:
            return
        if not all(entries[key] for key in new.values()):
            raise ValueError("an entry of the cache needs a tensor")
        tensors = {
            f"{digest}/{name}": FiniteTensor(f"{key.kind} {name}", from_torch(tensor))
            for digest, key in sorted(new.items())
            for name, tensor in sorted(entries[key].items())
        }
        record = {"settings": self._settings, "entries": {digest: [key.kind, key.content] for digest, key in sorted(new.items())}}
        path = self.folder / f"pack-{hashlib.sha256(''.join(sorted(new)).encode()).hexdigest()[:32]}.safetensors"
        try:
            write_safetensors(path, tensors, {_RECORD: json.dumps(record)}, force=True)
        except NotFiniteError as error:
            fix = "compute the latents in fp32: many a VAE overflows in fp16" if error.tensor.startswith(LATENTS) else None
            raise NotFiniteError(error.tensor, f"NaN or Inf in what is to be cached: {error.tensor}", fix=fix) from error
        self._index.update(_read_pack(path).stored)

    def _digest(self, key: Key) -> str:
        return hashlib.sha256(json.dumps([self._settings, key.kind, key.content, key.variant]).encode()).hexdigest()

    def _compare(self) -> None:
        """Say what has changed since the folder was last used, and note what it is used for now."""
        path = self.folder / _LAST_USE
        try:
            changes = differences(read_fingerprint(path), self.fingerprint) if path.exists() else []
        except InputError as error:
            changes = [error.message]
        if changes:
            self.notes += [f"{self.folder}: the cache was made of other data; what changed is computed again", *changes]
        if changes or not path.exists():
            write_fingerprint(path, self.fingerprint)

    def _open_packs(self) -> None:
        """Index the entries that are of use; remove packs that have none, and broken ones."""
        pictures = set(self._pictures.values())
        stale = 0
        for path in sorted(path for path in self.folder.iterdir() if _PACK.fullmatch(path.name)):
            try:
                pack = _read_pack(path)
            except InputError as error:
                self.notes.append(f"broken, its entries are computed again: {error.message}")
                _remove(path)
                continue
            same = pack.settings == self._settings
            used = {digest for digest, (kind, content) in pack.made_of.items() if same and (kind != LATENTS or content in pictures)}
            self._index.update({digest: pack.stored[digest] for digest in used})
            if not used:
                stale += 1
                _remove(path)
        if stale:
            self.notes.append(f"{self.folder}: {counted(stale, 'stale pack')} removed")


def _remove(path: Path) -> None:
    with write_errors(path):
        path.unlink(missing_ok=True)


def _read_pack(path: Path) -> _Pack:
    """A pack from its header. Raises MalformedError."""
    header = read_header(path)
    record = parse_json(header.metadata.get(_RECORD, "null").encode(), str(path))
    tensors: dict[str, dict[str, TensorInfo]] = {}
    for name, info in header.tensors.items():
        digest, _, rest = name.partition("/")
        tensors.setdefault(digest, {})[rest] = info
    try:
        made_of = {digest: (str(kind), str(content)) for digest, (kind, content) in record["entries"].items()}
        settings = str(record["settings"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MalformedError(f"{path}: not a pack of a cache: no record of its entries") from error
    if made_of.keys() != tensors.keys():
        raise MalformedError(f"{path}: not a pack of a cache: its entries are not those of its record")
    stored = {digest: _Stored(path, header.data_start, found) for digest, found in tensors.items()}
    return _Pack(settings, made_of, stored)

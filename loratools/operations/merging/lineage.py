"""The record of a merge in the header: where the weights come from, and the command that makes them again.

`modelspec.merged_from` names the files; `loratools.merge` is a JSON list of records, the latest last, with the sha256 of every
adapter and of the base's headers. Base names only: no path of the machine. Nothing in it depends on the time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from loratools.tensors.hashes import sha256_file, sha256_header
from loratools.tensors.metadata import json_field
from loratools.tensors.source import TensorSource
from loratools.version import VERSION

MERGED_FROM, RECORD = "modelspec.merged_from", "loratools.merge"


def file_digest(source: TensorSource) -> str:
    """sha256 of the weights file; of several, the sha256 of theirs in order."""
    digests = [sha256_file(path) for path in source.files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def header_digest(source: TensorSource) -> str:
    """sha256 of a safetensors file's header, of another file's whole; of several as for `file_digest`."""
    digests = [sha256_header(path) if path.suffix == ".safetensors" else sha256_file(path) for path in source.files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def record_of(base: TensorSource, adapters: Sequence[Mapping[str, Any]], options: Mapping[str, Any], *, whole: bool) -> dict[str, Any]:
    """One record. adapters: {"name", "weight", "sha256"}; options: those that are not at their default; whole: hash all of the base."""
    origin = {"name": text(base.path.name), "header_sha256": header_digest(base)}
    if whole:
        origin["sha256"] = file_digest(base)
    return {"command": "merge", "version": VERSION, "base": origin, "adapters": list(adapters), "options": dict(options)}


def merged_metadata(old: Mapping[str, str], record: Mapping[str, Any]) -> dict[str, str]:
    """The header with the record added to those of earlier merges; every other entry stays."""
    names = [record["base"]["name"], *(adapter["name"] for adapter in record["adapters"])]
    before = json_field(old, RECORD) if RECORD in old else []
    records = [*(before if isinstance(before, list) else []), record]
    return {**old, MERGED_FROM: ", ".join(names), RECORD: json.dumps(records, sort_keys=True)}


def text(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()  # a file name may be no text

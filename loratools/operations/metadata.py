"""Read and edit the metadata of a file; the tensors are copied as bytes and never looked at.

Editing changes the header alone: entries keep their order and offsets, so the payload is the same bit for bit. Stored hashes
(`sshs_*`) are those of the result, because the legacy one depends on the `ss_*` entries. No torch.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loratools.errors import InputError, UnsupportedError, UsageError, counted
from loratools.tensors.metadata import private_values, strip_private
from loratools.tensors.reader import TensorSource, open_source
from loratools.tensors.writer import check_output, rewrite_metadata

without_private = strip_private  # `metadata` has an option of that name


def metadata(
    source: Path,
    output: Path | None = None,
    *,
    set: Mapping[str, str] | None = None,
    unset: Sequence[str] = (),
    strip_private: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """The metadata of `source`, after the edits when there are any; they are written to `output` unless `dry_run`.

    strip_private: take out paths, user and host names; unset: keys to remove; set: entries to add or replace; in that order.
    Returns {"path", "output", "metadata", "removed": [key], "private": [{"key", "reason"}]}, `private` being what `source` holds,
    and of a PEFT folder "adapter_config".
    Raises UsageError for edits without `output`, InputError for a key that is not there, UnsupportedError for a container
    without a header, OutputExistsError, WriteError.
    """
    edits = bool(set or unset or strip_private)
    if edits and output is None and not dry_run:
        raise UsageError("an edit needs an output; SRC is never changed", fix="name the file to write after SRC, or try --dry-run")
    opened = open_source(source)
    edited = _edited(opened, set or {}, unset, strip_private)
    if output is not None:
        _check(opened, output, force)
        if not dry_run:
            rewrite_metadata(source, output, edited, force=force)
            edited = dict(open_source(output).metadata)  # the hashes are the result's
    config = opened.config
    private = private_values({**opened.metadata, **_texts(config or {})})
    result: dict[str, Any] = {
        "path": str(source),
        "output": None if output is None else str(output),
        "metadata": edited,
        "removed": [key for key in opened.metadata if key not in edited],
        "private": [{"key": key, "reason": reason} for key, reason in private],
    }
    return result if config is None else {**result, "adapter_config": config}


def _edited(source: TensorSource, set: Mapping[str, str], unset: Sequence[str], strip: bool) -> dict[str, str]:
    """The entries after the edits; new ones at the end. Raises InputError for all keys that cannot be removed or written."""
    problems = [_missing(source.metadata, key) for key in dict.fromkeys(unset) if key not in source.metadata]
    problems += [f"{key}: no valid Unicode text" for key, value in set.items() if not _is_text(key + value)]
    if problems:
        count = f"{counted(len(problems), 'edit')}"
        raise InputError(f"{source.path}: {count} cannot be made", details=problems, fix=f"loratools metadata {source.path}")
    kept = without_private(source.metadata) if strip else dict(source.metadata)
    return {**{key: value for key, value in kept.items() if key not in unset}, **set}


def _check(source: TensorSource, output: Path, force: bool) -> None:
    """Only a safetensors file of its own has a header to edit."""
    if source.container != "safetensors" or not source.path.is_file():
        pickled = source.container == "pickle" or not source.files
        fix = "convert it to safetensors first" if pickled else f"loratools metadata {source.files[0]} OUT"
        raise UnsupportedError(f"{source.path}: only a single safetensors file has metadata to edit, this is {source.container}", fix=fix)
    check_output(output, [source.path], force, source.path.stat().st_size)


def _texts(config: Mapping[str, Any]) -> dict[str, str]:
    """The text values of an adapter_config.json as entries, so that private ones among them are found too."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in config.items()}
    return {f"adapter_config.{key}": value for key, value in texts.items()}


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _missing(entries: Mapping[str, Any], key: str) -> str:
    near = difflib.get_close_matches(key, entries, n=1, cutoff=0.5)
    return f"no entry {key!r}" + (f"; did you mean {near[0]!r}?" if near else f" among {len(entries)}")


def value_of(result: Mapping[str, Any], key: str) -> Any:
    """One entry of a result with "path", "metadata" and maybe "adapter_config". Raises InputError that names the nearest key."""
    entries = {**(result.get("adapter_config") or {}), **(result.get("metadata") or {})}
    if key in entries:
        return entries[key]
    raise InputError(f"{result.get('path')}: {_missing(entries, key)}", fix=f"loratools metadata {result.get('path')} lists all entries")

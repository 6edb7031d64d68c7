"""Several adapters read together: one architecture for all, and what one of them settles for the others.

A file whose architecture is ambiguous alone takes that of the others. `--alpha` speaks only for files that record none. A base that
is itself an adapter is refused: it would name no module, and every later message would be about that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loratools.adapters.adapter import Adapter
from loratools.errors import InputError, LoraToolsError, UsageError
from loratools.mapping.detect import detect
from loratools.mapping.read import Reading, analyse, checked, is_adapter, tables_of
from loratools.tensors.reader import TensorSource, open_source


def read_together(
    paths: Sequence[Path], *, arch: str | None = None, alpha: float | None = None, base: Path | None = None
) -> tuple[list[Reading], list[Adapter]]:
    """The readings and adapters of all files, in their order. arch, alpha, base: as for reading one.

    Raises InputError that names every file's architecture where they differ, UsageError for an alpha that no file needs, and what
    reading raises.
    """
    opened = open_source(base) if base is not None else None
    misplaced = adapter_as_base(opened) if opened is not None else None
    if misplaced is not None:
        raise misplaced
    alphas = [alpha if alpha is not None and needs_alpha(path, arch, opened) else None for path in paths]
    if alpha is not None and not any(value is not None for value in alphas):
        which = {1: "this one records its own", 2: "both of these record their own"}.get(len(paths), "all of these record their own")
        raise UsageError(f"--alpha is for a file that records none; {which}")
    readings = [analyse(open_source(path), arch=arch, alpha=value, base=opened) for path, value in zip(paths, alphas, strict=True)]
    settled = _settled(readings)
    for position, reading in enumerate(readings):
        if settled and reading.detection.ambiguous and settled in _names(reading):
            readings[position] = analyse(reading.source, arch=settled, alpha=alphas[position], base=opened)
    adapters = [_usable(reading) for reading in readings]
    found = list(dict.fromkeys(adapter.architecture for adapter in adapters))
    if len(found) > 1:
        count = {2: "two", 3: "three"}.get(len(found), str(len(found)))
        told = [f"{path.name} is {adapter.architecture}" for path, adapter in zip(paths, adapters, strict=True)]
        raise InputError(f"{count} architectures: {', '.join(told)}")
    return readings, adapters


def adapter_as_base(base: TensorSource, adapters: Sequence[Path] = ()) -> InputError | None:
    """What is to be said where the base is itself an adapter; None where it is not.

    adapters: what was given to be merged into it; a model among them says that the order is wrong.
    """
    if not _is_adapter(base):
        return None
    model = next((path for path in adapters if _is_model(path)), None)
    fix = f"the base comes first: loratools merge {model} {base.path} OUT" if model else "give the model that the adapters were trained on"
    return InputError(f"{base.path.name} is an adapter, where a base model is expected", fix=fix)


def _is_adapter(source: TensorSource) -> bool:
    return is_adapter(source, detect(source.tensors, source.metadata, container=source.container))


def _is_model(path: Path) -> bool:
    try:
        return not _is_adapter(open_source(path))
    except LoraToolsError:  # told where it is read; here it is no model that could be the base
        return False


def needs_alpha(path: Path, arch: str | None, base: TensorSource | None) -> bool:
    """Does the file leave some alpha unrecorded, or 0? --alpha speaks only for those."""
    adapter = analyse(open_source(path), arch=arch, base=base).adapter
    return adapter is not None and any(entry.module.rank and not entry.module.alpha for entry in adapter.entries)


def _settled(readings: Sequence[Reading]) -> str | None:
    """The architecture that the unambiguous files have, or the only one that all files may have."""
    certain = {next(iter(_names(reading))) for reading in readings if not reading.detection.ambiguous and _names(reading)}
    if not certain:
        certain = set.intersection(*(set(_names(reading)) for reading in readings))
    return certain.pop() if len(certain) == 1 else None


def _names(reading: Reading) -> list[str]:
    return [candidate.architecture.name for candidate in reading.detection.candidates]


def _usable(reading: Reading) -> Adapter:
    try:
        adapter = checked(reading)
    except InputError as error:
        if error.fix and "--drop-unknown" in error.fix:  # what reading advises are options of convert
            error.fix = f"loratools convert {reading.source.path} OUT --to DIALECT --drop-unknown takes them out"
        raise
    tables_of(reading)
    return adapter

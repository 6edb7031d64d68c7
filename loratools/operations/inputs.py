"""Several adapters read together: one architecture for all, and what one of them settles for the others.

A file whose architecture is ambiguous alone takes that of the others. `--alpha` speaks only for files that record none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loratools.adapters.adapter import Adapter
from loratools.errors import InputError, UsageError
from loratools.mapping.read import Reading, analyse, checked, tables_of
from loratools.tensors.reader import TensorSource, open_source


def read_together(
    paths: Sequence[Path], *, arch: str | None = None, alpha: float | None = None, base: Path | None = None
) -> tuple[list[Reading], list[Adapter]]:
    """The readings and adapters of all files, in their order. arch, alpha, base: as for reading one.

    Raises InputError that names every file's architecture where they differ, UsageError for an alpha that no file needs, and what
    reading raises.
    """
    opened = open_source(base) if base is not None else None
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

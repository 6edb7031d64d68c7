"""Whether everything that is about to be computed with is a number: told for all inputs at once, before the long job."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.adapters.algebra import in_parallel
from loratools.errors import InputError, counted
from loratools.tensors.finite import first_not_finite
from loratools.tensors.source import TensorSource


def check_finite(sources: Sequence[tuple[str, TensorSource]], threads: int | None = None) -> None:
    """Raise InputError that names every tensor with NaN or Inf. sources: (the name the input is told by, its tensors)."""
    used = [(name, key, tensor) for name, source in sources for key, tensor in source.tensors.items()]
    marks = in_parallel(lambda item: first_not_finite(item[2]), used, threads)
    found = [f"{name}: {key}" for (name, key, _), bad in zip(used, marks, strict=True) if bad]
    if found:
        fix = f"loratools inspect {' '.join(dict.fromkeys(str(source.path) for _, source in sources))} --check names every such tensor"
        raise InputError(f"NaN or Inf in {counted(len(found), 'tensor')}", details=found, fix=fix)

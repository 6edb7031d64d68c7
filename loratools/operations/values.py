"""What only the values tell: NaN and Inf, factors that are all zero, booleans that are none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from loratools.adapters.adapter import Adapter
from loratools.report import Finding
from loratools.tensors.finite import first_not_finite
from loratools.tensors.lazy import LazyTensor

# The factor whose zeros make a module do nothing.
_LAST_FACTORS = ("up", "embedding_up", "hada_w1_a", "lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a", "diff", "w_norm")


def value_findings(tensors: Mapping[str, LazyTensor], adapter: Adapter | None) -> list[Finding]:
    """Problems of the values, one tensor in memory at a time. adapter: None for files that are none."""
    found = [
        Finding("error", "not-finite", name, f"{name}: holds NaN or Inf") for name, tensor in tensors.items() if first_not_finite(tensor)
    ]
    found += [Finding("warning", "bad-bool", name, f"{name}: bytes other than 0 and 1") for name in _bad_bools(tensors)]
    if adapter is not None:
        found += _dead(adapter)
    return found


def _bad_bools(tensors: Mapping[str, LazyTensor]) -> Iterator[str]:
    for name, tensor in tensors.items():
        if tensor.dtype == "BOOL" and any(set(chunk) - {0, 1} for chunk in tensor.chunks()):
            yield name


def _dead(adapter: Adapter) -> list[Finding]:
    """Modules that change nothing: an untrained adapter when it is all of them, worth a word when it is some."""
    dead, alive = [], 0
    for entry in adapter.entries:
        last = [tensor for role, tensor in entry.module.factors.items() if role in _LAST_FACTORS]
        if any(_all_zero(tensor) for tensor in last) and "diff_b" not in entry.module.factors:
            dead.append(str(entry.sites[0]))
        else:
            alive += 1
    if dead and not alive:
        return [Finding("error", "dead-adapter", None, f"all {len(dead)} modules have a zero factor: this adapter changes nothing")]
    return [Finding("warning", "dead-module", site, f"{site}: a zero factor, the module changes nothing") for site in dead]


def _all_zero(tensor: LazyTensor) -> bool:
    """True when every element is zero (of either sign)."""
    return not any(chunk.strip(b"\0\x80") if tensor.dtype.startswith(("F", "BF")) else chunk.strip(b"\0") for chunk in tensor.chunks())

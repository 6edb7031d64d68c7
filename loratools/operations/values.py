"""What only the values tell: NaN and Inf, factors that are all zero, booleans that are none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from loratools.adapters.adapter import Adapter, Module
from loratools.report import Finding
from loratools.tensors.dtypes import DTYPES
from loratools.tensors.finite import first_not_finite
from loratools.tensors.lazy import LazyTensor

# Roles that are multiplied with each other: one of them all zero, and the product is. A module does nothing when all its products are
# zero (trainers start from that: LoRA with up, LoHa with w2_a, LoKr with w2_b, OFT with its blocks).
_PRODUCTS = (
    ("up", "down", "mid"),
    ("embedding_up", "embedding_down"),
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    ("a1.weight", "a2.weight"),
    ("b1.weight", "b2.weight"),
    *((role,) for role in ("bias", "diff", "diff_b", "w_norm", "b_norm", "oft_blocks", "oft_R.weight", "rescale")),
)


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
        if _is_dead(entry.module):
            dead.append(str(entry.sites[0]))
        else:
            alive += 1
    if dead and not alive:
        return [Finding("error", "dead-adapter", None, f"a zero factor in every module ({len(dead)}): this adapter changes nothing")]
    return [Finding("warning", "dead-module", site, f"{site}: a zero factor, the module changes nothing") for site in dead]


def _is_dead(module: Module) -> bool:
    """True when every product of the module's factors is zero; never for kinds that replace the weight."""
    factors = module.factors
    found = [[factors[role] for role in product if role in factors] for product in _PRODUCTS if module.kind != "set"]
    return any(found) and all(any(map(_all_zero, product)) for product in found if product)


def _all_zero(tensor: LazyTensor) -> bool:
    """True when every element is zero (of either sign)."""
    return all(_zero_bytes(chunk, tensor.dtype) for chunk in tensor.chunks())


def _zero_bytes(chunk: bytes, dtype: str) -> bool:
    """No bit but signs: in a float's last byte 0x80 is one, in any other byte a small number."""
    width = DTYPES[dtype][0] // 8
    if not dtype.startswith(("F", "BF")) or not width:
        return not chunk.strip(b"\0")
    signs_only = not chunk.strip(b"\0\x80")
    return signs_only and not any(chunk[place::width].strip(b"\0") for place in range(width - 1))

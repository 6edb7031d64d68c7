"""dtypes: their names in a safetensors header, in torch, and as people write them."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from loratools.errors import MalformedError, UsageError

if TYPE_CHECKING:
    import torch

# safetensors dtype name → (bits an element, torch's name for it or None where torch has no such dtype)
DTYPES: dict[str, tuple[int, str | None]] = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "F32": (32, "float32"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F4": (4, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
}

# spelling people use → the name of a dtype that weights are written in
SPELLINGS = {
    "fp32": "F32", "float32": "F32", "f32": "F32", "float": "F32",
    "fp16": "F16", "float16": "F16", "f16": "F16", "half": "F16",
    "bf16": "BF16", "bfloat16": "BF16",
    "fp64": "F64", "float64": "F64", "f64": "F64",
}  # fmt: skip


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name. Raises MalformedError where torch has none (F4, F6)."""
    import torch

    attribute = DTYPES[name][1]
    if attribute is None:
        raise MalformedError(f"dtype {name} can be copied but not computed with")
    return getattr(torch, attribute)  # type: ignore[no-any-return]


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype."""
    attribute = str(dtype).removeprefix("torch.")
    for name, (_, torch_name) in DTYPES.items():
        if torch_name == attribute:
            return name
    raise MalformedError(f"dtype {dtype} has no place in a safetensors file")


def dtype_named(spelling: str | None) -> str | None:
    """A dtype of weights in any usual spelling as its safetensors name; None stays None. Raises UsageError naming the nearest."""
    if spelling is None:
        return None
    known = spelling.lower().removeprefix("torch.")
    if known not in SPELLINGS:
        near = difflib.get_close_matches(known, SPELLINGS, n=1)
        raise UsageError(f"{spelling!r} is no dtype of weights; use {near[0] if near else 'fp32, fp16, bf16 or fp64'}")
    return SPELLINGS[known]

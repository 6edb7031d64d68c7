"""Peak memory of merges into scaled fp8, whose weights are gone through twice, and of what `--verify` only compares.

As in `test_merge_memory`: a process of its own, growth over one that has imported everything.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest

from loratools.tensors.header import render_header
from tests.memory.test_merge_memory import LIMIT, merged, name

pytestmark = pytest.mark.memory

OUT, IN, RANK = 8192, 8192, 16  # fp8: 64 MiB; the values 256 MiB in float32, 512 in float64
Entry = tuple[str, tuple[int, ...], bytes | None]  # dtype, shape, data or None for a hole


def save(path: Path, tensors: dict[str, Entry]) -> Path:
    """Tensors one after the other; those without data are zeros that take no disk."""
    sizes = {"F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4}
    entries, end = {}, 0
    for key, (dtype, shape, _) in tensors.items():
        size = sizes[dtype] * math.prod(shape)
        entries[key] = (dtype, shape, end, end + size)
        end += size
    header = render_header(entries, {"format": "pt"})
    with path.open("wb") as file:
        file.write(header)
        for key, (_, _, data) in tensors.items():
            if data is not None:
                file.seek(len(header) + entries[key][2])
                file.write(data)
        file.truncate(len(header) + end)
    return path


def lora(path: Path) -> Path:
    """A LoRA on one layer, all values 1/64 in half precision: each entry of B A is 16 / 4096."""
    half = struct.pack("<e", 1 / 64)
    shapes = {"A": (RANK, IN), "B": (OUT, RANK)}
    return save(
        path,
        {f"base_model.model.{name(0)}.lora_{leaf}.weight": ("F16", shape, half * (shape[0] * shape[1])) for leaf, shape in shapes.items()},
    )


SCALES: dict[str, tuple[int, ...]] = {"one": (), "rows": (OUT, 1), "blocks": (OUT // 128, IN // 128)}


@pytest.mark.parametrize("kind", SCALES)
def test_scaled_fp8_is_merged_and_verified_in_blocks(kind: str, tmp_path: Path) -> None:
    """Codes of 1 (0x38) under a scale of 1/256, once for the new scale, once for the codes, once to verify."""
    shape = SCALES[kind]
    codes, scale = b"\x38" * (OUT * IN), struct.pack("<f", 1 / 256) * math.prod(shape)
    tensors: dict[str, Entry] = {
        f"{name(0)}.weight": ("F8_E4M3", (OUT, IN), codes),
        f"{name(0)}.weight_scale_inv": ("F32", shape, scale),
    }
    (tmp_path / "base").mkdir()
    seen = merged(save(tmp_path / "base" / "model.safetensors", tensors), lora(tmp_path / "lora.safetensors"), verify=True)
    assert (seen["changed"], seen["verify"]["sites"]) == (1, 1)  # type: ignore[index]
    assert seen["delta_retained"] == pytest.approx(1.0, abs=0.05)
    assert seen["grown"] < LIMIT


def test_untouched_tensors_are_compared_in_pieces(tmp_path: Path) -> None:
    """Beside a small merged weight 512 MiB that no adapter changes."""
    tensors: dict[str, Entry] = {
        f"{name(0)}.weight": ("BF16", (OUT, IN), b"\x80\x3f" * (OUT * IN)),
        "model.embed_tokens.weight": ("BF16", (OUT * 4, IN), None),
    }
    (tmp_path / "base").mkdir()
    seen = merged(save(tmp_path / "base" / "model.safetensors", tensors), lora(tmp_path / "lora.safetensors"), verify=True)
    assert (seen["changed"], seen["unchanged"], seen["verify"]["untouched_tensors"]) == (1, 1, 1)  # type: ignore[index]
    assert seen["grown"] < LIMIT


def test_a_tensor_that_is_only_cast_is_checked_in_blocks(tmp_path: Path) -> None:
    """256 MiB of bf16 as float32: half a gibibyte, in float64 one."""
    tensors: dict[str, Entry] = {
        f"{name(0)}.weight": ("F32", (OUT, IN), None),
        "model.embed_tokens.weight": ("BF16", (OUT * 2, IN), None),
    }
    (tmp_path / "base").mkdir()
    source = save(tmp_path / "base" / "model.safetensors", tensors)
    seen = merged(source, lora(tmp_path / "lora.safetensors"), verify=True, dtype="F32")
    assert (seen["changed"], seen["unchanged"]) == (1, 1)
    assert seen["grown"] < LIMIT

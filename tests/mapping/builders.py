"""Adapter files of every layout, made from key tables or by hand: seeded values on tiny or published dimensions.

`Table` loads one published key table (names and shapes); `values` fills it. Values depend on the key alone, so that order never
matters. Detection needs published widths but no numbers: `Blank` is a tensor that has a shape and cannot be read.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools.errors import LoraToolsError
from loratools.mapping.detect import Detection, detect
from loratools.mapping.read import named_architecture
from loratools.tensors.lazy import LazyTensor, scalar_tensor

Tensors = dict[str, torch.Tensor]

FOLDER = os.environ.get("LORATOOLS_MANIFESTS", "")
needs_tables = pytest.mark.skipif(not FOLDER, reason="LORATOOLS_MANIFESTS names no folder of key tables")

_BLOCK = re.compile(r"(?:blocks|layers|block)[._](\d+)[._]")


class Blank(LazyTensor):
    """A tensor of a header: dtype and shape, and a failure for whoever wants its bytes."""

    def __init__(self, shape: tuple[int, ...], dtype: str = "F16") -> None:
        self.dtype, self.shape = dtype, shape

    def load(self) -> torch.Tensor:
        raise AssertionError("detection read a payload")

    def chunks(self) -> Iterator[bytes]:
        raise AssertionError("detection read a payload")


def blank(shapes: Mapping[str, tuple[int, ...] | list[int]], alpha: float = 8.0) -> dict[str, LazyTensor]:
    """Shapes as a header tells them; one-element tensors (alpha, flags) have a value, as detection reads those."""
    found: dict[str, LazyTensor] = {}
    for key, shape in shapes.items():
        value = float(on_input(key)) if key.endswith(".on_input") else alpha
        found[key] = Blank(tuple(shape)) if len(shape) else scalar_tensor(value)
    return found


def on_input(key: str) -> bool:
    """Does IA3 scale the inputs of this module? It does for the second layer of a feed-forward."""
    return key.rpartition(".")[0].endswith(("fc2", "ff_net_2"))


@dataclass(frozen=True)
class Table:
    """A published key table."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]

    @staticmethod
    @cache
    def load(name: str) -> Table:
        found = json.loads((Path(FOLDER) / f"{name}.json").read_text())
        return Table(name, {key: tuple(shape) for key, shape in found["keys"].items()})

    def thinned(self) -> Table:
        """Without the inner blocks: the first two and the last of each kind stay, and of a UNet all but deep transformers and encoders."""
        last: dict[str, int] = {}
        for key in self.shapes:
            for found in _BLOCK.finditer(key):
                head = key[: found.start(1)]
                last[head] = max(last.get(head, 0), int(found.group(1)))

        def stays(key: str) -> bool:
            for found in _BLOCK.finditer(key):
                head, number = key[: found.start(1)], int(found.group(1))
                shallow = head.endswith(("down_blocks_", "up_blocks_", "down_blocks.", "up_blocks.", "input_blocks_", "output_blocks_"))
                if not shallow and number > 1 and (number < last[head] or "text_model" in head or "attentions" in head or last[head] > 60):
                    return False
            return True

        return Table(self.name, {key: shape for key, shape in self.shapes.items() if stays(key)})

    def reduced(self) -> Table:
        """The same names on small widths: every dimension of 128 or more divided by one factor, products and equalities kept.

        Factors of a Kronecker product and blocks of a rotation are reduced alone: the magnitude or rescale beside them follows.
        """
        wide = {size for shape in self.shapes.values() for size in shape if size >= 128}
        factor = next(factor for factor in (128, 64, 32, 16, 8, 1) if all(size % factor == 0 for size in wide))
        return Table(self.name, {key: self._reduced(key, factor) for key in self.shapes})

    def _reduced(self, key: str, factor: int) -> tuple[int, ...]:
        shape = self.shapes[key]
        stem, _, leaf = key.rpartition(".")
        if leaf.startswith("oft_blocks"):
            return (shape[0], 4, 4)
        if leaf == "0" or leaf in ("1", "2"):  # oft_blocks.0
            return (shape[0], 4, 4)
        if f"{stem}.oft_blocks" in self.shapes and leaf == "rescale":
            return (self.shapes[f"{stem}.oft_blocks"][0] * 4, *shape[1:])
        if f"{stem}.lokr_w1" in self.shapes:
            return self._kronecker(stem, leaf, shape)
        return tuple(size // factor if size >= 128 else size for size in shape)

    def _kronecker(self, stem: str, leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """w1 stays, w2 becomes an eighth: widths stay in proportion across the modules of a file."""
        one = self.shapes[f"{stem}.lokr_w1"]
        if leaf == "lokr_w1":
            return shape
        second = self._second(stem)
        small = tuple(size // 8 if size >= 32 else size for size in second)
        if leaf == "lokr_w2":
            return (*small, *shape[2:])
        if leaf == "dora_scale":
            return (one[0] * small[0], *shape[1:]) if shape[0] > 1 else (1, one[1] * small[1], *shape[2:])
        if leaf == "lokr_w2_a":
            return (shape[0], small[0]) if f"{stem}.lokr_t2" in self.shapes else (small[0], shape[1])
        if leaf == "lokr_w2_b":
            kernel = 1 if f"{stem}.lokr_t2" in self.shapes else shape[1] // second[1]
            return (shape[0], small[1] * kernel)
        return shape

    def _second(self, stem: str) -> tuple[int, int]:
        """(out, in) of the second factor."""
        if f"{stem}.lokr_w2" in self.shapes:
            return self.shapes[f"{stem}.lokr_w2"][:2]  # type: ignore[return-value]
        a, b = self.shapes[f"{stem}.lokr_w2_a"], self.shapes[f"{stem}.lokr_w2_b"]
        if f"{stem}.lokr_t2" in self.shapes:
            return a[1], b[1]
        kernel = 9 if "conv" in stem and b[1] % 9 == 0 and "shortcut" not in stem else 1
        return a[0], b[1] // kernel


def rank_of(stem: str, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The rank of a module by its own shapes."""
    for leaf, axis in (
        ("lora_down.weight", 0),
        ("hada_w1_b", 0),
        ("lokr_w2_b", 0),
        ("lokr_w1_b", 0),
        ("b2.weight", 0),
        ("lora_A.weight", 0),
    ):
        if f"{stem}.{leaf}" in shapes:
            return shapes[f"{stem}.{leaf}"][axis]
    return None


def noise(key: str, shape: tuple[int, ...], size: float = 0.1) -> torch.Tensor:
    """Normal values in float64 that depend on the key alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64) * size


def values(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, ratio: float = 0.5, blocks: bool = False) -> Tensors:
    """A tensor for every key. ratio: alpha over rank; blocks: the up factor of a fused module is block-diagonal."""
    found: Tensors = {}
    for key, shape in shapes.items():
        stem, _, leaf = key.rpartition(".")
        if leaf == "alpha":
            found[key] = torch.tensor(ratio * (rank_of(stem, shapes) or 16), dtype=dtype).reshape(shape)
        elif leaf == "on_input":
            found[key] = torch.tensor(on_input(key))
        elif leaf in ("dora_scale", "rescale"):
            found[key] = (1 + noise(key, shape)).to(dtype)
        elif "oft_blocks" in key:
            found[key] = noise(key, shape, 0.02).to(dtype)
        elif leaf in ("w_norm", "b_norm", "diff", "diff_b"):
            found[key] = noise(key, shape, 0.01).to(dtype)
        else:
            found[key] = noise(key, shape).to(dtype)
        if blocks and _parts(stem) and leaf == "weight" and stem.endswith(("lora_up", "lora_B")):
            found[key] = _block_diagonal(found[key], _heights(stem, shape[0], shapes))
    return found


_FUSED = re.compile(r"(qkv|linear1)\.lora_(?:up|B)$")


def _parts(stem: str) -> bool:
    return _FUSED.search(stem) is not None


def _heights(stem: str, out: int, shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
    """Rows of the parts of a fused module: its input width is that of q."""
    down = stem.replace("lora_up", "lora_down").replace("lora_B", "lora_A")
    h = shapes[f"{down}.weight"][1]
    if stem.endswith(("linear1.lora_up", "linear1.lora_B")):
        return [h, h, h, out - 3 * h]
    return [h, (out - h) // 2, (out - h) // 2]


def _block_diagonal(up: torch.Tensor, heights: list[int]) -> torch.Tensor:
    """`up` with the columns of each part's rows apart: a share of the rank each."""
    rank = up.shape[1]
    edges = [rank * part // len(heights) for part in range(len(heights) + 1)]
    mask, row = torch.zeros_like(up), 0
    for part, height in enumerate(heights):
        mask[row : row + height, edges[part] : edges[part + 1]] = 1
        row += height
    return up * mask


def save(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    save_file(tensors, path, dict(metadata) if metadata else None)
    return path


def lora(stem: str, shape: tuple[int, ...], rank: int = 4, alpha: float | None = 2.0, scheme: str = "kohya") -> Tensors:
    """One LoRA module: shape is that of the weight, (out, in, *kernel)."""
    up, down = {
        "kohya": ("lora_up.weight", "lora_down.weight"),
        "peft": ("lora_B.weight", "lora_A.weight"),
        "dot": ("lora.up.weight", "lora.down.weight"),
        "linear-layer": ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
        "updown": ("up.weight", "down.weight"),
    }[scheme]
    kernel = shape[2:]
    found = {
        f"{stem}.{down}": noise(f"{stem}.{down}", (rank, *shape[1:])).float(),
        f"{stem}.{up}": noise(f"{stem}.{up}", (shape[0], rank, *(1 for _ in kernel))).float(),
    }
    if alpha is not None:
        found[f"{stem}.alpha"] = torch.tensor(float(alpha))
    return found


def delta(tensors: Mapping[str, torch.Tensor], stem: str) -> torch.Tensor:
    """scale · up @ down of one module in float64, whatever its scheme."""
    pairs = (("lora_up", "lora_down"), ("lora_B", "lora_A"), ("lora.up", "lora.down"))
    up, down = next((f"{stem}.{up}.weight", f"{stem}.{down}.weight") for up, down in pairs if f"{stem}.{up}.weight" in tensors)
    alpha = tensors.get(f"{stem}.alpha")
    rank = tensors[down].shape[0]
    scale = 1.0 if alpha is None else float(alpha) / rank
    return scale * tensors[up].double().flatten(1) @ tensors[down].double().flatten(1)


def rel(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.flatten(1) - expected).norm() / expected.norm())


def refusal(call: object, *arguments: object, **options: object) -> LoraToolsError:
    """The error a call ends with; fails if it ends well."""
    with pytest.raises(LoraToolsError) as caught:
        call(*arguments, **options)  # type: ignore[operator]
    return caught.value


def told(error: LoraToolsError) -> str:
    """All that an error says."""
    return "\n".join([error.message, *error.details, error.fix or ""])


# ------------------------------------------------------------------------------------------------------------- shapes alone

Shapes = dict[str, tuple[int, ...]]


def flat(name: str, out: int, in_: int, *kernel: int, prefix: str = "lora_unet_", rank: int = 8) -> Shapes:
    """A kohya module: the shapes of its three tensors."""
    stem = prefix + name.replace(".", "_")
    one = tuple(1 for _ in kernel)
    return {f"{stem}.lora_down.weight": (rank, in_, *kernel), f"{stem}.lora_up.weight": (out, rank, *one), f"{stem}.alpha": ()}


def peft(name: str, out: int, in_: int, rank: int = 8) -> Shapes:
    return {f"{name}.lora_A.weight": (rank, in_), f"{name}.lora_B.weight": (out, rank)}


def look(*modules: Shapes, metadata: dict[str, str] | None = None, arch: str | None = None) -> Detection:
    shapes = {key: shape for module in modules for key, shape in module.items()}
    return detect(blank(shapes), metadata or {}, arch=named_architecture(arch) if arch else None)


def names(found: Detection) -> set[str]:
    return {candidate.architecture.name for candidate in found.candidates}

"""Files made byte by byte, and the small adapters the tests of operations are about. Nothing here shares code with the library.

Block 3 of the up path has attention in SD1 and SD2 only, and its 1x1 convolutions are SD1's: files with `PROJ` are no riddle.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Make = Callable[..., torch.Tensor]
Save = Callable[..., Path]
Tensors = Mapping[str, torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]

ATTENTION = "up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q"
PROJ = "up_blocks.3.attentions.0.proj_in"
CONV = "up_blocks.3.resnets.0.conv1"
FF = "up_blocks.3.attentions.0.transformer_blocks.0.ff.net.2"
SHAPES = {ATTENTION: (16, 16), PROJ: (16, 16, 1, 1), CONV: (16, 32, 3, 3), FF: (16, 64)}
NATIVE = {  # the same in ldm's names
    ATTENTION: "output_blocks.9.1.transformer_blocks.0.attn1.to_q",
    PROJ: "output_blocks.9.1.proj_in",
    CONV: "output_blocks.9.0.in_layers.2",
    FF: "output_blocks.9.1.transformer_blocks.0.ff.net.2",
}

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL"}


def render(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file by the format's own words: u64 length, JSON padded to 8 bytes, tensors in the order given."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    payload = b""
    for name, tensor in tensors.items():
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [len(payload), len(payload) + len(data)]}
        payload += data
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + payload


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header, payload) of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def kohya(path: str) -> str:
    return "lora_unet_" + path.replace(".", "_")


def factors(randn: Make, shape: tuple[int, ...], rank: int = 4) -> Pair:
    """(up (out, rank[, 1, 1]), down (rank, in[, k, k]))."""
    return randn(shape[0], rank, *(1 for _ in shape[2:])), randn(rank, *shape[1:])


def written(stem: str, up: torch.Tensor, down: torch.Tensor, alpha: float | None = 2.0) -> dict[str, torch.Tensor]:
    found = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    return found if alpha is None else {**found, f"{stem}.alpha": torch.tensor(alpha)}


def four(randn: Make) -> dict[str, Pair]:
    return {path: factors(randn, shape) for path, shape in SHAPES.items()}


def kohya_file(pairs: Mapping[str, Pair], alpha: float | None = 2.0) -> dict[str, torch.Tensor]:
    return {key: tensor for path, pair in pairs.items() for key, tensor in written(kohya(path), *pair, alpha).items()}


def dense(up: torch.Tensor, down: torch.Tensor, scale: float) -> torch.Tensor:
    """ΔW as a matrix, in float64."""
    return scale * (up.double().flatten(1) @ down.double().flatten(1))


def width(expression: str, dims: Mapping[str, int]) -> int | None:
    """The value of a table's expression ("3h+mlp") for widths of our own choice; None where one is not among them."""
    terms = re.findall(r"(\d*)([a-z_]\w*)|(\d+)", expression)
    if any(symbol and symbol not in dims for _, symbol, _ in terms):
        return None
    return sum(int(factor or 1) * dims[symbol] if symbol else int(number) for factor, symbol, number in terms)

"""Files made by hand and deltas computed by hand: nothing here shares code with the library.

Block 3 of the up path has attention in SD1 and SD2 only, and its 1x1 convolutions are SD1's: files with `Q`, `PROJ` are no riddle.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from loratools.cli.main import cli

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL"}

Tensors = Mapping[str, torch.Tensor]


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


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """`save("a.safetensors", {name: tensor}, {metadata})` → its path."""

    def write(name: str, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(render(tensors, metadata))
        return path

    return write


@pytest.fixture
def peft(save: Callable[..., Path]) -> Callable[..., Path]:
    """`peft("folder", {name: tensor}, {config})`: adapter_model.safetensors beside adapter_config.json."""

    def write(name: str, tensors: Tensors, config: Mapping[str, Any]) -> Path:
        folder = save(f"{name}/adapter_model.safetensors", tensors, {"format": "pt"}).parent
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
        return folder

    return write


@pytest.fixture
def run() -> Callable[..., Result]:
    """The command line in this process: `run("inspect", path)` → exit_code, stdout, stderr."""

    def call(*arguments: object, **settings: Any) -> Result:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments], **settings)

    return call


@pytest.fixture
def randn() -> Callable[..., torch.Tensor]:
    """randn(*shape, dtype=float32): the same values in every run."""
    noise = torch.Generator().manual_seed(7)

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=noise, dtype=torch.float64).to(dtype)

    return make


@pytest.fixture
def digest() -> Callable[[Path], str]:
    return lambda path: hashlib.sha256(path.read_bytes()).hexdigest()

"""What the tests of operations are given: a way to write a file, a folder, seeded values, the command line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from loratools.cli.main import cli
from tests.operations.made import Tensors, render


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

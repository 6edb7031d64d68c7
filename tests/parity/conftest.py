"""The tiny bases, built once a session, and conversions that must not lose anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from fixtures import make
from loratools.operations.convert import convert as operation


@pytest.fixture(scope="session")
def bases() -> Callable[[str], make.Base]:
    """`bases("sd1")`: shared by all tests, hence never to be changed."""
    built: dict[str, make.Base] = {}

    def base(name: str) -> make.Base:
        if name not in built:
            built[name] = make.base(name)
        return built[name]

    return base


@pytest.fixture(scope="session")
def llama() -> torch.nn.Module:
    return make.llama()


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., Path]:
    """`convert(source, "kohya")` → the written path. Fails unless every tensor arrived, to float32's last bits."""

    def call(source: Path, dialect: str, **options: Any) -> Path:
        number = len(list(tmp_path.glob("converted*")))
        out = tmp_path / f"converted{number}{'' if dialect == 'peft' else '.safetensors'}"
        result = operation(source, out, dialect, **options)
        assert result["dropped"] == []
        assert result["kept"] == []
        assert result["max_relative_error"] < 1e-6
        return out

    return call

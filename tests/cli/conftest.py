"""A runner for the command line, and stand-ins for the operations behind it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from loratools.cli.main import cli


@pytest.fixture
def run() -> Callable[..., Result]:
    """`run("inspect", "a.safetensors")` → exit code, stdout, stderr."""

    def call(*arguments: object, **settings: Any) -> Result:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments], **settings)

    return call


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], list[dict[str, Any]]]:
    """`calls = fake("convert", result)`: the operation returns (or raises) `result`; `calls` records its arguments."""

    def install(name: str, result: Any) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def operation(*arguments: Any, **options: Any) -> Any:
            calls.append({"arguments": arguments, **options})
            found = result(*arguments) if callable(result) and not isinstance(result, type) else result
            if isinstance(found, BaseException):
                raise found
            return found

        module = ModuleType(f"loratools.operations.{name}")
        setattr(module, name, operation)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return calls

    return install


def only_json(result: Result) -> dict[str, Any]:
    """The one JSON object on stdout; fails if anything else is there."""
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


@pytest.fixture
def parsed() -> Callable[[Result], dict[str, Any]]:
    return only_json


@pytest.fixture
def page() -> dict[str, Any]:
    """What `inspect` says about a small adapter, with every key of the contract."""
    module = {
        "site": "denoiser.mid_block.attentions.0.proj_in",
        "component": "denoiser",
        "kind": "lora",
        "rank": 4,
        "alpha": 2.0,
        "scale": 0.5,
        "shape": [32, 16],
        "dtype": "F16",
        "keys": ["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"],
    }
    return {
        "path": "style.safetensors",
        "kind": "adapter",
        "container": "safetensors",
        "dialect": "kohya",
        "architecture": "sd1",
        "variant": None,
        "ambiguous": False,
        "candidates": [],
        "adapter": {
            "modules": 1,
            "parameters": 192,
            "kinds": {"lora": 1},
            "components": {"denoiser": 1},
            "ranks": {"4": 1},
            "alphas": {"2.0": 1},
            "alpha_source": "tensor",
            "dtypes": {"F16": 2},
        },
        "checkpoint": None,
        "metadata": {"ss_network_dim": "4", "ss_sd_model_name": "base.safetensors", "ss_steps": "None"},
        "trigger_words": ["ohwx"],
        "unknown_keys": [],
        "problems": [],
        "hashes": None,
        "modules": [module],
    }

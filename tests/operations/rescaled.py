"""What the tests of rescale-alpha share: a file of every kind and dialect, and how far its deltas are from what they should be."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.operations.made import ATTENTION, CONV, FF, PROJ, SHAPES, Make, Pair, Save, factors, kohya, kohya_file, parts, written
from tests.reference import deltas

A, C, NORM = kohya(ATTENTION), kohya(CONV), kohya("up_blocks.3.attentions.0.norm")
P = kohya(PROJ)

# kind → its tensors at one site of SD1; three / rank is no power of two
KINDS = ["lora", "conv", "tucker", "loha", "lokr", "lokr-w1", "lokr-full"]


def kind_of(name: str, randn: Make) -> dict[str, torch.Tensor]:
    three = torch.tensor(3.0)
    pairs = {"a": (16, 2), "b": (2, 16)}
    return {
        "lora": lambda: written(A, *factors(randn, (16, 16)), 3.0),
        "conv": lambda: written(C, *factors(randn, SHAPES[CONV]), 3.0),
        "tucker": lambda: {
            f"{C}.alpha": three,
            f"{C}.lora_down.weight": randn(4, 32, 1, 1),
            f"{C}.lora_mid.weight": randn(4, 4, 3, 3),
            f"{C}.lora_up.weight": randn(16, 4, 1, 1),
        },
        "loha": lambda: {f"{A}.alpha": three, **{f"{A}.hada_w{n}_{part}": randn(*pairs[part]) for n in (1, 2) for part in "ab"}},
        "lokr": lambda: {f"{A}.alpha": three, f"{A}.lokr_w1": randn(4, 2), f"{A}.lokr_w2_a": randn(4, 4), f"{A}.lokr_w2_b": randn(4, 8)},
        "lokr-w1": lambda: {f"{A}.alpha": three, f"{A}.lokr_w1_a": randn(4, 2), f"{A}.lokr_w1_b": randn(2, 4), f"{A}.lokr_w2": randn(4, 4)},
        "lokr-full": lambda: {f"{A}.alpha": three, f"{A}.lokr_w1": randn(4, 4), f"{A}.lokr_w2": randn(4, 4)},
    }[name]()


def source_of(kind: str, randn: Make, save: Save, dtype: torch.dtype = torch.float32) -> Path:
    """A module of the kind, and one that only SD1 has."""
    tensors = {**kind_of(kind, randn), **kohya_file({PROJ: factors(randn, SHAPES[PROJ])})}
    return save("a.safetensors", {key: tensor if key.endswith("alpha") else tensor.to(dtype) for key, tensor in tensors.items()})


def error_of(before: Path, after: Path, strength: float = 1.0) -> float:
    """The largest relative error of any module's dense delta."""
    wanted, found = deltas(before), deltas(after)
    assert wanted.keys() == found.keys()
    return max(float((found[name] - strength * wanted[name]).norm() / (strength * wanted[name]).norm()) for name in wanted)


def same_keys(before: Path, after: Path, dtype: torch.dtype) -> None:
    old, new = parts(before)[0], parts(after)[0]
    assert [key for key in old if key != "__metadata__"] == [key for key in new if key != "__metadata__"]
    assert all(tensor.dtype == dtype for key, tensor in load_file(after).items() if not key.endswith("alpha"))


Peft = Callable[..., Path]
RANKS = {ATTENTION: 4, PROJ: 8, CONV: 4, FF: 4}
REQUESTS: dict[str, dict[str, Any]] = {
    "alpha": {"alpha": 16.0},
    "rank": {"alpha": "rank"},
    "double": {"strength": 2.0},
    "weak": {"strength": -0.3},
    "fold": {"fold": True},
}


def pairs_of(randn: Make) -> dict[str, Pair]:
    return {path: factors(randn, shape, RANKS[path]) for path, shape in SHAPES.items()}


def spelled(pairs: Mapping[str, Pair], prefix: str = "", a: str = "lora_A.weight", b: str = "lora_B.weight") -> dict[str, torch.Tensor]:
    return {f"{prefix}{path}.{leaf}": tensor for path, (up, down) in pairs.items() for leaf, tensor in ((a, down), (b, up))}


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def check(before: Path, after: Path, strength: float = 1.0, tolerance: float = 3e-7) -> None:
    """Every dense delta is `strength` times what it was."""
    wanted, found = deltas(before), deltas(after)
    assert wanted.keys() == found.keys()
    for name, delta in wanted.items():
        assert float((found[name] - strength * delta).norm() / delta.norm()) < tolerance, name


CONFIGS: dict[str, dict[str, Any]] = {
    "uniform": {"r": 4, "lora_alpha": 6, "rank_pattern": {"proj_in": 8}, "lora_dropout": 0.1},
    "patterns": {"r": 4, "lora_alpha": 6, "rank_pattern": {"proj_in": 8}, "alpha_pattern": {r"to_\w+": 3, "conv1": 10}},
    "rslora": {"r": 4, "lora_alpha": 8, "rank_pattern": {"proj_in": 8}, "use_rslora": True},
}
TARGETS = ["to_q", "proj_in", "conv1", "net.2"]

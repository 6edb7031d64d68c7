"""Modules of every kind for the tests of resize, and what a resize of them has to give, worked out on dense float64 matrices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.operations.made import ATTENTION, CONV, PROJ, SHAPES, Make, factors, kohya, written
from tests.reference import deltas

A, C, P = kohya(ATTENTION), kohya(CONV), kohya(PROJ)
NORM = kohya("up_blocks.3.attentions.0.norm")

KINDS = ["lora", "conv", "tucker", "loha", "loha-conv", "loha-tucker", "lokr", "lokr-both", "lokr-conv", "lokr-full"]


def kind_of(name: str, randn: Make) -> dict[str, torch.Tensor]:
    """A module of one kind at one site of SD1, of an exact LoRA rank of 4 or more; alpha / rank is no power of two."""
    three = torch.tensor(3.0)
    made = {
        "lora": lambda: written(A, *factors(randn, (16, 16), 6), 5.0),
        "conv": lambda: written(C, *factors(randn, SHAPES[CONV], 6), 5.0),
        "tucker": lambda: {
            f"{C}.alpha": three,
            f"{C}.lora_down.weight": randn(6, 32, 1, 1),
            f"{C}.lora_mid.weight": randn(6, 6, 3, 3),
            f"{C}.lora_up.weight": randn(16, 6, 1, 1),
        },
        "loha": lambda: {f"{A}.alpha": three, **{f"{A}.hada_w{n}_{part}": randn(*shape) for n in (1, 2) for part, shape in _AB}},
        "loha-conv": lambda: {
            f"{C}.alpha": three,
            **{f"{C}.hada_w{n}_{part}": randn(*shape) for n in (1, 2) for part, shape in (("a", (16, 2)), ("b", (2, 288)))},
        },
        "loha-tucker": lambda: {
            f"{C}.alpha": three,
            **{f"{C}.hada_t{n}": randn(2, 2, 3, 3) for n in (1, 2)},
            **{f"{C}.hada_w{n}_{part}": randn(*shape) for n in (1, 2) for part, shape in (("a", (2, 16)), ("b", (2, 32)))},
        },
        "lokr": lambda: {f"{A}.alpha": three, f"{A}.lokr_w1": randn(4, 2), f"{A}.lokr_w2_a": randn(4, 2), f"{A}.lokr_w2_b": randn(2, 8)},
        "lokr-both": lambda: {
            f"{A}.alpha": three,
            f"{A}.lokr_w1_a": randn(4, 2), f"{A}.lokr_w1_b": randn(2, 4), f"{A}.lokr_w2_a": randn(4, 2), f"{A}.lokr_w2_b": randn(2, 4),
        },
        "lokr-conv": lambda: {f"{C}.lokr_w1": randn(4, 4), f"{C}.lokr_w2": randn(4, 8, 3, 3), f"{C}.alpha": three},
        "lokr-full": lambda: {f"{A}.alpha": three, f"{A}.lokr_w1": randn(4, 4), f"{A}.lokr_w2": randn(4, 4)},
    }  # fmt: skip
    return made[name]()


_AB = (("a", (16, 3)), ("b", (3, 16)))

# kind → the rank of its exact LoRA
LORA_RANKS = {
    "lora": 6, "conv": 6, "tucker": 6, "loha": 9, "loha-conv": 4, "loha-tucker": 4,
    "lokr": 4, "lokr-both": 4, "lokr-conv": 16, "lokr-full": 16,
}  # fmt: skip


def anchor(randn: Make, rank: int = 1) -> dict[str, torch.Tensor]:
    """A module that only SD1 has, so that no file is a riddle; of rank 1, so that nothing cuts it."""
    return written(P, *factors(randn, (16, 16, 1, 1), rank), 1.0)


def kept(sigma: torch.Tensor, *, rank: int | None = None, energy: float = 0, error: float = 1, ratio: float = 1e300) -> int:
    """How many singular values the words of the options ask for, by counting."""
    squares = [value**2 for value in sigma.tolist()]
    total = sum(squares)
    count = 1
    while sum(squares[:count]) < energy * total - 1e-12 * total or sum(squares[count:]) > error**2 * total:
        count += 1
    if energy == 0 and error == 1:
        count = len(squares)
    count = min(count, sum(1 for value in sigma.tolist() if value * ratio >= float(sigma[0]) * (1 - 1e-12)))
    return count if rank is None else min(count, rank)


def spectrum(path: Path, stem: str) -> torch.Tensor:
    """Singular values of a module's ΔW, those that are nothing but rounding left out."""
    sigma = torch.linalg.svdvals(deltas(path)[stem].flatten(1))
    return sigma[sigma > sigma[0] * 1e-12]


def error_of(before: Path, after: Path, stem: str) -> float:
    """‖ΔW after - ΔW before‖ / ‖ΔW before‖ of one module."""
    first, second = deltas(before)[stem], deltas(after)[stem]
    assert first.numel() == second.numel()
    return float((second.flatten() - first.flatten()).norm() / first.norm())


def whole_error(before: Path, after: Path) -> float:
    """√(Σ‖error‖² / Σ‖ΔW‖²) over the file."""
    first, second = deltas(before), deltas(after)
    assert set(first) == set(second)
    error = sum(float((second[name].flatten() - delta.flatten()).norm()) ** 2 for name, delta in first.items())
    return float((error / sum(float(delta.norm()) ** 2 for delta in first.values())) ** 0.5)


def rank_in(path: Path, stem: str) -> int:
    """The rank of a plain LoRA of a kohya file: rows of down, which are the columns of up."""
    tensors = load_file(path)
    down, up = tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"]
    assert down.shape[0] == up.shape[1]
    assert f"{stem}.lora_mid.weight" not in tensors
    return int(down.shape[0])


def same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor], names: list[str]) -> bool:
    """Are these tensors the same bits, in the same dtype and shape?"""
    return all(
        first[name].dtype == second[name].dtype
        and first[name].shape == second[name].shape
        and bool((first[name].flatten().view(torch.uint8) == second[name].flatten().view(torch.uint8)).all())
        for name in names
    )

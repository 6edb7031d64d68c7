"""Seeded factors and what two of them are compared by."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from loratools.tensors.lazy import LazyTensor, from_torch

Rand = Callable[..., LazyTensor]


@pytest.fixture
def rand() -> Rand:
    """rand(*shape, dtype=torch.float32, size=1.0): normal values, the same in every run."""
    generator = torch.Generator().manual_seed(20240229)

    def make(*shape: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> LazyTensor:
        return from_torch((torch.randn(shape, generator=generator, dtype=torch.float64) * size).to(dtype))

    return make


@pytest.fixture
def rel() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Relative Frobenius error of the first against the second, in float64."""

    def error(found: torch.Tensor, expected: torch.Tensor) -> float:
        assert found.shape == expected.shape
        return float((found.double() - expected.double()).norm() / expected.double().norm())

    return error


@pytest.fixture
def identical() -> Callable[[object, object], None]:
    """Assert that two modules hold the same roles with the same dtype, shape and bits, and the same alpha."""

    def check(found: object, expected: object) -> None:
        left, right = found.factors, expected.factors  # type: ignore[attr-defined]
        assert type(found) is type(expected)
        assert set(left) == set(right)
        for role in right:
            assert (left[role].dtype, left[role].shape) == (right[role].dtype, right[role].shape), role
            assert b"".join(left[role].chunks()) == b"".join(right[role].chunks()), role
        assert found.alpha == expected.alpha  # type: ignore[attr-defined]

    return check

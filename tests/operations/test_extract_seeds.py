"""extract: the random numbers of a site are its own. They depend on --seed and the site, not on the order of the work or its threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.tuned import matrices, tuned
from loratools.operations.extract import extract
from loratools.operations.extracting import decomposing
from tests.operations.merge_by_hand import flux, save

Drawn = list[tuple[tuple[int, ...], int]]  # (shape of D, seed) of each site
Record = Callable[..., Drawn]


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Record:
    """What the sites of an extraction draw from: extract runs as it is, and each decomposition is noted."""
    tensors = flux(torch.float32, 48)
    base = save(tmp_path / "base.safetensors", tensors)
    other = save(tmp_path / "tuned.safetensors", tuned(tensors, only=matrices))
    work = decomposing.decompose

    def recorded(**settings: Any) -> Drawn:
        found: Drawn = []

        def noted(matrix: torch.Tensor, *args: Any, seed: int, **options: Any) -> Any:
            found.append((tuple(matrix.shape), seed))
            return work(matrix, *args, seed=seed, **options)

        monkeypatch.setattr(decomposing, "decompose", noted)
        told = extract(base, other, tmp_path / "out.safetensors", rank=4, force=True, **settings)
        assert len(found) == told["modules"]
        return sorted(found)

    return recorded


def test_sites_of_one_shape_draw_different_numbers(record: Record) -> None:
    drawn = record()
    shapes = [shape for shape, _ in drawn]
    assert len(set(shapes)) < len(shapes), "no two sites of one shape: the test would say nothing"
    assert len({seed for _, seed in drawn}) == len(drawn)


def test_a_seed_changes_them_all(record: Record) -> None:
    seeds = [{seed for _, seed in record(seed=value)} for value in (0, 1, 2)]
    assert len(set.union(*seeds)) == sum(map(len, seeds))


def test_they_are_the_same_in_any_order_and_company(record: Record) -> None:
    whole = record(seed=7, threads=1)
    assert record(seed=7, threads=1) == whole
    assert record(seed=7, threads=3) == whole
    part = record(seed=7, exclude=["*single_transformer_blocks*"])
    assert len(part) < len(whole)
    assert set(part) < set(whole)

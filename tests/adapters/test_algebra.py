"""Low-rank algebra against dense float64: SVD through the QR core, Gram products, truncation, threads."""

from __future__ import annotations

import threading

import pytest
import torch

from loratools.adapters import algebra


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("out", "rank", "inner"), [(40, 3, 24), (3, 8, 24), (24, 8, 3), (1, 1, 1), (5, 20, 5)])
def test_the_core_has_the_svd_of_the_product(out: int, rank: int, inner: int) -> None:
    up, down = random(out, rank), random(rank, inner, seed=1)
    left, sigma, right = algebra.core_svd(up, down)
    k = min(out, rank, inner)
    assert (left.shape, sigma.shape, right.shape) == ((out, k), (k,), (k, inner))
    torch.testing.assert_close(left * sigma @ right, up @ down, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(left.t() @ left, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(sigma, torch.linalg.svdvals(up @ down)[:k], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (600, 530), (530, 700)])
@pytest.mark.parametrize("limit", [None, 7])
def test_a_dense_svd_of_either_road(shape: tuple[int, int], limit: int | None) -> None:
    """Above 512 it comes from the smaller Gram matrix."""
    delta = random(shape[0], 40) @ random(40, shape[1], seed=1) + 1e-3 * random(*shape, seed=2)
    left, sigma, right = algebra.matrix_svd(delta, limit)
    true = torch.linalg.svdvals(delta)
    count = limit or min(shape)
    assert (left.shape, right.shape) == ((shape[0], count), (count, shape[1]))
    torch.testing.assert_close(sigma, true[:count], rtol=1e-6, atol=1e-8 * float(true[0]))
    error = float((left * sigma @ right - delta).norm())
    assert error == pytest.approx(float(true[count:].norm()), rel=1e-9, abs=1e-10)


def test_a_matrix_without_full_rank_is_finite_on_the_gram_road() -> None:
    _, sigma, right = algebra.matrix_svd(random(600, 2) @ random(2, 600, seed=1))
    assert bool(torch.isfinite(right).all())
    assert float(sigma[2:].max()) < 1e-6 * float(sigma[0])
    assert all(not tensor.any() for tensor in algebra.matrix_svd(torch.zeros(520, 600, dtype=torch.float64))[1:])


def test_balanced_factors_of_the_best_approximation() -> None:
    delta = random(12, 9)
    up, down = algebra.balanced(algebra.truncate(algebra.matrix_svd(delta), 4))
    values = torch.linalg.svdvals(delta)
    assert float((up @ down - delta).norm()) == pytest.approx(float(values[4:].norm()), rel=1e-12)
    torch.testing.assert_close(up.norm(dim=0), values[:4].sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(down.norm(dim=1), values[:4].sqrt(), rtol=1e-12, atol=0)


def test_inner_products_and_differences_without_the_product() -> None:
    up, down, other_up, other_down = random(20, 3), random(3, 15, seed=1), random(20, 5, seed=2), random(5, 15, seed=3)
    one, two = up @ down, other_up @ other_down
    assert algebra.gram_inner(up, down, other_up, other_down) == pytest.approx(float((one * two).sum()), rel=1e-12)
    assert algebra.difference_norm((up, down), (other_up, other_down)) == pytest.approx(float((one - two).norm()), rel=1e-12)
    joined = algebra.joined([(2.0, (up, down)), (-0.5, (other_up, other_down))])
    torch.testing.assert_close(joined[0] @ joined[1], 2 * one - 0.5 * two, rtol=1e-12, atol=1e-12)
    assert joined[0].shape == (20, 8)


def test_a_small_difference_is_not_lost_to_cancellation() -> None:
    """From Gram matrices it would be √eps ≈ 1e-8 at best."""
    up, down = random(20, 3), random(3, 15, seed=1)
    moved = up + 1e-12 * random(20, 3, seed=2)
    true = float(((moved - up) @ down).norm())
    assert algebra.difference_norm((up, down), (moved, down)) == pytest.approx(true, rel=1e-2)


@pytest.mark.parametrize("threads", [1, 3])
def test_items_keep_their_order_and_each_has_one_blas_thread(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = list(algebra.in_parallel(lambda item: (item, torch.get_num_threads(), threading.current_thread().name), range(20), threads))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert [item for item, _, _ in seen] == list(range(20))
    assert {count for _, count, _ in seen} == {1}
    assert len({name for _, _, name in seen}) <= threads


def test_an_error_of_one_item_is_the_callers() -> None:
    def fail(item: int) -> int:
        if item == 3:
            raise KeyError("three")
        return item

    with pytest.raises(KeyError):
        list(algebra.in_parallel(fail, range(50), 2))

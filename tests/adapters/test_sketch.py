"""The randomized decomposition against LAPACK's in float64, the passes it takes, and its certificate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from loratools.adapters import algebra
from loratools.adapters import sketch as under_test
from loratools.adapters.algebra import Criterion
from loratools.adapters.sketch import Sketch, decompose, residual_norms, sketch

F64 = torch.float64
SHAPES = [(400, 600), (600, 400)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def with_values(values: torch.Tensor, out: int, inner: int, seed: int = 0) -> torch.Tensor:
    """A matrix (out, inner) with these singular values, in float64."""
    left = torch.linalg.qr(random(out, len(values), seed=seed))[0]
    right = torch.linalg.qr(random(inner, len(values), seed=seed + 1))[0]
    return left * values @ right.t()


def spectrum(kind: str, out: int, inner: int) -> torch.Tensor:
    index = torch.arange(1, min(out, inner) + 1, dtype=F64)
    laws = {"harmonic": 1 / index, "exponential": torch.exp(-index / 6), "root": index**-0.5}
    return (random(out, inner, seed=7) if kind == "flat" else with_values(laws[kind], out, inner)).float()


def best_error(delta: torch.Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(delta.to(F64))[rank:].norm())


def error(delta: torch.Tensor, found: Sketch) -> float:
    return float((delta.to(F64) - found.left * found.sigma @ found.right).norm())


def same_bits(one: Sketch, two: Sketch) -> bool:
    return one.tail == two.tail and all(torch.equal(ours, theirs) for ours, theirs in zip(one.svd, two.svd, strict=True))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """One entry a pass over the matrix: the dtype of its sums."""
    seen: list[torch.dtype] = []
    product = under_test._product

    def counted(matrix: torch.Tensor, thin: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        seen.append(dtype)
        return product(matrix, thin, dtype)

    monkeypatch.setattr(under_test, "_product", counted)
    return seen


def break_svd(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """LAPACK's `name` (svd, eigh) does not converge, ever; the result has one entry a try."""
    tries: list[str] = []

    def failing(*_: object, **__: object) -> None:
        tries.append(name)
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, name, failing)
    return tries


# --------------------------------------------------------------------------------------------------------------------- the sketch


@pytest.mark.parametrize(("kind", "factor"), [("harmonic", 1.002), ("exponential", 1.002), ("root", 1.002), ("flat", 1.01)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_the_best_of_its_rank_whatever_the_seed(
    kind: str, factor: float, shape: tuple[int, int], passes: list[torch.dtype]
) -> None:
    delta = spectrum(kind, *shape)
    best = best_error(delta, 32)
    for seed in (0, 1, 2):
        found = sketch(delta, 32, seed=seed)
        assert (found.left.shape, found.sigma.shape, found.right.shape) == ((shape[0], 32), (32,), (32, shape[1]))
        assert {part.dtype for part in found.svd} == {F64}
        assert best * (1 - 1e-9) <= error(delta, found) <= factor * best
        assert math.sqrt(found.tail) == pytest.approx(error(delta, found), rel=1e-4)
    assert len(passes) >= 9, "this was to be a sketch, not an exact decomposition"


@pytest.mark.parametrize("shape", SHAPES)
def test_vectors_are_orthonormal_and_values_sorted(shape: tuple[int, int]) -> None:
    found = sketch(spectrum("harmonic", *shape), 20, seed=0)
    for gram in (found.left.t() @ found.left, found.right @ found.right.t()):
        torch.testing.assert_close(gram, torch.eye(20, dtype=F64), rtol=0, atol=1e-10)
    assert found.sigma.tolist() == sorted(found.sigma.tolist(), reverse=True)
    torch.testing.assert_close(found.sigma[:5], 1 / torch.arange(1, 6, dtype=F64), rtol=1e-5, atol=0)


def test_vectors_are_orthonormal_where_values_differ_by_thousands(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round of Cholesky would leave the square of that: 1e-8. Householder's way, for what Cholesky cannot do, has the same result."""
    delta = with_values(torch.tensor([10.0 ** -(index / 8) for index in range(400)], dtype=F64), 400, 600)
    one = sketch(delta, 20, seed=0, iterations=0)
    monkeypatch.setattr(algebra, "_CONDITION", 1.0)
    for found in (one, sketch(delta, 20, seed=0, iterations=0)):
        for gram in (found.left.t() @ found.left, found.right @ found.right.t()):
            torch.testing.assert_close(gram, torch.eye(20, dtype=F64), rtol=0, atol=1e-12)
        torch.testing.assert_close(found.sigma[:5], torch.linalg.svdvals(delta)[:5], rtol=1e-3, atol=0)


def test_float64_is_decomposed_in_float64(passes: list[torch.dtype]) -> None:
    delta = with_values(torch.tensor([10.0 ** -(index / 4) for index in range(400)], dtype=F64), 400, 600)
    found = sketch(delta, 40, seed=0)
    assert set(passes) == {F64}
    assert error(delta, found) <= 1.002 * best_error(delta, 40) <= 1e-8


@pytest.mark.parametrize("rank", [16, 24])
def test_a_low_rank_of_float32_is_found_to_its_last_digits(rank: int, passes: list[torch.dtype]) -> None:
    """What is lost is below the rounding of float32 products: the last passes are made in float64."""
    delta = (random(500, 16) @ random(16, 700, seed=1)).float()
    found = sketch(delta, rank, seed=0)
    assert error(delta, found) <= 1e-7 * float(delta.norm())
    assert found.tail <= 1e-13 * float(delta.norm()) ** 2
    assert (passes[0], passes[-1]) == (torch.float32, F64)


def test_the_same_seed_gives_the_same_bits_for_any_number_of_threads() -> None:
    delta = spectrum("root", 600, 900)
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(sketch(delta, 24, seed=5))
            assert torch.get_num_threads() == count
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


def test_the_global_generator_plays_no_part_and_is_left_alone() -> None:
    delta = spectrum("root", *SHAPES[0])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = sketch(delta, 8, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same_bits(one, sketch(delta, 8, seed=0))
    assert not torch.equal(one.left, sketch(delta, 8, seed=1).left)


@pytest.mark.parametrize("exponent", [60, -60, 120, -100])
@pytest.mark.parametrize("shape", [(400, 600), (40, 60)])
def test_a_power_of_two_scales_the_values_and_nothing_else(exponent: int, shape: tuple[int, int]) -> None:
    """At 2^120 and 2^-100 sums and products of float32 over- and underflow as they are."""
    delta = with_values(torch.full((min(shape),), 1.0, dtype=F64), *shape).clamp(min=1e-3).float()  # no entry becomes subnormal
    one, other = sketch(delta, 8, seed=0), sketch(delta * 2.0**exponent, 8, seed=0)
    assert torch.equal(other.sigma, one.sigma * 2.0**exponent)
    assert torch.equal(other.left, one.left)
    assert torch.equal(other.right, one.right)
    assert other.tail == one.tail * 2.0 ** (2 * exponent)


@pytest.mark.parametrize("factor", [1e-42, 1e-30, 1e30, 1e36])
def test_tiny_and_huge_matrices(factor: float) -> None:
    """1e-42 is subnormal: entries keep three digits, and so does the rest."""
    delta = (with_values(torch.linspace(1, 0.5, 4, dtype=F64), 300, 400) * 300 * factor).float()
    found = sketch(delta, 4, seed=0)
    digits = 1e-2 if factor < 1e-38 else 1e-5
    torch.testing.assert_close(found.sigma / factor, 300 * torch.linspace(1, 0.5, 4, dtype=F64), rtol=digits, atol=0)
    assert bool(torch.isfinite(found.left).all())
    assert bool(torch.isfinite(found.right).all())


@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (1, 1), (5, 300), (300, 700), (700, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_nothing_is_found_in_nothing(shape: tuple[int, int], dtype: torch.dtype) -> None:
    found = sketch(torch.zeros(shape, dtype=dtype), 4, seed=0)
    assert not found.sigma.any()
    assert found.tail == 0.0
    assert all(bool(torch.isfinite(part).all()) for part in found.svd)
    (_, sigma, _), tail = decompose(torch.zeros(shape, dtype=dtype), Criterion(), seed=0, auto=True)
    assert (sigma.tolist(), tail) == ([0.0], 0.0)


@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (7, 5), (5, 300), (300, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_rank_beyond_the_sides_gives_all_there_is(shape: tuple[int, int], dtype: torch.dtype) -> None:
    delta = random(*shape).to(dtype)
    found = sketch(delta, 400, seed=0)
    assert found.sigma.shape == (min(shape),)
    torch.testing.assert_close(found.sigma, torch.linalg.svdvals(delta.to(F64)), rtol=1e-7, atol=0)
    assert error(delta, found) <= 1e-12 * float(delta.norm())


def test_a_matrix_without_full_rank_is_finite_on_every_road() -> None:
    for out, inner in ((600, 530), (200, 100)):
        for dtype in (torch.float32, F64):
            delta = (random(out, 2) @ random(2, inner, seed=1)).to(dtype)
            found = sketch(delta, 12, seed=0)
            assert all(bool(torch.isfinite(part).all()) for part in found.svd)
            assert float(found.sigma[2:].max()) < 1e-6 * float(found.sigma[0])
            assert error(delta, found) <= 1e-7 * float(delta.norm())


# ----------------------------------------------------------------------------------------------------------------------- the passes


def test_a_quick_decay_takes_few_passes(passes: list[torch.dtype]) -> None:
    counts = {}
    for kind in ("exponential", "harmonic", "flat"):
        passes.clear()
        sketch(spectrum(kind, 600, 800), 16, seed=0)
        counts[kind] = len(passes)
    assert counts["exponential"] <= 4
    assert counts["exponential"] < counts["harmonic"] < counts["flat"] <= 18


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_a_given_number_of_iterations_is_made_and_no_more(iterations: int, passes: list[torch.dtype]) -> None:
    sketch(spectrum("root", 600, 800), 16, seed=0, iterations=iterations)
    assert len(passes) == 2 + 2 * iterations


def test_iterations_and_oversampling_bring_the_error_down() -> None:
    delta = spectrum("root", 600, 800)
    by_iterations = [error(delta, sketch(delta, 16, seed=0, iterations=count)) for count in (0, 1, 2)]
    assert by_iterations == sorted(by_iterations, reverse=True)
    by_width = [error(delta, sketch(delta, 16, seed=0, iterations=0, oversample=width)) for width in (0, 16, 64)]
    assert by_width == sorted(by_width, reverse=True)


def test_what_does_not_settle_is_decomposed_exactly(passes: list[torch.dtype]) -> None:
    """A tolerance of nothing is never met by a spectrum whose tail is not."""
    delta = spectrum("flat", 600, 800)
    found = sketch(delta, 16, seed=0, tolerance=0.0)
    assert len(passes) == 2 + 2 * under_test.ITERATIONS
    assert error(delta, found) == pytest.approx(best_error(delta, 16), rel=1e-9)


def test_a_rank_near_half_of_the_smaller_side_is_exact_at_once(passes: list[torch.dtype]) -> None:
    delta = spectrum("root", 400, 600)
    found = sketch(delta, 190, seed=0)
    assert not passes
    assert error(delta, found) == pytest.approx(best_error(delta, 190), rel=1e-9)


@pytest.mark.parametrize("broken", ["svd", "eigh"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("shape", [(60, 90), (400, 600)])
@pytest.mark.parametrize("exact", [True, False])
def test_lapack_that_does_not_converge_changes_nothing(
    broken: str, dtype: torch.dtype, shape: tuple[int, int], exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = spectrum("harmonic", *shape).to(dtype)
    (left, sigma, right), tail = decompose(delta, Criterion(rank=12), seed=0, exact=exact)
    with monkeypatch.context() as patch:
        break_svd(patch, broken)
        (other_left, other_sigma, other_right), other_tail = decompose(delta, Criterion(rank=12), seed=0, exact=exact)
    torch.testing.assert_close(other_sigma, sigma, rtol=1e-9, atol=0)
    torch.testing.assert_close(other_left * other_sigma @ other_right, left * sigma @ right, rtol=0, atol=1e-7)
    assert other_tail == pytest.approx(tail, rel=1e-7)


def test_each_exact_road_is_the_others_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the test above could pass without a failure."""
    for broken, delta in (("svd", random(60, 90)), ("eigh", random(60, 90).float())):
        with monkeypatch.context() as patch:
            tries = break_svd(patch, broken)
            assert error(delta, sketch(delta, 90, seed=0)) <= 1e-12 * float(delta.norm())
        assert tries == [broken]


# -------------------------------------------------------------------------------------------------------------------- the certificate


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [None, 1, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_certificate_is_the_error_of_the_factors_as_written(shape: tuple[int, int], block: int | None, dtype: torch.dtype) -> None:
    delta = spectrum("harmonic", *shape)
    found = sketch(delta, 8, seed=0)
    up, down = (found.left * found.sigma).to(dtype), found.right.to(dtype)
    residual, total = residual_norms(delta, up, down, block)
    assert residual == pytest.approx(float((delta.to(F64) - up.to(F64) @ down.to(F64)).square().sum()), rel=1e-12)
    assert total == pytest.approx(float(delta.to(F64).square().sum()), rel=1e-12)


def test_the_certificate_of_a_residual_of_a_millionth() -> None:
    up, down = random(300, 8), random(8, 400, seed=1)
    rest = random(300, 400, seed=2)
    rest *= 1e-6 * float((up @ down).norm()) / float(rest.norm())
    residual, total = residual_norms(up @ down + rest, up, down)
    assert math.sqrt(residual) == pytest.approx(float(rest.norm()), rel=1e-8)
    assert math.sqrt(residual / total) == pytest.approx(1e-6, rel=1e-6)


def test_the_certificate_takes_factors_of_a_convolution_and_leaves_everything_as_it_was() -> None:
    delta, up, down = random(20, 36).float(), random(20, 3, 1, 1).float(), random(3, 4, 3, 3, seed=1).float()
    before = delta.clone(), up.clone(), down.clone()
    residual, _ = residual_norms(delta, up, down)
    dense = up.to(F64).flatten(1) @ down.to(F64).flatten(1)
    assert residual == pytest.approx(float((delta.to(F64) - dense).square().sum()), rel=1e-12)
    wide = random(20, 36)
    residual_norms(wide, up, down)
    assert torch.equal(wide, random(20, 36))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip((delta, up, down), before, strict=True))


# ---------------------------------------------------------------------------------------------------------------------------- the GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_finds_what_the_cpu_finds() -> None:
    delta = spectrum("harmonic", 600, 800)
    here, there = sketch(delta, 16, seed=0), sketch(delta.cuda(), 16, seed=0)
    assert there.left.is_cuda
    torch.testing.assert_close(there.sigma.cpu(), here.sigma, rtol=1e-5, atol=0)
    assert there.tail == pytest.approx(here.tail, rel=1e-4)
    assert residual_norms(delta.cuda(), (there.left * there.sigma).cpu(), there.right)[0] == pytest.approx(there.tail, rel=1e-4)

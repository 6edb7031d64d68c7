"""fp8 codes and their scale against decoding by hand, one element at a time in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy
import pytest
import torch

from loratools.errors import MalformedError
from loratools.tensors.dtypes import torch_dtype
from loratools.tensors.lazy import from_torch
from loratools.tensors.scaled import (
    ScaledTensor,
    ScaledWeight,
    blocks_of,
    dequantised,
    joined_peaks,
    peak,
    quantised,
    row_step,
    scale_at,
    scale_for,
    scale_rows,
)


def requantised(
    values: torch.Tensor, scale_like: torch.Tensor, dtype: str, block: tuple[int, ...] | None = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, the new scale) of a whole weight: its peaks, the scale for them, the codes under it."""
    scale = scale_for(peak(values, scale_like, block), scale_like, dtype)
    return quantised(values, scale, dtype, block, **options), scale


def by_hand(codes: torch.Tensor, scale: numpy.ndarray, block: tuple[int, ...]) -> numpy.ndarray:  # type: ignore[type-arg]
    """codes · scale in float64, one element at a time. `scale` has one axis for each of the weight's."""
    bits = codes.view(torch.uint8).numpy()
    values = numpy.empty(bits.shape)
    for place in itertools.product(*(range(size) for size in bits.shape)):
        values[place] = e4m3(int(bits[place])) * scale[tuple(i // b for i, b in zip(place, block, strict=True))]
    return values


def e4m3(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return math.nan if code & 0x7F == 0x7F else math.copysign(magnitude, -1.0 if code & 0x80 else 1.0)


def test_all_codes() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for scale in (1.0, 0.0123, 3.7e-5):
        factor = torch.tensor(scale)
        values = dequantised(codes, factor)
        assert values.dtype == torch.float32
        hand = torch.tensor([e4m3(code) * float(factor) for code in range(256)], dtype=torch.float64)
        assert torch.equal(values.nan_to_num(nan=9e9), hand.to(torch.float32).nan_to_num(nan=9e9))
        back = quantised(values, factor, "F8_E4M3").view(torch.uint8).tolist()
        assert [code for code in range(256) if back[code] != code and code & 0x7F != 0x7F] == []


Shape = tuple[int, ...]
# shape, scale's shape, its shape with all axes, block
LAYOUTS: list[tuple[Shape, Shape, Shape, Shape]] = [
    ((6, 9), (), (1, 1), (6, 9)),
    ((6, 9), (1,), (1, 1), (6, 9)),
    ((6, 9), (6,), (6, 1), (1, 9)),
    ((6, 9), (6, 1), (6, 1), (1, 9)),
    ((6, 9), (2, 3), (2, 3), (4, 4)),
    ((16, 8), (2, 2), (2, 2), (8, 4)),
    ((6, 9), (1, 3), (1, 3), (6, 4)),
    ((3, 6, 9), (3, 2, 3), (3, 2, 3), (1, 4, 4)),
    ((4, 3, 3, 3), (4,), (4, 1, 1, 1), (1, 3, 3, 3)),
]


def example(shape: tuple[int, ...], full: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random finite codes that fill the range, and scales over four powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 127, shape, generator=generator) + torch.randint(0, 2, shape, generator=generator) * 128
    scale = 10 ** (torch.rand(full, generator=generator) * 4 - 6)
    return codes.to(torch.uint8).view(torch.float8_e4m3fn), scale


@pytest.mark.parametrize(("shape", "stored", "full", "block"), LAYOUTS)
def test_dequantised_is_codes_times_scale(shape: Shape, stored: Shape, full: Shape, block: Shape) -> None:
    codes, scale = example(shape, full)
    hand = by_hand(codes, scale.to(torch.float64).numpy(), block)
    found = dequantised(codes, scale.reshape(stored))
    assert (found.shape, found.dtype) == (codes.shape, torch.float32)
    assert torch.equal(found, torch.from_numpy(hand).to(torch.float32))  # one rounding of the product


@pytest.mark.parametrize("scale_dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize(("shape", "stored", "full", "block"), LAYOUTS)
def test_a_delta_is_added_within_one_step(shape: Shape, stored: Shape, full: Shape, block: Shape, scale_dtype: str) -> None:
    codes, scale = example(shape, full)
    scale = (scale * 100).to(torch_dtype(scale_dtype))
    before = by_hand(codes, scale.to(torch.float64).numpy(), block)
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * float(numpy.abs(before).mean())
    wanted = before + delta.to(torch.float64).numpy()
    new_codes, new_scale = requantised(dequantised(codes, scale.reshape(stored)) + delta, scale.reshape(stored), "F8_E4M3")
    assert (new_codes.shape, new_codes.dtype, new_scale.shape, new_scale.dtype) == (codes.shape, codes.dtype, stored, scale.dtype)
    factors = new_scale.reshape(full).to(torch.float64).numpy()
    after = by_hand(new_codes, factors, block)
    for place in itertools.product(*(range(size) for size in shape)):
        factor = factors[tuple(i // b for i, b in zip(place, block, strict=True))]
        step = max(2.0 ** (math.floor(math.log2(abs(wanted[place]) / factor)) - 3), 2.0**-9) * factor
        assert abs(after[place] - wanted[place]) <= step / 2 * (1 + 1e-5)
    # the range is used: what covers each scale reaches at least half of the largest code
    assert (peak(new_codes.to(torch.float32), new_scale) >= 224).all()


def test_a_delta_added_to_the_codes_is_lost() -> None:
    """ComfyUI#13637: 1e-4 beside a code of 100 is nothing; beside the weight of 0.01 it is one per cent."""
    codes, scale = torch.tensor([100.0, 448.0]).to(torch.float8_e4m3fn), torch.tensor(1e-4)
    naive = (codes.to(torch.float32) + 1e-3).to(torch.float8_e4m3fn)
    assert naive.view(torch.uint8).tolist() == codes.view(torch.uint8).tolist()
    new, factor = requantised(dequantised(codes, scale) + 1e-3, scale, "F8_E4M3")
    assert abs(float(dequantised(new, factor)[0]) - float(codes.to(torch.float32)[0]) * 1e-4 - 1e-3) <= 8e-4 / 2


def test_the_scale_stays_while_it_serves() -> None:
    old = torch.tensor([1.0, 0.5, 0.25, 2.0, 3.0])
    amax = torch.tensor([448.0, 112.0, 56.1, 895.9, 0.0])
    assert torch.equal(scale_for(amax, old, "F8_E4M3"), old)
    below, above = torch.tensor([223.9, 448.1]), torch.tensor([1.5, 1.5])
    assert scale_for(below, above, "F8_E4M3").tolist() != above.tolist()
    untouched = torch.tensor([[100.0, 448.0], [3.0, 240.0]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1e-3], [2e-3]])
    codes, again = requantised(dequantised(untouched, scale), scale, "F8_E4M3")
    assert torch.equal(again, scale)
    assert torch.equal(codes.view(torch.uint8), untouched.view(torch.uint8))


@pytest.mark.parametrize("code_dtype", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("scale_dtype", ["F64", "F32", "BF16", "F16"])
def test_a_new_scale_never_lets_a_value_overflow(scale_dtype: str, code_dtype: str) -> None:
    top = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}[code_dtype]
    step = {"F64": 2.0**-52, "F32": 2.0**-23, "BF16": 2.0**-7, "F16": 2.0**-10}[scale_dtype]
    values = torch.logspace(-1, 4, 500, dtype=torch.float64).to(torch.float32).reshape(500, 1) * torch.tensor([1.0, -0.5])
    old = torch.full((500, 1), 1.8e-7).to(torch_dtype(scale_dtype))  # too small for all of them
    codes, scale = requantised(values, old, code_dtype)
    wide, amax = scale.to(torch.float64).flatten(), values[:, 0].to(torch.float64)
    assert (wide * top >= amax * (1 - 1e-15)).all()  # up ...
    normal = amax / top >= (6.2e-5 if scale_dtype == "F16" else 0)
    assert (wide * top <= amax * (1 + step * 1.001))[normal].all()  # ... by one step at most
    assert codes.to(torch.float32).isfinite().all()


def test_scales_that_are_powers_of_two_stay_so() -> None:
    old = torch.tensor([[0.125, 2.0**-10]])
    new = scale_for(torch.tensor([[100.0, 448.0 * 2.0**-9]]), old, "F8_E4M3")
    assert new.tolist() == [[0.25, 2.0**-9]]  # 100 / 448 = 0.22, and exactly 2^-9
    assert scale_for(torch.tensor([[100.0, 0.0]]), torch.tensor([[0.1, 1.0]]), "F8_E4M3").tolist()[0][0] == pytest.approx(100 / 448)


def test_zeros_and_what_is_not_finite() -> None:
    codes, scale = requantised(torch.zeros(2, 2), torch.tensor([0.0, 0.7]), "F8_E4M3")
    assert (codes.to(torch.float32).tolist(), scale.tolist()) == ([[0.0, 0.0], [0.0, 0.0]], [0.0, pytest.approx(0.7)])
    revived, scale = requantised(torch.tensor([[0.0, 5.0]]), torch.tensor(0.0), "F8_E4M3")
    assert revived.to(torch.float32).tolist() == [[0.0, 448.0]]
    assert float(scale) == pytest.approx(5 / 448)
    for bad in (math.nan, math.inf):
        codes, scale = requantised(torch.tensor([[1.0, bad]]), torch.tensor(1.0), "F8_E4M3")
        assert not torch.cat([dequantised(codes, scale).flatten(), scale.reshape(1)]).isfinite().all()
    assert quantised(torch.tensor([449.0, 1000.0]), torch.tensor(1.0), "F8_E4M3").to(torch.float32).isnan().tolist() == [False, True]
    assert quantised(torch.tensor([1.0]), torch.tensor(0.0), "F8_E4M3").to(torch.float32).isnan().all()


def test_the_quotient_is_rounded_once() -> None:
    """In float32 a quotient just beside a tie becomes the tie."""
    generator = torch.Generator().manual_seed(0)
    scale = 1 + torch.rand(200000, generator=generator)
    values = (scale.to(torch.float64) * 1.0625).to(torch.float32)  # 1.0625 lies midway between 1 and 1.125
    exact = values.to(torch.float64) - scale.to(torch.float64) * 1.0625  # its sign decides; exact in float64
    wanted = torch.where(exact > 0, 1.125, 1.0)
    found = quantised(values, scale, "F8_E4M3").to(torch.float32)
    assert torch.equal(found, wanted.to(torch.float32))
    assert not torch.equal((values / scale).to(torch.float8_e4m3fn).to(torch.float32), wanted.to(torch.float32))


@pytest.mark.parametrize("stochastic", [False, True])
def test_stochastic_codes_keep_the_mean(stochastic: bool) -> None:
    values, scale = torch.full((4, 5000), 1.03e-3), torch.tensor(1e-3)
    codes = quantised(values, scale, "F8_E4M3", stochastic=stochastic, seed=3, name="m.weight", start=0).to(torch.float64)
    share = float(values[0, 0]) / float(scale) * 8 - 8  # of the way from 1 to 1.125
    expected, sigma = (1 + share / 8, math.sqrt(share * (1 - share) / 20000) / 8) if stochastic else (1.0, 0.0)
    assert abs(float(codes.mean()) - expected) <= 5 * sigma
    again, _ = requantised(values, scale, "F8_E4M3", stochastic=stochastic, seed=3)
    assert again.shape == values.shape


@pytest.mark.parametrize(
    ("shape", "stored", "config", "step"),
    [
        ((300, 200), (), None, 1),
        ((300, 200), (1, 1), None, 1),
        ((300, 200), (300,), None, 1),
        ((300, 200), (300, 1), None, 1),
        ((300, 200), (3, 2), None, 128),
        ((300, 200), (1, 2), None, 1),
        ((300, 200), (3, 2), [100, 100], 100),
        ((3, 40, 20), (3, 3, 2), None, 1),
    ],
)
def test_blocks_of_rows_make_the_same_codes(shape: tuple[int, ...], stored: tuple[int, ...], config: list[int] | None, step: int) -> None:
    generator = torch.Generator().manual_seed(5)
    values, old = torch.randn(shape, generator=generator), torch.rand(stored, generator=generator) * 1e-3
    block = blocks_of(shape, stored, config)
    assert block is not None
    scaled = ScaledWeight("m.weight", "m.weight_scale", stored, block)
    assert row_step(scaled, shape[0]) == step
    rows = step * 2
    cuts = [(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]
    parts = [peak(values[a:b], scale_rows(scaled, old, a, b), scaled.block) for a, b in cuts]
    amax = joined_peaks(scaled, parts)
    codes, scale = requantised(values, old, "F8_E4M3", scaled.block)
    assert torch.equal(amax, peak(values, old, scaled.block))
    assert torch.equal(scale_for(amax, old, "F8_E4M3"), scale)
    pieces = [quantised(values[a:b], scale_rows(scaled, scale, a, b), "F8_E4M3", scaled.block) for a, b in cuts]
    assert torch.equal(torch.cat([p.view(torch.uint8) for p in pieces]), codes.view(torch.uint8))
    whole = dequantised(codes, scale, scaled.block)
    assert torch.equal(torch.cat([dequantised(codes[a:b], scale_rows(scaled, scale, a, b), scaled.block) for a, b in cuts]), whole)


@pytest.mark.parametrize(("shape", "stored", "full", "block"), LAYOUTS)
def test_peaks_by_hand(shape: Shape, stored: Shape, full: Shape, block: Shape) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    wanted = numpy.zeros(full)
    for place in itertools.product(*(range(size) for size in shape)):
        cell = tuple(i // b for i, b in zip(place, block, strict=True))
        wanted[cell] = max(wanted[cell], abs(float(values[place])))
    assert peak(values, torch.ones(stored)).to(torch.float64).flatten().tolist() == wanted.flatten().tolist()


@pytest.mark.parametrize(
    ("shape", "scale"),
    [*(((256, 384), scale) for scale in [(2,), (384,), (257, 1), (2, 3, 1), (0,)]), ((), (3,)), ((16, 4), (5, 1))],
)
def test_a_scale_that_does_not_fit(shape: Shape, scale: Shape) -> None:
    assert blocks_of(shape, scale) is None
    with pytest.raises(MalformedError, match="does not fit"):
        dequantised(torch.zeros(shape, dtype=torch.float8_e4m3fn), torch.ones(scale))


def test_a_scaled_tensor_is_its_values() -> None:
    """Blocks of 65 rows, which a config knows: the shapes alone would say 128."""
    shape, block = (130, 3), (65, 3)
    codes, scale = example(shape, (2, 1))
    tensor = ScaledTensor(from_torch(codes), ScaledWeight("m.weight", "m.scale", (2, 1), block), from_torch(scale))
    wanted = torch.from_numpy(by_hand(codes, scale.to(torch.float64).numpy(), block)).to(torch.float32)
    assert (tensor.dtype, tensor.shape) == ("F32", shape)
    assert torch.equal(tensor.load(), wanted)
    assert torch.equal(tensor.load_rows(64, 67), wanted[64:67])
    assert b"".join(tensor.chunks()) == wanted.numpy().tobytes()


@pytest.mark.parametrize(("shape", "stored", "full", "block"), LAYOUTS)
def test_the_scale_of_any_rows(shape: Shape, stored: Shape, full: Shape, block: Shape) -> None:
    """Rows that begin and end within a block have the values that they have in the whole."""
    codes, scale = example(shape, full)
    hand = torch.from_numpy(by_hand(codes, scale.to(torch.float64).numpy(), block)).to(torch.float32)
    scaled = ScaledWeight("m.weight", "m.weight_scale", stored, block)
    for start, stop in itertools.combinations(range(shape[0] + 1), 2):
        found = dequantised(codes[start:stop], *scale_at(scaled, scale.reshape(stored), start, stop))
        assert torch.equal(found, hand[start:stop])

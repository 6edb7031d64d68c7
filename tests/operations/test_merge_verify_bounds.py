"""How much `merge --verify` lets pass, by dtype and rounding: defects just beyond what rounding may do.

Deltas are 0.1 % of the weight, as in `test_merge_verify`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loratools.errors import CheckFailed
from loratools.operations.merge import merge
from loratools.operations.merging.bounds import SiteSums
from tests.operations import merge_by_hand as hand
from tests.operations.merge_by_hand import NORM, noise
from tests.operations.test_merge_verify import SIZE, Case, K, corrupted, pairs_of, planted

SILENT = 64  # rows of K to which nothing is added


# --- float32 and float64: relative to |W|, 2e-6 and 1e-12


@pytest.mark.parametrize(("dtype", "excess"), [(torch.float32, 1e-2), (torch.float64, 1e-8)], ids=["fp32", "fp64"])
def test_a_scale_that_is_hardly_wrong(dtype: torch.dtype, excess: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1e-5 and 1e-11 of |W|: five and ten times what may be."""
    case = Case(tmp_path, dtype)
    planted(monkeypatch, ".k_proj", lambda delta: delta * (1 + excess))
    assert "rounding allows" in case.found(f"{K}.weight")


def test_a_delta_made_in_float32_for_a_float64_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path, torch.float64)
    planted(monkeypatch, ".k_proj", lambda delta: delta.float().double())
    assert "rounding allows" in case.found(f"{K}.weight")


def test_one_bit_in_the_middle_of_a_float64_mantissa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2^-20 of one value among 65536."""
    case = Case(tmp_path, torch.float64)

    def flipped(data: bytearray) -> bytearray:
        data[8 * 1000 + 4] ^= 1
        return data

    corrupted(monkeypatch, f"{K}.weight", flipped)
    case.found(f"{K}.weight")


@pytest.mark.parametrize(("dtype", "bound"), [("F32", 2e-6), ("F64", 1e-12)])
def test_half_of_what_may_be_passes(dtype: str, bound: float) -> None:
    """Another order of summation is no defect: every entry off by half of the bound, by twice as much."""
    base, delta = noise(64, 64, seed=1).double(), noise(64, 64, seed=2).double() * 0.01
    for times, holds in ((0.5, True), (2.0, False)):
        sums = SiteSums(False, dtype)
        sums.add(base, (base + delta) + base * bound * times, delta, torch.ones((), dtype=torch.float64))
        assert (sums.check("tensor", "site").reason == "") == holds


# --- stochastic rounding where nothing is added


class Silent(Case):
    """bf16 weights in ±[1, 2), stochastic rounding; the last rows of K's B are zero."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, torch.bfloat16)
        self.base = {key: (value.sign() * (1.25 + value.abs().float() % 0.7)).bfloat16() for key, value in self.base.items()}
        self.source = hand.save(folder / "base.safetensors", self.base)
        pairs = pairs_of(self.base)
        up = pairs[K].up.clone()
        up[-SILENT:] = 0
        self.adapter = hand.peft(folder / "silent", pairs | {K: replace(pairs[K], up=up)})


def moved(steps: int, place: int) -> Callable[[bytearray], bytearray]:
    """One bf16 value of the flat tensor so many steps farther from zero."""

    def change(data: bytearray) -> bytearray:
        codes = torch.frombuffer(data, dtype=torch.int16).clone()
        codes[place] += steps
        return bytearray(codes.numpy().tobytes())

    return change


STOCHASTIC = {"rounding": "stochastic", "seed": 3}


def test_rows_to_which_nothing_is_added_pass_and_stay(tmp_path: Path) -> None:
    case = Silent(tmp_path)
    assert case.merge(**STOCHASTIC)["verify"]["ok"]
    after = hand.load_file(case.out)[f"{K}.weight"]
    assert torch.equal(hand.bits(after[-SILENT:]), hand.bits(case.base[f"{K}.weight"][-SILENT:]))
    assert not torch.equal(after[:-SILENT], case.base[f"{K}.weight"][:-SILENT])


@pytest.mark.parametrize("steps", [1, 2, 40])
def test_a_value_to_which_nothing_is_added_and_that_moved(steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chance chooses between neighbours of a sum that lies between them; here it is a value of the dtype."""
    case = Silent(tmp_path)
    corrupted(monkeypatch, f"{K}.weight", moved(steps, (SIZE - SILENT) * SIZE + 17))
    assert "1 of 65536 entries are off by more than one step" in case.found(f"{K}.weight", **STOCHASTIC)


def test_a_value_beside_them_two_steps_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the rows that an adapter changes one step may be chance, two are not (|Δ| is a hundredth of a step)."""
    case = Silent(tmp_path)
    corrupted(monkeypatch, f"{K}.weight", moved(2, 17))
    assert "1 of 65536 entries are off by more than one step" in case.found(f"{K}.weight", **STOCHASTIC)


@pytest.mark.parametrize("steps", [2, -2])
def test_a_tensor_that_is_only_cast_by_chance(steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path, torch.float32)
    corrupted(monkeypatch, f"{NORM}.weight", moved(steps, 5))
    case.found(f"{NORM}.weight", dtype="BF16", **STOCHASTIC)


# --- the sums themselves


def sums_of(found: torch.Tensor, base: torch.Tensor, delta: torch.Tensor, *, stochastic: bool = False) -> str:
    sums = SiteSums(stochastic, "BF16")
    for part in (slice(0, 40), slice(40, None)):
        sums.add(base[part], found[part], delta[part], torch.ones((), dtype=torch.float64))
    return sums.check("tensor", "site").reason


@pytest.mark.parametrize("stochastic", [False, True])
def test_what_cancels_in_float32_may_be_many_steps_of_what_is_left(stochastic: bool) -> None:
    """W = 1, Δ = -1 + 2^-30: in float32 the sum is 0, which is many steps of bf16 from 2^-30, and as right as float32 can be."""
    base, delta = torch.ones(64, 64, dtype=torch.float64), torch.full((64, 64), -1 + 2.0**-30, dtype=torch.float64)
    right, wrong = torch.zeros_like(base), torch.full_like(base, 2.0**-18)
    assert sums_of(right, base, delta, stochastic=stochastic) == ""
    assert "off by more than one step" in sums_of(wrong, base, delta, stochastic=stochastic)


def test_a_projection_that_is_not_what_rounding_predicts() -> None:
    """Every value is one of the two around its sum, but all are the upper one."""
    base = 1 + noise(64, 64, seed=1).abs().double().bfloat16().double() % 0.5
    delta = torch.full((64, 64), 2.0**-9, dtype=torch.float64)  # a quarter of a step
    assert sums_of(base + 2.0**-7, base, delta, stochastic=True) == "the projection on the delta is not what rounding predicts"
    drawn = base + 2.0**-7 * (torch.rand(64, 64, generator=torch.Generator().manual_seed(2)) < 0.25)
    assert sums_of(drawn, base, delta, stochastic=True) == ""


def test_half_a_percent_of_close_calls() -> None:
    """Δ lies a thousandth below or above half a step, by turns: a sum in float32 may choose the other neighbour."""
    base = torch.full((100, 100), 1.5, dtype=torch.float64)
    sign = torch.where(torch.arange(10000) % 2 == 0, 1.0, -1.0).double().reshape(100, 100)
    nearest = base + 2.0**-7 * (sign < 0)
    for strays, reason in ((50, ""), (60, "60 of 10000 entries are not the nearest values")):
        chosen = (torch.arange(10000) < strays).reshape(100, 100)
        assert sums_of(nearest + 2.0**-7 * sign * chosen, base, 2.0**-8 * (1 - 0.001 * sign)) == reason


def test_a_report_names_tensor_site_and_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path, torch.bfloat16)
    planted(monkeypatch, ".k_proj", lambda delta: delta * 3.0)
    with pytest.raises(CheckFailed) as caught:
        merge(case.source, [(case.adapter, 1.0)], case.out, verify=True)
    (line,) = caught.value.details
    assert line.startswith(f"{K}.weight (model.{K}): ")
    assert "; projection " in line
    assert ", expected " in line

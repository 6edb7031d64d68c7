"""extract: what is printed as error is the error of the file, and ranks are what error, energy or bytes ask for.

error of a site = ‖D - ΔW‖ / ‖D‖,  of the whole = √(Σ‖D - ΔW‖² / Σ‖D‖²),   D and ΔW dense, in float64, by hand
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fixtures.tuned import difference, matrices
from loratools.errors import UsageError
from loratools.operations.extract import extract
from tests import reference
from tests.operations.made import render
from tests.operations.merge_by_hand import flux, noise, save

pytestmark = pytest.mark.filterwarnings("ignore")

State = Mapping[str, torch.Tensor]
PREFIX = "diffusion_model."


def decaying(shape: tuple[int, ...], seed: int, fall: float) -> torch.Tensor:
    """A full spectrum that falls by `fall` a value: σ_i = fallⁱ, in float64."""
    out, columns = shape[0], math.prod(shape[1:])
    left, right = (torch.linalg.qr(noise(size, min(out, columns), seed=seed + size).double())[0] for size in (out, columns))
    sigma = fall ** torch.arange(min(out, columns), dtype=torch.float64)
    return ((left * sigma) @ right.T).reshape(shape)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, State]:
    """(BASE, TUNED, {module of the file: D}) of full-rank differences with spectra of several slopes and sizes, norms and biases equal."""
    tensors = flux(torch.float32, 48)
    after = dict(tensors)
    for number, (key, value) in enumerate(tensors.items()):
        if matrices(key):
            delta = decaying(tuple(value.shape), number, 0.6 + 0.04 * (number % 9)) * 10.0 ** (number % 3 - 3)
            after[key] = (value.double() + delta).float()
    deltas = {PREFIX + key.removesuffix(".weight"): delta for key, delta in difference(tensors, after).items()}
    return save(tmp_path / "base.safetensors", tensors), save(tmp_path / "tuned.safetensors", after), deltas


def lost(out: Path, deltas: State) -> dict[str, tuple[float, float]]:
    """{module: (‖D - ΔW‖², ‖D‖²)}"""
    found = reference.deltas(out)
    assert found.keys() == deltas.keys()
    return {
        name: (float((delta.flatten() - found[name].flatten()).square().sum()), float(delta.square().sum()))
        for name, delta in deltas.items()
    }


def whole(parts: Mapping[str, tuple[float, float]]) -> float:
    return math.sqrt(sum(error for error, _ in parts.values()) / sum(norm for _, norm in parts.values()))


def sites(parts: Mapping[str, tuple[float, float]]) -> list[float]:
    """Relative errors, the largest first."""
    return sorted((math.sqrt(error / norm) for error, norm in parts.values()), reverse=True)


def ranks(out: Path) -> dict[str, int]:
    return {key.removesuffix(".lora_A.weight"): len(value) for key, value in load_file(out).items() if key.endswith(".lora_A.weight")}


# ------------------------------------------------------------------------------------------------------------ the certificate


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("settings", [{"rank": 1}, {"rank": 6}, {"error": 0.1}, {"energy": 0.9}, {"rank": 6, "exact": True}])
def test_what_is_printed_is_true(dtype: str, settings: dict[str, Any], pair: tuple[Path, Path, State], tmp_path: Path) -> None:
    """X6: of the factors as they are written, in whatever dtype, to 1e-4."""
    base, other, deltas = pair
    told = extract(base, other, tmp_path / "out.safetensors", to="comfy", dtype=dtype, **settings)
    parts = lost(tmp_path / "out.safetensors", deltas)
    assert told["relative_error"] == pytest.approx(whole(parts), rel=1e-4)
    assert [row["relative_error"] for row in told["worst"]] == pytest.approx(sites(parts)[: len(told["worst"])], rel=1e-4)
    assert told["modules"] == len(parts)
    found = ranks(tmp_path / "out.safetensors")
    assert told["ranks"] == {str(rank): list(found.values()).count(rank) for rank in sorted(set(found.values()))}
    by_name = {row["site"].partition(".")[2]: row["rank"] for row in told["worst"]}
    assert set(by_name.values()) <= set(found.values())


def test_near_nothing_is_lost_and_said(pair: tuple[Path, Path, State], tmp_path: Path) -> None:
    """Where the error is far below the difference, ‖D‖² - Σσ² would be noise; the printed one still has its digits."""
    base, other, deltas = pair
    told = extract(base, other, tmp_path / "out.safetensors", to="comfy", rank=336)
    true = whole(lost(tmp_path / "out.safetensors", deltas))
    assert told["relative_error"] == pytest.approx(true, abs=6e-8)  # D itself is rounded to float32 once
    assert true < 1e-6


def test_a_fused_and_a_large_layer(tmp_path: Path) -> None:
    """X6: a sketch of 640x520 with a slow spectrum is within 0.2 % of the best of its rank; what is printed is its own."""
    key, shape = "double_blocks.0.img_mod.lin.weight", (640, 520)
    tensors = flux(width=32) | {key: noise(*shape, seed=5)}
    delta = decaying(shape, 7, 0.97)
    after = {**tensors, key: (tensors[key].double() + delta).float()}
    save(tmp_path / "a.safetensors", tensors)
    save(tmp_path / "b.safetensors", after)
    told = extract(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "out.safetensors", to="comfy", rank=24)
    deltas = {PREFIX + key.removesuffix(".weight"): after[key].double() - tensors[key].double()}
    true = whole(lost(tmp_path / "out.safetensors", deltas))
    sigma = torch.linalg.svdvals(next(iter(deltas.values())))
    best = float((sigma[24:].square().sum() / sigma.square().sum()).sqrt())
    assert best * (1 - 1e-9) <= true <= 1.002 * best
    assert told["relative_error"] == pytest.approx(true, rel=1e-4)


def test_the_error_never_grows_with_the_rank(pair: tuple[Path, Path, State], tmp_path: Path) -> None:
    """X1: module by module, up to full rank; and each is the best of its rank."""
    base, other, deltas = pair
    sigmas = {name: torch.linalg.svdvals(delta.flatten(1)) for name, delta in deltas.items()}
    before: dict[str, float] = dict.fromkeys(deltas, math.inf)
    for rank in (1, 2, 3, 5, 8, 13, 21, 34, 48):
        out = tmp_path / f"{rank}.safetensors"
        extract(base, other, out, to="comfy", rank=rank)
        for name, (error, norm) in lost(out, deltas).items():
            sigma = sigmas[name]
            best = float(sigma[rank:].square().sum())
            assert error <= before[name] * 1.0001 + 1e-12 * norm, (rank, name)
            assert error <= 1.0001 * best + 1e-12 * norm, (rank, name)
            before[name] = error


@pytest.mark.parametrize("outliers", [False, True])
def test_no_clamp(outliers: bool, tmp_path: Path) -> None:
    """X1: a few channels a hundred times larger are no mistake to be cut off: the rank-4 error is that of the SVD."""
    tensors = flux(torch.float32, 48)
    key = "double_blocks.0.img_attn.proj.weight"
    delta = noise(48, 48, seed=3).double() * 0.01
    if outliers:
        delta[:2] *= 100
    after = {**tensors, key: (tensors[key].double() + delta).float()}
    save(tmp_path / "a.safetensors", tensors)
    save(tmp_path / "b.safetensors", after)
    extract(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "out.safetensors", to="comfy", rank=4)
    deltas = {PREFIX + key.removesuffix(".weight"): after[key].double() - tensors[key].double()}
    sigma = torch.linalg.svdvals(next(iter(deltas.values())))
    best = float((sigma[4:].square().sum() / sigma.square().sum()).sqrt())
    assert whole(lost(tmp_path / "out.safetensors", deltas)) == pytest.approx(best, rel=1e-5)


def test_both_factors_share_the_singular_values(pair: tuple[Path, Path, State], tmp_path: Path) -> None:
    """X1: √σ on both sides, so that neither overflows; alpha is the rank."""
    base, other, _ = pair
    extract(base, other, tmp_path / "out.safetensors", to="comfy", rank=4)
    tensors = load_file(tmp_path / "out.safetensors")
    for name in ranks(tmp_path / "out.safetensors"):
        up, down = (tensors[f"{name}.lora_{leaf}.weight"].double().flatten(1) for leaf in "BA")
        assert up.norm(dim=0).tolist() == pytest.approx(down.norm(dim=1).tolist(), rel=1e-5)
        assert float(tensors[f"{name}.alpha"]) == len(down)


# ------------------------------------------------------------------------------------------------------------------ --error, --energy


@pytest.mark.parametrize("error", [0.5, 0.1, 0.003])
def test_the_smallest_rank_within_an_error(error: float, pair: tuple[Path, Path, State], tmp_path: Path) -> None:
    """X9: in every module, and one rank less would be beyond it."""
    base, other, deltas = pair
    extract(base, other, tmp_path / "out.safetensors", to="comfy", error=error)
    found = ranks(tmp_path / "out.safetensors")
    for name, (lost_, norm) in lost(tmp_path / "out.safetensors", deltas).items():
        assert math.sqrt(lost_ / norm) <= error * (1 + 1e-6), name
        sigma = torch.linalg.svdvals(deltas[name].flatten(1))
        one_less = float((sigma[found[name] - 1 :].square().sum() / sigma.square().sum()).sqrt())
        assert one_less > error, name


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_energy_is_of_squares(energy: float, pair: tuple[Path, Path, State], tmp_path: Path) -> None:
    """X9: LyCORIS' quantile sums σ."""
    base, other, deltas = pair
    extract(base, other, tmp_path / "out.safetensors", to="comfy", energy=energy)
    for name, rank in ranks(tmp_path / "out.safetensors").items():
        squares = torch.linalg.svdvals(deltas[name].flatten(1)).square()
        share = (squares.cumsum(0) / squares.sum()).tolist()
        assert rank == next(number for number, value in enumerate(share, 1) if value >= energy)


def test_conv_rank_is_of_kernels_alone(tmp_path: Path) -> None:
    tensors = {"weaver.fold.weight": noise(16, 12, 3, 3), "weaver.point.weight": noise(16, 12, 1, 1), "weaver.mix.weight": noise(24, 20)}
    after = {key: value + 0.1 * noise(*value.shape, seed=3) for key, value in tensors.items()}
    save(tmp_path / "a.safetensors", tensors)
    save(tmp_path / "b.safetensors", after)
    told = {}
    for name, settings in {"both": {"rank": 6, "conv_rank": 2}, "error": {"error": 0.4, "conv_rank": 2}, "one": {"rank": 6}}.items():
        extract(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / f"{name}.safetensors", to="comfy", **settings)
        told[name] = {key.split(".")[2]: rank for key, rank in ranks(tmp_path / f"{name}.safetensors").items()}
    assert told["both"] == {"fold": 2, "point": 6, "mix": 6}
    assert told["one"] == {"fold": 6, "point": 6, "mix": 6}
    assert told["error"]["fold"] == 2
    assert told["error"]["mix"] > 6


# ------------------------------------------------------------------------------------------------------------------------ --budget


def costs(deltas: State, width: int) -> dict[str, int]:
    """Bytes of one rank of each module."""
    return {name: (len(delta) + delta[0].numel()) * width for name, delta in deltas.items()}


@pytest.mark.parametrize("megabytes", [0.02, 0.03, 0.09, 0.3, 5.0])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_budget_is_kept_and_well_spent(dtype: str, megabytes: float, pair: tuple[Path, Path, State], tmp_path: Path) -> None:
    """No rank given up anywhere would pay for one elsewhere that takes more off the squared error, byte for byte."""
    base, other, deltas = pair
    told = extract(base, other, tmp_path / "out.safetensors", to="comfy", budget=megabytes, dtype=dtype)
    assert (tmp_path / "out.safetensors").stat().st_size <= megabytes * 1e6
    found, price = ranks(tmp_path / "out.safetensors"), costs(deltas, 4 if dtype == "fp32" else 2)
    assert found.keys() == deltas.keys()
    assert min(found.values()) >= 1
    squares = {name: torch.linalg.svdvals(delta.flatten(1)).square().tolist() for name, delta in deltas.items()}
    for giver, taker in itertools.permutations(found, 2):
        if found[giver] > 1 and found[taker] < len(squares[taker]) and price[taker] <= price[giver]:
            gain, loss = squares[taker][found[taker]] / price[taker], squares[giver][found[giver] - 1] / price[giver]
            assert gain <= loss * (1 + 1e-5) + 1e-12, (giver, taker)
    if megabytes == 5.0:  # more than everything takes
        assert told["relative_error"] < 0.01
    assert told["relative_error"] == pytest.approx(whole(lost(tmp_path / "out.safetensors", deltas)), rel=1e-4, abs=6e-8)


def test_no_other_ranks_of_the_same_bytes_lose_less(pair: tuple[Path, Path, State], tmp_path: Path) -> None:
    """Against the best fractional ranks (σ² per byte, the largest first), which no whole ones beat."""
    base, other, deltas = pair
    for megabytes in (0.03, 0.05, 0.09, 0.15):
        out = tmp_path / f"{megabytes}.safetensors"
        extract(base, other, out, to="comfy", budget=megabytes, dtype="fp32")
        price, found = costs(deltas, 4), ranks(out)
        left = sum((rank - 1) * price[name] for name, rank in found.items())
        lost_ = 0.0
        items = [(square, price[name]) for name in deltas for square in torch.linalg.svdvals(deltas[name].flatten(1)).square().tolist()[1:]]
        for square, nbytes in sorted(items, key=lambda item: -item[0] / item[1]):
            share = min(1.0, left / nbytes)
            left -= share * nbytes
            lost_ += (1 - share) * square
        assert sum(error for error, _ in lost(out, deltas).values()) <= 1.05 * lost_, "worse than the last few ranks of whole bytes explain"


def test_a_budget_is_spent(pair: tuple[Path, Path, State], tmp_path: Path) -> None:
    """What is left of it is less than the header's allowance and a rank."""
    base, other, deltas = pair
    extract(base, other, tmp_path / "out.safetensors", to="comfy", budget=0.09, dtype="fp32")
    left = 0.09e6 - (tmp_path / "out.safetensors").stat().st_size
    assert left < 12_000 + max(costs(deltas, 4).values())


def test_a_budget_includes_what_is_dense(tmp_path: Path) -> None:
    tensors = flux(torch.float32, 48)
    after = {key: value + 0.01 * noise(*value.shape, seed=8) for key, value in tensors.items()}
    save(tmp_path / "a.safetensors", tensors)
    save(tmp_path / "b.safetensors", after)
    extract(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "out.safetensors", budget=0.05)
    assert (tmp_path / "out.safetensors").stat().st_size <= 50_000
    assert any(key.endswith(".diff_b") for key in load_file(tmp_path / "out.safetensors"))


def test_too_small_a_budget_says_what_is_needed(pair: tuple[Path, Path, State], tmp_path: Path) -> None:
    """Exit 2; with what it says, it works."""
    base, other, _ = pair
    with pytest.raises(UsageError, match="rank 1 everywhere") as caught:
        extract(base, other, tmp_path / "out.safetensors", to="comfy", budget=0.004, dtype="fp32")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out.safetensors").exists()
    needed = float(caught.value.message.split()[-2])
    assert f"--budget {needed}" in str(caught.value.fix)
    assert needed > 0.004
    extract(base, other, tmp_path / "out.safetensors", to="comfy", budget=needed, dtype="fp32")
    assert (tmp_path / "out.safetensors").stat().st_size <= needed * 1e6


# ------------------------------------------------------------------------------------------------------------------- what is asked


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 4, "energy": 0.9},
        {"rank": "auto", "error": 0.1},
        {"energy": 0.9, "budget": 3},
        {"rank": 0},
        {"rank": "high"},
        {"energy": 0.0},
        {"energy": 1.5},
        {"energy": math.nan},
        {"error": 1.0},
        {"error": -0.1},
        {"budget": 0.0},
        {"budget": math.inf},
        {"conv_rank": 0},
        {"conv_rank": 3, "budget": 3.0},
    ],
)
def test_requests_that_make_no_sense(settings: dict[str, Any], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(render({"x.weight": noise(4, 4)}))
    with pytest.raises(UsageError) as caught:
        extract(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "out.safetensors", **settings)
    told = " ".join([caught.value.message, *caught.value.details])
    assert all(f"--{name.replace('_', '-')}" in told for name in settings)

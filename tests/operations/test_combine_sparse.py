"""ties and dare: against a dense reference of fifteen lines, at the edges, and at any scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.operations.combine import combine
from loratools.operations.combining.sparsify import METHODS, Draw, dare, ties, trim
from tests.operations.made import ATTENTION, CONV, PROJ, SHAPES, Make, Save, dense, factors, kohya, kohya_file
from tests.reference import deltas


def reference_ties(taus: Sequence[torch.Tensor], weights: Sequence[float], density: float) -> torch.Tensor:
    """Entry by entry, as the paper says it."""
    rows = []
    for tau, weight in zip(taus, weights, strict=True):
        values = tau.flatten().tolist()
        order = sorted(range(len(values)), key=lambda place: (-abs(values[place]), place))
        kept = set(order[: max(1, int(density * len(values)))])
        rows.append([weight * value if place in kept else 0.0 for place, value in enumerate(values)])
    result = []
    for column in zip(*rows, strict=True):
        sign = (sum(column) > 0) - (sum(column) < 0)
        agreeing = [value for value in column if value * sign > 0]
        result.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(result, dtype=torch.float64).reshape(taus[0].shape)


def draws(count: int, site: str = "denoiser.x", seed: int = 0) -> list[Draw]:
    return [Draw(seed, site, position) for position in range(count)]


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.9, 1.0])
def test_ties_is_the_papers(randn: Make, density: float) -> None:
    taus = [randn(7, 9, dtype=torch.float64) for _ in range(3)]
    weights = [0.5, -1.0, 2.0]
    torch.testing.assert_close(ties(taus, weights, density, draws(3)), reference_ties(taus, weights, density), rtol=1e-14, atol=0)


def test_equal_magnitudes_are_kept_by_position() -> None:
    tau = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 2.0, 1.0]], dtype=torch.float64)
    assert trim(tau, 0.5).tolist() == [[1.0, -1.0, 0.0], [0.0, 2.0, 0.0]]
    assert trim(torch.zeros(2, 2, dtype=torch.float64), 0.5).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_dare_drops_and_rescales(randn: Make) -> None:
    tau = randn(200, 200, dtype=torch.float64)
    found = dare([tau], [2.0], 0.3, draws(1))
    kept = found != 0
    torch.testing.assert_close(found[kept], 2 * tau[kept] / 0.3, rtol=1e-15, atol=0)
    assert abs(float(kept.double().mean()) - 0.3) < 5 * (0.3 * 0.7 / tau.numel()) ** 0.5
    assert torch.equal(found, dare([tau], [2.0], 0.3, draws(1)))
    for other in (draws(1, seed=1), draws(1, site="denoiser.y"), [Draw(0, "denoiser.x", 1)]):
        assert not torch.equal(found, dare([tau], [2.0], 0.3, other))


def test_dare_gives_every_input_a_mask_of_its_own(randn: Make) -> None:
    one = torch.ones(100, 100, dtype=torch.float64)
    found = dare([one, one], [1.0, 1.0], 0.5, draws(2))
    assert set(found.flatten().tolist()) == {0.0, 2.0, 4.0}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 1), (1,), (5, 1), (1, 5)])
@pytest.mark.parametrize("density", [1e-9, 0.5, 1.0])
def test_small_weights_are_finite(randn: Make, method: str, shape: tuple[int, ...], density: float) -> None:
    """B8: mergekit's della is NaN on rows of one."""
    taus = [randn(*shape, dtype=torch.float64) for _ in range(2)]
    found = METHODS[method](taus, [1.0, -0.5], density, draws(2))
    assert found.shape == shape
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [1e-4, 1e4, 2.0**-60])
def test_no_threshold_is_absolute(randn: Make, method: str, factor: float) -> None:
    """B9: mergekit's sce takes 1e-6 off squares."""
    taus = [randn(6, 8, dtype=torch.float64) for _ in range(3)]
    plain = METHODS[method](taus, [1.0, 0.5, -2.0], 0.4, draws(3))
    scaled = METHODS[method]([factor * tau for tau in taus], [1.0, 0.5, -2.0], 0.4, draws(3))
    torch.testing.assert_close(scaled, factor * plain, rtol=1e-12, atol=0)


def test_one_direction_is_kept_at_any_density(randn: Make) -> None:
    """A density too small for one entry keeps one."""
    tau = randn(3, 3, dtype=torch.float64)
    found = ties([tau], [1.0], 1e-6, draws(1))
    assert int((found != 0).sum()) == 1
    assert float(found.abs().max()) == float(tau.abs().max())


# -------------------------------------------------------------------------------------------------------------------- in files


def sparse(randn: Make, save: Save, scale: float = 1.0) -> tuple[list[Path], list[dict[str, torch.Tensor]]]:
    files, known = [], []
    for place, rank in enumerate((4, 8)):
        pairs = {path: factors(randn, SHAPES[path], rank) for path in (ATTENTION, PROJ, CONV)}
        pairs = {path: (up * scale, down) for path, (up, down) in pairs.items()}
        files.append(save(f"{place}-{scale}.safetensors", kohya_file(pairs, 2.0)))
        known.append({path: dense(up, down, 2 / rank) for path, (up, down) in pairs.items()})
    return files, known


def test_ties_acts_on_deltas(randn: Make, save: Save, tmp_path: Path) -> None:
    """B7: peft trims A and B."""
    (a, b), (first, second) = sparse(randn, save)
    combine([(a, 1.0), (b, 0.5)], tmp_path / "out.safetensors", method="ties", density=0.3, rank=16)
    for path, delta in deltas(tmp_path / "out.safetensors").items():
        site = next(site for site in first if kohya(site) == path)
        expected = reference_ties([first[site], second[site]], [1.0, 0.5], 0.3)
        torch.testing.assert_close(delta.flatten(1), expected, rtol=1e-5, atol=1e-5)


def test_ties_of_one_adapter_at_density_one_is_itself(randn: Make, save: Save, tmp_path: Path) -> None:
    (_, b), (_, second) = sparse(randn, save)
    result = combine([(b, 1.0)], tmp_path / "out.safetensors", method="ties", density=1.0, rank=8)
    assert result["relative_error"] < 1e-6
    for path, delta in second.items():
        torch.testing.assert_close(deltas(tmp_path / "out.safetensors")[kohya(path)].flatten(1), delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"method": "ties"}, {"method": "dare", "seed": 3}, {"method": "sum"}])
def test_a_file_scaled_is_a_result_scaled(randn: Make, save: Save, tmp_path: Path, settings: dict[str, Any]) -> None:
    """B9, through files: factors of 1e-4 and 1e4 make no other choice."""
    tensors = [kohya_file({path: factors(randn, SHAPES[path]) for path in (ATTENTION, PROJ)}) for _ in range(2)]
    found = []
    for scale in (1.0, 2.0**-13, 2.0**13):
        files = []
        for place, made in enumerate(tensors):
            scaled = {key: tensor * scale if key.endswith("up.weight") else tensor for key, tensor in made.items()}
            files.append((save(f"{place}-{scale}.safetensors", scaled), 1.0))
        combine(files, tmp_path / f"out{scale}.safetensors", rank=3, **settings)
        found.append({name: delta / scale for name, delta in deltas(tmp_path / f"out{scale}.safetensors").items()})
    for other in found[1:]:
        for name, delta in found[0].items():
            torch.testing.assert_close(other[name], delta, rtol=1e-5, atol=1e-5)


def test_masks_follow_the_site_not_the_spelling(randn: Make, save: Save, tmp_path: Path) -> None:
    """The same adapter from kohya and from diffusers keys loses the same entries."""
    pair, proj = factors(randn, (16, 16)), factors(randn, SHAPES[PROJ])
    a = save("a.safetensors", kohya_file({ATTENTION: pair, PROJ: proj}, 4.0))
    made = {f"unet.{ATTENTION}.lora_B.weight": pair[0], f"unet.{ATTENTION}.lora_A.weight": pair[1]}
    b = save("b.safetensors", {**made, f"unet.{PROJ}.lora_B.weight": proj[0], f"unet.{PROJ}.lora_A.weight": proj[1]})
    for path in (a, b):
        combine([(path, 1.0)], tmp_path / f"{path.stem}-out.safetensors", method="dare", rank=16, to="kohya", seed=11)
    one, two = (deltas(tmp_path / f"{name}-out.safetensors") for name in ("a", "b"))
    for name, delta in one.items():
        torch.testing.assert_close(two[name], delta, rtol=1e-5, atol=1e-5)


def test_a_weight_of_one_entry(randn: Make, save: Save, tmp_path: Path) -> None:
    """A 1 x 1 weight and one of one column: finite, and the whole delta at density 1."""
    stem = "base_model.model.model.layers.0.self_attn"
    tensors = {f"{stem}.q_proj.lora_A.weight": randn(1, 1), f"{stem}.q_proj.lora_B.weight": randn(1, 1)}
    tensors |= {f"{stem}.o_proj.lora_A.weight": randn(1, 1), f"{stem}.o_proj.lora_B.weight": randn(6, 1)}
    a = save("a.safetensors", tensors)
    for method in METHODS:
        out = tmp_path / method
        combine([(a, 2.0)], out, method=method, density=1.0, rank=4)
        found = deltas(out)
        for name in ("q_proj", "o_proj"):
            expected = 2 * tensors[f"{stem}.{name}.lora_B.weight"].double() @ tensors[f"{stem}.{name}.lora_A.weight"].double()
            torch.testing.assert_close(found[f"{stem}.{name}"], expected, rtol=1e-6, atol=1e-7)

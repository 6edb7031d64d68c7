"""combine: Σ wᵢ ΔWᵢ against dense float64 sums worked out here, for every way a sum of adapters has been got wrong before."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from loratools.errors import UsageError
from loratools.operations.combine import combine
from tests.operations.made import ATTENTION, CONV, FF, PROJ, SHAPES, Make, Save, dense, factors, four, kohya, kohya_file, parts, written
from tests.reference import deltas


def named(path: str, dialect: str = "kohya") -> str:
    return kohya(path) if dialect == "kohya" else f"unet.{path}"


def check(out: Path, expected: Mapping[str, torch.Tensor], *, dialect: str = "kohya", tolerance: float = 1e-6) -> None:
    """Every module of the file has the ΔW that was worked out by hand, and there is no other."""
    found = deltas(out)
    assert set(found) == {named(path, dialect) for path in expected}
    for path, delta in expected.items():
        mine = found[named(path, dialect)].flatten(1)
        assert mine.shape == delta.shape
        assert float((mine - delta).norm()) <= tolerance * float(delta.norm()), path


def total(*terms: tuple[float, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Σ weight · ΔW by hand; a site that is missing counts as zero."""
    found: dict[str, torch.Tensor] = {}
    for weight, deltas_ in terms:
        for path, delta in deltas_.items():
            found[path] = found.get(path, torch.zeros_like(delta)) + weight * delta
    return found


def make(
    randn: Make, save: Save, name: str, rank: int = 4, alpha: float | None = 2.0, *, dtype: torch.dtype = torch.float32
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A kohya file on four sites and its deltas by hand."""
    pairs = {path: tuple(tensor.to(dtype) for tensor in factors(randn, shape, rank)) for path, shape in SHAPES.items()}
    scale = 1.0 if alpha is None else alpha / rank
    return save(name, kohya_file(pairs, alpha), {"ss_network_dim": str(rank), "ss_network_alpha": "9", "ss_tag_frequency": "{}"}), {
        path: dense(*pair, scale) for path, pair in pairs.items()
    }


def diffusers(pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    found = {}
    for path, (up, down) in pairs.items():
        found |= {f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up}
    return found


# --------------------------------------------------------------------------------------------------------------------- B1 to B5


def test_deltas_are_summed_not_factors(randn: Make, save: Save, tmp_path: Path) -> None:
    """B1: rank 4 and rank 8 make rank 12; sd-scripts' merge_lora.py is off by 100 %."""
    (a, first), (b, second) = make(randn, save, "a.safetensors", 4), make(randn, save, "b.safetensors", 8)
    result = combine([(a, 1.0), (b, 1.0)], tmp_path / "out.safetensors")
    check(tmp_path / "out.safetensors", total((1, first), (1, second)))
    assert result["ranks_after"] == {"12": 4}
    assert result["relative_error"] < 1e-7


@pytest.mark.parametrize("alphas", [(1.0, 4.0, 16.0), (4.0, 4.0, 4.0), (None, 8.0, 3.0)])
def test_scales_survive_and_the_header_tells_them(randn: Make, save: Save, tmp_path: Path, alphas: tuple[float | None, ...]) -> None:
    """B2: `--concat` kept alpha and dim."""
    made = [make(randn, save, f"{place}.safetensors", 4, alpha) for place, alpha in enumerate(alphas)]
    out = tmp_path / "out.safetensors"
    combine([(path, 1.0) for path, _ in made], out)
    check(out, total(*((1, delta) for _, delta in made)))
    header = parts(out)[0]
    assert header[f"{kohya(ATTENTION)}.lora_down.weight"]["shape"] == [12, 16]
    assert header["__metadata__"]["ss_network_dim"] == "12"
    same = len(set(alphas)) == 1
    assert header["__metadata__"]["ss_network_alpha"] == "12"
    if same:  # factors as they were: the first four rows of down are the first file's, bit for bit
        data = {name: (entry, parts(path)[1]) for path, _ in made[:1] for name, entry in parts(path)[0].items() if name != "__metadata__"}
        entry, payload = data[f"{kohya(FF)}.lora_down.weight"]
        mine = header[f"{kohya(FF)}.lora_down.weight"]["data_offsets"][0]
        first, last = entry["data_offsets"]
        assert parts(out)[1][mine : mine + last - first] == payload[first:last]


@pytest.mark.parametrize("weights", list(itertools.product((0.5, -1.0, 0.0, 2.0), repeat=2)))
def test_weights_are_strengths(randn: Make, save: Save, tmp_path: Path, weights: tuple[float, float]) -> None:
    """B3: linear in any real weight; 0.5 is not 0.25, and a minus is not lost."""
    (a, first), (b, second) = make(randn, save, "a.safetensors"), make(randn, save, "b.safetensors", 8, 6.0)
    out = tmp_path / "out.safetensors"
    if weights == (0.0, 0.0):
        with pytest.raises(UsageError, match="every weight is 0"):
            combine([(a, 0.0), (b, 0.0)], out)
        return
    result = combine([(a, weights[0]), (b, weights[1])], out)
    check(out, total((weights[0], first), (weights[1], second)))
    assert sum("weight 0" in warning for warning in result["warnings"]) == weights.count(0.0)


def test_opposite_weights_cancel(randn: Make, save: Save, tmp_path: Path) -> None:
    a, first = make(randn, save, "a.safetensors")
    combine([(a, 1.0), (a, -1.0)], tmp_path / "out.safetensors")
    for path, delta in first.items():
        assert float(deltas(tmp_path / "out.safetensors")[kohya(path)].norm()) < 1e-14 * float(delta.norm())


def svd_bound(delta: torch.Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(delta)
    return float(values[rank:].square().sum().sqrt() / values.square().sum().sqrt())


@pytest.mark.parametrize("rank", [1, 4, 7, 16, 64])
def test_truncation_is_optimal_and_its_error_true(randn: Make, save: Save, tmp_path: Path, rank: int) -> None:
    """B4: svd_merge_lora.py clamps, and is off by 12 to 53 % where nothing need be lost."""
    (a, first), (b, second) = make(randn, save, "a.safetensors", 4), make(randn, save, "b.safetensors", 8)
    expected, out = total((0.7, first), (1.3, second)), tmp_path / "out.safetensors"
    result = combine([(a, 0.7), (b, 1.3)], out, rank=rank)
    found = deltas(out)
    squares = [0.0, 0.0]
    for path, delta in expected.items():
        error = float((found[kohya(path)].flatten(1) - delta).norm() / delta.norm())
        assert error == pytest.approx(svd_bound(delta, rank), rel=1e-5, abs=1e-6)
        squares = [squares[0] + (error * float(delta.norm())) ** 2, squares[1] + float(delta.norm()) ** 2]
    assert result["relative_error"] == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-4, abs=1e-7)
    assert result["ranks_after"] == {str(min(rank, 12)): 4}
    assert [row["relative_error"] for row in result["worst"]] == sorted((row["relative_error"] for row in result["worst"]), reverse=True)


def test_more_rank_is_never_worse_and_is_cut_to_the_weight(randn: Make, save: Save, tmp_path: Path) -> None:
    made = [make(randn, save, f"{place}.safetensors", 8, 3.0) for place in range(3)]
    errors = []
    for rank in (2, 6, 12, 20, 64):
        result = combine([(path, 1.0) for path, _ in made], tmp_path / f"r{rank}.safetensors", rank=rank)
        errors.append(result["relative_error"])
    assert errors == sorted(errors, reverse=True)
    assert result["ranks_after"] == {"24": 4}  # exact: no more than the 8 + 8 + 8 that are there
    result = combine([(path, 1.0) for path, _ in made], tmp_path / "cut.safetensors", rank=20)
    assert max(map(int, result["ranks_after"])) == 16  # the weights have 16 rows


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_energy_keeps_its_share_with_the_fewest_ranks(randn: Make, save: Save, tmp_path: Path, energy: float) -> None:
    (a, first), (b, second) = make(randn, save, "a.safetensors", 4), make(randn, save, "b.safetensors", 4, 1.0)
    out = tmp_path / "out.safetensors"
    combine([(a, 1.0), (b, 1.0)], out, energy=energy)
    header = parts(out)[0]
    for path, delta in total((1, first), (1, second)).items():
        squares = torch.linalg.svdvals(delta)[:8].square()
        share = squares.cumsum(0) / squares.sum()
        fewest = min(8, int((share < energy - 1e-12).sum()) + 1)
        assert header[f"{kohya(path)}.lora_down.weight"]["shape"][0] == fewest


def test_energy_one_finds_the_numerical_rank(randn: Make, save: Save, tmp_path: Path) -> None:
    """The same file twice has the rank of one."""
    a, first = make(randn, save, "a.safetensors", 4)
    result = combine([(a, 1.0), (a, 0.25)], tmp_path / "out.safetensors", energy=1.0)
    check(tmp_path / "out.safetensors", total((1.25, first)))
    assert result["ranks_after"] == {"4": 4}


def test_one_adapter_alone_is_itself(randn: Make, save: Save, tmp_path: Path) -> None:
    """B5; and its tensors are the same bytes, in any 16-bit dtype, with an alpha that is no power of two."""
    pairs = {path: tuple(tensor.half() for tensor in pair) for path, pair in four(randn).items()}
    a = save("a.safetensors", kohya_file(pairs, 3.0), {"ss_output_name": "a", "custom": "kept"})
    result = combine([(a, 1.0)], tmp_path / "out.safetensors")
    assert parts(tmp_path / "out.safetensors")[1] == parts(a)[1]
    mine, theirs = parts(tmp_path / "out.safetensors")[0], parts(a)[0]
    metadata = mine.pop("__metadata__")
    theirs.pop("__metadata__")
    assert mine == theirs
    assert metadata["custom"] == "kept"
    assert result["pairwise_cosine"] == [[1.0]]
    assert result["relative_error"] == 0


# -------------------------------------------------------------------------------------------------------------------- B6, B11, B12


def test_dialects_and_ranks_mix_and_sites_of_one_side_survive(randn: Make, save: Save, tmp_path: Path) -> None:
    """B6: kohya of rank 4 without the convolution, diffusers of rank 16 without the feed-forward."""
    left = {path: factors(randn, SHAPES[path], 4) for path in (ATTENTION, PROJ, FF)}
    right = {path: factors(randn, SHAPES[path], 16) for path in (ATTENTION, PROJ, CONV)}
    a, b = save("a.safetensors", kohya_file(left, 2.0)), save("b.safetensors", diffusers(right))
    first = {path: dense(*pair, 0.5) for path, pair in left.items()}
    second = {path: dense(*pair, 1.0) for path, pair in right.items()}
    out = tmp_path / "out.safetensors"
    result = combine([(a, 1.0), (b, -0.3)], out)
    check(out, total((1, first), (-0.3, second)))
    assert result["only_in"] == [{"path": str(a), "sites": 1}, {"path": str(b), "sites": 1}]
    assert any("a.safetensors has 1 site that not every input has" in warning for warning in result["warnings"])
    assert [row["dialect"] for row in result["inputs"]] == ["kohya", "diffusers"]
    combine([(b, -0.3), (a, 1.0)], tmp_path / "turned.safetensors")
    check(tmp_path / "turned.safetensors", total((1, first), (-0.3, second)), dialect="diffusers")


def test_one_by_one_convolutions_of_two_and_four_dimensions_meet(randn: Make, save: Save, tmp_path: Path) -> None:
    """C16: [16, 4] and [16, 4, 1, 1] are one weight."""
    pair, (up, down) = factors(randn, SHAPES[PROJ]), factors(randn, (16, 16))
    extra = {ATTENTION: factors(randn, SHAPES[ATTENTION]), CONV: factors(randn, SHAPES[CONV])}
    a = save("a.safetensors", kohya_file({PROJ: pair, **extra}))
    b = save("b.safetensors", {**written(kohya(PROJ), up, down), **kohya_file({CONV: extra[CONV]})})
    combine([(a, 1.0), (b, 1.0)], tmp_path / "out.safetensors", arch="sd1")
    found = deltas(tmp_path / "out.safetensors")[kohya(PROJ)]
    assert found.shape == (16, 16, 1, 1)
    torch.testing.assert_close(found.flatten(1), dense(*pair, 0.5) + dense(up, down, 0.5), rtol=1e-6, atol=1e-6)


def test_many_copies_at_an_nth_are_the_original(randn: Make, save: Save, tmp_path: Path) -> None:
    """B11: summed in bfloat16 half of the entries are misrounded."""
    a, first = make(randn, save, "a.safetensors", 4, 3.0, dtype=torch.bfloat16)
    combine([(a, 1 / 7)] * 7, tmp_path / "out.safetensors")
    check(tmp_path / "out.safetensors", first)


def test_an_average_of_deltas_not_of_factors(randn: Make, save: Save, tmp_path: Path) -> None:
    """B12: a checkpoint that lacks a module counts as zero there, and is told."""
    files, known = [], []
    for place in range(3):
        pairs = four(randn)
        if place == 1:
            del pairs[FF]
        files.append(save(f"{place}.safetensors", kohya_file(pairs)))
        known.append({path: dense(*pair, 0.5) for path, pair in pairs.items()})
    out = tmp_path / "mean.safetensors"
    result = combine([(path, 1 / 3) for path in files], out)
    check(out, total(*((1 / 3, delta) for delta in known)))
    assert [row["sites"] for row in result["only_in"]] == [1, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_scale_is_moved_exactly_or_in_float32(randn: Make, save: Save, tmp_path: Path, dtype: torch.dtype) -> None:
    pairs = [{path: tuple(tensor.to(dtype) for tensor in pair) for path, pair in four(randn).items()} for _ in range(2)]
    a, b = (save(f"{place}.safetensors", kohya_file(made, 2.0)) for place, made in enumerate(pairs))
    first, second = ({path: dense(*pair, 0.5) for path, pair in made.items()} for made in pairs)
    name = f"{kohya(ATTENTION)}.lora_up.weight"
    result = combine([(a, 2.0), (b, -0.5)], tmp_path / "exact.safetensors")  # powers of two
    assert parts(tmp_path / "exact.safetensors")[0][name]["dtype"] == ("F16" if dtype == torch.float16 else "BF16")
    assert result["relative_error"] == 0
    check(tmp_path / "exact.safetensors", total((2, first), (-0.5, second)), tolerance=1e-15)
    combine([(a, 0.3), (b, 1.0)], tmp_path / "wide.safetensors")
    assert parts(tmp_path / "wide.safetensors")[0][name]["dtype"] == "F32"
    check(tmp_path / "wide.safetensors", total((0.3, first), (1, second)), tolerance=1e-7)
    result = combine([(a, 0.3), (b, 1.0)], tmp_path / "narrow.safetensors", dtype="fp16")
    header = parts(tmp_path / "narrow.safetensors")[0]
    assert header[name]["dtype"] == "F16"
    assert header[f"{kohya(ATTENTION)}.alpha"]["dtype"] == "F32"
    expected, found = total((0.3, first), (1, second)), deltas(tmp_path / "narrow.safetensors")
    error = sum(float((found[kohya(path)].flatten(1) - delta).norm()) ** 2 for path, delta in expected.items())
    norm = sum(float(delta.norm()) ** 2 for delta in expected.values())
    assert result["relative_error"] == pytest.approx((error / norm) ** 0.5, rel=1e-6)
    assert 1e-5 < result["relative_error"] < 1e-3


def test_a_weight_on_one_file_changes_alpha_alone(randn: Make, save: Save, tmp_path: Path) -> None:
    a, first = make(randn, save, "a.safetensors", 4, 3.0, dtype=torch.float16)
    out = tmp_path / "out.safetensors"
    combine([(a, -0.25)], out)
    check(out, total((-0.25, first)), tolerance=1e-12)
    before, after = (dict(parts(path)[0]) for path in (a, out))
    name = f"{kohya(FF)}.lora_down.weight"
    slices = [parts(path)[1][slice(*header[name]["data_offsets"])] for path, header in ((a, before), (out, after))]
    assert slices[0] == slices[1]
    assert after[name]["dtype"] == "F16"
    found = deltas(out)
    assert set(found) == set(deltas(a))

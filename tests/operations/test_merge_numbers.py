"""What a merge writes, entry by entry: rounded once, to the base's dtype; and what its report says rounding took.

Every expected value is float64 by hand (`merge_by_hand`). PITFALLS a merge has: rounding that eats a small delta unsaid, sums rounded
more than once, deltas added to fp8 codes, overflow, NaN.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratools.errors import LoraToolsError
from loratools.operations.merge import merge
from tests.operations import merge_by_hand as hand
from tests.operations.merge_by_hand import NORM, UP, Q, Tensors

HALF = [torch.bfloat16, torch.float16]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
E4M3 = torch.float8_e4m3fn
WEIGHTS = (f"{Q}.weight", f"{UP}.weight")


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pairs_for(base: Tensors, ratio: float, seed: int = 0, rank: int = 8, dtype: torch.dtype = torch.float32) -> dict[str, hand.Pair]:
    """A LoRA on both matrices with |Δ| = ratio · |W|, whatever the size of W."""
    return {
        key.removesuffix(".weight"): hand.pair(base[key].shape, rank, 3.0, seed + number, dtype).sized(ratio, base[key])
        for number, key in enumerate(WEIGHTS)
    }


def left(tmp_path: Path, *inputs: Path) -> list[str]:
    """What lies in the folder beside the inputs: nothing, after a failure."""
    return sorted(path.name for path in tmp_path.iterdir() if path not in inputs)


# --------------------------------------------------------------------------------------------- what rounding takes of a small delta


@pytest.mark.parametrize("ratio", [0.001, 0.01])
@pytest.mark.parametrize("dtype", HALF, ids=named)
def test_the_report_says_what_rounding_took(dtype: torch.dtype, ratio: float, tmp_path: Path) -> None:
    """forge#1252: at 0.1 % of |W| bf16 leaves most entries where they were. The report's numbers are those of float64 within 1 %."""
    base = hand.language_model(dtype=dtype)
    pairs = pairs_for(base, ratio)
    adapter = hand.peft(tmp_path / "adapter", pairs)
    result = merge(
        hand.save(tmp_path / "base.safetensors", base), [(adapter, 1.0)], tmp_path / "out.safetensors", report=tmp_path / "r.json"
    )
    after = load_file(tmp_path / "out.safetensors")
    deltas = {key: pairs[key.removesuffix(".weight")].delta() for key in WEIGHTS}
    by_hand = {key: hand.kept(base[key], hand.nearest(base[key].double() + delta, dtype), delta) for key, delta in deltas.items()}
    wanted = hand.total(by_hand.values())
    assert result["delta_retained"] == pytest.approx(wanted.retained, rel=0.01)
    assert result["relative_error"] == pytest.approx(wanted.relative_error, rel=0.01)
    rows = json.loads((tmp_path / "r.json").read_text())["tensors_changed"]
    assert {row["tensor"] for row in rows} == set(WEIGHTS)
    for row in rows:
        own = by_hand[row["tensor"]]
        assert (row["delta_retained"], row["relative_error"]) == pytest.approx((own.retained, own.relative_error), rel=0.01)
    assert result["worst"] == sorted(rows, key=lambda row: float(row["delta_retained"]))
    stays = sum(int((after[key] == base[key]).sum()) for key in WEIGHTS) / sum(base[key].numel() for key in WEIGHTS)
    if (dtype, ratio) == (torch.bfloat16, 0.001):  # measured long before this was written: 78 % unchanged, 52 % retained, error 0.80
        assert 0.7 < stays < 0.85
        assert 0.4 < wanted.retained < 0.65
        assert 0.7 < wanted.relative_error < 0.9
    if ratio == 0.01:
        assert 0.95 < result["delta_retained"] < 1.02
        assert stays < 0.35


@pytest.mark.parametrize("dtype", FP8, ids=named)
def test_raw_fp8_that_does_not_move_says_so(dtype: torch.dtype, tmp_path: Path) -> None:
    """All |W| in [1, 2), where the step is 1/8 or 1/4: a delta of a thousandth moves nothing, and none of it is retained."""
    base = {key: (1 + value.double().abs() % 0.9).to(dtype) for key, value in hand.language_model(128, torch.float32).items()}
    adapter = hand.peft(tmp_path / "adapter", pairs_for(base, 0.001))
    result = merge(hand.save(tmp_path / "base.safetensors", base), [(adapter, 1.0)], tmp_path / "out.safetensors")
    hand.assert_untouched(base, tmp_path / "out.safetensors", [])
    assert result["delta_retained"] == pytest.approx(0.0, abs=1e-9)
    assert result["relative_error"] == pytest.approx(1.0, abs=1e-6)
    assert result["changed"] == 2


@pytest.mark.parametrize("ratio", [0.02, 0.3])
@pytest.mark.parametrize("dtype", FP8, ids=named)
def test_raw_fp8_to_the_nearest_code(dtype: torch.dtype, ratio: float, tmp_path: Path) -> None:
    base = hand.language_model(256, torch.float32) | {f"{NORM}.weight": hand.noise(256)}
    base = {key: value.to(dtype) for key, value in base.items()}
    pairs = pairs_for(base, ratio)
    adapter = hand.peft(tmp_path / "adapter", pairs)
    result = merge(hand.save(tmp_path / "base.safetensors", base), [(adapter, 1.0)], tmp_path / "out.safetensors")
    after = hand.assert_untouched(base, tmp_path / "out.safetensors", WEIGHTS)
    parts = []
    for key in WEIGHTS:
        delta = pairs[key.removesuffix(".weight")].delta()
        wanted = hand.nearest(base[key].double() + delta, dtype)
        near(after[key], wanted, dtype)
        parts.append(hand.kept(base[key].double(), wanted, delta))
    assert result["delta_retained"] == pytest.approx(hand.total(parts).retained, rel=0.01)
    assert result["relative_error"] == pytest.approx(hand.total(parts).relative_error, rel=0.01)


def near(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    """At most 0.5 % of the entries are not the value nearest to the float64 sum, none is farther than its neighbour."""
    assert found.dtype == dtype
    apart = hand.steps_apart(found, wanted, dtype)
    assert float(apart.max()) <= 1.0
    assert float((apart > 0).double().mean()) <= 0.005


# ----------------------------------------------------------------------------------------------------------------- stochastic


@pytest.mark.parametrize("dtype", [*HALF, *FP8], ids=named)
def test_stochastic_rounding_keeps_the_delta(dtype: torch.dtype, tmp_path: Path) -> None:
    """E[W'] = W + Δ: all of Δ is retained, within 5 σ of what (x - a)(b - x) sums to; every value is one of the two around its sum."""
    base = hand.language_model(dtype=torch.float32)
    base = {key: value.clamp(min=0.02).to(dtype) if dtype in FP8 else value.to(dtype) for key, value in base.items()}
    pairs = pairs_for(base, 0.001)
    adapter = hand.peft(tmp_path / "adapter", pairs)
    source, out = hand.save(tmp_path / "base.safetensors", base), tmp_path / "out.safetensors"
    result = merge(source, [(adapter, 1.0)], out, rounding="stochastic", seed=3)
    after = hand.assert_untouched(base, out, WEIGHTS)
    size = variance = 0.0
    for key in WEIGHTS:
        delta = pairs[key.removesuffix(".weight")].delta()
        target = base[key].double() + delta
        unit = hand.step(target, dtype)
        below = (target / unit).floor() * unit
        slack = 1e-6 * (base[key].double().abs() + delta.abs())
        assert bool(((after[key].double() >= below - slack) & (after[key].double() <= below + unit + slack)).all())
        size += float(delta.square().sum())
        variance += float((delta.square() * (target - below) * (below + unit - target)).sum())
    sigma = variance**0.5 / size
    assert abs(result["delta_retained"] - 1) < 5 * sigma
    assert sigma < 0.35, "so wide that nothing would be told"


def test_stochastic_bytes_depend_on_the_seed_alone(tmp_path: Path) -> None:
    base = hand.language_model()
    pairs = {name: replace(one, up=one.up.clone()) for name, one in pairs_for(base, 0.001).items()}
    pairs[Q].up[100:300] = 0.0  # rows of the adapter without a change: exact values, which no rounding moves
    adapter = hand.peft(tmp_path / "adapter", pairs)
    source = hand.save(tmp_path / "base.safetensors", base)

    def payload(name: str, seed: int, threads: int) -> Tensors:
        merge(source, [(adapter, 1.0)], tmp_path / name, rounding="stochastic", seed=seed, threads=threads)
        return load_file(tmp_path / name)

    first, again, threads, other = (payload(f"{number}.safetensors", *how) for number, how in enumerate([(1, 1), (1, 1), (1, 4), (2, 1)]))
    for key in base:
        assert torch.equal(first[key], again[key])
        assert torch.equal(first[key], threads[key])
    for key in WEIGHTS:
        assert float((first[key] != other[key]).double().mean()) > 0.05
    assert torch.equal(first[f"{Q}.weight"][100:300], base[f"{Q}.weight"][100:300])
    assert not torch.equal(first[f"{Q}.weight"][300:], base[f"{Q}.weight"][300:])


# -------------------------------------------------------------------------------------------------------------- rounded once


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16, torch.float16], ids=named)
@pytest.mark.parametrize("dtype", HALF, ids=named)
def test_sums_are_rounded_once(dtype: torch.dtype, factors: torch.dtype, tmp_path: Path) -> None:
    """Three adapters of other ranks, alphas and weights on the same matrices; peft rounds 31 to 75 % of the entries twice."""
    base = hand.language_model(dtype=dtype)
    source = hand.save(tmp_path / "base.safetensors", base)
    given: list[tuple[Path, float]] = []
    sums = {key: base[key].double() for key in WEIGHTS}
    for number, weight in enumerate((0.8, -0.3, 1.7)):
        pairs = pairs_for(base, 0.03, 10 * number, rank=4 + 2 * number, dtype=factors)
        given.append((hand.peft(tmp_path / f"adapter{number}", pairs), weight))
        sums = {key: value + weight * pairs[key.removesuffix(".weight")].delta() for key, value in sums.items()}
    merge(source, given, tmp_path / "out.safetensors", threads=1)
    after = hand.assert_untouched(base, tmp_path / "out.safetensors", WEIGHTS)
    for key in WEIGHTS:
        near(after[key], hand.nearest(sums[key], dtype), dtype)
    for name, order in (("turned", [2, 0, 1]), ("again", [1, 2, 0])):
        merge(source, [given[place] for place in order], tmp_path / f"{name}.safetensors", threads=4)
        other = load_file(tmp_path / f"{name}.safetensors")
        assert [key for key in base if not torch.equal(other[key], after[key])] == []


@pytest.mark.parametrize("verify", [False, True], ids=["", "verified"])
@pytest.mark.parametrize("dtype", HALF, ids=named)
def test_where_weight_and_delta_cancel(dtype: torch.dtype, verify: bool, tmp_path: Path) -> None:
    """W ≈ -Δ: what is left is as small as the error of a sum in float32, which is then many steps of its own. In every model of some
    size such entries are there by chance."""
    pairs = pairs_for(hand.language_model(256, torch.float32), 1.0)
    base = hand.language_model(256, dtype)
    base |= {key: hand.nearest(-pairs[key.removesuffix(".weight")].delta(), dtype).to(dtype) for key in WEIGHTS}
    adapter, source = hand.peft(tmp_path / "adapter", pairs), hand.save(tmp_path / "base.safetensors", base)
    merge(source, [(adapter, 1.0)], tmp_path / "out.safetensors", verify=verify)
    after = load_file(tmp_path / "out.safetensors")
    for key in WEIGHTS:
        one, old = pairs[key.removesuffix(".weight")], base[key].double()
        wanted = hand.nearest(old + one.delta(), dtype)
        slack = 1e-14 * (old.abs() + one.reach())  # of float64
        off = (after[key].double() - wanted).abs() - slack
        assert bool((off <= hand.step(wanted, dtype)).all())
        assert float((off > 0).double().mean()) <= 0.005


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=["float32", "float64"])
def test_wide_dtypes(dtype: torch.dtype, bound: float, tmp_path: Path) -> None:
    """Each entry within 1e-6 of |W| + Σ |products summed|, the whole within 1e-7; +1 and then -1 gives the base back to that."""
    base = hand.language_model(dtype=dtype)
    first, second = pairs_for(base, 0.3, dtype=dtype), pairs_for(base, 0.1, 50, rank=3, dtype=dtype)
    one, two = hand.peft(tmp_path / "one", first), hand.peft(tmp_path / "two", second)
    source = hand.save(tmp_path / "base.safetensors", base)
    result = merge(source, [(one, 1.0), (two, -0.6)], tmp_path / "out.safetensors")
    after = hand.assert_untouched(base, tmp_path / "out.safetensors", WEIGHTS)
    merge(tmp_path / "out.safetensors", [(one, -1.0), (two, 0.6)], tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    for key in WEIGHTS:
        a, b, old = first[key.removesuffix(".weight")], second[key.removesuffix(".weight")], base[key].double()
        size, wanted = old.abs() + a.reach() + 0.6 * b.reach(), old + a.delta() - 0.6 * b.delta()
        for found, right in ((after[key], wanted), (back[key], old)):
            error = (found.double() - right).abs()
            assert float((error / size).max()) < bound
            assert float(error.norm()) < bound / 10 * float(right.norm())
    assert result["delta_retained"] == pytest.approx(1.0, abs=1e-6)
    assert result["relative_error"] < 1e-5


# ------------------------------------------------------------------------------------------------------- what cannot be written


def failing(tmp_path: Path, base: Tensors, adapters: list[tuple[Path, float]], **options: object) -> LoraToolsError:
    """The error of a merge that must fail in the middle, and nothing left of it: no output, no temporary file."""
    source = hand.save(tmp_path / "base.safetensors", base)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(LoraToolsError) as caught:
        merge(source, adapters, tmp_path / "out.safetensors", **options)
    assert {path.name for path in tmp_path.iterdir()} == before
    return caught.value


@pytest.mark.parametrize(
    ("dtype", "large"), [(torch.float16, 60000.0), (E4M3, 440.0), (torch.float8_e5m2, 57344.0)], ids=["fp16", "e4m3", "e5m2"]
)
def test_an_overflow_names_the_tensor(dtype: torch.dtype, large: float, tmp_path: Path) -> None:
    base = {key: value.to(dtype) for key, value in hand.language_model(128, torch.float32).items()}
    weight = base[f"{UP}.weight"].float()
    weight[77, 5] = large
    base[f"{UP}.weight"] = weight.to(dtype)
    pairs = pairs_for(base | {f"{UP}.weight": (base[f"{UP}.weight"].float() * 0 + 1).to(dtype)}, 0.01)
    pairs[UP].up[77], pairs[UP].down[:, 5] = large, large / 1000
    for rounding in ("nearest", "stochastic"):
        adapter = hand.peft(tmp_path / rounding, pairs)
        error = failing(tmp_path, base, [(adapter, 1.0)], rounding=rounding)
        assert error.exit_code == 3
        assert f"{UP}.weight" in error.message
        assert "overflow" in error.message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_in_the_base(value: float, tmp_path: Path) -> None:
    base = hand.language_model(128)
    base[f"{NORM}.weight"][3] = value  # no adapter touches this: copied
    adapter = hand.peft(tmp_path / "adapter", pairs_for(base, 0.01))
    merge(hand.save(tmp_path / "norm.safetensors", base), [(adapter, 1.0)], tmp_path / "fine.safetensors")
    hand.assert_untouched(base, tmp_path / "fine.safetensors", WEIGHTS)
    base[f"{Q}.weight"][100, 7] = value
    error = failing(tmp_path, base, [(adapter, 1.0)])
    assert (error.exit_code, f"{Q}.weight" in error.message, "base" in error.message) == (3, True, True)


@pytest.mark.parametrize("leaf", ["up", "down"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_in_an_adapter(value: float, leaf: str, tmp_path: Path) -> None:
    """Of two adapters on the same weight the broken one is named."""
    base = hand.language_model(128)
    good = hand.peft(tmp_path / "innocent", pairs_for(base, 0.01))
    pairs = pairs_for(base, 0.01, 20)
    getattr(pairs[UP], leaf)[2, 3] = value
    bad = hand.peft(tmp_path / "broken", pairs)
    error = failing(tmp_path, base, [(good, 1.0), (bad, 1.0)])
    assert error.exit_code == 3
    told = f"{error.message} {error.details}"
    assert f"{UP}.weight" in told
    assert "broken" in told
    assert "innocent" not in told


# ----------------------------------------------------------------------------------------------------------- another output dtype


@pytest.mark.parametrize(("name", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16), ("F32", torch.float32)])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=named)
def test_another_output_dtype(source: torch.dtype, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """All plain floats are cast, merged or not, from one sum rounded once; codes and integers stay; the configuration follows."""
    folder = tmp_path / "base"
    folder.mkdir()
    base = hand.language_model(256, source) | {"model.steps": torch.arange(5), "model.codes": hand.noise(8, 8).to(E4M3)}
    hand.save(folder / "model.safetensors", base)
    settings = {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float64", "dtype": "float64", "tie_word_embeddings": False, "x": [1]}
    (folder / "config.json").write_text(json.dumps(settings))
    pairs = pairs_for(base, 0.05)
    merge(folder, [(hand.peft(tmp_path / "adapter", pairs), 0.5)], tmp_path / "out", dtype=name, verify=True)
    after = load_file(tmp_path / "out" / "model.safetensors")
    for key, old in base.items():
        if key.startswith("model.steps") or key.startswith("model.codes"):
            assert after[key].dtype == old.dtype
            assert torch.equal(hand.bits(after[key]), hand.bits(old))
        elif key in WEIGHTS:
            one = pairs[key.removesuffix(".weight")]
            wanted = old.double() + 0.5 * one.delta()
            if dtype in HALF:
                near(after[key], hand.nearest(wanted, dtype), dtype)
            else:
                assert after[key].dtype == dtype
                assert float(((after[key].double() - wanted).abs() / (old.double().abs() + one.reach())).max()) < 1e-6
        else:
            assert after[key].dtype == dtype
            assert torch.equal(after[key].double(), hand.nearest(old.double(), dtype)), key
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found == settings | {"torch_dtype": named(dtype), "dtype": named(dtype)}


def test_a_cast_that_overflows_names_the_tensor(tmp_path: Path) -> None:
    """Also where no adapter changes it."""
    base = hand.language_model(128, torch.float32)
    base[f"{NORM}.weight"][2] = 1e5
    error = failing(tmp_path, base, [(hand.peft(tmp_path / "adapter", pairs_for(base, 0.01)), 1.0)], dtype="F16")
    assert (error.exit_code, f"{NORM}.weight" in error.message, "F16" in error.message) == (3, True, True)

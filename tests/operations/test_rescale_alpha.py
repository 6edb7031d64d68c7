"""rescale-alpha: alpha in every form, what stays to the bit, rounding, the range of narrow dtypes, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loratools.errors import InputError, UnsupportedError, UsageError
from loratools.operations.rescale import rescale_alpha
from tests.operations.made import (
    ATTENTION,
    PROJ,
    SHAPES,
    Make,
    Save,
    factors,
    kohya,
    kohya_file,
    parts,
    written,
)
from tests.operations.rescaled import (
    A,
    C,
    P,
    error_of,
    source_of,
)
from tests.reference import deltas

FORMS = {
    "none": None,
    "0-d": torch.tensor(2.0),
    "[1]": torch.tensor([2.0]),
    "int": torch.tensor(2),
    "bf16": torch.tensor(2.0).bfloat16(),
    "f16 [1]": torch.tensor([2.0]).half(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("request_", [{"alpha": 100.3}, {"strength": 100.3}, {"alpha": "rank"}, {"fold": True}])
def test_r4_alpha_in_every_form(form: str, request_: dict[str, Any], randn: Make, save: Save, tmp_path: Path) -> None:
    """sd-scripts#2169: `NoneType / NoneType`. The new alpha is a float32 of the old one's shape."""
    tensors = {
        key: tensor for path in (ATTENTION, PROJ) for key, tensor in written(kohya(path), *factors(randn, SHAPES[path]), None).items()
    }
    stored = FORMS[form]
    if stored is not None:
        tensors |= {f"{A}.alpha": stored, f"{P}.alpha": stored.clone()}
    a, out = save("a.safetensors", tensors), tmp_path / "out.safetensors"
    result = rescale_alpha(a, out, **request_)
    assert error_of(a, out, request_.get("strength", 1.0)) < 2e-7
    assert result["alpha_before"] == ({"none": 2} if stored is None else {"2": 2})
    alphas = {key: tensor for key, tensor in load_file(out).items() if key.endswith("alpha")}
    if request_.get("fold"):
        assert alphas == {}
        return
    value = {"alpha": {"rank": 4.0}.get(str(request_.get("alpha")), 100.3), "strength": (4 if stored is None else 2) * 100.3}
    wanted = torch.tensor(value[next(iter(request_))])
    assert set(alphas) == {f"{A}.alpha", f"{P}.alpha"}
    for tensor in alphas.values():
        assert tensor.dtype == torch.float32
        assert tensor.shape == (() if stored is None else stored.shape)
        assert float(tensor) == float(wanted)
    keys = list(parts(out)[0])
    assert keys.index(f"{A}.alpha") < keys.index(f"{A}.lora_down.weight") or stored is not None


def test_r6_a_strength_changes_alpha_tensors_only(randn: Make, save: Save, tmp_path: Path) -> None:
    pairs = {path: factors(randn, shape) for path, shape in SHAPES.items()}
    a = save("a.safetensors", {key: tensor.half() for key, tensor in kohya_file(pairs).items()}, {"author": "somebody"})
    old = load_file(a)
    for strength in (1.0, 2.0):
        out = tmp_path / f"{strength:g}.safetensors"
        result = rescale_alpha(a, out, strength=strength)
        assert result["max_relative_error"] == 0.0
        for key, tensor in load_file(out).items():
            assert float(tensor) == 2 * strength if key.endswith("alpha") else torch.equal(tensor, old[key])
    assert parts(tmp_path / "1.safetensors")[1] == parts(a)[1]
    assert parts(tmp_path / "1.safetensors")[0] == parts(a)[0]


@pytest.mark.parametrize("alpha", [8.0, 0.125, "rank"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_r6_powers_of_two_lose_no_bit(alpha: float | str, dtype: torch.dtype, randn: Make, save: Save, tmp_path: Path) -> None:
    """There and back, the same bytes."""
    pairs = {path: factors(randn, shape) for path, shape in SHAPES.items()}
    tensors = {key: tensor if key.endswith("alpha") else tensor.to(dtype) for key, tensor in kohya_file(pairs).items()}
    a, out, back = save("a.safetensors", tensors), tmp_path / "out.safetensors", tmp_path / "back.safetensors"
    result = rescale_alpha(a, out, alpha=alpha)
    assert result["max_relative_error"] == 0.0
    assert error_of(a, out) == 0.0
    rescale_alpha(out, back, alpha=2.0)
    assert parts(back)[1] == parts(a)[1]


def test_r8_alpha_is_not_rounded_with_the_factors(randn: Make, save: Save, tmp_path: Path) -> None:
    """`--dtype bf16` made 100.3 a 100.5."""
    pairs = {path: factors(randn, shape) for path, shape in SHAPES.items()}
    a, out = save("a.safetensors", kohya_file(pairs, 100.3)), tmp_path / "out.safetensors"
    for request_, wanted in (({"strength": 1.0}, 100.3), ({"alpha": 100.3}, 100.3), ({"alpha": 33.1}, 33.1), ({"strength": 3.0}, 300.9)):
        result = rescale_alpha(a, out, dtype="bf16", force=True, **request_)  # type: ignore[arg-type]
        for key, tensor in load_file(out).items():
            assert tensor.dtype == (torch.float32 if key.endswith("alpha") else torch.bfloat16)
            if key.endswith("alpha"):
                assert float(tensor) == pytest.approx(wanted, rel=1e-7)
        error = error_of(a, out, request_.get("strength", 1.0))
        assert 1e-4 < error < 6e-3
        assert result["max_relative_error"] == pytest.approx(error, rel=1e-6)
        assert result["rounded_to"] == ["BF16"]


def test_modules_that_have_the_alpha_keep_every_byte(randn: Make, save: Save, tmp_path: Path) -> None:
    tensors = {**written(A, *factors(randn, (16, 16)), 5.0), **written(P, *factors(randn, SHAPES[PROJ]), 3.0)}
    tensors = {key: tensor.half() for key, tensor in tensors.items()}
    a, out = save("a.safetensors", tensors), tmp_path / "out.safetensors"
    result = rescale_alpha(a, out, alpha=5.0)
    new = load_file(out)
    for key, tensor in tensors.items():
        if key.startswith(A):
            assert new[key].dtype == tensor.dtype
            assert torch.equal(new[key], tensor)
    assert not torch.equal(new[f"{P}.lora_up.weight"], tensors[f"{P}.lora_up.weight"])
    assert result["changed"] == 1
    assert result["alpha_before"] == {"5": 1, "3": 1}
    assert [row["site"] for row in result["worst"]] == [f"denoiser.{PROJ}"]


# --------------------------------------------------------------------------------------------------------- rounding and range


@pytest.mark.parametrize("request_", [{"alpha": 1e-4}, {"alpha": 1024.0 * 3}, {"strength": 1.0, "dtype": "fp16"}])
def test_float16_factors_neither_under_nor_overflow(request_: dict[str, Any], randn: Make, save: Save, tmp_path: Path) -> None:
    """C14: 1/64 into one float16 factor of 1e-5 zeroes 15 % of its entries; shared by two, no error beyond rounding."""
    up, down = factors(randn, (16, 16))
    dtype = torch.float32 if "dtype" in request_ else torch.float16
    tensors = {key: tensor.to(dtype) for key, tensor in {**written(A, up * 1e-3, down * 3, 4.0)}.items()}
    a = save("a.safetensors", {**tensors, **kohya_file({PROJ: factors(randn, SHAPES[PROJ])})})
    out = tmp_path / "out.safetensors"
    result = rescale_alpha(a, out, **request_)
    assert 0 < error_of(a, out) < 1e-3
    assert result["max_relative_error"] == pytest.approx(error_of(a, out), rel=1e-6)


def test_a_narrower_dtype_is_balanced_and_rounded_once(randn: Make, save: Save, tmp_path: Path) -> None:
    """float32 → float16 with a ratio of 3 / 2^22: in one factor alone most of it would be zero."""
    up, down = factors(randn, (16, 16))
    a = save("a.safetensors", {**written(A, up * 0.01, down * 0.01, 3.0), **kohya_file({PROJ: factors(randn, SHAPES[PROJ])}, 3.0)})
    out = tmp_path / "out.safetensors"
    rescale_alpha(a, out, alpha=2.0**20, dtype="fp16")
    new = load_file(out)
    assert not bool((new[f"{A}.lora_up.weight"] == 0).any())
    exact = deltas(a)[A]
    assert float((deltas(out)[A] - exact).norm() / exact.norm()) < 0.1
    rescale_alpha(a, out, alpha=5.0, dtype="fp16", force=True)
    ratio = 3.0 / float(load_file(out)[f"{A}.alpha"])
    took = torch.round(torch.log2((load_file(out)[f"{A}.lora_down.weight"].double() / (down * 0.01).double()).mean()))
    wanted = ((up * 0.01).double() * ratio / 2.0 ** float(took)).half()
    assert torch.equal(load_file(out)[f"{A}.lora_up.weight"], wanted)


@pytest.mark.parametrize("alpha", [1e-20, 1e15])
def test_what_float16_cannot_hold_is_refused_by_name(alpha: float, randn: Make, save: Save, tmp_path: Path) -> None:
    a, out = source_of("lora", randn, save, torch.float16), tmp_path / "out.safetensors"
    with pytest.raises(UnsupportedError) as refused:
        rescale_alpha(a, out, alpha=alpha)
    assert len(refused.value.details) == 2
    assert f"{A}.lora_up.weight" in refused.value.details[0]
    assert "fp32" in str(refused.value.fix)
    assert not out.exists()
    rescale_alpha(a, out, alpha=alpha, dtype="fp32")
    assert error_of(a, out) < 2e-7


def test_a_dense_value_that_overflows_is_refused_by_name(randn: Make, save: Save, tmp_path: Path) -> None:
    a = save("a.safetensors", {f"{A}.diff": randn(16, 16).half(), **kohya_file({PROJ: factors(randn, SHAPES[PROJ])})})
    with pytest.raises(InputError) as refused:
        rescale_alpha(a, tmp_path / "out.safetensors", strength=1e6)
    assert f"{A}.diff" in refused.value.message + "".join(refused.value.details)
    assert "fp32" in str(refused.value.fix)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_dtype_that_overflows_is_refused_before_it_is_written(dry_run: bool, randn: Make, save: Save, tmp_path: Path) -> None:
    """70000 is beyond float16; the alpha that stays does not help."""
    up, down = factors(randn, (16, 16))
    a = save("a.safetensors", {**written(A, up.fill_(70000.0), down, 4.0), **kohya_file({PROJ: factors(randn, SHAPES[PROJ])}, 4.0)})
    for request_ in ({"strength": 1.0}, {"alpha": 4.0}):
        with pytest.raises(UnsupportedError, match="cannot be rescaled") as refused:
            rescale_alpha(a, tmp_path / "out.safetensors", dtype="fp16", dry_run=dry_run, **request_)  # type: ignore[arg-type]
        assert f"{A}.lora_up.weight" in refused.value.details[0]
        assert "F16" in refused.value.details[0]
        assert not (tmp_path / "out.safetensors").exists()


def test_nan_is_refused_with_every_name(randn: Make, save: Save, tmp_path: Path) -> None:
    a = source_of("lora", randn, save)
    tensors = load_file(a)
    tensors[f"{A}.lora_up.weight"][0, 0] = float("nan")
    tensors[f"{P}.lora_down.weight"][0, 0] = float("inf")
    bad = save("bad.safetensors", tensors)
    with pytest.raises(InputError) as refused:
        rescale_alpha(bad, tmp_path / "out.safetensors", strength=2.0)
    assert set(refused.value.details) == {f"bad.safetensors: {A}.lora_up.weight", f"bad.safetensors: {P}.lora_down.weight"}


def test_nothing_to_rescale_is_said(randn: Make, save: Save, tmp_path: Path) -> None:
    a = save("a.safetensors", {f"{A}.oft_blocks": randn(4, 4, 4), f"{P}.diff": randn(16, 16, 1, 1), f"{C}.diff": randn(16, 32, 3, 3)})
    for request_ in ({"alpha": 8.0}, {"fold": True}):
        with pytest.raises(UnsupportedError, match="no module has a scale"):
            rescale_alpha(a, tmp_path / "out.safetensors", **request_)  # type: ignore[arg-type]


def test_an_alpha_of_zero_is_refused_with_a_way_out(randn: Make, save: Save, tmp_path: Path) -> None:
    a = save("a.safetensors", kohya_file({PROJ: factors(randn, SHAPES[PROJ])}, 0.0))
    with pytest.raises(InputError) as refused:
        rescale_alpha(a, tmp_path / "out.safetensors", alpha=8.0)
    assert str(refused.value.fix).startswith("loratools convert ")


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"alpha": 8.0, "fold": True},
        {"alpha": "rank", "strength": 2.0},
        {"strength": 0.0},
        {"strength": float("nan")},
        {"strength": float("inf")},
        {"alpha": 0.0},
        {"alpha": -4.0},
        {"alpha": "half"},
    ],
)
def test_wrong_requests(request_: dict[str, Any], randn: Make, save: Save, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        rescale_alpha(source_of("lora", randn, save), tmp_path / "out.safetensors", **request_)


def test_the_source_is_never_the_output(randn: Make, save: Save, tmp_path: Path, digest: Any) -> None:
    a = source_of("lora", randn, save)
    before = digest(a)
    link = tmp_path / "link.safetensors"
    link.symlink_to(a)
    for out in (a, link):
        with pytest.raises(UsageError):
            rescale_alpha(a, out, strength=2.0, force=True)
    assert digest(a) == before


def test_a_dry_run_says_all_and_writes_nothing(randn: Make, save: Save, tmp_path: Path) -> None:
    a, out = source_of("lora", randn, save, torch.float16), tmp_path / "out.safetensors"
    planned = rescale_alpha(a, out, alpha=5.0, dry_run=True)
    assert not out.exists()
    assert planned["plan"]["tensors"] == 6
    done = rescale_alpha(a, out, alpha=5.0)
    assert planned["plan"]["bytes"] == len(parts(out)[1])
    assert done == {key: value for key, value in planned.items() if key != "plan"}


@pytest.mark.parametrize("strength", [0.3, -0.3, 1.0 / 3.0])
def test_what_an_alpha_tensor_rounds_is_told(strength: float, randn: Make, save: Save, tmp_path: Path) -> None:
    """The factors keep their bits (but for a sign), so that the rounding of alpha to float32 is all the error there is."""
    a, out = save("a.safetensors", kohya_file({PROJ: factors(randn, SHAPES[PROJ])}, 2.0)), tmp_path / "out.safetensors"
    result = rescale_alpha(a, out, strength=strength)
    exact = 2.0 * abs(strength)  # a power of two: without rounding in float64
    error = abs(float(torch.tensor(exact, dtype=torch.float32)) - exact) / exact
    assert error > 1e-9
    assert result["max_relative_error"] == pytest.approx(error, rel=1e-6, abs=0)
    assert result["max_relative_error"] == pytest.approx(error_of(a, out, strength), rel=1e-5, abs=0)
    assert result["rounded_to"] == ["F32"]
    assert [row["site"] for row in result["worst"]] == [f"denoiser.{PROJ}"]

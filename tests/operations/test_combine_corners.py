"""combine at its corners: which dtype a sum has, whose error is told, what a weight reaches, what one adapter alone keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loratools.operations.combine import combine
from loratools.operations.convert import convert
from tests.operations.made import ATTENTION, NAMES, PROJ, SHAPES, Make, Save, Tensors, dense, factors, kohya, kohya_file, parts, written
from tests.reference import deltas

A = kohya(ATTENTION)
SITES = (ATTENTION, PROJ)
HALF = (torch.float16, torch.bfloat16)


def anchored(randn: Make, tensors: Tensors) -> dict[str, torch.Tensor]:
    """With a module that only SD1 has, in float32, so that no file is a riddle."""
    return {**tensors, **kohya_file({PROJ: factors(randn, SHAPES[PROJ])})}


def lora(randn: Make, dtype: torch.dtype, alpha: float = 2.0) -> dict[str, torch.Tensor]:
    up, down = factors(randn, SHAPES[ATTENTION])
    return written(A, up.to(dtype), down.to(dtype), alpha)


def loha(randn: Make, dtype: torch.dtype, alpha: float = 2.0) -> dict[str, torch.Tensor]:
    shapes = {"hada_w1_a": (16, 2), "hada_w1_b": (2, 16), "hada_w2_a": (16, 2), "hada_w2_b": (2, 16)}
    return {f"{A}.alpha": torch.tensor(alpha), **{f"{A}.{role}": randn(*shape, dtype=dtype) for role, shape in shapes.items()}}


def full_lokr(randn: Make, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {f"{A}.alpha": torch.tensor(3.0), f"{A}.lokr_w1": randn(4, 4, dtype=dtype), f"{A}.lokr_w2": randn(4, 4, dtype=dtype)}


def full_diff(randn: Make, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {f"{A}.diff": randn(16, 16, dtype=dtype)}


def dtypes(path: Path) -> set[str]:
    """Of the factors at the attention site."""
    return {row["dtype"] for name, row in parts(path)[0].items() if name.startswith(f"{A}.") and not name.endswith("alpha")}


def written_error(out: Path, expected: torch.Tensor) -> float:
    """‖written - expected‖ of the attention site, relative."""
    return float((deltas(out)[A].flatten(1) - expected).norm() / expected.norm())


# ---------------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        (torch.float16, torch.float16, "F16"),
        (torch.float16, torch.float32, "F32"),
        (torch.float32, torch.bfloat16, "F32"),
        (torch.bfloat16, torch.float16, "F32"),
        (torch.float16, torch.float64, "F64"),
    ],
)
def test_factors_join_in_what_holds_both(
    randn: Make, save: Save, tmp_path: Path, first: torch.dtype, second: torch.dtype, together: str
) -> None:
    """Of one scale, so nothing is rounded: rows and columns are the inputs' own values."""
    one, two = lora(randn, first), lora(randn, second)
    a, b = save("a.safetensors", anchored(randn, one)), save("b.safetensors", anchored(randn, two))
    result = combine([(a, 1.0), (b, 1.0)], tmp_path / "out.safetensors")
    assert dtypes(tmp_path / "out.safetensors") == {together}
    assert result["relative_error"] == 0
    found = load_file(tmp_path / "out.safetensors")
    for half, axis in (("lora_down", 0), ("lora_up", 1)):
        expected = torch.cat([one[f"{A}.{half}.weight"].double(), two[f"{A}.{half}.weight"].double()], axis)
        assert torch.equal(found[f"{A}.{half}.weight"].double(), expected)


@pytest.mark.parametrize("make", [full_diff, full_lokr])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("weight", "fits"), [(0.5, True), (-2.0, True), (0.3, False), (-1e6, False), (2.0**-20, None)])
def test_a_lone_module_without_alpha_is_widened_where_its_weight_does_not_fit(
    randn: Make, save: Save, tmp_path: Path, make: Callable[..., Any], dtype: torch.dtype, weight: float, fits: bool | None
) -> None:
    """2⁻²⁰ is a power of two that bfloat16 has the exponents for, float16 has not."""
    tensors = make(randn, dtype)
    a, out = save("a.safetensors", anchored(randn, tensors)), tmp_path / "out.safetensors"
    combine([(a, weight)], out)
    kept = fits if fits is not None else dtype == torch.bfloat16
    changed = {row["dtype"] for name, row in parts(out)[0].items() if name.startswith(f"{A}.") and name.endswith(("diff", "lokr_w1"))}
    assert changed == ({NAMES[dtype]} if kept else {"F32"})
    assert written_error(out, weight * deltas(a)[A]) <= (0.0 if kept else 1e-7)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("turned", [False, True])
def test_a_loha_beside_a_lora_is_float32(randn: Make, save: Save, tmp_path: Path, dtype: torch.dtype, turned: bool) -> None:
    """Its exact LoRA has products of factors, which 16 bits would round."""
    files = [save(f"{n}.safetensors", anchored(randn, make(randn, dtype, 2.0))) for n, make in (("loha", loha), ("lora", lora))]
    expected = sum(deltas(path)[A] for path in files)
    out = tmp_path / "out.safetensors"
    combine([(path, 1.0) for path in (reversed(files) if turned else files)], out)
    assert dtypes(out) == {"F32"}
    assert written_error(out, expected) < 1e-6  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("weight", "settings", "least", "most"),
    [
        (0.3, {}, 1e-9, 1e-7),  # 0.3 goes into factors of float32
        (0.3, {"to": "diffusers"}, 1e-9, 1e-7),
        (1.0, {}, 0.0, 0.0),  # scales of 3 / 4 both, kept in alpha
        (1.0, {"to": "diffusers"}, 1e-9, 1e-7),  # which diffusers has none of
        (1.0, {"dtype": "bf16"}, 1e-3, 1e-2),
        (0.3, {"dtype": "bf16"}, 1e-3, 1e-2),
        (0.3, {"dtype": "fp16"}, 1e-4, 1e-3),
        (0.3, {"rank": 8, "dtype": "bf16"}, 1e-3, 1e-2),  # the whole rank
        (0.3, {"energy": 1.0, "dtype": "bf16"}, 1e-3, 1e-2),
        (0.3, {"rank": 7, "dtype": "bf16"}, 1e-3, 1e-2),  # without the eighth singular value, 1e-4 of the first
        (0.3, {"energy": 0.9999999, "dtype": "bf16"}, 1e-3, 1e-2),
        (0.3, {"rank": 7, "dtype": "bf16", "method": "dare", "density": 1.0}, 1e-3, 1e-2),
    ],
)
def test_the_error_that_is_told_has_the_rounding_in_it(
    randn: Make, save: Save, tmp_path: Path, weight: float, settings: dict[str, Any], least: float, most: float
) -> None:
    """Against the file as it is, over both sites."""
    pairs = [{path: factors(randn, SHAPES[path]) for path in SITES} for _ in range(2)]
    for up, _ in pairs[1].values():
        up[:, 3] *= 1e-4
    files = [save(f"{place}.safetensors", kohya_file(made, 3.0)) for place, made in enumerate(pairs)]
    expected = {path: weight * dense(*pairs[0][path], 0.75) + dense(*pairs[1][path], 0.75) for path in SITES}
    out = tmp_path / "out.safetensors"
    result = combine([(files[0], weight), (files[1], 1.0)], out, **settings)
    found = deltas(out)
    names = {path: f"unet.{path}" if "to" in settings else kohya(path) for path in SITES}
    error = sum(float((found[names[path]].flatten(1) - delta).norm()) ** 2 for path, delta in expected.items())
    relative = (error / sum(float(delta.norm()) ** 2 for delta in expected.values())) ** 0.5
    assert least <= result["relative_error"] <= most
    assert relative == pytest.approx(result["relative_error"], rel=1e-4, abs=1e-14)


# ---------------------------------------------------------------------------------------------------- one adapter alone, weighted


@pytest.mark.parametrize("make", [lora, loha, full_lokr, full_diff])
@pytest.mark.parametrize("weight", [0.5, -0.3, 2.0])
def test_a_weight_reaches_the_bias_of_a_lone_module(
    randn: Make, save: Save, tmp_path: Path, make: Callable[..., Any], weight: float
) -> None:
    tensors = {**make(randn, torch.float32), f"{A}.diff_b": randn(16)}
    a, out = save("a.safetensors", anchored(randn, tensors)), tmp_path / "out.safetensors"
    combine([(a, weight)], out)
    torch.testing.assert_close(load_file(out)[f"{A}.diff_b"].double(), weight * tensors[f"{A}.diff_b"].double(), rtol=1e-6, atol=0)
    bare = [save(f"bare-{path.name}", {k: v for k, v in load_file(path).items() if not k.endswith("diff_b")}) for path in (a, out)]
    torch.testing.assert_close(deltas(bare[1])[A], weight * deltas(bare[0])[A], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("weight", [0.5, -0.3, -1.0, 2.0])
def test_a_weight_reaches_a_bias_that_stands_under_the_scale(randn: Make, peft: Callable[..., Path], tmp_path: Path, weight: float) -> None:
    """PEFT's lora_B.bias counts alpha / r times: it is weighted once, by alpha, and has its sign from the weight."""
    tensors: dict[str, torch.Tensor] = {}
    for path in SITES:
        up, down = factors(randn, SHAPES[path])
        stem = f"base_model.model.{path}"
        tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up, f"{stem}.lora_B.bias": randn(16)}
    config = {"r": 4, "lora_alpha": 3, "target_modules": ["to_q", "proj_in"], "lora_bias": True}
    combine([(peft("a", tensors, config), weight)], tmp_path / "out")
    found, after = load_file(tmp_path / "out/adapter_model.safetensors"), json.loads((tmp_path / "out/adapter_config.json").read_text())
    for path in SITES:
        bias = f"base_model.model.{path}.lora_B.bias"
        mine = found[bias].double() * after["lora_alpha"] / after["r"]
        torch.testing.assert_close(mine, weight * 0.75 * tensors[bias].double(), rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------------------------- one adapter alone, as it is


def folded(randn: Make, save: Save, tmp_path: Path, alphas: tuple[float, float] = (3.0, 3.0)) -> tuple[Path, Path]:
    """A kohya file of float16, and what a conversion to diffusers made of it: alpha is in the factors, and remembered."""
    tensors: dict[str, torch.Tensor] = {}
    for path, alpha in zip(SITES, alphas, strict=True):
        tensors |= kohya_file({path: tuple(tensor.half() for tensor in factors(randn, SHAPES[path]))}, alpha)  # type: ignore[dict-item]
    original = save("original.safetensors", tensors)
    convert(original, tmp_path / "folded.safetensors", "diffusers")
    return original, tmp_path / "folded.safetensors"


def values(path: Path) -> dict[str, tuple[str, list[int], list[float]]]:
    """name → (dtype, shape, values): the file but for its metadata and order."""
    return {name: (str(tensor.dtype), list(tensor.shape), tensor.double().flatten().tolist()) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("alphas", [(1.0, 1.0), (2.0, 8.0)])
def test_an_adapter_alone_keeps_the_alpha_it_remembers(randn: Make, save: Save, tmp_path: Path, alphas: tuple[float, float]) -> None:
    """Through combine and back to kohya: the original's alphas and factors, bit for bit."""
    original, path = folded(randn, save, tmp_path, alphas)
    combine([(path, 1.0)], tmp_path / "same.safetensors")
    assert parts(tmp_path / "same.safetensors")[1] == parts(path)[1]
    convert(tmp_path / "same.safetensors", tmp_path / "back.safetensors", "kohya")
    assert values(tmp_path / "back.safetensors") == values(original)
    combine([(path, 1.0)], tmp_path / "direct.safetensors", to="kohya")
    assert values(tmp_path / "direct.safetensors") == values(original)


@pytest.mark.parametrize("settings", [{}, {"rank": 2}])
@pytest.mark.parametrize("weight", [0.5, -0.25])
def test_an_alpha_of_before_is_forgotten_where_the_strength_is_another(
    randn: Make, save: Save, tmp_path: Path, weight: float, settings: dict[str, Any]
) -> None:
    """Kept, it would be taken out of factors it is not in."""
    original, path = folded(randn, save, tmp_path, (1.0, 2.0))
    combine([(path, weight)], tmp_path / "weak.safetensors", **settings)
    convert(tmp_path / "weak.safetensors", tmp_path / "back.safetensors", "kohya")
    for name, delta in deltas(original).items():
        found, expected = deltas(tmp_path / "back.safetensors")[name].flatten(1), weight * delta.flatten(1)
        bound = float(torch.linalg.svdvals(expected)[2 if settings else 16 :].norm())
        assert float((found - expected).norm()) == pytest.approx(bound, rel=1e-3, abs=1e-9)
    remembered = json.loads(parts(tmp_path / "weak.safetensors")[0]["__metadata__"].get("loratools.alpha", "{}"))
    assert remembered == {}


@pytest.mark.parametrize(("name", "settings"), [("out.safetensors", {}), ("out.safetensors", {"rank": 2}), ("out", {"to": "peft"})])
def test_names_without_a_folder_are_in_the_current_one(
    randn: Make, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, settings: dict[str, Any]
) -> None:
    save("a.safetensors", kohya_file({path: factors(randn, SHAPES[path]) for path in SITES}))
    monkeypatch.chdir(tmp_path)
    result = combine([("a.safetensors", 1.0), ("a.safetensors", -0.5)], name, **settings)
    assert result["output"] == name
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a.safetensors", name])
    assert len(deltas(tmp_path / name)) == len(SITES)

"""rescale-alpha on modules: the dense delta of every kind, and what alpha does not scale.

Expected deltas come from tests.reference or from einsum here, in float64, of the file before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loratools.errors import UnsupportedError
from loratools.operations.rescale import rescale_alpha
from tests.operations.made import (
    CONV,
    PROJ,
    SHAPES,
    Make,
    Save,
    factors,
    kohya,
    kohya_file,
    parts,
    render,
    written,
)
from tests.operations.rescaled import (
    KINDS,
    NORM,
    A,
    C,
    P,
    error_of,
    same_keys,
    source_of,
)

# ------------------------------------------------------------------------------------------------------------- every kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [5.0, "rank"])
def test_another_alpha_is_the_same_function(
    kind: str, alpha: float | str, dtype: torch.dtype, randn: Make, save: Save, tmp_path: Path
) -> None:
    a, out = source_of(kind, randn, save, dtype), tmp_path / "out.safetensors"
    result = rescale_alpha(a, out, alpha=alpha)
    error = error_of(a, out)
    assert error < (2e-7 if dtype == torch.float32 else 6e-4)
    assert result["max_relative_error"] == pytest.approx(error, rel=1e-6, abs=1e-12)
    same_keys(a, out, dtype)
    values = {key.rpartition(".")[0]: float(tensor) for key, tensor in load_file(out).items() if key.endswith("alpha")}
    rank = {"lora": 4, "conv": 4, "tucker": 4, "loha": 2, "lokr": 4, "lokr-w1": 2, "lokr-full": 3}[kind]  # full: alpha stays
    assert values[P] == (4 if alpha == "rank" else 5)
    assert values[C if kind in ("conv", "tucker") else A] == (rank if alpha == "rank" else 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [2.0, 0.3, -1.0, -0.7])
def test_a_strength_multiplies_the_delta(kind: str, strength: float, randn: Make, save: Save, tmp_path: Path) -> None:
    a, out = source_of(kind, randn, save), tmp_path / "out.safetensors"
    result = rescale_alpha(a, out, strength=strength)
    assert result["strength"] == strength
    assert error_of(a, out, strength) < 2e-7
    same_keys(a, out, torch.float32)
    old, new = load_file(a), load_file(out)
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    full = {f"{A}.lokr_w1", f"{A}.lokr_w2"} if kind == "lokr-full" else set()  # alpha is ignored there: a factor takes it
    if strength > 0:
        assert changed - full == {key for key in old if key.endswith("alpha") and not (full and key.startswith(A))}
        assert bool(changed & full) == bool(full)
    else:
        assert all(float(new[key]) > 0 for key in new if key.endswith("alpha"))


@pytest.mark.parametrize("kind", KINDS)
def test_fold_leaves_no_alpha_and_the_same_function(kind: str, randn: Make, save: Save, tmp_path: Path) -> None:
    a, out = source_of(kind, randn, save), tmp_path / "out.safetensors"
    result = rescale_alpha(a, out, fold=True)
    assert error_of(a, out) < 2e-7
    assert not [key for key in load_file(out) if key.endswith("alpha")]
    assert result["alpha_after"] == {"none": 2}
    assert [key for key in parts(a)[0] if not key.endswith("alpha")] == [key for key in parts(out)[0] if key != "__metadata__"]


def glora(path: Path, weight: torch.Tensor) -> torch.Tensor:
    """ΔW = alpha / rank (W a1 a2 + b1 b2), without alpha the scale is 1."""
    part = {key.removeprefix(f"{A}."): tensor.double() for key, tensor in load_file(path).items() if key.startswith(f"{A}.")}
    scale = float(part["alpha"]) / len(part["a2.weight"]) if "alpha" in part else 1.0
    return scale * (weight @ part["a1.weight"] @ part["a2.weight"] + part["b1.weight"] @ part["b2.weight"])


@pytest.mark.parametrize("request_", [{"alpha": 5.0}, {"alpha": "rank"}, {"fold": True}, {"strength": 0.5}, {"strength": -3.0}])
def test_glora_has_its_scale_on_two_products(request_: dict[str, Any], randn: Make, save: Save, tmp_path: Path) -> None:
    shapes = {"a1": (16, 4), "a2": (4, 16), "b1": (16, 4), "b2": (4, 16)}
    tensors = {f"{A}.{name}.weight": randn(*shape) for name, shape in shapes.items()}
    a = save("a.safetensors", {f"{A}.alpha": torch.tensor(3.0), **tensors, **kohya_file({PROJ: factors(randn, SHAPES[PROJ])})})
    out = tmp_path / "out.safetensors"
    result = rescale_alpha(a, out, **request_)
    weight = randn(16, 16).double()
    wanted = request_.get("strength", 1.0) * glora(a, weight)
    assert float((glora(out, weight) - wanted).norm() / wanted.norm()) < 2e-7
    assert result["max_relative_error"] < 2e-7


@pytest.mark.parametrize(("strength", "dtype"), [(2.0, torch.float16), (0.3, torch.float32), (-0.3, torch.float16)])
def test_dense_changes_norms_and_biases_are_multiplied(
    strength: float, dtype: torch.dtype, randn: Make, save: Save, tmp_path: Path
) -> None:
    """diff, w_norm, b_norm and diff_b know no alpha; rounded once to their own dtype."""
    dense = {f"{A}.diff": randn(16, 16), f"{A}.diff_b": randn(16), f"{NORM}.w_norm": randn(16), f"{NORM}.b_norm": randn(16)}
    lora = {**written(C, *factors(randn, SHAPES[CONV]), 3.0), f"{C}.diff_b": randn(16)}
    a = save("a.safetensors", {key: tensor.to(dtype) for key, tensor in {**dense, **lora}.items()})
    out = tmp_path / "out.safetensors"
    result = rescale_alpha(a, out, strength=strength, arch="sd1")
    old, new = load_file(a), load_file(out)
    for key in (*dense, f"{C}.diff_b"):
        torch.testing.assert_close(new[key], (strength * old[key].double()).to(dtype), rtol=0, atol=0)
    assert float(new[f"{C}.alpha"]) == pytest.approx(3 * abs(strength), rel=1e-7)
    if strength == 2.0:
        assert result["max_relative_error"] == 0.0
    else:
        assert 0 < result["max_relative_error"] < 6e-4
        assert result["rounded_to"] == (["F16"] if dtype == torch.float16 else ["F32"])


@pytest.mark.parametrize("request_", [{"alpha": 8.0}, {"fold": True}])
def test_what_alpha_does_not_scale_stays(request_: dict[str, Any], randn: Make, save: Save, tmp_path: Path) -> None:
    """A dense change beside a LoRA, a norm, OFT's constraint, (IA)³, and a bundled embedding."""
    oft, ia3 = kohya("up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_k"), kohya("up_blocks.3.attentions.0.proj_out")
    others = {
        f"{A}.diff": randn(16, 16), f"{A}.diff_b": randn(16), f"{NORM}.w_norm": randn(16),
        f"{oft}.oft_blocks": randn(4, 4, 4), f"{oft}.alpha": torch.tensor(0.5),
        f"{ia3}.weight": randn(16), f"{ia3}.on_input": torch.tensor(False),
        "bundle_emb.ohwx.string_to_param.*": randn(2, 768),
    }  # fmt: skip
    a = save("a.safetensors", {**written(A, *factors(randn, (16, 16)), 3.0), **others})
    out = tmp_path / "out.safetensors"
    result = rescale_alpha(a, out, arch="sd1", **request_)
    new = load_file(out)
    for key, tensor in others.items():
        assert torch.equal(new[key], tensor), key
    assert result["modules"] == 5
    assert result["changed"] == 1
    assert any("OFT" in text for text in result["warnings"])


@pytest.mark.parametrize("role", ["dora_scale", "oft_blocks", "boft", "ia3", "set_weight"])
def test_a_strength_is_refused_for_what_is_not_linear_in_it(role: str, randn: Make, save: Save, tmp_path: Path) -> None:
    """R6: all sites listed, nothing written."""
    made = {
        "dora_scale": {**written(A, *factors(randn, (16, 16)), 3.0), f"{A}.dora_scale": randn(16, 1).abs()},
        "oft_blocks": {f"{A}.oft_blocks": randn(4, 4, 4), f"{A}.alpha": torch.tensor(0.5)},
        "boft": {f"{A}.oft_blocks": randn(2, 4, 4, 4)},
        "ia3": {f"{A}.weight": randn(16), f"{A}.on_input": torch.tensor(False)},
        "set_weight": {f"{A}.set_weight": randn(16, 16)},
    }[role]
    twin = {key.replace("attn1_to_q", "attn1_to_v"): tensor for key, tensor in made.items()}
    a = save("a.safetensors", {**made, **twin, **kohya_file({PROJ: factors(randn, SHAPES[PROJ])})})
    with pytest.raises(UnsupportedError) as refused:
        rescale_alpha(a, tmp_path / "out.safetensors", strength=2.0)
    assert [line.partition(":")[0].rpartition(".")[2] for line in refused.value.details] == ["to_q", "to_v"]
    assert not (tmp_path / "out.safetensors").exists()


def test_dora_keeps_its_function_under_another_alpha(randn: Make, save: Save, tmp_path: Path) -> None:
    tensors = {**written(A, *factors(randn, (16, 16)), 3.0), f"{A}.dora_scale": randn(16, 1).abs()}
    a = save("a.safetensors", {**tensors, **kohya_file({PROJ: factors(randn, SHAPES[PROJ])})})
    out = tmp_path / "out.safetensors"
    for request_ in ({"alpha": 7.0}, {"fold": True}):
        rescale_alpha(a, out, force=True, **request_)  # type: ignore[arg-type]
        new = load_file(out)
        assert torch.equal(new[f"{A}.dora_scale"], tensors[f"{A}.dora_scale"])
        for path in (a, out):
            bare = {key: tensor for key, tensor in load_file(path).items() if not key.endswith("dora_scale")}
            path.with_name(f"bare-{path.name}").write_bytes(render(bare))
        assert error_of(tmp_path / "bare-a.safetensors", tmp_path / "bare-out.safetensors") < 2e-7


@pytest.mark.parametrize("beside", ["lora", "nothing"])
@pytest.mark.parametrize(("strength", "dtype"), [(0.3, None), (-0.7, None), (1.0, "fp16"), (0.3, "fp16")])
def test_what_rounding_takes_from_a_bias_is_told(
    strength: float, dtype: str | None, beside: str, randn: Make, save: Save, tmp_path: Path
) -> None:
    """The weight loses next to nothing, its factors being small whole numbers: the largest error is that of the bias in float16."""
    up, down = (factor.mul(4).round() for factor in factors(randn, SHAPES[CONV]))
    bias = randn(16)
    tensors = {**(written(C, up, down, 2.0) if beside == "lora" else {}), f"{C}.diff_b": bias if dtype else bias.half()}
    a = save("a.safetensors", {**tensors, **kohya_file({PROJ: (torch.ones(16, 4, 1, 1), torch.ones(4, 16, 1, 1))})})
    out = tmp_path / "out.safetensors"
    result = rescale_alpha(a, out, strength=strength, dtype=dtype, arch="sd1")
    wanted = strength * load_file(a)[f"{C}.diff_b"].double()
    found = load_file(out)[f"{C}.diff_b"]
    assert found.dtype == torch.float16
    error = float((found.double() - wanted).norm() / wanted.norm())
    assert error > 1e-4
    assert result["max_relative_error"] == pytest.approx(error, rel=1e-6)
    assert result["worst"][0] == {"site": f"denoiser.{CONV}", "relative_error": result["max_relative_error"]}


@pytest.mark.parametrize(("steps", "rounded", "refused"), [(37, 11, False), (17, 5, True), (12, 4, True), (9, 3, True)])
def test_a_loss_of_more_than_a_percent_has_to_be_asked_for(
    steps: int, rounded: int, refused: bool, randn: Make, save: Save, tmp_path: Path
) -> None:
    """Values of n steps of 2^-24, float16's smallest, times 0.3: 11.1 becomes 11 (0.9 %), 5.1 5 (2 %), 3.6 4 (11 %), 2.7 3 (11 %)."""
    step, out = 2.0**-24, tmp_path / "out.safetensors"
    lora = kohya_file({PROJ: factors(randn, SHAPES[PROJ])})
    a = save("a.safetensors", {f"{A}.diff": torch.full((16, 16), steps * step, dtype=torch.float16), **lora})
    error = abs(rounded / (0.3 * steps) - 1)
    assert (error > 0.01) == refused
    if refused:
        with pytest.raises(UnsupportedError, match="1 module cannot be rescaled") as told:
            rescale_alpha(a, out, strength=0.3)
        assert f"off by {error:.2g} ({A}.diff)" in told.value.details[0]
        assert not out.exists()
    result = rescale_alpha(a, out, strength=0.3, dtype="fp16" if refused else None)
    assert torch.equal(load_file(out)[f"{A}.diff"], torch.full((16, 16), rounded * step, dtype=torch.float16))
    assert result["max_relative_error"] == pytest.approx(error, rel=1e-6)

"""resize of every kind with every criterion (R1), against the SVD of the dense ΔW in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from loratools.cli.main import cli
from loratools.errors import UnsupportedError
from loratools.operations.resize import resize
from tests.operations.made import CONV, SHAPES, Make, Save, factors, written
from tests.operations.resized import (
    KINDS,
    LORA_RANKS,
    NORM,
    A,
    C,
    P,
    anchor,
    error_of,
    kept,
    kind_of,
    rank_in,
    same,
    spectrum,
    whole_error,
)  # fmt: skip

CRITERIA: list[dict[str, Any]] = [{"rank": 2}, {"energy": 0.8}, {"error": 0.3}, {"ratio": 1.7}, {"rank": 1}, {"energy": 1.0}]


def stem_of(tensors: dict[str, torch.Tensor]) -> str:
    return next(iter(tensors)).partition(".")[0]


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_as_near_as_can_be(kind: str, criterion: dict[str, Any], randn: Make, save: Save, tmp_path: Path) -> None:
    """R1, lesson 1: what is written is the best approximation there is of its rank, and its error is the one that is told."""
    tensors = kind_of(kind, randn)
    stem, out = stem_of(tensors), tmp_path / "out.safetensors"
    a = save("a.safetensors", {**tensors, **anchor(randn)})
    result = resize(a, out, **criterion)
    sigma = spectrum(a, stem)
    wanted = kept(sigma, **criterion)
    found = load_file(out)
    if wanted == min(LORA_RANKS[kind], len(sigma)):
        assert same(tensors, found, [*tensors]), "everything is kept: nothing is to be changed"
        assert result["relative_error"] == 0
    else:
        assert rank_in(out, stem) == wanted
        best = float((sigma[wanted:].square().sum() / sigma.square().sum()).sqrt())
        assert error_of(a, out, stem) == pytest.approx(best, rel=1e-5, abs=3e-7)
        assert found[f"{stem}.lora_down.weight"].shape[1:] == (SHAPES[CONV][1:] if stem == C else (16,))
        assert found[f"{stem}.lora_up.weight"].shape[2:] == ((1, 1) if stem == C else ())
        row = result["worst"][0]
        assert row["rank"] == wanted
        assert row["relative_error"] == pytest.approx(error_of(a, out, stem), rel=1e-6, abs=1e-9)
    assert result["relative_error"] == pytest.approx(whole_error(a, out), rel=1e-6, abs=1e-9)
    assert result["ranks_before"] == {str(rank): 1 for rank in sorted((1, LORA_RANKS[kind]))}
    assert sum(result["ranks_after"].values()) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_what_rounding_takes_is_told_too(kind: str, randn: Make, save: Save, tmp_path: Path) -> None:
    """The error is that of the factors in the file, of what is cut and of what is only rounded."""
    tensors = {**kind_of(kind, randn), **anchor(randn)}
    a = save("a.safetensors", tensors)
    for criterion in ({"error": 1e-3}, {"rank": 3}, {"max_rank": 64}):
        out = tmp_path / "out.safetensors"
        result = resize(a, out, **criterion, dtype="bf16", force=True)
        told = {row["site"].rpartition(".")[2]: row["relative_error"] for row in result["worst"]}
        assert {tensor.dtype for key, tensor in load_file(out).items() if "alpha" not in key} == {torch.bfloat16}
        assert told["proj_in"] == pytest.approx(error_of(a, out, P), rel=1e-6)
        assert max(told.values()) == pytest.approx(max(error_of(a, out, stem) for stem in (P, stem_of(tensors))), rel=1e-4)
        assert result["relative_error"] == pytest.approx(whole_error(a, out), rel=1e-4)


@pytest.mark.parametrize("limit", [0.05, 0.2, 0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_asked_for_is_kept(kind: str, limit: float, randn: Make, save: Save, tmp_path: Path) -> None:
    tensors = {**kind_of(kind, randn), **anchor(randn)}
    a, out = save("a.safetensors", tensors), tmp_path / "out.safetensors"
    resize(a, out, error=limit)
    assert error_of(a, out, stem_of(tensors)) <= limit * (1 + 1e-6) + 2e-7


@pytest.mark.parametrize("kind", ["dora", "dora-in", "oft", "boft", "ia3", "glora"])
def test_kinds_that_multiply_the_base_are_refused_by_name(kind: str, randn: Make, save: Save, tmp_path: Path) -> None:
    lora = written(A, *factors(randn, (16, 16)), 3.0)
    tensors = {
        "dora": {**lora, f"{A}.dora_scale": randn(16, 1).abs()},
        "dora-in": {**lora, f"{A}.dora_scale": randn(1, 16).abs()},
        "oft": {f"{A}.oft_blocks": randn(4, 4, 4), f"{A}.alpha": torch.tensor(0.5)},
        "boft": {f"{A}.oft_blocks": randn(2, 4, 4, 4), f"{A}.alpha": torch.tensor(0.5)},
        "ia3": {f"{A}.weight": randn(16), f"{A}.on_input": torch.tensor(False)},
        "glora": {
            f"{A}.alpha": torch.tensor(3.0),
            f"{A}.a1.weight": randn(16, 4), f"{A}.a2.weight": randn(4, 16), f"{A}.b1.weight": randn(16, 4), f"{A}.b2.weight": randn(4, 16),
        },
    }  # fmt: skip
    a, out = save("a.safetensors", {**tensors[kind], **anchor(randn)}), tmp_path / "out.safetensors"
    with pytest.raises(UnsupportedError, match="1 module of a kind that multiplies") as refused:
        resize(a, out, rank=2)
    assert refused.value.exit_code == 3
    assert refused.value.details == [f"denoiser.up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q: {kind.removesuffix('-in')}"]
    assert "--kind lora --base MODEL --allow-lossy" in (refused.value.fix or "")
    assert not out.exists()


def test_the_fix_of_a_refusal_works(randn: Make, save: Save, tmp_path: Path) -> None:
    """What is told to be done about DoRA makes a file that can be resized, and is the DoRA on its base."""
    up, down, scale, weight = randn(16, 8, 1, 1) * 0.01, randn(8, 16, 1, 1), randn(16, 1, 1, 1).abs() + 1, randn(16, 16, 1, 1)
    a = save("a.safetensors", {**written(P, up, down, 8.0), f"{P}.dora_scale": scale})
    name = "model.diffusion_model.output_blocks.9.1.proj_in.weight"
    base = save("base.safetensors", {name: weight, "first_stage_model.encoder.conv_in.weight": randn(4, 3, 3, 3)})
    with pytest.raises(UnsupportedError) as refused:
        resize(a, tmp_path / "out.safetensors", rank=4)
    words = (refused.value.fix or "").removesuffix(" makes LoRA of them").replace("OUT", str(tmp_path / "plain.safetensors"))
    command = words.replace("MODEL", str(base)).split()[1:]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    told = resize(tmp_path / "plain.safetensors", tmp_path / "out.safetensors", rank=2)
    assert told["ranks_after"] == {"2": 1}


def test_what_has_no_rank_is_kept_and_counted(randn: Make, save: Save, tmp_path: Path) -> None:
    """A LoRA is cut; a full delta and a bias beside it, and a norm, are the same bytes."""
    dense = {f"{A}.diff": randn(16, 16), f"{A}.diff_b": randn(16), f"{NORM}.w_norm": randn(16), f"{NORM}.b_norm": randn(16)}
    lora = written(A, *factors(randn, (16, 16)), 3.0)
    a, out = save("a.safetensors", {**lora, **dense, **anchor(randn)}), tmp_path / "out.safetensors"
    result = resize(a, out, rank=2)
    found = load_file(out)
    assert same(dense, found, [*dense])
    assert rank_in(out, A) == 2
    assert "2 modules without a rank (full deltas, norms, biases): kept" in result["warnings"]
    before = 0.75 * lora[f"{A}.lora_up.weight"].double() @ lora[f"{A}.lora_down.weight"].double()
    after = float(found[f"{A}.alpha"]) / 2 * found[f"{A}.lora_up.weight"].double() @ found[f"{A}.lora_down.weight"].double()
    rest = [dense[f"{A}.diff"], dense[f"{NORM}.w_norm"], anchor_delta(a)]
    total = float(before.norm()) ** 2 + sum(float(delta.double().norm()) ** 2 for delta in rest)
    assert result["relative_error"] == pytest.approx(float((after - before).norm()) / total**0.5, rel=1e-6)


def anchor_delta(path: Path) -> torch.Tensor:
    tensors = load_file(path)
    return tensors[f"{P}.lora_up.weight"].double().flatten(1) @ tensors[f"{P}.lora_down.weight"].double().flatten(1)


def test_a_file_without_any_rank_is_refused(randn: Make, save: Save, tmp_path: Path) -> None:
    a = save("a.safetensors", {f"{P}.diff": randn(16, 16, 1, 1)})
    with pytest.raises(UnsupportedError, match=r"no module has a rank \(dense\)"):
        resize(a, tmp_path / "out.safetensors", rank=2)


@pytest.mark.parametrize("name", ["lora_A.default.weight", "lora_A.weight"])
def test_a_and_b_names_are_cut_under_their_own_names(name: str, randn: Make, save: Save, tmp_path: Path) -> None:
    """R1, R4: these names passed untouched, or ended in an AttributeError."""
    module = "unet.up_blocks.3.attentions.0.proj_in"
    up, down = factors(randn, (16, 16, 1, 1), 8)
    names = (f"{module}.{name}", f"{module}.{name.replace('_A', '_B')}")
    a, out = save("a.safetensors", dict(zip(names, (down, up), strict=True))), tmp_path / "out.safetensors"
    resize(a, out if "default" not in name else out.with_suffix(""), rank=3)
    if "default" in name:  # such names are PEFT's own, and PEFT reads a folder
        assert load_file(tmp_path / "out" / "adapter_model.safetensors")[f"base_model.model.{module[5:]}.lora_A.weight"].shape[0] == 3
        return
    found = load_file(out)
    assert [*found] == sorted(names)
    assert found[names[0]].shape == (3, 16, 1, 1)
    delta = up.double().flatten(1) @ down.double().flatten(1)
    sigma = torch.linalg.svdvals(delta)
    error = (found[names[1]].double().flatten(1) @ found[names[0]].double().flatten(1) - delta).norm()
    assert float(error) == pytest.approx(float(sigma[3:].square().sum().sqrt()), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_negative_alpha_is_cut_with_its_sign(kind: str, randn: Make, save: Save, tmp_path: Path) -> None:
    """ΔW = -|s| · up · down: what is kept of it is no mirror image. (A LoKr of two full factors ignores its alpha.)"""
    tensors = kind_of(kind, randn)
    stem, out = stem_of(tensors), tmp_path / "out.safetensors"
    a = save("a.safetensors", {**tensors, f"{stem}.alpha": torch.tensor(-3.0), **anchor(randn)})
    result = resize(a, out, rank=3)
    sigma = spectrum(a, stem)
    best = float((sigma[3:].square().sum() / sigma.square().sum()).sqrt())
    assert rank_in(out, stem) == 3
    assert 0 < best < 1
    assert error_of(a, out, stem) == pytest.approx(best, rel=1e-5)
    assert result["worst"][0]["relative_error"] == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("criterion", [{"rank": 16}, {"rank": 20}, {"rank": 24}, {"energy": 1.0}, {"error": 0.0}], ids=str)
def test_a_loha_of_more_than_full_rank_is_kept(criterion: dict[str, Any], randn: Make, save: Save, tmp_path: Path) -> None:
    """r² = 25 on a 16x16 matrix, which has rank 16: a limit from 16 on asks for all of it, and below it is cut."""
    shapes = {"w1_a": (16, 5), "w1_b": (5, 16), "w2_a": (16, 5), "w2_b": (5, 16)}
    loha = {f"{A}.alpha": torch.tensor(3.0), **{f"{A}.hada_{part}": randn(*shape) for part, shape in shapes.items()}}
    a, out = save("a.safetensors", {**loha, **anchor(randn)}), tmp_path / "out.safetensors"
    assert len(spectrum(a, A)) == 16
    result = resize(a, out, **criterion)
    assert {key for key in load_file(out) if key.startswith(A)} == set(loha)
    assert same(loha, load_file(out), [*loha])
    assert result["relative_error"] == 0
    resize(a, out, rank=15, force=True)
    assert rank_in(out, A) == 15

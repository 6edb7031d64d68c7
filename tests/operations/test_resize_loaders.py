"""resize for a loader: its limit, plain LoRA, and one rank and one alpha where it reads no patterns (C22). Every ΔW by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.errors import UsageError
from loratools.mapping.loaders import LOADERS, loader_named
from loratools.operations.resize import resize
from tests.operations.made import Make, Save, factors, written
from tests.operations.resized import A, P, anchor, error_of, kind_of, rank_in, same, spectrum

Peft = Callable[..., Path]

Q, V, D = (f"base_model.model.model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"))
CONFIG: dict[str, Any] = {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def mixed(randn: Make, peft: Peft, ranks: tuple[int, int, int], patterns: dict[str, float], name: str = "a", **config: Any) -> Path:
    """Three modules of a language model; ranks below and above 8."""
    tensors, rank_pattern = {}, {}
    for stem, shape, rank in zip((Q, V, D), ((24, 16), (12, 16), (16, 40)), ranks, strict=True):
        up, down = factors(randn, shape, rank)
        tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        rank_pattern |= {} if rank == 8 else {stem.rpartition(".")[2]: rank}
    return peft(name, tensors, {**CONFIG, "rank_pattern": rank_pattern, "alpha_pattern": patterns, **config})


def plain_delta(folder: Path, stem: str) -> torch.Tensor:
    """ΔW as a reader of `r` and `lora_alpha` alone computes it, patterns unread."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    up, down = tensors[f"{stem}.lora_B.weight"].double(), tensors[f"{stem}.lora_A.weight"].double()
    assert (up.shape[1], down.shape[0]) == (config["r"], config["r"])
    return config["lora_alpha"] / config["r"] * up @ down


def by_hand(folder: Path, stem: str, scale: float) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    return scale * tensors[f"{stem}.lora_B.weight"].double() @ tensors[f"{stem}.lora_A.weight"].double()


@pytest.mark.parametrize("loader", ["vllm", "sglang"])
def test_one_rank_and_one_alpha_for_all(loader: str, randn: Make, peft: Peft, tmp_path: Path) -> None:
    """Scales 1, 1/2 and 1/8 by patterns: what reads none of them is right now, to the bit, zeros filling the lower ranks."""
    a, out = mixed(randn, peft, (8, 4, 16), {"v_proj": 2, "down_proj": 2}), tmp_path / "out"
    result = resize(a, out, loader=loader, max_rank=16)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == (16, {}, {}, False)
    assert result["ranks_after"] == {"16": 3}
    assert result["relative_error"] == 0
    for stem, scale in ((Q, 1.0), (V, 0.5), (D, 0.125)):
        assert torch.equal(plain_delta(out, stem), by_hand(a, stem, scale))


def test_what_is_cut_and_what_is_filled_up(randn: Make, peft: Peft, tmp_path: Path) -> None:
    a, out = mixed(randn, peft, (8, 4, 32), {"v_proj": 6, "down_proj": 8}, use_rslora=True), tmp_path / "out"
    result = resize(a, out, loader="vllm", max_rank=16)
    assert "vllm has to be started with --max-lora-rank 16 or more" in result["warnings"]
    scales = {Q: 8 / 8**0.5, V: 6 / 2, D: 8 / 32**0.5}
    errors, norms = 0.0, 0.0
    for stem, scale in scales.items():
        delta = by_hand(a, stem, scale)
        lost = float(torch.linalg.svdvals(delta)[16:].norm()) if stem == D else 0.0
        error = float((plain_delta(out, stem) - delta).norm())
        assert error == pytest.approx(lost, rel=1e-4, abs=2e-7 * float(delta.norm()))
        errors, norms = errors + error**2, norms + float(delta.norm()) ** 2
    assert result["relative_error"] == pytest.approx((errors / norms) ** 0.5, rel=1e-6)


def test_the_spectrum_settles_the_one_rank(randn: Make, peft: Peft, tmp_path: Path) -> None:
    """The largest rank that any module needs is the rank of all."""
    a, out = mixed(randn, peft, (8, 8, 8), {}), tmp_path / "out"
    wanted = 0
    for stem in (Q, V, D):
        sigma = torch.linalg.svdvals(by_hand(a, stem, 1.0)).square()
        wanted = max(wanted, next(k for k in range(1, 9) if float(sigma[:k].sum() / sigma.sum()) >= 0.8))
    assert 1 < wanted < 8
    result = resize(a, out, loader="vllm", energy=0.8)
    assert result["ranks_after"] == {str(wanted): 3}
    assert json.loads((out / "adapter_config.json").read_text())["r"] == wanted
    assert f"vllm has to be started with --max-lora-rank {8 if wanted > 1 else 1} or more" in result["warnings"]
    for stem in (Q, V, D):
        delta = by_hand(a, stem, 1.0)
        assert float((plain_delta(out, stem) - delta).norm() / delta.norm()) <= 0.2**0.5 + 1e-6


def test_a_scale_that_is_no_power_of_two_is_told(randn: Make, peft: Peft, tmp_path: Path) -> None:
    """3 / 8 beside 1 and 1 goes into 16-bit factors, rounded once; the error is that of ΔW as written."""
    a = mixed(randn, peft, (8, 8, 8), {"v_proj": 3})
    file = a / "adapter_model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in load_file(file).items()}, file)
    out = tmp_path / "out"
    result = resize(a, out, loader="vllm")
    found = load_file(out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert same(load_file(file), found, [f"{stem}.lora_{side}.weight" for stem in (Q, D) for side in "AB"])
    delta = by_hand(a, V, 3 / 8)
    error = float((plain_delta(out, V) - delta).norm())
    assert 1e-4 < error / float(delta.norm()) < 4e-3
    assert result["worst"][0]["relative_error"] == pytest.approx(error / float(delta.norm()), rel=1e-6)


def test_a_bias_under_another_scale(randn: Make, peft: Peft, tmp_path: Path) -> None:
    """scale · bias stays, of what is kept and of what is cut."""
    tensors = {}
    for stem, rank in ((Q, 8), (V, 4), (D, 16)):
        tensors |= {f"{stem}.lora_A.weight": randn(rank, 16), f"{stem}.lora_B.weight": randn(16, rank), f"{stem}.lora_B.bias": randn(16)}
    patterns = {"rank_pattern": {"v_proj": 4, "down_proj": 16}, "alpha_pattern": {"v_proj": 2, "down_proj": 4}}
    a, out = peft("a", tensors, {**CONFIG, "lora_bias": True, **patterns}), tmp_path / "out"
    resize(a, out, loader="sglang", max_rank=8)
    found, config = load_file(out / "adapter_model.safetensors"), json.loads((out / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    for stem, own in ((Q, 1.0), (V, 0.5), (D, 0.25)):
        assert torch.equal(scale * found[f"{stem}.lora_B.bias"].double(), own * tensors[f"{stem}.lora_B.bias"].double())


@pytest.mark.parametrize("kind", ["loha", "lokr", "tucker", "lokr-full"])
def test_plain_lora_even_where_the_rank_fits(kind: str, randn: Make, save: Save, tmp_path: Path) -> None:
    tensors = {**kind_of(kind, randn), **anchor(randn)}
    stem = next(iter(tensors)).partition(".")[0]
    a, out = save("a.safetensors", tensors), tmp_path / "out.safetensors"
    result = resize(a, out, loader="nunchaku")
    assert all(key.endswith((".alpha", "lora_up.weight", "lora_down.weight")) for key in load_file(out))
    assert error_of(a, out, stem) < 2e-7
    assert result["worst"][0]["relative_error"] == pytest.approx(error_of(a, out, stem), rel=1e-3)
    resize(a, out, max_rank=64, force=True)
    assert load_file(out).keys() == tensors.keys()


def test_a_limit_is_kept_and_each_module_its_own_rank(randn: Make, save: Save, tmp_path: Path) -> None:
    """C22: beyond rank 64 images were black."""
    tensors = {**written(A, *factors(randn, (96, 96), 72), 36.0), **written(P, *factors(randn, (96, 96, 1, 1), 4), 4.0)}
    a, out = save("a.safetensors", tensors), tmp_path / "out.safetensors"
    resize(a, out, loader="nunchaku", arch="sd1")
    assert (rank_in(out, A), rank_in(out, P)) == (64, 4)
    sigma = spectrum(a, A)
    assert error_of(a, out, A) == pytest.approx(float((sigma[64:].square().sum() / sigma.square().sum()).sqrt()), rel=1e-5)
    resize(a, out, loader="nunchaku", max_rank=100, arch="sd1", force=True)
    assert rank_in(out, A) == 64
    resize(a, out, loader="nunchaku", max_rank=8, arch="sd1", force=True)
    assert rank_in(out, A) == 8


def test_the_most_alone(randn: Make, save: Save, tmp_path: Path) -> None:
    a, out = save("a.safetensors", {**kind_of("lora", randn), **kind_of("conv", randn), **anchor(randn)}), tmp_path / "out.safetensors"
    result = resize(a, out, max_rank=5)
    assert result["ranks_after"] == {"1": 1, "5": 2}


def test_names_and_settings(randn: Make, save: Save, tmp_path: Path) -> None:
    a, out = save("a.safetensors", anchor(randn)), tmp_path / "out.safetensors"
    with pytest.raises(UsageError, match="unknown loader 'vlm'; did you mean 'vllm'"):
        resize(a, out, loader="vlm")
    with pytest.raises(UsageError, match="--max-rank 48: vllm can be set to 1, 8, 16, 32, 64, 128, 256, 320, 512"):
        resize(a, out, loader="vllm", max_rank=48)
    assert not out.exists()
    assert all(loader_named(name).name == name for name in LOADERS)
    assert [LOADERS["vllm"].setting(rank) for rank in (1, 2, 16, 17, 300)] == [1, 8, 16, 32, 320]
    assert (LOADERS["vllm"].cap(None), LOADERS["sglang"].cap(None), LOADERS["sglang"].cap(48)) == (512, None, 48)

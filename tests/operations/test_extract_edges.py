"""extract: the ends of the range: nothing differs, next to nothing, one row, values that are no numbers, 16 bits, codes with a scale."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fixtures import checkpoints
from fixtures.tuned import matrices, planted, tuned
from loratools.errors import InputError, NotFiniteError, UnsupportedError
from loratools.operations.extract import extract
from loratools.operations.inspect import inspect
from tests import reference
from tests.operations.merge_by_hand import LINEAR1, QKV, flux, noise, save
from tests.operations.test_extract import apart, assert_back

pytestmark = pytest.mark.filterwarnings("ignore")

IN = "img_in.weight"


def files(folder: Path, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> tuple[Path, Path, Path]:
    return save(folder / "a.safetensors", before), save(folder / "b.safetensors", after), folder / "out.safetensors"


def one(key: str, delta: torch.Tensor, dtype: torch.dtype = torch.float32, width: int = 32) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flux' layers, and the same with one of them changed."""
    tensors = flux(dtype, width)
    return tensors, {**tensors, key: (tensors[key].double() + delta).to(dtype)}


# ------------------------------------------------------------------------------------------------------- nothing, and next to it


def _same(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(tensors)


def _wider(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.float() for key, value in tensors.items()}


def _signs(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: torch.where(value == 0, -value, value) for key, value in tensors.items()}


@pytest.mark.parametrize("change", [_same, _wider, _signs])
def test_equal_models(change: Any, tmp_path: Path) -> None:
    """X8: exit 3 and no file, also where equal values have other bits: a wider dtype, a zero of the other sign. No LoRA of noise."""
    tensors = flux(torch.bfloat16)
    tensors[IN][0] = 0.0
    before, after, out = files(tmp_path, tensors, change(tensors))
    with pytest.raises(InputError, match="are the same") as caught:
        extract(before, after, out)
    assert caught.value.exit_code == 3
    assert not out.exists()


def test_equal_values_in_another_dtype_are_skipped_beside_others(tmp_path: Path) -> None:
    tensors = flux(torch.bfloat16)
    after = {key: value.float() for key, value in tensors.items()}
    after[IN] = after[IN] + 0.01 * noise(*after[IN].shape, seed=4)
    told = extract(*files(tmp_path, tensors, after))
    assert told["modules"] == 1
    assert {row["tensor"] for row in told["skipped"] if row["reason"] == "the same in both"} == tensors.keys() - {IN}


def test_differences_of_1e_12(tmp_path: Path) -> None:
    """X8: no threshold and no noise; one module, to the accuracy of its factors."""
    tensors = flux(torch.float64)
    after = {**tensors, IN: tensors[IN] + 1e-12 * planted(tensors[IN], 3, 1, 1.0)}
    told = extract(*files(tmp_path, tensors, after), dtype="fp32", rank=3)
    assert (told["modules"], told["dtype"]) == (1, "F32")
    delta = reference.deltas(tmp_path / "out.safetensors")["lora_unet_img_in"]
    assert apart(delta, after[IN] - tensors[IN]) <= 1e-3  # 1e-12 is 13 bits above the rounding of the values themselves
    assert told["relative_error"] <= 1e-3
    assert inspect(tmp_path / "out.safetensors", check=True)["problems"] == []


@pytest.mark.parametrize("rank", [4, None])
def test_ranks_beyond_the_smaller_side(rank: int | None, tmp_path: Path) -> None:
    """One output row has rank 1, an input of one column too; what is said and what is written is the real rank."""
    before = {"loom.row.weight": noise(1, 40), "loom.column.weight": noise(40, 1), "loom.kernel.weight": noise(2, 3, 3, 3)}
    after = {key: value + 0.1 * noise(*value.shape, seed=5) for key, value in before.items()}
    told = extract(*files(tmp_path, before, after), rank=rank)
    assert told["ranks"] == {"1": 2, "2": 1}
    tensors = load_file(tmp_path / "out.safetensors")
    assert {key: float(value) for key, value in tensors.items() if key.endswith("alpha")} == {
        "lora_unet_loom_row.alpha": 1.0,
        "lora_unet_loom_column.alpha": 1.0,
        "lora_unet_loom_kernel.alpha": 2.0,
    }
    assert told["relative_error"] < 1e-6
    assert_back(tmp_path / "a.safetensors", after, tmp_path / "out.safetensors")


# ------------------------------------------------------------------------------------------------------------------- no numbers


@pytest.mark.parametrize("key", [f"{QKV}.weight", f"{LINEAR1}.weight", f"{QKV}.bias", "double_blocks.0.img_attn.norm.query_norm.scale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("whose", ["BASE", "TUNED"])
def test_nan_and_inf(whose: str, value: float, key: str, tmp_path: Path) -> None:
    """X8: exit 3 naming tensor and model, in matrices and in dense extras."""
    before = flux()
    after = tuned(before, only=matrices)
    spoiled = before if whose == "BASE" else after
    spoiled[key] = spoiled[key].clone()
    spoiled[key].view(-1)[-1] = value
    with pytest.raises(NotFiniteError) as caught:
        extract(*files(tmp_path, before, after))
    assert caught.value.exit_code == 3
    assert key in caught.value.message
    assert f"{whose} holds NaN or Inf" in caught.value.message
    assert not (tmp_path / "out.safetensors").exists()


def test_nan_in_both_alike_is_no_difference(tmp_path: Path) -> None:
    before = flux()
    before[f"{QKV}.weight"][0, 0] = float("nan")
    after = {**before, IN: before[IN] * 1.1}
    assert extract(*files(tmp_path, before, after))["modules"] == 1


@pytest.mark.parametrize(("dtype", "value"), [("fp16", 1e12), ("bf16", None), ("fp32", None)])
def test_factors_that_overflow(dtype: str, value: float | None, tmp_path: Path) -> None:
    """A difference of 1e12 has factors of 1e6: too large for fp16, which is said with what has the range."""
    before, after = one(IN, planted(flux()[IN], 2, 1, 1.0) * 1e12)
    arguments = files(tmp_path, before, after)
    if value is None:
        assert extract(*arguments, dtype=dtype, rank=2)["relative_error"] < 0.01
        return
    with pytest.raises(NotFiniteError, match="overflow F16") as caught:
        extract(*arguments, dtype=dtype, rank=2)
    assert IN in caught.value.message
    assert "bf16" in str(caught.value.fix)
    assert not arguments[2].exists()


# -------------------------------------------------------------------------------------------------------- 16 bits, 8 bits, LAPACK


def test_bf16_against_fp32(tmp_path: Path) -> None:
    """BASE in bf16, TUNED in fp32: the difference is that of the values, to float32's last bit."""
    tensors = flux(torch.float32)
    before = {key: value.bfloat16() for key, value in tensors.items()}
    after = {**tensors, IN: tensors[IN] + 0.01 * noise(*tensors[IN].shape, seed=6)}
    extract(*files(tmp_path, before, after), dtype="fp32", rank=32)
    assert_back(tmp_path / "a.safetensors", {IN: after[IN].bfloat16()}, tmp_path / "out.safetensors", tolerance=2.0**-8)
    tensor = load_file(tmp_path / "out.safetensors")
    delta = tensor["lora_unet_img_in.lora_up.weight"].double() @ tensor["lora_unet_img_in.lora_down.weight"].double()
    assert apart(delta, after[IN].double() - before[IN].double()) <= 1e-6


@pytest.mark.parametrize("rest", ["bfloat16", "float32"])
def test_scaled_fp8(rest: str, tmp_path: Path) -> None:
    """X12: codes are worth nothing without their scale; D is that of the values, codes · scale in float64."""
    base = checkpoints.flux_bare(tmp_path / "base.safetensors")
    other = checkpoints.flux_scaled_fp8(tmp_path / "tuned.safetensors", rest=rest)
    told = extract(base, other, tmp_path / "out.safetensors", to="comfy", rank=200, dense_extras="drop")
    found = reference.deltas(tmp_path / "out.safetensors")
    before, codes = load_file(base), load_file(other)
    matrices_ = [key for key, value in before.items() if value.dim() > 1]
    assert {f"diffusion_model.{key.removesuffix('.weight')}" for key in matrices_} == found.keys()
    for key in matrices_:
        value = codes[key].double() * codes[f"{key.removesuffix('.weight')}.scale_weight"].double()
        assert apart(found[f"diffusion_model.{key.removesuffix('.weight')}"], value - before[key].double()) <= 1e-5, key
    assert told["dtype"] == "F32"
    assert apart(reference.deltas(tmp_path / "out.safetensors")["diffusion_model.img_in"], codes[IN].double()) > 0.5


def test_factors_are_never_of_8_bits(tmp_path: Path) -> None:
    """A base of plain fp8: bf16 is the default."""
    base, other = checkpoints.flux_fp8(tmp_path / "base.safetensors"), checkpoints.flux_bare(tmp_path / "tuned.safetensors")
    told = extract(base, other, tmp_path / "out.safetensors", to="comfy", rank=2, dense_extras="drop")
    assert told["dtype"] == "BF16"
    written = load_file(tmp_path / "out.safetensors")
    assert {value.dtype for key, value in written.items() if ".lora_" in key} == {torch.bfloat16}


def test_quantised_in_a_way_nobody_reads(tmp_path: Path) -> None:
    """X12: refused by name, and not subtracted as codes."""
    tensors = flux()
    coded = {**tensors, IN: torch.zeros(32, 8, dtype=torch.uint8), "img_in.weight.absmax": torch.ones(4)}
    coded |= {"img_in.weight.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8)}
    before, after, out = files(tmp_path, tensors, coded)
    with pytest.raises(UnsupportedError) as caught:
        extract(before, after, out)
    assert IN in " ".join(caught.value.details)
    assert not out.exists()


@pytest.mark.parametrize("failing", ["svd", "eigh", "cholesky_ex"])
def test_a_decomposition_that_does_not_converge(failing: str, tmp_path: Path, monkeypatch: Any) -> None:
    """X10: LAPACK gives up (sd-scripts#517); the other way gives the same ΔW."""
    key, shape = "double_blocks.0.img_mod.lin.weight", (400, 320)
    tensors = flux() | {key: noise(*shape, seed=4)}
    after = {name: (value.double() + planted(value, 6, 9)).float() if matrices(name) else value for name, value in tensors.items()}
    arguments = files(tmp_path, tensors, after)
    extract(*arguments, rank=6)
    wanted, calls = reference.deltas(arguments[2]), []

    def give_up(*given: Any, **options: Any) -> Any:
        calls.append(given)
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    def fail(matrix: torch.Tensor) -> Any:
        calls.append(matrix)
        return torch.full_like(matrix, float("nan")), torch.tensor(1)

    monkeypatch.setattr(torch.linalg, failing, fail if failing == "cholesky_ex" else give_up)
    out = tmp_path / "again.safetensors"
    extract(arguments[0], arguments[1], out, rank=6)
    found = reference.deltas(out)
    assert calls or failing == "eigh"
    assert max(apart(found[name], wanted[name]) for name in wanted) <= 1e-5


def test_a_large_and_a_small_unit(tmp_path: Path) -> None:
    """Differences of 1e-30 and of 1e30 in float32: no square of theirs fits."""
    tensors = flux()
    tensors[f"{QKV}.weight"].zero_()
    delta = {IN: planted(tensors[IN], 2, 1, 1.0) * 1e30, f"{QKV}.weight": planted(noise(96, 32), 2, 2, 1.0) * 1e-30}
    after = {key: (value.double() + delta[key]).float() if key in delta else value for key, value in tensors.items()}
    told = extract(*files(tmp_path, tensors, after), rank=2)
    found = reference.deltas(tmp_path / "out.safetensors")
    for key, stem in ((IN, "lora_unet_img_in"), (f"{QKV}.weight", "lora_unet_double_blocks_0_img_attn_qkv")):
        assert apart(found[stem], after[key].double() - tensors[key].double()) <= 1e-5, key
    assert max(row["relative_error"] for row in told["worst"]) <= 1e-5

"""Which dtype every output has, vectors among them, and what is told of each: changed, cast, copied; the report names them all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.operations.merge import merge
from tests.operations import merge_by_hand as hand
from tests.operations.made import CONV, NATIVE, SHAPES
from tests.operations.merge_by_hand import Q, Tensors, noise

HALF = [torch.bfloat16, torch.float16]
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NATIVE_NORM = "output_blocks.9.0.in_layers.0"
NORM1 = "up_blocks.3.resnets.0.norm1"


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def assert_rounded(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    """The nearest values of `dtype` to sums in float64, but for a close call."""
    assert found.dtype == dtype
    apart = hand.steps_apart(found, hand.nearest(wanted, dtype), dtype)
    assert float(apart.max()) <= 1.0
    assert float((apart > 0).double().mean()) <= 0.02


# --------------------------------------------------------------------------------------------------------------------- vectors


def vectors(dtype: torch.dtype, vector: torch.dtype) -> tuple[Tensors, dict[str, Tensors], dict[str, torch.Tensor]]:
    """(base, adapter, {key: Δ at weight 1}) of a convolution with its bias and a norm: the matrix in `dtype`, vectors in `vector`."""
    conv, norm = (f"model.diffusion_model.{name}" for name in (NATIVE[CONV], NATIVE_NORM))
    base = {f"{conv}.weight": noise(*SHAPES[CONV], seed=1).to(dtype)}
    base |= {f"{conv}.bias": noise(16, seed=2).to(vector)}
    base |= {f"{norm}.{leaf}": noise(32, seed=3 + number).to(vector) for number, leaf in enumerate(("weight", "bias"))}
    one = hand.pair(SHAPES[CONV], 2, 2.0, 5)
    moved = {"diff_b": noise(16, seed=7) * 0.3, "w_norm": noise(32, seed=8) * 0.3, "b_norm": noise(32, seed=9) * 0.3}
    adapter = {
        CONV: {"lora_up.weight": one.up, "lora_down.weight": one.down, "alpha": torch.tensor(2.0), "diff_b": moved["diff_b"]},
        NORM1: {"w_norm": moved["w_norm"], "b_norm": moved["b_norm"]},
    }
    deltas = {f"{conv}.weight": one.delta(), f"{conv}.bias": moved["diff_b"].double()}
    deltas |= {f"{norm}.weight": moved["w_norm"].double(), f"{norm}.bias": moved["b_norm"].double()}
    return base, adapter, deltas


@pytest.mark.parametrize(
    ("dtype", "vector"), [*((one, one) for one in HALF), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=named
)
def test_vectors_keep_the_dtype_they_have(dtype: torch.dtype, vector: torch.dtype, tmp_path: Path) -> None:
    """Biases and norms, each in its own dtype, whatever that of the matrices and of the adapter is."""
    base, modules, deltas = vectors(dtype, vector)
    adapter, source = hand.lycoris(tmp_path / "style.safetensors", modules), hand.save(tmp_path / "base.safetensors", base)
    merge(source, [(adapter, 0.5)], tmp_path / "out.safetensors", arch="sd1", verify=True)
    after = hand.assert_untouched(base, tmp_path / "out.safetensors", deltas)
    for key, delta in deltas.items():
        wanted = base[key].double() + 0.5 * delta
        if base[key].dtype == torch.float32:
            assert float((after[key].double() - wanted).abs().max()) < 1e-5
        else:
            assert_rounded(after[key], wanted, base[key].dtype)
        assert not torch.equal(after[key], base[key]), key


@pytest.mark.parametrize("name", DTYPES)
def test_vectors_are_cast_with_the_rest(name: str, tmp_path: Path) -> None:
    base, modules, deltas = vectors(torch.float32, torch.float32)
    adapter, source = hand.lycoris(tmp_path / "style.safetensors", modules), hand.save(tmp_path / "base.safetensors", base)
    merge(source, [(adapter, 1.0)], tmp_path / "out.safetensors", arch="sd1", dtype=name, verify=True)
    after = load_file(tmp_path / "out.safetensors")
    assert {key: value.dtype for key, value in after.items()} == dict.fromkeys(base, DTYPES[name])
    for key, delta in deltas.items():
        assert float((after[key].double() - base[key].double() - delta).abs().max()) < 0.05


@pytest.mark.parametrize("kind", ["lora_B.bias", "bias"])
@pytest.mark.parametrize("dtype", HALF, ids=named)
def test_biases_of_a_language_model(dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    """PEFT's lora_B.bias is scaled like B A, a trained bias is the whole new one; both in float32 beside a base in half precision."""
    base, one, bias = hand.language_model(64, dtype), hand.pair((64, 64), 4, 2.0), noise(64, seed=9)
    folder = hand.peft(tmp_path / "style", {Q: one})
    tensors = load_file(folder / "adapter_model.safetensors") | {f"base_model.model.{Q}.{kind}": bias}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    more: dict[str, Any] = {"bias": "all"} if kind == "bias" else {"lora_bias": True}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **more}))
    merge(hand.save(tmp_path / "base.safetensors", base), [(folder, 1.0)], tmp_path / "out.safetensors", verify=True)
    after = hand.assert_untouched(base, tmp_path / "out.safetensors", [f"{Q}.weight", f"{Q}.bias"])
    wanted = bias.double() if kind == "bias" else base[f"{Q}.bias"].double() + 0.5 * bias.double()
    assert_rounded(after[f"{Q}.bias"], wanted, dtype)


# ------------------------------------------------------------------------------------------------- changed, cast, copied; all named


LAYERS = 8  # more than are shown as the worst


def many(tmp_path: Path) -> tuple[Tensors, Path, Path]:
    """A base of LAYERS projections and, untouched, two floats of other dtypes, integers and codes; an adapter of ever smaller deltas."""
    base: Tensors = {f"model.layers.{at}.mlp.up_proj.weight": noise(32, 16, seed=at) for at in range(LAYERS)}
    base |= {"model.norm.weight": noise(16), "model.half.weight": noise(16, 16).to(torch.bfloat16)}
    base |= {"model.steps": torch.arange(5), "model.codes": noise(8, 8).to(torch.float8_e4m3fn)}
    pairs = {
        key.removesuffix(".weight"): hand.pair((32, 16), 2, 2.0, 50 + at).sized(0.1 * 2.0**-at, base[key])
        for at, key in enumerate(list(base)[:LAYERS])
    }
    return base, hand.save(tmp_path / "base.safetensors", base), hand.peft(tmp_path / "style", pairs)


@pytest.mark.parametrize(
    ("dtype", "cast"),
    [(None, 0), ("BF16", 1), ("F32", 1), ("F16", 2)],  # of the norm in float32 and the matrix in bfloat16 those of another dtype
)
def test_what_is_counted(dtype: str | None, cast: int, tmp_path: Path) -> None:
    """changed: by an adapter; cast: by --dtype alone; both are no copies. Integers and codes are never cast."""
    base, source, adapter = many(tmp_path)
    told = merge(source, [(adapter, 1.0)], tmp_path / "out.safetensors", dtype=dtype)
    assert (told["tensors"], told["changed"], told["unchanged"], told["cast"]) == (LAYERS + 4, LAYERS, 4, cast)
    after = load_file(tmp_path / "out.safetensors")
    others = list(base)[LAYERS:]
    assert sum(after[key].dtype != base[key].dtype for key in others) == cast
    assert sum(torch.equal(hand.bits(after[key]), hand.bits(base[key])) for key in others) == len(others) - cast


@pytest.mark.parametrize("dtype", [None, "BF16"])
def test_the_report_names_every_changed_tensor(dtype: str | None, tmp_path: Path) -> None:
    """Each with what rounding took of its own delta, by hand; the result shows the worst alone."""
    base, source, adapter = many(tmp_path)
    told = merge(source, [(adapter, 1.0)], tmp_path / "out.safetensors", dtype=dtype, report=tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["tensor"]: row for row in report["tensors_changed"]}
    keys = [f"model.layers.{at}.mlp.up_proj.weight" for at in range(LAYERS)]
    assert sorted(rows) == keys
    assert len(report["tensors_changed"]) == LAYERS
    assert len(told["worst"]) < LAYERS
    assert {key: report[key] for key in told} == json.loads(json.dumps(told))
    factors, after = load_file(adapter / "adapter_model.safetensors"), load_file(tmp_path / "out.safetensors")
    for key in keys:
        stem = f"base_model.model.{key.removesuffix('.weight')}"
        delta = factors[f"{stem}.lora_B.weight"].double() @ factors[f"{stem}.lora_A.weight"].double()  # alpha 2 over rank 2
        kept = hand.kept(base[key], after[key], delta)
        assert rows[key]["delta_retained"] == pytest.approx(kept.retained, rel=1e-3, abs=1e-4)
        assert rows[key]["relative_error"] == pytest.approx(kept.relative_error, rel=1e-2, abs=1e-4)
    assert dtype is None or max(row["relative_error"] for row in rows.values()) > 0.1, "rounding took nothing: nothing is compared"


def test_the_worst_come_first(tmp_path: Path) -> None:
    _, source, adapter = many(tmp_path)
    told = merge(source, [(adapter, 1.0)], tmp_path / "out.safetensors", dtype="BF16", report=tmp_path / "report.json")
    rows = json.loads((tmp_path / "report.json").read_text())["tensors_changed"]
    assert told["worst"] == sorted(rows, key=lambda row: row["delta_retained"])[: len(told["worst"])]

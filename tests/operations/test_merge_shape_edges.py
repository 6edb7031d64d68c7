"""Shapes that nearly fit: modules that cannot be split, kernels that are turned; and bases and adapters of quantised models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.errors import InputError, LoraToolsError, UnsupportedError
from loratools.operations.merge import merge
from tests.operations import merge_by_hand as hand
from tests.operations.merge_by_hand import BLOCK, LAST, LINEAR1, QKV, SINGLE, WIDTH, Tensors, noise

Shape = tuple[int, ...]


def refusal(*arguments: Any, **options: Any) -> LoraToolsError:
    """The error of a merge that writes nothing."""
    with pytest.raises(LoraToolsError) as caught:
        merge(*arguments, **options)
    assert not Path(arguments[2]).exists()
    return caught.value


def told(error: LoraToolsError) -> str:
    return "\n".join([error.message, *error.details])


# ------------------------------------------------------------------------------------------------- modules that cannot be split


def lokr(out: int, in_: int) -> Tensors:
    """w1 has 4 rows: no boundary of three parts falls between two of them."""
    return {"lokr_w1": noise(4, 4, seed=1), "lokr_w2": noise(out // 4, in_ // 4, seed=2)}


def dora_in(out: int, in_: int) -> Tensors:
    """A norm over each column, of all parts' rows together."""
    factors = {"lora_up.weight": noise(out, 2, seed=3), "lora_down.weight": noise(2, in_, seed=4)}
    return {**factors, "dora_scale": 1 + noise(1, in_, seed=5).abs()}


def boft(out: int, in_: int) -> Tensors:
    """Butterflies that mix rows across the parts; nothing in it tells the columns."""
    del in_
    return {"oft_blocks": noise(2, out // 4, 4, 4, seed=6) * 0.2, "alpha": torch.tensor(0.0)}


def lora(out: int, in_: int) -> Tensors:
    """For comparison: this one is split."""
    return {"lora_up.weight": noise(out, 2, seed=3), "lora_down.weight": noise(2, in_, seed=4)}


QKV_SITES = [f"{BLOCK}.to_{name}" for name in "qkv"]
LINEAR1_SITES = [f"{SINGLE}.attn.to_q", f"{SINGLE}.attn.to_k", f"{SINGLE}.attn.to_v", f"{SINGLE}.proj_mlp"]
W = WIDTH
UNSPLIT = [  # kind, module, its shape in a model twice as wide, rows of each part there and here
    *((kind, QKV, (6 * W, 2 * W), dict.fromkeys(QKV_SITES, (2 * W, W))) for kind in (lokr, dora_in, boft)),
    (boft, QKV, (3 * W + 24, W), dict.fromkeys(QKV_SITES, (W + 8, W))),
    *((kind, LINEAR1, (14 * W, 2 * W), dict(zip(LINEAR1_SITES, [(2 * W, W)] * 3 + [(8 * W, 4 * W)], strict=True)))
      for kind in (lokr, dora_in)),
    (boft, LAST, (2 * W + 8, W), {"norm_out.linear": (2 * W + 8, 2 * W)}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "shape", "rows"), UNSPLIT)
def test_a_module_that_cannot_be_split_has_the_bases_rows_or_is_refused(
    kind: Callable[[int, int], Tensors], name: str, shape: tuple[int, int], rows: Mapping[str, tuple[int, int]], tmp_path: Path
) -> None:
    """Every part is named with both heights; the same kind in the base's own shape is merged."""
    base = hand.flux()
    source = hand.save(tmp_path / "base.safetensors", base)
    wide = hand.lycoris(tmp_path / "wide.safetensors", {name: kind(*shape)})
    error = refusal(source, [(wide, 1.0)], tmp_path / "out.safetensors", arch="flux")
    assert isinstance(error, InputError)
    assert len(error.details) == len(rows)
    for line, (site, (theirs, ours)) in zip(error.details, rows.items(), strict=True):
        assert line.startswith(f"wide.safetensors: denoiser.{site}: ")
        assert f"{theirs} rows for {ours} of the base" in line
    fits = hand.lycoris(tmp_path / "fits.safetensors", {name: kind(*base[f"{name}.weight"].shape)})
    assert merge(source, [(fits, 1.0)], tmp_path / "out.safetensors", arch="flux")["changed"] == 1


def test_a_module_that_is_split_tells_both_shapes(tmp_path: Path) -> None:
    source = hand.save(tmp_path / "base.safetensors", hand.flux())
    wide = hand.lycoris(tmp_path / "wide.safetensors", {QKV: lora(6 * W, 2 * W)})
    error = refusal(source, [(wide, 1.0)], tmp_path / "out.safetensors", arch="flux")
    for site in QKV_SITES:
        assert f"{site}: the adapter changes a weight of shape [{2 * W}, {2 * W}], the base has [{W}, {W}]" in told(error)


# --------------------------------------------------------------------------------------------------------------------- kernels


def one_convolution(tmp_path: Path, kernel: Shape) -> Path:
    return hand.save(tmp_path / "base.safetensors", {"blocks.0.conv.weight": noise(8, 4, *kernel), "blocks.1.proj.weight": noise(8, 8)})


def on_convolution(tmp_path: Path, kernel: Shape) -> tuple[Path, hand.Pair]:
    one = hand.pair((8, 4, *kernel), 2, 2.0)
    return hand.kohya(tmp_path / "adapter.safetensors", {"blocks.0.conv": one}), one


MISFITS = [  # the base's kernel, the adapter's
    ((3, 1), (1, 3)),
    ((1, 3), (3, 1)),
    ((1, 3, 1), (3, 1, 1)),
    ((3, 3), (1, 3)),
    ((3, 3), (3, 1)),
    ((3, 3), (1, 1)),
    ((3, 1), (5, 1)),
    ((1, 1), (3, 1)),
    ((1, 1), (1, 3)),
]


@pytest.mark.parametrize(("theirs", "mine"), MISFITS)
def test_a_kernel_of_another_shape_is_refused(theirs: Shape, mine: Shape, tmp_path: Path) -> None:
    """A 1x3 kernel has as many values as a 3x1 one: added to it, they would land on other places."""
    adapter, _ = on_convolution(tmp_path, mine)
    error = refusal(one_convolution(tmp_path, theirs), [(adapter, 1.0)], tmp_path / "out.safetensors")
    assert isinstance(error, InputError)
    for kernel in (theirs, mine):
        assert str([8, 4, *kernel]) in told(error)


@pytest.mark.parametrize(("theirs", "mine"), [((3, 1), (3, 1)), ((1, 3), (1, 3)), ((1, 1), ()), ((), (1, 1)), ((1, 1), (1, 1))])
def test_a_kernel_of_the_same_shape_is_not(theirs: Shape, mine: Shape, tmp_path: Path) -> None:
    """A 1x1 convolution is a matrix, on either side."""
    source, (adapter, one) = one_convolution(tmp_path, theirs), on_convolution(tmp_path, mine)
    merge(source, [(adapter, 1.0)], tmp_path / "out.safetensors", verify=True)
    before, after = (load_file(path)["blocks.0.conv.weight"].double() for path in (source, tmp_path / "out.safetensors"))
    assert after.shape == before.shape == (8, 4, *theirs)
    assert float((after - before - one.delta().reshape(before.shape)).abs().max()) < 1e-5


# ------------------------------------------------------------------------------------------------------------ quantised models


QUANTISED = [
    "unsloth/Qwen3-8B-unsloth-bnb-4bit",
    "model-bnb-8bit",
    "flux1-dev-fp8.safetensors",
    "C:\\models\\flux1-dev-fp8-e4m3fn.safetensors",
    "/models/hidream-i1-nf4",
    "flux1-dev-bnb",
    "Llama-3-8B-GPTQ",
    "Llama-3-8B-int8",
    "Llama-3-8B-qlora",
    "Llama-3-8B-exl2",
    "Mistral-7B-AWQ",
    "chroma-Q4_K_S.gguf",
    "Llama-3.1-8B-quantized.w8a8",
    "someone/model-4bit",
    "someone/model-hqq",
    "gpt-oss-20b-mxfp4",
]
PLAIN = ["flux1-dev.safetensors", "sd_xl_base_1.0", "Qwen/Qwen3-8B", "print8", "Mistral-7B-Instruct-v0.2", "model-bf16", "model-fp16"]
KEYS = ["base_model_name_or_path", "base_model", "ss_sd_model_name", "ss_base_model"]


def warnings_of(tmp_path: Path, metadata: dict[str, str]) -> list[str]:
    """What a dry run of a kohya adapter with this header says about its base."""
    source = hand.save(tmp_path / "base.safetensors", hand.flux())
    adapter = hand.lycoris(tmp_path / "style.safetensors", {QKV: lora(3 * W, W)})
    save_file(load_file(adapter), adapter, metadata)
    result = merge(source, [(adapter, 1.0)], tmp_path / "out.safetensors", arch="flux", dry_run=True)
    return [warning for warning in result["warnings"] if "quantised" in warning]


@pytest.mark.parametrize("key", KEYS)
def test_a_header_that_names_a_quantised_base(key: str, tmp_path: Path) -> None:
    (warning,) = warnings_of(tmp_path, {key: "/home/alice/models/flux1-dev-fp8"})
    assert warning.startswith("style.safetensors: trained on flux1-dev-fp8, a quantised base")
    assert "alice" not in warning
    assert warnings_of(tmp_path, {f"{key}_note": "flux1-dev-fp8"}) == []


@pytest.mark.parametrize("name", QUANTISED)
def test_names_of_quantised_bases(name: str, tmp_path: Path) -> None:
    assert len(warnings_of(tmp_path, {"ss_sd_model_name": name})) == 1


@pytest.mark.parametrize("name", PLAIN)
def test_names_of_plain_bases(name: str, tmp_path: Path) -> None:
    assert warnings_of(tmp_path, {"ss_sd_model_name": name}) == []


def language_base(folder: Path, weight: Tensors, config: dict[str, Any]) -> Path:
    folder.mkdir()
    norm = {"model.layers.0.input_layernorm.weight": torch.ones(8)}
    save_file(weight | norm, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, **config}))
    return folder


@pytest.mark.parametrize(("method", "name"), [("gguf", "GGUF"), ("bitsandbytes", "bitsandbytes"), ("somebodys_own", "somebodys_own")])
def test_the_config_names_the_quantisation(method: str, name: str, tmp_path: Path) -> None:
    """Codes of one byte say nothing of themselves: the kind stands in quantization_config."""
    codes = {f"{hand.Q}.weight": torch.zeros(12, 8, dtype=torch.uint8)}
    adapter = hand.peft(tmp_path / "style", {hand.Q: hand.pair((12, 8))})
    error = refusal(
        language_base(tmp_path / "a", codes, {"quantization_config": {"quant_method": method}}), [(adapter, 1.0)], tmp_path / "o"
    )
    assert isinstance(error, UnsupportedError)
    assert f"{hand.Q}.weight: U8 codes ({name})" in told(error)
    assert f"{hand.Q}.weight: U8 codes" in told(refusal(language_base(tmp_path / "b", codes, {}), [(adapter, 1.0)], tmp_path / "o"))


def test_the_config_says_how_large_a_block_of_scales_is(tmp_path: Path) -> None:
    """Twelve rows under two scales are 8 + 4 or 6 + 6: with scales a factor of 64 apart it is plain which."""
    codes, scale = noise(12, 8, seed=1).clamp(-2, 2).to(torch.float8_e4m3fn), torch.tensor([[1.0], [64.0]])
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [6, 8]}}
    base = language_base(tmp_path / "base", {f"{hand.Q}.weight": codes, f"{hand.Q}.weight_scale_inv": scale}, config)
    one = hand.pair((12, 8), 4, 4.0)
    merge(base, [(hand.peft(tmp_path / "style", {hand.Q: one}), 1.0)], tmp_path / "out", verify=True)
    after = load_file(tmp_path / "out" / "model.safetensors")
    rows = torch.tensor([1.0] * 6 + [64.0] * 6, dtype=torch.float64)[:, None]
    wanted = codes.double() * rows + one.delta()
    spread = after[f"{hand.Q}.weight_scale_inv"].double().repeat_interleave(6, 0)
    found = after[f"{hand.Q}.weight"].double() * spread
    largest = torch.stack([part.abs().max() for part in wanted.split(6)]).repeat_interleave(6)[:, None]
    assert bool(((found - wanted).abs() <= wanted.abs() / 16 + largest * 2.0**-14).all())  # half a step of three bits, and below normal
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == config["quantization_config"]

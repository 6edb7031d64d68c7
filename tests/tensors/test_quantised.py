"""Scaled fp8 against decoding by hand, and every kind of quantisation a merge must refuse, by its name."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy
import pytest
import torch

from loratools.errors import MalformedError
from loratools.tensors.dtypes import DTYPES, torch_dtype
from loratools.tensors.lazy import BytesTensor, LazyTensor
from loratools.tensors.quantised import (
    ScaledWeight,
    dequantised,
    joined_peaks,
    peak,
    quantised,
    requantised,
    row_step,
    scale_for,
    scale_rows,
    scaled_weights,
    unsupported,
)

Header = dict[str, tuple[str, tuple[int, ...]]]


def lazy(header: Header, **data: bytes) -> dict[str, LazyTensor]:
    """Tensors of zeros, or of the bytes given under a key with its dots as double underscores."""
    named = {key.replace("__", "."): value for key, value in data.items()}
    found: dict[str, LazyTensor] = {
        key: BytesTensor(bytes(math.prod(shape) * DTYPES[dtype][0] // 8), dtype, shape) for key, (dtype, shape) in header.items()
    }
    return found | {key: BytesTensor(value, "U8", (len(value),)) for key, value in named.items()}


def comfy(**described: Any) -> bytes:
    return json.dumps(described).encode()


# --- what is scaled

FP8 = ("F8_E4M3", (256, 384))
SPELLINGS: list[tuple[str, str]] = [
    ("m.weight", "m.scale_weight"),
    ("m.weight", "m.weight_scale"),
    ("m.weight", "m.weight_scale_inv"),
    ("m", "m.scale_weight"),
    ("m", "m.weight_scale"),
    ("experts.gate_up_proj", "experts.gate_up_proj_scale"),
    ("experts.gate_up_proj", "experts.gate_up_proj_scale_inv"),
]


@pytest.mark.parametrize(("weight", "scale"), SPELLINGS)
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_spellings_of_a_scale(weight: str, scale: str, dtype: str) -> None:
    tensors = lazy({weight: FP8, scale: (dtype, ()), "m.bias": ("BF16", (256,)), "scaled_fp8": ("F8_E4M3", (0,))})
    assert scaled_weights(tensors) == {weight: ScaledWeight(weight, scale, (), (256, 384))}
    assert unsupported(tensors) == {}


@pytest.mark.parametrize(
    ("shape", "scale", "config", "block"),
    [
        ((256, 384), (), None, (256, 384)),
        ((256, 384), (1,), None, (256, 384)),
        ((256, 384), (1, 1), None, (256, 384)),
        ((256, 384), (256,), None, (1, 384)),
        ((256, 384), (256, 1), None, (1, 384)),
        ((256, 384), (2, 3), None, (128, 128)),
        ((192, 300), (2, 3), None, (128, 128)),  # cut blocks: not 96 and 100
        ((100, 384), (1, 3), None, (100, 128)),
        ((256, 384), (4, 6), None, (64, 64)),
        ((192, 300), (2, 3), [96, 100], (96, 100)),
        ((192, 300), (2, 3), [64, 64], (128, 128)),  # a config that does not fit this weight
        ((256, 384), (256, 12), None, (1, 32)),
        ((15, 6), (5, 1), None, (3, 6)),  # no power of two fits: the exact part
        ((8, 256, 384), (8, 2, 3), None, (1, 128, 128)),
        ((8, 256, 384), (8, 2, 3), [128, 128], (1, 128, 128)),
        ((8, 256, 384), (8, 1, 1), None, (1, 256, 384)),
        ((8, 4, 3, 3), (8,), None, (1, 4, 3, 3)),
        ((8, 4, 3, 3), (8, 1, 1, 1), None, (1, 4, 3, 3)),
    ],
)
def test_shapes_of_a_scale(shape: tuple[int, ...], scale: tuple[int, ...], config: list[int] | None, block: tuple[int, ...]) -> None:
    tensors = lazy({"m.weight": ("F8_E4M3", shape), "m.weight_scale": ("F32", scale)})
    settings = {"quantization_config": {"quant_method": "fp8", "weight_block_size": config}}
    assert scaled_weights(tensors, settings) == {"m.weight": ScaledWeight("m.weight", "m.weight_scale", scale, block)}
    assert unsupported(tensors, settings) == {}


@pytest.mark.parametrize(
    ("shape", "scale"),
    [
        *(((256, 384), scale) for scale in [(2,), (384,), (257, 1), (2, 3, 1), (0,)]),
        ((), (3,)),
        ((16, 4), (5, 1)),
    ],
)
def test_a_scale_that_does_not_fit(shape: tuple[int, ...], scale: tuple[int, ...]) -> None:
    tensors = lazy({"m.weight": ("F8_E4M3", shape), "m.weight_scale": ("F32", scale)})
    assert scaled_weights(tensors) == {}
    assert unsupported(tensors) == {"m.weight": f"fp8 with a scale of shape {list(scale)} for a weight of shape {list(shape)}"}
    with pytest.raises(MalformedError, match="does not fit"):
        dequantised(torch.zeros(shape, dtype=torch.float8_e4m3fn), torch.ones(scale))


ACTIVATIONS = ["input_scale", "scale_input", "activation_scale", "input_scale_ub", "input_zero_point"]


@pytest.mark.parametrize("leaf", ACTIVATIONS)
def test_scales_of_activations_are_not_the_weight_s(leaf: str) -> None:
    plain = lazy({"m.weight": FP8, f"m.{leaf}": ("F32", ())})
    assert (scaled_weights(plain), unsupported(plain)) == ({}, {})
    both = lazy({"m.weight": FP8, f"m.{leaf}": ("F32", ()), "m.scale_weight": ("F32", ())})
    assert scaled_weights(both)["m.weight"].scale == "m.scale_weight"
    assert unsupported(both) == {}


@pytest.mark.parametrize(
    ("described", "dtype"),
    [
        ({"format": "float8_e4m3fn"}, "F8_E4M3"),
        ({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}, "F8_E4M3"),
        ({"format": "float8_e5m2"}, "F8_E5M2"),
        ({"format": "float8_e4m3fn_blockwise", "group_size": 64}, "F8_E4M3"),
    ],
)
def test_comfy_formats_that_are_scaled(described: dict[str, Any], dtype: str) -> None:
    header: Header = {"d.m.weight": (dtype, (64, 64)), "d.m.weight_scale": ("F32", ())}
    assert list(scaled_weights(lazy(header, d__m__comfy_quant=comfy(**described)))) == ["d.m.weight"]
    assert unsupported(lazy(header, d__m__comfy_quant=comfy(**described))) == {}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {"m": described}})}
    assert list(scaled_weights(lazy(header), metadata=metadata)) == ["d.m.weight"]
    assert unsupported(lazy(header), metadata=metadata) == {}


def test_plain_checkpoints_have_nothing_to_refuse() -> None:
    header: Header = {
        "a.weight": ("BF16", (4, 4)),
        "a.scale": ("F32", (4,)),
        "b.weight": ("F8_E4M3", (4, 4)),
        "b.bias": ("F8_E4M3", (4,)),
        "c.position_ids": ("I64", (1, 77)),
        "norm.scale": ("F8_E4M3", (4,)),
        "single_blocks.0.linear1.weight": ("F8_E5M2", (4, 4)),
        "steps": ("I32", ()),
    }
    on_the_fly = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}  # says nothing of these tensors
    for config in (None, {}, {"quantization_config": None}, on_the_fly):
        assert (scaled_weights(lazy(header), config), unsupported(lazy(header), config)) == ({}, {})


# --- what is refused


CODES: tuple[str, tuple[int, ...]] = ("U8", (32, 1))
KINDS: list[tuple[Header, Mapping[str, Any], dict[str, str]]] = [
    ({"m.weight": CODES, "m.weight.absmax": ("F32", (4,)), "m.weight.quant_state.bitsandbytes__nf4": CODES},
     {}, {"m.weight": "nf4 (bitsandbytes)"}),
    ({"m.weight.quant_state.bitsandbytes__fp4": CODES, "m.weight.absmax": ("F32", (4,)), "m.weight": CODES},
     {}, {"m.weight": "fp4 (bitsandbytes)"}),
    ({"m.weight": CODES, "m.weight.absmax": ("F32", (4,)), "m.weight.quant_map": ("F32", (16,))}, {}, {"m.weight": "4-bit (bitsandbytes)"}),
    ({"m.weight": ("I8", (4, 4)), "m.SCB": ("F32", (4,)), "m.weight_format": ("U8", ())}, {}, {"m.weight": "int8 (bitsandbytes)"}),
    ({"m.qweight": ("I32", (4, 32)), "m.qzeros": ("I32", (1, 4)), "m.scales": ("F16", (1, 32)), "m.g_idx": ("I32", (32,))},
     {}, {"m": "GPTQ"}),
    ({"m.qweight": ("I32", (32, 4)), "m.qzeros": ("I32", (1, 4)), "m.scales": ("F16", (1, 32))}, {}, {"m": "AWQ"}),
    ({"m.qweight": ("I32", (32, 4))}, {}, {"m": "packed codes (qweight)"}),
    ({"m.qweight": ("I32", (32, 4))}, {"quantization_config": {"quant_method": "auto-round"}}, {"m": "auto-round"}),
    ({"m.qweight": ("I8", (32, 16)), "m.wscales": ("F8_E4M3", (2, 32)), "m.smooth_factor": ("BF16", (32,))},
     {}, {"m": "SVDQuant (nunchaku)"}),
    ({"m.weight_packed": ("I32", (4, 4)), "m.weight_scale": ("BF16", (4, 1)), "m.weight_shape": ("I64", (2,))},
     {}, {"m": "packed codes (compressed-tensors)"}),
    ({"m.weight._data": ("I8", (4, 4)), "m.weight._scale": ("F32", (4, 1))}, {}, {"m.weight": "quanto"}),
    ({"m.weight._data": ("F8_E4M3", (4, 4)), "m.weight._scale": ("F32", (4, 1))}, {}, {"m.weight": "quanto"}),
    ({"m._weight_qdata": ("I8", (4, 4)), "m._weight_scale": ("F32", (4, 1))}, {}, {"m": "torchao"}),
    ({"m.W_q": CODES, "m.scale": ("F16", (4,))}, {}, {"m": "HQQ"}),
    ({"m.codes": ("I8", (4, 4, 1)), "m.codebooks": ("F16", (1, 4, 1, 8))}, {}, {"m": "AQLM"}),
    ({"e.gate_up_proj_blocks": ("U8", (2, 4, 2, 16)), "e.gate_up_proj_scales": ("U8", (2, 4, 2))}, {}, {"e.gate_up_proj": "MXFP4"}),
    ({"m.weight": ("U32", (4, 4)), "m.scales": ("F16", (4, 1)), "m.biases": ("F16", (4, 1))}, {}, {"m.weight": "MLX"}),
    ({"m.weight": CODES, "m.weight_scale": ("F8_E4M3", (32, 1)), "m.weight_scale_2": ("F32", ())},
     {}, {"m.weight": "nvfp4 (two levels of scales)"}),
    ({"m.weight": ("F8_E4M3", (4, 4)), "m.weight_scale": ("F32", ()), "m.pre_quant_scale": ("BF16", (4,))},
     {}, {"m.weight": "smoothed (pre_quant_scale)"}),
    ({"m.weight": ("F8_E4M3", (4, 4)), "m.weight_scale": ("F32", ()), "m.smooth_factor": ("BF16", (4,))},
     {}, {"m.weight": "SVDQuant (nunchaku)"}),
    ({"m.weight": ("U8", (4, 18))}, {"quantization_config": {"quant_method": "gguf"}}, {"m.weight": "U8 codes (GGUF)"}),
    ({"m.weight": ("U8", (4, 4))}, {}, {"m.weight": "U8 codes"}),
    ({"m.weight": ("I8", (4, 4)), "m.weight_scale": ("F32", (4, 1))},
     {"quant_method": "bitsandbytes"}, {"m.weight": "I8 codes (bitsandbytes)"}),
    ({"m.weight": ("F4", (4, 4))}, {}, {"m.weight": "F4 codes"}),
    ({"m.weight": ("F8_E4M3", (4, 64)), "m.weight_scale": ("F8_E8M0", (4, 2))}, {}, {"m.weight": "fp8 with F8_E8M0 scales (MX)"}),
    ({"m.weight": ("F8_E4M3", (4, 64)), "m.weight_scale": ("U8", (4, 2))}, {}, {"m.weight": "fp8 with U8 scales (MX)"}),
    ({"m.weight": ("F8_E4M3", (4, 4)), "m.qscale_weight": ("F32", ())}, {}, {"m.weight": "fp8 with m.qscale_weight"}),
    ({"m.weight": ("F8_E4M3", (4, 4)), "m.weight_scale": ("F32", ()), "m.weight_zero_point": ("F32", ())},
     {}, {"m.weight": "fp8 with m.weight_scale, m.weight_zero_point"}),
    ({"m.weight": ("F8_E4M3", (4, 4)), "m.weight_scale": ("F32", ()), "m.scale_weight": ("F32", ())},
     {}, {"m.weight": "fp8 with m.scale_weight, m.weight_scale"}),
    ({"m.weight": ("BF16", (4, 4)), "m.weight_scale": ("F32", ())}, {}, {"m.weight": "BF16 with m.weight_scale"}),
]  # fmt: skip


@pytest.mark.parametrize(("header", "config", "found"), KINDS)
def test_every_kind_is_named(header: Header, config: Mapping[str, Any], found: dict[str, str]) -> None:
    tensors = lazy({**header, "plain.weight": ("BF16", (4, 4)), "plain.bias": ("BF16", (4,))})
    assert unsupported(tensors, config) == found
    assert unsupported(dict(reversed(tensors.items())), config) == found  # whatever the order of the file
    assert scaled_weights(tensors, config) == {}


@pytest.mark.parametrize(
    ("dtype", "described", "kind"),
    [
        ("U8", {"format": "nvfp4"}, "comfy_quant format nvfp4 in U8"),
        ("I8", {"format": "int8_tensorwise", "convrot": True}, "comfy_quant format int8_tensorwise, rotated (convrot)"),
        ("F8_E4M3", {"format": "mxfp8"}, "comfy_quant format mxfp8 in F8_E4M3"),
        ("F8_E4M3", {"format": "float8_e5m2"}, "comfy_quant format float8_e5m2 in F8_E4M3"),
        ("F8_E4M3", {"format": "float8_e4m3fn", "params": {"convrot": True}}, "comfy_quant format float8_e4m3fn, rotated (convrot)"),
        ("U8", {"format": "float8_e4m3fn"}, "comfy_quant format float8_e4m3fn in U8"),
        ("F8_E4M3", {"format": "x\n\x1b[2J"}, "comfy_quant format x\\n\\x1b[2J in F8_E4M3"),
        ("F8_E4M3", {}, "comfy_quant format unreadable in F8_E4M3"),
    ],
)
def test_comfy_formats_that_are_refused(dtype: str, described: dict[str, Any], kind: str) -> None:
    tensors = lazy({"m.weight": (dtype, (4, 4)), "m.weight_scale": ("F32", ())}, m__comfy_quant=comfy(**described))
    assert (scaled_weights(tensors), unsupported(tensors)) == ({}, {"m.weight": kind})


@pytest.mark.parametrize("text", [b"", b"\xff", b"[1]", b"{", b"[" * 20000, b" " * 70000])
def test_a_format_that_cannot_be_read(text: bytes) -> None:
    tensors = lazy({"m.weight": ("F8_E4M3", (4, 4)), "m.weight_scale": ("F32", ())}, m__comfy_quant=text)
    assert unsupported(tensors) == {"m.weight": "comfy_quant format unreadable in F8_E4M3"}
    if len(text) < 10000 and text != b"\xff":
        with pytest.raises(MalformedError, match="_quantization_metadata"):
            unsupported(tensors, metadata={"_quantization_metadata": text.decode()})


def test_a_comfy_format_without_a_scale() -> None:
    tensors = lazy({"m.weight": ("F8_E4M3", (4, 4))}, m__comfy_quant=comfy(format="float8_e4m3fn"))
    assert unsupported(tensors) == {"m.weight": "comfy_quant format float8_e4m3fn without a scale"}


def test_layers_named_in_the_metadata() -> None:
    header: Header = {f"model.diffusion_model.a.{i}.weight": ("F8_E4M3", (4, 4)) for i in (1, 11)}
    header |= {f"model.diffusion_model.a.{i}.weight_scale": ("F32", ()) for i in (1, 11)}
    metadata = {"_quantization_metadata": json.dumps({"layers": {"a.1": "mxfp8", "b": {"format": "nvfp4"}}})}
    assert unsupported(lazy(header), metadata=metadata) == {"model.diffusion_model.a.1.weight": "comfy_quant format mxfp8 in F8_E4M3"}
    assert list(scaled_weights(lazy(header), metadata=metadata)) == ["model.diffusion_model.a.11.weight"]
    assert unsupported(lazy(header), metadata={"_quantization_metadata": '{"layers": [1]}'}) == {}


def test_headers_are_read_without_torch() -> None:
    script = """
import sys
from loratools.tensors.lazy import BytesTensor
from loratools.tensors.quantised import scaled_weights, unsupported
tensors = {"m.weight": BytesTensor(b"", "F8_E4M3", (256, 384)), "m.weight_scale": BytesTensor(b"", "F32", (2, 3))}
assert scaled_weights(tensors)["m.weight"].block == (128, 128)
assert unsupported({"m.qweight": BytesTensor(b"", "I32", (4, 4))})
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# --- arithmetic


def by_hand(codes: torch.Tensor, scale: numpy.ndarray, block: tuple[int, ...]) -> numpy.ndarray:  # type: ignore[type-arg]
    """codes · scale in float64, one element at a time. `scale` has one axis for each of the weight's."""
    bits = codes.view(torch.uint8).numpy()
    values = numpy.empty(bits.shape)
    for place in itertools.product(*(range(size) for size in bits.shape)):
        values[place] = e4m3(int(bits[place])) * scale[tuple(i // b for i, b in zip(place, block, strict=True))]
    return values


def e4m3(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return math.nan if code & 0x7F == 0x7F else math.copysign(magnitude, -1.0 if code & 0x80 else 1.0)


def test_all_codes() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for scale in (1.0, 0.0123, 3.7e-5):
        factor = torch.tensor(scale)
        values = dequantised(codes, factor)
        assert values.dtype == torch.float32
        hand = torch.tensor([e4m3(code) * float(factor) for code in range(256)], dtype=torch.float64)
        assert torch.equal(values.nan_to_num(nan=9e9), hand.to(torch.float32).nan_to_num(nan=9e9))
        back = quantised(values, factor, "F8_E4M3").view(torch.uint8).tolist()
        assert [code for code in range(256) if back[code] != code and code & 0x7F != 0x7F] == []


Shape = tuple[int, ...]
# shape, scale's shape, its shape with all axes, block
LAYOUTS: list[tuple[Shape, Shape, Shape, Shape]] = [
    ((6, 9), (), (1, 1), (6, 9)),
    ((6, 9), (1,), (1, 1), (6, 9)),
    ((6, 9), (6,), (6, 1), (1, 9)),
    ((6, 9), (6, 1), (6, 1), (1, 9)),
    ((6, 9), (2, 3), (2, 3), (4, 4)),
    ((16, 8), (2, 2), (2, 2), (8, 4)),
    ((6, 9), (1, 3), (1, 3), (6, 4)),
    ((3, 6, 9), (3, 2, 3), (3, 2, 3), (1, 4, 4)),
    ((4, 3, 3, 3), (4,), (4, 1, 1, 1), (1, 3, 3, 3)),
]


def example(shape: tuple[int, ...], full: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random finite codes that fill the range, and scales over four powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 127, shape, generator=generator) + torch.randint(0, 2, shape, generator=generator) * 128
    scale = 10 ** (torch.rand(full, generator=generator) * 4 - 6)
    return codes.to(torch.uint8).view(torch.float8_e4m3fn), scale


@pytest.mark.parametrize(("shape", "stored", "full", "block"), LAYOUTS)
def test_dequantised_is_codes_times_scale(shape: Shape, stored: Shape, full: Shape, block: Shape) -> None:
    codes, scale = example(shape, full)
    hand = by_hand(codes, scale.to(torch.float64).numpy(), block)
    found = dequantised(codes, scale.reshape(stored))
    assert (found.shape, found.dtype) == (codes.shape, torch.float32)
    assert torch.equal(found, torch.from_numpy(hand).to(torch.float32))  # one rounding of the product


@pytest.mark.parametrize("scale_dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize(("shape", "stored", "full", "block"), LAYOUTS)
def test_a_delta_is_added_within_one_step(shape: Shape, stored: Shape, full: Shape, block: Shape, scale_dtype: str) -> None:
    codes, scale = example(shape, full)
    scale = (scale * 100).to(torch_dtype(scale_dtype))
    before = by_hand(codes, scale.to(torch.float64).numpy(), block)
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * float(numpy.abs(before).mean())
    wanted = before + delta.to(torch.float64).numpy()
    new_codes, new_scale = requantised(dequantised(codes, scale.reshape(stored)) + delta, scale.reshape(stored), "F8_E4M3")
    assert (new_codes.shape, new_codes.dtype, new_scale.shape, new_scale.dtype) == (codes.shape, codes.dtype, stored, scale.dtype)
    factors = new_scale.reshape(full).to(torch.float64).numpy()
    after = by_hand(new_codes, factors, block)
    for place in itertools.product(*(range(size) for size in shape)):
        factor = factors[tuple(i // b for i, b in zip(place, block, strict=True))]
        step = max(2.0 ** (math.floor(math.log2(abs(wanted[place]) / factor)) - 3), 2.0**-9) * factor
        assert abs(after[place] - wanted[place]) <= step / 2 * (1 + 1e-5)
    # the range is used: what covers each scale reaches at least half of the largest code
    assert (peak(new_codes.to(torch.float32), new_scale) >= 224).all()


def test_a_delta_added_to_the_codes_is_lost() -> None:
    """ComfyUI#13637: 1e-4 beside a code of 100 is nothing; beside the weight of 0.01 it is one per cent."""
    codes, scale = torch.tensor([100.0, 448.0]).to(torch.float8_e4m3fn), torch.tensor(1e-4)
    naive = (codes.to(torch.float32) + 1e-3).to(torch.float8_e4m3fn)
    assert naive.view(torch.uint8).tolist() == codes.view(torch.uint8).tolist()
    new, factor = requantised(dequantised(codes, scale) + 1e-3, scale, "F8_E4M3")
    assert abs(float(dequantised(new, factor)[0]) - float(codes.to(torch.float32)[0]) * 1e-4 - 1e-3) <= 8e-4 / 2


def test_the_scale_stays_while_it_serves() -> None:
    old = torch.tensor([1.0, 0.5, 0.25, 2.0, 3.0])
    amax = torch.tensor([448.0, 112.0, 56.1, 895.9, 0.0])
    assert torch.equal(scale_for(amax, old, "F8_E4M3"), old)
    below, above = torch.tensor([223.9, 448.1]), torch.tensor([1.5, 1.5])
    assert scale_for(below, above, "F8_E4M3").tolist() != above.tolist()
    untouched = torch.tensor([[100.0, 448.0], [3.0, 240.0]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1e-3], [2e-3]])
    codes, again = requantised(dequantised(untouched, scale), scale, "F8_E4M3")
    assert torch.equal(again, scale)
    assert torch.equal(codes.view(torch.uint8), untouched.view(torch.uint8))


@pytest.mark.parametrize("code_dtype", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("scale_dtype", ["F64", "F32", "BF16", "F16"])
def test_a_new_scale_never_lets_a_value_overflow(scale_dtype: str, code_dtype: str) -> None:
    top = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}[code_dtype]
    step = {"F64": 2.0**-52, "F32": 2.0**-23, "BF16": 2.0**-7, "F16": 2.0**-10}[scale_dtype]
    values = torch.logspace(-1, 4, 500, dtype=torch.float64).to(torch.float32).reshape(500, 1) * torch.tensor([1.0, -0.5])
    old = torch.full((500, 1), 1.8e-7).to(torch_dtype(scale_dtype))  # too small for all of them
    codes, scale = requantised(values, old, code_dtype)
    wide, amax = scale.to(torch.float64).flatten(), values[:, 0].to(torch.float64)
    assert (wide * top >= amax * (1 - 1e-15)).all()  # up ...
    normal = amax / top >= (6.2e-5 if scale_dtype == "F16" else 0)
    assert (wide * top <= amax * (1 + step * 1.001))[normal].all()  # ... by one step at most
    assert codes.to(torch.float32).isfinite().all()


def test_scales_that_are_powers_of_two_stay_so() -> None:
    old = torch.tensor([[0.125, 2.0**-10]])
    new = scale_for(torch.tensor([[100.0, 448.0 * 2.0**-9]]), old, "F8_E4M3")
    assert new.tolist() == [[0.25, 2.0**-9]]  # 100 / 448 = 0.22, and exactly 2^-9
    assert scale_for(torch.tensor([[100.0, 0.0]]), torch.tensor([[0.1, 1.0]]), "F8_E4M3").tolist()[0][0] == pytest.approx(100 / 448)


def test_zeros_and_what_is_not_finite() -> None:
    codes, scale = requantised(torch.zeros(2, 2), torch.tensor([0.0, 0.7]), "F8_E4M3")
    assert (codes.to(torch.float32).tolist(), scale.tolist()) == ([[0.0, 0.0], [0.0, 0.0]], [0.0, pytest.approx(0.7)])
    revived, scale = requantised(torch.tensor([[0.0, 5.0]]), torch.tensor(0.0), "F8_E4M3")
    assert revived.to(torch.float32).tolist() == [[0.0, 448.0]]
    assert float(scale) == pytest.approx(5 / 448)
    for bad in (math.nan, math.inf):
        codes, scale = requantised(torch.tensor([[1.0, bad]]), torch.tensor(1.0), "F8_E4M3")
        assert not torch.cat([dequantised(codes, scale).flatten(), scale.reshape(1)]).isfinite().all()
    assert quantised(torch.tensor([449.0, 1000.0]), torch.tensor(1.0), "F8_E4M3").to(torch.float32).isnan().tolist() == [False, True]
    assert quantised(torch.tensor([1.0]), torch.tensor(0.0), "F8_E4M3").to(torch.float32).isnan().all()


def test_the_quotient_is_rounded_once() -> None:
    """In float32 a quotient just beside a tie becomes the tie."""
    generator = torch.Generator().manual_seed(0)
    scale = 1 + torch.rand(200000, generator=generator)
    values = (scale.to(torch.float64) * 1.0625).to(torch.float32)  # 1.0625 lies midway between 1 and 1.125
    exact = values.to(torch.float64) - scale.to(torch.float64) * 1.0625  # its sign decides; exact in float64
    wanted = torch.where(exact > 0, 1.125, 1.0)
    found = quantised(values, scale, "F8_E4M3").to(torch.float32)
    assert torch.equal(found, wanted.to(torch.float32))
    assert not torch.equal((values / scale).to(torch.float8_e4m3fn).to(torch.float32), wanted.to(torch.float32))


@pytest.mark.parametrize("stochastic", [False, True])
def test_stochastic_codes_keep_the_mean(stochastic: bool) -> None:
    values, scale = torch.full((4, 5000), 1.03e-3), torch.tensor(1e-3)
    codes = quantised(values, scale, "F8_E4M3", stochastic=stochastic, seed=3, name="m.weight", start=0).to(torch.float64)
    share = float(values[0, 0]) / float(scale) * 8 - 8  # of the way from 1 to 1.125
    expected, sigma = (1 + share / 8, math.sqrt(share * (1 - share) / 20000) / 8) if stochastic else (1.0, 0.0)
    assert abs(float(codes.mean()) - expected) <= 5 * sigma
    again, _ = requantised(values, scale, "F8_E4M3", stochastic=stochastic, seed=3)
    assert again.shape == values.shape


@pytest.mark.parametrize(
    ("shape", "stored", "config", "step"),
    [
        ((300, 200), (), None, 1),
        ((300, 200), (1, 1), None, 1),
        ((300, 200), (300,), None, 1),
        ((300, 200), (300, 1), None, 1),
        ((300, 200), (3, 2), None, 128),
        ((300, 200), (1, 2), None, 1),
        ((300, 200), (3, 2), [100, 100], 100),
        ((3, 40, 20), (3, 3, 2), None, 1),
    ],
)
def test_blocks_of_rows_make_the_same_codes(shape: tuple[int, ...], stored: tuple[int, ...], config: list[int] | None, step: int) -> None:
    generator = torch.Generator().manual_seed(5)
    values, old = torch.randn(shape, generator=generator), torch.rand(stored, generator=generator) * 1e-3
    header: Header = {"m.weight": ("F8_E4M3", shape), "m.weight_scale": ("F32", stored)}
    scaled = scaled_weights(lazy(header), {"quantization_config": {"weight_block_size": config}})["m.weight"]
    assert row_step(scaled, shape[0]) == step
    rows = step * 2
    cuts = [(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]
    parts = [peak(values[a:b], scale_rows(scaled, old, a, b), scaled.block) for a, b in cuts]
    amax = joined_peaks(scaled, parts)
    codes, scale = requantised(values, old, "F8_E4M3", scaled.block)
    assert torch.equal(amax, peak(values, old, scaled.block))
    assert torch.equal(scale_for(amax, old, "F8_E4M3"), scale)
    pieces = [quantised(values[a:b], scale_rows(scaled, scale, a, b), "F8_E4M3", scaled.block) for a, b in cuts]
    assert torch.equal(torch.cat([p.view(torch.uint8) for p in pieces]), codes.view(torch.uint8))
    whole = dequantised(codes, scale, scaled.block)
    assert torch.equal(torch.cat([dequantised(codes[a:b], scale_rows(scaled, scale, a, b), scaled.block) for a, b in cuts]), whole)


@pytest.mark.parametrize(("shape", "stored", "full", "block"), LAYOUTS)
def test_peaks_by_hand(shape: Shape, stored: Shape, full: Shape, block: Shape) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    wanted = numpy.zeros(full)
    for place in itertools.product(*(range(size) for size in shape)):
        cell = tuple(i // b for i, b in zip(place, block, strict=True))
        wanted[cell] = max(wanted[cell], abs(float(values[place])))
    assert peak(values, torch.ones(stored)).to(torch.float64).flatten().tolist() == wanted.flatten().tolist()

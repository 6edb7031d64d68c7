"""Which weights are fp8 with a scale, in every spelling; and every kind of quantisation a merge must refuse, by its name."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from loratools.errors import MalformedError
from loratools.tensors.dtypes import DTYPES
from loratools.tensors.lazy import BytesTensor, LazyTensor
from loratools.tensors.quantised import scaled_weights, unsupported
from loratools.tensors.scaled import ScaledWeight

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

"""Which weights of a checkpoint are not plain floats, from headers and `comfy_quant` alone.

Scaled fp8, float8 codes and a float scale beside them, is what can be computed with (`loratools.tensors.scaled`): as ComfyUI
(`scale_weight`, later `weight_scale` with `comfy_quant`), compressed-tensors, FBGEMM and ModelOpt (`weight_scale`) and DeepSeek
(`weight_scale_inv`, a factor all the same, 128x128 blocks) write it; the spellings are in `_scale_names`. Scales of activations
(`input_scale`, `scale_input`) have no part in W.
Everything else that is packed, looked up, rotated or smoothed is named by `unsupported`, for a merge to refuse.

Invariant: an fp8 weight is plain, or scaled in a way understood here, or named as unsupported; never taken for plain because
the scale beside it is spelled in a way not known. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.errors import MalformedError
from loratools.tensors.header import printable
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.scaled import ScaledWeight, blocks_of

_FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_FLOATS = ("F64", "F32", "F16", "BF16")
_MAX_CONFIG = 1 << 16  # bytes of one comfy_quant tensor

# leaves beside a weight that say how activations are quantised: not part of W
_ACTIVATIONS = {
    *("input_scale", "input_scale_ub", "input_global_scale", "input_zero_point"),  # compressed-tensors, FBGEMM, ModelOpt, ComfyUI
    *("scale_input", "activation_scale", "output_scale", "k_scale", "v_scale"),  # ComfyUI's scaled_fp8, transformers, ModelOpt
}

# ending of a key, ending that must stand beside it ("" = none), what the weight is; the first row that fits names it
_NUNCHAKU = "SVDQuant (nunchaku)"
_PACKED = "packed codes (qweight)"
_MARKS: tuple[tuple[str, str, str], ...] = (
    (".quant_state.bitsandbytes__nf4", "", "nf4 (bitsandbytes)"),
    (".quant_state.bitsandbytes__fp4", "", "fp4 (bitsandbytes)"),
    (".quant_map", "", "4-bit (bitsandbytes)"),
    (".absmax", "", "4-bit (bitsandbytes)"),
    (".SCB", "", "int8 (bitsandbytes)"),
    (".wscales", "", _NUNCHAKU),
    (".smooth_factor", "", _NUNCHAKU),
    (".weight_smooth_factor", "", _NUNCHAKU),  # the same in ComfyUI's layout
    (".qweight", ".g_idx", "GPTQ"),
    (".qweight", ".qzeros", "AWQ"),
    (".qweight", "", _PACKED),
    (".weight_packed", "", "packed codes (compressed-tensors)"),
    ("._data", "", "quanto"),
    ("._weight_qdata", "", "torchao"),
    (".W_q", "", "HQQ"),
    (".codebooks", ".codes", "AQLM"),
    ("_blocks", "_scales", "MXFP4"),
    (".scales", ".biases", "MLX"),
    (".weight_scale_2", "", "nvfp4 (two levels of scales)"),
    (".pre_quant_scale", "", "smoothed (pre_quant_scale)"),
)
_ENDINGS = tuple(ending for ending, _, _ in _MARKS)

# quant_method of a config.json whose usual name is another
_METHODS = {"gptq": "GPTQ", "awq": "AWQ", "gguf": "GGUF", "nunchaku": _NUNCHAKU, "mxfp4": "MXFP4", "hqq": "HQQ", "aqlm": "AQLM"}

# formats of a comfy_quant tensor that are codes times weight_scale → the dtype of their codes
_COMFY = {
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn_rowwise": "F8_E4M3",
    "float8_e4m3fn_blockwise": "F8_E4M3",
}


@dataclass(frozen=True)
class _Checkpoint:
    """What is known beside the tensors: the leaves of each module, ComfyUI's formats, the method and block of a config."""

    tensors: Mapping[str, LazyTensor]
    leaves: Mapping[str, set[str]]
    comfy: Mapping[str, Mapping[str, Any]]  # module → its comfy_quant
    layers: Mapping[str, Mapping[str, Any]]  # the same from the metadata, maybe without the model's prefix
    method: str | None
    block: tuple[int, ...] | None

    def format(self, module: str) -> Mapping[str, Any] | None:
        """ComfyUI's description of a module, its longest name first."""
        found = self.comfy.get(module)
        while found is None and self.layers and module:
            found = self.layers.get(module)
            module = module.partition(".")[2]
        return found


def scaled_weights(
    tensors: Mapping[str, LazyTensor], config: Mapping[str, Any] | None = None, metadata: Mapping[str, str] | None = None
) -> dict[str, ScaledWeight]:
    """fp8 weight key → its scale, for every weight whose scale is understood. `config` (a config.json) may name the blocks."""
    checkpoint = _survey(tensors, config, metadata)
    marked = _marked(checkpoint)
    found = {key: _fp8(key, checkpoint) for key, tensor in tensors.items() if tensor.dtype in _FP8 and key not in marked}
    return {key: value for key, value in found.items() if isinstance(value, ScaledWeight)}


def unsupported(
    tensors: Mapping[str, LazyTensor], config: Mapping[str, Any] | None = None, metadata: Mapping[str, str] | None = None
) -> dict[str, str]:
    """What a merge must refuse: weight key (the module's name where the file has no such key) → the kind of quantisation.

    `config`: a config.json with a quantization_config; `metadata`: of the file, where ComfyUI may keep _quantization_metadata.
    """
    checkpoint = _survey(tensors, config, metadata)
    found = _marked(checkpoint)
    for key, tensor in tensors.items():
        problem = _fp8(key, checkpoint) if tensor.dtype in _FP8 else _other(key, tensor, checkpoint)
        if isinstance(problem, str):
            found.setdefault(key, problem)
    return found


def _survey(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any] | None, metadata: Mapping[str, str] | None) -> _Checkpoint:
    leaves: dict[str, set[str]] = {}
    for key in tensors:
        module, _, leaf = key.rpartition(".")
        leaves.setdefault(module, set()).add(leaf)
    comfy = {
        key.removesuffix(".comfy_quant"): _object(b"".join(tensor.chunks()) if tensor.nbytes <= _MAX_CONFIG else b"")
        or {"format": "unreadable"}
        for key, tensor in tensors.items()
        if key.endswith(".comfy_quant")
    }
    document = _object((metadata or {}).get("_quantization_metadata", "{}").encode("utf-8", "surrogatepass"))
    if document is None:
        raise MalformedError("the metadata's _quantization_metadata is not a JSON object")
    layers = {name: value if isinstance(value, dict) else {"format": value} for name, value in _mapping(document.get("layers")).items()}
    return _Checkpoint(tensors, leaves, comfy, layers, *_method(config or {}))


def _object(text: bytes) -> Mapping[str, Any] | None:
    """A JSON object; None of what is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _method(config: Mapping[str, Any]) -> tuple[str | None, tuple[int, ...] | None]:
    """The name of what a config says the codes are, and the shape of its blocks."""
    found = _mapping(config.get("quantization_config", config.get("compression_config", config)))
    method, block = found.get("quant_method"), found.get("weight_block_size")
    name = None if method is None else _METHODS.get(str(method), printable(str(method)))
    sizes = block if isinstance(block, list) else []
    return name, tuple(sizes) if sizes and all(type(size) is int and size > 0 for size in sizes) else None


def _marked(checkpoint: _Checkpoint) -> dict[str, str]:
    """Weights recognised by what stands beside them. The row of the table that comes first wins."""
    tensors = checkpoint.tensors
    ranks: dict[str, int] = {}
    for key in tensors:
        if not key.endswith(_ENDINGS):
            continue
        for rank, (ending, beside, _) in enumerate(_MARKS):
            base = key.removesuffix(ending)
            if key.endswith(ending) and (not beside or base + beside in tensors):
                target = next((name for name in (base, base + ".weight") if name in tensors), base)
                ranks[target] = min(rank, ranks.get(target, rank))
                break
    names = [checkpoint.method or kind if kind == _PACKED else kind for _, _, kind in _MARKS]
    return {target: names[rank] for target, rank in ranks.items()}


def _scale_names(key: str) -> list[str]:
    """Where the scale of a weight may stand."""
    module = key.removesuffix(".weight")
    names = (
        f"{module}.scale_weight",  # ComfyUI's scaled_fp8
        f"{module}.weight_scale",  # compressed-tensors, FBGEMM, ModelOpt, ComfyUI's comfy_quant
        f"{module}.weight_scale_inv",  # DeepSeek, transformers' fp8
        f"{key}_scale",  # parameters without a module of their own: an expert's gate_up_proj
        f"{key}_scale_inv",
    )
    return list(dict.fromkeys(names))


def _fp8(key: str, checkpoint: _Checkpoint) -> ScaledWeight | str | None:
    """Of an fp8 tensor: its scale, or why it cannot be computed with, or None where it is plain."""
    module, tensor = key.removesuffix(".weight"), checkpoint.tensors[key]
    scales = [name for name in _scale_names(key) if name in checkpoint.tensors]
    beside = {f"{head}.{leaf}" for head in {module, key} for leaf in checkpoint.leaves.get(head, ()) if leaf not in _ACTIVATIONS}
    strange = [name for name in sorted(beside - set(scales)) if any(word in name.rpartition(".")[2] for word in ("scale", "zero"))]
    described = checkpoint.format(module)
    if described is not None and (problem := _comfy_problem(described, tensor.dtype, bool(scales))):
        return problem
    if strange or len(scales) > 1:
        return f"fp8 with {', '.join(printable(name) for name in scales + strange)}"
    if not scales:
        return None
    scale = checkpoint.tensors[scales[0]]
    if scale.dtype not in _FLOATS:
        return f"fp8 with {scale.dtype} scales (MX)"
    block = blocks_of(tensor.shape, scale.shape, checkpoint.block)
    if block is None:
        return f"fp8 with a scale of shape {list(scale.shape)} for a weight of shape {list(tensor.shape)}"
    return ScaledWeight(key, scales[0], scale.shape, block)


def _comfy_problem(described: Mapping[str, Any], dtype: str, scaled: bool) -> str | None:
    """Why a weight that ComfyUI describes is not codes times weight_scale."""
    name = f"comfy_quant format {printable(str(described.get('format')))[:60]}"
    if described.get("convrot") or _mapping(described.get("params")).get("convrot"):
        return f"{name}, rotated (convrot)"
    if _COMFY.get(str(described.get("format"))) != dtype:
        return f"{name} in {dtype}"
    return None if scaled else f"{name} without a scale"


def _other(key: str, tensor: LazyTensor, checkpoint: _Checkpoint) -> str | None:
    """Why a weight that is not fp8 is not plain. Only keys that end in .weight, beside what the table of marks finds."""
    if not key.endswith(".weight"):
        return None
    described = checkpoint.format(key.removesuffix(".weight"))
    if described is not None:
        return _comfy_problem(described, tensor.dtype, True)
    if tensor.dtype not in _FLOATS:
        return f"{tensor.dtype} codes" + (f" ({checkpoint.method})" if checkpoint.method else "")
    scale = next((name for name in _scale_names(key) if name in checkpoint.tensors), None)
    return f"{tensor.dtype} with {printable(scale)}" if scale else None

"""What a checkpoint's weights are when they are not plain floats.

Scaled fp8: float8 codes and a float scale beside them, one a tensor, a row or a block,

    W = codes · scale        new scale = max|W| / largest code,  codes = round(W / new scale)

as ComfyUI (`scale_weight`, later `weight_scale` with `comfy_quant`), compressed-tensors, FBGEMM and ModelOpt (`weight_scale`)
and DeepSeek (`weight_scale_inv`, a factor all the same, 128x128 blocks) write it; the spellings are in `_scale_names`. Scales
of activations (`input_scale`, `scale_input`) have no part in W.
Everything else that is packed, looked up, rotated or smoothed is named by `unsupported`, for a merge to refuse.

Invariant: an fp8 weight is plain, or scaled in a way understood here, or named as unsupported; never taken for plain because
the scale beside it is spelled in a way not known. No torch at import; the first half reads headers and `comfy_quant` only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.errors import MalformedError
from loratools.tensors.dtypes import dtype_name
from loratools.tensors.header import printable
from loratools.tensors.lazy import LazyTensor, tensor_bytes
from loratools.tensors.rounding import largest, rounded

if TYPE_CHECKING:
    import torch

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
class ScaledWeight:
    """An fp8 weight and its scale.

    `weight`, `scale`: their keys. `shape`: of the scale: one value; (out,) or (out, 1); or one value a block.
    `block`: how much of each axis of the weight one value covers; the last block of an axis may be shorter.
    """

    weight: str
    scale: str
    shape: tuple[int, ...]
    block: tuple[int, ...]


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
    block = _blocks(tensor.shape, scale.shape, checkpoint.block)
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


def _blocks(shape: Sequence[int], scale: Sequence[int], known: Sequence[int] | None = None) -> tuple[int, ...] | None:
    """How much of each axis of a weight one value of the scale covers; None where the two do not fit.

    The shapes alone leave the size of a block open where the last one is cut; writers use powers of two, and at most one of
    those fits when an axis has two blocks or more. `known`, of a config or of the whole weight, goes before.
    """
    if math.prod(scale) == 1:
        return tuple(shape)
    if tuple(scale) == tuple(shape[:1]):
        scale = (*scale, *[1] * (len(shape) - 1))
    if not shape or len(scale) != len(shape):
        return None
    hints = [*[0] * len(shape), *(known or ())][-len(shape) :]
    sizes = [_block(size, count, hint) for size, count, hint in zip(shape, scale, hints, strict=True)]
    return None if 0 in sizes else tuple(sizes)


def _block(size: int, count: int, hint: int) -> int:
    """The size of `count` blocks that cover an axis; 0 where none does."""
    if count in (1, size):
        return max(1, size // max(count, 1))
    if not 0 < count < size:
        return 0
    candidates = (hint, 1 << (math.ceil(size / count) - 1).bit_length(), size // count)
    return next((block for block in candidates if block > 0 and math.ceil(size / block) == count), 0)


class ScaledTensor(LazyTensor):
    """Codes and their scale as the float32 values they stand for."""

    def __init__(self, codes: LazyTensor, scaled: ScaledWeight, scale: LazyTensor) -> None:
        self.codes, self.scaled, self.scale, self.dtype, self.shape = codes, scaled, scale, "F32", codes.shape

    def load(self) -> torch.Tensor:
        return dequantised(self.codes.load(), self.scale.load(), self.scaled.block)

    def chunks(self) -> Iterator[bytes]:
        yield from tensor_bytes(self.load())


def row_step(scaled: ScaledWeight, out_rows: int) -> int:
    """A block of rows of a weight of `out_rows` rows must begin at a multiple of this."""
    return 1 if scaled.block[0] >= out_rows else scaled.block[0]


def scale_rows(scaled: ScaledWeight, scale: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """The part of the scale that rows start..stop of the weight use; `start` is a multiple of `row_step`."""
    step = scaled.block[0]
    return scale if _one_row(scaled) else scale[start // step : math.ceil(stop / step)]


def joined_peaks(scaled: ScaledWeight, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The `peak` of a whole weight, from those of its blocks of rows in order."""
    import torch

    return torch.stack(list(parts)).amax(0) if _one_row(scaled) else torch.cat(list(parts))


def _one_row(scaled: ScaledWeight) -> bool:
    """Do all rows of the weight share their values of the scale?"""
    return math.prod(scaled.shape) == 1 or scaled.shape[0] == 1


def dequantised(codes: torch.Tensor, scale: torch.Tensor, block: Sequence[int] | None = None) -> torch.Tensor:
    """codes · scale in float32. `block` (ScaledWeight.block) settles what cut shapes leave open; needed for rows of a weight.

    Raises MalformedError where the scale does not fit the codes.
    """
    import torch

    return codes.to(torch.float32) * _spread(scale.to(torch.float32), codes.shape, block)


def requantised(
    values: torch.Tensor, scale_like: torch.Tensor, dtype: str, block: Sequence[int] | None = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes in `dtype`, the new scale) of float32 or float64 values; the scale has the shape and dtype of `scale_like`.

    `options` are those of `rounded`. The same as `peak`, `scale_for` and `quantised` one after the other; a weight too large to
    hold goes twice through its blocks of rows, once for `joined_peaks`, once for the codes.
    """
    scale = scale_for(peak(values, scale_like, block), scale_like, dtype)
    return quantised(values, scale, dtype, block, **options), scale


def peak(values: torch.Tensor, scale: torch.Tensor, block: Sequence[int] | None = None) -> torch.Tensor:
    """max|value| over what each value of the scale covers, in the scale's shape."""
    import torch

    result = values.abs()
    for axis, size in enumerate(_fitting(values.shape, scale.shape, block)):
        if size > 1:
            result = torch.cat([piece.amax(axis, keepdim=True) for piece in torch.split(result, size, axis)], axis)
    return result.reshape(scale.shape)


def scale_for(amax: torch.Tensor, scale_like: torch.Tensor, dtype: str) -> torch.Tensor:
    """The scale under which values up to `amax` fit `dtype`; shape and dtype of `scale_like`, the scale so far.

    The old value stays where the new codes still fill at least half of the range and fit it (a weight hardly changed keeps its
    codes), and where all values are zero. Else amax / largest, rounded up, so that nothing overflows; up to a power of two
    where all old ones are powers of two (DeepSeek's ue8m0 kernels read nothing else).
    """
    import torch

    old, wanted = scale_like.to(torch.float64), amax.reshape(scale_like.shape).to(torch.float64)
    reach = old * largest(dtype)
    keep = (wanted == 0) | ((wanted <= reach) & (wanted >= reach / 2))
    new = wanted / largest(dtype)
    if bool((torch.frexp(old)[0] == 0.5).all()):
        mantissa = torch.frexp(new)[0]  # new = mantissa · 2^e, 0.5 <= mantissa < 1
        new = torch.where(mantissa > 0.5, new / mantissa, new)
    return torch.where(keep, scale_like, _rounded_up(new, dtype_name(scale_like.dtype)))


def quantised(values: torch.Tensor, scale: torch.Tensor, dtype: str, block: Sequence[int] | None = None, **options: Any) -> torch.Tensor:
    """The codes of values under a scale: values / scale in float64, rounded once; what does not fit is NaN or Inf."""
    import torch

    wide = values.to(torch.float64)
    quotient = torch.where(wide == 0, wide, wide / _spread(scale.to(torch.float64), values.shape, block))  # 0 / 0 is 0 here
    return rounded(quotient, dtype, **options)


def _fitting(shape: Sequence[int], scale: Sequence[int], block: Sequence[int] | None) -> tuple[int, ...]:
    sizes = _blocks(shape, scale, block)
    if sizes is None:
        raise MalformedError(f"a scale of shape {list(scale)} does not fit a weight of shape {list(shape)}")
    return sizes


def _spread(scale: torch.Tensor, shape: Sequence[int], block: Sequence[int] | None) -> torch.Tensor:
    """The scale in a shape that broadcasts over the weight's: repeated only along axes with several blocks of several."""
    sizes = _fitting(shape, scale.shape, block)
    if scale.numel() == 1:
        return scale.reshape(())
    result = scale.reshape(*scale.shape, *[1] * (len(shape) - scale.ndim))
    for axis, (size, length) in enumerate(zip(sizes, shape, strict=True)):
        if 1 < size < length:
            result = result.repeat_interleave(size, axis).narrow(axis, 0, length)
    return result


def _rounded_up(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Non-negative float64 values in `dtype`, never smaller."""
    import torch

    near = rounded(values, dtype)
    codes = {2: torch.int16, 4: torch.int32, 8: torch.int64}[near.element_size()]
    below = near.to(torch.float64) < values
    return (near.view(codes) + below.to(codes)).view(near.dtype)

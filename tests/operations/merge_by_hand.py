"""A merge told without the library: rounding, what it keeps of a delta, fp8 with scales; bases and adapters made by hand.

    W' = round(W + Σ weight · alpha / rank · B A)      everything in float64, round() once, ties to even

Language models are the plainest bases (every module its own tensor, any size), Flux in its original names has fused layers and
exchanged halves, SD1 in ldm's names convolutions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensor = torch.Tensor
Tensors = dict[str, Tensor]

Q, UP, NORM = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.0.input_layernorm"
# dtype → (bits of the mantissa, exponent of the smallest normal, largest value)
FORMATS = {
    torch.float64: (52, -1022, 1.7976931348623157e308),
    torch.float32: (23, -126, 3.4028234663852886e38),
    torch.float16: (10, -14, 65504.0),
    torch.bfloat16: (7, -126, 3.3895313892515355e38),
    torch.float8_e4m3fn: (3, -6, 448.0),
    torch.float8_e5m2: (2, -14, 57344.0),
}


# ---------------------------------------------------------------------------------------------------------------- rounding


def step(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of the two values of `dtype` around each value: 2^(max(⌊log₂|x|⌋, e₀) - m)."""
    mantissa, smallest, _ = FORMATS[dtype]
    exponent = torch.where(values == 0, smallest, torch.frexp(values.double())[1] - 1).clamp(min=smallest)
    return torch.ldexp(torch.ones_like(values, dtype=torch.float64), exponent - mantissa)


def nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 values rounded once to the nearest value of `dtype`, as float64; nothing here overflows."""
    unit = step(values, dtype)
    return (values.double() / unit).round() * unit


def steps_apart(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> Tensor:
    """|found - wanted| in steps of `dtype`, for values of `dtype`."""
    return (found.double() - wanted.double()).abs() / torch.minimum(step(wanted, dtype), step(found, dtype))


# ------------------------------------------------------------------------------------------------------ what is left of a delta


@dataclass(frozen=True)
class Kept:
    """⟨W' - W, Δ⟩, ⟨Δ, Δ⟩ and |W' - W - Δ|²."""

    inner: float
    size: float
    lost: float

    @property
    def retained(self) -> float:
        return self.inner / self.size

    @property
    def relative_error(self) -> float:
        return (self.lost / self.size) ** 0.5


def kept(before: Tensor, after: Tensor, delta: Tensor) -> Kept:
    moved, delta = (after.double() - before.double()).flatten(), delta.double().flatten()
    return Kept(float(moved @ delta), float(delta @ delta), float((moved - delta).square().sum()))


def total(parts: Iterable[Kept]) -> Kept:
    parts = list(parts)
    return Kept(*(sum(getattr(part, name) for part in parts) for name in ("inner", "size", "lost")))


# ------------------------------------------------------------------------------------------------------------------- adapters


@dataclass(frozen=True)
class Pair:
    """B (out, rank[, 1, 1]), A (rank, in[, k, k]) and alpha."""

    up: Tensor
    down: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)

    def delta(self) -> Tensor:
        """alpha / rank · B A in float64, the weight's shape."""
        up, down = self.up.double().flatten(1), self.down.double().flatten(1)
        return (self.alpha / self.rank * (up @ down)).reshape(len(up), *self.down.shape[1:])

    def reach(self) -> Tensor:
        """Σ |terms| of each entry: the products that Δ sums, without their signs. Errors of a float32 sum are relative to this."""
        return replace(self, up=self.up.abs(), down=self.down.abs(), alpha=abs(self.alpha)).delta()

    def sized(self, ratio: float, weight: Tensor) -> Pair:
        """With B multiplied so that |Δ| = ratio · |W|."""
        times = ratio * float(weight.double().norm()) / float(self.delta().norm())
        return replace(self, up=(self.up.double() * times).to(self.up.dtype))


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(shape: Sequence[int], rank: int = 4, alpha: float = 2.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> Pair:
    """Random factors for a weight (out, in, *kernel)."""
    ones = (1,) * len(shape[2:])
    return Pair(noise(shape[0], rank, *ones, seed=seed, dtype=dtype), noise(rank, *shape[1:], seed=seed + 1, dtype=dtype), alpha)


def peft(folder: Path, pairs: Mapping[str, Pair]) -> Path:
    """A PEFT folder for a language model; all pairs have one rank and one alpha."""
    folder.mkdir(parents=True)
    tensors = {
        f"base_model.model.{name}.lora_{leaf}.weight": value
        for name, (up, down) in _ab(pairs)
        for leaf, value in zip("BA", (up, down), strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    first = next(iter(pairs.values()))
    config = {"peft_type": "LORA", "r": first.rank, "lora_alpha": first.alpha, "target_modules": list(pairs)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _ab(pairs: Mapping[str, Pair]) -> list[tuple[str, tuple[Tensor, Tensor]]]:
    return [(name, (one.up.contiguous(), one.down.contiguous())) for name, one in pairs.items()]


def kohya(path: Path, pairs: Mapping[str, Pair], prefix: str = "lora_unet_") -> Path:
    """A kohya file; names with dots."""
    tensors: Tensors = {}
    for name, (up, down) in _ab(pairs):
        stem = prefix + name.replace(".", "_")
        alpha = torch.tensor(float(pairs[name].alpha))
        tensors |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down, f"{stem}.alpha": alpha}
    save_file(tensors, path)
    return path


def diffusers(path: Path, pairs: Mapping[str, Pair], prefix: str = "transformer.") -> Path:
    """A file of diffusers' keys; it records no alpha, so that the scale is 1."""
    tensors = {f"{prefix}{name}.lora_{leaf}.weight": value for name, ab in _ab(pairs) for leaf, value in zip("BA", ab, strict=True)}
    return save(path, tensors)


def lycoris(path: Path, modules: Mapping[str, Tensors], prefix: str = "lora_unet_") -> Path:
    """{module with dots: {leaf: tensor}} as a kohya file."""
    tensors = {f"{prefix}{name.replace('.', '_')}.{leaf}": value for name, leaves in modules.items() for leaf, value in leaves.items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path


# ---------------------------------------------------------------------------------------------------------------------- bases


def save(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, {"format": "pt"})
    return path


def language_model(size: int = 512, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """One attention and one feed-forward weight of two sizes of values, a bias and a norm no adapter here touches."""
    return {
        f"{Q}.weight": noise(size, size, seed=70).to(dtype),
        f"{Q}.bias": noise(size, seed=71).to(dtype),
        f"{UP}.weight": (noise(size + size // 2, size, seed=72) * 0.03).to(dtype),
        f"{NORM}.weight": (1 + noise(size, seed=73) * 0.1).to(dtype),
    }


WIDTH = 32  # of Flux' layers below


def flux(dtype: torch.dtype = torch.float32, width: int = WIDTH) -> Tensors:
    """Enough of Flux' transformer in its original names to be recognised: fused layers, and a last one with its halves exchanged."""
    h = width
    shapes = {
        "img_in": (h, 16),
        "double_blocks.0.img_attn.qkv": (3 * h, h),
        "double_blocks.0.img_attn.proj": (h, h),
        "double_blocks.0.img_mlp.0": (4 * h, h),
        "double_blocks.0.txt_attn.qkv": (3 * h, h),
        "double_blocks.0.txt_attn.proj": (h, h),
        "single_blocks.0.linear1": (7 * h, h),
        "single_blocks.0.linear2": (h, 5 * h),
        "final_layer.adaLN_modulation.1": (2 * h, h),
    }
    found: Tensors = {}
    for number, (name, shape) in enumerate(shapes.items()):
        found[f"{name}.weight"] = (noise(*shape, seed=200 + number) * 0.2).to(dtype)
        found[f"{name}.bias"] = (noise(shape[0], seed=300 + number) * 0.2).to(dtype)
    found["double_blocks.0.img_attn.norm.query_norm.scale"] = (1 + noise(16, seed=400) * 0.1).to(dtype)
    return found


QKV, LINEAR1, LAST = "double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "final_layer.adaLN_modulation.1"
BLOCK, SINGLE = "transformer_blocks.0.attn", "single_transformer_blocks.0"
FUSED = {  # original module → (the diffusers modules stacked in it, widths of each in h, are the halves exchanged?)
    QKV: ((f"{BLOCK}.to_q", f"{BLOCK}.to_k", f"{BLOCK}.to_v"), (1, 1, 1), False),
    LINEAR1: ((f"{SINGLE}.attn.to_q", f"{SINGLE}.attn.to_k", f"{SINGLE}.attn.to_v", f"{SINGLE}.proj_mlp"), (1, 1, 1, 4), False),
    LAST: (("norm_out.linear",), (2,), True),
}
SAME = {"double_blocks.0.img_attn.proj": f"{BLOCK}.to_out.0", "double_blocks.0.img_mlp.0": "transformer_blocks.0.ff.net.0.proj"}


def exchanged(whole: Tensor) -> Tensor:
    return torch.cat(whole.chunk(2)[::-1])


def split_flux(tensors: Mapping[str, Tensor]) -> Tensors:
    """The fused layers (and two others) under diffusers' names: q, k, v and mlp apart, the last layer's halves exchanged."""
    found: Tensors = {"x_embedder.weight": tensors["img_in.weight"], "x_embedder.bias": tensors["img_in.bias"]}
    for leaf in ("weight", "bias"):
        found |= {f"{mine}.{leaf}": tensors[f"{name}.{leaf}"] for name, mine in SAME.items()}
        for name, (parts, widths, turned) in FUSED.items():
            whole = tensors[f"{name}.{leaf}"]
            unit = len(whole) // sum(widths)
            cut = [exchanged(whole)] if turned else whole.split([unit * width for width in widths])
            found |= {f"{part}.{leaf}": piece for part, piece in zip(parts, cut, strict=True)}
    return found


def fuse_flux(tensors: Mapping[str, Tensor]) -> Tensors:
    """The inverse of `split_flux` for the fused layers."""
    found: Tensors = {}
    for leaf in ("weight", "bias"):
        for name, (parts, _, turned) in FUSED.items():
            whole = torch.cat([tensors[f"{part}.{leaf}"] for part in parts])
            found[f"{name}.{leaf}"] = exchanged(whole) if turned else whole
    return found


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, so that NaN equals NaN and -0 is not 0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_untouched(before: Mapping[str, Tensor], path: Path, changed: Iterable[str]) -> Tensors:
    """All keys in their order, all dtypes and shapes; every tensor that is not in `changed` to the bit. Returns the file's tensors."""
    after = load_file(path)
    changed = set(changed)
    assert sorted(after) == sorted(before)
    for key, old in before.items():
        assert (after[key].dtype, after[key].shape) == (old.dtype, old.shape), key
        assert (key in changed) or torch.equal(bits(after[key]), bits(old)), f"{key}: nothing changes it, and it changed"
    return after

"""What an adapter file does to each module of its model, told without the library: names by hand, formulas by hand, float64.

`effects(path, arch)` is {site: W' - W} for base weights W that are drawn from the site's name, so that kinds which multiply the base
(DoRA, OFT, IA3, GLoRA) are compared by what they do as well. Sites are "component.<diffusers or transformers name>".
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tests.mapping.handmade_names import CLIPS, denoiser_names

Tensor = torch.Tensor

_LEAVES = (
    *(f"lora_{side}.weight" for side in ("up", "down", "mid", "A", "B")),
    *("lora.up.weight", "lora.down.weight", "lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
    *("up.weight", "down.weight", "lora_B.bias", "lora_magnitude_vector", "magnitude", "dora_scale", "alpha"),
    *("diff", "diff_b", "w_norm", "b_norm", "weight", "scale", "on_input", "rescale", "set_weight"),
    *(f"hada_{x}" for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f"lokr_{x}" for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    *("a1.weight", "a2.weight", "b1.weight", "b2.weight", "oft_blocks", "oft_blocks.0", "oft_blocks.1", "oft_blocks.2", "oft_blocks.3"),
)
_ROLES = {"lora_A.weight": "down", "lora_B.weight": "up", "lora_B.bias": "bias"}
_FLAT = ("lora_unet__", "lora_unet_", "oft_unet_", "lora_transformer_", "lycoris_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_te_")
_DOTTED = (
    *("diffusion_model.", "unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.", "base_model.model."),
    *(f"text_encoders.{clip}.transformer." for clip in CLIPS),
    *(f"{clip}." for clip in ("clip_l", "clip_g", "t5")),
)


@dataclass
class Part:
    """One module of a file: where it acts, and its tensors."""

    component: str
    sites: tuple[str, ...]
    swapped: bool
    factors: dict[str, Tensor]
    alpha: float | None
    divisor: int | None = None  # PEFT's own rank, by which it divides even the alpha of a LoKr of two full factors


def effects(path: Path, arch: str) -> dict[str, Tensor]:
    """{site: W' - W flattened to (out, in · kernel)}, and {site + ":bias": b' - b}, summed over a site's modules."""
    found: dict[str, Tensor] = {}
    for part in _read(path, arch):
        for site, delta in _by_site(part):
            found[site] = found[site] + delta if site in found else delta
    return found


def worst(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """Largest relative Frobenius error over the sites of either; a site only one has is a delta of zero in the other."""
    largest = 0.0
    for site in {*before, *after}:
        one, two = before.get(site), after.get(site)
        if one is None or two is None:
            missing = two if one is None else one
            assert missing is not None
            largest = max(largest, math.inf if missing.any() else 0.0)
            continue
        assert one.shape == two.shape, f"{site}: {tuple(one.shape)} and {tuple(two.shape)}"
        size, error = float(one.norm()), float((two - one).norm())
        largest = max(largest, error / size if size else (math.inf if error else 0.0))
    return largest


# ------------------------------------------------------------------------------------------------------------------- reading


def _read(path: Path, arch: str) -> Iterator[Part]:
    """The modules of a file, or of every file of a PEFT folder."""
    if not path.is_dir():
        yield from _modules(path, arch, None, "")
        return
    folders = [path] if (path / "adapter_config.json").is_file() else sorted(part for part in path.iterdir() if part.is_dir())
    for folder in folders:
        config = json.loads((folder / "adapter_config.json").read_text())
        yield from _modules(folder / "adapter_model.safetensors", arch, config, "" if folder is path else folder.name + ".")


def _modules(path: Path, arch: str, config: dict[str, Any] | None, folder: str) -> Iterator[Part]:
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key).double() for key in file.keys()}  # noqa: SIM118
        header = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(("bundle_emb.", "_aux.")):
            continue
        stem, leaf = _cut(key)
        role = _ROLES.get(leaf) or ("up" if leaf.endswith("up.weight") else "down" if leaf.endswith("down.weight") else leaf)
        assert role not in grouped.setdefault(stem, {}), key
        grouped[stem][role] = tensor
    for stem, factors in grouped.items():
        component, name = _component(folder + stem if folder else stem, arch)
        sites, swapped = _sites(arch, component, name, stem.startswith(_FLAT), factors)
        own = config
        if own is None and header:
            prefix = {"denoiser": "unet." if arch.startswith("sd") and arch != "sd3" else "transformer."}.get(component, f"{component}.")
            own = {key.removeprefix(prefix): value for key, value in header.items() if key.startswith(prefix)} or None
        yield Part(component, sites, swapped, factors, _alpha(factors, own, name), _listed(config, "r", "rank_pattern", name))


def _cut(key: str) -> tuple[str, str]:
    if key.startswith(_FLAT):
        stem, _, leaf = key.partition(".")
    else:
        leaf = max((leaf for leaf in _LEAVES if key.endswith("." + leaf)), key=len, default="")
        stem = key[: -len(leaf) - 1]
    assert leaf in _LEAVES, f"{key}: no leaf the reference knows"
    return stem, leaf


def _alpha(factors: dict[str, Tensor], config: dict[str, Any] | None, name: str) -> float | None:
    """What s · rank is."""
    if config is None:
        return float(factors["alpha"]) if "alpha" in factors else None
    assert not config.get("use_rslora")
    found = _listed(config, "lora_alpha" if "lora_alpha" in config else "alpha", "alpha_pattern", name)
    return None if found is None else float(found)


def _listed(config: dict[str, Any] | None, field: str, patterns: str, name: str) -> Any:
    """A field of a PEFT config for one module: the first pattern that matches its name, else the default."""
    for pattern, value in ((config or {}).get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return (config or {}).get(field)


# --------------------------------------------------------------------------------------------------------------------- names


def _component(stem: str, arch: str) -> tuple[str, str]:
    """(component, the module's name behind the prefix)."""
    prefix = next((prefix for prefix in (*_FLAT, *_DOTTED) if stem.startswith(prefix)), "")
    name = stem[len(prefix) :]
    name = name.removeprefix("base_model.model.")
    if prefix == "transformer_2.":
        return "denoiser_2", name
    inner = re.match(r"(?:text_model|encoder[._]layers|encoder[._]block|layers[._]\d+[._]self_attn|text_projection)", name)
    if not inner:
        return "denoiser", name
    if re.match(r"encoder[._]block", name):
        return {"flux": "text_encoder_2", "sd3": "text_encoder_3"}.get(arch, "text_encoder"), name
    second = prefix in ("lora_te2_", "text_encoder_2.", "clip_g.", "text_encoders.clip_g.transformer.")
    return ("text_encoder_2" if second else "text_encoder"), name


def _sites(arch: str, component: str, name: str, flattened: bool, factors: dict[str, Tensor]) -> tuple[tuple[str, ...], bool]:
    """The sites a module's name stands for, and whether its row halves are exchanged."""
    if component != "denoiser":
        name = re.sub(r"\.self_attn\.to_(q|k|v|out)_lora$", r".self_attn.\1_proj", name)
        return (_unflatten_encoder(name) if flattened else name,), False
    name = re.sub(r"\.processor\.to_(q|k|v)_lora$", r".to_\1", name)
    name = re.sub(r"\.processor\.to_out_lora$", ".to_out.0", name)
    flattened = flattened or "." not in name
    sites, swapped = _denoiser_index(arch, flattened)[name.removesuffix("_") if flattened else name]
    if arch == "sd3" and "context_block" in name.replace(".", "_") and "adaLN" in name:  # two parts in the last block, six before
        swapped = factors["up"].shape[0] == 2 * factors["down"].shape[1]
    return sites, swapped


@cache
def _denoiser_index(arch: str, flattened: bool) -> dict[str, tuple[tuple[str, ...], bool]]:
    index: dict[str, tuple[tuple[str, ...], bool]] = {}
    for name, sites, swapped in denoiser_names(arch):
        key = name.replace(".", "_") if flattened else name
        assert index.setdefault(key, (sites, swapped)) == (sites, swapped), key
    return index


def _unflatten_encoder(name: str) -> str:
    """Encoders have few words, none of which holds another: put the dots back one by one."""
    for word in ("text_model", "encoder", "layers", "block", "layer", "self_attn", "mlp", "SelfAttention", "DenseReluDense"):
        name = re.sub(rf"(^|[._]){word}_(?=\w)", rf"\1{word}.", name)
    name = re.sub(r"(layers|block|layer)\.(\d+)_", r"\1.\2.", name)
    return re.sub(r"_(encoder|self_attn|mlp|layer|SelfAttention|DenseReluDense)\.", r".\1.", name)


# ------------------------------------------------------------------------------------------------------------------ formulas


def _by_site(part: Part) -> Iterator[tuple[str, Tensor]]:
    names = [f"{part.component}.{site}" for site in part.sites]
    base = _Base(names, part.swapped)
    weight, bias = _change(part, base)
    for suffix, whole in (("", weight), (":bias", bias)):
        if whole is None:
            continue
        whole = torch.roll(whole, len(whole) // 2, 0) if part.swapped else whole
        pieces = torch.split(whole, base.heights(len(whole), base.width or 0)) if len(names) > 1 else [whole]
        for name, piece in zip(names, pieces, strict=True):
            yield name + suffix, piece


class _Base:
    """The base weight of a file's module: that of its sites, joined and with exchanged halves as the file has them."""

    def __init__(self, names: list[str], swapped: bool) -> None:
        self.names, self.swapped, self.width = names, swapped, None

    def heights(self, out: int, width: int) -> list[int]:
        """Rows of the parts: linear1 is q, k, v as wide as the input and the rest; Lumina's k and v share what q leaves."""
        if len(self.names) == 1:
            return [out]
        if len(self.names) == 4:
            return [width, width, width, out - 3 * width]
        return [width, (out - width) // 2, (out - width) // 2] if width < out else [out // 3] * 3

    def weight(self, out: int, width: int, kernel: tuple[int, ...] = ()) -> Tensor:
        rows = self.heights(out, width)
        drawn = [_drawn(name, (height, width, *kernel)) for name, height in zip(self.names, rows, strict=True)]
        whole = torch.cat(drawn)
        return torch.roll(whole, out // 2, 0) if self.swapped else whole


def _drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(math.prod(shape[1:]))


def _change(part: Part, base: _Base) -> tuple[Tensor | None, Tensor | None]:
    """(W' - W as a matrix, b' - b) of one module."""
    f = part.factors
    bias = f.get("diff_b", f.get("b_norm"))
    if "oft_blocks" in f or "oft_blocks.0" in f:
        return _rotated(part, base), bias
    if "on_input" in f:
        return _ia3(part, base), bias
    if "a1.weight" in f:
        return _glora(part, base), bias
    delta = _additive(part)
    if delta is None:
        return None, bias
    base.width = delta.shape[1] if delta.dim() > 1 else 0
    scale = 1.0 if part.alpha is None or "up" not in f else part.alpha / f["down"].shape[0]
    if "bias" in f:
        bias = f["bias"] * scale
    role = next((role for role in ("dora_scale", "lora_magnitude_vector", "magnitude") if role in f), None)
    if role is not None:
        delta = _dora(delta, f[role], role == "dora_scale" and f[role].shape[0] == 1, base)
    if "scale" in f or "set_weight" in f or ("weight" in f and "on_input" not in f):
        delta = delta - _drawn(base.names[0], tuple(delta.shape))
    return delta.flatten(1) if delta.dim() > 1 else delta, bias


def _additive(part: Part) -> Tensor | None:
    """The delta of kinds that add one, in the weight's shape where the factors tell it."""
    f = part.factors
    for role in ("diff", "w_norm", "scale", "set_weight", "weight"):
        if role in f:
            return f[role]
    if "up" in f:
        rank = f["down"].shape[0]
        scale = 1.0 if part.alpha is None else part.alpha / rank
        up, down = f["up"].flatten(1), f["down"]
        if "lora_mid.weight" in f:
            return scale * torch.einsum("op,pqhw,qi->oihw", up, f["lora_mid.weight"], down.flatten(1))
        return scale * torch.einsum("or,r...->o...", up, down)
    if "hada_w1_a" in f:
        scale = 1.0 if part.alpha is None else part.alpha / f["hada_w1_b"].shape[0]
        return scale * _hada(f, "1") * _hada(f, "2")
    return _lokr(part) if "lokr_w1" in f or "lokr_w1_a" in f else None


def _hada(f: dict[str, Tensor], which: str) -> Tensor:
    a, b = f[f"hada_w{which}_a"], f[f"hada_w{which}_b"]
    core = f.get(f"hada_t{which}")
    return a @ b if core is None else torch.einsum("ij...,ip,jr->pr...", core, a, b)


def _lokr(part: Part) -> Tensor:
    f = part.factors
    one = f["lokr_w1"] if "lokr_w1" in f else f["lokr_w1_a"] @ f["lokr_w1_b"]
    rank = next((f[role].shape[0] for role in ("lokr_w1_b", "lokr_w2_b") if role in f), None)
    if "lokr_t2" in f:
        two = torch.einsum("ijkl,ip,jr->prkl", f["lokr_t2"], f["lokr_w2_a"], f["lokr_w2_b"])
    else:
        two = f["lokr_w2"] if "lokr_w2" in f else f["lokr_w2_a"] @ f["lokr_w2_b"]
    rank = rank or part.divisor
    scale = 1.0 if part.alpha is None or rank is None else part.alpha / rank
    return scale * torch.kron(one.reshape(*one.shape, *(1,) * (two.dim() - 2)), two.contiguous())


def _dora(delta: Tensor, magnitude: Tensor, on_inputs: bool, base: _Base) -> Tensor:
    weight = base.weight(*delta.shape[:2], tuple(delta.shape[2:]))
    sum_ = weight + delta
    if on_inputs:
        norm = sum_.transpose(0, 1).flatten(1).norm(dim=1)
        shape = (1, -1, *(1,) * (delta.dim() - 2))
    else:
        norm = sum_.flatten(1).norm(dim=1)
        shape = (-1, *(1,) * (delta.dim() - 1))
    return magnitude.reshape(shape) * sum_ / norm.reshape(shape) - weight


def _ia3(part: Part, base: _Base) -> Tensor:
    weight = part.factors["weight"].flatten()
    on_input = bool(part.factors["on_input"])
    drawn = base.weight(*((24, len(weight)) if on_input else (len(weight), 24)))
    return drawn * (weight if on_input else weight[:, None])


def _glora(part: Part, base: _Base) -> Tensor:
    """D = s (W a1 a2 + b1 b2), channels contracted for convolutions."""
    f = part.factors
    b2, a1, a2, b1 = f["b2.weight"], f["a1.weight"].flatten(1), f["a2.weight"].flatten(1), f["b1.weight"].flatten(1)
    scale = 1.0 if part.alpha is None else part.alpha / b2.shape[0]
    weight = base.weight(len(b1), b2.shape[1], tuple(b2.shape[2:]))
    delta = torch.einsum("oi...,ir,rj->oj...", weight, a1, a2) + torch.einsum("or,r...->o...", b1, b2)
    return scale * delta.flatten(1)


def _rotated(part: Part, base: _Base) -> Tensor:
    """Diag-OFT: block rows W' = R^T W with R = (I + Q)(I - Q)^-1 per part, then rescale. 24 stands for the unknown input width."""
    f = part.factors
    lists = [f["oft_blocks"]] if "oft_blocks" in f else [f[f"oft_blocks.{n}"] for n in range(4) if f"oft_blocks.{n}" in f]
    heights = [blocks.shape[0] * blocks.shape[1] for blocks in lists]
    if len(lists) == 1 and len(base.names) == 3:  # q, k and v under one list of blocks
        lists, heights = list(lists[0].chunk(3)), [heights[0] // 3] * 3
    weights = [_drawn(name, (height, 24)) for name, height in zip(base.names, heights, strict=True)]
    changed = []
    for blocks, weight in zip(lists, weights, strict=True):
        skew = blocks - blocks.transpose(1, 2)
        bound = (part.alpha or 0.0) * len(weight)
        size = float(skew.norm())
        if size > bound and (bound > 0 or "oft_blocks.0" in f):  # sd-scripts always clamps, LyCORIS where there is a bound
            skew = skew * bound / size
        eye = torch.eye(blocks.shape[1], dtype=torch.float64)
        rotation = (eye + skew) @ torch.linalg.inv(eye - skew)
        changed.append(torch.einsum("nij,nik->njk", rotation, weight.reshape(len(blocks), -1, 24)).reshape(-1, 24))
    whole = torch.cat(changed)
    if "rescale" in f:
        whole = whole * f["rescale"].reshape(-1, 1)
    base.width = heights[0]
    return whole - torch.cat(weights)

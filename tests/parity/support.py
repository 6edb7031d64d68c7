"""What the parity tests share: expected ΔW under a dialect's names, and how far two results are apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fixtures import adapters, make
from tests.parity.original import original, stacked

Truth = Mapping[str, Mapping[str, torch.Tensor]]  # pipeline folder → module → ΔW

PREFIXES = {
    "diffusers": {folder: f"{folder}." for folder in ("unet", "transformer", "text_encoder", "text_encoder_2")},
    "kohya": {"unet": "lora_unet_", "transformer": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
    "comfy": {
        "unet": "diffusion_model.",
        "transformer": "diffusion_model.",
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.clip_g.transformer.",
    },
}
SPECIAL = {  # one encoder, or T5 for the second
    ("kohya", "sd1", "text_encoder"): "lora_te_",
    ("kohya", "flux", "text_encoder_2"): "lora_te3_",
    ("comfy", "flux", "text_encoder_2"): "text_encoders.t5xxl.transformer.",
}


def in_file(architecture: str, folder: str, name: str, dialect: str) -> str:
    """A module's full name in a file of a dialect, for names that are not regrouped."""
    if folder == "text_encoder" or (folder == "text_encoder_2" and architecture == "sdxl"):
        name = f"text_model.{name}" if name.startswith("encoder.") else name  # transformers 5 dropped it from CLIPTextModel
    prefix = SPECIAL.get((dialect, architecture, folder), PREFIXES[dialect][folder])
    return prefix + (name.replace(".", "_") if dialect == "kohya" else name)


def has_original_names(architecture: str, folder: str, dialect: str) -> bool:
    return folder in ("unet", "transformer") and (dialect == "comfy" or (dialect == "kohya" and architecture != "sd1"))


def expected(architecture: str, truth: Truth, dialect: str) -> dict[str, torch.Tensor]:
    """{module name in the file: dense ΔW} of a dialect."""
    found = {}
    for folder, deltas in truth.items():
        named = stacked(original(architecture, deltas), deltas) if has_original_names(architecture, folder, dialect) else deltas
        found.update({in_file(architecture, folder, name, dialect): delta for name, delta in named.items()})
    return found


def made(of: make.Base, *, seed: int = 0, **options: Any) -> dict[str, dict[str, adapters.Factors]]:
    """Hand-made factors on every Linear and Conv of every model."""
    return {
        folder: adapters.factors(model, adapters.layers(model), seed=seed + number, **options)
        for number, (folder, model) in enumerate(of.models.items())
    }


def truth_of(factors: Mapping[str, Mapping[str, adapters.Factors]]) -> dict[str, dict[str, torch.Tensor]]:
    return {folder: {name: part.delta() for name, part in found.items()} for folder, found in factors.items()}


def save_kohya(path: Path, architecture: str, factors: Mapping[str, Mapping[str, adapters.Factors]]) -> Path:
    """The factors as sd-scripts writes them. Fused modules: block-diagonal up, alpha of the common scale times the rank sum."""
    tensors = {}
    for folder, found in factors.items():
        groups = (
            original(architecture, found)
            if has_original_names(architecture, folder, "kohya")
            else {name: ((name,), False) for name in found}
        )
        for name, (parts, swapped) in groups.items():
            whole = _fused([found[part] for part in parts])
            up = torch.cat(whole.up.chunk(2)[::-1]) if swapped else whole.up
            stem = in_file(architecture, folder, name, "kohya")
            tensors |= {f"{stem}.lora_up.weight": up.contiguous(), f"{stem}.lora_down.weight": whole.down}
            if whole.alpha is not None:
                tensors[f"{stem}.alpha"] = torch.tensor(float(whole.alpha))
    save_file(tensors, path, {"ss_network_module": "networks.lora"})
    return path


def _fused(parts: list[adapters.Factors]) -> adapters.Factors:
    """Several modules over one input as one. A scale that is not the first's goes into that part's up."""
    if len(parts) == 1:
        return parts[0]
    rank = sum(part.rank for part in parts)
    scales = [1.0 if part.alpha is None else part.alpha / part.rank for part in parts]
    ups = [part.up * (scale / scales[0]) for part, scale in zip(parts, scales, strict=True)]
    return adapters.Factors(torch.block_diag(*ups), torch.cat([part.down for part in parts]), scales[0] * rank)


def assert_deltas(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    """The same modules, and ΔW equal to a relative Frobenius error."""
    assert sorted(found) == sorted(wanted)
    errors = {name: apart(found[name], wanted[name]) for name in wanted}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= tolerance, f"{worst}: relative error {errors[worst]:.2e}"


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative Frobenius error; shapes may differ by trailing ones (1x1 convolutions)."""
    return float((found.double().flatten() - wanted.double().flatten()).norm() / wanted.double().norm())


def merged(of: make.Base, truth: Truth) -> make.Base:
    """The base with W + ΔW, added in float64 and rounded once."""
    return make.Base(of.architecture, {folder: adapters.merged(model, truth.get(folder, {})) for folder, model in of.models.items()})

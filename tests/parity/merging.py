"""What the merge parity tests share: adapters for the tiny checkpoints, diffusers' reading of a single file, the merge by hand.

By hand: W' = W + weight · ΔW in float64 on the diffusers state dict of every model, ΔW = alpha / rank · B · A from the factors alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fixtures import adapters, checkpoints, layouts, make
from tests.parity.support import _fused, apart, in_file, made, save_kohya

States = dict[str, dict[str, torch.Tensor]]  # pipeline folder → key → tensor
Factors = dict[str, dict[str, adapters.Factors]]

RANKS, ALPHAS = (4, 4, 4, 4, 4, 6), (2.0, 1.0, None, 3.0, 8.0)
# diffusers puts an identity where SD3's first projection belongs, and T5's embedding has a second name without values
NOT_READ = {("sd3", "text_encoder"): ("text_projection.weight",), ("sd3", "text_encoder_3"): ("encoder.embed_tokens.weight",)}


def trainable(architecture: str) -> make.Base:
    """The models an adapter may change: all but the VAE."""
    of = checkpoints.models(architecture)
    return make.Base(architecture, {folder: model for folder, model in of.models.items() if folder != "vae"})


def base_states(architecture: str) -> States:
    return {folder: checkpoints.state(model) for folder, model in checkpoints.models(architecture).models.items()}


def by_hand(architecture: str, changes: Mapping[str, Mapping[str, torch.Tensor]], weight: float = 1.0) -> States:
    """The base's states with `weight` · ΔW added to each named module, in float64."""
    states = base_states(architecture)
    for folder, deltas in changes.items():
        for name, delta in deltas.items():
            old = states[folder][f"{name}.weight"].double()
            states[folder][f"{name}.weight"] = old + weight * delta.double().reshape(old.shape)
    return states


def assert_states(
    found: States, wanted: States, base: States, tolerance: float = 2e-6, but: Any = NOT_READ, architecture: str = ""
) -> None:
    """Each tensor within the tolerance; those that nothing changes are the base's, to the bit."""
    assert found.keys() == wanted.keys()
    for folder, tensors in wanted.items():
        skipped = but.get((architecture, folder), ())
        assert found[folder].keys() == tensors.keys(), folder
        for key, tensor in tensors.items():
            if key in skipped:
                continue
            value = found[folder][key]
            if tensor.dtype == torch.float64:
                assert apart(tensor, base[folder][key]) > 1e-4, f"{folder}/{key}: the adapter does nothing, the test could not fail"
                assert apart(value, tensor) <= tolerance, f"{folder}/{key}: relative error {apart(value, tensor):.2e}"
            else:
                assert torch.equal(value, base[folder][key]), f"{folder}/{key}: nothing changes it, and it changed"


# ------------------------------------------------------------------------------------------------------------------- adapters


def factors_of(architecture: str, **options: Any) -> Factors:
    """Factors on every Linear and Conv of every model but the VAE."""
    return made(trainable(architecture), **options)


def uniform(found: Factors, times: float) -> Factors:
    """The same factors without alpha, B multiplied: what every runtime applies at the same strength."""
    return {
        folder: {name: replace(part, up=part.up * times, alpha=None) for name, part in parts.items()} for folder, parts in found.items()
    }


def save_adapter(path: Path, architecture: str, dialect: str, factors: Factors) -> Path:
    return (save_sd3_kohya if dialect == "kohya" and architecture == "sd3" else {"kohya": _kohya, "diffusers": save_diffusers}[dialect])(
        path, architecture, factors
    )


def _kohya(path: Path, architecture: str, factors: Factors) -> Path:
    """SD2 has the names of SD1."""
    return save_kohya(path, "sd1" if architecture == "sd2" else architecture, factors)


def save_sd3_kohya(path: Path, architecture: str, factors: Factors) -> Path:
    """sd-scripts' names for SD3: joint_blocks with qkv fused (block-diagonal up), three text encoders."""
    prefixes = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}
    tensors = {}
    for folder, found in factors.items():
        alone = {name: ((name,), False) for name in found}
        groups = layouts.modules(architecture, found) if folder == "transformer" else alone
        for name, (parts, swapped) in groups.items():
            whole = _fused([found[part] for part in parts])
            up = torch.cat(whole.up.chunk(2)[::-1]) if swapped else whole.up
            stem = prefixes.get(folder, "lora_unet_") + name.replace(".", "_")
            tensors |= {f"{stem}.lora_up.weight": up.contiguous(), f"{stem}.lora_down.weight": whole.down}
            if whole.alpha is not None:
                tensors[f"{stem}.alpha"] = torch.tensor(float(whole.alpha))
    save_file(tensors, path, {"ss_network_module": "networks.lora_sd3"})
    return path


def save_diffusers(path: Path, architecture: str, factors: Factors) -> Path:
    """`transformer.….lora_A.weight`; rank and alpha of every module in the header's patterns, as diffusers writes them."""
    tensors, header = {}, {}
    for folder, found in factors.items():
        stems = {
            name: f"{folder}.{name}" if folder == "text_encoder_3" else in_file(architecture, folder, name, "diffusers") for name in found
        }
        patterns: dict[str, dict[str, float]] = {"rank_pattern": {}, "alpha_pattern": {}}
        for name, part in found.items():
            own, alpha = f"^{stems[name].removeprefix(folder + '.')}", part.rank if part.alpha is None else part.alpha
            patterns["rank_pattern"] |= {own: part.rank} if part.rank != 4 else {}
            patterns["alpha_pattern"] |= {own: float(alpha)} if alpha != 4 else {}
            tensors |= {f"{stems[name]}.lora_A.weight": part.down, f"{stems[name]}.lora_B.weight": part.up}
        fields = {"r": 4, "lora_alpha": 4.0, "target_modules": list(found), **patterns}
        header |= {f"{folder}.{key}": value for key, value in fields.items()}
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(header)})
    return path


# ------------------------------------------------------------------------------------------------------------ reading files back


def pipeline_class(architecture: str) -> Any:
    import diffusers

    return getattr(diffusers, checkpoints._PIPELINES[architecture][0])


def loaded(architecture: str, path: Path) -> Any:
    return pipeline_class(architecture).from_pretrained(path, local_files_only=True)


def read_folder(architecture: str, path: Path) -> States:
    """The states of all models of a pipeline folder, as diffusers and transformers load them."""
    pipe = loaded(architecture, path)
    return {folder: dict(getattr(pipe, folder).state_dict()) for folder in checkpoints.models(architecture).models}


def read_single(architecture: str, path: Path, config: Path) -> States:
    """The states of all models of a single file, as diffusers converts them. config: a pipeline folder with the models' configs."""
    if architecture == "flux":
        return _read_flux_single(path)
    pipe = pipeline_class(architecture).from_single_file(path, config=str(config), local_files_only=True)
    return {folder: dict(getattr(pipe, folder).state_dict()) for folder in checkpoints.models(architecture).models}


def _read_flux_single(path: Path) -> States:
    from diffusers.loaders.single_file_utils import (
        convert_ldm_clip_checkpoint,
        convert_ldm_vae_checkpoint,
        convert_sd3_t5_checkpoint_to_diffusers,
    )

    tensors, prefix = load_file(path), "model.diffusion_model."
    transformer = read_flux({key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)})
    clip = convert_ldm_clip_checkpoint(tensors, "text_encoders.clip_l.transformer.")
    t5 = convert_sd3_t5_checkpoint_to_diffusers(tensors)
    return {
        "transformer": transformer,
        "text_encoder": {key.removeprefix("text_model."): value for key, value in clip.items()},
        "text_encoder_2": t5 | {"encoder.embed_tokens.weight": t5["shared.weight"]},
        "vae": convert_ldm_vae_checkpoint(tensors, dict(checkpoints.models("flux").models["vae"].config)),
    }


def read_flux(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' converter for Flux on a narrow model. It cuts `linear1` at multiples of 3072: every row is given 3072 / h times."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    times = 3072 // len(tensors["img_in.bias"])
    wide = {key: value.repeat_interleave(times, 0) if ".linear1." in key else value for key, value in tensors.items()}
    found = convert_flux_transformer_checkpoint_to_diffusers(wide)
    cut = (".to_q.", ".to_k.", ".to_v.", ".proj_mlp.")
    return {
        key: value[::times] if key.startswith("single_") and any(part in key for part in cut) else value for key, value in found.items()
    }


def header_of(path: Path) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """Keys in the file's order, {key: dtype}, metadata."""
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
        return keys, {key: file.get_slice(key).get_dtype() for key in keys}, file.metadata() or {}


# ----------------------------------------------------------------------------------------------------------------------- forward


def outputs(architecture: str, models: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Each model's output for one fixed input, by pipeline folder; the VAE is left out."""
    rest = {folder: model for folder, model in models.items() if folder not in ("vae", "transformer") or architecture != "sd3"}
    rest = {folder: model for folder, model in rest.items() if folder != "vae"}
    found = make.forward(make.Base(architecture, rest))
    if architecture == "sd3" and "transformer" in models:
        noise = torch.Generator().manual_seed(99)
        inputs = {"hidden_states": (1, 4, 8, 8), "encoder_hidden_states": (1, 6, 24), "pooled_projections": (1, 40)}
        random = {name: torch.randn(shape, generator=noise) for name, shape in inputs.items()}
        with torch.no_grad():
            found["transformer"] = models["transformer"](**random, timestep=torch.tensor([400.0]), return_dict=False)[0]
    return found

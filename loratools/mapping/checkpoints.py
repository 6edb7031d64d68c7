"""Where a site lives in a base checkpoint: the layouts of model files, as data.

Used to recognise a checkpoint and to name its components; the layouts are those of sgm/ldm single files, diffusers folders,
bare DiT files and Hugging Face shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from loratools.mapping.architectures import Architecture, registry
from loratools.mapping.dimensions import best_variant, fit_shape, vote_dims
from loratools.mapping.rules import DIFF, normal, numbers_in

# prefix → (layout, part of the pipeline). Longest first wins; "" is tried last.
PREFIXES: tuple[tuple[str, str, str], ...] = (
    ("model.diffusion_model.", "ldm", "denoiser"),
    ("first_stage_model.", "ldm", "vae"),
    ("cond_stage_model.", "ldm", "text_encoder"),
    ("conditioner.embedders.0.", "ldm", "text_encoder"),
    ("conditioner.embedders.1.", "ldm", "text_encoder_2"),
    ("model_ema.", "ldm", "ema"),
    ("text_encoders.", "ldm", "text_encoders"),
    ("vae.", "ldm", "vae"),
    ("diffusion_model.", "bare", "denoiser"),
    ("net.", "bare", "denoiser"),
    ("unet/", "diffusers", "denoiser"),
    ("transformer/", "diffusers", "denoiser"),
    ("transformer_2/", "diffusers", "denoiser_2"),
    ("text_encoder/", "diffusers", "text_encoder"),
    ("text_encoder_2/", "diffusers", "text_encoder_2"),
    ("text_encoder_3/", "diffusers", "text_encoder_3"),
    ("vae/", "diffusers", "vae"),
    ("model.layers.", "hf", "model"),
    ("model.embed_tokens.", "hf", "model"),
    ("model.norm.", "hf", "model"),
    ("model.language_model.", "hf", "model"),
    ("transformer.h.", "hf", "model"),
    ("lm_head.", "hf", "model"),
)


LANGUAGE_MODEL = "llm"  # the architecture of every checkpoint in the layout "hf"

Known = tuple[Architecture, str, float]  # (architecture, namespace, share of the denoiser's modules it knows)


@dataclass(frozen=True)
class CheckpointGuess:
    """What a checkpoint is: its layout, tensors per component, and architecture candidates with the share of names they know."""

    layout: str
    components: dict[str, int]
    candidates: tuple[Known, ...]
    variant: str | None = None


def identify(shapes: Mapping[str, tuple[int, ...]]) -> CheckpointGuess:
    """Recognise a checkpoint from its tensors' names and shapes."""
    layouts: Counter[str] = Counter()
    components: Counter[str] = Counter()
    modules: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        prefix, layout, component = next((row for row in PREFIXES if name.startswith(row[0])), ("", "bare", "denoiser"))
        layouts[layout] += 1
        components[component] += 1
        if component == "denoiser":
            module, _, leaf = name[len(prefix) :].rpartition(".")
            modules[module] = shape if leaf == "weight" else modules.get(module, ())
    kept, variant = _by_widths(_best(modules), modules)
    diffusers_names = any(namespace == DIFF for _, namespace, _ in kept)
    layout = "hf" if "hf" in layouts and not kept else next((name for name in ("ldm", "diffusers", "bare") if layouts[name]), "bare")
    if layout == "bare" and diffusers_names:
        layout = "diffusers"
    return CheckpointGuess(layout, {"model": components.total()} if layout == "hf" else dict(components), kept, variant)


def _best(modules: Mapping[str, tuple[int, ...]]) -> list[Known]:
    """The architectures (and the namespace) that know the largest share of these module names, if it is more than half."""
    forms: dict[str, list[list[int]]] = {}
    for name in modules:
        forms.setdefault(normal(name), []).append(numbers_in(name))
    found: list[Known] = []
    for architecture in registry().values():
        if architecture.open_names:
            continue
        table = architecture.component("denoiser").table
        shares = {}
        for namespace in ("orig", DIFF):
            known = 0
            for form, numbered in forms.items():
                candidates = table.candidates(namespace, form)
                known += sum(1 for numbers in numbered if candidates and candidates.matches(numbers))
            shares[namespace] = known / max(len(modules), 1)
        namespace = max(shares, key=lambda name: shares[name])
        found.append((architecture, namespace, shares[namespace]))
    best = max((share for _, _, share in found), default=0.0)
    return [known for known in found if known[2] >= best > 0.5]


def _by_widths(candidates: list[Known], modules: Mapping[str, tuple[int, ...]]) -> tuple[tuple[Known, ...], str | None]:
    """Of equally good candidates, those whose published widths the file has (SD1 and SD2 differ in nothing else)."""
    scored = []
    for architecture, namespace, score in candidates:
        table = architecture.component("denoiser").table
        pairs = [(match.row, shape) for name, shape in modules.items() if shape for match in table.by_name(namespace, name)[:1]]
        dims = vote_dims(pairs)
        misfits = sum(fit_shape(row, shape, dims) is None for row, shape in pairs)
        kernels = sum((len(shape) > 2) != (row.layer == "conv") for row, shape in pairs)
        variant, agreement = best_variant(architecture, dims)
        scored.append(((misfits, kernels, -agreement), variant, (architecture, namespace, score)))
    best = min((item[0] for item in scored), default=(0, 0, 0))
    kept = [item for item in scored if item[0] == best]
    return tuple(item[2] for item in kept), kept[0][1] if len(kept) == 1 else None

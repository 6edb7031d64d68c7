"""Which sites a base has: `sites` is the inverse of `place`, names every tensor of a module, and reads headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures import checkpoints, language_models
from loratools.adapters.adapter import Site
from loratools.mapping.architectures import Architecture, registry
from loratools.mapping.bases import Base, architecture_of_base
from loratools.tensors.reader import open_source
from loratools.tensors.source import TensorSource
from tests.mapping.builders import Blank
from tests.operations.merged import base_states

pytestmark = pytest.mark.filterwarnings("ignore")

H = 8

NO_MODULES = ("first_stage_model.", "vae.", "vae/", "model_ema.", "betas", "alphas_cumprod", "denoiser.sigmas")


def blank(architecture: Architecture | str, shapes: dict[str, tuple[int, ...]], model_type: str | None = None) -> Base:
    source = TensorSource(Path("base.safetensors"), "safetensors", {key: Blank(shape) for key, shape in shapes.items()})
    found = registry()[architecture] if isinstance(architecture, str) else architecture
    return Base(source, found, model_type=model_type)


LAYOUTS: dict[str, Callable[[str, Path], Path]] = {
    "single": lambda architecture, path: checkpoints.single(architecture, path.with_suffix(".safetensors")),
    "folder": lambda architecture, path: checkpoints.folder(architecture, path),
    "transformers 5": lambda architecture, path: checkpoints.folder(architecture, path, published=False),
    "shards": lambda architecture, path: checkpoints.folder(architecture, path, max_shard_size="100KB"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ["sd1", "sd2", "sdxl", "sd3", "flux"])
def test_every_tensor_of_a_module_is_a_site_of_its_own(architecture: str, layout: str, tmp_path: Path) -> None:
    """All weights and biases of denoiser and text encoders, whatever their names; each once; `place` leads back to the tensor."""
    base = Base(open_source(LAYOUTS[layout](architecture, tmp_path / "base")), registry()[architecture])
    found = list(dict.fromkeys(base.sites()))
    assert max(Counter((site, role) for site, role, _ in found).values()) == 1, "a site in two tensors"
    for site, role, key in found:
        place = base.place(site, role)
        assert place is not None
        assert place.key == key
    unnamed = [key for key in base.tensors if key not in {key for _, _, key in found} and not key.startswith(NO_MODULES)]
    assert all(key.endswith(("position_ids", "logit_scale")) for key in unnamed), unnamed
    rows = Counter[str]()
    for site, role, key in found:
        place = base.place(site, role)
        assert place is not None
        rows[key] += place.stop - place.start
    assert all(rows[key] == base.tensors[key].shape[0] for key in rows), "some rows of a tensor belong to no site"


@pytest.mark.parametrize("architecture", ["sd1", "sdxl", "sd3", "flux"])
def test_all_layouts_have_the_same_sites(architecture: str, tmp_path: Path) -> None:
    """And they are those of the models: one a module of diffusers' and transformers' own classes."""
    seen = []
    for layout, write in LAYOUTS.items():
        base = Base(open_source(write(architecture, tmp_path / layout)), registry()[architecture])
        seen.append({(site, role) for site, role, _ in base.sites()})
    assert all(other == seen[0] for other in seen[1:]), [sorted(map(str, other ^ seen[0]))[:5] for other in seen]
    states = base_states(architecture)
    denoiser = {(key.rpartition(".")[0], key.rpartition(".")[2]) for key in next(iter(states.values())) if key.endswith(("weight", "bias"))}
    assert {(site.path, role) for site, role in seen[0] if site.component == "denoiser"} >= denoiser


def test_fused_rows_are_sites_one_by_one() -> None:
    shapes = {"double_blocks.0.img_attn.qkv.weight": (3 * H, H), "double_blocks.0.img_attn.qkv.bias": (3 * H,)}
    shapes |= {"double_blocks.0.img_attn.proj.weight": (H, H)}
    found = list(blank("flux", shapes).sites())
    block = "transformer_blocks.0.attn"
    assert [(site.path, role) for site, role, _ in found] == [
        *((f"{block}.{part}", "weight") for part in ("to_q", "to_k", "to_v")),
        *((f"{block}.{part}", "bias") for part in ("to_q", "to_k", "to_v")),
        (f"{block}.to_out.0", "weight"),
    ]


def test_norms_and_parameters_of_other_names() -> None:
    """Flux says scale, open_clip in_proj_weight and positional_embedding, SD3 pos_embed: weights without that leaf."""
    cases: list[tuple[str, dict[str, tuple[int, ...]], set[tuple[str, str, str]]]] = [
        (
            "flux",
            {"double_blocks.0.img_attn.norm.key_norm.scale": (4,), "img_in.weight": (H, H)},
            {("denoiser", "transformer_blocks.0.attn.norm_k", "weight"), ("denoiser", "x_embedder", "weight")},
        ),
        (
            "sdxl",
            {
                "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": (3 * H, H),
                "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias": (3 * H,),
                "conditioner.embedders.1.model.positional_embedding": (16, H),
            },
            {
                *(
                    ("text_encoder_2", f"text_model.encoder.layers.0.self_attn.{part}_proj", role)
                    for part in "qkv"
                    for role in ("weight", "bias")
                ),
                ("text_encoder_2", "text_model.embeddings.position_embedding", "weight"),
            },
        ),
    ]
    for architecture, shapes, wanted in cases:
        assert {(site.component, site.path, role) for site, role, _ in blank(architecture, shapes).sites()} == wanted


def test_an_invented_model_names_itself() -> None:
    """Modules, norms and bare parameters; the prefix of a known layout is no part of a name."""
    shapes: dict[str, tuple[int, ...]] = {"loom.mix.weight": (H, H), "loom.mix.bias": (H,), "loom.calm.weight": (H,), "pace": (7,)}
    for prefix in ("", "model.diffusion_model."):
        source = TensorSource(Path("loom.safetensors"), "safetensors", {prefix + key: Blank(shape) for key, shape in shapes.items()})
        base = Base(source, architecture_of_base(source))
        assert {(site.path, role): key for site, role, key in base.sites()} == {
            ("loom.mix", "weight"): f"{prefix}loom.mix.weight",
            ("loom.mix", "bias"): f"{prefix}loom.mix.bias",
            ("loom.calm", "weight"): f"{prefix}loom.calm.weight",
            ("pace", "weight"): f"{prefix}pace",
        }


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model(tied: bool, tmp_path: Path) -> None:
    """Every tensor under its own name; a head without a tensor is not made up."""
    base = Base(open_source(language_models.llama_folder(tmp_path / "llama", tied=tied)), registry()["llm"])
    found = {key: (site, role) for site, role, key in base.sites()}
    assert found.keys() == base.tensors.keys()
    assert all(f"{site.path}.{role}" == key for key, (site, role) in found.items())
    assert ("lm_head.weight" in found) is not tied


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.embed_tokens", True),
        ("transformer.wte", True),
        ("transformer.wpe", True),
        ("model.language_model.embed_tokens", True),
        ("bert.embeddings.token_type_embeddings", True),
        ("gpt_neox.embed_in", True),
        ("lm_head", False),
        ("model.layers.0.self_attn.q_proj", False),
        ("model.layers.0.embed_tokens_proj", False),
    ],
)
def test_embeddings_by_their_name(name: str, wanted: bool) -> None:
    base = blank("llm", {f"{name}.weight": (H, H)})
    assert base.looks_up(Site("model", name)) is wanted
    assert blank("sd1", {"input_blocks.0.0.weight": (H, 4, 3, 3)}).looks_up(Site("denoiser", name)) is False

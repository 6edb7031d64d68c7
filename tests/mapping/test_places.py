"""Where a base keeps a module: every layout there is, under names written out here, and language models' names by version.

Nothing is read from the tables of `loratools.mapping`: the names are those of the files that ldm, sgm, ComfyUI, diffusers and
transformers write. Headers only.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from loratools.adapters.adapter import Site
from loratools.mapping.architectures import registry
from loratools.mapping.bases import Base, Place
from loratools.tensors.source import TensorSource
from tests.mapping.builders import Blank

H = 8  # width of everything below

# site of diffusers → the module under its original name; both are one matrix of their own
UP_Q = ("up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q", "output_blocks.9.1.transformer_blocks.0.attn1.to_q")
REFINER_Q = ("up_blocks.2.attentions.1.transformer_blocks.3.attn1.to_q", "output_blocks.7.1.transformer_blocks.3.attn1.to_q")
FLUX_OUT = ("transformer_blocks.0.attn.to_out.0", "double_blocks.0.img_attn.proj")
WAN_Q = ("blocks.1.attn1.to_q", "blocks.1.self_attn.q")
CLIP_OUT = ("text_model.encoder.layers.1.self_attn.out_proj", "transformer.resblocks.1.attn.out_proj")
FLAT_OUT = "encoder.layers.1.self_attn.out_proj"  # transformers since version 5
T5_O = "encoder.block.1.layer.0.SelfAttention.o"

PLACES = [  # architecture, component, site, module in the base
    # denoisers
    ("sd1", "denoiser", UP_Q[0], f"model.diffusion_model.{UP_Q[1]}"),  # ldm
    ("sd2", "denoiser", UP_Q[0], f"model.diffusion_model.{UP_Q[1]}"),
    ("sdxl-refiner", "denoiser", REFINER_Q[0], f"model.diffusion_model.{REFINER_Q[1]}"),  # sgm
    ("flux", "denoiser", FLUX_OUT[0], f"model.diffusion_model.{FLUX_OUT[1]}"),  # ComfyUI's all-in-one files
    ("flux", "denoiser", FLUX_OUT[0], f"diffusion_model.{FLUX_OUT[1]}"),
    ("flux", "denoiser", FLUX_OUT[0], f"diffusion_model.{FLUX_OUT[0]}"),
    ("sd1", "denoiser", UP_Q[0], f"unet/{UP_Q[0]}"),  # diffusers' pipelines
    ("flux", "denoiser", FLUX_OUT[0], f"transformer/{FLUX_OUT[0]}"),
    ("wan", "denoiser", WAN_Q[0], f"transformer/{WAN_Q[0]}"),
    ("wan", "denoiser", WAN_Q[0], f"net.{WAN_Q[1]}"),
    ("flux", "denoiser", FLUX_OUT[0], FLUX_OUT[1]),  # as Black Forest Labs publish it
    ("flux", "denoiser", FLUX_OUT[0], FLUX_OUT[0]),  # a model folder of diffusers
    ("wan", "denoiser_2", WAN_Q[0], f"transformer_2/{WAN_Q[0]}"),  # the low-noise expert of 2.2
    # the first text encoder
    ("sd1", "text_encoder", CLIP_OUT[0], f"cond_stage_model.transformer.{CLIP_OUT[0]}"),
    ("sd1", "text_encoder", CLIP_OUT[0], f"cond_stage_model.transformer.{FLAT_OUT}"),
    ("sdxl", "text_encoder", CLIP_OUT[0], f"conditioner.embedders.0.transformer.{CLIP_OUT[0]}"),
    ("sdxl", "text_encoder", CLIP_OUT[0], f"conditioner.embedders.0.transformer.{FLAT_OUT}"),
    ("sd2", "text_encoder", CLIP_OUT[0], f"cond_stage_model.model.{CLIP_OUT[1]}"),
    ("sd2", "text_encoder", CLIP_OUT[0], f"conditioner.embedders.0.model.{CLIP_OUT[1]}"),  # SD2 in sgm's form
    ("sd1", "text_encoder", CLIP_OUT[0], f"text_encoder/{CLIP_OUT[0]}"),
    ("sd1", "text_encoder", CLIP_OUT[0], f"text_encoder/{FLAT_OUT}"),
    ("sd1", "text_encoder", CLIP_OUT[0], CLIP_OUT[0]),  # clip_l.safetensors, a model folder
    ("sd1", "text_encoder", CLIP_OUT[0], FLAT_OUT),
    ("flux", "text_encoder", CLIP_OUT[0], f"text_encoders.clip_l.transformer.{CLIP_OUT[0]}"),
    ("wan", "text_encoder", T5_O, f"text_encoder/{T5_O}"),
    ("wan", "text_encoder", T5_O, f"text_encoders.umt5xxl.transformer.{T5_O}"),
    # the second, the third
    ("sdxl", "text_encoder_2", CLIP_OUT[0], f"conditioner.embedders.1.model.{CLIP_OUT[1]}"),
    ("sdxl-refiner", "text_encoder_2", CLIP_OUT[0], f"conditioner.embedders.0.model.{CLIP_OUT[1]}"),
    ("sdxl", "text_encoder_2", CLIP_OUT[0], f"text_encoder_2/{CLIP_OUT[0]}"),
    ("sdxl", "text_encoder_2", CLIP_OUT[0], CLIP_OUT[0]),  # clip_g.safetensors
    ("sdxl", "text_encoder_2", CLIP_OUT[0], FLAT_OUT),
    ("sd3", "text_encoder_2", CLIP_OUT[0], f"text_encoders.clip_g.transformer.{CLIP_OUT[0]}"),
    ("flux", "text_encoder_2", T5_O, f"text_encoder_2/{T5_O}"),
    ("flux", "text_encoder_2", T5_O, f"text_encoders.t5xxl.transformer.{T5_O}"),
    ("sd3", "text_encoder_3", T5_O, f"text_encoder_3/{T5_O}"),
    ("sd3", "text_encoder_3", T5_O, f"text_encoders.t5xxl.transformer.{T5_O}"),
    ("sd3", "text_encoder_3", T5_O, T5_O),  # t5xxl.safetensors
]


def base(architecture: str, shapes: dict[str, tuple[int, ...]]) -> Base:
    source = TensorSource(Path("base.safetensors"), "safetensors", {key: Blank(shape) for key, shape in shapes.items()})
    return Base(source, registry()[architecture])


@pytest.mark.parametrize(("architecture", "component", "site", "module"), PLACES)
def test_every_layout(architecture: str, component: str, site: str, module: str) -> None:
    """Weight and bias, and nothing in a file that has another module of the same layout only."""
    found = base(architecture, {f"{module}.weight": (H, H), f"{module}.bias": (H,), "decoder.mid.weight": (H, H)})
    assert found.place(Site(component, site)) == Place(f"{module}.weight", 0, H)
    assert found.place(Site(component, site), "bias") == Place(f"{module}.bias", 0, H)
    assert base(architecture, {f"{module}x.weight": (H, H)}).place(Site(component, site)) is None


OPEN_CLIP = [  # where open_clip's encoder lies: architecture, component, prefix
    ("sd2", "text_encoder", "cond_stage_model.model."),
    ("sd2", "text_encoder", "conditioner.embedders.0.model."),
    ("sdxl", "text_encoder_2", "conditioner.embedders.1.model."),
    ("sdxl-refiner", "text_encoder_2", "conditioner.embedders.0.model."),
]


@pytest.mark.parametrize(("architecture", "component", "prefix"), OPEN_CLIP)
def test_rows_of_open_clip(architecture: str, component: str, prefix: str) -> None:
    """q, k and v are rows of one parameter without a `.weight`; the projection is stored (in, out), the tables have no module."""
    block = f"{prefix}transformer.resblocks.0"
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}token_embedding.weight": (99, H),
        f"{prefix}positional_embedding": (77, H),
        f"{block}.attn.in_proj_weight": (3 * H, H),
        f"{block}.attn.in_proj_bias": (3 * H,),
        f"{block}.mlp.c_fc.weight": (4 * H, H),
        f"{prefix}text_projection": (H, H),
    }
    found, layer = base(architecture, shapes), "text_model.encoder.layers.0"
    for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
        rows = (number * H, (number + 1) * H)
        assert found.place(Site(component, f"{layer}.self_attn.{name}")) == Place(f"{block}.attn.in_proj_weight", *rows)
        assert found.place(Site(component, f"{layer}.self_attn.{name}"), "bias") == Place(f"{block}.attn.in_proj_bias", *rows)
    assert found.place(Site(component, f"{layer}.mlp.fc1")) == Place(f"{block}.mlp.c_fc.weight", 0, 4 * H)
    assert found.place(Site(component, "text_projection")) == Place(f"{prefix}text_projection", 0, H, transposed=True)
    assert found.place(Site(component, "text_model.embeddings.position_embedding")) == Place(f"{prefix}positional_embedding", 0, 77)


def test_encoders_of_one_file_are_not_taken_for_each_other() -> None:
    """SDXL: both encoders have all their names in common; without the second there is no place for it."""
    first, second = f"conditioner.embedders.0.transformer.{CLIP_OUT[0]}.weight", f"conditioner.embedders.1.model.{CLIP_OUT[1]}.weight"
    both, alone = base("sdxl", {first: (H, H), second: (2 * H, 2 * H)}), base("sdxl", {first: (H, H)})
    assert both.place(Site("text_encoder", CLIP_OUT[0])) == Place(first, 0, H)
    assert both.place(Site("text_encoder_2", CLIP_OUT[0])) == Place(second, 0, 2 * H)
    assert alone.place(Site("text_encoder_2", CLIP_OUT[0])) is None
    pipeline = base(
        "sdxl", {f"{part}/{CLIP_OUT[0]}.weight": (size, size) for part, size in (("text_encoder", H), ("text_encoder_2", 2 * H))}
    )
    assert pipeline.place(Site("text_encoder", CLIP_OUT[0])) == Place(f"text_encoder/{CLIP_OUT[0]}.weight", 0, H)
    assert pipeline.place(Site("text_encoder_2", CLIP_OUT[0])) == Place(f"text_encoder_2/{CLIP_OUT[0]}.weight", 0, 2 * H)


def test_two_denoisers_of_one_pipeline() -> None:
    """Wan 2.2: one table, two folders."""
    found = base("wan", {f"{part}/{WAN_Q[0]}.weight": (H, H) for part in ("transformer", "transformer_2")})
    for component, part in (("denoiser", "transformer"), ("denoiser_2", "transformer_2")):
        assert found.place(Site(component, WAN_Q[0])) == Place(f"{part}/{WAN_Q[0]}.weight", 0, H)
    assert base("wan", {f"transformer/{WAN_Q[0]}.weight": (H, H)}).place(Site("denoiser_2", WAN_Q[0])) is None


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "net.", ""])
def test_fused_and_exchanged_rows_under_every_prefix(prefix: str) -> None:
    """Flux' widths are solved from the tensors behind the prefix: q, k, v and mlp in one, shift and scale the other way round."""
    stem = f"{prefix}single_blocks.0.linear1"
    shapes = {f"{stem}.weight": (7 * H, H), f"{prefix}single_blocks.0.linear2.weight": (H, 5 * H)}
    shapes |= {f"{prefix}final_layer.adaLN_modulation.1.weight": (2 * H, H), f"{prefix}double_blocks.0.img_attn.norm.key_norm.scale": (4,)}
    found, block = base("flux", shapes), "single_transformer_blocks.0"
    bounds = {"attn.to_q": (0, H), "attn.to_k": (H, 2 * H), "attn.to_v": (2 * H, 3 * H), "proj_mlp": (3 * H, 7 * H)}
    for name, rows in bounds.items():
        assert found.place(Site("denoiser", f"{block}.{name}")) == Place(f"{stem}.weight", *rows)
    last = Place(f"{prefix}final_layer.adaLN_modulation.1.weight", 0, 2 * H, swapped=True)
    assert found.place(Site("denoiser", "norm_out.linear")) == last
    norm = Place(f"{prefix}double_blocks.0.img_attn.norm.key_norm.scale", 0, 4)
    assert found.place(Site("denoiser", "transformer_blocks.0.attn.norm_k")) == norm


# ------------------------------------------------------------------------------------------------------------- language models


ALIASES = [  # the adapter's name, the base's
    ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
    ("model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj"),  # *ForCausalLM's adapter, the bare model
    ("layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
    ("model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj"),  # transformers 4.52 moved the text model
    ("model.language_model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
    ("model.language_model.layers.0.self_attn.q_proj", "language_model.model.layers.0.self_attn.q_proj"),
    ("language_model.model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj"),
    ("language_model.model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),  # the text model taken out of its wrapper
    ("language_model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj"),
    ("transformer.h.0.attn.c_attn", "h.0.attn.c_attn"),  # GPT-2 with and without a head
    ("h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
    ("lm_head", "language_model.lm_head"),  # a multimodal model's, since transformers 4.52 beside its text model
]


@pytest.mark.parametrize(("mine", "theirs"), ALIASES)
def test_names_of_other_versions(mine: str, theirs: str) -> None:
    found = base("llm", {f"{theirs}.weight": (H, H), f"{theirs}.bias": (H,)})
    assert found.place(Site("model", mine)) == Place(f"{theirs}.weight", 0, H)
    assert found.place(Site("model", mine), "bias") == Place(f"{theirs}.bias", 0, H)


@pytest.mark.parametrize(
    "own", ["model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj", "transformer.h.0.mlp.c_fc", "model.language_model.layers.0.mlp.up_proj"]
)
def test_its_own_name_comes_first(own: str) -> None:
    """A base of several parts may have a module under the name of another version, too."""
    bare = own.removeprefix("model.").removeprefix("language_model.").removeprefix("transformer.")
    others = {f"{prefix}{bare}" for prefix in ("", "model.", "model.language_model.", "language_model.model.", "transformer.")} - {own}
    shapes = {f"{name}.weight": (2 * H, H) for name in sorted(others)} | {f"{own}.weight": (H, H)}
    assert base("llm", shapes).place(Site("model", own)) == Place(f"{own}.weight", 0, H)


EMBEDDINGS = [
    "model.embed_tokens",  # Llama and most others
    "model.language_model.embed_tokens",  # the text model of a multimodal one, since transformers 4.52
    "language_model.model.embed_tokens",  # the same before
    "model.decoder.embed_tokens",  # OPT
    "embed_tokens",  # a bare LlamaModel
    "transformer.wte",  # GPT-2, GPT-J
    "wte",  # a bare GPT2Model
    "gpt_neox.embed_in",
    "transformer.word_embeddings",  # Bloom, Falcon
    "word_embeddings",
    "backbone.embeddings",  # Mamba
    "transformer.tokens_embed",  # OpenAI's first GPT
    "model.tok_embeddings",  # InternLM 2
]


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_every_name_of_an_embedding(name: str) -> None:
    """A head without a tensor of its own shares it: its place is there, what is written is a tensor of its own."""
    shapes = {f"{name}.weight": (50, H), "model.layers.0.self_attn.q_proj.weight": (H, H)}
    found = base("llm", shapes)
    assert found.embedding == f"{name}.weight"
    assert found.place(Site("model", "lm_head")) == Place(f"{name}.weight", 0, 50, output="lm_head.weight")
    assert found.place(Site("model", "lm_head"), "bias") is None
    headed = base("llm", {**shapes, "lm_head.weight": (50, H)})
    assert headed.place(Site("model", "lm_head")) == Place("lm_head.weight", 0, 50)


def test_a_head_and_no_embedding() -> None:
    found = base("llm", {"model.layers.0.self_attn.q_proj.weight": (H, H), "model.wte_like.weight": (50, H)})
    assert (found.embedding, found.place(Site("model", "lm_head"))) == (None, None)

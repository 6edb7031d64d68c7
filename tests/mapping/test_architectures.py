"""The architecture tables: in themselves, and against the classes of diffusers and transformers (names, shapes, counts)."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from loratools.mapping.architectures import registry
from loratools.mapping.dimensions import fit, solve
from loratools.mapping.rules import Match, Row, Table

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

ARCHITECTURES = registry()
TABLES = {id(c.table): c.table for a in ARCHITECTURES.values() for c in a.components}


def table(name: str, component: str = "denoiser") -> Table:
    return ARCHITECTURES[name].component(component).table


# -------------------------------------------------------------------------------------------------------------- the tables alone


@pytest.mark.parametrize("one", TABLES.values(), ids=lambda one: one.name)
def test_no_two_rows_claim_a_name(one: Table) -> None:
    assert one.check() == []


@pytest.mark.parametrize("one", TABLES.values(), ids=lambda one: one.name)
def test_names_and_sites_lead_to_each_other(one: Table) -> None:
    for namespace in one.namespaces:
        for name, row in one.names(namespace):
            assert [m for m in one.by_name(namespace, name) if m.row is row], (namespace, name)
            assert [m for m in one.by_name(namespace, name.replace(".", "_"), flattened=True) if m.row is row], (namespace, name)
            [match] = [m for m in one.by_name(namespace, name) if m.row is row]
            for part, path in enumerate(match.sites):
                assert (name, part) in [(m.name, m.part) for m in one.by_site(namespace, path)]
                assert one.by_site("diff", path), f"{namespace}: {name} names an unknown site {path}"
                assert one.by_site("orig", path), f"{namespace}: {name} names an unknown site {path}"


def test_components_of_an_architecture_and_their_prefixes() -> None:
    for architecture in ARCHITECTURES.values():
        names = [component.name for component in architecture.components]
        assert len(set(names)) == len(names)
        for component in architecture.components:
            for prefixes in component.prefixes.values():
                assert 0 < len(prefixes) == len(set(prefixes))
                assert all(prefix == "" or prefix[-1] in "._" for prefix in prefixes)
        for variant in architecture.base_versions.values():
            assert variant == "" or variant in architecture.variants
        if architecture.modelspec:
            assert architecture.modelspec in architecture.base_versions
    versions = Counter(version for a in ARCHITECTURES.values() for version in a.base_versions)
    assert [version for version, count in versions.items() if count > 1] == []


# The names that guessing dots from underscores got wrong in other tools.
FLATTENED = [
    ("wan", "orig", "text_embedding_0", "condition_embedder.text_embedder.linear_1"),
    ("wan", "orig", "time_projection_1", "condition_embedder.time_proj"),
    ("wan", "orig", "blocks_57_cross_attn_k_img", "blocks.57.attn2.add_k_proj"),  # no published model has a block 57
    ("wan", "orig", "blocks_3_norm3", "blocks.3.norm2"),
    ("flux", "diff", "single_transformer_blocks_0_proj_mlp", "single_transformer_blocks.0.proj_mlp"),
    ("flux", "orig", "double_blocks_7_img_attn_proj", "transformer_blocks.7.attn.to_out.0"),
    ("hunyuan-video", "orig", "double_blocks_7_img_attn_proj", "transformer_blocks.7.attn.to_out.0"),
    ("sd1", "diff", "mid_block_attentions_0_proj_in", "mid_block.attentions.0.proj_in"),
    ("sdxl", "orig", "output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
    ("sd1", "orig", "output_blocks_2_1_conv", "up_blocks.0.upsamplers.0.conv"),  # no attention in this block
    ("sd1", "orig", "output_blocks_5_2_conv", "up_blocks.1.upsamplers.0.conv"),
    ("sdxl-refiner", "orig", "output_blocks_2_1_conv", "up_blocks.0.upsamplers.0.conv"),
    ("sdxl", "orig", "time_embed_0", "time_embedding.linear_1"),
]


@pytest.mark.parametrize(("architecture", "namespace", "name", "path"), FLATTENED)
def test_flattened_names_are_looked_up(architecture: str, namespace: str, name: str, path: str) -> None:
    [match] = table(architecture).by_name(namespace, name, flattened=True)
    assert match.sites == (path,)


def test_fused_and_swapped_rows() -> None:
    [linear1] = table("flux").by_name("orig", "single_blocks.3.linear1")
    assert linear1.row.out == ("h", "h", "h", "mlp")
    assert linear1.sites[3] == "single_transformer_blocks.3.proj_mlp"
    [value] = table("flux").by_name("omi", "double_blocks.4.txt_attn.qkv.2")
    assert value.sites == ("transformer_blocks.4.attn.add_v_proj",)
    [uso] = table("flux").by_name("uso", "single_blocks.3.processor.qkv_lora")
    assert uso.sites == linear1.sites[:3]
    [qkv] = table("lumina2").by_name("orig", "layers_5_attention_qkv", flattened=True)
    assert fit(qkv.row, 40, 24, {}) == {"h": 24, "kv": 8}  # grouped queries of a tiny model
    swapped = {name: {row.name for row in a.components[0].table.rows if row.swapped} for name, a in ARCHITECTURES.items()}
    assert swapped["flux"] == swapped["flux2"] == swapped["hunyuan-video"] == {"final_layer.adaLN_modulation.1"}
    assert swapped["sd3"] == {"final_layer.adaLN_modulation.1", "joint_blocks.{d}.context_block.adaLN_modulation.1"}
    assert not any(swapped[name] for name in ("chroma", "lumina2", "z-image", "qwen-image", "wan", "sd1", "sdxl"))
    last, first = sorted(table("sd3").by_name("orig", "joint_blocks.23.context_block.adaLN_modulation.1"), key=lambda m: not m.row.swapped)
    assert fit(last.row, 3072, 1536, {}) == {"h": 1536}
    assert fit(first.row, 3072, 1536, {}) is None


def test_tables_are_built_without_torch_and_at_once() -> None:
    code = "import sys; from loratools.mapping.architectures import registry; registry(); assert 'torch' not in sys.modules"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    seconds = []
    for _ in range(5):
        fresh = [dataclasses.replace(one) for one in TABLES.values()]
        start = time.process_time()
        for one in fresh:
            for namespace in one.namespaces:
                one.by_name(namespace, "x"), one.by_name(namespace, "x", flattened=True), one.by_site(namespace, "x")
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.1  # about 0.02 on an idle core


# ------------------------------------------------------------------------------------------------------------ diffusers' classes

SD1 = {"sample_size": 64, "cross_attention_dim": 768}
SD2 = {"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
REFINER = {
    **SDXL,
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": [6, 12, 24, 24],
    "transformer_layers_per_block": 4,
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}
SD3 = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "out_channels": 16, "pos_embed_max_size": 192}
SD35M = {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}
SD35L = {**SD3, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}
I2V = {"image_dim": 1280, "added_kv_proj_dim": 5120, "pos_embed_seq_len": 514}
TI2V_5B = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}
HIDREAM = {"patch_size": 2, "in_channels": 16, "attention_head_dim": 128, "num_attention_heads": 20, "caption_channels": [4096, 4096]}
HIDREAM |= {"text_emb_dim": 2048, "axes_dims_rope": (64, 32, 32), "max_resolution": (128, 128), "llama_layers": [0, 1]}
HIDREAM |= {"num_routed_experts": 4, "num_activated_experts": 2, "num_layers": 2, "num_single_layers": 2}
SMALL_UNET = {"block_out_channels": (32, 64, 96, 128), "norm_num_groups": 16, "cross_attention_dim": 40, "attention_head_dim": 8}
SMALL_SDXL = {**SMALL_UNET, "block_out_channels": (32, 64, 96), "projection_class_embeddings_input_dim": 56}
SMALL_FLUX = {"num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 40}
SMALL_FLUX |= {"in_channels": 12, "axes_dims_rope": (4, 4, 8)}
SMALL_SD3 = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": 32, "in_channels": 4}
SMALL_SD3 |= {"joint_attention_dim": 40, "pooled_projection_dim": 48, "pos_embed_max_size": 8, "sample_size": 8}
SMALL_WAN = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 56, "text_dim": 40, "freq_dim": 32}
SMALL_LUMINA = {"hidden_size": 96, "num_layers": 3, "num_attention_heads": 4, "num_kv_heads": 2, "axes_dim_rope": (8, 8, 8)}
SMALL_LUMINA |= {"cap_feat_dim": 40, "in_channels": 4}
BLOCKS = {"num_layers": 2, "num_single_layers": 2}
GUIDED = {**BLOCKS, "guidance_embeds": True}
HISTORY = {**GUIDED, "has_image_proj": True, "has_clean_x_embedder": True}
GLYPHS = {"text_embed_2_dim": 1472, "use_meanflow": True}

# architecture, diffusers class, config, Linear and Conv modules (0: not all blocks, or not published)
MODELS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "sd1": ("sd1", "UNet2DConditionModel", SD1, 282),
    "sd2": ("sd2", "UNet2DConditionModel", SD2, 282),
    "sdxl": ("sdxl", "UNet2DConditionModel", SDXL, 794),
    "refiner": ("sdxl-refiner", "UNet2DConditionModel", REFINER, 554),
    "small sd1": ("sd1", "UNet2DConditionModel", SMALL_UNET, 0),
    "small sd2": ("sd2", "UNet2DConditionModel", {**SMALL_UNET, "use_linear_projection": True}, 0),
    "small sdxl": ("sdxl", "UNet2DConditionModel", {**SDXL, **SMALL_SDXL, "transformer_layers_per_block": [1, 2, 3]}, 0),
    "small refiner": ("sdxl-refiner", "UNet2DConditionModel", {**REFINER, **SMALL_UNET, "projection_class_embeddings_input_dim": 56}, 0),
    "sd3": ("sd3", "SD3Transformer2DModel", SD3, 341),
    "sd3.5 medium": ("sd3", "SD3Transformer2DModel", SD35M, 393),
    "sd3.5 large": ("sd3", "SD3Transformer2DModel", SD35L, 537),
    "small sd3": ("sd3", "SD3Transformer2DModel", {**SMALL_SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}, 0),
    "flux": ("flux", "FluxTransformer2DModel", {"guidance_embeds": True}, 504),
    "small flux": ("flux", "FluxTransformer2DModel", {**SMALL_FLUX, "guidance_embeds": True, "pooled_projection_dim": 24}, 0),
    "chroma": ("chroma", "ChromaTransformer2DModel", {}, 433),
    "small chroma": ("chroma", "ChromaTransformer2DModel", {**SMALL_FLUX, "approximator_hidden_dim": 28, "approximator_layers": 2}, 0),
    "wan t2v 14b": ("wan", "WanTransformer3DModel", {}, 407),
    "wan i2v 14b": ("wan", "WanTransformer3DModel", I2V, 489),
    "wan 5b": ("wan", "WanTransformer3DModel", TI2V_5B, 307),
    "wan vace": ("wan", "WanVACETransformer3DModel", {"num_layers": 4, "vace_layers": [0, 2]}, 0),
    "small wan": ("wan", "WanTransformer3DModel", {**SMALL_WAN, "image_dim": 20, "added_kv_proj_dim": 24}, 0),
    "lumina2": ("lumina2", "Lumina2Transformer2DModel", {"cap_feat_dim": 2304}, 244),
    "small lumina2": ("lumina2", "Lumina2Transformer2DModel", SMALL_LUMINA, 0),
    "flux2": ("flux2", "Flux2Transformer2DModel", BLOCKS, 0),
    "hunyuan video": ("hunyuan-video", "HunyuanVideoTransformer3DModel", GUIDED, 0),
    "framepack": ("framepack", "HunyuanVideoFramepackTransformer3DModel", HISTORY, 0),
    "hunyuan image": ("hunyuan-image", "HunyuanImageTransformer2DModel", {**GUIDED, **GLYPHS}, 0),
    "qwen image": ("qwen-image", "QwenImageTransformer2DModel", {"num_layers": 2}, 0),
    "z-image": ("z-image", "ZImageTransformer2DModel", {"n_layers": 2, "n_refiner_layers": 1}, 0),
    "ltx": ("ltx-video", "LTXVideoTransformer3DModel", {"num_layers": 2}, 0),
    "hidream": ("hidream", "HiDreamImageTransformer2DModel", HIDREAM, 0),
    "krea2": ("krea2", "Krea2Transformer2DModel", {}, 264),
}

# Original names without a module in these classes: Qwen-Image 2.1 has one of its own, HunyuanImage's table is a plain tensor.
WITHOUT_MODULE = {"transformer_blocks.{d}.img_mlp.gate_up", "pos_embed", "cond_type_embedding"}


def build(class_name: str, config: Mapping[str, Any]) -> Any:
    with torch.device("meta"):
        return getattr(diffusers, class_name)(**config)


def layers(model: Any) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, layer kind, weight shape) of all modules with a weight, and of the parameters that have none."""
    kinds = {torch.nn.Linear: "linear", torch.nn.Embedding: "embedding", torch.nn.Conv2d: "conv", torch.nn.Conv3d: "conv"}
    for name, module in model.named_modules():
        for leaf, value in module.named_parameters(recurse=False):
            shape, dotted = tuple(value.shape), f"{name}.{leaf}".lstrip(".")
            if leaf == "weight":
                kind = next((kind for class_, kind in kinds.items() if isinstance(module, class_)), "norm" if len(shape) == 1 else "linear")
                yield name, kind, shape
            elif leaf != "bias":
                yield dotted, "parameter", shape


def sizes(kind: str, shape: tuple[int, ...]) -> tuple[int | None, int | None]:
    """(out, in) as the rows say them."""
    if kind == "parameter":
        return None, None
    return shape[0], None if kind == "norm" else shape[1]


def solved(pairs: list[tuple[list[Match], str, tuple[int, ...]]]) -> dict[str, int]:
    """One set of dimensions for all modules whose name has one row; two rounds, as sums wait for their parts."""
    dims: dict[str, int] = {}
    for _ in range(2):
        for matches, kind, shape in pairs:
            if len(matches) == 1:
                out, in_ = sizes(kind, shape)
                fitted = fit(matches[0].row, out, in_, dims)
                assert fitted is not None, f"{matches[0].name}: {shape} is not {matches[0].row.out} x {matches[0].row.in_} in {dims}"
                dims = fitted
    return dims


def part_fits(match: Match, kind: str, shape: tuple[int, ...], dims: Mapping[str, int]) -> bool:
    out, in_ = sizes(kind, shape)
    return (
        match.row.layer == kind
        and solve(match.row.out[match.part], out, dims) == {}
        and solve(match.row.in_, in_, dims) == {}
        and (kind != "conv" or match.row.kernel == shape[2:])
    )


def cover(one: Table, model: Any) -> tuple[set[Row], dict[str, int]]:
    """Every module is found by its site, once, with its shape; returns the original rows that were met and the dimensions."""
    modules = list(layers(model))
    dims = solved([(one.by_name("diff", name), kind, shape) for name, kind, shape in modules])
    met: set[Row] = set()
    blocks: dict[str, int] = {}
    for name, kind, shape in modules:
        for namespace in ("diff", "orig"):
            found = [match for match in one.by_site(namespace, name) if part_fits(match, kind, shape, dims)]
            assert len(found) == 1, f"{namespace}: {name} {kind} {shape} is found {len(found)} times with {dims}"
        met.add(found[0].row)
        for slot, number in found[0].index.items():
            blocks[slot] = max(blocks.get(slot, 0), number + 1)
    return met, {**dims, **blocks}


@pytest.mark.parametrize("case", MODELS)
def test_every_module_of_the_class_is_named_once(case: str) -> None:
    name, class_name, config, count = MODELS[case]
    model = build(class_name, config)
    if count:
        assert sum(kind in ("linear", "conv") for _, kind, _ in layers(model)) == count
    dims = cover(table(name), model)[1]
    if not case.startswith("small"):
        known = {symbol: size for symbol, size in dims.items() if count or symbol not in table(name).ranges}
        agreeing = [
            variant
            for variant, published in ARCHITECTURES[name].variants.items()
            if all(known.get(symbol, size) == size for symbol, size in published.items())
        ]
        assert agreeing, known


@pytest.mark.parametrize("name", sorted({name for name, *_ in MODELS.values()}))
def test_every_row_names_a_module_of_some_class(name: str) -> None:
    rows: set[Row] = set()
    for known, class_name, config, _ in MODELS.values():
        if known == name:
            rows.update(cover(table(name), build(class_name, config))[0])
    assert {row.name for row in table(name).rows if row not in rows} <= WITHOUT_MODULE


@pytest.mark.parametrize(("case", "count"), [("sd1", 192), ("sd2", 192), ("sdxl", 722), ("refiner", 462)])
def test_modules_in_transformers(case: str, count: int) -> None:
    name, class_name, config, _ = MODELS[case]
    kinds = [kind for module, kind, _ in layers(build(class_name, config)) if ".attentions." in module and kind in ("linear", "conv")]
    assert len(kinds) == count
    attention = re.compile(r"attn[12]\.to_")
    rows = [row for row in table(name).rows if attention.search(row.name)]
    assert len(table(name).namespaces["processor"]) == len(rows)


CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "projection_dim": 1280}
T5 = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
UMT5 = {"d_model": 32, "d_ff": 40, "num_layers": 2, "num_heads": 3, "d_kv": 16, "feed_forward_proj": "gated-gelu"}
GEMMA2 = {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
GEMMA2 |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}

# encoder: architecture, transformers class, config, Linear modules
ENCODERS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "clip_l": ("sd1", "CLIPTextModel", CLIP_L, 72),
    "clip_h": ("sd2", "CLIPTextModel", CLIP_H, 138),
    "clip_g": ("sdxl-refiner", "CLIPTextModelWithProjection", CLIP_G, 193),
    "t5": ("chroma", "T5EncoderModel", T5, 168),
    "umt5": ("wan", "UMT5EncoderModel", UMT5, 14),
    "gemma2": ("lumina2", "Gemma2Model", GEMMA2, 182),
}


@pytest.mark.parametrize("case", ENCODERS)
def test_every_module_of_a_text_encoder_is_named_once(case: str) -> None:
    name, class_name, config, count = ENCODERS[case]
    component = next(c for c in ARCHITECTURES[name].components if c.name.startswith("text_encoder"))
    class_ = getattr(transformers, class_name)
    with torch.device("meta"):
        model = class_(class_.config_class(**config))
    modules = list(layers(model))
    assert sum(kind == "linear" for _, kind, _ in modules) == count
    for module, kind, _ in modules:  # transformers 5 has CLIPTextModel without `text_model.`
        found = component.table.by_name("diff", module) or component.table.by_name("flat-clip", module)
        assert [match.row.layer for match in found] == [kind], module
    if case != "umt5":
        known = [(component.table.by_name("diff", n) or component.table.by_name("flat-clip", n), kind, shape) for n, kind, shape in modules]
        dims = solved(known)
        for symbol, width in component.widths.items():
            assert symbol == "n" or dims[symbol] == width
        assert component.widths["n"] == len({match.index["n"] for matches, *_ in known for match in matches if "n" in match.index})

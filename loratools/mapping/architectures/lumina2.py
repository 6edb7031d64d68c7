"""Lumina-Image 2: layers `{n}`, refiners of noise `{r}` and of context `{c}`; grouped-query attention.

qkv is fused in the original with unequal parts: q has all the heads, k and v a third of them. The context refiner has no
modulation, so its first norm is a plain one in diffusers (`norm1`, elsewhere `norm1.norm`). The final layer has a scale only:
nothing to swap. Source: Lumina `model.py`, diffusers `transformer_lumina2.py` and its single-file converter.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.mapping.architectures import Architecture
from loratools.mapping.architectures.components import transformer
from loratools.mapping.architectures.text_encoders import language_model
from loratools.mapping.rules import Row, Table, cat, norm, site


def _block(block: str, modulated: bool) -> Iterator[Row]:
    yield cat(f"{block}.attention.qkv", f"{block}.attn.to_q .to_k .to_v", "h kv kv", "h")
    yield site(f"{block}.attention.out", f"{block}.attn.to_out.0", "h", "h")
    yield norm(f"{block}.attention.q_norm", f"{block}.attn.norm_q", "head")
    yield norm(f"{block}.attention.k_norm", f"{block}.attn.norm_k", "head")
    yield site(f"{block}.feed_forward.w1", f"{block}.feed_forward.linear_1", "mlp", "h")
    yield site(f"{block}.feed_forward.w2", f"{block}.feed_forward.linear_2", "h", "mlp")
    yield site(f"{block}.feed_forward.w3", f"{block}.feed_forward.linear_3", "mlp", "h")
    yield norm(f"{block}.attention_norm1", f"{block}.norm1.norm" if modulated else f"{block}.norm1", "h")
    yield norm(f"{block}.attention_norm2", f"{block}.norm2", "h")
    yield norm(f"{block}.ffn_norm1", f"{block}.ffn_norm1", "h")
    yield norm(f"{block}.ffn_norm2", f"{block}.ffn_norm2", "h")
    if modulated:
        yield site(f"{block}.adaLN_modulation.1", f"{block}.norm1.linear", "4h", "cond")


# The original's `norm_final` is never used; diffusers has no such module.
_ROWS = (
    site("x_embedder", "x_embedder", "h", "img"),
    norm("cap_embedder.0", "time_caption_embed.caption_embedder.0", "txt"),
    site("cap_embedder.1", "time_caption_embed.caption_embedder.1", "h", "txt"),
    site("t_embedder.mlp.0", "time_caption_embed.timestep_embedder.linear_1", "cond", "freq"),
    site("t_embedder.mlp.2", "time_caption_embed.timestep_embedder.linear_2", "cond", "cond"),
    *_block("layers.{n}", modulated=True),
    *_block("noise_refiner.{r}", modulated=True),
    *_block("context_refiner.{c}", modulated=False),
    site("final_layer.adaLN_modulation.1", "norm_out.linear_1", "h", "cond"),
    site("final_layer.linear", "norm_out.linear_2", "out", "h"),
)

LUMINA2 = Table("lumina2", _ROWS, {"n": 26, "r": 2, "c": 2})

ARCHITECTURES = (
    Architecture(
        "lumina2",
        "Lumina-Image 2",
        (transformer(LUMINA2), language_model("gemma2_2b")),
        variants={"base": {"h": 2304, "kv": 768, "mlp": 9216, "cond": 1024, "head": 96, "txt": 2304, "out": 64, "n": 26, "r": 2, "c": 2}},
        base_versions={"lumina2": "base", "lumina-2": "base"},
        modelspec="lumina-2",
    ),
)

"""The UNet of SD1, SD2 and SDXL: rows ldm ↔ diffusers, generated from the block structure.

With L = 2 resnets a down block (L + 1 an up block), b the block and j the resnet in it:

    down_blocks.b.resnets.j          = input_blocks.{(L+1)b+j+1}.0
    down_blocks.b.attentions.j       = input_blocks.{(L+1)b+j+1}.1
    down_blocks.b.downsamplers.0     = input_blocks.{(L+1)(b+1)}.0
    up_blocks.b.resnets.j            = output_blocks.{(L+1)b+j}.0
    up_blocks.b.attentions.j         = output_blocks.{(L+1)b+j}.1
    up_blocks.b.upsamplers.0         = output_blocks.{(L+1)b+L}.{2 after an attention, else 1}

Source: ldm `openaimodel.py`, diffusers `UNet2DConditionModel`. A resnet's `conv_shortcut` gets a row wherever the channel symbols
differ: a published model where two of them happen to be equal (c2 = c3 in SD1) just does not have that module.

Symbols: c0..c3 channels of the down blocks, temb the time embedding, ctx the text context, add SDXL's pooled vector; `{t}` is the
transformer block. What is inside a transformer block has the same name in both namespaces.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from loratools.mapping.rules import Row, conv, norm, renamed, site

_LAYERS = 2  # resnets of a down block
_POINT = (1, 1)

# name below transformer_blocks.{t}, rows out, width in; {c} is the block's width. GEGLU doubles the first feed-forward layer.
_TRANSFORMER = (
    ("attn1.to_q", "{c}", "{c}"),
    ("attn1.to_k", "{c}", "{c}"),
    ("attn1.to_v", "{c}", "{c}"),
    ("attn1.to_out.0", "{c}", "{c}"),
    ("attn2.to_q", "{c}", "{c}"),
    ("attn2.to_k", "{c}", "ctx"),
    ("attn2.to_v", "{c}", "ctx"),
    ("attn2.to_out.0", "{c}", "{c}"),
    ("ff.net.0.proj", "8{c}", "{c}"),
    ("ff.net.2", "{c}", "4{c}"),
)


def unet_rows(*, attention: Collection[int], blocks: int, conv_projections: bool = False, pooled: bool = False) -> tuple[Row, ...]:
    """All rows of a UNet.

    attention: the down blocks that hold transformers (the up blocks mirror them); conv_projections: proj_in and proj_out are 1x1
    convolutions (SD1), else linear; pooled: SDXL's add_embedding.
    """
    rows = [*_ends(pooled)]
    for block in range(blocks):
        rows += _down(block, block in attention, block < blocks - 1, conv_projections)
    rows += _middle(f"c{blocks - 1}", conv_projections)
    for block in range(blocks):
        rows += _up(block, blocks, (blocks - 1 - block) in attention, conv_projections)
    return tuple(rows)


def _ends(pooled: bool) -> Iterator[Row]:
    """Embeddings, the first and the last convolution."""
    yield conv("input_blocks.0.0", "conv_in", "c0", "latent")
    yield site("time_embed.0", "time_embedding.linear_1", "temb", "c0")
    yield site("time_embed.2", "time_embedding.linear_2", "temb", "temb")
    if pooled:
        yield site("label_emb.0.0", "add_embedding.linear_1", "temb", "add")
        yield site("label_emb.0.2", "add_embedding.linear_2", "temb", "temb")
    yield norm("out.0", "conv_norm_out", "c0")
    yield conv("out.2", "conv_out", "out", "c0")


def _resnet(orig: str, diff: str, width: str, in_: str) -> Iterator[Row]:
    yield norm(f"{orig}.in_layers.0", f"{diff}.norm1", in_)
    yield conv(f"{orig}.in_layers.2", f"{diff}.conv1", width, in_)
    yield site(f"{orig}.emb_layers.1", f"{diff}.time_emb_proj", width, "temb")
    yield norm(f"{orig}.out_layers.0", f"{diff}.norm2", width)
    yield conv(f"{orig}.out_layers.3", f"{diff}.conv2", width, width)
    if in_ != width:
        yield conv(f"{orig}.skip_connection", f"{diff}.conv_shortcut", width, in_, _POINT)


def _attention(orig: str, diff: str, width: str, conv_projections: bool) -> Iterator[Row]:
    yield norm(f"{orig}.norm", f"{diff}.norm", width)
    for name in ("proj_in", "proj_out"):
        if conv_projections:
            yield conv(f"{orig}.{name}", f"{diff}.{name}", width, width, _POINT)
        else:
            yield site(f"{orig}.{name}", f"{diff}.{name}", width, width)
    orig, diff = f"{orig}.transformer_blocks.{{t}}", f"{diff}.transformer_blocks.{{t}}"
    for name in ("norm1", "norm2", "norm3"):
        yield norm(f"{orig}.{name}", f"{diff}.{name}", width)
    for name, out, in_ in _TRANSFORMER:
        yield site(f"{orig}.{name}", f"{diff}.{name}", out.format(c=width), in_.format(c=width))


def _down(block: int, attention: bool, downsample: bool, conv_projections: bool) -> Iterator[Row]:
    width = f"c{block}"
    for layer in range(_LAYERS):
        orig, diff = f"input_blocks.{(_LAYERS + 1) * block + layer + 1}", f"down_blocks.{block}"
        yield from _resnet(f"{orig}.0", f"{diff}.resnets.{layer}", width, width if layer or not block else f"c{block - 1}")
        if attention:
            yield from _attention(f"{orig}.1", f"{diff}.attentions.{layer}", width, conv_projections)
    if downsample:
        orig = f"input_blocks.{(_LAYERS + 1) * (block + 1)}.0.op"
        yield conv(orig, f"down_blocks.{block}.downsamplers.0.conv", width, width)


def _middle(width: str, conv_projections: bool) -> Iterator[Row]:
    yield from _resnet("middle_block.0", "mid_block.resnets.0", width, width)
    yield from _attention("middle_block.1", "mid_block.attentions.0", width, conv_projections)
    yield from _resnet("middle_block.2", "mid_block.resnets.1", width, width)


def _up(block: int, blocks: int, attention: bool, conv_projections: bool) -> Iterator[Row]:
    """The input of a resnet is what comes from below joined with the skip connection of the mirrored down block."""
    level = blocks - 1 - block
    width, below, skip = f"c{level}", f"c{min(level + 1, blocks - 1)}", f"c{max(level - 1, 0)}"
    for layer in range(_LAYERS + 1):
        orig, diff = f"output_blocks.{(_LAYERS + 1) * block + layer}", f"up_blocks.{block}"
        in_ = f"{width if layer else below}+{skip if layer == _LAYERS else width}"
        yield from _resnet(f"{orig}.0", f"{diff}.resnets.{layer}", width, in_)
        if attention:
            yield from _attention(f"{orig}.1", f"{diff}.attentions.{layer}", width, conv_projections)
    if level:
        orig = f"output_blocks.{(_LAYERS + 1) * block + _LAYERS}.{2 if attention else 1}.conv"
        yield conv(orig, f"up_blocks.{block}.upsamplers.0.conv", width, width)


def processors(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """diffusers up to 0.21: `attn1.processor.to_q_lora` for `attn1.to_q`, `to_out_lora` for `to_out.0`."""
    attention = (row for row in rows if ".attn" in row.name)
    return renamed(attention, r"\.(attn[12])\.to_(q|k|v|out)(?:\.0)?$", r".\1.processor.to_\2_lora")

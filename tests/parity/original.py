"""Original module names of SD, SDXL and Flux from diffusers' ones, written down a second time for the tests.

`original(architecture, model)` → {original name: (diffusers names whose ΔW are stacked, are the halves swapped?)} over every Linear
and Conv of a model. `test_original.py` holds it against diffusers' own checkpoint converters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

Modules = dict[str, tuple[tuple[str, ...], bool]]

_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "conv_norm_out": "out.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_FLUX_DOUBLE = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
}
_FLUX_ENDS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
    **{
        f"time_text_embed.{diff}_embedder.linear_{number}": f"{orig}_in.{layer}_layer"
        for diff, orig in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance"))
        for number, layer in ((1, "in"), (2, "out"))
    },
}


def unet_name(name: str, attention_up: tuple[int, ...]) -> str:
    """ldm's name of one UNet module. attention_up: the up blocks that hold transformers (their upsampler is number 2, else 1)."""
    if name in _ENDS:
        return _ENDS[name]
    head, block, kind, number, rest = re.fullmatch(r"(down_blocks|up_blocks|mid_block)\.?(\d*)\.(\w+)\.(\d)\.?(.*)", name).groups()  # type: ignore[union-attr]
    at, index = int(block or 0), int(number)
    if kind == "resnets":
        rest = _RESNET[rest]
    if head == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{3 * (at + 1)}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{3 * at + 2}.{2 if at in attention_up else 1}.conv"
    place = f"input_blocks.{3 * at + index + 1}" if head == "down_blocks" else f"output_blocks.{3 * at + index}"
    return f"{place}.{int(kind == 'attentions')}.{rest}"


def original(architecture: str, names: Iterable[str]) -> Modules:
    """The original modules that hold the named diffusers modules."""
    if architecture in ("sd1", "sdxl"):
        attention_up = (1, 2, 3) if architecture == "sd1" else (0, 1)
        return {unet_name(name, attention_up): ((name,), False) for name in names}
    found: Modules = {}
    for name in names:
        if name in _FLUX_ENDS:
            found[_FLUX_ENDS[name]] = ((name,), False)
        elif name == "norm_out.linear":
            found["final_layer.adaLN_modulation.1"] = ((name,), True)
        else:
            found.update(_flux_block(name))
    return found


def _flux_block(name: str) -> Modules:
    single, at, rest = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.*)", name).groups()  # type: ignore[union-attr]
    here = f"{single or ''}transformer_blocks.{at}"
    if single:
        if rest in ("proj_out", "norm.linear"):
            return {f"single_blocks.{at}.{'linear2' if rest == 'proj_out' else 'modulation.lin'}": ((name,), False)}
        parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        return {f"single_blocks.{at}.linear1": (tuple(f"{here}.{part}" for part in parts), False)}
    if rest in _FLUX_DOUBLE:
        return {f"double_blocks.{at}.{_FLUX_DOUBLE[rest]}": ((name,), False)}
    stream, parts = ("txt", ("add_q_proj", "add_k_proj", "add_v_proj")) if "add_" in rest else ("img", ("to_q", "to_k", "to_v"))
    return {f"double_blocks.{at}.{stream}_attn.qkv": (tuple(f"{here}.attn.{part}" for part in parts), False)}


def stacked(modules: Modules, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of diffusers modules as the original modules hold them: stacked along the rows, halves exchanged where they are."""
    found = {}
    for name, (parts, swapped) in modules.items():
        tensor = torch.cat([tensors[part] for part in parts])
        found[name] = torch.cat(tensor.chunk(2)[::-1]) if swapped else tensor
    return found

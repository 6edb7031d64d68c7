"""The names of every denoiser by hand: (name in some namespace, the diffusers names of its parts in row order, halves exchanged?).

Written from the models' own sources, with loops instead of the library's tables. `denoiser_names` also lists the sites themselves.
"""

from __future__ import annotations

from collections.abc import Iterator

CLIPS = ("clip_l", "clip_g", "clip_h", "t5xxl", "umt5xxl", "gemma2_2b")

Name = tuple[str, tuple[str, ...], bool]


def denoiser_names(arch: str) -> Iterator[Name]:
    makers = {"sd1": _sd, "sd2": _sd, "sdxl": _sdxl, "flux": _flux, "chroma": _flux, "sd3": _sd3, "wan": _wan, "lumina2": _lumina}
    for name, sites, swapped in makers[arch]():
        yield name, sites, swapped
        for site in sites:
            yield site, (site,), False


def _one(pairs: dict[str, str]) -> Iterator[Name]:
    for orig, diff in pairs.items():
        yield orig, (diff,), False


def _sd() -> Iterator[Name]:
    return _unet(4, (0, 1, 2), lambda _: 1)


def _sdxl() -> Iterator[Name]:
    yield from _one({"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"})
    yield from _unet(3, (1, 2), lambda level: {1: 2, 2: 10}[level])


def _unet(blocks: int, attention: tuple[int, ...], depth: object) -> Iterator[Name]:
    places = {"input_blocks.0.0": "conv_in", "out.2": "conv_out", "out.0": "conv_norm_out"}
    places |= {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
    resnets, attentions = {}, {}
    for b in range(blocks):
        for j in range(2):
            resnets[f"input_blocks.{3 * b + j + 1}.0"] = f"down_blocks.{b}.resnets.{j}"
            if b in attention:
                attentions[f"input_blocks.{3 * b + j + 1}.1"] = (f"down_blocks.{b}.attentions.{j}", b)
        if b < blocks - 1:
            places[f"input_blocks.{3 * (b + 1)}.0.op"] = f"down_blocks.{b}.downsamplers.0.conv"
        level = blocks - 1 - b
        for j in range(3):
            resnets[f"output_blocks.{3 * b + j}.0"] = f"up_blocks.{b}.resnets.{j}"
            if level in attention:
                attentions[f"output_blocks.{3 * b + j}.1"] = (f"up_blocks.{b}.attentions.{j}", level)
        if b < blocks - 1:
            places[f"output_blocks.{3 * b + 2}.{2 if level in attention else 1}.conv"] = f"up_blocks.{b}.upsamplers.0.conv"
    resnets |= {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    attentions["middle_block.1"] = ("mid_block.attentions.0", max(attention))
    inner = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2"}
    inner |= {"out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
    yield from _one(places)
    for orig, diff in resnets.items():
        yield from _one({f"{orig}.{a}": f"{diff}.{b}" for a, b in inner.items()})
    for orig, (diff, level) in attentions.items():
        names = ["norm", "proj_in", "proj_out"]
        for t in range(depth(level)):  # type: ignore[operator]
            names += [f"transformer_blocks.{t}.norm{n}" for n in (1, 2, 3)]
            names += [f"transformer_blocks.{t}.{a}.{p}" for a in ("attn1", "attn2") for p in ("to_q", "to_k", "to_v", "to_out.0")]
            names += [f"transformer_blocks.{t}.ff.net.0.proj", f"transformer_blocks.{t}.ff.net.2"]
        yield from _one({f"{orig}.{name}": f"{diff}.{name}" for name in names})


def _attn(block: str, kinds: str) -> tuple[str, ...]:
    return tuple(f"{block}.attn.{name}" for name in kinds.split())


def _flux() -> Iterator[Name]:
    yield from _one({"img_in": "x_embedder", "img_in.proj": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"})
    for orig, diff in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")):
        yield f"{orig}.in_layer", (f"time_text_embed.{diff}_embedder.linear_1",), False
        yield f"{orig}.out_layer", (f"time_text_embed.{diff}_embedder.linear_2",), False
    yield "final_layer.adaLN_modulation.1", ("norm_out.linear",), True
    for n in range(19):
        o, d = f"double_blocks.{n}", f"transformer_blocks.{n}"
        img, txt = _attn(d, "to_q to_k to_v"), _attn(d, "add_q_proj add_k_proj add_v_proj")
        for stream, parts, processor in (("img", img, "lora1"), ("txt", txt, "lora2")):
            yield f"{o}.{stream}_attn.qkv", parts, False
            yield f"{o}.processor.qkv_{processor}", parts, False
            for index, part in enumerate(parts):
                yield f"{o}.{stream}_attn.qkv.{index}", (part,), False
        for stream, out, mlp, mod, lora in (
            ("img", "to_out.0", "ff", "norm1", "lora1"),
            ("txt", "to_add_out", "ff_context", "norm1_context", "lora2"),
        ):
            yield f"{o}.{stream}_attn.proj", (f"{d}.attn.{out}",), False
            yield f"{o}.processor.proj_{lora}", (f"{d}.attn.{out}",), False
            yield f"{o}.{stream}_mlp.0", (f"{d}.{mlp}.net.0.proj",), False
            yield f"{o}.{stream}_mlp.2", (f"{d}.{mlp}.net.2",), False
            yield f"{o}.{stream}_mod.lin", (f"{d}.{mod}.linear",), False
        norms = {"img_attn.norm.query": "q", "img_attn.norm.key": "k", "txt_attn.norm.query": "added_q", "txt_attn.norm.key": "added_k"}
        yield from _one({f"{o}.{a}_norm": f"{d}.attn.norm_{b}" for a, b in norms.items()})
    for n in range(38):
        o, d = f"single_blocks.{n}", f"single_transformer_blocks.{n}"
        parts = (*_attn(d, "to_q to_k to_v"), f"{d}.proj_mlp")
        yield f"{o}.linear1", parts, False
        yield f"{o}.processor.qkv_lora", parts[:3], False
        for index, part in enumerate(parts):
            yield f"{o}.linear1.{index}", (part,), False
        for name in ("linear2", "processor.proj_lora"):
            yield f"{o}.{name}", (f"{d}.proj_out",), False
        yield f"{o}.modulation.lin", (f"{d}.norm.linear",), False
        yield from _one({f"{o}.norm.query_norm": f"{d}.attn.norm_q", f"{o}.norm.key_norm": f"{d}.attn.norm_k"})


def _sd3() -> Iterator[Name]:
    yield from _one({"x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder", "final_layer.linear": "proj_out"})
    for orig, diff in (("t_embedder", "timestep"), ("y_embedder", "text")):
        yield f"{orig}.mlp.0", (f"time_text_embed.{diff}_embedder.linear_1",), False
        yield f"{orig}.mlp.2", (f"time_text_embed.{diff}_embedder.linear_2",), False
    yield "final_layer.adaLN_modulation.1", ("norm_out.linear",), True
    for n in range(38):
        x, c, d = f"joint_blocks.{n}.x_block", f"joint_blocks.{n}.context_block", f"transformer_blocks.{n}"
        dual = tuple(f"{d}.attn2.{name}" for name in ("to_q", "to_k", "to_v"))
        fused = {f"{x}.attn.qkv": _attn(d, "to_q to_k to_v"), f"{c}.attn.qkv": _attn(d, "add_q_proj add_k_proj add_v_proj")}
        for name, parts in (fused | {f"{x}.attn2.qkv": dual}).items():
            yield name, parts, False
            for index, part in enumerate(parts):
                yield f"{name}.{index}", (part,), False
        pairs = {f"{x}.attn.proj": "attn.to_out.0", f"{c}.attn.proj": "attn.to_add_out", f"{x}.attn2.proj": "attn2.to_out.0"}
        pairs |= {f"{x}.mlp.fc1": "ff.net.0.proj", f"{x}.mlp.fc2": "ff.net.2", f"{x}.adaLN_modulation.1": "norm1.linear"}
        pairs |= {f"{c}.mlp.fc1": "ff_context.net.0.proj", f"{c}.mlp.fc2": "ff_context.net.2"}
        pairs |= {f"{c}.adaLN_modulation.1": "norm1_context.linear"}
        yield from _one({orig: f"{d}.{diff}" for orig, diff in pairs.items()})


def _wan() -> Iterator[Name]:
    for n in range(40):
        pairs = {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "norm3": "norm2"}
        for orig, diff in (("self_attn", "attn1"), ("cross_attn", "attn2")):
            pairs |= {f"{orig}.{a}": f"{diff}.to_{b}" for a, b in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out.0"))}
            pairs |= {f"{orig}.norm_{a}": f"{diff}.norm_{a}" for a in "qk"}
        pairs |= {"cross_attn.k_img": "attn2.add_k_proj", "cross_attn.v_img": "attn2.add_v_proj"}
        for orig, diff in pairs.items():
            # both namespaces have a `norm2`-like name; only the original's norm3 is ever trained
            yield f"blocks.{n}.{orig}", (f"blocks.{n}.{diff}",), False
    ends = {
        f"{a}_embedding.{i}": f"condition_embedder.{b}_embedder.linear_{j}"
        for a, b in (("text", "text"), ("time", "time"))
        for i, j in ((0, 1), (2, 2))
    }
    yield from _one(
        ends | {"time_projection.1": "condition_embedder.time_proj", "head.head": "proj_out", "patch_embedding": "patch_embedding"}
    )


def _lumina() -> Iterator[Name]:
    yield from _one({"cap_embedder.1": "time_caption_embed.caption_embedder.1", "x_embedder": "x_embedder"})
    yield from _one({f"t_embedder.mlp.{a}": f"time_caption_embed.timestep_embedder.linear_{b}" for a, b in ((0, 1), (2, 2))})
    yield from _one({"final_layer.adaLN_modulation.1": "norm_out.linear_1", "final_layer.linear": "norm_out.linear_2"})
    for block in (*(f"layers.{n}" for n in range(26)), *(f"{r}_refiner.{n}" for r in ("noise", "context") for n in range(2))):
        yield f"{block}.attention.qkv", _attn(block, "to_q to_k to_v"), False
        pairs = {"attention.out": "attn.to_out.0", "adaLN_modulation.1": "norm1.linear"}
        pairs |= {f"feed_forward.w{n}": f"feed_forward.linear_{n}" for n in (1, 2, 3)}
        yield from _one({f"{block}.{orig}": f"{block}.{diff}" for orig, diff in pairs.items()})

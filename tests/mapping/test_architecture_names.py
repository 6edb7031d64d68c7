"""The architecture tables against diffusers' single-file converters, row for row, and against key tables of adapter files."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from loratools.mapping.architectures import Architecture, Component, registry
from loratools.mapping.dimensions import evaluate, fit
from loratools.mapping.rules import Match, Row, Table

torch = pytest.importorskip("torch")

ARCHITECTURES = registry()

# -------------------------------------------------------------------------------------------------- diffusers' single-file converters

BIG = {"h": 3072, "mlp": 12288}  # some converters have these widths in the code
TINY = {"h": 6, "mlp": 10, "ffn": 10, "kv": 2, "txt": 8}


def sd3_blocks(row: Row, index: Mapping[str, int]) -> bool:
    """Two blocks: the first with a second attention, the last with a text stream that only feeds attention."""
    last = index.get("d") == 1
    if ".context_block.adaLN_modulation" in row.name:
        return row.swapped == last
    if ".x_block.adaLN_modulation" in row.name:
        return (row.out == ("9h",)) != last
    if ".context_block." in row.name and (".proj" in row.name or ".mlp." in row.name):
        return not last
    return not (last and ".attn2." in row.name)


@dataclasses.dataclass(frozen=True)
class Converter:
    """One of `diffusers.loaders.single_file_utils` and what its checkpoints look like."""

    name: str
    dims: Mapping[str, int] = dataclasses.field(default_factory=lambda: TINY)
    norm: str = "weight"  # leaf of a norm's weight
    bias: bool = True
    has: Callable[[Row, Mapping[str, int]], bool] = lambda row, index: True
    config: Mapping[str, Any] | None = None


UNET = Converter("ldm_unet_checkpoint", config={"layers_per_block": 2, "addition_embed_type": "text_time", "num_class_embeds": None})
CONVERTERS = {
    "sd1": dataclasses.replace(UNET, config={"layers_per_block": 2}),
    "sdxl": UNET,
    "sdxl-refiner": UNET,
    "sd3": Converter("sd3_transformer_checkpoint_to_diffusers", has=sd3_blocks),
    "flux": Converter("flux_transformer_checkpoint_to_diffusers", BIG, norm="scale"),
    "chroma": Converter("chroma_transformer_checkpoint_to_diffusers", BIG, norm="scale"),
    "lumina2": Converter("lumina2_to_diffusers", {"h": 2304, "kv": 768}),
    "wan": Converter("wan_transformer_to_diffusers", has=lambda row, index: "emb_pos" not in row.name),  # only the LoRA converters know it
    "flux2": Converter("flux2_transformer_checkpoint_to_diffusers", norm="scale", bias=False),
    "hunyuan-video": Converter("hunyuan_video_transformer_to_diffusers", BIG),
    "z-image": Converter("z_image_transformer_checkpoint_to_diffusers", bias=False),
    "ltx-video": Converter("ltx_transformer_checkpoint_to_diffusers"),
    "krea2": Converter("krea2_transformer_checkpoint_to_diffusers", norm="scale"),
}


def tagged(one: Table, converter: Converter) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint of two blocks in which no value occurs twice, and what the rows make of it."""
    small = dataclasses.replace(one, ranges=dict.fromkeys(one.ranges, 2))
    checkpoint: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    start = 0
    for row in small.rows:
        symbols = {symbol: 4 for out in row.out for symbol in re.findall(r"[a-z_]\w*", out)}
        widths = [evaluate(out, {**symbols, **converter.dims}) or 12 for out in row.out]
        for index in small.indices(row):
            if not converter.has(row, index):
                continue
            value = torch.arange(start, start + sum(widths), dtype=torch.float64)[:, None]
            start += sum(widths)
            name, paths = row.name.format_map(index), [path.format_map(index) for path in row.sites]
            parts = [torch.cat([value[widths[0] // 2 :], value[: widths[0] // 2]])] if row.swapped else value.split(widths)
            leaves = {"parameter": [("", "")], "norm": [(f".{converter.norm}", ".weight")]}.get(row.layer, [(".weight", ".weight")])
            if converter.bias and row.layer in ("linear", "conv"):
                leaves = [*leaves, (".bias", ".bias")]
            for leaf, site_leaf in leaves:
                half = 0.5 if leaf == ".bias" else 0.0
                checkpoint[name + leaf] = value + half
                expected |= {path + site_leaf: part + half for path, part in zip(paths, parts, strict=True)}
    return checkpoint, expected


@pytest.mark.parity
@pytest.mark.parametrize("name", CONVERTERS)
def test_rows_say_what_the_single_file_converter_does(name: str) -> None:
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    converter = CONVERTERS[name]
    checkpoint, expected = tagged(ARCHITECTURES[name].component("denoiser").table, converter)
    arguments: dict[str, Any] = {}
    if converter.config is not None:
        checkpoint = {f"model.diffusion_model.{key}": value for key, value in checkpoint.items()}
        arguments = {"config": converter.config}
    converted = getattr(utils, f"convert_{converter.name}")(checkpoint, **arguments)
    assert set(converted) == set(expected)
    for key, value in expected.items():
        assert torch.equal(converted[key].flatten(), value.flatten()), key


# --------------------------------------------------------------------------------------------------------------------- manifests

# fragment of a manifest's name → architecture
FAMILIES = {
    "sd15": "sd1",
    "sd21": "sd2",
    "sdxl": "sdxl",
    "sd35l": "sd3",
    "sd3m": "sd3",
    "flux2": "flux2",
    "flux": "flux",
    "chroma": "chroma",
    "wan21": "wan",
    "lumina2": "lumina2",
    "hunyuanvideo": "hunyuan-video",
    "framepack": "framepack",
    "qwenimage": "qwen-image",
    "zimage": "z-image",
    "ltxv2b": "ltx-video",
    "hidream": "hidream",
}
MANIFESTS = os.environ.get("LORATOOLS_MANIFESTS", "")
_LEAF = re.compile(
    r"(?P<processor>_lora\d?)?\.(?:lora_[AB](?:\.default)?\.weight|lora_(?:up|down)\.weight|alpha|diff(?:_b)?"
    r"|lora(?:_linear_layer)?\.(?:up|down)\.weight|(?:up|down)\.weight)$"
)


def files() -> list[Path]:
    found = sorted(Path(MANIFESTS).glob("*.json")) if MANIFESTS else []
    return [path for path in found if any(f"_{family}_" in path.name for family in FAMILIES)]


def stem(key: str) -> tuple[str, bool]:
    """(module with its prefix, whether flattened) of a key."""
    if key.startswith(("lora_", "oft_", "lycoris_")):
        return key.partition(".")[0], True
    match = _LEAF.search(key)
    assert match, key
    return key[: match.start()] + (match["processor"] or ""), False


def who(architecture: Architecture, module: str, flattened: bool) -> list[tuple[Component, Match]]:
    """The components and rows that know a module of a file."""
    found = []
    for component in architecture.components:
        for prefix in {p for prefixes in component.prefixes.values() for p in prefixes} | {""}:
            if module.startswith(prefix) and (prefix or not flattened):
                for namespace in component.table.namespaces:
                    matches = component.table.by_name(namespace, module[len(prefix) :], flattened=flattened)
                    found += [(component, match) for match in matches]
    return found


@pytest.mark.skipif(not MANIFESTS, reason="LORATOOLS_MANIFESTS names no folder of key tables")
@pytest.mark.parametrize("path", files(), ids=lambda path: path.stem)
def test_every_module_of_a_manifest_is_known(path: Path) -> None:
    family = next(family for family in FAMILIES if f"_{family}_" in path.name)
    architecture = ARCHITECTURES[FAMILIES[family]]
    shapes: dict[tuple[str, bool], dict[str, list[int]]] = {}
    for key, shape in json.loads(path.read_text())["keys"].items():
        if not key.startswith("bundle_emb"):
            shapes.setdefault(stem(key), {})[key] = shape
    for (module, flattened), tensors in shapes.items():
        found = who(architecture, module, flattened)
        assert found, f"{module} is not in the {architecture.name} table"
        up = [shape[0] for key, shape in tensors.items() if re.search(r"(lora_up|lora_B|up)(\.\w+)?\.weight$", key)]
        down = [shape[1] for key, shape in tensors.items() if re.search(r"(lora_down|lora_A|down)(\.\w+)?\.weight$", key)]
        if up and down and not module.endswith("text_projection"):
            known = [c.widths for c, _ in found if c.widths] or [*architecture.variants.values()]
            assert any(fit(match.row, up[0], down[0], dims) is not None for _, match in found for dims in known), (module, up, down)

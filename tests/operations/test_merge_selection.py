"""Which sites a merge changes and how strongly: components, globs, block weights; W' = W + weight · factor · ΔW by hand, site by site.

SD1 in its original names, one site for each kind of block; q, k and v of Flux in one tensor, each with a factor of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from loratools.errors import LoraToolsError
from loratools.operations.merge import merge
from tests.operations import merge_by_hand as hand
from tests.operations import test_merge_paths as paths
from tests.operations.merge_by_hand import BLOCK, QKV, WIDTH, Tensors, noise

# site as inspect prints it → (the base's tensor, its shape, kohya's block)
_UNET, _TEXT = "model.diffusion_model", "cond_stage_model.transformer.text_model.encoder.layers.0"
_IN, _OUT, _BLOCK = f"{_UNET}.input_blocks", f"{_UNET}.output_blocks", "transformer_blocks.0"
LAYERS: dict[str, tuple[str, tuple[int, ...], str]] = {
    "conv_in": (f"{_IN}.0.0", (16, 4, 3, 3), "IN00"),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (f"{_IN}.1.1.{_BLOCK}.attn1.to_q", (16, 16), "IN01"),
    "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k": (f"{_IN}.2.1.{_BLOCK}.attn2.to_k", (16, 24), "IN02"),
    "down_blocks.1.attentions.0.proj_in": (f"{_IN}.4.1.proj_in", (32, 32, 1, 1), "IN04"),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v": (f"{_UNET}.middle_block.1.{_BLOCK}.attn2.to_v", (48, 24), "MID"),
    "mid_block.resnets.1.conv1": (f"{_UNET}.middle_block.2.in_layers.2", (48, 48, 3, 3), "MID"),
    "up_blocks.0.resnets.0.conv1": (f"{_OUT}.0.0.in_layers.2", (48, 96, 3, 3), "OUT00"),
    "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.2": (f"{_OUT}.5.1.{_BLOCK}.ff.net.2", (48, 192), "OUT05"),
    "up_blocks.3.attentions.2.proj_out": (f"{_OUT}.11.1.proj_out", (16, 16, 1, 1), "OUT11"),
    "time_embedding.linear_1": (f"{_UNET}.time_embed.0", (64, 16), "BASE"),
    "text_model.encoder.layers.0.self_attn.q_proj": (f"{_TEXT}.self_attn.q_proj", (24, 24), "BASE"),
    "text_model.encoder.layers.0.mlp.fc1": (f"{_TEXT}.mlp.fc1", (56, 24), "BASE"),
}  # fmt: skip
_ATTENTION = "BASE IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"
LIST_17 = _ATTENTION.split()
LIST_26 = ["BASE", *(f"IN{n:02d}" for n in range(12)), "MID", *(f"OUT{n:02d}" for n in range(12))]


class Case:
    """SD1 and a LoRA on all of `LAYERS`; its weight on the command line is 0.5."""

    WEIGHT = 0.5

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out.safetensors"
        self.base: Tensors = {f"{name}.weight": noise(*shape, seed=40) for name, shape, _ in LAYERS.values()}
        self.source = hand.save(folder / "base.safetensors", self.base)
        self.pairs = {site: hand.pair(shape, 2, 2.0, seed) for seed, (site, (_, shape, _)) in enumerate(LAYERS.items())}
        self.adapter = self.saved("style.safetensors", self.pairs)

    def saved(self, name: str, pairs: Mapping[str, hand.Pair]) -> Path:
        tensors: Tensors = {}
        for site, one in pairs.items():
            stem = ("lora_te_" if site.startswith("text_model") else "lora_unet_") + site.replace(".", "_")
            tensors |= {f"{stem}.lora_up.weight": one.up, f"{stem}.lora_down.weight": one.down, f"{stem}.alpha": torch.tensor(one.alpha)}
        return hand.save(self.folder / name, tensors)

    def merge(self, blocks: str | None = None, more: tuple[tuple[Path, float], ...] = (), **options: Any) -> dict[str, Any]:
        if blocks is not None:
            options["block_weights"] = self.folder / "weights.toml"
            options["block_weights"].write_text(blocks)
        return merge(self.source, [(self.adapter, self.WEIGHT), *more], self.out, arch="sd1", verify=True, **options)

    def expect(self, factors: Mapping[str, float], also: Mapping[str, torch.Tensor] | None = None) -> None:
        """W' = W + 0.5 · factor · Δ at these sites (and what is in `also`), all others to the bit."""
        changes = {site: self.WEIGHT * factor * self.pairs[site].delta() for site, factor in factors.items() if factor}
        for site, delta in (also or {}).items():
            changes[site] = changes[site] + delta if site in changes else delta
        after = hand.assert_untouched(self.base, self.out, [f"{LAYERS[site][0]}.weight" for site in changes])
        for site, delta in changes.items():
            key = f"{LAYERS[site][0]}.weight"
            wanted = self.base[key].double() + delta
            assert float((after[key].double() - wanted).norm()) < 1e-6 * float(wanted.norm()), site
            assert float(delta.norm()) > 1e-3 * float(wanted.norm())


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def text(site: str) -> bool:
    return site.startswith("text_model")


def warned(result: Mapping[str, Any], *words: str) -> bool:
    return any(all(word in line for word in words) for line in result["warnings"])


# ------------------------------------------------------------------------------------------------------------ who takes part


def test_everything(case: Case) -> None:
    result = case.merge()
    case.expect(dict.fromkeys(LAYERS, 1.0))
    assert (result["changed"], result["sites"], result["warnings"]) == (12, 12, [])


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({"component": ["denoiser"]}, lambda site: not text(site)),
        ({"component": ["text_encoder"]}, text),
        ({"component": ["denoiser", "text_encoder"]}, lambda site: True),
        ({"include": ["*.attn2.*"]}, lambda site: ".attn2." in site),
        ({"include": ["denoiser.mid_block.*", "text_encoder.*"]}, lambda site: site.startswith("mid_block") or text(site)),
        ({"exclude": ["*.to_[kv]"]}, lambda site: not site.endswith(("to_k", "to_v"))),
        ({"include": ["down_blocks.*"], "exclude": ["*.attentions.0.*"]}, lambda site: site == list(LAYERS)[2]),
        ({"component": ["denoiser"], "include": ["*.proj_*"]}, lambda site: "proj_" in site and not text(site)),
    ],
)
def test_components_and_globs(options: dict[str, list[str]], chosen: Any, case: Case) -> None:
    result = case.merge(**options)
    factors = {site: 1.0 for site in LAYERS if chosen(site)}
    case.expect(factors)
    assert (result["changed"], result["sites"], result["unchanged"]) == (len(factors), len(factors), 12 - len(factors))
    assert warned(result, f"{12 - len(factors)} modules", "left out by the selection") == (len(factors) < 12)


# ----------------------------------------------------------------------------------------------------------------- block weights


def test_a_file_of_block_weights(case: Case) -> None:
    """A glob before a component before the default; nothing is multiplied but the adapter's own weight; negative numbers take out."""
    case.merge(
        """
        default = 0.5
        [components]
        text_encoder = 2.0
        [sites]
        "*.attn2.*" = 0.0
        "mid_block.*" = -1.5
        "text_encoder.*.fc1" = 0.25
        """
    )
    wanted = {site: 2.0 if text(site) else 0.5 for site in LAYERS}
    wanted |= {site: 0.0 for site in LAYERS if ".attn2." in site}
    wanted |= {site: -1.5 for site in LAYERS if site.startswith("mid_block")}  # later than *.attn2.*: the last glob that matches
    case.expect(wanted | {"text_model.encoder.layers.0.mlp.fc1": 0.25})


def test_the_record_holds_the_weights_and_no_comment(case: Case) -> None:
    """Enough to write the file again; what stands behind a # (a path, a name) stays at home."""
    case.merge(
        """
        default = 0.5  # from /home/someone/weights
        [adapters."style.safetensors"]
        components = { text_encoder = 2.0 }
        sites = { "mid_block.*" = -1.5 }
        """
    )
    with safe_open(case.out, "pt") as opened:
        (record,) = json.loads(opened.metadata()["loratools.merge"])
    own = {"style.safetensors": {"components": {"text_encoder": 2.0}, "sites": {"mid_block.*": -1.5}}}
    assert record["options"]["block_weights"] == {"default": 0.5, "adapters": own}


@pytest.mark.parametrize(("blocks", "silent"), [(LIST_17, 2), (LIST_26, 0)], ids=["17", "26"])
@pytest.mark.parametrize("form", ["list", "text"])
def test_kohya_lists(form: str, blocks: list[str], silent: int, case: Case) -> None:
    """A number of its own for each block; a block without one (IN00, OUT00 in the list of 17) gets 0, and that is said."""
    numbers = {block: round(0.1 + 0.07 * place, 2) for place, block in enumerate(blocks)}
    listed = ", ".join(map(str, numbers.values()))
    result = case.merge(f"kohya = [{listed}]" if form == "list" else f'kohya = "{listed}"')
    case.expect({site: numbers.get(block, 0.0) for site, (_, _, block) in LAYERS.items()})
    assert warned(result, "style.safetensors", f"{silent} sites of weight 0", "no number") == bool(silent)
    assert result["sites"] == 12 - silent


def test_globs_and_components_replace_a_list(case: Case) -> None:
    numbers = dict.fromkeys(LIST_17, 1.0)
    result = case.merge(f'kohya = {list(numbers.values())}\n[components]\ntext_encoder = 0.3\n[sites]\n"conv_in" = 0.7\n"*.attn2.*" = 0')
    wanted = {site: numbers.get(block, 0.0) for site, (_, _, block) in LAYERS.items()}
    wanted |= {site: 0.3 for site in LAYERS if text(site)} | {site: 0.0 for site in LAYERS if ".attn2." in site}
    case.expect(wanted | {"conv_in": 0.7})
    assert warned(result, "1 site of weight 0")


def test_each_adapter_has_a_table_of_its_own(case: Case) -> None:
    sites = list(LAYERS)[1:5]
    pairs = {site: hand.pair(LAYERS[site][1], 3, 1.0, 70 + seed) for seed, site in enumerate(sites)}
    other = case.saved("other.safetensors", pairs)
    case.merge(
        'default = 0.25\n[adapters."other.safetensors"]\ndefault = 3.0\n[adapters."other.safetensors".sites]\n"mid_block.*" = -1',
        ((other, 0.1),),
    )
    also = {site: 0.1 * (-1 if site.startswith("mid_block") else 3.0) * one.delta() for site, one in pairs.items()}
    case.expect(dict.fromkeys(LAYERS, 0.25), also)


def test_parts_of_a_joined_weight_have_factors_of_their_own(tmp_path: Path) -> None:
    """q alone, k at a third, v left out: the adapter has them joined, and so has the base."""
    base = hand.flux()
    one = hand.pair((3 * WIDTH, WIDTH), 4, 2.0)
    adapter = hand.kohya(tmp_path / "adapter.safetensors", {QKV: one})
    (tmp_path / "weights.toml").write_text('[sites]\n"*.to_k" = 0.3')
    source, out = hand.save(tmp_path / "base.safetensors", base), tmp_path / "out.safetensors"
    merge(source, [(adapter, 2.0)], out, arch="flux", exclude=[f"{BLOCK}.to_v"], block_weights=tmp_path / "weights.toml", verify=True)
    after = hand.assert_untouched(base, out, [f"{QKV}.weight"])[f"{QKV}.weight"]
    q, k, _ = one.delta().split(WIDTH)
    old = base[f"{QKV}.weight"]
    wanted = old[: 2 * WIDTH].double() + torch.cat([2.0 * q, 0.6 * k])
    assert float((after[: 2 * WIDTH].double() - wanted).norm()) < 1e-6 * float(wanted.norm())
    assert torch.equal(after[2 * WIDTH :], old[2 * WIDTH :])


@pytest.mark.parametrize("layout", ["fused", "apart"])
@pytest.mark.parametrize("kind", ["lora and diff_b", "dense", "dora in", "boft"])
def test_a_part_left_out_of_a_joined_module(kind: str, layout: str, tmp_path: Path) -> None:
    """Without v the rows of v stay, weight and bias, and those of q and k are what they are with it. An in-axis DoRA norms the columns
    of q, k and v together, a BOFT mixes their rows: both need v's weight to be read."""
    base = hand.flux()
    adapter = hand.lycoris(tmp_path / "adapter.safetensors", {QKV: paths.KINDS[kind][0]((3 * WIDTH, WIDTH))})
    source = hand.save(tmp_path / "base.safetensors", base if layout == "fused" else hand.split_flux(base))
    found: dict[str, Tensors] = {}
    for name, options in (("all", {}), ("some", {"exclude": [f"{BLOCK}.to_v"]})):
        merge(source, [(adapter, 1.0)], tmp_path / f"{name}.safetensors", arch="flux", verify=True, **options)
        found[name] = load_file(tmp_path / f"{name}.safetensors")
        found[name] = found[name] if layout == "apart" else hand.split_flux(found[name])
    before = hand.split_flux(base)
    for leaf in ("weight", "bias") if kind in ("dense", "lora and diff_b") else ("weight",):
        for part in "qkv":
            key = f"{BLOCK}.to_{part}.{leaf}"
            assert torch.equal(found["some"][key], (before if part == "v" else found["all"])[key]), key
            assert not torch.equal(found["all"][key], before[key]), key


# ------------------------------------------------------------------------------------------------------- entries that meet nothing


@pytest.mark.parametrize(
    ("options", "blocks", "words"),
    [
        ({"include": ["*.attn3.*"]}, None, ("--include", "*.attn3.*", "matches no site")),
        ({"exclude": ["conv_inn"]}, None, ("--exclude", "conv_inn", "conv_in")),
        ({"component": ["text_encoder_2"]}, None, ("--component", "text_encoder_2", "text_encoder")),
        ({}, '[sites]\n"up_blocks.4.*" = 1.0', ("weights.toml", "up_blocks.4.*", "matches no site")),
        ({}, '[adapters."stile.safetensors"]\ndefault = 1.0', ("stile.safetensors", "style.safetensors")),
        ({}, f"kohya = {[1.0] * 12}", ("12 numbers", "sd1", "17 or 26")),
        ({"component": ["text_encoder"], "include": ["conv_in"]}, None, ("leaves none of 12 sites",)),
        ({}, "default = 0.0", ("the factor is 0 at every selected site",)),
    ],
)
def test_exit_2_and_nothing_written(options: dict[str, list[str]], blocks: str | None, words: tuple[str, ...], case: Case) -> None:
    with pytest.raises(LoraToolsError) as caught:
        case.merge(blocks, **options)
    told = "\n".join([caught.value.message, *caught.value.details, caught.value.fix or ""])
    assert caught.value.exit_code == 2
    assert [word for word in words if word not in told] == []
    assert {path.name for path in case.folder.iterdir()} <= {"base.safetensors", "style.safetensors", "weights.toml"}


def test_all_that_is_wrong_at_once(case: Case) -> None:
    """Two globs, a component, and an output that is there: one run names them all."""
    case.out.write_bytes(b"there")
    with pytest.raises(LoraToolsError) as caught:
        case.merge(include=["nowhere.*"], exclude=["nothing.*"], component=["vae"])
    told = "\n".join([caught.value.message, *caught.value.details])
    assert [word for word in ("nowhere.*", "nothing.*", "'vae'", "out.safetensors") if word not in told] == []
    assert (caught.value.exit_code, case.out.read_bytes()) == (2, b"there")


def test_a_file_that_is_no_block_weights(case: Case) -> None:
    with pytest.raises(LoraToolsError) as caught:
        case.merge('defualt = 1.0\n[components]\ntext_encoder = "1"')
    assert caught.value.exit_code == 3
    assert len(caught.value.details) == 2
    assert not case.out.exists()


def test_a_weight_of_zero(case: Case) -> None:
    """It is said of the merge as of a selection: a base that stays as it is, is no success unsaid."""
    other = case.saved("other.safetensors", {"conv_in": case.pairs["conv_in"]})
    result = case.merge(more=((other, 0.0),))
    case.expect(dict.fromkeys(LAYERS, 1.0))
    assert [row["weight"] for row in result["adapters"]] == [0.5, 0.0]

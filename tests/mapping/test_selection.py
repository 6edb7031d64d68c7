"""Which sites a selection leaves in, the factor each gets, and what is said about entries that meet nothing.

The blocks expected below are ldm's, written out by hand from the layout of the original UNets (`openaimodel.py`): SD1 has
input_blocks 0 to 11 and output_blocks 0 to 11 with transformers in input 1 2 4 5 7 8 and output 3 to 11; SDXL 0 to 8 and 0 to 8 with
transformers in input 4 5 7 8 and output 0 to 5.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from loratools.adapters.adapter import Site
from loratools.errors import LoraToolsError, UsageError
from loratools.mapping.architectures import Architecture, registry
from loratools.mapping.selection import KOHYA_LISTS, BlockWeights, Rules, Selection, block_of, matches, read_block_weights

SD1, SD2, SDXL, REFINER, FLUX, LLM = (registry()[name] for name in ("sd1", "sd2", "sdxl", "sdxl-refiner", "flux", "llm"))

# site → its block, and its place (from 0) in the list of 26 and of 17; None: the list has no number for it
SD1_SITES = [
    ("conv_in", "IN00", 1, None),
    ("down_blocks.0.attentions.0.proj_in", "IN01", 2, 1),
    ("down_blocks.0.resnets.1.conv2", "IN02", 3, 2),
    ("down_blocks.0.downsamplers.0.conv", "IN03", 4, None),
    ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "IN04", 5, 3),
    ("down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k", "IN05", 6, 4),
    ("down_blocks.1.downsamplers.0.conv", "IN06", 7, None),
    ("down_blocks.2.attentions.0.proj_out", "IN07", 8, 5),
    ("down_blocks.2.attentions.1.transformer_blocks.0.ff.net.2", "IN08", 9, 6),
    ("down_blocks.2.downsamplers.0.conv", "IN09", 10, None),
    ("down_blocks.3.resnets.0.time_emb_proj", "IN10", 11, None),
    ("down_blocks.3.resnets.1.conv1", "IN11", 12, None),
    ("mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", "MID", 13, 7),
    ("mid_block.resnets.1.conv1", "MID", 13, 7),
    ("up_blocks.0.resnets.0.conv_shortcut", "OUT00", 14, None),
    ("up_blocks.0.resnets.1.conv1", "OUT01", 15, None),
    ("up_blocks.0.upsamplers.0.conv", "OUT02", 16, None),
    ("up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v", "OUT03", 17, 8),
    ("up_blocks.1.attentions.1.proj_in", "OUT04", 18, 9),
    ("up_blocks.1.upsamplers.0.conv", "OUT05", 19, 10),
    ("up_blocks.2.attentions.0.transformer_blocks.0.ff.net.0.proj", "OUT06", 20, 11),
    ("up_blocks.2.resnets.1.conv2", "OUT07", 21, 12),
    ("up_blocks.2.attentions.2.proj_out", "OUT08", 22, 13),
    ("up_blocks.3.attentions.0.proj_in", "OUT09", 23, 14),
    ("up_blocks.3.resnets.1.norm1", "OUT10", 24, 15),
    ("up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_v", "OUT11", 25, 16),
    ("conv_out", "BASE", 0, 0),
    ("conv_norm_out", "BASE", 0, 0),
    ("time_embedding.linear_2", "BASE", 0, 0),
]
# the same for SDXL and the lists of 20 and 12
SDXL_SITES = [
    ("conv_in", "IN00", 1, None),
    ("down_blocks.0.resnets.0.conv1", "IN01", 2, None),
    ("down_blocks.0.resnets.1.conv1", "IN02", 3, None),
    ("down_blocks.0.downsamplers.0.conv", "IN03", 4, None),
    ("down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q", "IN04", 5, 1),
    ("down_blocks.1.attentions.1.proj_out", "IN05", 6, 2),
    ("down_blocks.1.downsamplers.0.conv", "IN06", 7, None),
    ("down_blocks.2.attentions.0.transformer_blocks.9.ff.net.2", "IN07", 8, 3),
    ("down_blocks.2.resnets.1.conv2", "IN08", 9, 4),
    ("mid_block.attentions.0.transformer_blocks.3.attn2.to_k", "MID", 10, 5),
    ("up_blocks.0.attentions.0.transformer_blocks.8.attn1.to_k", "OUT00", 11, 6),
    ("up_blocks.0.attentions.1.proj_in", "OUT01", 12, 7),
    ("up_blocks.0.upsamplers.0.conv", "OUT02", 13, 8),
    ("up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "OUT03", 14, 9),
    ("up_blocks.1.resnets.1.conv1", "OUT04", 15, 10),
    ("up_blocks.1.attentions.2.proj_out", "OUT05", 16, 11),
    ("up_blocks.2.resnets.0.conv1", "OUT06", 17, None),
    ("up_blocks.2.resnets.1.conv1", "OUT07", 18, None),
    ("up_blocks.2.resnets.2.conv_shortcut", "OUT08", 19, None),
    ("add_embedding.linear_1", "BASE", 0, 0),
    ("time_embedding.linear_1", "BASE", 0, 0),
    ("conv_out", "BASE", 0, 0),
]
TEXT = Site("text_encoder", "text_model.encoder.layers.3.mlp.fc1")
TEXT_2 = Site("text_encoder_2", "text_model.encoder.layers.31.self_attn.q_proj")


def unet(path: str) -> Site:
    return Site("denoiser", path)


def published(architecture: Architecture) -> list[Site]:
    """Every site of the full-size denoiser."""
    return [unet(name) for name, _ in architecture.component("denoiser").table.names("diff")]


def numbers(length: int) -> tuple[float, ...]:
    """A list of distinct numbers: 0.5 at BASE, then 1.5, 2.5, …"""
    return tuple(0.5 + place for place in range(length))


def read(folder: Path, text: str) -> BlockWeights:
    """The block weights of a file with this text."""
    path = folder / "weights.toml"
    path.write_text(text, encoding="utf-8")
    return read_block_weights(path)


def told(selection: Selection, sites: list[Site] | dict[str, list[Site]], architecture: Architecture = SD1) -> list[str]:
    """The messages of a selection's problems."""
    found = selection.problems(sites if isinstance(sites, dict) else {"a.safetensors": sites}, architecture)
    assert all(isinstance(problem, LoraToolsError) and problem.exit_code == 2 for problem in found)
    return [problem.message for problem in found]


# ------------------------------------------------------------------------------------------------------------------ kohya's lists


@pytest.mark.parametrize("architecture", [SD1, SD2], ids=lambda one: one.name)
@pytest.mark.parametrize(("path", "block", "in_26", "in_17"), SD1_SITES)
def test_blocks_of_sd1_and_sd2(architecture: Architecture, path: str, block: str, in_26: int, in_17: int | None) -> None:
    site = unet(path)
    assert block_of(site, architecture) == block
    assert Rules(kohya=numbers(26)).factor(site, architecture) == 0.5 + in_26
    assert Rules(kohya=numbers(17)).factor(site, architecture) == (0.0 if in_17 is None else 0.5 + in_17)
    assert Rules(kohya=numbers(17)).silent(site, architecture) == (in_17 is None)
    assert not Rules(kohya=numbers(26)).silent(site, architecture)


@pytest.mark.parametrize(("path", "block", "in_20", "in_12"), SDXL_SITES)
def test_blocks_of_sdxl(path: str, block: str, in_20: int, in_12: int | None) -> None:
    site = unet(path)
    assert block_of(site, SDXL) == block
    assert Rules(kohya=numbers(20)).factor(site, SDXL) == 0.5 + in_20
    assert Rules(kohya=numbers(12)).factor(site, SDXL) == (0.0 if in_12 is None else 0.5 + in_12)
    assert Rules(kohya=numbers(12)).silent(site, SDXL) == (in_12 is None)


def test_text_encoders_are_base() -> None:
    assert Rules(kohya=numbers(12)).factor(TEXT, SDXL) == Rules(kohya=numbers(20)).factor(TEXT_2, SDXL) == 0.5
    assert Rules(kohya=numbers(17)).factor(TEXT, SD1) == Rules(kohya=numbers(26)).factor(TEXT, SD2) == 0.5
    assert block_of(Site("model", "layers.0.self_attn.q_proj"), LLM) == "BASE"
    assert block_of(unet("single_transformer_blocks.0.proj_mlp"), FLUX) == "BASE"
    assert block_of(TEXT_2, SD1) == "BASE"  # a component the architecture does not even have


def test_every_list_has_the_length_it_is_known_by() -> None:
    assert list(KOHYA_LISTS) == [12, 17, 20, 26]
    for length, known in KOHYA_LISTS.items():
        assert len(known.blocks) == len(set(known.blocks)) == length
        assert known.blocks[0] == "BASE"


@pytest.mark.parametrize(("architecture", "short", "full"), [(SD1, 17, 26), (SDXL, 12, 20)], ids=["sd1", "sdxl"])
def test_the_short_list_is_the_blocks_with_transformers(architecture: Architecture, short: int, full: int) -> None:
    """No transformer of the published model is without a number; every number is used; the full list leaves no site out."""
    sites = published(architecture)
    without = {site for site in sites if Rules(kohya=numbers(short)).silent(site, architecture)}
    assert without
    assert not any(".attentions." in site.path for site in without)
    assert not any(Rules(kohya=numbers(full)).silent(site, architecture) for site in sites)
    for length in (short, full):
        assert {Rules(kohya=numbers(length)).factor(site, architecture) for site in sites} >= set(numbers(length))


def test_sites_without_a_number_are_told_by_adapter() -> None:
    down, attention = unet("down_blocks.0.downsamplers.0.conv"), unet("down_blocks.1.attentions.0.proj_in")
    sites = {"a": [down, attention], "b": [attention], "c": [down]}
    weights = BlockWeights(Rules(kohya=numbers(17)), {"c": Rules(default=0.0)})
    assert Selection(blocks=weights).silent(sites, SD1) == {"a": [down]}
    assert Selection(blocks=weights, exclude=("*downsamplers*",)).silent(sites, SD1) == {}
    assert Selection().silent(sites, SD1) == {}
    named = BlockWeights(Rules(kohya=numbers(17), sites={"*downsamplers*": 0.0}))
    assert Selection(blocks=named).silent(sites, SD1) == {}


@pytest.mark.parametrize(
    ("length", "architecture", "lengths"),
    [
        (12, SD1, "its lists have 17 or 26"),
        (20, SD2, "its lists have 17 or 26"),
        (17, SDXL, "its lists have 12 or 20"),
        (26, SDXL, "its lists have 12 or 20"),
        (12, REFINER, "it has no such lists"),
        (17, FLUX, "it has no such lists"),
        (26, LLM, "it has no such lists"),
    ],
)
def test_a_list_of_another_architecture(length: int, architecture: Architecture, lengths: str) -> None:
    site = Site("model", "layers.0.mlp.up_proj") if architecture is LLM else unet("conv_in")
    selection = Selection(blocks=BlockWeights(Rules(kohya=numbers(length)), path=Path("w.toml")))
    [message] = told(selection, [site], architecture)
    assert message == f"w.toml: kohya: a list of {length} numbers does not belong to {architecture.name}: {lengths}"
    with pytest.raises(UsageError):
        selection.factor(site, architecture, "a.safetensors")
    with pytest.raises(UsageError):
        selection.silent({"a.safetensors": [site]}, architecture)


# --------------------------------------------------------------------------------------------------------------------- precedence


def test_what_wins(tmp_path: Path) -> None:
    """sites, the last that matches, before components before kohya before default; nothing is multiplied."""
    weights = read(
        tmp_path,
        """
        default = 7.0
        kohya = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26]
        [components]
        text_encoder = 0.25
        [sites]
        "denoiser.down_blocks.1.*" = 2
        "*.attn2.*" = -3.5
        "down_blocks.1.attentions.1.*" = 4
        "text_encoder.*.mlp.fc2" = 5
        """,
    )
    expected = {
        unet("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"): 2.0,
        unet("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"): -3.5,
        unet("down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q"): 4.0,
        unet("down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_q"): -3.5,
        unet("down_blocks.2.attentions.0.transformer_blocks.0.attn1.to_q"): 15.0,
        unet("down_blocks.0.downsamplers.0.conv"): 0.0,
        unet("conv_out"): 10.0,
        TEXT: 0.25,
        Site("text_encoder", "text_model.encoder.layers.3.mlp.fc2"): 5.0,
    }
    found = {site: Selection(blocks=weights).factor(site, SD1, "a.safetensors") for site in expected}
    assert found == expected


def test_a_table_of_an_adapter_replaces_everything_else(tmp_path: Path) -> None:
    text = """
        default = 0.1
        [components]
        text_encoder = 0.2
        [sites]
        "*.to_q" = 0.3
        [adapters."style.safetensors"]
        default = 0.7
        [adapters."style.safetensors".sites]
        "conv_in" = 0.8
        [adapters."lists.safetensors"]
        kohya = "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16"
        """
    chosen = Selection(blocks=read(tmp_path, text))
    query = unet("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    by_adapter = {
        "other.safetensors": (0.3, 0.1, 0.2),
        "style.safetensors": (0.7, 0.8, 0.7),
        "lists.safetensors": (7.0, 0.0, 0.0),
        "Style.safetensors": (0.3, 0.1, 0.2),
    }
    for name, expected in by_adapter.items():
        assert tuple(chosen.factor(site, SD1, name) for site in (query, unet("conv_in"), TEXT)) == expected


# ---------------------------------------------------------------------------------------------------------------------- selecting


@pytest.mark.parametrize(
    ("glob", "fits"),
    [
        ("denoiser.*", True),
        ("denoiser.mid_block.attentions.0.proj_in", True),
        ("mid_block.attentions.0.proj_in", True),
        ("mid_block.*", True),
        ("*.proj_in", True),
        ("mid_*.proj_??", True),
        ("*.attentions.[0-1].*", True),
        ("mid_block", False),
        ("proj_in", False),
        ("Denoiser.*", False),
        ("MID_BLOCK.*", False),
        ("text_encoder.*", False),
        ("", False),
    ],
)
def test_globs(glob: str, fits: bool) -> None:
    assert matches(glob, unet("mid_block.attentions.0.proj_in")) is fits


@pytest.mark.parametrize(
    ("selection", "left"),
    [
        (Selection(), "abc"),
        (Selection(components=("denoiser",)), "ab"),
        (Selection(components=("text_encoder",)), "c"),
        (Selection(components=("denoiser", "text_encoder")), "abc"),
        (Selection(include=("*.attn1.*",)), "a"),
        (Selection(include=("*.attn1.*", "text_encoder.*")), "ac"),
        (Selection(exclude=("*.attn1.*", "text_encoder.*")), "b"),
        (Selection(include=("denoiser.*",), exclude=("conv_in",)), "a"),
        (Selection(components=("denoiser",), include=("text_encoder.*",)), ""),
    ],
)
def test_what_is_left(selection: Selection, left: str) -> None:
    sites = {"a": unet("mid_block.attentions.0.transformer_blocks.0.attn1.to_q"), "b": unet("conv_in"), "c": TEXT}
    assert "".join(name for name, site in sites.items() if selection.factor(site, SD1, "x") is not None) == left
    assert "".join(name for name, site in sites.items() if selection.selects(site)) == left


def test_what_is_not_selected_has_no_factor_at_all() -> None:
    weights = BlockWeights(Rules(default=0.0))
    assert Selection(exclude=("conv_in",), blocks=weights).factor(unet("conv_in"), SD1, "a") is None
    assert Selection(blocks=weights).factor(unet("conv_in"), SD1, "a") == 0.0


# ----------------------------------------------------------------------------------------------- entries that meet nothing there


SITES = [
    unet("conv_in"),
    unet("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"),
    unet("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"),
    TEXT,
]


def test_a_selection_that_fits_has_no_problems() -> None:
    weights = BlockWeights(Rules(kohya=numbers(17), components={"text_encoder": 0.5}, sites={"*.attn2.*": 0.0}))
    assert told(Selection(("denoiser",), ("down_blocks.*",), ("*.to_k",), weights), SITES) == []
    assert told(Selection(), []) == []


def test_an_entry_for_what_the_selection_leaves_out_is_no_problem() -> None:
    """One file of block weights serves with --component and without."""
    weights = BlockWeights(Rules(components={"text_encoder": 0.5}))
    assert told(Selection(components=("denoiser",), blocks=weights), SITES) == []


@pytest.mark.parametrize(
    ("glob", "near"),
    [
        ("denoiser.down_block.1.*", "denoiser.down_blocks.1.*"),
        ("down_blocks.1", "down_blocks.1.*"),
        ("*.atn2.*", "*.attn2.*"),
        ("to_q", "*.to_q"),
        ("Denoiser.conv_in", "denoiser.conv_in"),
        ("text_model.encoder.layers.3.mlp.fc11", "text_model.encoder.layers.3.mlp.fc1"),
    ],
)
def test_globs_that_match_nothing_name_the_nearest_that_does(glob: str, near: str) -> None:
    tail = f"{glob!r} matches no site; did you mean {near!r}?"
    assert told(Selection(include=(glob,)), SITES) == [f"--include: {tail}"]
    assert told(Selection(exclude=(glob,)), SITES) == [f"--exclude: {tail}"]
    weights = BlockWeights(Rules(sites={glob: 0.5}), path=Path("w.toml"))
    assert told(Selection(blocks=weights), SITES) == [f"w.toml: sites: {tail}"]
    assert any(matches(near, site) for site in SITES)


def test_a_glob_with_nothing_near() -> None:
    assert told(Selection(include=("zzz", "")), SITES) == ["--include: 'zzz' matches no site", "--include: '' matches no site"]


def test_components_that_no_adapter_has() -> None:
    weights = BlockWeights(Rules(components={"text_encoder": 1.0, "text_encoder_2": 0.5}), path=Path("w.toml"))
    problems = Selection(components=("denoisr", "denoiser", "vae"), blocks=weights).problems({"a": SITES}, SD1)
    assert [problem.message for problem in problems] == [
        "--component: no component 'denoisr'; did you mean 'denoiser'?",
        "--component: no component 'vae'",
        "w.toml: components: no component 'text_encoder_2'; did you mean 'text_encoder'?",
    ]
    assert {problem.fix for problem in problems} == {"the components are denoiser, text_encoder"}


def test_a_component_that_only_one_adapter_has_is_enough() -> None:
    assert told(Selection(components=("text_encoder",)), {"a": [unet("conv_in")], "b": [TEXT]}) == []


def test_tables_of_adapters_are_held_against_their_own_sites() -> None:
    both = {"style.safetensors": [unet("conv_in")], "face.safetensors": [TEXT]}
    style = Rules(sites={"conv_in": 1.0, "text_encoder.*": 0.5}, kohya=numbers(12))
    weights = BlockWeights(Rules(components={"denoiser": 0.5}), {"style.safetensors": style, "fase.safetensors": Rules()}, Path("w.toml"))
    assert told(Selection(blocks=weights), both) == [
        'w.toml: adapters."style.safetensors".kohya: a list of 12 numbers does not belong to sd1: its lists have 17 or 26',
        "w.toml: adapters.\"style.safetensors\".sites: 'text_encoder.*' matches no site",
        "w.toml: adapters.\"fase.safetensors\": no adapter has this file name; did you mean 'face.safetensors'?",
        "w.toml: components: no component 'denoiser'",
    ]


def test_rules_that_no_adapter_follows() -> None:
    weights = BlockWeights(Rules(0.5, numbers(12), {"x": 1.0}, {"y": 1.0}), {"a": Rules()})
    message = "kohya, components, sites: unused, because every adapter has a table of its own under [adapters]"
    assert told(Selection(blocks=weights), {"a": SITES}) == [message]
    assert told(Selection(blocks=BlockWeights(Rules(0.5), {"a": Rules()})), {"a": SITES}) == []


def test_a_selection_that_leaves_nothing() -> None:
    both = {"a": SITES, "b": [TEXT]}
    assert told(Selection(exclude=("*",)), both) == ["the selection leaves none of 5 sites"]
    assert told(Selection(components=("denoiser",), include=("text_model.*",)), both) == ["the selection leaves none of 5 sites"]
    zero = BlockWeights(Rules(), {"a": Rules(default=0.0)}, Path("w.toml"))
    assert told(Selection(blocks=zero), both) == []
    assert told(Selection(exclude=("text_encoder.*",), blocks=zero), both) == [
        "w.toml: the factor is 0 at every selected site: nothing would be merged"
    ]


def test_problems_come_together() -> None:
    weights = BlockWeights(Rules(sites={"q": 1.0}, kohya=numbers(20)))
    assert len(told(Selection(("vae",), ("x",), ("y",), weights), SITES)) == 5

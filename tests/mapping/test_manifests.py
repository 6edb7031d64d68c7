"""Every published key table of a supported family, there and back again, through every dialect.

Expected: what each table is, by hand. What a conversion means is told by `dense`, which shares nothing with the library.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratools.errors import LoraToolsError
from loratools.mapping.detect import detect
from loratools.mapping.dialects import DIALECTS
from loratools.operations.convert import convert
from loratools.operations.inspect import inspect
from tests.mapping.builders import FOLDER, Table, Tensors, blank, needs_tables, noise, refusal, save, told, values
from tests.mapping.dense import effects, worst

pytestmark = needs_tables

# table → dialect, the architectures that nothing but --arch can decide between, variant. The first one is what was trained.
EXPECTED: dict[str, tuple[str, tuple[str, ...], str | None]] = {
    "derived_chroma_aitoolkit_r16": ("comfy", ("chroma", "flux"), None),
    "derived_chroma_diffusers_peft_r16": ("diffusers", ("chroma", "flux"), None),
    "derived_chroma_onetrainer_legacy_r16": ("onetrainer", ("chroma", "flux"), None),
    "derived_flux_kohya_oft": ("kohya", ("flux",), "dev"),
    "derived_flux_kohya_te1_r16": ("kohya", ("flux",), "dev"),
    "derived_flux_onetrainer_omi_r16": ("omi", ("flux",), "dev"),
    "derived_flux_simpletuner_lycoris_lokr": ("lycoris", ("flux",), "dev"),
    "derived_flux_xlabs_full_r16": ("xlabs", ("flux",), "dev"),
    "derived_lumina2_diffusers_peft_r16": ("diffusers", ("lumina2",), "base"),
    "derived_lumina2_kohya_r8": ("kohya", ("lumina2",), "base"),
    "derived_sd15_diffusers_attnprocs_r4": ("diffusers-legacy", ("sd1",), "base"),
    "derived_sd15_kohya_c3lier_r16_c8": ("kohya", ("sd1",), "base"),
    "derived_sd15_kohya_lora_r16": ("kohya", ("sd1",), "base"),
    "derived_sd15_lcm_lora_r64": ("kohya", ("sd1",), "base"),
    "derived_sd15_lycoris_diag_oft": ("kohya", ("sd1",), "base"),
    "derived_sd15_lycoris_dylora_r16": ("kohya", ("sd1",), "base"),
    "derived_sd15_lycoris_full_diff_norm": ("kohya", ("sd1",), "base"),
    "derived_sd15_lycoris_glora_r8": ("kohya", ("sd1",), "base"),
    "derived_sd15_lycoris_ia3": ("kohya", ("sd1",), "base"),
    "derived_sd15_lycoris_locon_dora_in_r16": ("kohya", ("sd1",), "base"),
    "derived_sd15_lycoris_locon_dora_out_r16": ("kohya", ("sd1",), "base"),
    "derived_sd15_lycoris_locon_r16_c8": ("kohya", ("sd1",), "base"),
    "derived_sd15_lycoris_locon_tucker_r16_c8": ("kohya", ("sd1",), "base"),
    "derived_sd15_lycoris_loha_r8": ("kohya", ("sd1",), "base"),
    "derived_sd15_lycoris_lokr_f8_r16": ("kohya", ("sd1",), "base"),
    "derived_sd15_lycoris_lokr_full_f4": ("kohya", ("sd1",), "base"),
    "derived_sd15_lycoris_lokr_tucker": ("kohya", ("sd1",), "base"),
    "derived_sd21_kohya_lora_r8": ("kohya", ("sd2",), "base"),
    "derived_sd35l_diffusers_peft_r16": ("diffusers", ("sd3",), "3.5-large"),
    "derived_sd35l_simpletuner_lycoris_lokr": ("lycoris", ("sd3",), "3.5-large"),
    "derived_sd3m_kohya_r16": ("kohya", ("sd3",), "medium"),
    "derived_sdxl_diffusers_old_r16": ("diffusers-legacy", ("sdxl",), "base"),
    "derived_sdxl_diffusers_peft_r16": ("diffusers", ("sdxl",), "base"),
    "derived_sdxl_kohya_c3lier_r16_c8": ("kohya", ("sdxl",), "base"),
    "derived_sdxl_kohya_lora_r32": ("kohya", ("sdxl",), "base"),
    "derived_sdxl_lycoris_locon_norm_r16_c8": ("kohya", ("sdxl",), "base"),
    "derived_sdxl_lycoris_lokr_full_f4_dora": ("kohya", ("sdxl",), "base"),
    "derived_sdxl_onetrainer_legacy_r16": ("onetrainer", ("sdxl",), "base"),
    "derived_wan21_i2v_14b_aitoolkit_r32": ("comfy", ("wan",), "2.1-i2v-14b"),
    "derived_wan21_i2v_14b_diffusers_peft_r32": ("diffusers", ("wan",), "2.1-i2v-14b"),
    "derived_wan21_i2v_14b_musubi_r32": ("kohya", ("wan",), "2.1-i2v-14b"),
    "derived_wan21_t2v_14b_aitoolkit_r32": ("comfy", ("wan",), "2.1-t2v-14b"),
    "derived_wan21_t2v_14b_diffusers_peft_r32": ("diffusers", ("wan",), "2.1-t2v-14b"),
    "derived_wan21_t2v_14b_lightx2v_diffb_r32": ("comfy", ("wan",), "2.1-t2v-14b"),
    "derived_wan21_t2v_14b_musubi_r32": ("kohya", ("wan",), "2.1-t2v-14b"),
    "invoke_flux_lora_aitoolkit_format": ("comfy", ("flux", "chroma"), None),
    "invoke_flux_lora_diffusers_format": ("diffusers", ("flux",), "dev"),
    "invoke_flux_lora_diffusers_no_proj_mlp_format": ("diffusers", ("flux", "chroma"), None),
    "invoke_flux_lora_kohya_format": ("kohya", ("flux",), "dev"),
    "invoke_flux_lora_xlabs_format": ("xlabs", ("flux",), "dev"),
}

# Tables of families that are recognised but not converted: the names that must be among the answers, and no others.
FAMILIES: dict[str, tuple[str, ...]] = {
    "derived_flux2_dev_aitoolkit_r16": ("flux2",),
    "derived_flux2_dev_diffusers_peft_r16": ("flux2",),
    "derived_flux2_dev_musubi_r16": ("flux2",),
    "derived_flux2_klein9b_musubi_r16": ("flux2",),
    "derived_framepack_musubi_r16": ("framepack", "hunyuan-video"),  # the same modules under the same names
    "derived_hidream_i1_aitoolkit_r16": ("hidream",),
    "derived_hunyuanvideo_diffusers_peft_r16": ("hunyuan-video", "framepack"),
    "derived_hunyuanvideo_musubi_r32": ("hunyuan-video",),
    "derived_hunyuanvideo_onetrainer_legacy_r16": ("hunyuan-video", "framepack"),
    "derived_ltxv2b_comfy_native_r16": ("ltx-video",),
    "derived_ltxv2b_diffusers_peft_r16": ("ltx-video",),
    "derived_qwenimage_aitoolkit_r16": ("qwen-image",),
    "derived_qwenimage_diffsynth_default_r16": ("qwen-image",),
    "derived_qwenimage_diffusers_peft_r16": ("qwen-image",),
    "derived_qwenimage_musubi_r16": ("qwen-image",),
    "derived_zimage_aitoolkit_r16": ("z-image",),
    "derived_zimage_diffusers_peft_r16": ("z-image",),
    "derived_zimage_musubi_r16": ("z-image",),
    "derived_zimage_onetrainer_legacy_r16": ("z-image",),
}

# Where the numbers of a conversion are allowed to move: alpha is folded into float32 factors (0.7 is no power of two).
EXACT, ROUNDED = 1e-12, 1e-6

FUSED = [
    name
    for name in EXPECTED
    if re.search(r"flux_kohya_te1|flux_lora_kohya|aitoolkit_format|chroma_aitoolkit|xlabs_full|sd3m|lumina2_kohya", name)
]
PLAIN = [name for name in EXPECTED if "lycoris" not in name and "oft" not in name]


def arch_of(name: str) -> str:
    return EXPECTED[name][1][0]


def small(name: str) -> Table:
    return Table.load(name).thinned().reduced()


def settle(name: str) -> str | None:
    """--arch, which a file without the published widths or with few blocks may need."""
    return arch_of(name)


def out(folder: Path, stem: str, dialect: str) -> Path:
    return folder / (f"{stem}.peft" if DIALECTS[dialect].folder else f"{stem}.safetensors")


def load(path: Path) -> Tensors:
    if path.is_file():
        return load_file(path)
    found: Tensors = {}
    for file in sorted(path.rglob("*.safetensors")):
        found |= {f"{file.parent.relative_to(path)}/{key}": tensor for key, tensor in load_file(file).items()}
    return found


def same_bits(a: Tensors, b: Tensors) -> list[str]:
    """Keys whose dtype, shape or bits differ, or that only one has."""
    both = [key for key in a if key in b]
    differing = [key for key in both if (a[key].dtype, a[key].shape) != (b[key].dtype, b[key].shape) or not torch.equal(a[key], b[key])]
    return sorted({*a} ^ {*b}) + differing


def convert_or_refusal(source: Path, target: Path, dialect: str, arch: str | None) -> dict[str, object] | None:
    """The result; None for a refusal, which must have exit code 3, reasons, and nothing written."""
    before = sorted(target.parent.iterdir())
    refused: LoraToolsError | None = None
    try:
        return convert(source, target, dialect, arch=arch)
    except LoraToolsError as error:
        refused = error
    assert refused.exit_code == 3, told(refused)
    assert refused.details or "cannot be written" in refused.message or "no spelling" in refused.message
    assert sorted(target.parent.iterdir()) == before
    return None


def test_every_table_is_expected_to_be_something() -> None:
    known = {path.stem for path in Path(FOLDER).glob("*.json")}
    assert known == {*EXPECTED, *FAMILIES, "attested_cloneofsimo_pt"}


@pytest.mark.parametrize("name", EXPECTED)
def test_detection_at_published_widths(name: str) -> None:
    dialect, architectures, variant = EXPECTED[name]
    shapes = Table.load(name).shapes
    found = detect(blank(shapes), {})
    assert found.dialect == dialect
    assert {candidate.architecture.name for candidate in found.candidates} == set(architectures)
    assert found.unknown_keys == []
    if len(architectures) == 1:
        assert found.best is not None
        assert found.best.variant == variant
    # one foreign key more: the verdict stays, the key is named
    spoiled = detect(blank({**shapes, "somebody_elses.gadget.weight": (4, 4)}), {})
    assert spoiled.dialect == dialect
    assert {candidate.architecture.name for candidate in spoiled.candidates} == set(architectures)
    assert spoiled.unknown_keys == ["somebody_elses.gadget.weight"]


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_are_named_and_refused(name: str, tmp_path: Path) -> None:
    found = detect(blank(Table.load(name).shapes), {})
    assert {candidate.architecture.published for candidate in found.candidates} == set(FAMILIES[name])
    path = save(tmp_path / "a.safetensors", values(small(name).shapes))
    assert FAMILIES[name][0] in {candidate["architecture"] for candidate in inspect(path)["candidates"]}
    error = refusal(convert, path, tmp_path / "b.safetensors", "diffusers")
    assert error.exit_code == 3
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("name", EXPECTED)
def test_same_dialect_is_the_same_bytes(name: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", values(small(name).shapes, torch.float16), {"note": "z", "a": "first"})
    result = convert(path, tmp_path / "b.safetensors", EXPECTED[name][0], arch=settle(name))
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256((tmp_path / "b.safetensors").read_bytes()).digest()
    assert result["exact"] is True
    assert result["tensors_in"] == result["tensors_out"] == len(small(name).shapes)


@pytest.mark.parametrize("name", EXPECTED)
def test_every_dialect_there_and_back(name: str, tmp_path: Path) -> None:
    """Equal effects at every site in every dialect that takes it; for power-of-two scales the way back restores every bit."""
    home, arch = EXPECTED[name][0], arch_of(name)
    tensors = values(small(name).shapes)
    path = save(tmp_path / "a.safetensors", tensors)
    before = effects(path, arch)
    companions = any(key.startswith("bundle_emb.") for key in tensors)
    written = []
    for dialect in DIALECTS:
        there = out(tmp_path, dialect, dialect)
        if companions and dialect != home:
            assert convert_or_refusal(path, there, dialect, arch) is None  # embeddings have no place elsewhere
            continue
        result = convert_or_refusal(path, there, dialect, arch)
        if result is None:
            continue
        written.append(dialect)
        assert result["dropped"] == result["kept"] == [] or companions
        assert result["tensors_in"] == len(tensors)
        after = effects(there, arch)
        error = worst(before, after)
        assert {site for site in after if after[site].any()} == {*before}, dialect
        assert result["sites"] == len({site.removesuffix(":bias") for site in before})
        other_kind = _cores(tensors) != _cores(load(there))  # a tucker core was worked into the factor beside it: no way back
        assert error <= (ROUNDED if other_kind else EXACT), dialect
        assert result["max_relative_error"] == 0
        assert result["exact"] is True
        back = out(tmp_path, f"{dialect}-back", home)
        convert(there, back, home, arch=arch)
        if other_kind:
            assert worst(before, effects(back, arch)) <= (ROUNDED if other_kind else EXACT), dialect
        elif dialect != home:
            assert same_bits(tensors, load(back)) == [], f"{home} -> {dialect} -> {home}"
    assert home in written


def _cores(tensors: Tensors) -> int:
    return sum("lora_mid" in key for key in tensors)


@pytest.mark.parametrize("name", [name for name in PLAIN if "onetrainer_legacy" not in name or "sdxl" not in name])
def test_awkward_and_missing_alphas(name: str, tmp_path: Path) -> None:
    """alpha = 0.7 rank, and none at all in the second blocks: keys come back, deltas within float32."""
    home, arch = EXPECTED[name][0], arch_of(name)
    tensors = values(small(name).shapes, ratio=0.7)
    dropped = [key for key in tensors if key.endswith(".alpha") and re.search(r"blocks?[._]1[._]|layers[._]1[._]", key)]
    tensors = {key: tensor for key, tensor in tensors.items() if key not in dropped}
    path = save(tmp_path / "a.safetensors", tensors)
    before = effects(path, arch)
    for dialect in ("kohya", "diffusers", "peft", "comfy"):
        there, back = out(tmp_path, dialect, dialect), out(tmp_path, f"{dialect}-back", home)
        if dialect == home or convert_or_refusal(path, there, dialect, arch) is None:
            continue
        assert worst(before, effects(there, arch)) <= ROUNDED, dialect
        convert(there, back, home, arch=arch)
        returned = load(back)
        assert set(returned) == set(tensors), f"{home} -> {dialect} -> {home}"
        assert worst(before, effects(back, arch)) <= ROUNDED, dialect
        for key, tensor in returned.items():
            if key.endswith(".alpha"):
                assert float(tensor) == pytest.approx(float(tensors[key]), rel=1e-6), key


@pytest.mark.parametrize("name", ["derived_chroma_onetrainer_legacy_r16", "derived_flux_onetrainer_omi_r16"])
def test_parts_of_a_fused_module_with_and_without_alpha(name: str, tmp_path: Path) -> None:
    """Scales 0.7 and 1 under one fused name: the function is kept, the fused file has one alpha for each module."""
    arch = arch_of(name)
    tensors = values(small(name).shapes, ratio=0.7)
    lost = [key for key in tensors if key.endswith(".alpha")][::3]
    path = save(tmp_path / "a.safetensors", {key: tensor for key, tensor in tensors.items() if key not in lost})
    convert(path, tmp_path / "b.safetensors", "kohya", arch=arch)
    assert worst(effects(path, arch), effects(tmp_path / "b.safetensors", arch)) <= ROUNDED


@pytest.mark.parametrize("name", FUSED)
def test_block_diagonal_factors_of_fused_modules(name: str, tmp_path: Path) -> None:
    """Split into parts of a share of the rank each, and put together again to the bit."""
    home, arch = EXPECTED[name][0], arch_of(name)
    tensors = values(small(name).shapes, blocks=True)
    path = save(tmp_path / "a.safetensors", tensors)
    before = effects(path, arch)
    for dialect in ("diffusers", "peft", "kohya-diffusers", "onetrainer", "omi"):
        there, back = out(tmp_path, dialect, dialect), out(tmp_path, f"{dialect}-back", home)
        if convert_or_refusal(path, there, dialect, arch) is None:
            continue
        assert worst(before, effects(there, arch)) <= EXACT, dialect
        convert(there, back, home, arch=arch)
        assert same_bits(tensors, load(back)) == [], f"{home} -> {dialect} -> {home}"


RENAMES = [
    ("derived_sd15_kohya_lora_r16", "comfy"),
    ("derived_sd15_lycoris_locon_tucker_r16_c8", "comfy"),
    ("derived_sdxl_kohya_lora_r32", "kohya-diffusers"),
    ("derived_sdxl_kohya_c3lier_r16_c8", "comfy"),
    ("derived_flux_kohya_te1_r16", "comfy"),
    ("derived_chroma_aitoolkit_r16", "kohya"),
    ("derived_wan21_i2v_14b_musubi_r32", "comfy"),
    ("derived_wan21_t2v_14b_aitoolkit_r32", "diffusers"),
    ("derived_lumina2_kohya_r8", "comfy"),
    ("derived_sd3m_kohya_r16", "comfy"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("name", "dialect"), RENAMES)
def test_renames_keep_every_bit(name: str, dialect: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Between dialects of one grouping nothing is computed: the multiset of tensors is the same, and so is the file that comes back."""
    tensors = values(small(name).shapes, dtype, ratio=0.7)
    path = save(tmp_path / "a.safetensors", tensors)
    there, back = tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    result = convert(path, there, dialect, arch=arch_of(name))
    assert result["exact"] is True
    assert result["max_relative_error"] == 0
    assert _digests(load(there)) == _digests(tensors)
    convert(there, back, EXPECTED[name][0], arch=arch_of(name))
    assert same_bits(tensors, load(back)) == []


def _digests(tensors: Tensors) -> list[str]:
    return sorted(
        hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest() for tensor in tensors.values() if tensor.dim()
    )


def test_a_key_table_spoiled(tmp_path: Path) -> None:
    """A half pair, a misspelt module and two tables in one file: each refused by name, with nothing written."""
    tensors = values(small("derived_sd15_kohya_lora_r16").shapes)
    first = next(key for key in tensors if key.endswith("to_q.lora_up.weight"))
    half = {key: tensor for key, tensor in tensors.items() if key != first}
    misspelt = {key.replace("mid_block_attentions_0_proj_in", "mid_block_attention_0_proj_in"): tensor for key, tensor in tensors.items()}
    wan = values(small("derived_wan21_t2v_14b_musubi_r32").shapes)
    for spoiled, word in (
        (half, first.removesuffix(".lora_up.weight")),
        (misspelt, "mid_block_attention_0_proj_in"),
        ({**tensors, **wan}, "lora_unet_blocks_0_self_attn_q"),
    ):
        path = save(tmp_path / "a.safetensors", spoiled)
        error = refusal(convert, path, tmp_path / "b.safetensors", "diffusers", arch="sd1")
        assert error.exit_code == 3
        assert word in told(error)
        assert not (tmp_path / "b.safetensors").exists()


def test_values_are_what_the_tables_readme_asks_for() -> None:
    """Two seeds away from each other and reproducible, or every test above compares nothing."""
    assert torch.equal(noise("a.b", (3, 3)), noise("a.b", (3, 3)))
    assert not torch.equal(noise("a.b", (3, 3)), noise("a.c", (3, 3)))

"""inspect on real files: which family a file is of, checkpoints of every layout, metadata, batches, and the time it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.mapping.architectures import registry
from loratools.operations.inspect import inspect
from tests.operations.made import Make, Save, width

Shapes = Mapping[str, tuple[int, ...]]
NATIVE = "diffusion_model."


@pytest.fixture
def sparse(tmp_path: Path) -> Callable[..., Path]:
    """A safetensors file of the given shapes in half precision: the header, then a hole that takes no disk."""

    def write(name: str, shapes: Shapes, metadata: Mapping[str, str] | None = None, padding: int = 0) -> Path:
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for key, shape in shapes.items():
            size = 2
            for number in shape:
                size *= number
            header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        if padding > end:
            header["first_stage_model.padding.weight"] = {"dtype": "U8", "shape": [padding - end], "data_offsets": [end, padding]}
            end = padding
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        return path

    return write


def pair(stem: str, out: int, in_: int, rank: int = 2) -> dict[str, tuple[int, ...]]:
    return {f"{stem}.lora_A.weight": (rank, in_), f"{stem}.lora_B.weight": (out, rank)}


def flux_attention() -> dict[str, tuple[int, ...]]:
    """ai-toolkit's keys without modulation: Flux.1 and Chroma have the same ones with the same shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for block in (0, 11, 18):
        shapes |= pair(f"{NATIVE}double_blocks.{block}.img_attn.qkv", 9216, 3072)
        shapes |= pair(f"{NATIVE}double_blocks.{block}.img_mlp.0", 12288, 3072)
        shapes |= pair(f"{NATIVE}single_blocks.{block}.linear1", 21504, 3072)
    return shapes


MODULATION = pair(f"{NATIVE}double_blocks.0.img_mod.lin", 18432, 3072)


# -------------------------------------------------------------------------------------------------------------- which family


def test_flux_without_modulation_may_be_chroma(sparse: Any, run: Any) -> None:
    result = inspect(path := sparse("either.safetensors", flux_attention()))
    assert (result["kind"], result["ambiguous"], result["architecture"]) == ("adapter", True, None)
    assert {"flux", "chroma"} <= {candidate["architecture"] for candidate in result["candidates"]}
    assert all(candidate["evidence"] for candidate in result["candidates"])
    assert run("inspect", path).exit_code == 0
    for command in (["convert", path, "--to", "kohya"], ["compare", path, path]):
        refused = run(*command)
        assert refused.exit_code == 3
        assert "--arch" in refused.stderr


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"ss_base_model_version": "chroma"}, "chroma"),
        ({"modelspec.architecture": "chroma/lora"}, "chroma"),
        ({"ss_base_model_version": "flux1"}, "flux"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "flux"),
        ({"ss_base_model_version": "None"}, None),
        ({}, None),
    ],
)
def test_metadata_settles_what_tensors_cannot(metadata: dict[str, str], expected: str | None, sparse: Any) -> None:
    result = inspect(sparse("either.safetensors", flux_attention(), metadata))
    assert (result["architecture"], result["ambiguous"]) == (expected, expected is None)
    assert inspect(sparse("either.safetensors", flux_attention(), metadata), arch="chroma")["architecture"] == "chroma"


@pytest.mark.parametrize("false", ["chroma", "sdxl_base_v1-0", "sd_v1"])
def test_tensors_beat_metadata_that_contradicts_them(false: str, sparse: Any) -> None:
    result = inspect(sparse("flux.safetensors", flux_attention() | MODULATION, {"ss_base_model_version": false}))
    assert (result["architecture"], result["ambiguous"]) == ("flux", False)
    assert [problem["code"] for problem in result["problems"]] == ["metadata-conflict"]
    assert false in result["problems"][0]["message"]


@pytest.mark.parametrize(
    "foreign", ["some.thing", f"{NATIVE}distilled_guidance_layer.norms.0.lora_A.weight", "lora_unet_x.alpha", "__note"]
)
def test_one_foreign_key_keeps_the_verdict(foreign: str, sparse: Any) -> None:
    shapes = flux_attention() | MODULATION
    result = inspect(sparse("foreign.safetensors", {foreign: (1,), **shapes}))
    assert (result["kind"], result["dialect"], result["architecture"]) == ("adapter", "comfy", "flux")
    assert result["unknown_keys"] == [foreign]
    assert result["adapter"]["modules"] == len(shapes) // 2


@pytest.mark.parametrize(
    ("stem", "out", "in_", "expected"),
    [
        (NATIVE + "layers.{}.attention.qkv", 3840, 2304, "lumina2"),
        (NATIVE + "layers.{}.attention.qkv", 11520, 3840, "z-image"),
        (NATIVE + "layers.{}.attention.to_q", 3840, 3840, "z-image"),
        ("transformer.layers.{}.attn.to_q", 2304, 2304, "lumina2"),
        ("transformer.layers.{}.attention.to_q", 3840, 3840, "z-image"),
    ],
)
def test_lumina2_and_z_image_share_names_and_differ_in_width(stem: str, out: int, in_: int, expected: str, sparse: Any) -> None:
    shapes = {key: shape for block in range(4) for key, shape in pair(stem.format(block), out, in_).items()}
    result = inspect(sparse("layers.safetensors", shapes))
    assert (result["architecture"], result["ambiguous"], result["unknown_keys"]) == (expected, False, [])


@pytest.mark.parametrize(("width", "expected"), [(2304, "lumina2"), (3840, "z-image")])
def test_fused_z_image_in_kohya_s_spelling(width: int, expected: str, sparse: Any) -> None:
    """musubi's converter for ComfyUI writes `lora_unet_layers_N_attention_qkv`, which is also Lumina-Image 2's name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for block in range(3):
        stem = f"lora_unet_layers_{block}_attention_qkv"
        shapes |= {f"{stem}.lora_down.weight": (4, width), f"{stem}.lora_up.weight": (3840 if width == 2304 else 11520, 4)}
    result = inspect(sparse("fused.safetensors", shapes))
    assert (result["dialect"], result["architecture"]) == ("kohya", expected)


def test_sd1_and_sd2_attention_alone_cannot_be_told_apart(sparse: Any) -> None:
    shapes = {}
    for block, channels in ((0, 320), (1, 640), (2, 1280)):
        shapes |= pair(f"unet.down_blocks.{block}.attentions.0.transformer_blocks.0.attn1.to_q", channels, channels)
    result = inspect(sparse("sd.safetensors", shapes))
    assert result["ambiguous"]
    assert {"sd1", "sd2"} <= {candidate["architecture"] for candidate in result["candidates"]}
    context = pair("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", 320, 1024)
    assert inspect(sparse("sd2.safetensors", shapes | context))["architecture"] == "sd2"


def test_an_unknown_adapter_is_not_called_sd1(sparse: Any, run: Any) -> None:
    """easydiffusion#2003: unknown = SD1."""
    path = sparse("new.safetensors", pair("zorp.stage.0.blub", 64, 64) | pair("zorp.stage.1.blub", 64, 64))
    result = inspect(path)
    assert (result["kind"], result["architecture"], result["ambiguous"]) == ("adapter", None, False)
    assert len(result["unknown_keys"]) == 4
    assert run("inspect", path).exit_code == 0
    assert run("convert", path, "--to", "kohya").exit_code == 3


def test_a_file_that_is_nothing_of_the_kind(save: Save, randn: Make, run: Any) -> None:
    result = run("inspect", save("x.safetensors", {"foo.bar": randn(2), "x": randn(3)}), "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["kind"] == "unknown"
    assert json.loads(run("inspect", save("none.safetensors", {}), "--json").stdout)["kind"] == "unknown"


# ------------------------------------------------------------------------------------------------------------- checkpoints


def shapes_of(architecture: str, namespace: str, dims: Mapping[str, int], prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Every weight of a denoiser, from the table's names, with widths of our own choice."""
    found: dict[str, tuple[int, ...]] = {}
    for name, row in registry()[architecture].component("denoiser").table.names(namespace):
        out = width(row.total_out, dims)
        in_ = width(row.in_, dims) if row.in_ else None
        if out is None or row.layer == "parameter" or (row.in_ and in_ is None):
            continue
        found[f"{prefix}{name}.weight"] = (out,) if in_ is None else (out, in_, *row.kernel)
    return found


FULL = {"c0": 320, "c1": 640, "c2": 1280, "temb": 1280, "ctx": 2048, "add": 2816, "latent": 4}
TINY = {"c0": 8, "c1": 16, "c2": 24, "c3": 24, "temb": 32, "ctx": 40, "add": 48, "latent": 4}


def test_a_single_file_of_the_original_layout(sparse: Any) -> None:
    shapes = shapes_of("sdxl", "orig", TINY, "model.diffusion_model.")
    rest = {
        "first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3),
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (8,),
        "conditioner.embedders.1.model.ln_final.weight": (8,),
    }
    result = inspect(sparse("model.safetensors", shapes | rest))
    assert (result["kind"], result["architecture"], result["dialect"]) == ("checkpoint", "sdxl", None)
    facts = result["checkpoint"]
    assert facts["layout"] == "ldm"
    assert facts["components"] == {"denoiser": len(shapes), "vae": 1, "text_encoder": 1, "text_encoder_2": 1}
    assert (facts["tensors"], facts["dtypes"]) == (len(shapes) + 3, {"F16": len(shapes) + 3})
    numbers = [torch.Size(shape).numel() for shape in (shapes | rest).values()]
    assert (facts["parameters"], facts["bytes"]) == (sum(numbers), 2 * sum(numbers))


def test_a_bare_file(sparse: Any) -> None:
    for prefix in ("", "diffusion_model."):
        result = inspect(sparse("bare.safetensors", shapes_of("sdxl", "orig", TINY, prefix)))
        assert (result["kind"], result["architecture"], result["checkpoint"]["layout"]) == ("checkpoint", "sdxl", "bare")


def test_a_diffusers_folder_and_its_shards(sparse: Any, tmp_path: Path) -> None:
    shapes = shapes_of("sdxl", "diff", TINY)
    sparse("unet/diffusion_pytorch_model.safetensors", shapes)
    (tmp_path / "unet/config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    result = inspect(tmp_path / "unet")
    assert (result["kind"], result["container"], result["architecture"]) == ("checkpoint", "diffusers", "sdxl")
    assert result["checkpoint"]["layout"] == "diffusers"
    names = list(shapes)
    half = len(names) // 2
    weight_map = {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        shard = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        sparse(f"sharded/{shard}", {name: shapes[name] for name in part})
        weight_map |= dict.fromkeys(part, shard)
    total = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (tmp_path / "sharded/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    sharded = inspect(tmp_path / "sharded")
    assert (sharded["kind"], sharded["container"], sharded["problems"]) == ("checkpoint", "shards", [])
    assert {**sharded["checkpoint"], "layout": None} == {**result["checkpoint"], "layout": None}


def test_a_pipeline_folder(sparse: Any, tmp_path: Path) -> None:
    shapes = shapes_of("sdxl", "diff", TINY)
    sparse("pipe/unet/diffusion_pytorch_model.safetensors", shapes)
    sparse("pipe/text_encoder/model.safetensors", {"text_model.final_layer_norm.weight": (8,)})
    sparse("pipe/vae/diffusion_pytorch_model.safetensors", {"encoder.conv_in.weight": (8, 3, 3, 3)})
    parts = {name: ["diffusers", "X"] for name in ("unet", "text_encoder", "vae")}
    (tmp_path / "pipe/model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline", **parts}))
    result = inspect(tmp_path / "pipe")
    assert (result["kind"], result["container"], result["architecture"]) == ("checkpoint", "diffusers", "sdxl")
    assert result["checkpoint"]["components"] == {"denoiser": len(shapes), "text_encoder": 1, "vae": 1}


def test_sharded_language_model(sparse: Any, tmp_path: Path) -> None:
    shards = {
        "model-00001-of-00002.safetensors": {"model.embed_tokens.weight": (64, 32), "model.layers.0.self_attn.q_proj.weight": (32, 32)},
        "model-00002-of-00002.safetensors": {
            "model.layers.1.mlp.up_proj.weight": (48, 32),
            "model.norm.weight": (32,),
            "lm_head.weight": (64, 32),
        },
    }
    for name, shapes in shards.items():
        sparse(f"llm/{name}", shapes)
    weight_map = {key: name for name, shapes in shards.items() for key in shapes}
    total = sum(2 * torch.Size(shape).numel() for shapes in shards.values() for shape in shapes.values())
    (tmp_path / "llm/model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    result = inspect(tmp_path / "llm")
    assert (result["kind"], result["container"], result["checkpoint"]["layout"]) == ("checkpoint", "shards", "hf")
    assert (result["checkpoint"]["tensors"], result["checkpoint"]["components"]) == (5, {"model": 5})


def test_a_lora_left_inside_a_checkpoint_is_no_adapter(sparse: Any, run: Any) -> None:
    shapes = shapes_of("sdxl", "orig", TINY, "model.diffusion_model.")
    inside = {"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": (2, 16), "lora_unet_input_blocks_4_1_proj_in.lora_up.weight": (16, 2)}
    path = sparse("mixed.safetensors", shapes | inside)
    result = inspect(path)
    assert (result["kind"], result["architecture"], result["checkpoint"]["tensors"]) == ("checkpoint", "sdxl", len(shapes) + 2)
    assert [problem["code"] for problem in result["problems"]] == ["adapter-inside"]
    for command in (["convert", path, "--to", "comfy"], ["compare", path, path]):
        refused = run(*command)
        assert refused.exit_code == 3
        assert "checkpoint" in refused.stderr
    assert os.listdir(path.parent) == ["mixed.safetensors"]


@pytest.mark.parametrize("witness", ["optimizer.bin", "random_states_0.pkl", "train_state.json", "trainer_state.json"])
def test_a_training_state(witness: str, sparse: Any, run: Any) -> None:
    folder = sparse("checkpoint-100/model.safetensors", pair("unet.x", 4, 4)).parent
    (folder / witness).write_bytes(b"\x80\x04never read")
    result = run("inspect", folder, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["kind"] == "training-state"


# -------------------------------------------------------------------------------------------------- cost, metadata, batches


def test_seven_gigabytes_of_checkpoint_cost_a_header(sparse: Any) -> None:
    """Peers import torch for 5-8 s and turn every weight into a Python float."""
    path = sparse("sd_xl.safetensors", shapes_of("sdxl", "orig", FULL, "model.diffusion_model."), padding=7_000_000_000)
    assert path.stat().st_size > 7_000_000_000
    assert path.stat().st_blocks * 512 < 10_000_000
    code = """
import json, sys
from loratools.operations.inspect import inspect
result = inspect(sys.argv[1])
print(json.dumps([result["architecture"], result["checkpoint"]["layout"], [name for name in ("torch", "numpy") if name in sys.modules]]))
"""
    said = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert json.loads(said.stdout) == ["sdxl", "ldm", []]


WEIRD = {
    "ss_v2": "False",
    "ss_network_dim": "None",
    "ss_network_args": "{broken",
    "ss_tag_frequency": json.dumps({"5_ohwx person": {f"tag {number}": 1 for number in range(60_000)}}),
    "modelspec.trigger_phrase": "None",
    "ss_steps": "1e999",
    "": "empty key",
    "deep": "[" * 5000,
}


def test_metadata_is_read_with_tolerance(save: Save, randn: Make, run: Any) -> None:
    """bool("False") is True and int("None") raises: in a peer, both."""
    stem = "lora_unet_up_blocks_3_attentions_0_proj_in"
    tensors = {f"{stem}.lora_down.weight": randn(4, 16, 1, 1), f"{stem}.lora_up.weight": randn(16, 4, 1, 1)}
    path = save("weird.safetensors", tensors, WEIRD)
    assert len(WEIRD["ss_tag_frequency"]) > 900_000
    result = inspect(path)
    assert result["metadata"] == WEIRD
    assert result["architecture"] == "sd1"  # ss_v2 = "False" is no SD2
    assert result["trigger_words"] == ["ohwx person"]
    page = run("inspect", path)
    assert page.exit_code == 0
    assert len(page.stdout) < 20_000
    assert run("inspect", path, "--metadata", "ss_network_dim").stdout == "None\n"


TRIGGERS = {
    "modelspec": ({"modelspec.trigger_phrase": "ohwx style"}, ["ohwx style"]),
    "sd-scripts": (
        {"ss_tag_frequency": '{"10_sks dog": {"sks dog": 20, "outdoors": 3}}', "ss_dataset_dirs": '{"10_sks dog": {"img_count": 20}}'},
        ["sks dog"],
    ),
    "ai-toolkit": ({"software": '{"name": "ai-toolkit", "trigger_word": "p3r5on"}'}, ["p3r5on"]),
    "ai-toolkit, training info": ({"training_info": '{"step": 9}', "trigger_word": "zxc"}, ["zxc"]),
    "none": ({"ss_output_name": "thing"}, []),
}


@pytest.mark.parametrize("source", TRIGGERS)
def test_trigger_words(source: str, save: Save, randn: Make, run: Any) -> None:
    metadata, expected = TRIGGERS[source]
    path = save("trigger.safetensors", {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": randn(4, 16)}, metadata)
    assert json.loads(run("inspect", path, "--json").stdout)["trigger_words"] == expected
    key = next(iter(metadata))
    assert run("inspect", path, "--metadata", key).stdout == metadata[key] + "\n"


def test_private_paths_are_flagged_and_none_are_added(save: Save, randn: Make, run: Any, tmp_path: Path) -> None:
    """sd-scripts#151, kohya-trainer#267: a published file tells its maker's home folder."""
    stem = "lora_unet_up_blocks_3_attentions_0_proj_in"
    tensors = {
        f"{stem}.lora_down.weight": randn(4, 16, 1, 1),
        f"{stem}.lora_up.weight": randn(16, 4, 1, 1),
        f"{stem}.alpha": torch.tensor(2.0),
    }
    leaking = save("leaking.safetensors", tensors, {"ss_train_data_dir": "/home/alice/pictures", "ss_steps": "5"})
    found = [problem for problem in inspect(leaking)["problems"] if problem["code"] == "private-metadata"]
    assert [problem["site"] for problem in found] == ["ss_train_data_dir"]
    clean = save("clean.safetensors", tensors, {"ss_steps": "5"})
    outputs = {"diffusers": tmp_path / "d.safetensors", "comfy": tmp_path / "c.safetensors", "peft": tmp_path / "p"}
    for dialect, out in outputs.items():
        assert run("convert", clean, out, "--to", dialect).exit_code == 0
        files = [out] if out.is_file() else [file for file in out.rglob("*") if file.is_file()]
        for file in files:
            assert os.fsencode(tmp_path) not in file.read_bytes()
            assert b"/home/" not in file.read_bytes()
        if out.is_file():
            assert not inspect(out)["problems"]


def test_a_bad_file_in_a_batch_hides_no_other(save: Save, randn: Make, run: Any, tmp_path: Path) -> None:
    """Lora-Manager#1071: a batch stops at the first bad file."""
    tensors = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": randn(4, 16)}
    one, two = save("one.safetensors", tensors), save("two.safetensors", tensors)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(one.read_bytes()[:-12])
    result = run("inspect", one, torn, two, "--json")
    assert result.exit_code == 3
    files = json.loads(result.stdout)["files"]
    assert [Path(entry["path"]).name for entry in files] == ["one.safetensors", "torn.safetensors", "two.safetensors"]
    assert [entry.get("kind") for entry in files] == ["adapter", None, "adapter"]
    assert "12 bytes missing" in files[1]["error"]["message"]

"""The tiny checkpoints are what their names say: diffusers' and transformers' own readers get the same tensors back from each."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from fixtures import checkpoints, language_models, make
from loratools.operations.inspect import inspect
from tests.parity.merging import NOT_READ, pipeline_class, read_flux, read_single

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], but: tuple[str, ...] = ()) -> None:
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if key not in but and not torch.equal(found[key], wanted[key])] == []


# ------------------------------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("architecture", checkpoints.ARCHITECTURES)
@pytest.mark.parametrize("how", ["plain", "shards", "variant"])
def test_folders_load_and_hold_the_models(architecture: str, how: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"plain": {}, "shards": {"max_shard_size": "60KB"}, "variant": {"variant": "fp16"}}[how]
    dtype = "float16" if how == "variant" else "float32"
    path = checkpoints.folder(architecture, tmp_path / "base", dtype, **options)
    variant = {"variant": "fp16"} if how == "variant" else {}
    loaded = pipeline_class(architecture).from_pretrained(path, local_files_only=True, torch_dtype=getattr(torch, dtype), **variant)
    for folder, model in checkpoints.models(architecture).models.items():
        same(dict(getattr(loaded, folder).state_dict()), checkpoints.state(model, dtype))
        weights = sorted(file.name for file in (path / folder).glob("*.safetensors"))
        if how == "variant":
            assert weights == [next(name for name in weights if name.endswith(".fp16.safetensors"))]
        elif how == "plain":
            assert len(weights) == 1
    assert bool(list(path.glob("*/*.index.json"))) == (how == "shards")
    tokens = loaded.tokenizer("ab", return_tensors="pt").input_ids
    assert int(tokens.max()) < make.VOCABULARY


def test_a_clip_folder_has_the_published_names_unless_asked_otherwise(tmp_path: Path) -> None:
    for published in (True, False):
        path = checkpoints.folder("sd1", tmp_path / str(published), published=published)
        keys = load_file(path / "text_encoder" / "model.safetensors").keys()
        assert {key.startswith("text_model.") for key in keys} == {published}
    checkpoints.folder("sd1", tmp_path / "shards", max_shard_size="20KB")
    index = json.loads((tmp_path / "shards" / "text_encoder" / "model.safetensors.index.json").read_text())
    for key, file in index["weight_map"].items():
        assert key.startswith("text_model.")
        assert key in load_file(tmp_path / "shards" / "text_encoder" / file)


# ------------------------------------------------------------------------------------------------------------------ single files


@pytest.mark.parametrize("architecture", checkpoints.ARCHITECTURES)
def test_diffusers_reads_the_single_file_as_the_same_models(architecture: str, tmp_path: Path) -> None:
    """`from_single_file` with the folder's configs: every component, to the bit."""
    config = checkpoints.folder(architecture, tmp_path / "config")
    path = checkpoints.single(architecture, tmp_path / "single.safetensors")
    found = read_single(architecture, path, config)
    for folder, model in checkpoints.models(architecture).models.items():
        same(found[folder], checkpoints.state(model), NOT_READ.get((architecture, folder), ()))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."], ids=["bare", "prefixed"])
def test_diffusers_reads_flux_alone_as_the_same_transformer(prefix: str, tmp_path: Path) -> None:
    tensors = load_file((checkpoints.flux_prefixed if prefix else checkpoints.flux_bare)(tmp_path / "flux.safetensors"))
    assert {key.startswith("model.diffusion_model.") for key in tensors} == {prefix != ""}
    same(read_flux({key.removeprefix(prefix): value for key, value in tensors.items()}), _transformer())


def test_diffusers_reads_sd35_as_the_same_transformer(tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    tensors = load_file(checkpoints.sd35_bare(tmp_path / "sd35.safetensors"))
    assert "joint_blocks.1.x_block.attn2.qkv.weight" in tensors
    same(convert_sd3_transformer_checkpoint_to_diffusers(tensors), checkpoints.state(checkpoints.sd35_transformer()))


def _transformer() -> dict[str, torch.Tensor]:
    return checkpoints.state(checkpoints.models("flux").models["transformer"])


@pytest.mark.parametrize("architecture", checkpoints.ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_have_the_dtype_asked_for_and_buffers_their_own(architecture: str, dtype: str, tmp_path: Path) -> None:
    path = checkpoints.single(architecture, tmp_path / "single.safetensors", dtype)
    with safe_open(path, "pt") as file:
        dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    others = {key for key, found in dtypes.items() if found != _DTYPES[dtype]}
    assert others == set(checkpoints._others(architecture))
    assert len(others) >= 1


def test_the_metadata_names_the_hash_of_the_payload(tmp_path: Path) -> None:
    path = checkpoints.single("sd1", tmp_path / "single.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    raw = path.read_bytes()
    payload = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert metadata["modelspec.hash_sha256"] == "0x" + hashlib.sha256(payload).hexdigest()
    assert metadata["workshop.note"]


def test_sd1_has_what_a_merge_must_carry_along(tmp_path: Path) -> None:
    tensors = load_file(checkpoints.single("sd1", tmp_path / "single.safetensors"))
    unet = [key for key in tensors if key.startswith("model.diffusion_model.")]
    assert [key for key in unet if "model_ema." + key.removeprefix("model.").replace(".", "") not in tensors] == []
    assert tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"].dtype == torch.int64
    assert tensors["model_ema.num_updates"].dtype == torch.int32
    pickled = torch.load(checkpoints.sd1_ckpt(tmp_path / "sd1.ckpt"), weights_only=True)
    same(pickled["state_dict"], tensors)


@pytest.mark.parametrize("architecture", checkpoints.ARCHITECTURES)
def test_every_form_of_an_architecture_is_recognised(architecture: str, tmp_path: Path) -> None:
    folder = checkpoints.folder(architecture, tmp_path / "folder")
    file = checkpoints.single(architecture, tmp_path / "single.safetensors", "float16")
    assert (inspect(folder)["architecture"], inspect(folder)["checkpoint"]["layout"]) == (architecture, "diffusers")
    assert (inspect(file)["architecture"], inspect(file)["checkpoint"]["layout"]) == (architecture, "ldm")


# -------------------------------------------------------------------------------------------------------------- fp8, language models


@pytest.mark.parametrize(("dtype", "step"), [("float8_e4m3fn", 2**-4), ("float8_e5m2", 2**-3)])
def test_scaled_codes_are_the_weights_within_half_a_step(dtype: str, step: float, tmp_path: Path) -> None:
    tensors = load_file(checkpoints.flux_scaled_fp8(tmp_path / "scaled.safetensors", dtype))
    wanted = checkpoints.flux_tensors()
    matrices = [key for key, value in wanted.items() if value.dim() == 2]
    assert len(matrices) == 50 - 2 * (6 - 2) - 2 * (4 - 1)  # diffusers' layers, less those that are rows of one
    assert tensors.keys() == wanted.keys() | {key.removesuffix("weight") + "scale_weight" for key in matrices} | {"scaled_fp8"}
    for key in matrices:
        codes, scale = tensors[key], tensors[key.removesuffix("weight") + "scale_weight"]
        assert (codes.dtype, scale.dtype, scale.shape) == (getattr(torch, dtype), torch.float32, ())
        error = (codes.double() * scale.double() - wanted[key].double()).abs()
        smallest = torch.finfo(getattr(torch, dtype)).tiny
        assert bool((error <= step * wanted[key].double().abs().clamp(min=smallest * float(scale))).all()), key
    plain = load_file(checkpoints.flux_fp8(tmp_path / "plain.safetensors", dtype))
    assert {value.dtype for value in plain.values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize(("tied", "shards"), [(False, None), (True, None), (False, "20KB"), (True, "20KB")])
def test_llama_loads_offline(tied: bool, shards: str | None, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = language_models.llama_folder(tmp_path / "llama", "bfloat16", tied=tied, max_shard_size=shards)
    loaded = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype=torch.bfloat16)
    same(dict(loaded.state_dict()), checkpoints.state(make.llama(tied=tied), "bfloat16"))
    files = sorted(path.glob("*.safetensors"))
    assert (len(files) > 1, (path / "model.safetensors.index.json").exists()) == (shards is not None,) * 2
    assert any("lm_head.weight" in load_file(file) for file in files) != tied
    assert (path / "generation_config.json").exists()
    assert AutoTokenizer.from_pretrained(path, local_files_only=True)("w1 w2").input_ids == [4, 5]
    assert inspect(path)["checkpoint"]["layout"] == "hf"


def test_other_language_models(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    same(load_file(language_models.llama_single(tmp_path / "llama.safetensors")), checkpoints.state(make.llama()))
    loaded = AutoModelForCausalLM.from_pretrained(language_models.gpt2_folder(tmp_path / "gpt2"), local_files_only=True)
    same(dict(loaded.state_dict()), checkpoints.state(language_models.gpt2()))
    assert tuple(loaded.transformer.h[0].mlp.c_fc.weight.shape) == (32, 32)
    assert tuple(loaded.transformer.h[0].attn.c_attn.weight.shape) == (32, 96)  # (in, out)

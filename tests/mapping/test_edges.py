"""Conversions, containers and headers at their edges: what a small slip in one line would change."""

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loratools.adapters.kinds import build
from loratools.errors import MalformedError, UnsafeError
from loratools.mapping.read import analyse, read
from loratools.operations.convert import convert
from loratools.tensors.dtypes import torch_dtype
from loratools.tensors.lazy import BytesTensor, from_torch, scalar_tensor
from loratools.tensors.pickles import scan_pickle
from loratools.tensors.reader import open_source
from loratools.tensors.writer import TensorSink
from tests.mapping.builders import delta, lora, noise, rel, save

BLOCK = "lora_unet_up_blocks_3_attentions_0_"
PROJ = lora(f"{BLOCK}proj_in", (16, 16, 1, 1))
Q = f"{BLOCK}transformer_blocks_0_attn1_to_q"
SITE = "up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q"
LLM = "base_model.model.model.layers.0.self_attn.q_proj"


def meta(path):
    with safe_open(path, "pt") as f:
        return f.metadata()


def test_a_part_without_alpha_beside_parts_with_their_rank(tmp_path):
    double = "transformer.transformer_blocks.0"

    def flux(*modules):
        return {k: v for m in modules for k, v in m.items()}

    parts = [
        lora(f"{double}.attn.to_{n}", (16, 16), rank=r, alpha=a, scheme="peft")
        for n, r, a in (("q", 4, None), ("k", 8, 8.0), ("v", 16, 16.0))
    ]
    source = flux(lora("transformer.x_embedder", (16, 8), alpha=None, scheme="peft"), *parts)
    convert(save(tmp_path / "a.safetensors", source), tmp_path / "b.safetensors", "kohya", arch="flux")
    expected = torch.cat([delta(source, f"{double}.attn.to_{name}") for name in "qkv"])
    assert rel(delta(load_file(tmp_path / "b.safetensors"), "lora_unet_double_blocks_0_img_attn_qkv"), expected) <= 1e-6


@pytest.mark.parametrize(("stored", "fits"), [(8.5, False), (8.05, False), (8.02, True)])
def test_records_of_alpha_differ_by_less_than_a_rounding_of_bf16(stored, fits, tmp_path):
    stem = f"unet.{SITE}"
    tensors = {
        **lora("unet.up_blocks.3.attentions.0.proj_in", (16, 16, 1, 1), alpha=None, scheme="peft"),
        **lora(stem, (16, 16), alpha=stored, scheme="peft"),
    }
    header = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8})}
    found = {finding.code for finding in analyse(open_source(save(tmp_path / "a.safetensors", tensors, header))).errors}
    assert ("alpha-conflict" in found) is not fits


def test_rslora_holds_for_patterns_too(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    save(folder / "adapter_model.safetensors", lora(LLM, (8, 8), rank=16, alpha=None, scheme="peft"))
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 99, "alpha_pattern": {"q_proj": 2}, "use_rslora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert next(iter(read(folder).modules.values()))[0].scale == pytest.approx(0.5)


def test_the_scan_follows_the_memo(tmp_path):
    code = b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x8c\x0bcollections\x8c\x0bOrderedDict0000h\x00h\x01\x93."
    (tmp_path / "x.pkl").write_bytes(code)
    with pytest.raises(UnsafeError, match=r"posix\.system"):
        scan_pickle(tmp_path / "x.pkl")


def test_a_folder_called_blobs_elsewhere_is_no_cache(tmp_path):
    from tests.tensors.test_reader import SHARDS, sharded

    folder, other = sharded(tmp_path / "model"), tmp_path / "blobs"
    other.mkdir()
    (folder / SHARDS[0]).rename(other / "x")
    (folder / SHARDS[0]).symlink_to(other / "x")
    with pytest.raises(UnsafeError):
        open_source(folder)


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "model_index.json"])
def test_a_configuration_that_leaves_the_folder(name, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, folder / ("adapter_model.safetensors" if name.startswith("adapter") else "model.safetensors"))
    (tmp_path / "outside.json").write_text("{}")
    (folder / name).symlink_to(tmp_path / "outside.json")
    with pytest.raises(UnsafeError, match=name):
        open_source(folder)


@pytest.mark.parametrize("name", ["F4", "F6_E2M3", "F6_E3M2"])
def test_formats_torch_does_not_have(name):
    with pytest.raises(MalformedError, match=name):
        torch_dtype(name)
    factors = {"up": BytesTensor(b"\0" * 12, name, (4, 4)), "down": scalar_tensor(0.0).__class__(b"\0" * 64, "F32", (4, 4))}
    assert "bad-dtype" in {code for module in build(factors) for _, code, _ in module.problems()}


def test_a_loaded_tensor_is_a_copy():
    stored = scalar_tensor(2.0)
    stored.load().mul_(3)
    assert stored.scalar() == 2.0


def test_a_header_above_the_limit(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(100_000_100)
    with pytest.raises(MalformedError, match="100000001 is above the limit"):
        open_source(path)


def test_the_index_comes_last(tmp_path, monkeypatch):
    moved, real = [], os.rename
    monkeypatch.setattr(os, "rename", lambda source, target: (moved.append(Path(target).name), real(source, target))[1])
    with TensorSink(tmp_path / "out.safetensors", {}, max_shard_bytes=2) as sink:
        for name in "ab":
            sink.declare(name, "U8", (2,))
        for name in "ab":
            sink.write(name, BytesTensor(b"xy", "U8", (2,)))
    assert moved[-1] == "out.safetensors.index.json"
    assert len(moved) == 3


def test_alpha_in_bf16_that_is_another_number_in_fp16(tmp_path):
    tensors = {**PROJ, **lora(Q, (16, 16), alpha=None), f"{Q}.alpha": torch.tensor(3.0, dtype=torch.bfloat16)}
    found = {str(site): modules[0].alpha for site, modules in read(save(tmp_path / "a.safetensors", tensors)).modules.items()}
    assert found[f"denoiser.{SITE}"] == 3.0


def test_metadata_in_one_order_in_every_process(tmp_path):
    path, digests = save(tmp_path / "a.safetensors", {**PROJ, **lora(Q, (16, 16))}), set()
    for seed in "0123":
        out = tmp_path / f"{seed}.safetensors"
        subprocess.run(
            [sys.executable, "-m", "loratools", "convert", str(path), str(out), "--to", "comfy"],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
        )
        digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_carried_metadata_keeps_its_order(tmp_path):
    from loratools.tensors.reader import open_source
    from loratools.tensors.writer import write_safetensors

    entries = {"zebra": "1", "ss_network_dim": "4", "author": "me"}
    tensors = {key: from_torch(value) for key, value in {**PROJ, **lora(Q, (16, 16))}.items()}
    write_safetensors(tmp_path / "a.safetensors", tensors, entries)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "comfy")
    found = list(open_source(tmp_path / "b.safetensors").metadata)
    assert found[:3] == list(entries)
    assert found[3:] == sorted(found[3:])


def test_lineage_and_mixed_ranks(tmp_path):
    tensors = {**PROJ, **lora(Q, (16, 16), rank=2, alpha=1.0)}
    path = save(tmp_path / "a.safetensors", tensors, {"ss_network_dim": "4", "ss_network_alpha": "2"})
    convert(path, tmp_path / "b.safetensors", "comfy")
    found = meta(tmp_path / "b.safetensors")
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert (found["loratools.converted_from"], found["loratools.dialect"], found["loratools.source"]) == ("kohya", "comfy", "a.safetensors")


def test_a_tensor_without_a_fate_is_a_defect():
    from loratools.errors import LoraToolsError
    from loratools.report import Report

    report = Report(mapped={"a"}, kept=["b"], dropped={"c": "unknown"})
    report.check_complete(["a", "b", "c"])
    with pytest.raises(LoraToolsError) as caught:
        report.check_complete(["a", "d", "b", "e"])
    assert caught.value.details == ["d", "e"]


def test_xlabs_streams(tmp_path):
    stem = "lora_unet_double_blocks_0_"
    tensors = {
        **lora(f"{stem}img_attn_proj", (16, 16), alpha=None),
        **lora(f"{stem}txt_attn_proj", (16, 16), alpha=None),
        **lora(f"{stem}img_attn_qkv", (48, 16), alpha=None),
        **lora(f"{stem}txt_attn_qkv", (48, 16), alpha=None),
    }
    convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", "xlabs", arch="flux")
    found = load_file(tmp_path / "b.safetensors")
    for name, processor in (
        ("img_attn_proj", "proj_lora1"),
        ("txt_attn_proj", "proj_lora2"),
        ("img_attn_qkv", "qkv_lora1"),
        ("txt_attn_qkv", "qkv_lora2"),
    ):
        assert torch.equal(found[f"double_blocks.0.processor.{processor}.up.weight"], tensors[f"{stem}{name}.lora_up.weight"])


def test_open_clip_rows_are_q_k_v():
    from loratools.mapping.architectures.text_encoders import CLIP

    (match,) = CLIP.by_name("open_clip", "transformer.resblocks.3.attn.in_proj")
    assert [site.rpartition(".")[2] for site in match.sites] == ["q_proj", "k_proj", "v_proj"]


def test_equal_shapes_are_not_equal_downs(tmp_path):
    double = "transformer.transformer_blocks.0"
    source = {k: v for n in "qkv" for k, v in lora(f"{double}.attn.to_{n}", (16, 16), rank=4, alpha=None, scheme="peft").items()}
    source |= lora("transformer.x_embedder", (16, 8), alpha=None, scheme="peft")
    convert(save(tmp_path / "a.safetensors", source), tmp_path / "b.safetensors", "kohya", arch="flux")
    found, stem = load_file(tmp_path / "b.safetensors"), "lora_unet_double_blocks_0_img_attn_qkv"
    assert found[f"{stem}.lora_down.weight"].shape == (12, 16)
    assert rel(delta(found, stem), torch.cat([delta(source, f"{double}.attn.to_{n}") for n in "qkv"])) <= 1e-6


def test_an_absent_part_has_its_own_height(tmp_path):
    """linear1 = q, k, v (h rows) and proj_mlp (mlp rows): only q there, mlp told by another module."""
    single = "transformer.single_transformer_blocks.0"
    source = {
        **lora(f"{single}.attn.to_q", (16, 16), alpha=None, scheme="peft"),
        **lora(f"{single}.proj_out", (16, 64 + 16), alpha=None, scheme="peft"),
    }
    convert(save(tmp_path / "a.safetensors", source), tmp_path / "b.safetensors", "kohya", arch="flux")
    assert load_file(tmp_path / "b.safetensors")["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (3 * 16 + 64, 4)


def test_a_linear_layer_stored_with_four_dimensions(tmp_path):
    factors = lora(Q, (16, 16, 1, 1))
    assert factors[f"{Q}.lora_down.weight"].dim() == 4
    convert(save(tmp_path / "a.safetensors", {**PROJ, **factors}), tmp_path / "b.safetensors", "diffusers")
    found = load_file(tmp_path / "b.safetensors")
    assert found[f"unet.{SITE}.lora_A.weight"].shape == (4, 16)
    assert found[f"unet.{SITE}.lora_B.weight"].shape == (16, 4)
    assert found["unet.up_blocks.3.attentions.0.proj_in.lora_A.weight"].dim() == 4


def test_flat_factors_of_a_convolution_come_back_flat(tmp_path):
    tensors = {**PROJ, **lora(f"{BLOCK}proj_out", (16, 16))}
    convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", "diffusers", arch="sd1")
    assert load_file(tmp_path / "b.safetensors")["unet.up_blocks.3.attentions.0.proj_out.lora_A.weight"].dim() == 4
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya")
    found = load_file(tmp_path / "c.safetensors")
    assert {key: tensor.shape for key, tensor in found.items()} == {key: tensor.shape for key, tensor in tensors.items()}


def test_which_prefix_an_encoder_is_written_with(tmp_path):
    attention = "text_model.encoder.layers.0.self_attn.q_proj"
    sd1 = {
        **lora("unet.up_blocks.3.attentions.0.proj_in", (16, 16, 1, 1), alpha=None, scheme="peft"),
        **lora(f"text_encoder.{attention}", (12, 12), alpha=None, scheme="peft"),
    }
    flux = {
        **lora("transformer.x_embedder", (16, 8), alpha=None, scheme="peft"),
        **lora(f"text_encoder.{attention}", (12, 12), alpha=None, scheme="peft"),
        **lora("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q", (20, 20), alpha=None, scheme="peft"),
    }
    for arch, source, dialect, expected in (
        ("sd1", sd1, "kohya", {"lora_unet", "lora_te"}),
        ("sd1", sd1, "onetrainer", {"lora_unet", "lora_te"}),
        ("flux", flux, "kohya", {"lora_unet", "lora_te1", "lora_te3"}),
        ("flux", flux, "onetrainer", {"lora_transformer", "lora_te1", "lora_te2"}),
    ):
        out = tmp_path / f"{arch}.{dialect}.safetensors"
        convert(save(tmp_path / f"{arch}.safetensors", source), out, dialect, arch=arch)
        assert {"_".join(key.split("_")[:2]) for key in load_file(out)} == expected


def test_scaling_leaves_its_input_alone():
    from loratools.adapters import factors

    values = torch.ones(2, 2)
    assert float(factors.scaled(from_torch(values), 3.0).load()[0, 0]) == 3.0
    assert torch.equal(values, torch.ones(2, 2))


def test_a_scale_that_bf16_does_not_hold_is_multiplied_before_the_one_rounding():
    from fractions import Fraction

    from loratools.adapters.factors import spread

    first, second = (noise(name, (8, 8)).bfloat16() for name in "ab")
    found = spread(from_torch(first), from_torch(second), Fraction(7, 5))
    assert found.rounded
    assert torch.equal(found.first.load(), (first.double() * 1.4).bfloat16())
    assert torch.equal(found.second.load(), second)

"""Which files a checkpoint is made of: every file of the folder is weights, index, copied, or left out with a reason."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools.errors import InputError, LoraToolsError, MalformedError, UnsafeError
from loratools.tensors.layout import Layout, layout_of
from loratools.tensors.reader import open_source

TENSOR = {"w": torch.arange(4.0)}


def put(folder: Path, *names: str) -> Path:
    """Files by their names: weights with one tensor, an index for the shards of the same stem, a line of text for the rest."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file({f"w.{path.name}" if "-of-" in name else "w": TENSOR["w"]}, path)
        elif name.endswith((".bin", ".ckpt", ".pt")):
            torch.save({f"w.{path.name}" if "-of-" in name else "w": TENSOR["w"]}, path)
        elif ".index." in name:
            shards = [other for other in names if Path(other).parent == Path(name).parent and "-of-" in other]
            kind = "bin" if ".bin." in name else "safetensors"
            names_of = [Path(shard).name for shard in shards if shard.endswith(kind) and (".fp16" in shard) == ("fp16" in name)]
            weight_map = {f"w.{shard}": shard for shard in names_of}
            path.write_text(json.dumps({"metadata": {"total_size": 16 * len(weight_map)}, "weight_map": weight_map}))
        else:
            path.write_text(f"text of {name}\n")
    return folder


def told(layout: Layout) -> tuple[dict[str, str], dict[str, str], list[str], dict[str, str]]:
    """The four lists with names relative to the source's folder."""
    weights = {str(path.relative_to(layout.root)): str(name) for path, name in layout.weights.items()}
    indexes = {str(path.relative_to(layout.root)): str(name) for path, name in layout.indexes.items()}
    return weights, indexes, [str(path) for path in layout.copies], {str(path): reason for path, reason in layout.left_out}


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "odd name"])
def test_one_file_is_out_itself(name: str, tmp_path: Path) -> None:
    path = put(tmp_path, "x.safetensors" if name == "odd name" else name, "beside.txt") / name
    if name == "odd name":
        (tmp_path / "x.safetensors").rename(path)
    layout = layout_of(open_source(path))
    assert (layout.folder, dict(layout.weights), layout.copies, layout.left_out) == (False, {path: Path()}, (), ())
    save_file(TENSOR, tmp_path / "again.safetensors", {"format": "pt"} if name.endswith("ckpt") else None)
    assert layout.nbytes == (tmp_path / "again.safetensors").stat().st_size


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize("given", ["", "model.safetensors.index.json"])
def test_shards_are_a_folder(given: str, tmp_path: Path) -> None:
    """The path of the index means the folder that holds it."""
    put(tmp_path, *SHARDS, "model.safetensors.index.json", "config.json", "tokenizer/vocab.json", ".gitattributes")
    layout = layout_of(open_source(tmp_path / given))
    assert layout.folder
    assert layout.root == tmp_path
    weights, indexes, copies, left_out = told(layout)
    assert weights == {name: name for name in SHARDS}
    assert indexes == {"model.safetensors.index.json": "model.safetensors.index.json"}
    assert copies == [".gitattributes", "config.json", "tokenizer/vocab.json"]
    assert left_out == {}
    assert layout.nbytes == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())


def test_pickles_get_the_names_of_safetensors(tmp_path: Path) -> None:
    shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    put(tmp_path, *shards, "pytorch_model.bin.index.json", "config.json", "training_args.bin", "tf_model.h5", "flax_model.msgpack")
    weights, indexes, copies, left_out = told(layout_of(open_source(tmp_path)))
    assert weights == dict(zip(shards, SHARDS, strict=True))
    assert indexes == {"pytorch_model.bin.index.json": "model.safetensors.index.json"}
    assert copies == ["config.json", "training_args.bin"]  # the Trainer's options are no weights
    assert set(left_out) == {"tf_model.h5", "flax_model.msgpack"}


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("pytorch_model.bin", "model.safetensors"),
        ("pytorch_model.fp16.bin", "model.fp16.safetensors"),
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
        ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors"),
        ("pytorch_lora_weights.bin", "pytorch_lora_weights.safetensors"),
        ("model.safetensors", "model.safetensors"),
        ("my own name.safetensors", "my own name.safetensors"),
    ],
)
def test_names(name: str, target: str, tmp_path: Path) -> None:
    assert told(layout_of(open_source(put(tmp_path, name, "config.json"))))[0] == {name: target}


def test_a_pipeline_with_everything_in_it(tmp_path: Path) -> None:
    """One of each: what is read, what comes along, what would be stale."""
    weights = {
        "text_encoder/model.fp16-00001-of-00001.safetensors": "text_encoder/model.fp16-00001-of-00001.safetensors",  # a variant alone
        "safety_checker/pytorch_model.bin": "safety_checker/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors": "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors": "vae/diffusion_pytorch_model.fp16.safetensors",
    }
    index = "text_encoder/model.safetensors.index.fp16.json"
    copies = ["README.md", "model_index.json", "scheduler/scheduler_config.json", "tokenizer/merges.txt", "tokenizer/spiece.model"]
    copies += ["unet/config.json", "embeddings/learned.safetensors", "unet/notes/a.txt"]
    stale = {
        "v1-5-pruned.safetensors": "no part of it",
        "v1-5-pruned.ckpt": "no part of it",
        "unet/diffusion_pytorch_model.fp16.safetensors": "diffusion_pytorch_model.safetensors beside it was read",
        "unet/diffusion_pytorch_model.bin": "diffusion_pytorch_model.safetensors beside it was read",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json": "beside it was read",
        "vae/diffusion_pytorch_model.fp16.bin": "diffusion_pytorch_model.fp16.safetensors beside it was read",
        "vae_decoder/model.onnx": "ONNX",
        "vae_decoder/model.onnx_data": "ONNX",
        "unet/openvino_model.bin": "OpenVINO",
        "unet/openvino_model.xml": "OpenVINO",
        "text_encoder/flax_model.msgpack": "Flax",
        "gguf/q4.GGUF": "GGUF",
        "original/consolidated.00.pth": "torch pickle",
        "original/model.safetensors": "another form",
    }
    put(tmp_path, *weights, index, *copies, *stale, ".git/config", ".cache/huggingface/x.safetensors", "unet/.huggingface/y")
    components = ["text_encoder", "safety_checker", "unet", "vae", "scheduler", "tokenizer", "vae_decoder"]
    (tmp_path / "model_index.json").write_text(json.dumps({name: ["diffusers", "X"] for name in components}))
    layout = layout_of(open_source(tmp_path))
    found = told(layout)
    assert found[0] == weights
    assert found[1] == {index: index}
    assert found[2] == sorted(copies)
    assert set(found[3]) == set(stale)
    for name, words in stale.items():
        assert words in found[3][name], name
    every = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    hidden = {".git/config", ".cache/huggingface/x.safetensors", "unet/.huggingface/y"}
    assert {*found[0], *found[1], *found[2], *found[3]} == every - hidden


def test_two_files_under_one_name(tmp_path: Path) -> None:
    put(tmp_path, "m-1-of-2.bin", "m-1-of-2.safetensors")
    weight_map = {"w.m-1-of-2.bin": "m-1-of-2.bin", "w.m-1-of-2.safetensors": "m-1-of-2.safetensors"}
    (tmp_path / "m.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(MalformedError, match=r"two files would be written as m-1-of-2\.safetensors"):
        layout_of(open_source(tmp_path / "m.index.json"))


# --- links and other things a folder may hold ------------------------------------------------------------------------------


def test_a_hub_cache(tmp_path: Path) -> None:
    """snapshots/<revision>/x → ../../blobs/<hash>; weights and other files alike, sizes those of the content."""
    snapshot = put(tmp_path / "models--a--b" / "snapshots" / "0123", *SHARDS, "model.safetensors.index.json", "config.json", "t/vocab.json")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    size = 0
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        size += path.stat().st_size
        path.rename(blobs / f"{number:064x}")
        path.symlink_to(os.path.relpath(blobs / f"{number:064x}", path.parent))
    layout = layout_of(open_source(snapshot))
    assert told(layout)[2] == ["config.json", "t/vocab.json"]
    assert layout.nbytes == size


def test_links_inside_the_folder(tmp_path: Path) -> None:
    """To a file, and to a folder: both come along by content."""
    put(tmp_path, "model.safetensors", "config.json", "tokenizer/vocab.json")
    (tmp_path / "other.json").symlink_to("config.json")
    (tmp_path / "tokenizer_2").symlink_to("tokenizer")
    copies = told(layout_of(open_source(tmp_path)))[2]
    assert copies == ["config.json", "other.json", "tokenizer/vocab.json", "tokenizer_2/vocab.json"]


PLANTED: dict[str, tuple[Callable[[Path], object], type[LoraToolsError], str]] = {
    "a link out": (lambda path: path.symlink_to("/etc/hostname"), UnsafeError, "t/planted is a link that leaves the folder"),
    "a folder's link out": (lambda path: path.symlink_to("/etc"), UnsafeError, "t/planted is a link that leaves the folder"),
    "a link to nothing": (lambda path: path.symlink_to("gone"), MalformedError, "planted is a link to nothing"),
    "a link in a circle": (lambda path: path.symlink_to(".."), MalformedError, "t/planted is a link to a folder it lies in"),
    "a FIFO": (os.mkfifo, MalformedError, "planted is not a regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), UnsafeError, "planted is a link that leaves the folder"),
}


@pytest.mark.parametrize("row", PLANTED)
def test_hostile_members(row: str, tmp_path: Path) -> None:
    plant, kind, words = PLANTED[row]
    folder = put(tmp_path / "model", "model.safetensors", "t/vocab.json", "t/second")
    plant(folder / "t" / "planted")
    (folder / "t" / "second").unlink()
    (folder / "t" / "second").symlink_to("gone too")
    source = open_source(folder)
    with pytest.raises(kind) as caught:
        layout_of(source)
    assert isinstance(caught.value, InputError)
    assert any(words.removeprefix("t/") in detail for detail in caught.value.details), caught.value.details
    assert any("second is a link to nothing" in detail for detail in caught.value.details)  # all problems at once


def test_what_is_left_out_is_not_looked_at(tmp_path: Path) -> None:
    """A link that leaves the folder is harmless where nobody reads it."""
    folder = put(tmp_path / "model", "model.safetensors")
    (folder / "model.onnx").symlink_to("/etc/hostname")
    (folder / "model.fp16.safetensors").symlink_to("gone")
    assert set(told(layout_of(open_source(folder)))[3]) == {"model.onnx", "model.fp16.safetensors"}

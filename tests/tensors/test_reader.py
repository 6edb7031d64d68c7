"""Opening inputs: every container, every malformed folder and index."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratools.errors import AmbiguousError, InputError, LoraToolsError, MalformedError, UnsafeError
from loratools.tensors.reader import open_source

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def sharded(folder: Path, **changes: Any) -> Path:
    """Two shards (a in the first, b and c in the second) and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.ones(4)}, folder / SHARDS[0])
    save_file({"b": torch.full((2,), 2.0), "c": torch.zeros(3)}, folder / SHARDS[1])
    weight_map: Any = {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]}
    index = {"metadata": {"total_size": 36}, "weight_map": weight_map | changes.pop("weight_map", {}), **changes}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def peft(folder: Path, suffix: str = "safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"base_model.model.x.lora_A.weight": torch.ones(2, 3)}
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    if suffix == "bin":
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_one_file_in_offset_order(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"b": torch.zeros(2, dtype=torch.float16), "a": torch.ones(1, dtype=torch.float64)}, path, {"k": "v"})
    source = open_source(path)
    assert (source.container, source.metadata, source.files, source.nbytes) == ("safetensors", {"k": "v"}, [path], 12)
    assert list(source.tensors) == ["a", "b"]  # wider dtype first: the library's order of offsets
    assert source.tensors["a"].load().item() == 1.0
    assert b"".join(source.tensors["b"].chunks()) == b"\0" * 4
    assert source.config is None


def test_content_decides_not_the_suffix(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "really_safetensors.ckpt")
    torch.save({"a": torch.ones(2)}, tmp_path / "really_pickle.safetensors")
    torch.save({"a": torch.ones(2)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    assert open_source(tmp_path / "really_safetensors.ckpt").container == "safetensors"
    assert open_source(tmp_path / "really_pickle.safetensors").container == "pickle"
    assert open_source(tmp_path / "legacy.pt").container == "pickle"


def test_header_length_that_looks_like_a_pickle(tmp_path: Path) -> None:
    """0x0280: the length's bytes are those of a protocol 2 pickle."""
    raw = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(0x280)
    (tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + b"\7")
    assert open_source(tmp_path / "x.safetensors").tensors["a"].load().tolist() == [7]


def test_shards_by_folder_and_by_index(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    for path in (folder, folder / INDEX):
        source = open_source(path)
        assert source.container == "shards"
        assert source.path == path
        assert [source.tensors[name].load().tolist() for name in "abc"] == [[1.0] * 4, [2.0] * 2, [0.0] * 3]
        assert [source.file_of[name].name for name in "abc"] == [SHARDS[0], SHARDS[1], SHARDS[1]]
        assert sorted(file.name for file in source.files) == sorted(SHARDS)
        assert (source.nbytes, source.warnings) == (36, [])


def test_bin_shards(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00001.bin")
    index = {"metadata": {"total_size": 8}, "weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    source = open_source(tmp_path)
    assert (source.container, source.tensors["a"].load().tolist(), source.nbytes) == ("shards", [1.0, 1.0], 8)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_peft_folder(tmp_path: Path, suffix: str) -> None:
    source = open_source(peft(tmp_path / "p", suffix))
    assert source.container == "peft"
    assert source.config == {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    assert [file.name for file in source.files] == [f"adapter_model.{suffix}"]
    assert list(source.tensors) == ["base_model.model.x.lora_A.weight"]


def test_peft_folder_a_component(tmp_path: Path) -> None:
    for name in ("unet", "text_encoder_2"):
        peft(tmp_path / name)
    source = open_source(tmp_path)
    assert source.container == "peft"
    assert sorted(source.tensors) == [f"{name}.base_model.model.x.lora_A.weight" for name in ("text_encoder_2", "unet")]
    assert source.config is not None
    assert source.config["unet"]["r"] == 2
    assert len(source.files) == 2


def test_one_adapter_under_its_own_name(tmp_path: Path) -> None:
    peft(tmp_path / "my_style")
    source = open_source(tmp_path)
    assert list(source.tensors) == ["base_model.model.x.lora_A.weight"]
    peft(tmp_path / "other_style")
    with pytest.raises(AmbiguousError, match="several adapters"):
        open_source(tmp_path)


def test_diffusers_model_and_variant(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    save_file({"w": torch.zeros(2)}, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file({"w": torch.zeros(2).half()}, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    source = open_source(tmp_path)
    assert (source.container, source.tensors["w"].dtype) == ("diffusers", "F32")
    assert [(warning.code, "fp16" in warning.message) for warning in source.warnings] == [("variant", True)]
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    source = open_source(tmp_path)
    assert (source.tensors["w"].dtype, source.warnings) == ("F16", [])


def test_transformers_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "limit": Infinity}')  # real ones hold Infinity
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    source = open_source(tmp_path)
    assert source.container == "safetensors"
    assert [warning.code for warning in source.warnings] == ["second-container"]


def test_pipeline(tmp_path: Path) -> None:
    listed: dict[str, Any] = {"_class_name": "X", "unet": ["diffusers", "U"], "vae": ["diffusers", "V"], "tokenizer": ["t", "T"]}
    listed["safety_checker"] = [None, None]
    (tmp_path / "model_index.json").write_text(json.dumps(listed))
    for name in ("unet", "tokenizer", "stray"):
        (tmp_path / name).mkdir()
    (tmp_path / "tokenizer" / "vocab.json").write_text("{}")
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "U"}')
    save_file({"w": torch.zeros(2)}, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "stray" / "model.safetensors")
    source = open_source(tmp_path)
    assert source.container == "diffusers"
    assert list(source.tensors) == ["unet/w"]
    assert [(warning.code, warning.site) for warning in source.warnings] == [("missing-component", "vae")]


def test_lora_folder_and_single_unnamed_file(tmp_path: Path) -> None:
    save_file({"unet.x.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "pytorch_lora_weights.safetensors")
    assert list(open_source(tmp_path).tensors) == ["unet.x.lora_A.weight"]
    other = tmp_path / "other"
    other.mkdir()
    save_file({"x": torch.zeros(2)}, other / "my.safetensors")
    assert list(open_source(other).tensors) == ["x"]
    save_file({"x": torch.zeros(2)}, other / "my2.safetensors")
    with pytest.raises(AmbiguousError) as caught:
        open_source(other)
    assert caught.value.details == ["my.safetensors", "my2.safetensors"]


def test_missing_path_names_its_neighbours(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "style_v2.safetensors")
    with pytest.raises(InputError) as caught:
        open_source(tmp_path / "style_v1.safetensors")
    assert "style_v1.safetensors" in str(caught.value)
    assert caught.value.fix == "did you mean style_v2.safetensors?"
    with pytest.raises(InputError, match="does not exist"):
        open_source(tmp_path / "nowhere" / "x.safetensors")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no weights found"):
        open_source(tmp_path)


def test_broken_adapter_config(tmp_path: Path) -> None:
    folder = peft(tmp_path / "p")
    for text in ('{"r": 2, "r": 4}', '{"r": NaN}', "[]", "{"):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(MalformedError, match=r"adapter_config\.json"):
            open_source(folder)


# --- the table of indexes and folders ------------------------------------------------------------------------------


def _symlink_out(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / SHARDS[0]).rename(outside)
    (folder / SHARDS[0]).symlink_to(outside)


def _replace(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def _index_text(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / INDEX).write_text(text) and None


def _remap(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: sharded(folder, weight_map=changes) and None


def _drop_key(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["c"]
    (folder / INDEX).write_text(json.dumps(index))


def _double_key(folder: Path) -> None:
    save_file({"a": torch.ones(4), "b": torch.zeros(2)}, folder / SHARDS[0])


ROWS: dict[str, tuple[Callable[[Path], Any], type[Exception], list[str]]] = {
    "shard ..": (_remap(a="../outside.safetensors"), UnsafeError, ["../outside.safetensors"]),
    "shard .. alone": (_remap(a=".."), UnsafeError, ["'..'"]),
    "shard absolute": (_remap(a="/etc/hostname"), UnsafeError, ["/etc/hostname"]),
    "shard in a subfolder": (_remap(a="sub/x.safetensors"), UnsafeError, ["sub/x.safetensors"]),
    "shard with a backslash": (_remap(a="..\\x.safetensors"), UnsafeError, ["x.safetensors"]),
    "shard name empty": (_remap(a=""), UnsafeError, ["''"]),
    "shard name with NUL": (_remap(a="x\0y"), UnsafeError, ["x\\x00y"]),
    "symlinked shard out of the folder": (_symlink_out, UnsafeError, [f"{SHARDS[0]} is a link that leaves"]),
    "FIFO as shard": (_replace(SHARDS[0], os.mkfifo), MalformedError, [f"{SHARDS[0]} is not a regular file"]),
    "device as shard": (_replace(SHARDS[0], lambda path: path.symlink_to("/dev/zero")), UnsafeError, [SHARDS[0]]),
    "folder as shard": (_replace(SHARDS[0], lambda path: path.mkdir()), MalformedError, [f"{SHARDS[0]} is not a regular file"]),
    "link to nothing": (_replace(SHARDS[0], lambda path: path.symlink_to("gone")), MalformedError, [f"{SHARDS[0]} is a link to nothing"]),
    "shard missing": (lambda folder: (folder / SHARDS[0]).unlink(), MalformedError, [f"{SHARDS[0]} is missing"]),
    "both shards missing": (lambda folder: [(folder / name).unlink() for name in SHARDS], MalformedError, list(SHARDS)),
    "key mapped, not in the shard": (_remap(x=SHARDS[0], y=SHARDS[1]), MalformedError, ["x: mapped to", "y: mapped to"]),
    "key mapped to the wrong shard": (_remap(b=SHARDS[0]), MalformedError, ["b: mapped to"]),
    "key in the shard, not mapped": (_drop_key, MalformedError, ["c: is in"]),
    "one key in two shards": (_double_key, MalformedError, ["b: stands in two shards"]),
    "weight_map absent": (_index_text('{"metadata": {}}'), MalformedError, ["weight_map"]),
    "weight_map empty": (_index_text('{"weight_map": {}}'), MalformedError, ["weight_map"]),
    "weight_map a list": (_index_text('{"weight_map": ["a"]}'), MalformedError, ["weight_map"]),
    "weight_map not text": (_remap(a=3), MalformedError, ["weight_map.a"]),
    "duplicated keys": (_index_text('{"weight_map": {"a": "x", "a": "y"}}'), MalformedError, ["twice: a"]),
    "index not JSON": (_index_text("{"), MalformedError, ["not JSON"]),
    "index nested too deeply": (_index_text("[" * 50_000), MalformedError, ["nested"]),
    "index a list": (_index_text("[]"), MalformedError, ["object"]),
    "shard is a pointer": (_replace(SHARDS[0], lambda path: path.write_text("version https://git-lfs")), MalformedError, ["Git-LFS"]),
    "shards and a single file side by side": (
        lambda folder: save_file({"a": torch.ones(1)}, folder / "model.safetensors"), AmbiguousError, ["model.safetensors", INDEX]
    ),
    "shards without index": (lambda folder: (folder / INDEX).unlink(), MalformedError, ["index"]),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_hostile_folder(row: str, tmp_path: Path) -> None:
    plant, kind, words = ROWS[row]
    folder = sharded(tmp_path / "model")
    plant(folder)
    with pytest.raises(kind) as caught:
        open_source(folder)
    assert isinstance(caught.value, LoraToolsError)
    said = "\n".join([str(caught.value), *caught.value.details])
    for word in words:
        assert word in said


def test_problems_of_several_kinds_at_once(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", weight_map={"x": SHARDS[1], "y": "gone.safetensors"})
    (folder / SHARDS[0]).unlink()
    with pytest.raises(MalformedError) as caught:
        open_source(folder)
    assert len(caught.value.details) == 3  # two files and one key


def test_wrong_total_size_is_a_warning(tmp_path: Path) -> None:
    source = open_source(sharded(tmp_path / "model", metadata={"total_size": 35}))
    assert [warning.code for warning in source.warnings] == ["total-size"]
    assert "35" in source.warnings[0].message
    assert "36" in source.warnings[0].message


def test_hub_cache_links_are_followed(tmp_path: Path) -> None:
    """snapshots/<revision>/x → ../../blobs/<hash>, as huggingface_hub lays it out; nothing else outside."""
    repo = tmp_path / "models--a--b"
    snapshot = sharded(repo / "snapshots" / "0123abc")
    (repo / "blobs").mkdir()
    for number, name in enumerate([*SHARDS, INDEX]):
        (snapshot / name).rename(repo / "blobs" / f"{number:064x}")
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / f"{number:064x}")
    assert sorted(open_source(snapshot).tensors) == ["a", "b", "c"]
    secret = repo / "secret.safetensors"
    (repo / "blobs" / f"{0:064x}").rename(secret)
    (repo / "blobs" / f"{0:064x}").symlink_to(secret)
    with pytest.raises(UnsafeError):
        open_source(snapshot)


def test_link_inside_the_folder_is_fine(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    (folder / "store").mkdir()
    (folder / SHARDS[0]).rename(folder / "store" / "x")
    (folder / SHARDS[0]).symlink_to("store/x")
    assert sorted(open_source(folder).tensors) == ["a", "b", "c"]


def test_linked_component_that_leaves_the_pipeline(tmp_path: Path) -> None:
    outside = sharded(tmp_path / "outside")
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text('{"unet": ["diffusers", "U"]}')
    (pipeline / "unet").symlink_to(outside)
    with pytest.raises(UnsafeError, match="unet is a link"):
        open_source(pipeline)


AUDIT = """
    import json, os, sys
    sys.path.insert(0, os.getcwd())
    import loratools.tensors.reader as reader, loratools.tensors.pickles, loratools.tensors.writer
    from loratools.errors import LoraToolsError
    root, opened = sys.argv[1], []
    "\\x1b".encode("unicode_escape")  # a codec is a file too

    def hook(event, args):
        if event == "open" and not isinstance(args[0], int):
            opened.append(os.fsdecode(args[0]))

    sys.addaudithook(hook)
    verdicts = []
    for name in sorted(os.listdir(root)):
        try:
            reader.open_source(os.path.join(root, name))
            verdicts.append("opened")
        except LoraToolsError:
            verdicts.append("refused")
    inside = os.path.realpath(root) + os.sep
    outside = [path for path in opened if not os.path.realpath(path).startswith(inside)]
    print(json.dumps({"verdicts": verdicts, "outside": outside, "opened": len(opened), "torch": "torch" in sys.modules}))
"""


def test_nothing_outside_is_opened(tmp_path: Path) -> None:
    """An audit hook sees every open() of a process that meets all hostile folders."""
    root = tmp_path / "hostile"
    root.mkdir()
    (tmp_path / "outside.safetensors").write_bytes(b"x")
    hostile = [row for row in ROWS if ROWS[row][1] is UnsafeError and row != "symlinked shard out of the folder"]
    for number, row in enumerate(hostile):
        ROWS[row][0](sharded(root / f"{number:02d}"))
    linked = sharded(root / "zz")
    (linked / SHARDS[0]).rename(tmp_path / "moved.safetensors")
    (linked / SHARDS[0]).symlink_to(tmp_path / "moved.safetensors")
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(AUDIT), str(root)], capture_output=True, text=True, check=True)
    seen = json.loads(run.stdout)
    assert seen["verdicts"] == ["refused"] * (len(hostile) + 1)
    assert seen["outside"] == []
    assert seen["opened"] >= len(hostile)  # the indexes themselves: the hook does see opens
    assert not seen["torch"]

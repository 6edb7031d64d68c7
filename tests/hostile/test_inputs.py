"""Files that are not what they say: every command says what they are, runs nothing, opens nothing outside and writes nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.operations.made import PROJ, Make, factors, four, kohya_file, render, written

pytestmark = pytest.mark.hostile


class Runs:
    """Pickled, it asks the reader to call a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def shell(marker: Path) -> Runs:
    return Runs(os.system, f"touch {marker}")


PICKLES: dict[str, tuple[Callable[[Path, Path], None], tuple[str, ...]]] = {
    "torch.save with os.system": (lambda path, marker: torch.save({"a.lora_up.weight": shell(marker)}, path), ("system",)),
    "bare pickle": (lambda path, marker: path.write_bytes(pickle.dumps(shell(marker))) and None, ("pickle",)),
    "getattr chain": (lambda path, marker: torch.save({"a": Runs(getattr, "text", "upper")}, path), ("getattr",)),
    "nested load": (lambda path, marker: torch.save({"a": Runs(pickle.loads, pickle.dumps(shell(marker)))}, path), ("loads",)),
    "eval": (lambda path, marker: torch.save({"a": Runs(eval, f"open({str(marker)!r}, 'w')")}, path), ("eval",)),
    "legacy torch": (lambda path, marker: torch.save({"a": shell(marker)}, path, _use_new_zipfile_serialization=False), ("system",)),
    "whole module": (lambda path, marker: torch.save(torch.nn.Linear(2, 2), path), ("torch.nn",)),
}


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_runs_nothing(name: str, suffix: str, refused: Any, tmp_path: Path) -> None:
    """The global is named; the suffix lies as it likes."""
    make, words = PICKLES[name]
    path, marker = tmp_path / f"style{suffix}", tmp_path / "executed"
    make(path, marker)
    refused(path, path.name, *words)
    assert not marker.exists()


def test_a_pickle_in_a_peft_folder(refused: Any, peft: Any, randn: Make, tmp_path: Path) -> None:
    up, down = factors(randn, (16, 16, 1, 1))
    folder = peft("folder", {f"base_model.model.{PROJ}.lora_A.weight": down, f"base_model.model.{PROJ}.lora_B.weight": up}, {"r": 4})
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": shell(tmp_path / "executed")}, folder / "adapter_model.bin")
    refused(folder, "adapter_model.bin", "system")
    assert not (tmp_path / "executed").exists()


def test_a_harmless_pickle_is_an_adapter(randn: Make, run: Any, good: Path, tmp_path: Path) -> None:
    """So that refusing everything would not pass."""
    pairs = four(randn)
    path = tmp_path / "style.pt"
    torch.save(kohya_file(pairs), path)
    out = tmp_path / "out.safetensors"
    assert run("convert", path, out, "--to", "comfy").exit_code == 0
    assert run("compare", path, out).exit_code == 0


def header(text: bytes, payload: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + payload


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def one(**changes: Any) -> bytes:
    return header(json.dumps({"x.lora_up.weight": entry(**changes)}).encode(), b"\0" * 8)


def zipped() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr("readme.txt", "hello")
    return data.getvalue()


BYTES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("empty",)),
    "5 bytes": (b"\0" * 5, ("5 bytes",)),
    "header length 0": (b"\0" * 16, ("header",)),
    "header longer than the file": (struct.pack("<Q", 1 << 20) + b"{}", ("header",)),
    "header of an exabyte": (struct.pack("<Q", 1 << 60) + b"{}", ("header",)),
    "Git-LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
        ("LFS", "git lfs pull"),
    ),
    "HTML": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", ("HTML",)),
    "HTML after spaces": (b"\n\n   <html><head><title>Sign in</title></head></html>", ("HTML",)),
    "JSON error page": (b'{"error": "Invalid username or password."}', ("JSON",)),
    "GGUF": (b"GGUF\x03\0\0\0" + b"\0" * 64, ("GGUF",)),
    "zip": (zipped(), ("zip",)),
    "truncated": (one()[:-3], ("3 bytes missing",)),
    "too long": (one() + b"\0" * 5, ("5",)),
    "not JSON": (header(b"not json" * 2), ("JSON",)),
    "a list": (header(b"[]      "), ("JSON",)),
    "overlap": (
        header(json.dumps({"a": entry(), "b.lora_up.weight": entry(offsets=(4, 12))}).encode(), b"\0" * 12),
        ("b.lora_up.weight",),
    ),
    "hole": (header(json.dumps({"a": entry(), "b.lora_up.weight": entry(offsets=(16, 24))}).encode(), b"\0" * 24), ("b.lora_up.weight",)),
    "size and shape disagree": (one(shape=(3,)), ("x.lora_up.weight",)),
    "unknown dtype": (one(dtype="F31"), ("x.lora_up.weight", "F31")),
    "negative dimension": (one(shape=(-2,)), ("x.lora_up.weight",)),
    "overflowing shape": (one(shape=(1 << 40, 1 << 40)), ("x.lora_up.weight",)),
    "a name twice": (
        header(b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8),
        ("x",),
    ),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_that_are_no_safetensors_file(name: str, refused: Any, tmp_path: Path) -> None:
    data, words = BYTES[name]
    path = tmp_path / "style.safetensors"
    path.write_bytes(data)
    refused(path, "style.safetensors", *words)


def test_an_adapter_cut_anywhere(good: Path, run: Any, tmp_path: Path) -> None:
    """A download that stopped: at each of these lengths it says that bytes are missing, never that all is well."""
    data, path = good.read_bytes(), tmp_path / "cut.safetensors"
    end = 8 + int.from_bytes(data[:8], "little")
    for length in (1, 7, 8, 9, end // 2, end - 1, end, end + 1, (end + len(data)) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        for command in (["inspect", path], ["convert", path, "--to", "comfy"], ["compare", path, good]):
            result = run(*command)
            assert result.exit_code == 3, (length, result.output)
            assert "unexpected" not in result.output
    assert sorted(item.name for item in tmp_path.iterdir()) == ["cut.safetensors", "good.safetensors"]


# ----------------------------------------------------------------------------------------------------- indexes and folders


@pytest.fixture
def opened() -> Any:
    """`with opened() as names:` collects every path that is opened."""
    names: list[str] = []
    active = [False]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if active[0] and event == "open" and isinstance(arguments[0], str | os.PathLike):
            names.append(os.fspath(arguments[0]))

    sys.addaudithook(hook)

    class Watch:
        def __enter__(self) -> list[str]:
            names.clear()
            active[0] = True
            return names

        def __exit__(self, *_: object) -> None:
            active[0] = False

    yield Watch
    active[0] = False


def sharded(folder: Path, shard: str, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}))
    return path


@pytest.mark.parametrize("form", ["parent", "deep", "absolute", "symlink", "folder", "fifo", "device", "NUL", "missing", "Windows"])
@pytest.mark.parametrize("by", ["index", "folder"])
def test_an_index_that_leaves_its_folder(form: str, by: str, randn: Make, refused: Any, opened: Any, tmp_path: Path) -> None:
    """accelerate loads all of these; diffusers refuses (accelerate#4067, transformers#46097, #47176)."""
    tensors = written("model.layers.0.self_attn.q_proj", *factors(randn, (16, 16)))
    folder, secret = tmp_path / "model", tmp_path.with_name(f"{tmp_path.name}-secret.safetensors")
    secret.write_bytes(render(tensors))
    names = {"parent": f"../../{secret.name}", "deep": f"a/../../../{secret.name}", "absolute": str(secret), "device": "/dev/zero"}
    names |= {"NUL": "a\0.safetensors", "Windows": f"..\\{secret.name}"}
    shard = names.get(form, "shard.safetensors")
    index = sharded(folder, shard, tensors)
    if form == "symlink":
        (folder / shard).symlink_to(secret)
    elif form == "folder":
        (folder / shard).mkdir()
    elif form == "fifo":
        os.mkfifo(folder / shard)
    with opened() as seen:
        refused(index if by == "index" else folder, "x00" if form == "NUL" else Path(shard).name.removeprefix("..\\"))
    assert folder.name in " ".join(seen)  # the hook does see what is opened
    assert str(secret) not in {os.path.realpath(name) for name in seen if "\0" not in name}


INDEXES: dict[str, tuple[str, tuple[str, ...]]] = {
    "no weight_map": ('{"metadata": {}}', ("weight_map",)),
    "weight_map is a list": ('{"weight_map": []}', ("weight_map",)),
    "a shard that is no text": ('{"weight_map": {"a": 1}}', ("a",)),
    "a key twice": ('{"weight_map": {"a": "s.safetensors", "a": "t.safetensors"}}', ("a",)),
    "not JSON": ("{", ("JSON",)),
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_is_none(name: str, refused: Any, tmp_path: Path) -> None:
    text, words = INDEXES[name]
    path = tmp_path / "m" / "model.safetensors.index.json"
    path.parent.mkdir()
    path.write_text(text)
    refused(path, "index.json", *words)
    refused(path.parent, "index.json", *words)


def test_a_symlinked_output_of_another_folder_is_followed_not_replaced(good: Path, run: Any, tmp_path: Path) -> None:
    """The user's own link: the file behind it is written, with --force only."""
    store, link = tmp_path / "store", tmp_path / "link.safetensors"
    store.mkdir()
    (store / "real.safetensors").write_bytes(b"old")
    link.symlink_to(store / "real.safetensors")
    assert run("convert", good, link, "--to", "comfy").exit_code == 2
    assert (store / "real.safetensors").read_bytes() == b"old"
    assert run("convert", good, link, "--to", "comfy", "--force").exit_code == 0
    assert link.is_symlink()
    assert run("compare", good, store / "real.safetensors").exit_code == 0


def test_paths_that_are_no_files(run: Any, good: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    for name in ("fifo.safetensors", "folder.safetensors", "loop.safetensors", "missing.safetensors", "good.safetensors/x"):
        for command in (
            ["inspect", tmp_path / name],
            ["convert", f"{tmp_path}/{name}", "--to", "comfy"],
            ["compare", good, f"{tmp_path}/{name}"],
        ):
            result = run(*command)
            assert result.exit_code == 3, (name, command[0], result.output)
            assert "unexpected" not in result.output
    assert not list(tmp_path.glob("*.comfy.safetensors"))

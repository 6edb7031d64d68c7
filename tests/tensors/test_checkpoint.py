"""A checkpoint written again: what changes is what was asked for, every other byte is the input's, and OUT is whole or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.errors import CheckFailed, LoraToolsError, OutputExistsError, UnsafeError, WriteError
from loratools.tensors.atomic import WriteResult
from loratools.tensors.checkpoint import write_checkpoint
from loratools.tensors.header import read_header, render_header
from loratools.tensors.layout import layout_of
from loratools.tensors.lazy import ComputedTensor, LazyTensor, from_torch
from loratools.tensors.reader import open_source


def values(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def write(source: Path, out: Path, replaced: Mapping[str, torch.Tensor] | None = None, **options: Any) -> WriteResult:
    """`write_checkpoint` with the defaults of these tests: the old header and one entry more."""
    given = {"metadata": lambda old: {**old, "note": "changed"}, "force": False, "threads": 2, **options}
    new: dict[str, LazyTensor] = {key: from_torch(tensor) for key, tensor in (replaced or {}).items()}
    return write_checkpoint(layout_of(open_source(source)), out, replaced=new, **given)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def payload_of(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """An original checkpoint: an order no library would choose, an integer, a VAE, dtypes mixed, metadata."""
    tensors = {
        "model.z": values(1, 40, 50), "model.a": values(2, 7, dtype=torch.float32), "steps": torch.tensor([3], dtype=torch.int64),
        "vae.x": values(3, 300, 2000, dtype=torch.float16), "model.m": values(4, 30, 20),
    }  # fmt: skip
    entries, position, data = {}, 0, b""
    for name, tensor in tensors.items():
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64", torch.float16: "F16"}[tensor.dtype]
        entries[name] = (dtype, tuple(tensor.shape), position, position + len(raw))
        position, data = position + len(raw), data + raw
    path = tmp_path / "base.safetensors"
    path.write_bytes(render_header(entries, {"modelspec.title": "t", "modelspec.hash_sha256": "0xold"}) + data)
    return path


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"


def sharded(folder: Path, **entries: Any) -> Path:
    """A transformers folder: a and b, c; the index in a form nobody writes, so that a rewrite shows."""
    folder.mkdir(parents=True)
    save_file({"a": values(1, 8, 6), "b": values(2, 6)}, folder / SHARDS[0], {"format": "pt"})
    save_file({"c": values(3, 5, 4)}, folder / SHARDS[1], {"format": "pt"})
    index = {"weight_map": {"b": SHARDS[0], "c": SHARDS[1], "a": SHARDS[0]}, "metadata": {"total_size": 148, "total_parameters": 74}}
    (folder / INDEX).write_text(json.dumps({**index, **entries}))
    (folder / "config.json").write_text('{"tie_word_embeddings": true}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    folder = tmp_path / "pipe"
    sharded(folder / "text_encoder")
    for name, seed in (("unet", 5), ("vae", 6)):
        (folder / name).mkdir()
        save_file({"x.weight": values(seed, 9, 9), "x.bias": values(seed + 10, 9)}, folder / name / "diffusion_pytorch_model.safetensors")
        (folder / name / "config.json").write_text('{"_class_name": "M"}')
    save_file({"x.weight": values(5, 9, 9)}, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    (folder / "model_index.json").write_text(json.dumps({name: ["diffusers", "M"] for name in ("text_encoder", "unet", "vae")}))
    return folder


# --- one file -----------------------------------------------------------------------------------------------------------


def test_one_file(single: Path, tmp_path: Path) -> None:
    """Order, dtypes and untouched bytes are the input's; the hash in the header is the new one; a shape and a dtype change."""
    before, new = read_header(single), {"model.a": values(9, 7, dtype=torch.float32), "model.z": values(8, 41, 50, dtype=torch.float16)}
    added: dict[str, tuple[Path, LazyTensor]] = {"model.bias": (Path(), from_torch(values(7, 11)))}
    seen: list[Mapping[str, str]] = []

    def header(old: Mapping[str, str]) -> Mapping[str, str]:
        seen.append(old)
        return {**old, "note": "n"}

    told: list[int] = []
    result = write(single, tmp_path / "out.safetensors", new, added=added, metadata=header, progress=told.append)
    after = read_header(tmp_path / "out.safetensors")
    assert seen == [before.metadata]
    digest = "0x" + hashlib.sha256(payload_of(tmp_path / "out.safetensors")).hexdigest()
    assert after.metadata == {"modelspec.title": "t", "modelspec.hash_sha256": digest, "note": "n"}
    assert list(after.tensors) == [*before.tensors, "model.bias"]
    loaded, old = load_file(tmp_path / "out.safetensors"), load_file(single)
    for name, tensor in {**old, **new, "model.bias": values(7, 11)}.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    assert (result.path, result.bytes) == (tmp_path / "out.safetensors", (tmp_path / "out.safetensors").stat().st_size)
    assert told == sorted(told)
    assert told[-1] == result.bytes


def test_nothing_changed_is_a_copy(single: Path, tmp_path: Path) -> None:
    """Not a byte of the header either, and `check` sees it all the same."""
    seen: list[bytes] = []
    write(single, tmp_path / "out.safetensors", check=lambda path: seen.append(path.read_bytes()))
    assert (tmp_path / "out.safetensors").read_bytes() == single.read_bytes() == seen[0]


@pytest.mark.parametrize("changed", [False, True])
def test_a_pickle_becomes_safetensors(changed: bool, tmp_path: Path) -> None:
    """Tied tensors are written twice; the header is the one transformers asks for."""
    tied = values(1, 4, 3)
    torch.save({"state_dict": {"b": tied, "a": tied, "t": values(2, 6, 5).t()}, "epoch": 3}, tmp_path / "x.ckpt")
    write(tmp_path / "x.ckpt", tmp_path / "out.safetensors", {"a": values(3, 4, 3)} if changed else {})
    assert read_header(tmp_path / "out.safetensors").metadata == {"format": "pt"} | ({"note": "changed"} if changed else {})
    loaded = load_file(tmp_path / "out.safetensors")
    expected = {"b": tied, "a": values(3, 4, 3) if changed else tied, "t": values(2, 6, 5).t()}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


# --- folders ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["", INDEX])
def test_shards(given: str, tmp_path: Path) -> None:
    """A shape that grows, a tensor more: total_size, the map and nothing else of the index; the other shard is the same file."""
    folder = sharded(tmp_path / "in", extra={"kept": [1]})
    added: dict[str, tuple[Path, LazyTensor]] = {"lm_head": (Path(SHARDS[0]), from_torch(values(8, 3, 3)))}
    result = write(folder / given, tmp_path / "out", {"a": values(9, 10, 6)}, added=added)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 148 + 2 * 12 + 2 * 9, "total_parameters": 74}
    assert index["weight_map"] == {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1], "lm_head": SHARDS[0]}
    assert index["extra"] == {"kept": [1]}
    before, after = tree(folder), tree(tmp_path / "out")
    assert after.keys() == before.keys()
    assert {name for name in before if before[name] != after[name]} == {SHARDS[0], INDEX}
    source = open_source(tmp_path / "out")
    assert source.warnings == []
    assert list(open_source(tmp_path / "out" / SHARDS[0]).tensors) == ["a", "b", "lm_head"]
    assert torch.equal(source.tensors["a"].load(), values(9, 10, 6))
    assert torch.equal(source.tensors["lm_head"].load(), values(8, 3, 3))
    assert result.bytes == sum(map(len, after.values()))
    assert {str(path.relative_to(tmp_path / "out")) for path in result.files} == after.keys()


@pytest.mark.parametrize(
    ("metadata", "rewritten"),
    [({"total_size": 148}, False), ({"total_size": 999}, True), ({}, False), (None, False)],
    ids=["right", "wrong", "absent", "no header"],
)
def test_an_index_is_rewritten_when_it_must_be(metadata: Any, rewritten: bool, tmp_path: Path) -> None:
    """A tensor of the same size: the index stays byte for byte, unless its total is wrong."""
    folder = sharded(tmp_path / "in", metadata=metadata)
    write(folder, tmp_path / "out", {"a": values(9, 8, 6)})
    same = (tmp_path / "out" / INDEX).read_bytes() == (folder / INDEX).read_bytes()
    assert same != rewritten
    if rewritten:
        assert json.loads((tmp_path / "out" / INDEX).read_text())["metadata"] == {"total_size": 148}


def test_pickled_shards(tmp_path: Path) -> None:
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    folder = tmp_path / "in"
    folder.mkdir()
    tied = values(1, 8, 6)
    torch.save({"a": tied, "b": tied}, folder / names[0])
    torch.save({"c": values(2, 5)}, folder / names[1])
    index = {"metadata": {"total_size": 106}, "weight_map": {"a": names[0], "b": names[0], "c": names[1]}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    write(folder, tmp_path / "out", {"c": values(3, 5)})
    assert sorted(tree(tmp_path / "out")) == ["config.json", *SHARDS, INDEX]
    source = open_source(tmp_path / "out")
    assert source.warnings == []  # total_size counts what is tied twice now: 2 · 96 + 10
    expected = {"a": tied, "b": tied, "c": values(3, 5)}
    assert all(torch.equal(source.tensors[name].load(), expected[name]) for name in expected)
    assert [read_header(tmp_path / "out" / name).metadata for name in SHARDS] == [{"format": "pt"}, {"format": "pt", "note": "changed"}]


def test_a_pipeline(pipeline: Path, tmp_path: Path) -> None:
    """Two components with a tensor of the same name: the key's folder says which. The stale variant stays behind."""
    added: dict[str, tuple[Path, LazyTensor]] = {
        "unet/x.scale": (Path("unet/diffusion_pytorch_model.safetensors"), from_torch(values(8, 2))),
        "text_encoder/d": (Path("text_encoder") / SHARDS[1], from_torch(values(9, 2))),
    }
    write(pipeline, tmp_path / "out", {"unet/x.weight": values(7, 9, 9)}, added=added)
    before, after = tree(pipeline), tree(tmp_path / "out")
    assert before.keys() - after.keys() == {"unet/diffusion_pytorch_model.fp16.safetensors"}
    unet, second, index = "unet/diffusion_pytorch_model.safetensors", f"text_encoder/{SHARDS[1]}", f"text_encoder/{INDEX}"
    assert {name for name in after if after[name] != before[name]} == {unet, second, index}
    source = open_source(tmp_path / "out")
    assert torch.equal(source.tensors["unet/x.weight"].load(), values(7, 9, 9))
    assert torch.equal(source.tensors["unet/x.bias"].load(), values(15, 9))
    assert torch.equal(source.tensors["vae/x.weight"].load(), values(6, 9, 9))
    assert sorted(load_file(tmp_path / "out" / unet)) == ["x.bias", "x.scale", "x.weight"]
    assert json.loads(after[index])["weight_map"]["d"] == SHARDS[1]
    assert json.loads(after[index])["metadata"]["total_size"] == 152


def test_a_hub_cache_is_copied_by_content(tmp_path: Path) -> None:
    snapshot = sharded(tmp_path / "models--a--b" / "snapshots" / "0123")
    expected = tree(snapshot)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(tmp_path / "models--a--b" / "blobs" / f"{number:064x}")
        path.symlink_to(f"../../blobs/{number:064x}")
    write(snapshot, tmp_path / "out", {"c": values(9, 5, 4)})
    after = tree(tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert {name for name in expected if after[name] != expected[name]} == {SHARDS[1]}
    assert after.keys() == expected.keys()


def test_texts_and_extra_files(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "in")
    (tmp_path / "new_tokenizer.json").write_text("new")
    extra = {Path("tokenizer.json"): tmp_path / "new_tokenizer.json", Path("deep/added.txt"): tmp_path / "new_tokenizer.json"}
    write(folder, tmp_path / "out", {"c": values(9, 5, 4)}, texts={Path("config.json"): "edited ä\n"}, extra_files=extra)
    after = tree(tmp_path / "out")
    assert after["config.json"] == "edited ä\n".encode()
    assert after["tokenizer.json"] == after["deep/added.txt"] == b"new"
    assert (folder / "tokenizer.json").read_text() == "{}"


# --- refusals -------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], type[LoraToolsError]]] = {
    "replaced, not there": ({"replaced": {"x": torch.ones(1)}}, LoraToolsError),
    "added, there": ({"added": {"a": (Path(SHARDS[0]), from_torch(torch.ones(1)))}}, LoraToolsError),
    "added to no weights file": ({"added": {"x": (Path("config.json"), from_torch(torch.ones(1)))}}, LoraToolsError),
    "text above": ({"texts": {Path("../x"): ""}}, UnsafeError),
    "text absolute": ({"texts": {Path("/tmp/x"): ""}}, UnsafeError),
    "file above": ({"extra_files": {Path("a/../../x"): Path(__file__)}}, UnsafeError),
    "text for weights": ({"texts": {Path(SHARDS[0]): ""}}, LoraToolsError),
    "file for an index": ({"extra_files": {Path(INDEX): Path(__file__)}}, LoraToolsError),
}


@pytest.mark.parametrize("row", REFUSED)
def test_refused_before_anything_is_written(row: str, tmp_path: Path) -> None:
    options, kind = REFUSED[row]
    folder = sharded(tmp_path / "in")
    with pytest.raises(kind):
        write(folder, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_key_of_another_component(pipeline: Path, tmp_path: Path) -> None:
    added = {"vae/y": (Path("unet/diffusion_pytorch_model.safetensors"), from_torch(torch.ones(1)))}
    with pytest.raises(LoraToolsError, match="expected a key that begins with unet/"):
        write(pipeline, tmp_path / "out", added=added)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["in", "in/" + SHARDS[0], ".", "link"])
def test_the_input_is_never_overwritten(out: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "in")
    (tmp_path / "link").symlink_to("in")
    before = tree(tmp_path)
    with pytest.raises(OutputExistsError):
        write(folder, tmp_path / out, {"c": values(9, 5, 4)}, force=True)
    assert tree(tmp_path) == before


def test_an_output_that_is_there(single: Path, tmp_path: Path) -> None:
    folder, out = sharded(tmp_path / "in"), tmp_path / "out"
    for source, old in ((single, "file"), (folder, "folder")):
        out.write_text("old") if old == "file" else out.mkdir()
        with pytest.raises(OutputExistsError, match="already there"):
            write(source, out)
        write(source, out, force=True)
        assert out.is_dir() == source.is_dir()
        out.unlink() if old == "file" else None


# --- whole or not at all --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True], ids=["nothing there", "old output there"])
@pytest.mark.parametrize("form", ["file", "folder"])
def test_check_comes_before_the_name(form: str, old: bool, single: Path, pipeline: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    source, replaced = {"file": (single, {"model.m": values(9, 30, 20)}), "folder": (pipeline, {"unet/x.bias": values(9, 9)})}[form]
    if old:
        out.write_bytes(b"old")
    before, seen = tree(tmp_path), []

    def look(path: Path) -> None:
        found = open_source(path)
        assert all(torch.equal(found.tensors[key].load(), tensor) for key, tensor in replaced.items())
        assert found.tensors.keys() == open_source(source).tensors.keys()
        assert out.exists() == old
        seen.append(path)

    def refuse(path: Path) -> None:
        look(path)
        raise CheckFailed("did not hold")

    with pytest.raises(CheckFailed):
        write(source, out, replaced, force=old, check=refuse)
    assert tree(tmp_path) == before
    write(source, out, replaced, force=old, check=look)
    assert len(seen) == 2
    assert open_source(out).tensors.keys() == open_source(source).tensors.keys()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("form", ["file", "folder"])
def test_every_call_can_fail(form: str, code: int, single: Path, pipeline: Path, tmp_path: Path) -> None:
    """Each write, copy, sync and rename fails in turn: WriteError, or the whole output (a copy goes through memory then)."""
    out, source = tmp_path / "out", {"file": single, "folder": pipeline}[form]
    replaced = {"model.z": values(9, 40, 50)} if form == "file" else {"unet/x.bias": values(9, 9), "text_encoder/a": values(8, 8, 6)}
    write(source, out, replaced)
    whole = tree(tmp_path)
    calls, fails_at, failures = [0], 0, 0

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[0] += 1
            if calls[0] == fails_at:
                raise OSError(code, os.strerror(code))
            return real(*arguments)

        return call

    for fails_at in range(1, 200):
        calls[0] = 0
        if out.is_dir():
            for path in sorted(out.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            out.rmdir()
        out.unlink(missing_ok=True)
        before = tree(tmp_path)
        with pytest.MonkeyPatch.context() as monkeypatch:
            for name in ("pwrite", "copy_file_range", "fsync", "replace", "rename"):
                monkeypatch.setattr(os, name, failing(getattr(os, name)))
            try:
                write(source, out, replaced)
            except WriteError:
                failures += 1
                assert tree(tmp_path) == before, fails_at
                continue
        assert tree(tmp_path) == whole, fails_at
        if calls[0] < fails_at:
            break
    assert failures > 3
    assert calls[0] < fails_at


KILLED = """
    import os, signal, sys
    import torch
    from pathlib import Path
    from loratools.tensors.checkpoint import write_checkpoint
    from loratools.tensors.layout import layout_of
    from loratools.tensors.lazy import from_torch
    from loratools.tensors.reader import open_source
    name, number, source, key, out = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
    real, count = getattr(os, name), 0
    def deadly(*arguments):
        global count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)
    setattr(os, name, deadly)
    opened = open_source(source)
    replaced = {key: from_torch(opened.tensors[key].load() + 1)}
    write_checkpoint(layout_of(opened), Path(out), replaced=replaced, metadata=dict, force=True, threads=2)
"""


@pytest.mark.parametrize(
    ("form", "call", "number"),
    [("file", "pwrite", 1), ("file", "fsync", 1), ("folder", "pwrite", 1), ("folder", "fsync", 4), ("folder", "rename", 1)],
)
def test_kill_nine(form: str, call: str, number: int, single: Path, pipeline: Path, tmp_path: Path) -> None:
    """No OUT; what is left has a name that says what it is, and the next run takes it away."""
    source, key = {"file": (single, "model.z"), "folder": (pipeline, "unet/x.bias")}[form]
    out = tmp_path / "out"
    before = set(tmp_path.iterdir())
    command = [sys.executable, "-c", textwrap.dedent(KILLED), call, str(number), str(source), key, str(out)]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    left = set(tmp_path.iterdir()) - before
    assert [path.name.startswith(".out.") for path in left] == [True]
    write(source, out, {key: values(1, *open_source(source).tensors[key].shape)})
    assert set(tmp_path.iterdir()) - before == {out}


# --- the same bytes, little memory ------------------------------------------------------------------------------------------


def test_the_same_bytes_every_time(pipeline: Path, single: Path, tmp_path: Path) -> None:
    trees = []
    for number, threads in enumerate((1, 4, 1)):
        write(pipeline, tmp_path / f"out{number}", {"unet/x.weight": values(9, 9, 9), "text_encoder/c": values(8, 5, 4)}, threads=threads)
        write(single, tmp_path / f"out{number}" / "single", {"model.m": values(9, 30, 20)}, threads=threads)
        trees.append(tree(tmp_path / f"out{number}"))
    assert trees[0] == trees[1] == trees[2]


@pytest.mark.memory
@pytest.mark.parametrize("stamp", [{}, {"modelspec.hash_sha256": "x"}], ids=["copied in the kernel", "through the hash"])
def test_memory_is_the_blocks(stamp: dict[str, str], tmp_path: Path) -> None:
    """600 MB with a hole for a payload; three small tensors of it are replaced."""
    size = 20 << 20
    entries = {f"t{i:02d}": ("F32", (size // 4,), i * size, (i + 1) * size) for i in range(29)}
    entries |= {f"small{i}": ("F32", (25,), 29 * size + i * 100, 29 * size + (i + 1) * 100) for i in range(3)}
    header = render_header(entries, stamp)
    with (tmp_path / "in.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 29 * size + 300)
    code = """
        import json, sys
        from pathlib import Path
        from loratools.tensors.checkpoint import write_checkpoint
        from loratools.tensors.layout import layout_of
        from loratools.tensors.lazy import BytesTensor
        from loratools.tensors.reader import open_source

        def peak():
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

        source = open_source("in.safetensors")
        replaced = {f"small{i}": BytesTensor(bytes([i]) * 100, "F32", (25,)) for i in range(3)}
        before = peak()
        write_checkpoint(layout_of(source), Path("out.safetensors"), replaced=replaced, metadata=dict, force=False, threads=4)
        print(json.dumps({"grown": peak() - before, "torch": "torch" in sys.modules}))
    """
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    seen = json.loads(subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout)
    out = tmp_path / "out.safetensors"
    found = {name: b"".join(tensor.chunks()) for name, tensor in open_source(out).tensors.items() if name.startswith("small")}
    assert found == {f"small{i}": bytes([i]) * 100 for i in range(3)}
    out.unlink()
    assert seen["grown"] < (40 << 20 if not stamp else 160 << 20)  # 64 MiB finished, a block a thread, what the allocator keeps
    assert not seen["torch"]


def test_a_tensor_is_computed_once(pipeline: Path, tmp_path: Path) -> None:
    count = [0]

    def compute() -> torch.Tensor:
        count[0] += 1
        return values(9, 9)

    new: dict[str, LazyTensor] = {"unet/x.bias": ComputedTensor("BF16", (9,), compute)}
    layout = layout_of(open_source(pipeline))
    write_checkpoint(layout, tmp_path / "out", replaced=new, metadata=dict, force=False, threads=3)
    assert count == [1]

"""Writing: whole or not at all, the same bytes every time, and the library's own bytes for the library's own order."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as library_save

from loratools.errors import InputError, LoraToolsError, OutputExistsError, UsageError, WriteError
from loratools.tensors import atomic
from loratools.tensors.hashes import sha256_file, sshs_legacy_hash, sshs_model_hash, stored_hash_problems
from loratools.tensors.lazy import BytesTensor, LazyTensor, from_torch
from loratools.tensors.reader import open_source
from loratools.tensors.writer import (
    TensorSink,
    check_output,
    copy_file,
    output_folder,
    rewrite_metadata,
    write_safetensors,
    write_text_file,
)

TENSORS: dict[str, torch.Tensor] = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.full((5,), 1.5),
    "c": torch.ones(3, dtype=torch.float16),
    "d": torch.tensor([1, 2, 255], dtype=torch.uint8),
}  # wider dtype first, then by name: the order in which the library writes them


def lazy(tensors: dict[str, torch.Tensor] | None = None) -> dict[str, LazyTensor]:
    return {name: from_torch(tensor) for name, tensor in (tensors or TENSORS).items()}


def listing(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_the_library_s_own_bytes(tmp_path: Path, metadata: dict[str, str]) -> None:
    path = tmp_path / "x.safetensors"
    result = write_safetensors(path, lazy(), metadata)
    expected = library_save(TENSORS, metadata or None)
    assert path.read_bytes() == expected
    assert (result.path, result.bytes, result.sha256) == (path, len(expected), hashlib.sha256(expected).hexdigest())
    assert listing(tmp_path) == ["x.safetensors"]


def test_same_bytes_in_two_processes(tmp_path: Path) -> None:
    code = """
        import sys
        from loratools.tensors.lazy import BytesTensor
        from loratools.tensors.writer import write_safetensors
        tensors = {f"t{i}": BytesTensor(bytes(range(i)), "U8", (i,)) for i in range(50)}
        write_safetensors(sys.argv[1], tensors, {f"k{i}": str(i) for i in range(50)}, stamp_hashes=True)
    """
    digests = set()
    for seed in ("0", "1"):
        path = tmp_path / f"{seed}.safetensors"
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.getcwd()}
        subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(path)], env=environment, check=True)
        digests.add(sha256_file(path))
    assert len(digests) == 1


def test_copy_without_torch(tmp_path: Path) -> None:
    """Header, reader and writer carry stored tensors as bytes; 0.4 s of torch import would be seen by every user."""
    write_safetensors(tmp_path / "in.safetensors", lazy(), {"k": "v"})
    code = """
        import sys
        from loratools.tensors.metadata import trigger_words
        from loratools.tensors.reader import open_source
        from loratools.tensors.writer import rewrite_metadata, write_safetensors
        source = open_source("in.safetensors")
        write_safetensors("out.safetensors", source.tensors, source.metadata)
        rewrite_metadata("in.safetensors", "renamed.safetensors", {"k": "w"})
        print("torch" in sys.modules, "numpy" in sys.modules)
    """
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    run = [sys.executable, "-c", textwrap.dedent(code)]
    said = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False", "False"]
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "in.safetensors").read_bytes()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_mode_comes_from_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_safetensors(tmp_path / "x.safetensors", lazy(), {})
        with output_folder(tmp_path / "folder") as folder:
            write_text_file(folder / "c.json", "{}")
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == mode
    assert (tmp_path / "folder" / "c.json").stat().st_mode & 0o777 == mode
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_linked_output_is_followed(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    real, link = tmp_path / "store" / "real.safetensors", tmp_path / "link.safetensors"
    real.write_bytes(b"old")
    link.symlink_to("store/real.safetensors")
    write_safetensors(link, lazy(), {}, force=True)
    assert link.is_symlink()
    assert real.read_bytes() == library_save(TENSORS)
    assert listing(tmp_path / "store") == ["real.safetensors"]
    real.unlink()
    write_safetensors(link, lazy(), {})  # a link to nothing: written where it points
    assert real.exists()
    assert link.is_symlink()


def test_any_form_of_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_safetensors("out.safetensors", lazy(), {})
    write_safetensors(Path("./other.safetensors"), lazy(), {})
    write_safetensors("x" * 240 + ".safetensors", lazy(), {})  # 252 bytes: the temporary's name must fit too
    assert len(listing(tmp_path)) == 3


def test_views_and_tied_tensors_are_written_whole(tmp_path: Path) -> None:
    """The library refuses these at the end of the job; here they are copied."""
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = {"t": base.t(), "expanded": base[:, :1].expand(3, 4), "tied": base, "slice": base[1:, ::2]}
    write_safetensors(tmp_path / "x.safetensors", lazy(tensors), {})
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_any_order_of_writing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with TensorSink(path, {"ss_a": "1"}, stamp_hashes=True) as sink:
        for name, tensor in lazy().items():
            sink.declare(name, tensor.dtype, tensor.shape)
        for name in ("d", "a", "c", "b"):
            sink.write(name, lazy()[name])
    one = path.read_bytes()
    write_safetensors(path, lazy(), {"ss_a": "1"}, stamp_hashes=True, force=True)
    assert path.read_bytes() == one
    assert sshs_model_hash(path) == open_source(path).metadata["sshs_model_hash"]
    assert sink.result.bytes == len(one)


def test_large_tensors_in_pieces(tmp_path: Path) -> None:
    """Several chunks, the coalescing buffer before and after them."""
    data = bytes(range(256)) * 80_000  # 20 MB
    tensors: dict[str, LazyTensor] = {
        "s1": BytesTensor(b"\1" * 10, "U8", (10,)), "big": from_torch(torch.frombuffer(bytearray(data), dtype=torch.uint8)),
        "s2": BytesTensor(b"\2" * 3, "U8", (3,)), "empty": BytesTensor(b"", "F32", (0, 4)), "s3": BytesTensor(b"\3", "U8", ()),
    }  # fmt: skip
    result = write_safetensors(tmp_path / "x.safetensors", tensors, {})
    assert (tmp_path / "x.safetensors").read_bytes()[-len(data) - 14 :] == b"\1" * 10 + data + b"\2" * 3 + b"\3"
    assert result.sha256 == sha256_file(tmp_path / "x.safetensors")


def _sink(path: Path) -> TensorSink:
    sink = TensorSink(path, {})
    sink.declare("a", "F32", (2,))
    return sink


MISUSES: dict[str, Callable[[TensorSink], object]] = {
    "declared twice": lambda sink: sink.declare("a", "F32", (2,)),
    "declared after writing": lambda sink: (sink.write("a", BytesTensor(b"\0" * 8, "F32", (2,))), sink.declare("b", "F32", (2,))),
    "the reserved name": lambda sink: sink.declare("__metadata__", "F32", (2,)),
    "unknown dtype": lambda sink: sink.declare("b", "f32", (2,)),
    "half a byte": lambda sink: sink.declare("b", "F4", (3,)),
    "not declared": lambda sink: sink.write("b", BytesTensor(b"\0" * 8, "F32", (2,))),
    "another dtype": lambda sink: sink.write("a", BytesTensor(b"\0" * 4, "F16", (2,))),
    "another shape": lambda sink: sink.write("a", BytesTensor(b"\0" * 8, "F32", (1, 2))),
    "too few bytes": lambda sink: sink.write("a", BytesTensor(b"\0" * 7, "F32", (2,))),
    "too many bytes": lambda sink: sink.write("a", BytesTensor(b"\0" * 9, "F32", (2,))),
    "written twice": lambda sink: [sink.write("a", BytesTensor(b"\0" * 8, "F32", (2,))) for _ in range(2)],
    "never written": lambda sink: sink.commit(),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_leaves_nothing(misuse: str, tmp_path: Path) -> None:
    def use() -> None:
        with _sink(tmp_path / "x.safetensors") as sink:
            MISUSES[misuse](sink)

    with pytest.raises(LoraToolsError):
        use()
    assert listing(tmp_path) == []


# --- hashes ---------------------------------------------------------------------------------------------------------


def reference_hashes(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> tuple[str, str]:
    """sd-scripts' precalculate_safetensors_hashes, with the library itself."""
    blob = library_save(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    start = int.from_bytes(blob[:8], "little") + 8
    return hashlib.sha256(blob[start:]).hexdigest(), hashlib.sha256(blob[0x100000:0x110000]).hexdigest()[:8]


@pytest.mark.parametrize("elements", [3, 262_100, 400_000], ids=["under 1 MiB", "window half filled", "window filled"])
@pytest.mark.parametrize("tags", [0, 2_000_000], ids=["short header", "header past the window"])
def test_stamped_hashes_are_sd_scripts_own(tmp_path: Path, elements: int, tags: int) -> None:
    tensors = {"a": torch.arange(elements, dtype=torch.float32), "b": torch.ones(3)}
    metadata = {"ss_tags": "x" * tags, "modelspec.title": "not part of the legacy hash"}
    path = tmp_path / "x.safetensors"
    result = write_safetensors(path, lazy(tensors), {"sshs_model_hash": "stale", **metadata}, stamp_hashes=True)
    written = open_source(path).metadata
    model, legacy = reference_hashes(tensors, metadata)
    assert (written["sshs_model_hash"], written["sshs_legacy_hash"]) == (model, legacy)
    assert (sshs_model_hash(path), sshs_legacy_hash(path)) == (model, legacy)
    assert list(written) == ["sshs_model_hash", "ss_tags", "modelspec.title", "sshs_legacy_hash"]  # an old key keeps its place
    assert result.sha256 is None  # the header was completed after the payload
    assert stored_hash_problems(path, written) == []
    if elements == 3 and not tags:
        assert legacy == "e3b0c442"


def test_stored_hashes_that_are_wrong(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, lazy(), {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "e3b0c442"})
    problems = stored_hash_problems(path, open_source(path).metadata)
    assert [(problem.severity, problem.code, problem.site) for problem in problems] == [("error", "stale-hash", "sshs_model_hash")]
    assert stored_hash_problems(path, {}) == []


def test_hash_of_no_ss_metadata_at_all(tmp_path: Path) -> None:
    """The library writes `{}` for empty metadata, which moves the legacy window by 18 bytes."""
    tensors = {"a": torch.arange(400_000, dtype=torch.float32)}
    write_safetensors(tmp_path / "x.safetensors", lazy(tensors), {})
    assert sshs_legacy_hash(tmp_path / "x.safetensors") == reference_hashes(tensors, {})[1]


def test_rewrite_metadata_copies_the_payload(tmp_path: Path) -> None:
    tensors = {"z": torch.arange(400_000, dtype=torch.float32), "a": torch.ones(3, dtype=torch.float16)}
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    write_safetensors(source, lazy(tensors), {"ss_a": "1"}, stamp_hashes=True)
    before = source.read_bytes()
    metadata = {**open_source(source).metadata, "ss_note": "longer than it was", "title": "t"}
    result = rewrite_metadata(source, target, metadata)
    payload = before[int.from_bytes(before[:8], "little") + 8 :]
    after = target.read_bytes()
    assert after.endswith(payload)
    assert source.read_bytes() == before
    assert result.sha256 == hashlib.sha256(after).hexdigest()
    written = open_source(target)
    assert list(written.tensors) == ["z", "a"]  # order kept
    assert written.metadata["title"] == "t"
    assert stored_hash_problems(target, written.metadata) == []
    with pytest.raises(OutputExistsError):
        rewrite_metadata(source, source, {}, force=True)
    assert source.read_bytes() == before


@pytest.mark.parametrize("asked", [False, True, {"sshs_model_hash"}], ids=str)
def test_modelspec_hash_is_that_of_what_is_written(asked: bool | set[str], tmp_path: Path) -> None:
    """It describes the tensors: where the metadata has it, a stale one is never carried on; the sshs hashes are asked for."""
    path = tmp_path / "x.safetensors"
    stale = {"a": "1", "modelspec.hash_sha256": "0xstale", "sshs_model_hash": "stale"}
    result = write_safetensors(path, lazy(), stale, stamp_hashes=asked)
    data = path.read_bytes()
    payload = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    written = open_source(path).metadata
    assert written["modelspec.hash_sha256"] == "0x" + payload
    assert written["sshs_model_hash"] == (payload if asked else "stale")
    assert ("sshs_legacy_hash" in written) == (asked is True)
    assert list(written)[:3] == list(stale)
    assert result.sha256 is None
    rewrite_metadata(path, tmp_path / "y.safetensors", stale)
    assert open_source(tmp_path / "y.safetensors").metadata == {
        **stale,
        "modelspec.hash_sha256": "0x" + payload,
        "sshs_model_hash": payload,
    }


def test_no_digest_the_same_bytes(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", lazy(), {"k": "v"})
    source = open_source(tmp_path / "a.safetensors")
    with TensorSink(tmp_path / "b.safetensors", source.metadata, digest=False) as sink:
        for name, tensor in source.tensors.items():
            sink.declare(name, tensor.dtype, tensor.shape)
        for name in reversed(source.tensors):
            sink.write(name, source.tensors[name])
    assert sink.result.sha256 is None
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


# --- a look before the rename ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True], ids=["nothing there", "old output there"])
@pytest.mark.parametrize("limit", [None, 20], ids=["file", "shards"])
def test_check_sees_the_finished_files(limit: int | None, old: bool, tmp_path: Path) -> None:
    """Complete, hash included, under another name, while OUT is still what it was; what it raises leaves all as it was."""
    out = tmp_path / "out.safetensors"
    if old:
        _old_output(tmp_path / "old", "file" if limit is None else "shards")
        for path in (tmp_path / "old").iterdir():
            path.rename(tmp_path / path.name)
        (tmp_path / "old").rmdir()
    before, seen = snapshot(tmp_path), []

    def look(path: Path) -> None:
        source = open_source(path)
        assert source.metadata["modelspec.hash_sha256"] == "0x" + sshs_model_hash(path)
        assert all(torch.equal(source.tensors[name].load(), TENSORS[name]) for name in source.tensors)
        assert {name: data for name, data in snapshot(tmp_path).items() if not name.startswith(".")} == before
        seen.append(list(source.tensors))

    def refuse(path: Path) -> None:
        look(path)
        if len(seen) == (1 if limit is None else 2):
            raise InputError("not what it should be")

    def write(check: Callable[[Path], None]) -> None:
        with TensorSink(out, {"modelspec.hash_sha256": ""}, force=True, max_shard_bytes=limit) as sink:
            for name, tensor in lazy().items():
                sink.declare(name, tensor.dtype, tensor.shape)
            for name, tensor in lazy().items():
                sink.write(name, tensor)
            sink.commit(check)

    with pytest.raises(InputError, match="not what it should be"):
        write(refuse)
    assert snapshot(tmp_path) == before
    seen.clear()
    write(look)
    assert seen == ([["a", "b", "c", "d"]] if limit is None else [["a"], ["b"], ["c", "d"]])
    assert len(listing(tmp_path)) == (1 if limit is None else 4)


# --- failures -------------------------------------------------------------------------------------------------------

CALLS = ("write", "pwrite", "fsync", "replace", "rename")


class Injector:
    """Counts calls of the operating system and makes the n-th fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int | None) -> None:
        self.count, self.error, self.at = 0, error, at
        self.failed: str | None = None
        for name in CALLS:
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name)))

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                self.failed = name
                raise self.error
            return real(*args, **kwargs)

        return call


def _write_file(folder: Path) -> None:
    tensors: dict[str, LazyTensor] = {f"t{i}": from_torch(torch.full((400_000,), float(i))) for i in range(3)}
    write_safetensors(folder / "out.safetensors", tensors, {"ss_x": "1"}, force=True, stamp_hashes=True)


def _write_shards(folder: Path) -> None:
    with TensorSink(folder / "out.safetensors", {}, force=True, max_shard_bytes=20) as sink:
        for name, tensor in lazy().items():
            sink.declare(name, tensor.dtype, tensor.shape)
        for name, tensor in lazy().items():
            sink.write(name, tensor)


def _write_folder(folder: Path) -> None:
    with output_folder(folder / "out", force=True) as inside:
        write_safetensors(inside / "adapter_model.safetensors", lazy(), {})
        write_text_file(inside / "adapter_config.json", "{}")


def _copy(folder: Path) -> None:
    copy_file(Path(__file__), folder / "out.py", force=True)


JOBS = {"file": _write_file, "shards": _write_shards, "folder": _write_folder, "copy": _copy}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _old_output(folder: Path, job: str) -> None:
    """An earlier output that differs from the new one."""
    folder.mkdir()
    if job == "folder":
        (folder / "out").mkdir()
        (folder / "out" / "adapter_model.bin").write_text("old")
    elif job == "shards":
        for name in ("out-00001-of-00002.safetensors", "out-00002-of-00002.safetensors", "out.safetensors.index.json"):
            (folder / name).write_text("old " + name)
    else:
        (folder / ("out.py" if job == "copy" else "out.safetensors")).write_text("old")


@pytest.mark.parametrize("old", [False, True], ids=["nothing there", "old output there"])
@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(5, "Input/output error"), KeyboardInterrupt()], ids=repr)
def test_every_call_can_fail(job: str, old: bool, error: BaseException, tmp_path: Path) -> None:
    """After a fault at any call: the old state, or (when only the folder's fsync failed) the whole new one."""
    good = tmp_path / "good"
    good.mkdir()
    JOBS[job](good)
    with pytest.MonkeyPatch.context() as monkeypatch:
        (tmp_path / "count").mkdir()
        total = Injector(monkeypatch, error, None)
        JOBS[job](tmp_path / "count")
    failures = 0
    for at in range(1, total.count + 6):
        folder = tmp_path / str(at)
        _old_output(folder, job) if old else folder.mkdir()
        before = snapshot(folder)
        with pytest.MonkeyPatch.context() as monkeypatch:
            injector = Injector(monkeypatch, error, at)
            try:
                JOBS[job](folder)
            except (WriteError, KeyboardInterrupt) as caught:
                failures += 1
                after_rename = isinstance(caught, KeyboardInterrupt) and injector.failed == "fsync" and snapshot(folder) == snapshot(good)
                assert snapshot(folder) == before or after_rename, f"call {at} ({injector.failed})"
            else:
                assert snapshot(folder) == snapshot(good), f"call {at} ({injector.failed})"
                assert injector.failed in (None, "fsync")
        assert not [name for name in listing(folder) if "loratools" in name], f"call {at}: something was left behind"
    assert failures >= 2


def _killed(folder: Path, call: str, number: int, old: bool) -> None:
    """A writer of its own process that is killed with -9 at the given call."""
    code = f"""
        import os, signal, sys
        from loratools.tensors.lazy import BytesTensor
        from loratools.tensors.writer import write_safetensors
        real, count = os.{call}, 0
        def deadly(*args):
            global count
            count += 1
            if count == {number}:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)
        os.{call} = deadly
        tensors = {{f"t{{i}}": BytesTensor(bytes([i]) * 700_000, "U8", (700_000,)) for i in range(6)}}
        write_safetensors("out.safetensors", tensors, {{}}, force={old})
    """
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=folder, env=environment)
    assert run.returncode == -signal.SIGKILL


@pytest.mark.parametrize("old", [False, True], ids=["nothing there", "old output there"])
@pytest.mark.parametrize(("call", "number"), [("pwrite", 1), ("pwrite", 2), ("pwrite", 3), ("fsync", 1), ("replace", 1)])
def test_kill_nine(call: str, number: int, old: bool, tmp_path: Path) -> None:
    if old:
        (tmp_path / "out.safetensors").write_bytes(b"old")
    (tmp_path / ".unrelated.1.loratools-partial").write_bytes(b"another output's")
    _killed(tmp_path, call, number, old)
    assert (tmp_path / "out.safetensors").exists() == old
    if old:
        assert (tmp_path / "out.safetensors").read_bytes() == b"old"
    assert len(listing(tmp_path)) == 2 + old  # the temporary, under a name that says what it is
    write_safetensors(tmp_path / "out.safetensors", lazy(), {}, force=True)
    assert listing(tmp_path) == [".unrelated.1.loratools-partial", "out.safetensors"]


def test_temporary_of_a_living_process_stays(tmp_path: Path) -> None:
    other = tmp_path / f".out.safetensors.{os.getppid()}.loratools-partial"
    other.write_bytes(b"being written")
    write_safetensors(tmp_path / "out.safetensors", lazy(), {})
    assert other.exists()


def test_folder_moved_aside_by_a_killed_run_comes_back(tmp_path: Path) -> None:
    aside = tmp_path / ".out.999999999.loratools-replaced"
    aside.mkdir()
    (aside / "adapter_model.bin").write_text("old")

    def fail() -> None:
        with output_folder(tmp_path / "out", force=True):
            raise WriteError("no")

    with pytest.raises(WriteError):
        fail()
    assert snapshot(tmp_path) == {"out/adapter_model.bin": b"old"}


def test_full_disk_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(tmp_path)
    fields = list(real)
    fields[4] = 0  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))
    monkeypatch.setattr(os, "pwrite", lambda *_: pytest.fail("written to a full disk"))
    with pytest.raises(WriteError, match="disk is full") as caught:
        write_safetensors(tmp_path / "x.safetensors", lazy(), {})
    assert caught.value.exit_code == 1
    assert listing(tmp_path) == []


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WriteError, match="does not exist"):
        write_safetensors(tmp_path / "no" / "x.safetensors", lazy(), {})
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(WriteError, match="cannot be written to"):
        write_safetensors(tmp_path / "x.safetensors", lazy(), {})


def test_a_tensor_that_cannot_be_read_leaves_nothing(tmp_path: Path) -> None:
    class Broken(BytesTensor):
        def chunks(self) -> Iterator[bytes]:
            yield self.data[:4]
            raise OSError(5, "Input/output error")

    with pytest.raises(LoraToolsError, match="a: cannot read"):
        write_safetensors(tmp_path / "x.safetensors", {"a": Broken(b"\0" * 8, "F32", (2,))}, {})
    assert listing(tmp_path) == []


# --- what may be overwritten ------------------------------------------------------------------------------------------


def test_existing_output(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(OutputExistsError) as caught:
        write_safetensors(path, lazy(), {})
    assert caught.value.exit_code == 2
    assert "--force" in str(caught.value.fix)
    assert path.read_bytes() == b"old"
    write_safetensors(path, lazy(), {}, force=True)
    assert path.read_bytes() == library_save(TENSORS)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputExistsError, match="folder"):
        write_safetensors(tmp_path / "folder", lazy(), {}, force=True)


FORMS = ["same path", "relative", "symlink", "hard link", "input is a link", "input folder", "file of the input folder"]


@pytest.mark.parametrize("form", FORMS)
def test_an_input_is_never_overwritten(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    source = tmp_path / "model" / "in.safetensors"
    write_safetensors(source, lazy(), {})
    link = tmp_path / "link.safetensors"
    if form in ("symlink", "input is a link"):
        link.symlink_to(source)
    elif form == "hard link":
        os.link(source, link)
    out, given = {
        "same path": (source, source),
        "relative": (Path("model/../model/in.safetensors"), source),
        "symlink": (link, source),
        "hard link": (link, source),
        "input is a link": (source, link),
        "input folder": (tmp_path / "model", source),
        "file of the input folder": (source, tmp_path / "model"),
    }[form]
    before = sha256_file(source)
    for force in (False, True):
        with pytest.raises(OutputExistsError) as caught:
            check_output(out, [tmp_path / "elsewhere", given], force)
        assert "is the input" in str(caught.value)
    assert sha256_file(source) == before
    check_output(tmp_path / "new.safetensors", [source, tmp_path / "model"], False)


def test_copy_file(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(bytes(range(256)) * 100_000)
    result = copy_file(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert (result.bytes, result.sha256) == (25_600_000, None)
    with pytest.raises(OutputExistsError, match="already there"):
        copy_file(source, target)
    with pytest.raises(OutputExistsError, match="is the input"):
        copy_file(source, source, force=True)


# --- folders and shards -----------------------------------------------------------------------------------------------


def test_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    _old_output(tmp_path / "x", "folder")
    with pytest.raises(OutputExistsError), output_folder(tmp_path / "x" / "out"):
        pytest.fail("the block must not be entered")
    with output_folder(tmp_path / "x" / "out", force=True) as inside:
        assert (tmp_path / "x" / "out" / "adapter_model.bin").exists()  # the old one is there until the new one is complete
        (inside / "sub").mkdir()
        write_text_file(inside / "sub" / "new.json", "ä\n")
    assert snapshot(tmp_path / "x") == {"out/sub/new.json": "ä\n".encode()}


def shard_names(folder: Path) -> list[str]:
    return [name for name in listing(folder) if name.endswith(".safetensors")]


def test_shards_and_index(tmp_path: Path) -> None:
    _write_shards(tmp_path)  # 24, 20, 6 and 3 bytes at 20 a file: one tensor is larger than a shard
    assert shard_names(tmp_path) == [f"out-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "out.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 53}
    assert list(index["weight_map"].values()) == [f"out-0000{i}-of-00003.safetensors" for i in (1, 2, 3, 3)]
    source = open_source(tmp_path)
    assert source.warnings == []
    assert all(torch.equal(source.tensors[name].load(), tensor) for name, tensor in TENSORS.items())


def test_shards_of_an_earlier_run_are_not_mixed_in(tmp_path: Path) -> None:
    (tmp_path / "out-00001-of-00009.safetensors").write_bytes(b"stale")
    (tmp_path / "out.safetensors").write_bytes(b"stale")
    sink = TensorSink(tmp_path / "out.safetensors", {}, max_shard_bytes=20)
    sink.declare("a", "U8", (30,))
    sink.declare("b", "U8", (30,))
    with pytest.raises(OutputExistsError, match=r"out\.safetensors"):
        sink.write("a", BytesTensor(b"\0" * 30, "U8", (30,)))
    sink.abort()
    assert len(listing(tmp_path)) == 2
    _write_shards(tmp_path)
    assert shard_names(tmp_path) == [f"out-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    with TensorSink(tmp_path / "out.safetensors", {}, force=True, max_shard_bytes=1000) as sink:  # fits one file now
        sink.declare("a", "U8", (3,))
        sink.write("a", BytesTensor(b"abc", "U8", (3,)))
    assert listing(tmp_path) == ["out.safetensors"]


def test_stamped_shards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        TensorSink(tmp_path / "x.safetensors", {}, stamp_hashes=True, max_shard_bytes=10)


def test_registry_of_temporaries_is_empty_afterwards() -> None:
    assert not atomic._ACTIVE


def test_a_stale_modelspec_hash_is_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    payload = bytes(range(8))
    write_safetensors(path, {"a": BytesTensor(payload, "U8", (8,))}, {"modelspec.hash_sha256": ""})
    stored = "0x" + hashlib.sha256(payload).hexdigest()
    assert stored_hash_problems(path, {"modelspec.hash_sha256": stored}) == []
    (found,) = stored_hash_problems(path, {"modelspec.hash_sha256": stored[:-1] + "g"})
    assert (found.severity, found.code, found.site) == ("warning", "stale-hash", "modelspec.hash_sha256")

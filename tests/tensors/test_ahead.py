"""Blocks computed ahead: the bytes of one thread, whatever the threads; a bounded window; no thread left behind."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.errors import InputError, LoraToolsError, MalformedError, WriteError
from loratools.tensors import ahead, payload
from loratools.tensors.ahead import write_all
from loratools.tensors.lazy import CHUNK, ByteFile, BytesTensor, ComputedTensor, LazyTensor, StoredTensor, from_torch
from loratools.tensors.writer import TensorSink


class Blocks(LazyTensor):
    """A U8 tensor made of the given pieces of work."""

    def __init__(self, size: int, *work: Callable[[], bytes | memoryview]) -> None:
        self.dtype, self.shape, self.work = "U8", (size,), work

    def load(self) -> torch.Tensor:
        raise NotImplementedError

    def chunks(self) -> Iterator[bytes]:
        return (bytes(block()) for block in self.work)

    def blocks(self) -> Iterator[Callable[[], bytes | memoryview]]:
        return iter(self.work)


def written(path: Path, tensors: dict[str, LazyTensor], threads: int, **options: Any) -> TensorSink:
    with TensorSink(path, {}, **options) as sink:
        for name, tensor in tensors.items():
            sink.declare(name, tensor.dtype, tensor.shape)
        write_all(sink, tensors, threads)
    return sink


def content(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 + struct.unpack("<Q", data[:8])[0] :]


@pytest.fixture
def stored(tmp_path: Path) -> Callable[[int, int], StoredTensor]:
    """A tensor at [start, start + size) of one file of 20 MB of noise."""
    data = torch.randint(0, 256, (20_000_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).numpy().tobytes()
    (tmp_path / "noise").write_bytes(data)
    file = ByteFile(tmp_path / "noise")
    return lambda start, size: StoredTensor(file, start, "U8", (size,))


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def mixed(stored: Callable[[int, int], StoredTensor]) -> tuple[dict[str, LazyTensor], bytes]:
    """Runs, gaps, a large tensor, none, blocks that end out of order; and the bytes by hand."""

    def late(number: int) -> Callable[[], bytes]:
        def block() -> bytes:
            time.sleep(0.002 * (7 - number))
            return bytes([number]) * 1000

        return block

    noise = stored(0, 20_000_000)
    data = b"".join(noise.chunks())
    tensors: dict[str, LazyTensor] = {
        "run 1": stored(10, 100),
        "run 2": stored(110, 4_000_000).reshape((4000, 1000)),
        "run 3": stored(4_000_110, 12_000_000),
        "gap": stored(10, 90),
        "back": stored(0, 10),
        "empty": BytesTensor(b"", "F32", (0, 4)),
        "blocks": Blocks(7000, *(late(number) for number in range(7))),
        "views": Blocks(80, lambda: memoryview(struct.pack("<10d", *range(10))).cast("d"), lambda: memoryview(b"")),
        "computed": ComputedTensor("F32", (3,), lambda: torch.tensor([1.0, 2.0, 3.0])),
        "last": stored(19_000_000, 1_000_000),
    }
    expected = data[10:16_000_110] + data[10:100] + data[:10]
    expected += b"".join(bytes([number]) * 1000 for number in range(7)) + struct.pack("<10d", *range(10)) + struct.pack("<3f", 1, 2, 3)
    return tensors, expected + data[19_000_000:]


@pytest.mark.parametrize("digest", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_bytes_in_order(threads: int, digest: bool, stored: Any, tmp_path: Path) -> None:
    tensors, expected = mixed(stored)
    sink = written(tmp_path / "x.safetensors", tensors, threads, digest=digest)
    assert content(tmp_path / "x.safetensors") == expected
    whole = hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    assert sink.result.sha256 == (whole if digest else None)


def test_runs_end_with_their_shard(stored: Any, tmp_path: Path) -> None:
    """Six tensors in a row of the source, two a file."""
    tensors: dict[str, LazyTensor] = {f"t{i}": stored(i * 2_000_000, 2_000_000) for i in range(6)}
    sink = written(tmp_path / "x.safetensors", tensors, 2, digest=False, max_shard_bytes=4_000_000)
    assert len(sink.payloads) == 3
    noise = b"".join(stored(0, 12_000_000).chunks())
    parts = [content(tmp_path / f"x-0000{i}-of-00003.safetensors") for i in (1, 2, 3)]
    assert [len(part) for part in parts] == [4_000_000] * 3
    assert b"".join(parts) == noise


def test_blocks_are_the_chunks(stored: Any) -> None:
    long = stored(3, CHUNK + 5)
    assert [len(block()) for block in long.blocks()] == [CHUNK, 5]
    for tensor in (long, long.reshape((1, CHUNK + 5)), BytesTensor(b"abc", "U8", (3,)), from_torch(torch.arange(5.0)), stored(0, 0)):
        assert b"".join(block() for block in tensor.blocks()) == b"".join(tensor.chunks())


# --- the window ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "most"), [(1 << 30, ahead.BLOCKS), (250, 2 + 3)])
def test_the_window_is_bounded(limit: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 threads: so many blocks by number; by bytes, 100 each: still open with 2 finished ones, and then each thread may take one."""
    monkeypatch.setattr(ahead, "WINDOW", limit)
    begun, seen = [0], []
    lock = threading.Lock()

    def block() -> bytes:
        with lock:
            begun[0] += 1
        return b"x" * 100

    tensors: dict[str, LazyTensor] = {f"t{i:03d}": Blocks(100, block) for i in range(60)}
    real = payload.Payload.write

    def slowly(self: payload.Payload, first: str, last: str, source: Any) -> None:
        time.sleep(0.01)
        seen.append(begun[0] - int(first[1:]))  # begun and not yet asked for
        real(self, first, last, source)

    monkeypatch.setattr(payload.Payload, "write", slowly)
    written(tmp_path / "x.safetensors", tensors, 3)
    assert content(tmp_path / "x.safetensors") == b"x" * 6000
    assert 2 <= max(seen) <= most


def test_blocks_run_side_by_side(tmp_path: Path) -> None:
    """Four blocks that wait for each other end only if four threads run them."""
    together = threading.Barrier(4, timeout=20)

    def block() -> bytes:
        together.wait()
        return b"x"

    written(tmp_path / "x.safetensors", {"a": Blocks(2, block, block), "b": Blocks(1, block), "c": Blocks(1, block)}, 4)
    assert content(tmp_path / "x.safetensors") == b"xxxx"


def test_progress_is_bytes_written(stored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_RUN", 3000)
    tensors: dict[str, LazyTensor] = {f"t{i}": stored(i * 1000, 1000) for i in range(7)} | {"end": BytesTensor(b"abc", "U8", (3,))}
    told: list[int] = []
    with TensorSink(tmp_path / "x.safetensors", {}, digest=False) as sink:
        for name, tensor in tensors.items():
            sink.declare(name, tensor.dtype, tensor.shape)
        write_all(sink, tensors, 1, told.append)
    assert told == [3000, 6000, 7000, 7003]


# --- failures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("error", [InputError("NaN"), ValueError("defect"), MemoryError()], ids=repr)
def test_the_block_s_exception_is_the_caller_s(error: Exception, threads: int, tmp_path: Path) -> None:
    def bad() -> bytes:
        raise error

    good = Blocks(2000, *[lambda: b"x" * 100] * 20)
    with pytest.raises(type(error)) as caught:
        written(tmp_path / "x.safetensors", {"a": good, "b": Blocks(100, bad), "c": good}, threads)
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_an_iterator_that_breaks(tmp_path: Path) -> None:
    class Broken(Blocks):
        def blocks(self) -> Iterator[Callable[[], bytes | memoryview]]:
            yield lambda: b"x"
            raise InputError("no more")

    with pytest.raises(InputError, match="no more"):
        written(tmp_path / "x.safetensors", {"a": Blocks(1, lambda: b"y"), "b": Broken(2)}, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_cannot_be_read_names_its_tensor(tmp_path: Path) -> None:
    def bad() -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(LoraToolsError, match="b: cannot read the tensor: Input/output error"):
        written(tmp_path / "x.safetensors", {"a": Blocks(1, lambda: b"y"), "b": Blocks(1, bad)}, 2)


@pytest.mark.parametrize("size", [99, 101])
def test_a_tensor_of_another_size(size: int, tmp_path: Path) -> None:
    with pytest.raises(LoraToolsError, match="declared 100 bytes"):
        written(tmp_path / "x.safetensors", {"a": Blocks(100, lambda: b"x" * size), "b": Blocks(1, lambda: b"y")}, 2)


def test_other_tensors_than_declared(tmp_path: Path) -> None:
    sink = TensorSink(tmp_path / "x.safetensors", {})
    sink.declare("a", "U8", (1,))
    with pytest.raises(LoraToolsError) as caught:
        write_all(sink, {"b": Blocks(1, lambda: b"y")}, 2)
    assert caught.value.details == ["a", "b"]
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_soon(tmp_path: Path) -> None:
    """The signal comes while 200 blocks of 50 ms wait: only those that run are waited for."""

    def block() -> bytes:
        time.sleep(0.05)
        return b"x"

    def interrupting() -> bytes:
        os.kill(os.getpid(), signal.SIGINT)
        return block()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            written(tmp_path / "x.safetensors", {"a": Blocks(203, *[block] * 3, interrupting, *[block] * 199)}, 2)
        assert time.monotonic() - start < 2
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(tmp_path.iterdir()) == []


# --- torch --------------------------------------------------------------------------------------------------------------


def test_one_torch_thread_a_worker(tmp_path: Path) -> None:
    before, seen = torch.get_num_threads(), set()
    torch.set_num_threads(3)
    try:

        def block() -> bytes:
            time.sleep(0.01)
            seen.add((threading.get_ident(), torch.get_num_threads()))
            return b"x"

        written(tmp_path / "x.safetensors", {"a": Blocks(20, *[block] * 20)}, 3)
        assert {count for _, count in seen} == {1}
        assert len(seen) == 3
        assert torch.get_num_threads() == 3
        after: list[int] = []
        thread = threading.Thread(target=lambda: after.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert after == [3]
    finally:
        torch.set_num_threads(before)


def test_nothing_computed_nothing_imported(stored: Any, tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from loratools.tensors.ahead import write_all
        from loratools.tensors.lazy import ByteFile, BytesTensor, StoredTensor
        from loratools.tensors.writer import TensorSink
        file = ByteFile(Path("noise"))
        tensors = {"a": StoredTensor(file, 5, "U8", (9_000_000,)).reshape((9000, 1000)), "b": BytesTensor(b"abc", "U8", (3,))}
        with TensorSink("x.safetensors", {}, digest=True) as sink:
            for name, tensor in tensors.items():
                sink.declare(name, tensor.dtype, tensor.shape)
            write_all(sink, tensors, 2)
        print("torch" in sys.modules)
    """
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout == "False\n"
    assert content(tmp_path / "x.safetensors") == b"".join(stored(5, 9_000_000).chunks()) + b"abc"


# --- copies in the kernel -----------------------------------------------------------------------------------------------

KERNEL = pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="needs copy_file_range")


@KERNEL
@pytest.mark.parametrize(("digest", "copied"), [(False, True), (True, False)])
def test_only_without_a_digest(digest: bool, copied: bool, stored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = os.copy_file_range

    def counted(*arguments: Any) -> int:
        calls.append(real(*arguments))
        return calls[-1]

    monkeypatch.setattr(os, "copy_file_range", counted)
    written(tmp_path / "x.safetensors", {"a": stored(1, 3_000_000), "b": stored(3_000_001, 7)}, 2, digest=digest)
    assert sum(calls) in ((3_000_007,) if copied else (0,))  # a file system may refuse, but it does not here
    assert content(tmp_path / "x.safetensors") == b"".join(stored(1, 3_000_007).chunks())


@KERNEL
@pytest.mark.parametrize("first", [0, 700_000, 2_000_000], ids="{} bytes first".format)
@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EIO, 0], ids=str)
def test_whatever_stops_the_kernel(code: int, first: int, stored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file system, an old kernel, a short or an empty answer: the rest goes through memory, the bytes are the same."""
    real, done = os.copy_file_range, [0]

    def stopping(source: int, target: int, count: int, start: int, offset: int) -> int:
        if done[0] < first:
            done[0] += real(source, target, min(count, first - done[0]), start, offset)
            return done[0]
        if code:
            raise OSError(code, os.strerror(code))
        return 0

    monkeypatch.setattr(os, "copy_file_range", stopping)
    written(tmp_path / "x.safetensors", {"a": stored(1, 3_000_000)}, 2, digest=False)
    assert done[0] == first
    assert content(tmp_path / "x.safetensors") == b"".join(stored(1, 3_000_000).chunks())


@KERNEL
def test_a_full_disk_or_a_shorter_source(stored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = sorted(tmp_path.iterdir())
    with pytest.raises(MalformedError, match="became shorter"):
        written(tmp_path / "x.safetensors", {"a": stored(18_000_000, 3_000_000)}, 2, digest=False)
    monkeypatch.setattr(os, "copy_file_range", full)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(WriteError, match="the disk is full"):
        written(tmp_path / "x.safetensors", {"a": stored(1, 3_000_000)}, 2, digest=False)
    assert sorted(tmp_path.iterdir()) == before

"""What happens to OUT when an extraction cannot end: none, or the old one, and nothing beside it; the spool never has a name."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.operations.extract import extract
from loratools.tensors import atomic, spool
from tests.hostile.conftest import tree
from tests.hostile.test_merge_faults import _limited, _struck, ends, visible
from tests.operations.made import render

pytestmark = [pytest.mark.hostile, pytest.mark.filterwarnings("ignore")]

ROWS, COLUMNS, LAYERS = 320, 256, 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base.safetensors and tuned.safetensors: four of Flux' modulations with their biases, factors of 74 kB each at rank 32."""
    folder, noise = tmp_path_factory.mktemp("inputs"), torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        tensors[f"double_blocks.{layer}.img_mod.lin.weight"] = torch.randn(ROWS, COLUMNS, generator=noise)
        tensors[f"double_blocks.{layer}.img_mod.lin.bias"] = torch.randn(ROWS, generator=noise)
    after = {key: value + 0.1 * torch.randn(value.shape, generator=noise) for key, value in tensors.items()}
    (folder / "base.safetensors").write_bytes(render(tensors))
    (folder / "tuned.safetensors").write_bytes(render(after))
    return folder


@pytest.fixture(params=["kohya", "peft"])
def job(request: Any, inputs: Path, tmp_path: Path) -> tuple[str, Path, Path, Path]:
    """(dialect, BASE, TUNED, OUT): a file, and a folder."""
    out = tmp_path / ("out" if request.param == "peft" else "out.safetensors")
    return request.param, inputs / "base.safetensors", inputs / "tuned.safetensors", out


def arguments(job: tuple[str, Path, Path, Path], *more: str) -> list[str]:
    dialect, base, other, out = map(str, job)
    return ["extract", base, other, out, "--to", dialect, "--threads", "1", *more]


def old_output(job: tuple[str, Path, Path, Path]) -> None:
    """An output of an earlier run, other than what this one will write."""
    extract(*job[1:], to=job[0], rank=2)


# --------------------------------------------------------------------------------------------------------- processes that die


def _struck_while_spooling(moment: int, number: int) -> None:
    """A signal to this process just before the n-th tensor is parked."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    real, count = spool.Spool.add, [0]

    def struck(self: spool.Spool, tensor: torch.Tensor) -> Any:
        count[0] += 1
        if count[0] == moment:
            os.kill(os.getpid(), number)
        return real(self, tensor)

    spool.Spool.add = struck  # type: ignore[method-assign]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", [1, 4, 3 * LAYERS])
def test_a_signal_while_spooling(moment: int, number: signal.Signals, old: bool, job: tuple[str, Path, Path, Path], tmp_path: Path) -> None:
    """Even kill -9 leaves nothing at all: the spool has no name."""
    if old:
        old_output(job)
    before = tree(tmp_path)
    code, told = ends(arguments(job, "--force"), _struck_while_spooling, moment, number)
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else {signal.SIGINT: 1}.get(number, code))
    assert code not in (0, None)
    assert "Traceback" not in told
    assert tree(tmp_path) == before


MOMENTS = [("write_at", 1), ("write_at", 3), ("finish", 1), ("commit", 1)]


@pytest.mark.parametrize(("call", "moment"), MOMENTS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_while_writing(number: signal.Signals, call: str, moment: int, job: tuple[str, Path, Path, Path], tmp_path: Path) -> None:
    """The old output; what kill -9 leaves is hidden, and the next run clears it away and writes what an undisturbed one writes."""
    old_output(job)
    before = tree(tmp_path)
    code, _ = ends(arguments(job, "--force"), _struck, call, moment, number)
    assert code != 0
    assert visible(tmp_path) == before
    if number == signal.SIGTERM:
        assert tree(tmp_path) == before
    extract(*job[1:], to=job[0], force=True)
    extract(*job[1:3], tmp_path / f"again{job[3].suffix}", to=job[0])
    assert tree(tmp_path).keys() == visible(tmp_path).keys()
    again = tmp_path / f"again{job[3].suffix}"
    assert tree(job[3]) == tree(again) if job[3].is_dir() else job[3].read_bytes() == again.read_bytes()


SLOW = """
    import sys, time
    from loratools.tensors import spool
    add = spool.Spool.add
    def slowly(self, tensor):
        print("parking", flush=True)
        time.sleep(0.5)
        return add(self, tensor)
    spool.Spool.add = slowly
    from loratools.cli.main import cli
    cli.main(sys.argv[1:])
"""


@pytest.fixture
def slow() -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    """An extraction as a user starts it, half a second for every tensor."""
    started: list[subprocess.Popen[str]] = []

    def start(words: list[str]) -> subprocess.Popen[str]:
        heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        command = [sys.executable, "-c", textwrap.dedent(SLOW), *words]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_from_outside(number: signal.Signals, inputs: Path, slow: Any, tmp_path: Path) -> None:
    """It comes from another process while threads work."""
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    process = slow(["extract", str(inputs / "base.safetensors"), str(inputs / "tuned.safetensors"), str(out), "--force", "--threads", "2"])
    assert any(line.startswith("parking") for line in process.stdout)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert "Traceback" not in told
    assert tree(tmp_path) == {"out.safetensors": b"old"}


# ------------------------------------------------------------------------------------------------------------ disks that fail


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["pwrite", "replace", "rename"])
def test_every_call_that_can_fail(
    call: str, code: int, job: tuple[str, Path, Path, Path], run: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Each of the calls in turn, of the spool's and the writer's: exit 1, the reason, the old output untouched, nothing beside it."""
    old_output(job)
    before, real, calls, fails_at = tree(tmp_path), getattr(os, call), [0], 0

    def failing(*given: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == fails_at:
            raise OSError(code, os.strerror(code))
        return real(*given, **options)

    monkeypatch.setattr(os, call, failing)
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    ended = None
    for fails_at in range(1, 60):
        calls[0] = 0
        ended = run(*arguments(job, "--force", "--quiet"))
        if calls[0] < fails_at:  # nothing failed: every call has been tried
            break
        assert ended.exit_code == 1, (fails_at, ended.output)
        assert "cannot write" in ended.stderr
        assert "Traceback" not in ended.output
        assert tree(tmp_path) == before, fails_at
    assert ended is not None
    assert ended.exit_code == 0
    assert visible(tmp_path) == tree(tmp_path) != before
    assert fails_at > (3 * LAYERS if call == "pwrite" else 0)


@pytest.mark.parametrize("size", [100, 50_000, 300_000])
def test_a_disk_that_gets_full(size: int, job: tuple[str, Path, Path, Path], tmp_path: Path) -> None:
    """RLIMIT_FSIZE stops the spool wherever it is."""
    old_output(job)
    before = tree(tmp_path)
    code, told = ends(arguments(job, "--force"), _limited, size)
    assert code == 1
    assert "cannot write" in told
    assert "Traceback" not in told
    assert tree(tmp_path) == before


def test_a_value_that_is_no_number_leaves_no_output(inputs: Path, run: Any, tmp_path: Path) -> None:
    """The last tensor's: everything before it is parked when it shows."""
    data = bytearray((inputs / "tuned.safetensors").read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"
    (tmp_path / "nan.safetensors").write_bytes(data)
    before = tree(tmp_path)
    ended = run("extract", inputs / "base.safetensors", tmp_path / "nan.safetensors", tmp_path / "out.safetensors")
    assert ended.exit_code == 3
    assert f"double_blocks.{LAYERS - 1}.img_mod.lin.bias: TUNED holds NaN" in ended.stderr
    assert tree(tmp_path) == before


def test_a_model_that_gets_shorter_while_it_is_read(inputs: Path, run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Another process cuts TUNED: an error that names it, and no output."""
    other = tmp_path / "tuned.safetensors"
    other.write_bytes((inputs / "tuned.safetensors").read_bytes())
    real = spool.Spool.add

    def cut(self: spool.Spool, tensor: torch.Tensor) -> Any:
        os.truncate(other, 400_000)
        return real(self, tensor)

    monkeypatch.setattr(spool.Spool, "add", cut)
    ended = run("extract", inputs / "base.safetensors", other, tmp_path / "out.safetensors", "--threads", "1")
    assert ended.exit_code in (1, 3)
    assert "tuned.safetensors" in ended.stderr
    assert "Traceback" not in ended.output
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.safetensors"]


def test_the_atomic_file_is_the_only_one_with_a_name(job: tuple[str, Path, Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    """Whatever lies in the folder while the output is written is the output's own temporary."""
    seen: set[str] = set()
    real = atomic.AtomicFile.write_at

    def watching(self: atomic.AtomicFile, offset: int, data: Any) -> None:
        seen.update(path.name for path in tmp_path.iterdir())
        real(self, offset, data)

    monkeypatch.setattr(atomic.AtomicFile, "write_at", watching)
    extract(*job[1:], to=job[0])
    assert seen
    assert all(name.startswith(f".{job[3].name}.") for name in seen)
    assert sorted(path.name for path in tmp_path.iterdir()) == [job[3].name]

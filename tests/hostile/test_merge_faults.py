"""What happens to OUT when a merge cannot end: none, or the old one, and nothing beside it but what the next run clears away.

Killed processes come from a fork server that has torch loaded: each is a process of its own and takes a fraction of a second.
"""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.cli.main import cli
from loratools.operations.merge import merge
from loratools.tensors import atomic
from tests.hostile.conftest import tree
from tests.operations.made import render
from tests.operations.merged import STEMS, modulations

pytestmark = [pytest.mark.hostile, pytest.mark.filterwarnings("ignore")]

SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["torch", "loratools.cli.main", "loratools.operations.merge"])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base.safetensors, base (shards in a folder) and style.safetensors: 1.8 MB in several writes."""
    folder, noise = tmp_path_factory.mktemp("inputs"), torch.Generator().manual_seed(5)
    modulations(folder, 960, 160)
    _shards(folder / "base", {f"model.{key}": value for key, value in _llama(noise).items()})
    factors = {}
    for layer in range(3):
        stem = f"base_model.model.model.layers.{layer}.mlp.up_proj"
        factors |= {f"{stem}.lora_A.weight": torch.randn(4, 64, generator=noise)}
        factors |= {f"{stem}.lora_B.weight": torch.randn(512, 4, generator=noise)}
    (folder / "words").mkdir()
    (folder / "words" / "adapter_model.safetensors").write_bytes(render(factors))
    (folder / "words" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 4}')
    return folder


def _llama(noise: torch.Generator) -> dict[str, torch.Tensor]:
    rows = {f"layers.{layer}.mlp.up_proj.weight": torch.randn(512, 64, generator=noise) for layer in range(3)}
    return {"embed_tokens.weight": torch.randn(100, 64, generator=noise), **rows}


def _shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """One tensor a shard, an index, a config and a tokenizer file."""
    folder.mkdir()
    names = {key: f"model-{number:05}-of-{len(tensors):05}.safetensors" for number, key in enumerate(tensors, 1)}
    for key, name in names.items():
        (folder / name).write_bytes(render({key: tensors[key]}, {"format": "pt"}))
    total = sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": names}))
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": false}')
    (folder / "vocab.json").write_text("{}")


FORMS = {"file": ("base.safetensors", "style.safetensors", "out.safetensors"), "shards": ("base", "words", "out")}


@pytest.fixture(params=FORMS)
def job(request: Any, inputs: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """(base, adapter, OUT): one file, and a folder of shards."""
    base, adapter, out = FORMS[request.param]
    return inputs / base, inputs / adapter, tmp_path / out


def arguments(job: tuple[Path, Path, Path], *more: str) -> list[str]:
    base, adapter, out = map(str, job)
    return ["merge", base, f"{adapter}:0.5", out, *more]


def old_output(job: tuple[Path, Path, Path]) -> None:
    """An output of an earlier run, other than what this one will write."""
    merge(job[0], [(job[1], 2.0)], job[2])


# --------------------------------------------------------------------------------------------------------- processes that die


def _struck(call: str, moment: int, number: int) -> None:
    """A signal to this process just before the n-th call of a method of AtomicFile."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    real, count = getattr(atomic.AtomicFile, call), [0]

    def struck(self: atomic.AtomicFile, *given: Any) -> Any:
        count[0] += 1
        if count[0] == moment:
            os.kill(os.getpid(), number)
        return real(self, *given)

    setattr(atomic.AtomicFile, call, struck)


def _limited(size: int) -> None:
    """No file of this process may become larger."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _process(words: list[str], prepare: Callable[..., None], given: tuple[Any, ...], told: Connection) -> None:
    """In a process of its own: the command line, and what it says on stderr."""
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    prepare(*given)
    try:
        cli.main(words)
    finally:
        told.send(sys.stderr.getvalue())


def ends(words: list[str], prepare: Callable[..., None], *given: Any) -> tuple[int | None, str]:
    """(exit code of the command, negative for a signal; stderr)"""
    mine, its = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=_process, args=(words, prepare, given, its))
    process.start()
    its.close()
    process.join(60)
    if process.is_alive():
        process.kill()
        pytest.fail("the merge did not end")
    try:
        return process.exitcode, mine.recv()
    except EOFError:  # killed before it could say anything
        return process.exitcode, ""


MOMENTS = [("write_at", 1), ("write_at", 2), ("write_at", 3), ("finish", 1), ("commit", 1)]


def visible(folder: Path) -> dict[str, bytes | None]:
    """What is below a folder but for hidden leftovers at its top."""
    return {name: data for name, data in tree(folder).items() if not name.startswith(".")}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(("call", "moment"), MOMENTS)
def test_kill_9(call: str, moment: int, old: bool, job: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """No OUT or the old one; what is left is hidden and goes with the next run, which writes what an undisturbed one writes."""
    if old:
        old_output(job)
    before = tree(tmp_path)
    code, _ = ends(arguments(job, "--force"), _struck, call, moment, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert visible(tmp_path) == before
    left = {name.partition("/")[0] for name in tree(tmp_path)} - {name.partition("/")[0] for name in before}
    assert all(name.startswith(f".{job[2].name}.") for name in left)
    assert left
    merge(job[0], [(job[1], 0.5)], job[2], force=True)
    merge(job[0], [(job[1], 0.5)], tmp_path / f"again{job[2].suffix}")
    assert tree(tmp_path).keys() == visible(tmp_path).keys()
    if job[2].is_file():
        assert job[2].read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    else:
        assert tree(job[2]) == tree(tmp_path / "again")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(("call", "moment"), [("write_at", 1), ("write_at", 3), ("finish", 1)])
def test_ctrl_c(call: str, moment: int, old: bool, job: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Exit 1, one line, the old output, nothing left behind."""
    if old:
        old_output(job)
    before = tree(tmp_path)
    code, told = ends(arguments(job, "--force"), _struck, call, moment, signal.SIGINT)
    assert code == 1
    assert "interrupted" in told
    assert "Traceback" not in told
    assert tree(tmp_path) == before


SLOW = """
    import sys, time
    from loratools.tensors import atomic
    write = atomic.AtomicFile.write_at
    def slowly(self, offset, data):
        print("writing", flush=True)
        time.sleep(0.5)
        write(self, offset, data)
    atomic.AtomicFile.write_at = slowly
    from loratools.cli.main import cli
    cli.main(sys.argv[1:])
"""


@pytest.fixture
def slow() -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    """A merge as a user starts it, half a second for every write."""
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


def test_ctrl_c_from_outside(inputs: Path, slow: Any, tmp_path: Path) -> None:
    """The signal comes from another process while threads compute: the same end."""
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    process = slow(["merge", str(inputs / "base.safetensors"), str(inputs / "style.safetensors"), str(out), "--force", "--threads", "4"])
    assert any(line.startswith("writing") for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "interrupted" in told
    assert "Traceback" not in told
    assert tree(tmp_path) == {"out.safetensors": b"old"}


# ------------------------------------------------------------------------------------------------------------ disks that fail


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["pwrite", "replace", "rename"])
def test_every_call_that_can_fail(call: str, code: int, job: tuple[Path, Path, Path], run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Each of the calls in turn: exit 1, the reason, the old output untouched, nothing beside it."""
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
    assert fails_at > 1 or (call, job[2].suffix) == ("rename", ".safetensors")


@pytest.mark.parametrize("size", [100, 4_000, 100_000])
def test_a_disk_that_gets_full(size: int, job: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """RLIMIT_FSIZE stops the writer wherever it is: in the header, in the first tensor, in a later one."""
    old_output(job)
    before = tree(tmp_path)
    code, told = ends(arguments(job, "--force"), _limited, size)
    assert code == 1
    assert "cannot write" in told
    assert "Traceback" not in told
    assert tree(tmp_path) == before


def test_a_failed_check_leaves_no_output(job: tuple[Path, Path, Path], run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """--verify finds bytes that were not meant: exit 4, the old output as it was."""
    old_output(job)
    before, real = tree(tmp_path), atomic.AtomicFile.write_at

    def flipped(self: atomic.AtomicFile, offset: int, data: Any) -> None:
        real(self, offset, data if len(data) < 50_000 else bytes(data[:40_000]) + b"\x7f\x7f\x7f" + bytes(data[40_003:]))

    monkeypatch.setattr(atomic.AtomicFile, "write_at", flipped)
    ended = run(*arguments(job, "--force", "--verify"))
    assert ended.exit_code == 4, ended.output
    assert tree(tmp_path) == before
    monkeypatch.undo()
    assert run(*arguments(job, "--force", "--verify")).exit_code == 0
    assert tree(tmp_path) != before


def test_a_value_that_overflows_leaves_no_output(inputs: Path, run: Any, tmp_path: Path) -> None:
    """Half of the file is written when it shows: exit 3, nothing is there."""
    base, adapter = inputs / "base.safetensors", f"{inputs / 'style.safetensors'}:1e6"
    ended = run("merge", base, adapter, tmp_path / "out.safetensors", "--dtype", "fp16")
    assert ended.exit_code == 3
    assert STEMS[0] in ended.stderr
    assert tree(tmp_path) == {}

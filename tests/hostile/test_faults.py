"""What happens to the output when a conversion cannot end: no OUT, or the old OUT, and nothing beside it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.tensors import atomic
from tests.hostile.conftest import tree
from tests.operations.made import SHAPES, four, kohya_file

pytestmark = pytest.mark.hostile

# a conversion in a process of its own; each write says so on stdout, so that it can be stopped at any of them
SLOW = """
    import sys, time
    from loratools.tensors import atomic
    write, pause = atomic.AtomicFile.write_at, float(sys.argv.pop(1))
    def slowly(self, offset, data):
        print("writing", len(data), flush=True)
        time.sleep(pause)
        write(self, offset, data)
    atomic.AtomicFile.write_at = slowly
    from loratools.cli.main import cli
    cli.main(sys.argv[1:])
"""


def started(pause: float, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(SLOW), str(pause), *map(str, arguments)]
    # a shell that runs the tests in the background hands down an ignored SIGINT
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)


def until_write(process: subprocess.Popen[str], number: int) -> bool:
    """Wait for the n-th write; False when it ended before."""
    assert process.stdout is not None
    seen = 0
    for line in process.stdout:
        seen += line.startswith("writing")
        if seen == number:
            return True
    return False


@pytest.fixture
def large(save: Any) -> Path:
    """24 MB in six modules: several writes of 8 MiB, and names that change."""
    noise = torch.Generator().manual_seed(3)
    tensors: dict[str, torch.Tensor] = {}
    for block in range(6):
        stem = f"lora_unet_double_blocks_{block}_img_mod_lin"
        tensors[f"{stem}.lora_down.weight"] = torch.randn(64, 1500, generator=noise)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(9000, 64, generator=noise)
        tensors[f"{stem}.alpha"] = torch.tensor(32.0)
    path: Path = save("large.safetensors", tensors)
    return path


# ------------------------------------------------------------------------------------------------------------- out of space


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("target", ["comfy", "diffusers", "peft"])
def test_a_disk_that_gets_full(target: str, old: bytes | None, large: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE stops the file at 10 MB, wherever the writer is."""
    out = tmp_path / "out"
    if old:
        out.write_bytes(old)
    before = tree(tmp_path)
    code = """
        import resource, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, 10_000_000))
        from loratools.cli.main import cli
        cli.main(sys.argv[1:])
    """
    command = [sys.executable, "-c", textwrap.dedent(code), "convert", str(large), str(out), "--to", target, "--force"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "cannot write" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert tree(tmp_path) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace"])
@pytest.mark.parametrize("target", ["comfy", "diffusers", "peft", "kohya"])
def test_every_call_that_can_fail(call: str, code: int, target: str, good: Path, run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Each write, sync and rename of a conversion fails in turn: exit 1, the reason, the old output untouched."""
    out = tmp_path / "out"
    if target == "peft":
        out.mkdir()
        (out / "adapter_config.json").write_text("old")
    else:
        out.write_bytes(b"old")
    before, real, fails_at = tree(tmp_path), getattr(os, call), 0
    calls = [0]

    def failing(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == fails_at:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    monkeypatch.setattr(os, call, failing)
    for fails_at in range(1, 30):
        calls[0] = 0
        result = run("convert", good, out, "--to", target, "--force")
        if calls[0] < fails_at:  # nothing failed: every call has been tried
            break
        if call == "fsync" and result.exit_code == 0:  # of the folder, after the rename: the file is complete
            before = tree(tmp_path)
            continue
        assert result.exit_code == 1, (fails_at, result.output)
        assert "Traceback" not in result.output
        if code != errno.EIO:
            assert "disk" in result.stderr
        assert tree(tmp_path) == before, fails_at
    assert fails_at > 1
    monkeypatch.undo()
    assert run("convert", good, out, "--to", target, "--force").exit_code == 0
    assert run("compare", good, out).exit_code == 0


def test_a_full_disk_is_seen_before_the_first_byte(large: Path, run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    real = os.statvfs

    def full(path: Any) -> Any:
        return os.statvfs_result((*real(path)[:3], 0, 0, *real(path)[5:]))

    monkeypatch.setattr(os, "statvfs", full)
    monkeypatch.setattr(os, "pwrite", lambda *_: pytest.fail("a byte was written"))
    before = tree(tmp_path)
    for target in ("comfy", "diffusers", "peft", "kohya"):
        result = run("convert", large, tmp_path / "out", "--to", target)
        assert result.exit_code == 1, (target, result.output)
        assert "disk is full" in result.stderr
        assert tree(tmp_path) == before


@pytest.mark.parametrize("target", ["comfy", "peft"])
def test_folders_that_cannot_be_written(target: str, good: Path, run: Any, tmp_path: Path) -> None:
    """The kernel's own folder refuses even root; a missing one is named with the command that makes it."""
    for out, word in ((Path("/proc/out"), "/proc"), (tmp_path / "no" / "such" / "out", "mkdir")):
        result = run("convert", good, out, "--to", target)
        assert result.exit_code == 1, result.output
        assert word in result.stderr
        assert "unexpected" not in result.stderr
    if os.geteuid() != 0:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        assert run("convert", good, locked / "out", "--to", target).exit_code == 1
        assert not list(locked.iterdir())


# ------------------------------------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("target", ["comfy", "peft"])
@pytest.mark.parametrize("moment", [1, 2, 4])
def test_kill_9_at_any_write(moment: int, target: str, large: Path, run: Any, tmp_path: Path) -> None:
    """The old output is there, whole; what the dead run left is hidden and goes with the next run."""
    out = tmp_path / "out"
    assert run("convert", large, out, "--to", target).exit_code == 0
    before = tree(tmp_path)
    process = started(0.3, "convert", large, out, "--to", target, "--force")
    assert until_write(process, moment)
    process.kill()
    process.communicate()
    after = tree(tmp_path)
    assert {name: data for name, data in after.items() if not name.startswith(".")} == before
    assert run("convert", large, out, "--to", target, "--force").exit_code == 0
    assert tree(tmp_path) == before  # the same bytes again, and no leftovers


def test_kill_9_at_random_moments(large: Path, run: Any, tmp_path: Path) -> None:
    """OUT is absent or whole, never a part of itself."""
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    assert run("convert", large, whole, "--to", "comfy").exit_code == 0
    for step in range(6):
        process = started(0.0, "convert", large, out, "--to", "comfy", "--force")
        until_write(process, 1)
        time.sleep(0.02 * step)
        process.kill()
        process.communicate()
        if out.exists():
            assert out.read_bytes() == whole.read_bytes()
            out.unlink()
    assert run("convert", large, out, "--to", "comfy").exit_code == 0
    assert sorted(item.name for item in tmp_path.iterdir()) == ["large.safetensors", "out.safetensors", "whole.safetensors"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("target", ["comfy", "peft"])
@pytest.mark.parametrize("old", [False, True])
def test_interrupted(number: signal.Signals, target: str, old: bool, large: Path, run: Any, tmp_path: Path) -> None:
    """Ctrl-C, and SIGTERM of a batch system: exit 1, one line, the old output, nothing left behind."""
    out = tmp_path / "out"
    if old:
        assert run("convert", large, out, "--to", target).exit_code == 0
    before = tree(tmp_path)
    process = started(1.0, "convert", large, out, "--to", target, *(["--force"] if old else []))
    assert until_write(process, 2)
    process.send_signal(number)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "interrupted" in told
    assert "Traceback" not in told
    assert tree(tmp_path) == before


# ---------------------------------------------------------------------------------------------------------- existing outputs


def alias(source: Path, how: str) -> Path:
    """Another way to the same file."""
    if how == "relative":
        return Path(os.path.relpath(source))
    if how == "dots":
        return source.parent / ".." / source.parent.name / source.name
    other = source.with_name(f"{how}.safetensors")
    if how == "symlink":
        other.symlink_to(source.name)
    elif how == "link to a link":
        alias(source, "symlink")
        other.symlink_to("symlink.safetensors")
    elif how == "hard link":
        os.link(source, other)
    return source if how == "path" else other


@pytest.mark.parametrize("how", ["path", "relative", "dots", "symlink", "link to a link", "hard link"])
@pytest.mark.parametrize("target", ["comfy", "kohya", "peft"])
def test_an_input_is_never_overwritten(how: str, target: str, good: Path, run: Any, digest: Callable[[Path], str]) -> None:
    before, out = digest(good), alias(good, how)
    for flags in ([], ["--force"], ["--force", "--dry-run"]):
        result = run("convert", good, out, "--to", target, *flags)
        assert result.exit_code == 2, result.output
        assert "input" in result.stderr
    assert digest(good) == before
    assert sorted(item.name for item in good.parent.iterdir()) == sorted(
        {good.name, out.name, *(["symlink.safetensors"] if how == "link to a link" else [])}
    )


def test_a_folder_is_never_written_into_its_input(peft: Any, randn: Any, run: Any, tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for path, (up, down) in four(randn).items():
        tensors |= {f"base_model.model.{path}.lora_A.weight": down, f"base_model.model.{path}.lora_B.weight": up}
    folder = peft("folder", tensors, {"r": 4, "lora_alpha": 8, "target_modules": list(SHAPES)})
    before = tree(tmp_path)
    outputs: list[tuple[Path, str]] = [
        (folder, "peft"),
        (folder, "comfy"),
        (folder / "adapter_model.safetensors", "comfy"),
        (tmp_path, "peft"),
        (folder / ".." / "folder", "peft"),
    ]
    for out, target in outputs:
        result = run("convert", folder, out, "--to", target, "--force")
        assert result.exit_code == 2, (out, target, result.output)
        assert tree(tmp_path) == before


def test_existing_outputs_need_force(good: Path, run: Any, tmp_path: Path) -> None:
    out, folder = tmp_path / "out.safetensors", tmp_path / "folder"
    out.write_bytes(b"old")
    folder.mkdir()
    (folder / "keep.txt").write_text("keep")
    before = tree(tmp_path)
    for target, where in (("comfy", out), ("peft", folder), ("peft", out), ("comfy", folder)):
        for flags in ([], ["--dry-run"]):
            result = run("convert", good, where, "--to", target, *flags)
            assert result.exit_code == 2, (target, where, result.output)
            assert "--force" in result.stderr or (target, where) in (("comfy", folder), ("peft", out))  # the other form: refused for good
            assert tree(tmp_path) == before
    assert run("convert", good, out, "--to", "comfy", "--force").exit_code == 0
    assert run("convert", good, folder, "--to", "peft", "--force").exit_code == 0
    assert sorted(item.name for item in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert [item.name for item in (tmp_path / "folder.replaced").iterdir()] == ["keep.txt"]  # what is no adapter's is not removed
    assert run("convert", good, folder, "--to", "peft", "--force").exit_code == 0
    assert not (tmp_path / "folder.replaced-2").exists()
    for converted in (out, folder):
        assert run("compare", good, converted).exit_code == 0


def test_the_working_directory_is_never_replaced(good: Path, run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    inside = tmp_path / "work" / "deep"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    for out in (".", "..", str(tmp_path / "work")):
        before = tree(tmp_path)
        result = run("convert", good, out, "--to", "peft", "--force")
        assert result.exit_code == 2, out
        assert "working directory" in result.stderr
        assert tree(tmp_path) == before


def test_a_failed_folder_leaves_the_old_one(good: Path, run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """The second file of the new folder cannot be written: the old folder is as it was, its own files included."""
    folder = tmp_path / "folder"
    assert run("convert", good, folder, "--to", "peft").exit_code == 0
    (folder / "mine.txt").write_text("mine")
    before, real = tree(tmp_path), atomic.AtomicFile.commit

    def failing(self: atomic.AtomicFile) -> None:
        if self.target.name == "adapter_config.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self)

    monkeypatch.setattr(atomic.AtomicFile, "commit", failing)
    result = run("convert", good, folder, "--to", "peft", "--force")
    assert result.exit_code == 1
    assert tree(tmp_path) == before


def test_of_several_problems_all_are_told(save: Any, randn: Any, run: Any, tmp_path: Path) -> None:
    """A bad input (3), an output that is there (2): one run says both, and the code is the first of 3, 2, 1."""
    tensors = kohya_file(four(randn))
    tensors["stray.lora_up.weight"] = torch.ones(2, 2)
    path, out = save("bad.safetensors", tensors), tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    result = run("convert", path, out, "--to", "comfy", "--json")
    assert result.exit_code == 3
    told = json.dumps(json.loads(result.stdout)["error"])
    assert "stray" in told
    assert "already there" in told
    assert out.read_bytes() == b"old"


def test_dry_run_writes_nothing(good: Path, run: Any, tmp_path: Path) -> None:
    before = tree(tmp_path)
    for target in ("comfy", "diffusers", "peft", "kohya"):
        result = run("convert", good, "--to", target, "--dry-run", "--json")
        assert result.exit_code == 0
        assert json.loads(result.stdout)["plan"]["bytes"] > 0
        assert tree(tmp_path) == before

"""Peak memory (VmHWM of a process of its own) and speed do not grow with the file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from loratools.tensors.header import render_header

pytestmark = pytest.mark.memory
GIB = 1 << 30

PREAMBLE = """
    import json, sys, time
    from loratools.tensors.hashes import sha256_file
    from loratools.tensors.reader import open_source
    from loratools.tensors.writer import copy_file, rewrite_metadata, write_safetensors

    def peak():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
"""


def sparse(path: Path, tensors: int = 16) -> Path:
    """A safetensors file of 1 GiB that takes no disk: header, then a hole."""
    size = GIB // tensors
    entries = {f"t{i:02d}": ("F32", (size // 4,), i * size, (i + 1) * size) for i in range(tensors)}
    header = render_header(entries, {"ss_x": "1"})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + GIB)
    return path


def measured(code: str, *arguments: Path) -> dict[str, float]:
    """Run code in a fresh process; it prints a JSON object."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", textwrap.dedent(PREAMBLE) + textwrap.dedent(code), *map(str, arguments)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result: dict[str, float] = json.loads(run.stdout)
    return result


JOBS = {
    "write": "write_safetensors(sys.argv[2], source.tensors, source.metadata, stamp_hashes=True)",
    "rewrite": "rewrite_metadata(sys.argv[1], sys.argv[2], {'k': 'v'})",
    "copy": "copy_file(sys.argv[1], sys.argv[2])",
}


@pytest.mark.parametrize("job", JOBS)
def test_a_gibibyte_is_copied_in_chunks(job: str, tmp_path: Path) -> None:
    code = f"""
        source = open_source(sys.argv[1])
        before = peak()
        {JOBS[job]}
        print(json.dumps({{"grown": peak() - before, "torch": "torch" in sys.modules}}))
    """
    seen = measured(code, sparse(tmp_path / "in.safetensors"), tmp_path / "out.safetensors")
    (tmp_path / "out.safetensors").unlink()
    assert seen["grown"] < 100 << 20
    assert not seen["torch"]


def test_opening_reads_the_header_only(tmp_path: Path) -> None:
    """Two files of 1 GiB: names, shapes and dtypes without their pages."""
    for name in ("a.safetensors", "b.safetensors"):
        sparse(tmp_path / name, 2048)
    code = """
        before = peak()
        count = sum(len(open_source(path).tensors) for path in sys.argv[1:])
        print(json.dumps({"count": count, "grown": peak() - before}))
    """
    seen = measured(code, tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert seen["count"] == 4096
    assert seen["grown"] < 30 << 20


def test_one_loaded_tensor_is_one_tensor(tmp_path: Path) -> None:
    """load() of a 64 MiB tensor of the gibibyte, one after the other: at most a few of them at a time."""
    code = """
        import torch
        source = open_source(sys.argv[1])
        before = peak()
        total = sum(float(tensor.load().sum()) for tensor in source.tensors.values())
        print(json.dumps({"grown": peak() - before, "total": total}))
    """
    seen = measured(code, sparse(tmp_path / "in.safetensors"))
    assert seen["total"] == 0
    assert seen["grown"] < 300 << 20

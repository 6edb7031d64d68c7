"""Peak memory (VmHWM of a process of its own) of merges: a few blocks, whatever the size of the base and whichever form it has.

Bases are holes of 1 and 2 GiB in tensors of 64 MiB, a LoRA of rank 64 on all of them; what is measured is the growth over a process
that has imported everything.
"""

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

MIB = 1 << 20
OUT, IN, RANK = 4096, 8192, 64  # bf16: 64 MiB
LIMIT = 300 * MIB

CODE = """
    import json, sys
    import torch
    from loratools.operations.merge import merge

    def peak():  # not getrusage: its maximum outlives exec and would be that of the test runner
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

    torch.ones(512, 512) @ torch.ones(512, 512)
    before = peak()
    found = merge(sys.argv[1], [(sys.argv[2], 1.0)], sys.argv[3], threads=4, alpha=64, **json.loads(sys.argv[4]))
    told = {key: found.get(key) for key in ("changed", "unchanged", "delta_retained", "verify", "residual")}
    print(json.dumps({"grown": peak() - before, "reported": found["peak_rss_mb"] * 2**20 - before, **told}))
"""


def name(number: int) -> str:
    return f"model.layers.{number}.mlp.down_proj"


def hole(path: Path, numbers: range) -> None:
    """bf16 tensors of zeros that take no disk."""
    size = OUT * IN * 2
    entries = {f"{name(number)}.weight": ("BF16", (OUT, IN), place * size, (place + 1) * size) for place, number in enumerate(numbers)}
    header = render_header(entries, {"format": "pt"})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size * len(entries))


def base(folder: Path, tensors: int, shards: int) -> Path:
    """One file, or a folder with an index."""
    folder.mkdir()
    if shards == 1:
        hole(folder / "model.safetensors", range(tensors))
        return folder / "model.safetensors"
    files, each = {}, tensors // shards
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        numbers = range(shard * each, (shard + 1) * each)
        hole(folder / file, numbers)
        files |= {f"{name(number)}.weight": file for number in numbers}
    index = {"metadata": {"total_size": tensors * OUT * IN * 2}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def lora(path: Path, tensors: int) -> Path:
    """A LoRA on that many layers in half precision: values between 0.03 and 2, all positive, so that no sum cancels."""
    entries, end = {}, 0
    for number in range(tensors):
        for leaf, shape in (("A", (RANK, IN)), ("B", (OUT, RANK))):
            size = 2 * shape[0] * shape[1]
            entries[f"base_model.model.{name(number)}.lora_{leaf}.weight"] = ("F16", shape, end, end + size)
            end += size
    block = bytearray(os.urandom(MIB))
    block[1::2] = bytes(0x28 | byte & 0x17 for byte in block[1::2])  # exponents of normal numbers
    with path.open("wb") as file:
        file.write(render_header(entries, {}))
        for start in range(0, end, MIB):
            file.write(block[: min(MIB, end - start)])
    return path


def merged(source: Path, adapter: Path, **options: object) -> dict[str, float]:
    """A merge in a fresh process; the output is deleted."""
    out = source.parent / "out.safetensors" if source.is_file() else source.with_name("out")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", textwrap.dedent(CODE), str(source), str(adapter), str(out), json.dumps(options)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for path in [out] if out.is_file() else [*out.iterdir()]:
        assert not path.name.endswith(".safetensors") or path.stat().st_blocks * 512 > 0.99 * path.stat().st_size  # it was written
        path.unlink()
    found: dict[str, float] = json.loads(run.stdout)
    return found


def test_a_large_base_costs_what_a_small_one_does(tmp_path: Path) -> None:
    """1 GiB in one file, 2 GiB in four shards."""
    grown = []
    for tensors, shards in ((16, 1), (32, 4)):
        seen = merged(base(tmp_path / f"{tensors}", tensors, shards), lora(tmp_path / f"{tensors}.safetensors", tensors))
        assert (seen["changed"], seen["unchanged"]) == (tensors, 0)
        assert seen["delta_retained"] == pytest.approx(1.0, abs=0.01)
        assert seen["grown"] < LIMIT
        grown.append(seen["grown"])
    assert grown[1] < 1.2 * grown[0]


def test_verification_and_residual_read_in_blocks(tmp_path: Path) -> None:
    """Both in float64, from factors of rank 64; neither holds a weight (256 MiB there). What is reported is the process' own maximum."""
    seen = merged(base(tmp_path / "base", 2, 1), lora(tmp_path / "lora.safetensors", 2), verify=True, residual=str(tmp_path / "rest"))
    assert (seen["verify"]["sites"], seen["residual"]["sites"]) == (2, 2)  # type: ignore[index]
    assert seen["grown"] < LIMIT
    assert seen["reported"] == pytest.approx(seen["grown"], abs=40 * MIB)

"""Peak memory (VmHWM of a process of its own) of extractions: a few copies of the largest tensor, whatever the size of the models.

TUNED's tensors are one file of random bf16 values under all names, BASE is a hole: what is measured is the growth over a process that
has imported everything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from loratools.tensors.header import render_header

pytestmark = pytest.mark.memory

MIB = 1 << 20
OUT, IN = 2048, 4096  # bf16: 16 MiB, the difference in float32 32 MiB

CODE = """
    import json, sys
    import torch
    from loratools.operations.extract import extract

    def peak():  # not getrusage: its maximum outlives exec and would be that of the test runner
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

    torch.linalg.svd(torch.ones(64, 64) @ torch.ones(64, 64))
    before = peak()
    found = extract(*sys.argv[1:4], **json.loads(sys.argv[4]))
    told = {key: found[key] for key in ("modules", "relative_error", "ranks")}
    print(json.dumps({"grown": peak() - before, "reported": found["peak_rss_mb"] * 2**20 - before, **told}))
"""


def entries(tensors: int) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    size = OUT * IN * 2
    return {
        f"double_blocks.{number}.img_mod.lin.weight": ("BF16", (OUT, IN), number * size, (number + 1) * size) for number in range(tensors)
    }


def models(folder: Path, tensors: int) -> tuple[Path, Path]:
    """(a base of zeros that takes no disk, tuned: rank 4 and noise)."""
    folder.mkdir()
    header, noise = render_header(entries(tensors), {}), torch.Generator().manual_seed(0)
    values = torch.randn(OUT, 4, generator=noise) @ torch.randn(4, IN, generator=noise) + 0.01 * torch.randn(OUT, IN, generator=noise)
    block = values.bfloat16().view(torch.uint8).numpy().tobytes()
    with (folder / "base.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + tensors * OUT * IN * 2)
    with (folder / "tuned.safetensors").open("wb") as file:
        file.write(header)
        for _ in range(tensors):
            file.write(block)
    return folder / "base.safetensors", folder / "tuned.safetensors"


def extracted(folder: Path, tensors: int, **options: object) -> dict[str, float]:
    """An extraction in a fresh process."""
    base, tuned = models(folder, tensors)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", textwrap.dedent(CODE), str(base), str(tuned), str(folder / "out.safetensors"), json.dumps(options)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    tuned.unlink()
    found: dict[str, float] = json.loads(run.stdout)
    assert found["modules"] == tensors
    return found


def test_a_large_model_costs_what_a_small_one_does(tmp_path: Path) -> None:
    """64 MiB and 256 MiB in each model: no more than rounding of pages; factors of 4 and 16 modules, 25 MB of them, lie on the disk."""
    small, large = (extracted(tmp_path / f"{tensors}", tensors, threads=1, rank=64, dtype="fp32", iterations=0) for tensors in (4, 16))
    assert (tmp_path / "16" / "out.safetensors").stat().st_size > 24 * MIB
    assert large["grown"] < small["grown"] + 6 * MIB
    assert large["grown"] < 6 * OUT * IN * 4
    assert large["reported"] == pytest.approx(large["grown"], abs=40 * MIB)


@pytest.mark.parametrize("options", [{"rank": "auto"}, {"budget": 2.0}])
def test_a_search_costs_what_its_largest_try_does(options: dict[str, object], tmp_path: Path) -> None:
    """Ranks that have to be found: a few more copies of a tensor, and of that one alone."""
    found = extracted(tmp_path / "models", 8, threads=1, **options)
    assert found["grown"] < 8 * OUT * IN * 4
    assert found["relative_error"] < 0.05


def test_threads_cost_their_own_tensors(tmp_path: Path) -> None:
    """Each thread holds a pair of its own."""
    one, two = (extracted(tmp_path / f"{threads}", 8, threads=threads, rank=8) for threads in (1, 2))
    assert two["grown"] < 2.2 * one["grown"]

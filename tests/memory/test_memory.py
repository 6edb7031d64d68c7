"""Peak memory of conversions, each in a process of its own: it does not grow with the file, and header work never imports torch.

Sizes are those of files people have: every module of the SDXL table at rank 64, the Flux double blocks at full width. What is
measured is VmHWM of a process that does nothing else; the files are seeded noise of 1 MiB, repeated.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from loratools.mapping.architectures import registry
from loratools.tensors.header import render_header
from tests.operations.made import width

pytestmark = pytest.mark.memory

MIB = 1 << 20
SDXL = {"c0": 320, "c1": 640, "c2": 1280, "temb": 1280, "ctx": 2048, "add": 2816}
Shapes = Mapping[str, tuple[int, ...]]

PREAMBLE = """
    import json, sys
    from loratools.operations.convert import convert
    from loratools.operations.inspect import inspect

    def peak():  # not getrusage: its maximum outlives exec and would be that of the test runner
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

    def done(**more):
        print(json.dumps({"peak": peak(), "torch": "torch" in sys.modules, **more}))
"""


def noise_file(path: Path, shapes: Shapes, metadata: Mapping[str, str] | None = None) -> Path:
    """Half precision values between 0.03 and 2 of either sign, alphas 8: finite, and fast to write."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        size = 2
        for number in shape:
            size *= number
        entries[name] = ("F16", shape, end, end + size)
        end += size
    block = bytearray(os.urandom(MIB))
    block[1::2] = bytes(0x28 | byte & 0x97 for byte in block[1::2])  # exponents of normal numbers
    header = render_header(entries, dict(metadata or {}))
    with path.open("wb") as file:
        file.write(header)
        for start in range(0, end, MIB):
            file.write(block[: min(MIB, end - start)])
        for name, (_, _, start, _) in entries.items():
            if name.endswith(".alpha"):
                file.seek(len(header) + start)
                file.write(b"\x00\x48")  # 8.0
    return path


def module(stem: str, out: int, in_: int, rank: int, kernel: tuple[int, ...] = ()) -> dict[str, tuple[int, ...]]:
    ones = tuple(1 for _ in kernel)
    return {f"{stem}.lora_down.weight": (rank, in_, *kernel), f"{stem}.lora_up.weight": (out, rank, *ones), f"{stem}.alpha": ()}


def sdxl_modules(rank: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """What sd-scripts trains of the denoiser: 722 modules, those of the attention blocks (2 transformer blocks where it is 640 wide)."""
    shallow = re.compile(r"(input_blocks\.[45]|output_blocks\.[345])\..*transformer_blocks\.[2-9]\.")
    for name, row in registry()["sdxl"].component("denoiser").table.names("orig"):
        out, in_ = width(row.total_out, SDXL), width(row.in_, SDXL) if row.in_ else None
        if shallow.match(name):
            continue
        if row.layer == "linear" and out and in_ and ("transformer_blocks" in name or "proj_" in name):
            yield module("lora_unet_" + name.replace(".", "_"), out, in_, rank)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """340 MB."""
    shapes = {key: shape for found in sdxl_modules(64) for key, shape in found.items()}
    path = noise_file(tmp_path_factory.mktemp("sdxl") / "sdxl.safetensors", shapes)
    assert path.stat().st_size > 340_000_000
    yield path
    path.unlink()


def measured(code: str, *arguments: object) -> dict[str, float]:
    """Run code in a fresh process, and give what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", textwrap.dedent(PREAMBLE) + textwrap.dedent(code), *map(str, arguments)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found: dict[str, float] = json.loads(run.stdout)
    return found


@pytest.mark.parametrize("target", ["kohya", "comfy", "kohya-diffusers"])
def test_renaming_a_large_file_costs_a_chunk(target: str, sdxl: Path, tmp_path: Path) -> None:
    """Copied byte for byte, or every name changed; the hashes that kohya's readers check are taken on the way."""
    out = tmp_path / "out.safetensors"
    seen = measured(
        "found = convert(sys.argv[1], sys.argv[2], sys.argv[3]); done(sites=found['sites'], exact=found['exact'])", sdxl, out, target
    )
    assert (seen["sites"], seen["exact"]) == (722, True)
    assert abs(out.stat().st_size - sdxl.stat().st_size) < MIB
    out.unlink()
    assert not seen["torch"]
    assert seen["peak"] < 120 * MIB  # 60 MiB are Python and the tables


def test_folding_alpha_costs_a_few_tensors(sdxl: Path, tmp_path: Path) -> None:
    """Every factor is rewritten: torch is loaded (about 220 MiB), one tensor at a time is in memory."""
    out = tmp_path / "out.safetensors"
    base = measured("import torch; torch.ones(4).mul(2).sum().item(); done()")["peak"]
    seen = measured("convert(sys.argv[1], sys.argv[2], 'diffusers'); done()", sdxl, out)
    out.unlink()
    assert seen["peak"] - base < 120 * MIB
    assert seen["peak"] < 600 * MIB


def flux(path: Path, blocks: int, rank: int) -> Path:
    """Double blocks of Flux with fused qkv, in kohya's names. A block has 4 modules of rank `rank`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for block in range(blocks):
        for stream in ("img", "txt"):
            shapes |= module(f"lora_unet_double_blocks_{block}_{stream}_attn_qkv", 9216, 3072, rank)
            shapes |= module(f"lora_unet_double_blocks_{block}_{stream}_mod_lin", 18432, 3072, rank)
    return noise_file(path, shapes)


def test_splitting_fused_modules_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """40 MB and 400 MB of the same modules: the same peak."""
    peaks = []
    for blocks in (2, 19):
        source, out = flux(tmp_path / "flux.safetensors", blocks, 128), tmp_path / "out.safetensors"
        seen = measured("found = convert(sys.argv[1], sys.argv[2], 'diffusers'); done(sites=found['sites'])", source, out)
        assert seen["sites"] == blocks * 8
        peaks.append((source.stat().st_size, seen["peak"]))
        out.unlink()
        source.unlink()
    (small, low), (large, high) = peaks
    assert large > 9 * small
    assert large - small > 250 * MIB
    assert high - low < 40 * MIB


def test_checking_reads_a_tensor_at_a_time(sdxl: Path) -> None:
    seen = measured("found = inspect(sys.argv[1], check=True, hashes=True); done(problems=len(found['problems']))", sdxl)
    assert seen["problems"] == 0
    assert not seen["torch"]
    assert seen["peak"] < 120 * MIB


def test_a_checkpoint_of_seven_gigabytes_costs_its_header(tmp_path: Path) -> None:
    table = registry()["sdxl"].component("denoiser").table
    entries, end = {}, 0
    for name, row in table.names("orig"):
        out, in_ = width(row.total_out, SDXL), width(row.in_, SDXL) if row.in_ else None
        if out and in_:
            size = 4 * out * in_ * (9 if row.kernel == (3, 3) else 1)
            entries[f"model.diffusion_model.{name}.weight"] = ("F32", (out, in_, *row.kernel), end, end + size)
            end += size
    header = render_header(entries, {})
    path = tmp_path / "sd_xl.safetensors"
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + end)
    assert end > 7_000_000_000
    seen = measured("found = inspect(sys.argv[1]); done(tensors=found['checkpoint']['tensors'])", path)
    assert (seen["tensors"], seen["torch"]) == (len(entries), False)
    assert seen["peak"] < 100 * MIB

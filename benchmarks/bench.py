"""How long loratools takes, in ratios that a reader can check: `make bench`, or `python benchmarks/bench.py --size 100`.

Times are medians of several runs on files made here, of the shapes people have. Each operation runs in a fresh process and is
timed inside it, so that start-up is left out; what it is compared with runs in the same call on the same file. Prints a Markdown
table and writes benchmarks/results/<date>.json with the facts of the machine. No network, no model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from loratools.operations.env import environment  # noqa: E402
from loratools.tensors.header import render_header  # noqa: E402

MIB = 1 << 20
Shapes = dict[str, tuple[int, ...]]

# Linear modules of SDXL's attention blocks at rank r: (block of ldm, width, transformer blocks)
SDXL_BLOCKS = (
    *((f"input_blocks_{block}_1", width, depth) for block, width, depth in ((4, 640, 2), (5, 640, 2), (7, 1280, 10), (8, 1280, 10))),
    ("middle_block_1", 1280, 10),
    *((f"output_blocks_{block}_1", 1280, 10) for block in (0, 1, 2)),
    *((f"output_blocks_{block}_1", 640, 2) for block in (3, 4, 5)),
)


@dataclass(frozen=True)
class Row:
    """One line of the table. seconds: median; ratio: to `against` of the same call."""

    name: str
    bytes: int
    seconds: float
    spread: float
    against: str = ""
    ratio: float | None = None


# -------------------------------------------------------------------------------------------------------------------- inputs


def module(stem: str, out: int, in_: int, rank: int) -> Shapes:
    return {f"{stem}.lora_down.weight": (rank, in_), f"{stem}.lora_up.weight": (out, rank), f"{stem}.alpha": ()}


def sdxl(rank: int) -> Shapes:
    """The 722 modules sd-scripts trains in SDXL's UNet; 340 MB at rank 64."""
    shapes: Shapes = {}
    for block, width, depth in SDXL_BLOCKS:
        stem = f"lora_unet_{block}_"
        for name in ("proj_in", "proj_out"):
            shapes |= module(stem + name, width, width, rank)
        for number in range(depth):
            for name, out, in_ in layers(width):
                shapes |= module(f"{stem}transformer_blocks_{number}_{name}", out, in_, rank)
    return shapes


def layers(width: int) -> Iterator[tuple[str, int, int]]:
    for name in ("attn1_to_q", "attn1_to_k", "attn1_to_v", "attn1_to_out_0", "attn2_to_q", "attn2_to_out_0"):
        yield name, width, width
    for name in ("attn2_to_k", "attn2_to_v"):
        yield name, width, 2048
    yield "ff_net_0_proj", 8 * width, width
    yield "ff_net_2", width, 4 * width


def flux(rank: int) -> Shapes:
    """The 304 modules of a Flux.1 adapter with modulation, qkv and linear1 fused; 310 MB at rank 32."""
    shapes: Shapes = {}
    for block in range(19):
        for stream in ("img", "txt"):
            stem = f"lora_unet_double_blocks_{block}_{stream}_"
            for name, out, in_ in (("attn_qkv", 9216, 3072), ("attn_proj", 3072, 3072), ("mlp_0", 12288, 3072), ("mlp_2", 3072, 12288)):
                shapes |= module(stem + name, out, in_, rank)
            shapes |= module(stem + "mod_lin", 18432, 3072, rank)
    for block in range(38):
        for name, out, in_ in (("linear1", 21504, 3072), ("linear2", 3072, 15360), ("modulation_lin", 9216, 3072)):
            shapes |= module(f"lora_unet_single_blocks_{block}_{name}", out, in_, rank)
    return shapes


def checkpoint(gigabytes: float) -> Shapes:
    """Matrices of 20 MB under the names of an SDXL checkpoint, sparse on disk."""
    names = [f"model.diffusion_model.input_blocks.{block}.1.transformer_blocks.{number}" for block in (7, 8) for number in range(10)]
    wanted = round(gigabytes * 1e9 / (2 * 10240 * 1280))
    layer = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "ff.net.0.proj", "ff.net.2")
    return {f"{names[i % len(names)]}.{layer[i // len(names) % len(layer)]}.{i}.weight": (10240, 1280) for i in range(wanted)}


def write(path: Path, shapes: Shapes, *, sparse: bool = False) -> Path:
    """Half precision noise of normal numbers, alpha 8; sparse: a hole."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        size = 2
        for number in shape:
            size *= number
        entries[name] = ("F16", shape, end, end + size)
        end += size
    header = render_header(entries, {"ss_network_module": "networks.lora"})
    with path.open("wb") as file:
        file.write(header)
        if sparse:
            file.truncate(len(header) + end)
            return path
        block = bytearray(os.urandom(MIB))
        block[1::2] = bytes(0x28 | byte & 0x97 for byte in block[1::2])
        for start in range(0, end, MIB):
            file.write(block[: min(MIB, end - start)])
        for name, (_, _, start, _) in entries.items():
            if name.endswith(".alpha"):
                file.seek(len(header) + start)
                file.write(b"\x00\x48")
    return path


# ----------------------------------------------------------------------------------------------------------------- measuring

TIMED = """
import json, sys, time
from loratools.operations.convert import convert
from loratools.tensors.lazy import LazyTensor
if sys.argv[3] in ("diffusers", "peft"):
    import torch
start = time.perf_counter()
convert(sys.argv[1], sys.argv[2], sys.argv[3])
print(time.perf_counter() - start)
"""


def in_process(source: Path, out: Path, target: str) -> float:
    """Seconds of one conversion, measured inside a fresh process."""
    out.unlink(missing_ok=True)
    command = [sys.executable, "-c", TIMED, str(source), str(out), target]
    return float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def copied(source: Path, out: Path) -> float:
    """Seconds of cp, fsync and one sha256 of the copy."""
    out.unlink(missing_ok=True)
    start = time.perf_counter()
    shutil.copyfile(source, out)
    with out.open("rb+") as file:
        os.fsync(file.fileno())
    with out.open("rb") as file:
        hashlib.file_digest(file, "sha256")
    return time.perf_counter() - start


def wall(*arguments: object) -> float:
    """Seconds of a whole command, start-up included."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "loratools", *map(str, arguments)], cwd=ROOT, capture_output=True, check=True)
    return time.perf_counter() - start


def interleaved(runs: int, *jobs: Callable[[], float]) -> list[list[float]]:
    """`runs` times of each job, taken in turn, so that a slow minute of the machine hits all of them; one turn to warm up."""
    for job in jobs:
        job()
    times: list[list[float]] = [[] for _ in jobs]
    for turn in range(runs):
        for place in range(len(jobs)):
            number = (turn + place) % len(jobs)  # another one goes first in each turn
            times[number].append(jobs[number]())
    return times


def row(name: str, size: int, times: list[float], against: str = "", base: list[float] | None = None) -> Row:
    """A line from its times; the ratio is the median of the turns' ratios."""
    ratio = statistics.median(own / other for own, other in zip(times, base, strict=True)) if base else None
    return Row(
        name, size, _short(statistics.median(times)), _short(max(times) - min(times)), against, None if ratio is None else _short(ratio)
    )


def _short(value: float) -> float:
    return round(value, 4)


def measure(folder: Path, megabytes: int, runs: int) -> Iterator[Row]:
    """All lines of the table, as they are ready."""
    source, out = write(folder / "sdxl.safetensors", sdxl(_power_of_two(64 * megabytes / 340))), folder / "out.safetensors"
    size, plain = source.stat().st_size, "cp + fsync + sha256"
    targets = {"kohya": "copied", "comfy": "renamed", "kohya-diffusers": "renamed, hashed for its readers", "diffusers": "alpha folded"}
    base, *others = interleaved(runs, lambda: copied(source, out), *(_converting(source, out, target) for target in targets))
    yield row(plain, size, base)
    for (target, what), times in zip(targets.items(), others, strict=True):
        yield row(f"SDXL kohya → {target} ({what})", size, times, plain, base)
    source.unlink()
    source = write(folder / "flux.safetensors", flux(_power_of_two(32 * megabytes / 310)))
    size = source.stat().st_size
    base, split = interleaved(runs, lambda: copied(source, out), _converting(source, out, "diffusers"))
    yield row("Flux kohya → diffusers (qkv split, alpha folded)", size, split, plain, base)
    inspected, version, checked = interleaved(
        runs, lambda: wall("inspect", source, "--json"), lambda: wall("--version"), lambda: wall("inspect", source, "--check", "--json")
    )
    yield row("inspect, whole command", size, inspected, "loratools --version", version)
    yield row("inspect --check, whole command", size, checked, "loratools --version", version)
    source.unlink()
    out.unlink()
    source = write(folder / "sd_xl.safetensors", checkpoint(7.0), sparse=True)
    (inspected,) = interleaved(runs, lambda: wall("inspect", source, "--json"))
    yield row("inspect a checkpoint, whole command", source.stat().st_size, inspected)


def _power_of_two(rank: float) -> int:
    """The nearest power of two, as ranks are: alpha 8 folds into such a file without rounding."""
    return 1 << max(0, round(math.log2(rank)))


def _converting(source: Path, out: Path, target: str) -> Callable[[], float]:
    return lambda: in_process(source, out, target)


# ------------------------------------------------------------------------------------------------------------------- telling


def line(found: Row) -> str:
    ratio = "" if found.ratio is None else f"{found.ratio:.2f} × {found.against}"
    return f"| {found.name} | {found.bytes / 1e6:,.0f} MB | {found.seconds:.3f} s | {found.spread:.3f} s | {ratio} |"


def high_water(process: int) -> float:
    """VmHWM in MB; 0 for a process that is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)


def facts(runs: int) -> dict[str, Any]:
    """The machine, without its name; the processor as /proc/cpuinfo has it."""
    model = next((text.partition(":")[2].strip() for text in _cpuinfo() if text.startswith("model name")), "")
    return {**environment(), "processor": model, "runs": runs, "date": datetime.now(UTC).strftime("%Y-%m-%d")}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=340, help="megabytes of the adapters (default 340)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each job (default 5)")
    parser.add_argument("--folder", type=Path, help="where the files are made: the disk that is measured (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON; '-' writes none")
    settings = parser.parse_args()
    rows: list[Row] = []
    print("| job | file | median | spread | ratio |\n|---|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        for found in measure(Path(folder), settings.size, settings.runs):
            rows.append(found)
            print(line(found), flush=True)
    if str(settings.out) != "-":
        settings.out.mkdir(parents=True, exist_ok=True)
        machine = facts(settings.runs)
        path = settings.out / f"{machine['date']}-{settings.size}mb.json"
        path.write_text(json.dumps({"machine": machine, "rows": [vars(found) for found in rows]}, indent=2, ensure_ascii=False) + "\n")
        print(f"\n{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")


if __name__ == "__main__":
    main()

"""What an extraction and a resize cost, and how good they are: `make bench-extract`, or `python benchmarks/extracting.py --only sd1`.

Two checkpoints of a published shape are made here (SD1.5 2.1 GB, SDXL 6.9 GB, float16). The tuned one differs in every matrix and
convolution of UNet and text encoders by 128 directions of size i^-0.75 and noise beside them. An extraction at rank 32 is the whole
command in a fresh process. Against it: `torch.linalg.svd(D, full_matrices=False)` in float32, what sd-scripts does (with full matrices)
and nothing else of it; one layer of each shape is timed and counts as often as the shape occurs. The errors of all modules are
computed again here, in float64, from the three files. Of SDXL only time and memory are taken.

A resize takes a rank-64 LoRA of SDXL to rank 16, against forming and decomposing its products, and against PEFT's
add_weighted_adapter, by a sample of the same kind. LyCORIS' extraction and PEFT take part where they are installed.

Compared are seconds of processor time, those of a command over all its threads, those of a decomposition on one: a decomposition on
several is no cheaper, and neighbours on the machine disturb neither. Peak memory is the high-water mark that the operating system
keeps for the process. Needs diffusers, Linux, and twice the checkpoint in disk space.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.bench import Shapes, facts, high_water, sdxl  # noqa: E402
from benchmarks.bench import write as write_adapter  # noqa: E402
from benchmarks.merging import diffusion, write  # noqa: E402
from loratools.cli.main import COMMANDS  # noqa: E402

if TYPE_CHECKING:
    import numpy
    import torch

    Matrix = tuple[int, int]  # rows, columns

RANK = 32
SIGNAL, DECAY = 128, 0.75  # directions of a difference; the i-th is i^-0.75 of the first
STEP, NOISE = 1e-3, 1e-4  # standard deviation of an entry: of all directions together, of the noise
FROM, TO = 64, 16  # ranks of the resize
MINUTE, BRIEF = 60.0, 5.0  # seconds up to which a command, and a step, is run three times
LONGEST = 6144
SIDES = {"up.weight": "down.weight", "B.weight": "A.weight"}
PREFIXES = {"diffusion_model.": "model.diffusion_model.", "text_encoders.clip_l.transformer.": "cond_stage_model.transformer."}


# -------------------------------------------------------------------------------------------------------------------- inputs


def tuned(name: str) -> bool:
    """Does the tuned model differ here? In all matrices and convolutions but the table of tokens and the VAE."""
    return name.endswith("weight") and not name.startswith("first_stage_model.") and "token_embedding" not in name


def pair(folder: Path, name: str, shapes: Shapes) -> tuple[Path, Path]:
    """A base of noise, and a model tuned from it; every tensor of the difference is drawn anew."""
    import numpy

    base, other = write(folder / f"{name}.safetensors", shapes, "F16", 0.02), folder / f"{name}-tuned.safetensors"
    draw = numpy.random.default_rng(1)
    with base.open("rb") as source, other.open("wb") as target:
        start = source.read(8)
        target.write(start + source.read(int.from_bytes(start, "little")))
        for key, shape in sorted(shapes.items()):
            weight = numpy.fromfile(source, "<f2", math.prod(shape))
            if tuned(key) and len(shape) > 1:
                weight = (weight.astype("f4") + difference(draw, matrix(shape)).ravel()).astype("<f2")
            weight.tofile(target)
    return base, other


def difference(draw: numpy.random.Generator, shape: Matrix) -> numpy.ndarray:
    """A matrix (o, n) in float32 whose spectrum decays into noise."""
    import numpy

    rows, columns = shape
    sizes = numpy.arange(1, min(SIGNAL, *shape) + 1, dtype="f4") ** -DECAY
    up = draw.standard_normal((rows, len(sizes)), dtype="f4") * (sizes * STEP / numpy.linalg.norm(sizes))
    found: numpy.ndarray = draw.standard_normal(shape, dtype="f4") * numpy.float32(NOISE)
    found += up @ draw.standard_normal((len(sizes), columns), dtype="f4")
    return found


def matrix(shape: tuple[int, ...]) -> Matrix:
    return shape[0], math.prod(shape[1:])


# ----------------------------------------------------------------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Run:
    """A whole command in a fresh process. cpu: seconds over all its threads; peak: MB; told: its JSON object."""

    seconds: float
    cpu: float
    peak: float
    told: dict[str, Any]


def command(*arguments: object) -> Run:
    """Raises CalledProcessError.

    The high-water mark is read while the process runs: what wait4 tells would begin with the memory of this one.
    """
    line = [sys.executable, "-m", "loratools", *map(str, arguments), "--json", "--quiet"]
    with tempfile.TemporaryFile() as told:
        start, peak = time.perf_counter(), 0.0
        child = subprocess.Popen(line, cwd=ROOT, stdout=told)
        while not (ended := os.wait4(child.pid, os.WNOHANG))[0]:
            peak = max(peak, high_water(child.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(ended[1])
        told.seek(0)
        text = told.read().decode()
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, line, text)
    return Run(seconds, ended[2].ru_utime + ended[2].ru_stime, peak, json.loads(text))


def repeated(runs: int, out: Path, *arguments: object) -> Run:
    """The median of `runs` where one is shorter than a minute, with the largest peak."""
    found = [command(*arguments, out, "--force")]
    while found[0].seconds < MINUTE and len(found) < runs:
        found.append(command(*arguments, out, "--force"))
    seconds, cpu = (statistics.median(times) for times in zip(*((run.seconds, run.cpu) for run in found), strict=True))
    return Run(seconds, cpu, max(run.peak for run in found), found[-1].told)


def costs(job: str, modules: int, nbytes: int, run: Run) -> dict[str, Any]:
    """The first columns of a row."""
    times = {"seconds": round(run.seconds, 1), "cpu_seconds": round(run.cpu, 1), "peak_mb": round(run.peak)}
    return {"job": job, "modules": modules, "bytes": nbytes, **times, "relative_error": run.told["relative_error"]}


def timed(job: Callable[[], Any]) -> tuple[float, Any]:
    """(processor seconds on one thread, what the job returns); the median of three where it is brief."""
    import torch

    torch.set_num_threads(1)
    seconds: list[float] = []
    while len(seconds) < 3 and (not seconds or seconds[0] < BRIEF):
        start = time.process_time()
        found = job()
        seconds.append(time.process_time() - start)
    torch.set_num_threads(os.cpu_count() or 1)
    return statistics.median(seconds), found


# --------------------------------------------------------------------------------------------------------------------- extract


def extraction(name: str, folder: Path, runs: int, shapes: Shapes, *, sampled: bool) -> dict[str, Any]:
    """One pair, extracted: time and memory; with a sample of layers also what full decompositions take, and both errors."""
    base, other = pair(folder, name, shapes)
    out = folder / "difference.safetensors"
    run = repeated(runs, out, "extract", base, other, "--rank", RANK, "--to", "comfy")
    row = costs(f"extract {name} at rank {RANK}", run.told["modules"], 2 * base.stat().st_size, run)
    if sampled:
        row |= quality(base, other, out, {key: matrix(shape) for key, shape in shapes.items() if tuned(key) and len(shape) > 1}, run.cpu)
    for path in (base, other, out):
        path.unlink()
    return row


def quality(base: Path, other: Path, out: Path, layers: Mapping[str, Matrix], cpu: float) -> dict[str, Any]:
    """The errors of all modules against the models themselves, and of one layer of each shape against the optimum."""
    errors = dict(true_errors(base, other, out))
    rows = [sample(key, count, base, other, errors) for key, count in one_of_each(layers)]
    estimate = math.fsum(row["count"] * row["svd"] for row in rows)
    return {
        "true_relative_error": math.sqrt(math.fsum(pair[0] for pair in errors.values()) / math.fsum(pair[1] for pair in errors.values())),
        "svd_seconds": round(estimate, 1),
        "svd / extract": round(estimate / cpu, 1),
        "error / optimum": max(row["error / optimum"] for row in rows),
        "layers": rows,
    }


def one_of_each(layers: Mapping[str, Matrix]) -> Iterator[tuple[str, int]]:
    """(the first layer of a shape, how many have it), the most frequent first."""
    for shape, count in Counter(layers.values()).most_common():
        yield next(key for key, found in layers.items() if found == shape), count


def true_errors(base: Path, other: Path, out: Path) -> Iterator[tuple[str, tuple[float, float]]]:
    """(tensor, (‖D - scale · up · down‖², ‖D‖²)) of every module, in float64."""
    from safetensors import safe_open

    with safe_open(out, "pt") as adapter:
        for name in adapter.keys():  # noqa: SIM118
            stem, _, leaf = name.rpartition(".lora_")
            if leaf not in SIDES:
                continue
            up, down = (adapter.get_tensor(f"{stem}.lora_{side}").double().flatten(1) for side in (leaf, SIDES[leaf]))
            key = original(stem)
            delta = gap(base, other, key).double()
            written = up @ down * (float(adapter.get_tensor(f"{stem}.alpha")) / down.shape[0])
            yield key, (float((delta - written).square().sum()), float(delta.square().sum()))


def original(stem: str) -> str:
    """The base's tensor of a module."""
    prefix = next(prefix for prefix in PREFIXES if stem.startswith(prefix))
    return f"{PREFIXES[prefix]}{stem.removeprefix(prefix)}.weight"


def gap(base: Path, other: Path, key: str) -> torch.Tensor:
    """What TUNED has and BASE has not, (o, n) in float32."""
    from safetensors import safe_open

    with safe_open(base, "pt") as before, safe_open(other, "pt") as after:
        found: torch.Tensor = (after.get_tensor(key).float() - before.get_tensor(key).float()).flatten(1)
    return found


def sample(key: str, count: int, base: Path, other: Path, errors: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """One layer: seconds of the full decomposition, of ours with its certificate, of LyCORIS; and how far ours is off."""
    import torch

    from loratools.adapters.algebra import Criterion, balanced
    from loratools.adapters.sketch import decompose, residual_norms

    delta = gap(base, other, key)
    error, norm = errors[key]

    def ours() -> None:
        up, down = balanced(decompose(delta, Criterion(rank=RANK), seed=0)[0])
        residual_norms(delta, up.half(), down.half())

    full, (_, sigma, _) = timed(partial(torch.linalg.svd, delta, full_matrices=False))
    optimum = math.sqrt(float(sigma[RANK:].double().square().sum()) / norm)
    row = {
        "layer": key,
        "shape": list(delta.shape),
        "count": count,
        "svd": round(full, 3),
        "loratools": round(timed(ours)[0], 3),
        "relative_error": round(math.sqrt(error / norm), 6),
        "error / optimum": round(math.sqrt(error / norm) / optimum, 6) if optimum else 1.0,
    }
    return row | lycoris(delta)


def lycoris(delta: torch.Tensor) -> dict[str, float]:
    """Seconds of LyCORIS' own function, of layers whose longer side is no more than `LONGEST`: it makes a full matrix of that side."""
    try:
        from lycoris.utils import extract_linear
    except ImportError:
        return {}
    if max(delta.shape) > LONGEST:
        return {}
    return {"lycoris": round(timed(partial(extract_linear, delta, "fixed", RANK))[0], 3)}


# ---------------------------------------------------------------------------------------------------------------------- resize


def resizing(folder: Path, runs: int, shapes: Shapes) -> dict[str, Any]:
    """A LoRA brought to a smaller rank, against the decompositions of its products and PEFT's combination."""
    source, out = write_adapter(folder / "style.safetensors", shapes), folder / "smaller.safetensors"
    run = repeated(runs, out, "resize", source, "--rank", TO, "--dtype", "fp32")
    ups = {key.removesuffix(".lora_up.weight"): shape for key, shape in shapes.items() if key.endswith(".lora_up.weight")}
    layers = {stem: (shape[0], shapes[f"{stem}.lora_down.weight"][1]) for stem, shape in ups.items()}
    rows = [product(stem, count, source, out) for stem, count in one_of_each(layers)]
    row = costs(f"resize an SDXL LoRA, rank {FROM} to {TO}", len(layers), source.stat().st_size, run)
    row |= {"singular values differ by": max(found["difference"] for found in rows), "layers": rows}
    for name in ("svd", "peft"):
        if all(name in found for found in rows):
            row[f"{name}_seconds"] = round(math.fsum(found["count"] * found[name] for found in rows), 1)
            row[f"{name} / resize"] = round(row[f"{name}_seconds"] / run.cpu, 1)
    return row


def product(stem: str, count: int, source: Path, out: Path) -> dict[str, Any]:
    """One module: seconds of forming and decomposing its product; singular values of the file that was written against that product's."""
    import torch

    up, down, scale = factors(source, stem)

    def decomposed() -> Any:
        return torch.linalg.svd((up @ down) * scale, full_matrices=False)

    full = timed(decomposed)[0]
    expected = torch.linalg.svdvals(up.double() @ down.double() * scale)[:TO]
    left, right, factor = factors(out, stem)
    cores = [torch.linalg.qr(side.double(), mode="r")[1] for side in (left, right.t())]
    found = torch.linalg.svdvals(cores[0] @ cores[1].t()) * factor
    return {
        "layer": stem,
        "shape": [up.shape[0], down.shape[1]],
        "count": count,
        "svd": round(full, 3),
        "difference": float(f"{float((found - expected).abs().max() / expected[0]):.2g}"),
        **peft(up, down),
    }


def factors(path: Path, stem: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """up (o, r), down (r, n) in float32, scale."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        up, down = (file.get_tensor(f"{stem}.lora_{side}.weight").float() for side in ("up", "down"))
        return up, down, float(file.get_tensor(f"{stem}.alpha")) / down.shape[0]


def peft(up: torch.Tensor, down: torch.Tensor) -> dict[str, float]:
    """Seconds of add_weighted_adapter on one layer: half of the adapter and half of it again, because of one alone it keeps the rank."""
    import torch

    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return {}

    layer = torch.nn.Sequential(torch.nn.Linear(down.shape[1], up.shape[0], bias=False))
    model: Any = get_peft_model(layer, LoraConfig(r=FROM, lora_alpha=FROM, target_modules=["0"]))
    with torch.no_grad():
        for side, factor in (("A", down), ("B", up)):
            model.get_parameter(f"base_model.model.0.lora_{side}.default.weight").copy_(factor)

    def combined() -> None:
        model.add_weighted_adapter(["default"] * 2, [0.5] * 2, "smaller", "svd", svd_rank=TO, svd_full_matrices=False)
        model.delete_adapter("smaller")

    return {"peft": round(timed(combined)[0], 3)}


# --------------------------------------------------------------------------------------------------------------------- telling


def measure(folder: Path, runs: int, only: str | None) -> Iterator[dict[str, Any]]:
    if only in (None, "sd1"):
        yield extraction("sd1", folder, runs, diffusion("sd1")[0], sampled=True)
    if only == "sdxl":
        yield extraction("sdxl", folder, runs, diffusion("sdxl")[0], sampled=False)
    if only in (None, "resize"):
        if "resize" in COMMANDS:
            yield resizing(folder, runs, sdxl(FROM))
        else:
            print("resize: left out, this version has no such command", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="runs of a command that takes less than a minute (default 3)")
    parser.add_argument("--only", choices=["sd1", "sdxl", "resize"], help="one of the jobs; without it sd1 and resize")
    parser.add_argument("--folder", type=Path, help="where the files are made: the disk that is measured (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON; '-' writes none")
    settings = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        for found in measure(Path(folder), settings.runs, settings.only):
            rows.append(found)
            print(json.dumps(found), flush=True)
    if str(settings.out) != "-" and rows:
        settings.out.mkdir(parents=True, exist_ok=True)
        machine = facts(settings.runs)
        path = settings.out / f"{machine['date']}-extract.json"
        path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2, ensure_ascii=False) + "\n")
        print(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


if __name__ == "__main__":
    main()

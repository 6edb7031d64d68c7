"""How long a merge takes and how much memory: `make bench-merge`, or `python benchmarks/merging.py --only sd1`.

Checkpoints of published shapes are made here (SDXL 6.9 GB and SD1.5 2.1 GB in float16, a language model of 1.1 B parameters in
bfloat16, sharded), each with a rank-64 LoRA on all its Linear layers. A merge is the whole command in a fresh process, start-up
included. Against it, in turns: `cp` + fsync of the same file, and the bare matrix products up @ down of all modules in float32 on all
cores; for the language model PEFT's from_pretrained + merge_and_unload + save_pretrained. Peak memory is what the operating system
reports for the process. Needs diffusers, transformers and peft, and twice the file in disk space.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.bench import Shapes, facts, high_water  # noqa: E402
from loratools.tensors.header import render_header  # noqa: E402

RANK = 64
SIZES = {"F16": 2, "BF16": 2}


# -------------------------------------------------------------------------------------------------------------------- inputs


def unet(architecture: str) -> tuple[Shapes, Shapes]:
    """(all tensors under original names, Linear layers under diffusers' names) of the published UNet, from diffusers' class."""
    import torch
    from diffusers import UNet2DConditionModel

    from loratools.mapping.architectures import registry

    settings: dict[str, dict[str, Any]] = {
        "sd1": {"cross_attention_dim": 768},
        "sdxl": {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "cross_attention_dim": 2048,
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    }
    with torch.device("meta"):
        model = UNet2DConditionModel(**settings[architecture])
    table = registry()[architecture].component("denoiser").table
    tensors, layers = Shapes(), Shapes()
    for key, value in model.state_dict().items():
        module, _, leaf = key.rpartition(".")
        tensors[f"model.diffusion_model.{table.by_site('orig', module)[0].name}.{leaf}"] = tuple(value.shape)
        if leaf == "weight" and value.dim() == 2:
            layers[f"unet.{module}"] = tuple(value.shape)
    return tensors, layers


def clip(prefix: str, folder: str, width: int, depth: int, *, fused: bool) -> tuple[Shapes, Shapes]:
    """A CLIP text encoder, transformers' layout or open_clip's with fused q, k, v."""
    tensors, layers = Shapes(), Shapes()
    for layer in range(depth):
        if fused:
            stem = f"{prefix}transformer.resblocks.{layer}."
            weights = {"attn.in_proj_": (3 * width, width), "attn.out_proj.": (width, width)}
            weights |= {"mlp.c_fc.": (4 * width, width), "mlp.c_proj.": (width, 4 * width)}
        else:
            stem = f"{prefix}text_model.encoder.layers.{layer}."
            weights = {f"self_attn.{name}_proj.": (width, width) for name in ("q", "k", "v", "out")}
            weights |= {"mlp.fc1.": (4 * width, width), "mlp.fc2.": (width, 4 * width)}
        for name, shape in weights.items():
            tensors |= {f"{stem}{name}weight": shape, f"{stem}{name}bias": shape[:1]}
        site = f"{folder}.text_model.encoder.layers.{layer}."
        layers |= {f"{site}self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
        layers |= {f"{site}mlp.fc1": (4 * width, width), f"{site}mlp.fc2": (width, 4 * width)}
    name = "token_embedding" if fused else "text_model.embeddings.token_embedding"
    return {**tensors, f"{prefix}{name}.weight": (49408, width)}, layers


def diffusion(architecture: str) -> tuple[Shapes, Shapes]:
    """(tensors of the single file, Linear layers), with text encoders and something of a VAE's size."""
    tensors, layers = unet(architecture)
    encoders = {
        "sd1": [clip("cond_stage_model.transformer.", "text_encoder", 768, 12, fused=False)],
        "sdxl": [
            clip("conditioner.embedders.0.transformer.", "text_encoder", 768, 12, fused=False),
            clip("conditioner.embedders.1.model.", "text_encoder_2", 1280, 32, fused=True),
        ],
    }
    for found, inside in encoders[architecture]:
        tensors, layers = {**tensors, **found}, {**layers, **inside}
    return {**tensors, **{f"first_stage_model.block.{number}.weight": (512, 512, 3, 3) for number in range(35)}}, layers


def write(path: Path, shapes: Shapes, dtype: str, size: float) -> Path:
    """A safetensors file of noise of standard deviation `size`: one tile of 8 MB again and again."""
    import numpy

    entries, position = {}, 0
    for name, shape in sorted(shapes.items()):
        length = int(numpy.prod(shape)) * SIZES[dtype]
        entries[name] = (dtype, shape, position, position + length)
        position += length
    noise = numpy.random.default_rng(0).standard_normal(1 << 22) * size
    wide = noise.astype(numpy.float32)
    tile = (noise.astype(numpy.float16) if dtype == "F16" else (wide.view(numpy.uint32) >> 16).astype(numpy.uint16)).tobytes()
    with path.open("wb") as file:
        file.write(render_header(entries, {"format": "pt"}))
        for start in range(0, position, len(tile)):
            file.write(tile[: position - start])
    return path


def lora(layers: Shapes) -> Shapes:
    """Factors of every layer, in PEFT's suffixes."""
    down = {f"{name}.lora_A.weight": (RANK, shape[1]) for name, shape in layers.items()}
    return {**down, **{f"{name}.lora_B.weight": (shape[0], RANK) for name, shape in layers.items()}}


def language_model(folder: Path) -> tuple[Path, Path, Shapes]:
    """(a Llama of 1.1 B parameters in bfloat16 shards, a PEFT folder for it, its Linear layers)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4, vocab_size=32000
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    layers = {key.removesuffix(".weight"): shape for key, shape in shapes.items() if "_proj." in key}
    base, adapter = folder / "llama", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(base)
    names, weight_map = sorted(shapes), {}
    for number in range(3):
        mine = names[number::3]
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        write(base / file, {name: shapes[name] for name in mine}, "BF16", 0.02)
        weight_map |= dict.fromkeys(mine, file)
    total = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    factors = {f"base_model.model.{name}": shape for name, shape in lora(layers).items()}
    write(adapter / "adapter_model.safetensors", factors, "BF16", 0.005)
    targets = sorted({name.rpartition(".")[2] for name in layers})
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return base, adapter, layers


# ----------------------------------------------------------------------------------------------------------------------- jobs

Measured = tuple[float, float]  # seconds, peak MB of the process


def process(*command: object) -> Measured:
    """A whole command: wall seconds and peak resident memory. Raises CalledProcessError."""
    start, peak = time.perf_counter(), 0.0
    child = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None:  # what wait4 tells at the end would begin with the memory of this process
        peak = max(peak, high_water(child.pid))
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, str(command))
    return seconds, peak


def merged(base: Path, adapter: Path, out: Path) -> Measured:
    _remove(out)
    return process("-m", "loratools", "merge", base, adapter, out)


def copied(source: Path, out: Path) -> Measured:
    """cp and fsync of the file, or of every file of a folder."""
    _remove(out)
    start = time.perf_counter()
    files = [path for path in source.rglob("*") if path.is_file()] if source.is_dir() else [source]
    for file in files:
        target = out / file.relative_to(source) if source.is_dir() else out
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", str(file), str(target)], check=True)
        with target.open("rb+") as written:
            os.fsync(written.fileno())
    return time.perf_counter() - start, 0.0


PRODUCTS = """
import json, sys, time, torch
shapes = json.loads(sys.stdin.read())
factors = {shape: (torch.randn(shape[0], 64), torch.randn(64, shape[1])) for shape in map(tuple, shapes)}
for up, down in factors.values():
    up @ down
start = time.perf_counter()
for shape in map(tuple, shapes):
    up, down = factors[shape]
    up @ down
print(time.perf_counter() - start)
"""

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, local_files_only=True)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""


def products(layers: Shapes) -> Measured:
    """The bare matrix products of all modules, float32, torch's own threads."""
    text = json.dumps(list(layers.values()))
    done = subprocess.run([sys.executable, "-c", PRODUCTS], input=text, capture_output=True, text=True, check=True)
    return float(done.stdout), 0.0


def by_peft(base: Path, adapter: Path, out: Path) -> Measured:
    _remove(out)
    return process("-c", PEFT, base, adapter, out)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def turns(runs: int, jobs: Mapping[str, Callable[[], Measured]]) -> dict[str, list[Measured]]:
    """Every job once to warm up, then `runs` times in turn."""
    for job in jobs.values():
        job()
    found: dict[str, list[Measured]] = {name: [] for name in jobs}
    for _ in range(runs):
        for name, job in jobs.items():
            found[name].append(job())
    return found


def row(name: str, size: int, found: dict[str, list[Measured]]) -> dict[str, Any]:
    """Medians of one base; ratio: (merge - products) / copy, or merge / PEFT, the median of the turns'."""
    seconds = {job: round(statistics.median(run[0] for run in runs), 2) for job, runs in found.items()}
    memory = {job: round(max(run[1] for run in runs)) for job, runs in found.items() if any(run[1] for run in runs)}
    line: dict[str, Any] = {"base": name, "bytes": size, "seconds": seconds, "peak_mb": memory}
    triples = zip(found["merge"], found["copy"], found["products"], strict=True)
    line["(merge - products) / copy"] = round(statistics.median((own[0] - bare[0]) / copy[0] for own, copy, bare in triples), 2)
    if "peft" in found:
        pairs = list(zip(found["merge"], found["peft"], strict=True))
        line["merge / peft"] = round(statistics.median(own[0] / other[0] for own, other in pairs), 2)
        line["memory / peft"] = round(memory["merge"] / memory["peft"], 3)
    return line


def measure(folder: Path, runs: int, only: str | None) -> Iterator[dict[str, Any]]:
    out = folder / "out"
    for architecture in ("sd1", "sdxl"):
        if only in (None, architecture):
            tensors, layers = diffusion(architecture)
            base = write(folder / f"{architecture}.safetensors", tensors, "F16", 0.02)
            adapter = write(folder / "adapter.safetensors", lora(layers), "F16", 0.005)
            target = out.with_suffix(".safetensors")
            jobs = {
                "copy": partial(copied, base, target),
                "merge": partial(merged, base, adapter, target),
                "products": partial(products, layers),
            }
            yield row(f"{architecture}, {len(layers)} Linear layers", base.stat().st_size, turns(runs, jobs))
            for path in (base, adapter, target):
                path.unlink()
    if only in (None, "llama"):
        model, peft, layers = language_model(folder)
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        jobs = {
            "copy": partial(copied, model, out),
            "merge": partial(merged, model, peft, out),
            "products": partial(products, layers),
            "peft": partial(by_peft, model, peft, out),
        }
        yield row(f"llama, {len(layers)} Linear layers, 3 shards", size, turns(runs, jobs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="runs of each job (default 3)")
    parser.add_argument("--only", choices=["sd1", "sdxl", "llama"], help="one of the bases")
    parser.add_argument("--folder", type=Path, help="where the files are made: the disk that is measured (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON; '-' writes none")
    settings = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        for found in measure(Path(folder), settings.runs, settings.only):
            rows.append(found)
            print(json.dumps(found), flush=True)
    if str(settings.out) != "-":
        settings.out.mkdir(parents=True, exist_ok=True)
        machine = facts(settings.runs)
        path = settings.out / f"{machine['date']}-merge.json"
        path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2, ensure_ascii=False) + "\n")
        print(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


if __name__ == "__main__":
    main()

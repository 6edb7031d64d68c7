"""extract: BASE and TUNED in any two layouts give the same adapter: single file, diffusers folder, shards, pickle, transformers folder.

Weights of the layouts are the same numbers, so ΔW has to be the same too; names depend on the dialect that is written alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch

from fixtures import checkpoints, layouts
from fixtures.tuned import difference, matrices, rewritten, tuned
from loratools.operations.extract import extract
from tests import reference
from tests.operations.merge_by_hand import noise
from tests.operations.merged import base_states, in_single
from tests.operations.test_extract import apart

pytestmark = pytest.mark.filterwarnings("ignore")

States = dict[str, dict[str, torch.Tensor]]
Layouts = dict[str, Callable[[Path, States], Path]]


def after(architecture: str, rank: int = 4) -> States:
    """The tuned models by pipeline folder; the VAE is the base's."""
    # T5 has its embedding twice, under two names
    return {
        folder: state if folder == "vae" else _shared(tuned(state, rank, only=matrices))
        for folder, state in base_states(architecture).items()
    }


def _shared(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    copies = {"encoder.embed_tokens.weight": "shared.weight"}
    return {key: state[copies[key]] if copies.get(key) in state else value for key, value in state.items()}


# ------------------------------------------------------------------------------------------------------------- how it is written


def _single(architecture: str, path: Path, states: States) -> Path:
    tensors = checkpoints.single_tensors(architecture)
    return checkpoints.write(path.with_suffix(".safetensors"), _owned(tensors | in_single(architecture, states)), "tiny")


def _ckpt(path: Path, states: States) -> Path:
    tensors = checkpoints.single_tensors("sd1") | in_single("sd1", states)
    torch.save({"state_dict": tensors, "global_step": 7}, path.with_suffix(".ckpt"))
    return path.with_suffix(".ckpt")


def _folder(architecture: str, path: Path, states: States, shard: str | None = None, published: bool = True) -> Path:
    return rewritten(checkpoints.folder(architecture, path, max_shard_size=shard, published=published), states)


def _bare(prefix: str, path: Path, states: States) -> Path:
    tensors = {prefix + key: value for key, value in layouts.denoiser("flux", states["transformer"]).items()}
    return checkpoints.write(path.with_suffix(".safetensors"), _owned(tensors), "tiny")


def _denoiser_folder(architecture: str, path: Path, states: States) -> Path:
    """The denoiser's own folder, without a pipeline around it."""
    return _folder(architecture, path, states) / next(iter(states))


def _owned(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.clone().contiguous() for key, value in tensors.items()}


def _of(architecture: str) -> Layouts:
    return {"single": partial(_single, architecture), "folder": partial(_folder, architecture)}


LAYOUTS: dict[str, Layouts] = {
    "sd1": {
        **_of("sd1"),
        "ckpt": _ckpt,
        "shards": partial(_folder, "sd1", shard="100KB"),
        "transformers 5": partial(_folder, "sd1", published=False),
    },
    "sd2": _of("sd2"),
    "sdxl": _of("sdxl"),
    "sd3": _of("sd3"),
    "flux": _of("flux"),
}


def assert_same(found: Path, wanted: Path, tolerance: float = 1e-5) -> None:
    """The same modules under the same names, and the same ΔW."""
    mine, theirs = reference.deltas(found), reference.deltas(wanted)
    assert sorted(mine) == sorted(theirs)
    off = {name: apart(mine[name], theirs[name]) for name in theirs}
    assert max(off.values()) <= tolerance, max(off, key=lambda name: off[name])


@pytest.mark.parametrize("architecture", LAYOUTS)
def test_pairs_of_layouts(architecture: str, tmp_path: Path) -> None:
    """Every layout as BASE and as TUNED; `comfy` names: what it fuses is fused from each."""
    layout, states = LAYOUTS[architecture], after(architecture)
    bases = {name: write(tmp_path / f"base {name}", base_states(architecture)) for name, write in layout.items()}
    tuneds = {name: write(tmp_path / f"tuned {name}", states) for name, write in layout.items()}
    extract(bases["single"], tuneds["single"], tmp_path / "first.safetensors", to="comfy", rank=16)
    names = list(layout)
    ring = [*zip(names, [*names[1:], names[0]], strict=True)]
    for one, other in [*ring, ("folder", "folder")]:
        out = tmp_path / f"{one} {other}.safetensors"
        told = extract(bases[one], tuneds[other], out, to="comfy", rank=16)
        assert told["relative_error"] < 1e-6
        _assert_pair(out, tmp_path / "first.safetensors", architecture)


def _assert_pair(found: Path, first: Path, architecture: str) -> None:
    """A pipeline of SD2 has a layer of open_clip less than the file: what both have is the same."""
    if architecture != "sd2":
        assert_same(found, first)
        return
    mine, theirs = reference.deltas(found), reference.deltas(first)
    assert mine.keys() <= theirs.keys()
    assert max(apart(mine[name], theirs[name]) for name in mine) <= 1e-5


def test_each_default_dialect(tmp_path: Path) -> None:
    """kohya for an original file, diffusers for a diffusers folder; BASE settles it."""
    states, base = after("sd1"), base_states("sd1")
    single, folder = _single("sd1", tmp_path / "base", base), _folder("sd1", tmp_path / "base folder", base)
    other_single, other_folder = _single("sd1", tmp_path / "tuned", states), _folder("sd1", tmp_path / "tuned folder", states)
    for number, (one, other, dialect) in enumerate(
        [(single, other_folder, "kohya"), (folder, other_single, "diffusers"), (folder, other_folder, "diffusers")]
    ):
        assert extract(one, other, tmp_path / f"{number}.safetensors", include=["*attentions*"])["dialect"] == dialect
    keys = set(reference.deltas(tmp_path / "1.safetensors"))
    assert all(key.startswith("unet.") for key in keys)
    assert_same(tmp_path / "1.safetensors", tmp_path / "2.safetensors")


@pytest.mark.parametrize("architecture", ["sd1", "sdxl", "sd3", "flux"])
def test_a_diffusers_folder_against_the_truth(architecture: str, tmp_path: Path) -> None:
    """Not against another extraction: ΔW of every matrix by its diffusers name, from the models themselves."""
    states, base = after(architecture), base_states(architecture)
    one, other = _folder(architecture, tmp_path / "a", base), _folder(architecture, tmp_path / "b", states)
    told = extract(one, other, tmp_path / "out.safetensors")
    found = reference.deltas(tmp_path / "out.safetensors")
    skipped = {row["tensor"] for row in told["skipped"]}
    wanted = {}
    for folder in states:
        for key, delta in difference(base[folder], states[folder]).items():
            wanted[f"{folder}.{key.removesuffix('.weight')}"] = delta
    missed = {name for name in wanted if name not in found and name.replace(".encoder.", ".text_model.encoder.", 1) not in found}
    assert found
    for name in missed:  # embeddings and T5's copies are no LoRA of diffusers', and are told
        folder, _, module = name.partition(".")
        assert {f"{folder}/{module}.weight", f"{folder}/text_model.{module}.weight"} & skipped or "shared" in name or "embed" in name, name
    for name, delta in wanted.items():
        if name not in missed:
            there = name if name in found else name.replace(".encoder.", ".text_model.encoder.", 1)
            assert apart(found[there], delta) <= 1e-5, name
    assert len(wanted) - len(missed) == len(found)


def test_bare_prefixed_and_all_in_one_flux(tmp_path: Path) -> None:
    """X7: prefixes of the checkpoint are no part of a name; the text encoders of one model alone are told and left out."""
    states, base = after("flux"), base_states("flux")
    ways: Layouts = {
        "bare": partial(_bare, ""),
        "prefixed": partial(_bare, "model.diffusion_model."),
        "all in one": partial(_single, "flux"),
        "transformer folder": partial(_denoiser_folder, "flux"),
    }
    bases = {name: write(tmp_path / f"base {name}", base) for name, write in ways.items()}
    tuneds = {name: write(tmp_path / f"tuned {name}", states) for name, write in ways.items()}
    for one in ways:
        for other in ways:
            out = tmp_path / f"{one} {other}.safetensors"
            told = extract(bases[one], tuneds[other], out, to="kohya", component=["denoiser"])
            assert_same(out, tmp_path / "bare bare.safetensors")
            assert all(name.startswith("lora_unet_") for name in reference.deltas(out))
            assert told["architecture"] == "flux"
    whole = extract(bases["all in one"], tuneds["bare"], tmp_path / "whole.safetensors", to="kohya")
    alone = sorted({row["reason"].removeprefix("TUNED has no ") for row in whole["skipped"] if row["reason"].startswith("TUNED has no ")})
    assert sorted(alone) == ["text_encoder", "text_encoder_2"]
    assert_same(tmp_path / "whole.safetensors", tmp_path / "bare bare.safetensors")


def test_what_one_layout_lacks_is_told(tmp_path: Path) -> None:
    """SD2's file has a layer of open_clip and a projection that no pipeline has."""
    states = after("sd2")
    told = extract(
        _single("sd2", tmp_path / "base", base_states("sd2")), _folder("sd2", tmp_path / "tuned", states), tmp_path / "out.safetensors"
    )
    alone = [row["tensor"] for row in told["skipped"] if row["reason"] == "only BASE has it"]
    assert "cond_stage_model.model.transformer.resblocks.4.mlp.c_fc.weight" in alone
    assert all(".resblocks.4." in name or "text_projection" in name for name in alone)


def test_the_file_does_not_depend_on_hash_seed_or_threads(tmp_path: Path) -> None:
    """X11: the same bytes with PYTHONHASHSEED 0 and 1 and with 1 thread and 2, of a file and of a PEFT folder."""
    base, other = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    tensors = checkpoints.flux_tensors() | {"double_blocks.0.img_mod.lin.weight": noise(400, 320)}  # one that is sketched
    checkpoints.write(base, tensors, "base")
    checkpoints.write(other, tuned(tensors), "tuned")
    code = """
        import sys
        from loratools.operations.extract import extract
        name, threads = sys.argv[1], int(sys.argv[2])
        extract("base.safetensors", "tuned.safetensors", f"{name}.safetensors", rank=3, threads=threads)
        extract("base.safetensors", "tuned.safetensors", name, to="peft", rank=3, threads=threads)
    """
    written = []
    for name, seed, threads in (("a", "0", "1"), ("b", "1", "2")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.getcwd()}
        command = [sys.executable, "-c", textwrap.dedent(code), name, threads]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)
        folder = tmp_path / name
        paths = [folder.with_suffix(".safetensors"), folder / "adapter_model.safetensors", folder / "adapter_config.json"]
        written.append([path.read_bytes() for path in paths])
    assert written[0] == written[1]
    targets = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    names = targets.removeprefix("^(").removesuffix(")$").replace("\\.", ".").split("|")  # `proj_out` alone would be two modules'
    assert names == sorted(names)
    assert len(names) > 40

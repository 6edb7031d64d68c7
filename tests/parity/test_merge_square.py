"""A merge is the same in every layout: into the original file and then converted by diffusers = into the folder = by hand.

Adapters on every Linear and Conv of every model but the VAE, ranks and alphas of their own, in the dialects that spell the modules
most differently from the layout: q, k, v fused or apart, halves exchanged, open_clip's joined attention, its projection transposed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from fixtures import adapters, checkpoints
from loratools.operations.merge import merge
from tests.parity import merging
from tests.parity.support import truth_of

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

CASES = [
    ("sd1", "kohya", 1.0),
    ("sd1", "diffusers", -0.5),
    ("sd2", "kohya", 1.0),
    ("sdxl", "kohya", 0.75),
    ("sdxl", "diffusers", 1.0),
    ("sd3", "kohya", 1.0),
    ("sd3", "diffusers", 1.5),
    ("flux", "kohya", 1.0),
    ("flux", "diffusers", 1.0),
]


@pytest.mark.parametrize(("architecture", "dialect", "weight"), CASES)
def test_both_ways_round_the_square(architecture: str, dialect: str, weight: float, tmp_path: Path) -> None:
    factors = merging.factors_of(architecture, ranks=merging.RANKS, alphas=merging.ALPHAS)
    adapter = merging.save_adapter(tmp_path / "adapter.safetensors", architecture, dialect, factors)
    folder = checkpoints.folder(architecture, tmp_path / "folder")
    single = checkpoints.single(architecture, tmp_path / "single.safetensors")
    wanted, base = merging.by_hand(architecture, truth_of(factors), weight), merging.base_states(architecture)

    result = merge(folder, [(adapter, weight)], tmp_path / "out")
    assert (result["unmatched"], result["changed"]) == ([], sum(len(parts) for parts in factors.values()))
    merging.assert_states(merging.read_folder(architecture, tmp_path / "out"), wanted, base)

    result = merge(single, [(adapter, weight)], tmp_path / "out.safetensors")
    assert result["unmatched"] == []
    assert result["delta_retained"] == pytest.approx(1.0, abs=1e-4)
    found = merging.read_single(architecture, tmp_path / "out.safetensors", folder)
    merging.assert_states(found, wanted, base, but=merging.NOT_READ, architecture=architecture)
    assert result["changed"] == len(check_file(single, tmp_path / "out.safetensors"))


def check_file(before: Path, after: Path) -> list[str]:
    """The changed keys, all of them weights. Everything else is as before: order, dtypes, metadata with a hash that is right."""
    old, new = load_file(before), load_file(after)
    (keys, dtypes, metadata), (found_keys, found_dtypes, found) = merging.header_of(before), merging.header_of(after)
    assert (found_keys, found_dtypes) == (keys, dtypes)
    changed = [key for key in keys if not torch.equal(old[key], new[key])]
    assert [key for key in changed if not key.startswith(("model.diffusion_model.", "cond", "text_encoders."))] == []
    assert [key for key in changed if not key.endswith(("weight", "text_projection"))] == []
    kept = {key: value for key, value in metadata.items() if key != "modelspec.hash_sha256"}
    assert {key: found[key] for key in kept} == kept
    raw = after.read_bytes()
    payload = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert found["modelspec.hash_sha256"] == "0x" + hashlib.sha256(payload).hexdigest()
    return changed


def test_the_unused_parts_of_sd2s_text_encoder_stay(tmp_path: Path) -> None:
    """Its last layer and its projection have no place in diffusers' model, hence no adapter for them."""
    factors = merging.factors_of("sd2")
    adapter = merging.save_adapter(tmp_path / "adapter.safetensors", "sd2", "kohya", factors)
    single = checkpoints.single("sd2", tmp_path / "single.safetensors")
    merge(single, [(adapter, 1.0)], tmp_path / "out.safetensors")
    old, new = load_file(single), load_file(tmp_path / "out.safetensors")
    unused = [key for key in old if ".resblocks.4." in key or key.endswith("text_projection")]
    assert len(unused) == 13
    assert [key for key in unused if not torch.equal(old[key], new[key])] == []
    used = [key for key in old if ".resblocks.3." in key and key.endswith("weight") and ".ln_" not in key]
    assert [key for key in used if torch.equal(old[key], new[key])] == []


@pytest.mark.parametrize("form", ["bare", "prefixed"])
def test_flux_alone(form: str, tmp_path: Path) -> None:
    """The transformer without the rest of the pipeline, both ways it is published."""
    factors = {"transformer": merging.factors_of("flux", ranks=merging.RANKS, alphas=merging.ALPHAS)["transformer"]}
    adapter = merging.save_adapter(tmp_path / "adapter.safetensors", "flux", "diffusers", factors)
    base = (checkpoints.flux_bare if form == "bare" else checkpoints.flux_prefixed)(tmp_path / "flux.safetensors")
    merge(base, [(adapter, 1.0)], tmp_path / "out.safetensors")
    prefix = "" if form == "bare" else "model.diffusion_model."
    found = merging.read_flux({key.removeprefix(prefix): value for key, value in load_file(tmp_path / "out.safetensors").items()})
    wanted, states = merging.by_hand("flux", truth_of(factors)), merging.base_states("flux")
    merging.assert_states({"transformer": found}, {"transformer": wanted["transformer"]}, states)


def test_sd35_alone(tmp_path: Path) -> None:
    """The second attention of its first blocks is fused like the first."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    model = checkpoints.sd35_transformer()
    factors = adapters.factors(model, adapters.layers(model), ranks=merging.RANKS, alphas=merging.ALPHAS)
    adapter = merging.save_adapter(tmp_path / "adapter.safetensors", "sd3", "diffusers", {"transformer": factors})
    merge(checkpoints.sd35_bare(tmp_path / "sd35.safetensors"), [(adapter, 1.0)], tmp_path / "out.safetensors")
    found, base = convert_sd3_transformer_checkpoint_to_diffusers(load_file(tmp_path / "out.safetensors")), checkpoints.state(model)
    added = {name: base[f"{name}.weight"].double() + part.delta().reshape(base[f"{name}.weight"].shape) for name, part in factors.items()}
    wanted = base | {f"{name}.weight": value for name, value in added.items()}
    merging.assert_states({"transformer": found}, {"transformer": wanted}, {"transformer": base})


def test_a_pickle_becomes_the_same_safetensors_file(tmp_path: Path) -> None:
    factors = merging.factors_of("sd1", ranks=merging.RANKS, alphas=merging.ALPHAS)
    adapter = merging.save_adapter(tmp_path / "adapter.safetensors", "sd1", "kohya", factors)
    merge(checkpoints.sd1_ckpt(tmp_path / "sd1.ckpt"), [(adapter, 1.0)], tmp_path / "pickle.safetensors")
    merge(checkpoints.single("sd1", tmp_path / "single.safetensors"), [(adapter, 1.0)], tmp_path / "out.safetensors")
    one, two = load_file(tmp_path / "pickle.safetensors"), load_file(tmp_path / "out.safetensors")
    assert one.keys() == two.keys()
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


@pytest.mark.parametrize(
    "options", [{"max_shard_size": "60KB"}, {"variant": "fp16"}, {"published": False}], ids=["shards", "variant", "bare"]
)
@pytest.mark.parametrize("architecture", ["sd1", "sdxl", "flux"])
def test_folders_of_other_forms(architecture: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Shards with an index, only a variant, CLIP without `text_model.`: the weights are those of the plain folder's merge."""
    factors = merging.factors_of(architecture, ranks=merging.RANKS, alphas=merging.ALPHAS)
    adapter = merging.save_adapter(tmp_path / "adapter.safetensors", architecture, "kohya", factors)
    folder = checkpoints.folder(architecture, tmp_path / "folder", **options)
    merge(folder, [(adapter, 1.0)], tmp_path / "out")
    assert listing(tmp_path / "out") == listing(folder)
    if "variant" in options:
        pipe = merging.pipeline_class(architecture).from_pretrained(tmp_path / "out", variant="fp16", local_files_only=True)
        found = {part: dict(getattr(pipe, part).state_dict()) for part in checkpoints.models(architecture).models}
    else:
        found = merging.read_folder(architecture, tmp_path / "out")
    merging.assert_states(found, merging.by_hand(architecture, truth_of(factors)), merging.base_states(architecture))


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_two_adapters_and_their_order(tmp_path: Path) -> None:
    """Two dialects on the same sites add up, and the order they are named in changes no byte."""
    one, two = (merging.factors_of("sdxl", ranks=(rank,), alphas=(3.0,), seed=seed) for rank, seed in ((4, 0), (2, 50)))
    first = merging.save_adapter(tmp_path / "one.safetensors", "sdxl", "kohya", one)
    second = merging.save_adapter(tmp_path / "two.safetensors", "sdxl", "diffusers", two)
    single = checkpoints.single("sdxl", tmp_path / "single.safetensors")
    merge(single, [(first, 0.5), (second, -1.0)], tmp_path / "out.safetensors")
    merge(single, [(second, -1.0), (first, 0.5)], tmp_path / "turned.safetensors")
    assert load_bytes(tmp_path / "out.safetensors") == load_bytes(tmp_path / "turned.safetensors")
    sums = {folder: {name: 0.5 * part.delta() - two[folder][name].delta() for name, part in parts.items()} for folder, parts in one.items()}
    found = merging.read_single("sdxl", tmp_path / "out.safetensors", checkpoints.folder("sdxl", tmp_path / "config"))
    merging.assert_states(found, merging.by_hand("sdxl", sums), merging.base_states("sdxl"))


def load_bytes(path: Path) -> bytes:
    """The payload: the header records the adapters as they were named."""
    raw = path.read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_are_rounded_once(dtype: str, tmp_path: Path) -> None:
    """At most one entry in 200 differs from the float64 sum's rounding, none by more than one step."""
    factors = {"unet": merging.factors_of("sd1", ranks=merging.RANKS, alphas=merging.ALPHAS)["unet"]}
    adapter = merging.save_adapter(tmp_path / "adapter.safetensors", "sd1", "kohya", factors)
    folder = checkpoints.folder("sd1", tmp_path / "folder", dtype)
    merge(folder, [(adapter, 1.0)], tmp_path / "out")
    file = "unet/diffusion_pytorch_model.safetensors"
    old, new = load_file(folder / file), load_file(tmp_path / "out" / file)
    differing = total = 0
    for name, part in factors["unet"].items():
        weight, found = old[f"{name}.weight"], new[f"{name}.weight"]
        wanted = (weight.double() + part.delta().reshape(weight.shape)).to(weight.dtype)
        assert found.dtype == weight.dtype
        assert int((ordered(found) - ordered(wanted)).abs().max()) <= 1, name
        differing, total = differing + int((found != wanted).sum()), total + found.numel()
    assert differing <= 0.005 * total


def ordered(values: torch.Tensor) -> torch.Tensor:
    """16-bit floats as integers in the order of the numbers, neighbours one apart."""
    bits = values.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)

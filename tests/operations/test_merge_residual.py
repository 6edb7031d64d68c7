"""`merge --residual`: what rounding took, given back as a LoRA of the adapters' own subspace.

    E = W + Δ - W'      R = P_U E P_D      W' + R is nearer to W + Δ than W' is

Everything in float64 by hand: the merged file and the residual are read back, and held against what the JSON says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loratools
from loratools.errors import LoraToolsError
from loratools.operations.merge import merge
from tests.operations import merge_by_hand as hand
from tests.operations.made import CONV, FF, NATIVE, PROJ, SHAPES
from tests.operations.merge_by_hand import BLOCK, LAST, LINEAR1, QKV, SINGLE, UP, Q, Tensors, noise

BF16 = torch.bfloat16


def projected(loss: torch.Tensor, pairs: list[hand.Pair]) -> torch.Tensor:
    """P_U E P_D: projectors on the columns of all B and the rows of all A, by their pseudo-inverses."""
    up = torch.cat([one.up.double().flatten(1) for one in pairs], 1)
    down = torch.cat([one.down.double().flatten(1) for one in pairs])
    return up @ torch.linalg.pinv(up) @ loss.flatten(1) @ torch.linalg.pinv(down) @ down


def checked(
    residual: Mapping[str, torch.Tensor], losses: Mapping[str, torch.Tensor], deltas: Mapping[str, torch.Tensor], said: Mapping[str, Any]
) -> None:
    """The numbers of the JSON, from E, R and Δ by site; R makes things better by as much as it says."""
    assert residual.keys() <= losses.keys()
    rest = {key: loss.flatten(1) - residual[key].flatten(1) if key in residual else loss for key, loss in losses.items()}
    lost, left, size = (sum(float(part.square().sum()) for part in parts.values()) for parts in (losses, rest, deltas))
    inner = sum(float((delta.flatten(1) * (delta.flatten(1) - rest[key].flatten(1))).sum()) for key, delta in deltas.items())
    assert said["loss_recovered"] == pytest.approx(1 - left / lost, rel=0.01)
    assert said["delta_retained"] == pytest.approx(inner / size, rel=0.01)
    assert said["relative_error"] == pytest.approx((left / size) ** 0.5, rel=0.01)
    for key, value in residual.items():
        assert float(rest[key].norm()) < float(losses[key].norm())
        assert float(value.norm()) > 0.1 * float(losses[key].norm())


def stored(path: Path, **options: Any) -> dict[str, torch.Tensor]:
    """{site's path: ΔW in float64}, as the library reads the file."""
    return {site.path: sum(module.delta() for module in modules) for site, modules in loratools.load(path, **options).modules.items()}  # type: ignore[misc]


@pytest.mark.parametrize("ratio", [0.001, 0.003])
def test_the_residual_of_a_language_model(ratio: float, tmp_path: Path) -> None:
    """Two adapters that meet on one matrix; the second is on that alone, and is taken out."""
    base = hand.language_model(256)
    one = {
        name: hand.pair(base[f"{name}.weight"].shape, 6, 3.0, seed).sized(ratio, base[f"{name}.weight"])
        for seed, name in enumerate((Q, UP))
    }
    two = {Q: hand.pair((256, 256), 3, 3.0, 9).sized(ratio / 2, base[f"{Q}.weight"])}
    given = [(hand.peft(tmp_path / "one", one), 1.0), (hand.peft(tmp_path / "two", two), -0.5)]
    source = hand.save(tmp_path / "base.safetensors", base)
    result = merge(source, given, tmp_path / "out.safetensors", residual=tmp_path / "rest", verify=True)
    after = hand.assert_untouched(base, tmp_path / "out.safetensors", [f"{Q}.weight", f"{UP}.weight"])
    deltas = {Q: one[Q].delta() - 0.5 * two[Q].delta(), UP: one[UP].delta()}
    losses = {name: base[f"{name}.weight"].double() + delta - after[f"{name}.weight"].double() for name, delta in deltas.items()}
    said, found = result["residual"], stored(tmp_path / "rest")
    assert (said["path"], said["sites"], said["skipped_sites"]) == (str(tmp_path / "rest"), 2, 0)
    assert found.keys() == {Q, UP}
    for name, parts in ((Q, [one[Q], two[Q]]), (UP, [one[UP]])):
        wanted = projected(losses[name], parts)
        assert float((found[name] - wanted).norm()) < 1e-4 * float(wanted.norm())
        assert torch.linalg.matrix_rank(found[name]) == sum(part.rank for part in parts)
    assert said["max_rank"] == 9
    assert ranks(tmp_path / "rest") == {Q: 9, UP: 6}
    checked(found, losses, deltas, said)
    assert result["delta_retained"] < 0.97
    assert said["delta_retained"] == pytest.approx(1.0, abs=0.05)
    assert loratools.compare(tmp_path / "rest", tmp_path / "rest", base=source)["equal"]


def ranks(path: Path) -> dict[str, int | None]:
    return {entry.sites[0].path: entry.module.rank for entry in loratools.load(path).entries}


def test_the_residual_merged_in_float32_mends_the_merge(tmp_path: Path) -> None:
    """As it is meant to be used: beside the bf16 model, here merged into a float32 copy of it."""
    base = hand.language_model(256)
    pairs = {
        name: hand.pair(base[f"{name}.weight"].shape, 6, 3.0, seed).sized(0.001, base[f"{name}.weight"])
        for seed, name in enumerate((Q, UP))
    }
    source, adapter = hand.save(tmp_path / "base.safetensors", base), hand.peft(tmp_path / "adapter", pairs)
    said = merge(source, [(adapter, 1.0)], tmp_path / "out.safetensors", residual=tmp_path / "rest")["residual"]
    merge(tmp_path / "out.safetensors", [(tmp_path / "rest", 1.0)], tmp_path / "mended.safetensors", dtype="F32")
    plain, mended = load_file(tmp_path / "out.safetensors"), load_file(tmp_path / "mended.safetensors")
    parts = []
    for name, one in pairs.items():
        key = f"{name}.weight"
        target = base[key].double() + one.delta()
        assert float((mended[key].double() - target).norm()) < 0.9 * float((plain[key].double() - target).norm())
        parts.append(hand.kept(base[key], mended[key], one.delta()))
    assert hand.total(parts).retained == pytest.approx(said["delta_retained"], rel=0.01)
    assert hand.total(parts).relative_error == pytest.approx(said["relative_error"], rel=0.01)


@pytest.mark.parametrize("layout", ["fused", "apart"])
def test_fused_and_exchanged_layers(layout: str, tmp_path: Path) -> None:
    """Flux: the residual has the sites of the adapter, wherever the base keeps them; rows without an adapter have none."""
    h = 64
    base = hand.flux(BF16, h)
    names = {f"{BLOCK}.to_q": (h, h), f"{BLOCK}.to_v": (h, h), f"{SINGLE}.proj_mlp": (4 * h, h), "norm_out.linear": (2 * h, h)}
    pairs = {name: hand.pair(shape, 4, 4.0, 5 * seed).sized(0.002, noise(*shape) * 0.2) for seed, (name, shape) in enumerate(names.items())}
    adapter, rest = hand.diffusers(tmp_path / "adapter.safetensors", pairs), tmp_path / "rest.safetensors"
    source = hand.save(tmp_path / "base.safetensors", base if layout == "fused" else hand.split_flux(base))
    result = merge(source, [(adapter, 1.0)], tmp_path / "out.safetensors", residual=rest, verify=True)
    after = load_file(tmp_path / "out.safetensors")
    before, after = (hand.split_flux(base), hand.split_flux(after)) if layout == "fused" else (hand.split_flux(base), after)
    deltas = {name: one.delta() for name, one in pairs.items()}
    losses = {name: before[f"{name}.weight"].double() + delta - after[f"{name}.weight"].double() for name, delta in deltas.items()}
    found = stored(rest, arch="flux")
    assert found.keys() == names.keys()
    for name, one in pairs.items():
        wanted = projected(losses[name], [one])
        assert float((found[name] - wanted).norm()) < 1e-4 * float(wanted.norm()), name
    checked(found, losses, deltas, result["residual"])
    assert (result["residual"]["sites"], result["residual"]["max_rank"]) == (4, 4)
    assert loratools.inspect(rest)["dialect"] == "diffusers"


def test_a_fused_adapter(tmp_path: Path) -> None:
    """The adapter's own module is q, k, v in one: each part of the loss lies in the rows and the down it has there."""
    base = hand.flux(BF16, 64)
    weights = {name: base[f"{name}.weight"] for name in (QKV, LINEAR1, LAST)}
    pairs = {name: hand.pair(old.shape, 4, 4.0, seed).sized(0.002, old) for seed, (name, old) in enumerate(weights.items())}
    adapter, rest = hand.kohya(tmp_path / "adapter.safetensors", pairs), tmp_path / "rest.safetensors"
    source = hand.save(tmp_path / "base.safetensors", base)
    result = merge(source, [(adapter, 1.0)], tmp_path / "out.safetensors", arch="flux", residual=rest)
    after = load_file(tmp_path / "out.safetensors")
    deltas = {name: one.delta() for name, one in pairs.items()}
    whole = hand.fuse_flux({f"{site}.{leaf}": value for site, value in stored(rest, arch="flux").items() for leaf in ("weight", "bias")})
    losses = {name: base[f"{name}.weight"].double() + delta - after[f"{name}.weight"].double() for name, delta in deltas.items()}
    checked({name: whole[f"{name}.weight"] for name in pairs}, losses, deltas, result["residual"])
    assert result["residual"]["sites"] == 8
    assert result["residual"]["max_rank"] <= 4


def test_convolutions(tmp_path: Path) -> None:
    sites = (CONV, PROJ, FF)
    stems = {site: f"model.diffusion_model.{NATIVE[site]}" for site in sites}
    base = {f"{stem}.weight": noise(*SHAPES[site], seed=3).to(BF16) for site, stem in stems.items()}
    pairs = {site: hand.pair(SHAPES[site], 2, 2.0, 11).sized(0.002, base[f"{stem}.weight"]) for site, stem in stems.items()}
    adapter, rest = hand.kohya(tmp_path / "adapter.safetensors", pairs), tmp_path / "rest.safetensors"
    source = hand.save(tmp_path / "base.safetensors", base)
    result = merge(source, [(adapter, 1.0)], tmp_path / "out.safetensors", arch="sd1", residual=rest)
    after, found = load_file(tmp_path / "out.safetensors"), stored(rest, arch="sd1")
    deltas = {site: one.delta() for site, one in pairs.items()}
    losses = {
        site: base[f"{stems[site]}.weight"].double() + delta - after[f"{stems[site]}.weight"].double() for site, delta in deltas.items()
    }
    assert {site: found[site].shape for site in found} == {site: SHAPES[site] for site in sites}
    for site, one in pairs.items():
        wanted = projected(losses[site], [one])
        assert float((found[site].flatten(1) - wanted).norm()) < 1e-4 * float(wanted.norm())
    checked(found, losses, deltas, result["residual"])


def test_stored_the_other_way_round(tmp_path: Path) -> None:
    """GPT-2's Conv1D keeps (in, out)."""
    name, shape = "transformer.h.0.mlp.c_fc", (96, 64)
    base = {
        f"{name}.weight": noise(64, 96, seed=4).to(BF16),
        "transformer.wte.weight": noise(20, 64).to(BF16),
        "lm_head.weight": noise(20, 64).to(BF16),
    }
    one = hand.pair(shape, 4, 4.0, 5).sized(0.002, base[f"{name}.weight"])
    adapter = hand.peft(tmp_path / "adapter", {name: one})
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": True}))
    source = hand.save(tmp_path / "base.safetensors", base)
    result = merge(source, [(adapter, 1.0)], tmp_path / "out.safetensors", residual=tmp_path / "rest", verify=True)
    after = load_file(tmp_path / "out.safetensors")[f"{name}.weight"].double().T
    losses = {name: base[f"{name}.weight"].double().T + one.delta() - after}
    found = stored(tmp_path / "rest")
    wanted = projected(losses[name], [one])
    assert float((found[name] - wanted).norm()) < 1e-4 * float(wanted.norm())
    checked(found, losses, {name: one.delta()}, result["residual"])


# ------------------------------------------------------------------------------------------------------------ what has no residual


def mixed(tmp_path: Path, kinds: Mapping[str, str]) -> tuple[Path, Path]:
    """Flux in bf16 and a kohya adapter: {module: "lora" or "loha"}."""
    base, modules = hand.flux(BF16, 64), {}
    for name, kind in kinds.items():
        out, in_ = base[f"{name}.weight"].shape
        a, b = noise(out, 2, seed=1) * 0.01, noise(2, in_, seed=2) * 0.01
        lora = {"lora_up.weight": a, "lora_down.weight": b}
        modules[name] = lora if kind == "lora" else {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a + 1, "hada_w2_b": b + 1}
    return hand.save(tmp_path / "base.safetensors", base), hand.lycoris(tmp_path / "adapter.safetensors", modules)


def test_other_kinds_are_counted_as_left_out(tmp_path: Path) -> None:
    source, adapter = mixed(tmp_path, {"double_blocks.0.img_attn.proj": "lora", LAST: "loha"})
    rest = tmp_path / "rest.safetensors"
    said = merge(source, [(adapter, 1.0)], tmp_path / "out.safetensors", arch="flux", residual=rest)["residual"]
    assert (said["sites"], said["skipped_sites"]) == (1, 1)
    assert stored(rest, arch="flux").keys() == {f"{BLOCK}.to_out.0"}


def test_kinds_without_factors_have_no_residual(tmp_path: Path) -> None:
    """Refused, so nothing is written: exit 3."""
    source, adapter = mixed(tmp_path, {LAST: "loha"})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(LoraToolsError, match="residual") as caught:
        merge(source, [(adapter, 1.0)], tmp_path / "out.safetensors", arch="flux", residual=tmp_path / "rest.safetensors")
    assert caught.value.exit_code == 3
    assert sorted(tmp_path.iterdir()) == before


def test_a_merge_that_lost_nothing_has_no_residual(tmp_path: Path) -> None:
    """Small integers: every sum is a bf16 value. The merge is done, and says that there was nothing to give back."""
    base = {f"{name}.weight": torch.ones(64, 64, dtype=BF16) for name in (Q, UP)}
    pairs = {name: hand.Pair(noise(64, 2).sign(), noise(2, 64, seed=1).sign(), 2.0) for name in (Q, UP)}
    source, rest = hand.save(tmp_path / "base.safetensors", base), tmp_path / "rest"
    result = merge(source, [(hand.peft(tmp_path / "adapter", pairs), 1.0)], tmp_path / "out.safetensors", residual=rest)
    assert (result["delta_retained"], result["relative_error"]) == (1.0, 0.0)
    assert (result["residual"]["path"], result["residual"]["sites"]) == (None, 0)
    after = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(after[f"{name}.weight"].double(), 1 + one.delta()) for name, one in pairs.items())
    assert not rest.exists()


def test_a_site_that_lost_nothing_beside_one_that_did(tmp_path: Path) -> None:
    """A module whose B is still zero, as some are in many files."""
    base = hand.language_model(128)
    pairs = {name: hand.pair(base[f"{name}.weight"].shape, 4, 4.0).sized(0.002, base[f"{name}.weight"]) for name in (Q, UP)}
    pairs[Q].up.zero_()
    source, adapter = hand.save(tmp_path / "base.safetensors", base), hand.peft(tmp_path / "adapter", pairs)
    said = merge(source, [(adapter, 1.0)], tmp_path / "out.safetensors", residual=tmp_path / "rest")["residual"]
    assert (said["sites"], said["skipped_sites"]) == (1, 0)
    assert stored(tmp_path / "rest").keys() == {UP}


# ----------------------------------------------------------------------------------------------------------------- its file


def simple(tmp_path: Path) -> tuple[Path, Path]:
    base: Tensors = hand.flux(BF16, 64)
    name = "double_blocks.0.img_attn.proj"
    one = hand.pair((64, 64), 4, 4.0).sized(0.002, base[f"{name}.weight"])
    return hand.save(tmp_path / "base.safetensors", base), hand.kohya(tmp_path / "adapter.safetensors", {name: one})


def test_an_existing_residual_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source, adapter = simple(tmp_path)
    rest, out = tmp_path / "rest.safetensors", tmp_path / "out.safetensors"
    rest.write_bytes(b"mine")
    with pytest.raises(LoraToolsError) as caught:
        merge(source, [(adapter, 1.0)], out, arch="flux", residual=rest)
    assert caught.value.exit_code == 2
    assert "rest.safetensors" in f"{caught.value.message} {caught.value.details}"
    assert (rest.read_bytes(), out.exists()) == (b"mine", False)
    merge(source, [(adapter, 1.0)], out, arch="flux", residual=rest, force=True)
    assert stored(rest, arch="flux").keys() == {f"{BLOCK}.to_out.0"}


@pytest.mark.parametrize("place", ["base.safetensors", "adapter.safetensors", "out.safetensors"])
def test_a_residual_is_no_input_and_not_the_output(place: str, tmp_path: Path) -> None:
    source, adapter = simple(tmp_path)
    held = {path: path.read_bytes() for path in (source, adapter)}
    with pytest.raises(LoraToolsError) as caught:
        merge(source, [(adapter, 1.0)], tmp_path / "out.safetensors", arch="flux", residual=tmp_path / place, force=True)
    assert caught.value.exit_code == 2
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == held


def test_the_same_bytes_whatever_the_threads(tmp_path: Path) -> None:
    source, adapter = simple(tmp_path)
    for threads in (1, 4):
        rest = tmp_path / f"{threads}-rest.safetensors"
        merge(source, [(adapter, 1.0)], tmp_path / f"{threads}.safetensors", arch="flux", residual=rest, threads=threads)
    assert (tmp_path / "1-rest.safetensors").read_bytes() == (tmp_path / "4-rest.safetensors").read_bytes()


def test_a_dry_run_writes_none(tmp_path: Path) -> None:
    source, adapter = simple(tmp_path)
    before = sorted(tmp_path.iterdir())
    result = merge(
        source, [(adapter, 1.0)], tmp_path / "out.safetensors", arch="flux", residual=tmp_path / "rest.safetensors", dry_run=True
    )
    assert "residual" not in result
    assert sorted(tmp_path.iterdir()) == before

"""What a merge does not depend on: the order of the command line, the absolute scale of the weights; and hashes that follow the bytes."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

import loratools
from loratools.operations.merge import merge
from tests.operations import merge_by_hand as hand
from tests.operations.made import parts
from tests.operations.merge_by_hand import UP, Q, Tensors, noise

# ----------------------------------------------------------------------------------------------------------------- the order


def on_both(base: Tensors, seed: int, rank: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, hand.Pair]:
    return {name: hand.pair(base[f"{name}.weight"].shape, rank, 3.0, seed + at, dtype) for at, name in enumerate((Q, UP))}


def test_one_file_at_several_weights_in_any_order(tmp_path: Path) -> None:
    """Float sums depend on their order: it is that of the weights, not of the command line. A copy under another name is another file."""
    base = hand.language_model(64, torch.float32)
    source, one = hand.save(tmp_path / "base.safetensors", base), hand.peft(tmp_path / "one", on_both(base, 1))
    two = hand.peft(tmp_path / "two", on_both(base, 11))
    given = [(one, 0.3), (one, -1.7), (one, 0.9), (two, 0.6), (two, 0.1)]
    digests = set()
    for number, order in enumerate(([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 1, 4, 3], [3, 1, 4, 0, 2])):
        for threads in (1, 3):
            out = tmp_path / f"{number}-{threads}.safetensors"
            merge(source, [given[at] for at in order], out, threads=threads)
            digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
    assert len(digests) == 1
    after, weights = load_file(out), (-1.7 + 0.3 + 0.9, 0.6 + 0.1)
    for name in (Q, UP):
        delta = sum(weight * on_both(base, seed)[name].delta() for weight, seed in zip(weights, (1, 11), strict=True))
        assert float((after[f"{name}.weight"].double() - base[f"{name}.weight"].double() - delta).abs().max()) < 1e-5


def test_the_sums_above_do_depend_on_their_order() -> None:
    """The proof that the test above could have failed: in float32 three weights of one delta have more than one sum."""
    delta = on_both(hand.language_model(64, torch.float32), 1)[Q].delta().float()
    sums = [((delta * first + delta * second) + delta * third) for first, second, third in itertools.permutations((0.3, -1.7, 0.9))]
    assert any(not torch.equal(sums[0], other) for other in sums[1:])


def test_one_weights_file_under_two_configurations(tmp_path: Path) -> None:
    """The same tensors and the same weight, but another alpha: the order is told by the configuration then."""
    base = hand.language_model(64, torch.float32)
    source, one = hand.save(tmp_path / "base.safetensors", base), hand.peft(tmp_path / "one", on_both(base, 1))
    other = shutil.copytree(one, tmp_path / "other")
    config = json.loads((one / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 0.7}))
    third = hand.peft(tmp_path / "third", on_both(base, 21))
    payloads = set()
    for number, order in enumerate(itertools.permutations([(one, 1.0), (other, 1.0), (third, 1.0)])):
        out = tmp_path / f"{number}.safetensors"
        merge(source, order, out)
        payloads.add(out.read_bytes())
    assert len(payloads) == 1


# ----------------------------------------------------------------------------------------------------------------- the scale


@pytest.mark.parametrize("power", [-20, 12])
def test_a_residual_has_the_scale_of_the_weights(power: int, tmp_path: Path) -> None:
    """Base and adapter times 2^power: every number of bf16 scales exactly, so the loss does, and with it what gives it back."""
    base = hand.language_model(128)
    pairs = {name: one.sized(0.002, base[f"{name}.weight"]) for name, one in on_both(base, 1).items()}
    found: list[dict[str, torch.Tensor]] = []
    told: list[dict[str, Any]] = []
    for name, times in (("plain", 1.0), ("scaled", 2.0**power)):
        place = tmp_path / name
        place.mkdir()
        source = hand.save(place / "base.safetensors", {key: value * times for key, value in base.items()})
        scaled = {site: hand.Pair(one.up * times, one.down, one.alpha) for site, one in pairs.items()}
        adapter = hand.peft(place / "style", scaled)
        told.append(merge(source, [(adapter, 1.0)], place / "out.safetensors", residual=place / "rest")["residual"])
        found.append({site.path: modules[0].delta() for site, modules in loratools.load(place / "rest").modules.items()})
    assert found[0].keys() == found[1].keys() == {Q, UP}
    for site, one in found[0].items():
        assert float(one.norm()) > 0
        assert float((found[1][site] - one * 2.0**power).norm()) < 1e-4 * float((one * 2.0**power).norm())
    assert all(told[0][key] == pytest.approx(told[1][key], rel=1e-4) for key in ("loss_recovered", "delta_retained", "relative_error"))
    assert (told[0]["sites"], told[0]["max_rank"]) == (2, 3)


# ---------------------------------------------------------------------------------------------------------------- the hashes


def hashes(path: Path) -> dict[str, str]:
    """By sd-scripts' formula: all after the header; 64 KiB at 1 MiB of a file that has its ss_ entries alone."""
    (header, payload), tensors = parts(path), load_file(path)
    ordered = {name: tensors[name] for name in header if name != "__metadata__"}
    blob = save(ordered, {key: value for key, value in header["__metadata__"].items() if key.startswith("ss_")})
    model = hashlib.sha256(payload).hexdigest()
    legacy = hashlib.sha256(blob[0x100000:0x110000]).hexdigest()[:8]
    return {"sshs_model_hash": model, "sshs_legacy_hash": legacy, "modelspec.hash_sha256": f"0x{model}"}


@pytest.mark.parametrize("kept", [("sshs_model_hash", "sshs_legacy_hash"), ("sshs_legacy_hash",), ("modelspec.hash_sha256",), ()], ids=str)
def test_hashes_of_a_base_are_those_of_the_result(kept: tuple[str, ...], tmp_path: Path) -> None:
    """A base that came from a trainer has hashes in its header: never the old ones beside new bytes, none where there was none."""
    base = {f"{Q}.weight": noise(640, 512, seed=1), f"{UP}.weight": noise(64, 512, seed=2)}  # more than 1 MiB, as the window needs
    source = tmp_path / "base.safetensors"
    save_file(base, source, training := {"ss_network_dim": "4", "ss_note": "x" * 100})
    save_file(base, source, {**training, **{key: value for key, value in hashes(source).items() if key in kept}})
    before = parts(source)[0]["__metadata__"]
    assert before.get("sshs_legacy_hash") != "e3b0c442", "the window is empty, which is the same for all files"
    adapter = hand.peft(tmp_path / "style", {Q: hand.pair((640, 512), 2, 2.0)})
    merge(source, [(adapter, 1.0)], tmp_path / "out.safetensors")
    after, true = parts(tmp_path / "out.safetensors")[0]["__metadata__"], hashes(tmp_path / "out.safetensors")
    assert {key: after[key] for key in true if key in after} == {key: true[key] for key in kept}
    for key in kept:
        assert after[key] != before[key]
    assert {key: after[key] for key in training} == training


def test_a_merge_that_changes_nothing_keeps_the_hashes(tmp_path: Path) -> None:
    base = {f"{Q}.weight": noise(64, 64, seed=1)}
    source = tmp_path / "base.safetensors"
    save_file(base, source, {"sshs_model_hash": "somebody's own"})
    adapter = hand.peft(tmp_path / "style", {Q: hand.pair((64, 64), 2, 2.0)})
    merge(source, [(adapter, 0.0)], tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == source.read_bytes()

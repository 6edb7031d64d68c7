"""combine around the sum: cosines, the record in the header, what is refused and when, and the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.errors import AmbiguousError, InputError, OutputExistsError, UsageError
from loratools.operations.combine import combine
from tests.operations.made import ATTENTION, CONV, PROJ, SHAPES, Make, Save, factors, four, kohya, kohya_file, parts, written
from tests.operations.test_combine import check, make
from tests.reference import deltas


def test_pairwise_cosines_are_those_of_the_dense_deltas(randn: Make, save: Save, tmp_path: Path) -> None:
    made = [make(randn, save, f"{place}.safetensors", 4 + place) for place in range(2)]
    empty = save("zero.safetensors", kohya_file({path: (torch.zeros_like(up), down) for path, (up, down) in four(randn).items()}))
    result = combine([(made[0][0], 0.2), (made[1][0], -3.0), (empty, 1.0)], tmp_path / "out.safetensors")
    flat = [torch.cat([delta.flatten() for delta in deltas_.values()]) for _, deltas_ in made]
    cosine = float(flat[0] @ flat[1] / flat[0].norm() / flat[1].norm())
    matrix = result["pairwise_cosine"]
    assert matrix[0][1] == matrix[1][0] == pytest.approx(cosine, rel=1e-9)
    assert matrix[0][0] == matrix[1][1] == 1.0
    assert matrix[2] == [None, None, None]


def test_metadata_is_the_firsts_and_tells_what_was_combined(randn: Make, save: Save, tmp_path: Path, digest: Any) -> None:
    """W4: carried, dims corrected, hashes of what is written, no path."""
    training = {"custom": "mine", "ss_tag_frequency": '{"x":{"tag":1}}', "sshs_model_hash": "0" * 64}
    a = save("a.safetensors", kohya_file(four(randn)), training)
    b = save("b.safetensors", kohya_file(four(randn)), {"custom": "theirs", "ss_tag_frequency": '{"y":{"other":1}}'})
    out = tmp_path / "out.safetensors"
    combine([(a, 1.0), (b, 0.5)], out, rank=3)
    metadata = parts(out)[0]["__metadata__"]
    assert metadata["custom"] == "mine"
    assert metadata["ss_tag_frequency"] == '{"x":{"tag":1}}'
    assert metadata["modelspec.merged_from"] == "a.safetensors, b.safetensors"
    assert json.loads(metadata["loratools.combine"]) == {
        "method": "sum", "rank": 3, "energy": None, "density": None, "seed": None,
        "inputs": [
            {"name": "a.safetensors", "sha256": digest(a), "weight": 1.0},
            {"name": "b.safetensors", "sha256": digest(b), "weight": 0.5},
        ],
    }  # fmt: skip
    assert metadata["sshs_model_hash"] == hashlib.sha256(parts(out)[1]).hexdigest()
    assert str(tmp_path) not in json.dumps(metadata)


def test_two_architectures_are_refused_by_name(randn: Make, save: Save, tmp_path: Path) -> None:
    """B6."""
    a = save("a.safetensors", kohya_file(four(randn)))
    site = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    deep = "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_k"
    xl = {**written(site, *factors(randn, (640, 640))), **written(deep, *factors(randn, (1280, 2048)))}
    b = save("b.safetensors", xl)
    with pytest.raises(InputError) as refused:
        combine([(a, 1.0), (b, 1.0)], tmp_path / "out.safetensors")
    assert refused.value.message == "two architectures: a.safetensors is sd1, b.safetensors is sdxl"
    assert not (tmp_path / "out.safetensors").exists()


def test_an_ambiguous_file_is_settled_by_another(randn: Make, save: Save, tmp_path: Path) -> None:
    riddle = save("riddle.safetensors", written(kohya(ATTENTION), *factors(randn, (16, 16))))
    with pytest.raises(AmbiguousError):
        combine([(riddle, 1.0)], tmp_path / "out.safetensors")
    a, first = make(randn, save, "a.safetensors")
    result = combine([(riddle, 0.0), (a, 1.0)], tmp_path / "out.safetensors")
    assert result["architecture"] == "sd1"
    check(tmp_path / "out.safetensors", first)


def test_all_shapes_that_differ_are_listed(randn: Make, save: Save, tmp_path: Path) -> None:
    a = save("a.safetensors", kohya_file(four(randn)))
    wide = {path: factors(randn, (32, 32, *shape[2:])) for path, shape in SHAPES.items() if path in (ATTENTION, PROJ)}
    b = save("b.safetensors", kohya_file(wide))
    with pytest.raises(InputError) as refused:
        combine([(a, 1.0), (b, 1.0)], tmp_path / "out.safetensors")
    assert len(refused.value.details) == 2
    line = next(line for line in refused.value.details if ATTENTION in line)
    assert "[16, 16] in a.safetensors" in line
    assert "[32, 32] in b.safetensors" in line


def test_values_that_are_no_numbers_are_named(randn: Make, save: Save, tmp_path: Path) -> None:
    pairs = four(randn)
    pairs[CONV][0][3, 1] = float("nan")
    a, b = save("a.safetensors", kohya_file(four(randn))), save("b.safetensors", kohya_file(pairs))
    for settings in ({}, {"rank": 2}, {"rank": 2, "method": "ties"}):
        with pytest.raises(InputError) as refused:
            combine([(a, 1.0), (b, 1.0)], tmp_path / "out.safetensors", **settings)
        assert refused.value.details == [f"b.safetensors: {kohya(CONV)}.lora_up.weight"]
        assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"rank": 4, "energy": 0.5}, "one of them"),
        ({"energy": 0.0}, "--energy"),
        ({"energy": 1.5}, "--energy"),
        ({"method": "ties"}, "--rank N or --energy E"),
        ({"method": "dare"}, "--rank N or --energy E"),
        ({"density": 0.5}, "--density"),
        ({"method": "ties", "rank": 2, "density": 0.0}, "--density"),
        ({"method": "dare", "rank": 2, "density": 1.1}, "--density"),
        ({"method": "mean"}, "unknown method"),
        ({"to": "kohia"}, "did you mean 'kohya'"),
        ({"dtype": "int4"}, "no dtype of weights"),
        ({"alpha": 4.0}, "--alpha"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_computed(randn: Make, save: Save, tmp_path: Path, settings: Any, word: str) -> None:
    a = save("a.safetensors", kohya_file(four(randn)))
    with pytest.raises(UsageError) as refused:
        combine([(a, 1.0), (a, 2.0)], tmp_path / "out.safetensors", **settings)
    assert word in " ".join([refused.value.message, *refused.value.details])
    assert not (tmp_path / "out.safetensors").exists()


def test_all_that_is_wrong_is_told_at_once(randn: Make, save: Save, tmp_path: Path) -> None:
    """Exit 3 before 2; the output that is there and the odd energy are told with the input that cannot be read."""
    a = save("a.safetensors", kohya_file(four(randn)))
    b = save("b.safetensors", {**kohya_file(four(randn)), "strange": torch.zeros(3)})
    out = save("out.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(InputError) as refused:
        combine([(a, 1.0), (b, 1e40)], out, energy=7.0)
    text = " ".join([refused.value.message, *refused.value.details])
    for word in ("strange", "already there", "--energy 7", "1e+40"):
        assert word in text


@pytest.mark.parametrize(
    ("name", "settings", "word"),
    [
        ("out.bin", {"to": "peft"}, "peft is a folder"),
        ("out.ckpt", {"to": "peft"}, "peft is a folder"),
        ("out.safetensors", {"to": "peft"}, "peft is a folder"),
        ("out.ckpt", {}, "never a pickle"),
        ("out.pt", {"rank": 2}, "never a pickle"),
        ("out.bin", {"to": "diffusers"}, "never a pickle"),
    ],
)
def test_a_name_does_not_promise_another_container(
    randn: Make, save: Save, tmp_path: Path, name: str, settings: dict[str, Any], word: str
) -> None:
    a = save("a.safetensors", kohya_file(four(randn)))
    with pytest.raises(UsageError, match=word) as refused:
        combine([(a, 1.0)], tmp_path / name, **settings)
    assert (refused.value.fix or "").endswith("out" if "to" in settings and settings["to"] == "peft" else "out.safetensors")
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("weight", [1e30, -1e30, 1e-30, -5e-324, float("inf"), float("nan")])
def test_a_weight_has_a_size_that_float32_can_scale_by(randn: Make, save: Save, tmp_path: Path, weight: float) -> None:
    a = save("a.safetensors", kohya_file(four(randn)))
    with pytest.raises(UsageError, match="expected 0, or a number between"):
        combine([(a, weight)], tmp_path / "out.safetensors")


@pytest.mark.parametrize("weight", [9e29, -1.1e-30])
@pytest.mark.parametrize("settings", [{}, {"to": "diffusers"}, {"rank": 2}])
def test_the_largest_and_smallest_weights_do(randn: Make, save: Save, tmp_path: Path, weight: float, settings: dict[str, Any]) -> None:
    a, first = make(randn, save, "a.safetensors", 2)
    combine([(a, weight)], tmp_path / "out.safetensors", **settings)
    check(
        tmp_path / "out.safetensors",
        {path: weight * delta for path, delta in first.items()},
        dialect="diffusers" if "to" in settings else "kohya",
    )


def test_an_output_is_not_an_input_and_not_overwritten_unasked(randn: Make, save: Save, tmp_path: Path, digest: Any) -> None:
    a, out = save("a.safetensors", kohya_file(four(randn))), save("out.safetensors", {"x": torch.zeros(1)})
    before = digest(a)
    for target, force in ((out, False), (a, False), (a, True)):
        with pytest.raises(OutputExistsError):
            combine([(a, 1.0), (a, 1.0)], target, force=force)
    assert digest(a) == before
    combine([(a, 1.0), (a, 1.0)], out, force=True)
    assert len(deltas(out)) == 4


def test_a_dry_run_writes_nothing_and_plans_the_truth(randn: Make, save: Save, tmp_path: Path) -> None:
    a, b = (save(f"{place}.safetensors", kohya_file(four(randn))) for place in range(2))
    before = sorted(tmp_path.iterdir())
    planned = combine([(a, 1.0), (b, 1.0)], tmp_path / "out.safetensors", rank=3, dry_run=True)
    assert sorted(tmp_path.iterdir()) == before
    done = combine([(a, 1.0), (b, 1.0)], tmp_path / "out.safetensors", rank=3)
    assert planned["ranks_after"] == done["ranks_after"] == {"3": 4}
    assert planned["pairwise_cosine"] is None
    assert planned["plan"] == {"tensors": 12, "bytes": len(parts(tmp_path / "out.safetensors")[1])}


@pytest.mark.parametrize(
    "settings", [{}, {"rank": 3}, {"rank": 5, "method": "dare", "seed": 4}, {"energy": 0.8, "method": "ties", "density": 0.3}]
)
def test_threads_order_and_process_do_not_change_a_byte(
    randn: Make, save: Save, tmp_path: Path, digest: Any, settings: dict[str, Any]
) -> None:
    """B10: masks come from (seed, site, input), not from a global generator in the order things are computed."""
    tensors = [kohya_file(four(randn)) for _ in range(2)]
    a, b = (save(f"{place}.safetensors", made) for place, made in enumerate(tensors))
    outs = [tmp_path / f"t{threads}.safetensors" for threads in (1, 4)]
    for threads, out in zip((1, 4), outs, strict=True):
        combine([(a, 0.7), (b, 0.6)], out, threads=threads, **settings)
    call = f"combine([({str(a)!r}, 0.7), ({str(b)!r}, 0.6)], {str(tmp_path / 'own.safetensors')!r}, threads=2, **{settings!r})"
    script = f"from loratools.operations.combine import combine\n{call}"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert digest(outs[0]) == digest(outs[1]) == digest(tmp_path / "own.safetensors")
    turned = save("1.safetensors", dict(reversed(tensors[1].items())))
    combine([(a, 0.7), (turned, 0.6)], tmp_path / "turned.safetensors", **settings)
    assert parts(tmp_path / "turned.safetensors")[1] == parts(outs[0])[1]


def test_bundled_embeddings_come_along_once(randn: Make, save: Save, tmp_path: Path) -> None:
    token = {"bundle_emb.ink.string_to_param.*": torch.ones(2, 8)}
    other = {"bundle_emb.pen.string_to_param.*": torch.ones(1, 8)}
    a = save("a.safetensors", {**kohya_file(four(randn)), **token})
    b = save("b.safetensors", {**kohya_file(four(randn)), **token, **other})
    out = tmp_path / "out.safetensors"
    combine([(a, 1.0), (b, 1.0)], out, rank=2)
    assert {*token, *other} <= set(parts(out)[0])
    c = save("c.safetensors", {**kohya_file(four(randn)), **{key: 2 * value for key, value in token.items()}})
    with pytest.raises(InputError) as refused:
        combine([(a, 1.0), (c, 1.0)], tmp_path / "no.safetensors")
    assert any("bundle_emb.ink" in line for line in refused.value.details)

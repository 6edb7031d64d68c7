"""Adapters that parse and make no sense: `inspect` describes them (4 with --check), every other command refuses, all findings at once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.operations.made import ATTENTION, CONV, FF, NATIVE, PROJ, Make, Save, Tensors, factors, four, kohya, kohya_file, written

pytestmark = pytest.mark.hostile

Q = kohya(ATTENTION)
K = Q.replace("to_q", "to_k")
DOWN, UP = f"{Q}.lora_down.weight", f"{Q}.lora_up.weight"
Spoil = Callable[[dict[str, torch.Tensor]], Tensors]


def without(*names: str) -> Spoil:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def also(name: str, tensor: torch.Tensor) -> Spoil:
    return lambda tensors: {**tensors, name: tensor}


SPOILT: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "up without down": (without(DOWN), (Q, "down")),
    "down without up": (without(UP), (Q, "up")),
    "alpha alone": (also(f"{K}.alpha", torch.tensor(1.0)), (K, "alpha")),
    "dora_scale alone": (also(f"{K}.dora_scale", torch.ones(16, 1)), (K, "dora_scale")),
    "ranks differ": (also(DOWN, torch.ones(3, 16)), (Q, "4", "3")),
    "1-D down": (also(DOWN, torch.ones(16)), (Q, "[16]")),
    "size 0": (also(DOWN, torch.empty(0, 16)), (Q, "no element")),
    "alpha NaN": (also(f"{Q}.alpha", torch.tensor(math.nan)), (Q, "alpha", "nan")),
    "alpha Inf": (also(f"{Q}.alpha", torch.tensor(math.inf)), (Q, "alpha", "inf")),
    "alpha 0": (also(f"{Q}.alpha", torch.tensor(0.0)), (Q, "alpha", "--alpha")),
    "alpha of two values": (also(f"{Q}.alpha", torch.ones(2)), (Q, "alpha", "[2]")),
    "wrong in width": (also(DOWN, torch.ones(4, 24)), (Q, "24", "16")),
    "wrong out width": (also(UP, torch.ones(40, 4)), (Q, "40", "16")),
    "unknown module": (
        also("lora_unet_up_blocks_3_attentions_0_prj_in.lora_up.weight", torch.ones(2, 2)),
        ("prj_in", "proj_in", "--drop-unknown"),
    ),
    "unknown key": (also("what is this", torch.ones(2)), ("what is this", "--drop-unknown")),
    "one factor twice": (also(f"{Q}.lora_A.weight", torch.ones(4, 16)), (Q,)),
    "one site twice": (
        lambda tensors: {**tensors, **written(f"diffusion_model.{NATIVE[ATTENTION]}", torch.ones(16, 4), torch.ones(4, 16))},
        (ATTENTION, NATIVE[ATTENTION], "two modules"),
    ),
    "renamed prefix": (
        lambda tensors: {name.replace("lora_unet_", "lora_vnet_"): tensor for name, tensor in tensors.items()},
        ("lora_vnet_", "--base"),
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_adapter_is_refused_by_name(name: str, save: Save, randn: Make, refused: Any, run: Any) -> None:
    spoil, words = SPOILT[name]
    path = save("bad.safetensors", spoil(kohya_file(four(randn))))
    refused(path, *words, inspect=False)
    told = run("inspect", path, "--check", "--json")
    assert told.exit_code == 4
    found = json.loads(told.stdout)
    assert any(words[0] in json.dumps([problem, found["unknown_keys"]]) for problem in found["problems"] or [None])


def test_all_findings_at_once(save: Save, randn: Make, refused: Any) -> None:
    """Five faults in five modules: one run names them all."""
    tensors = {
        **kohya_file(four(randn)),
        UP: torch.ones(16, 7),
        f"{kohya(PROJ)}.alpha": torch.tensor(math.nan),
        f"{kohya(CONV)}.lora_down.weight": torch.empty(0, 32, 3, 3),
        f"{K}.lora_up.weight": torch.ones(16, 4),
        "stray": torch.ones(1),
    }
    del tensors[f"{kohya(FF)}.lora_up.weight"]
    refused(save("bad.safetensors", tensors), Q, kohya(PROJ), kohya(CONV), K, kohya(FF), "stray", inspect=False)


def test_two_spellings_in_one_file_are_all_read(save: Save, randn: Make, run: Any, tmp_path: Path) -> None:
    """diffusers attaches 1 of 132 modules of such a file and warns: half of it vanishes (diffusers#14548)."""
    pairs = four(randn)
    first, *rest = pairs
    mixed = {**written(f"diffusion_model.{NATIVE[first]}", *pairs[first]), **kohya_file({path: pairs[path] for path in rest})}
    path, out = save("mixed.safetensors", mixed), tmp_path / "out.safetensors"
    assert "mixed-dialects" in run("inspect", path, "--json").stdout
    result = run("convert", path, out, "--to", "kohya", "--json")
    assert (result.exit_code, json.loads(result.stdout)["sites"]) == (0, 4)
    assert run("compare", out, save("plain.safetensors", kohya_file(pairs))).exit_code == 0


def test_another_architecture_is_named(save: Save, randn: Make, good: Path, run: Any) -> None:
    flux = written("lora_unet_double_blocks_0_img_mod_lin", randn(144, 2), randn(2, 24))
    path = save("flux.safetensors", {**flux, **written("lora_unet_single_blocks_0_modulation_lin", randn(72, 2), randn(2, 24))})
    result = run("compare", path, good)
    assert result.exit_code == 3
    assert "flux" in result.stderr
    assert "sd1" in result.stderr
    forced = run("convert", path, path.with_name("out.safetensors"), "--to", "comfy", "--arch", "sd1")
    assert forced.exit_code == 3
    assert not path.with_name("out.safetensors").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", ["comfy", "kohya", "diffusers", "peft"])
def test_nan_is_never_written(value: float, dtype: torch.dtype, target: str, save: Save, randn: Make, run: Any, tmp_path: Path) -> None:
    """The last element of the last tensor: found while writing, renamed, folded or copied as it is."""
    tensors = {name: tensor.to(dtype) for name, tensor in kohya_file(four(randn)).items()}
    key = f"{kohya(FF)}.lora_up.weight"
    tensors[key] = tensors[key].clone()
    tensors[key][-1, -1] = value
    path, out = save("nan.safetensors", tensors), tmp_path / "out"
    result = run("convert", path, out, "--to", target)
    assert result.exit_code == 3
    assert "NaN or Inf" in result.stderr
    assert sorted(item.name for item in tmp_path.iterdir()) == ["nan.safetensors"]


def test_values_that_overflow_the_output_are_refused(save: Save, randn: Make, run: Any, tmp_path: Path) -> None:
    tensors = kohya_file(four(randn))
    tensors[UP] = tensors[UP] * 1e5
    path = save("large.safetensors", tensors)
    result = run("convert", path, tmp_path / "out.safetensors", "--to", "comfy", "--dtype", "fp16", "--allow-lossy")
    assert result.exit_code == 3
    assert "overflow" in result.stderr
    assert sorted(item.name for item in tmp_path.iterdir()) == ["large.safetensors"]


CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "rank of another file": ({"r": 8}, ("rank 4", "8")),
    "rank in words": ({"r": "four"}, ("'four'",)),
    "rank below zero": ({"r": -4}, ("-4",)),
    "rank true": ({"r": True}, ("True",)),
    "alpha in words": ({"lora_alpha": "8"}, ("lora_alpha", "'8'")),
    "a pattern that is none": ({"rank_pattern": {"(": 4}}, ("rank_pattern", "'('")),
    "patterns that are none": ({"alpha_pattern": [1, 2]}, ("alpha_pattern", "[1, 2]")),
    "a pattern of nothing": ({"alpha_pattern": {".*": None}}, ("alpha_pattern", "None")),
    "layer replication": ({"layer_replication": [[0, 4], [2, 5]]}, ("layer_replication",)),
    "target parameters": ({"target_parameters": ["mlp.experts.gate"]}, ("target_parameters",)),
    "qalora": ({"use_qalora": True}, ("use_qalora",)),
    "trainable tokens": ({"trainable_token_indices": [1, 2]}, ("trainable_token_indices",)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_changes_the_numbers_is_not_ignored(name: str, peft: Any, randn: Make, refused: Any) -> None:
    """All of them at once in one message; each alone here."""
    fields, words = CONFIGS[name]
    stem = "base_model.model." + PROJ
    up, down = factors(randn, (16, 16, 1, 1))
    config = {"r": 4, "lora_alpha": 8, "target_modules": [PROJ], **fields}
    folder = peft("folder", {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, config)
    refused(folder, "adapter_config", *words, inspect=False)


def test_factors_of_a_changed_base_are_told_apart(peft: Any, randn: Make, run: Any, tmp_path: Path) -> None:
    """PiSSA and its kin fit the residual base they made: on the published base the same tensors are another function."""
    stem = "base_model.model." + PROJ
    up, down = factors(randn, (16, 16, 1, 1))
    config = {"r": 4, "lora_alpha": 8, "target_modules": [PROJ], "init_lora_weights": "pissa_niter_4"}
    folder = peft("folder", {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, config)
    assert "pissa" in run("inspect", folder).stdout
    assert "pissa" in run("convert", folder, tmp_path / "out.safetensors", "--to", "kohya").stderr


@pytest.mark.parametrize("text", ["", "{", "[]", '{"r": 4, "r": 8}', '{"r": NaN}', "\ufeff{}", "[" * 5000, "\x00"])
def test_a_config_that_is_no_json_object_is_refused(text: str, peft: Any, randn: Make, refused: Any) -> None:
    stem = "base_model.model." + PROJ
    up, down = factors(randn, (16, 16, 1, 1))
    folder = peft("folder", {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, {})
    (folder / "adapter_config.json").write_text(text)
    refused(folder, "adapter_config")


ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\r\n\x00"


def test_names_that_are_terminal_commands_are_told_as_text(save: Save, randn: Make, run: Any, tmp_path: Path) -> None:
    """ESC in a tensor's name, in metadata, in a file's name: nothing of it reaches the terminal."""
    tensors = {**kohya_file(four(randn)), f"{ESCAPES}.lora_up.weight": randn(2, 2), ESCAPES: randn(1)}
    path = save("a\x1b[31m\u202e.safetensors", tensors, {ESCAPES: ESCAPES, "ss_tag_frequency": json.dumps({"1_" + ESCAPES: {ESCAPES: 1}})})
    out = tmp_path / "out\x1b[0m.safetensors"
    commands: list[list[object]] = [
        ["inspect", path],
        ["inspect", path, "--modules", "--spectrum", "--check", "--hashes"],
        ["inspect", path, path],
        ["inspect", path, "--metadata", ESCAPES.replace("\x00", "")],
        ["convert", path, out, "--to", "comfy"],
        ["convert", path, out, "--to", "comfy", "--keep-unknown"],
        ["convert", path, out, "--to", "comfy", "--keep-unknown"],
        ["compare", path, path],
        ["metadata", path],
        ["metadata", path, "--get", "no such\x1b[1m"],
        ["inspect", tmp_path / "missing\x1b[1m"],
    ]
    for arguments in commands:
        for flags in ([], ["--json"], ["--debug"]):
            result = run(*arguments, *flags)
            for stream in (result.stdout, result.stderr):
                bad = {character for character in stream if not character.isprintable() and character not in "\n\t"}
                assert not bad, (arguments[0], flags, bad)
            assert "unexpected" not in result.stderr

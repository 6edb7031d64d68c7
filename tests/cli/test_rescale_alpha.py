"""`loratools rescale-alpha` at the command line: options, exit codes, the JSON object, and words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.operations.made import ATTENTION, CONV, PROJ, SHAPES, factors, kohya, kohya_file, render

KEYS = {
    "input", "output", "dialect", "architecture", "modules", "changed", "alpha_before", "alpha_after", "strength",
    "max_relative_error", "rounded_to", "worst", "warnings",
}  # fmt: skip


def seeded(*shape: int) -> torch.Tensor:
    noise = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=noise)


@pytest.fixture
def style(tmp_path: Path) -> Path:
    """Three modules of rank 4, alpha 3, in float16; the alphas are float32."""
    tensors = kohya_file({path: factors(seeded, SHAPES[path]) for path in (ATTENTION, PROJ, CONV)}, 3.0)
    path = tmp_path / "style.safetensors"
    path.write_bytes(render({key: tensor if key.endswith("alpha") else tensor.half() for key, tensor in tensors.items()}))
    return path


@pytest.fixture
def dora(tmp_path: Path, style: Path) -> Path:
    path = tmp_path / "dora.safetensors"
    path.write_bytes(render({**load_file(style), f"{kohya(ATTENTION)}.dora_scale": seeded(16, 1).abs()}))
    return path


def test_the_json_of_the_contract(style: Path, tmp_path: Path, run: Any, parsed: Any) -> None:
    out = tmp_path / "out.safetensors"
    result = run("rescale-alpha", style, out, "--alpha", "rank", "--json")
    assert result.exit_code == 0
    found = parsed(result)
    assert found.keys() == KEYS
    assert (found["input"], found["output"]) == (str(style), str(out))
    assert (found["alpha_before"], found["alpha_after"], found["strength"]) == ({"3": 3}, {"4": 3}, 1.0)
    assert 1e-5 < found["max_relative_error"] < 6e-4
    assert found["rounded_to"] == ["F16"]
    assert found["worst"][0]["relative_error"] == found["max_relative_error"]
    assert {float(tensor) for key, tensor in load_file(out).items() if key.endswith("alpha")} == {4.0}


@pytest.mark.parametrize(
    ("options", "before", "after", "strength"),
    [
        (["--alpha", "12"], {"3": 3}, {"12": 3}, 1.0),
        (["--strength", "-2"], {"3": 3}, {"6": 3}, -2.0),
        (["--fold"], {"3": 3}, {"none": 3}, 1.0),
    ],
)
def test_each_request(
    style: Path, tmp_path: Path, run: Any, parsed: Any, options: list[str], before: Any, after: Any, strength: float
) -> None:
    found = parsed(run("rescale-alpha", style, tmp_path / "out.safetensors", *options, "--json"))
    assert (found["alpha_before"], found["alpha_after"], found["strength"]) == (before, after, strength)


def test_words(style: Path, tmp_path: Path, run: Any) -> None:
    rounded = run("rescale-alpha", style, tmp_path / "a.safetensors", "--alpha", "rank").stdout
    assert "alpha 3 (3) -> 4 (3)" in rounded
    assert "rounding to float16 takes up to" in rounded
    assert "relative error" in rounded
    half = run("rescale-alpha", style, tmp_path / "b.safetensors", "--strength", "0.5").stdout
    assert "0.5 times the strength" in half
    assert "exact\n" in half
    weak = run("rescale-alpha", style, tmp_path / "c.safetensors", "--strength", "0.3").stdout
    assert "exact up to rounding" in weak  # 0.9 is no float32
    bf16 = run("rescale-alpha", style, tmp_path / "d.safetensors", "--strength", "2", "--dtype", "bf16").stdout
    assert "rounding to bfloat16 takes up to" in bf16
    assert run("rescale-alpha", style, tmp_path / "e.safetensors", "--fold", "-q").output == ""


def test_a_dry_run_writes_nothing(style: Path, tmp_path: Path, run: Any, parsed: Any) -> None:
    out = tmp_path / "out.safetensors"
    text = run("rescale-alpha", style, out, "--fold", "--dry-run").stdout
    assert "plan: 6 tensors" in text
    assert f"would write {out}" in text
    assert parsed(run("rescale-alpha", style, out, "--fold", "--dry-run", "--json")).keys() == {*KEYS, "plan"}
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "--alpha, --strength and --fold"),
        (["--alpha", "8", "--fold"], "--alpha, --strength and --fold"),
        (["--strength", "0"], "--strength 0"),
        (["--strength", "nan"], "finite"),
        (["--alpha", "inf"], "--alpha inf"),
        (["--alpha", "0"], "--alpha 0"),
        (["--alpha", "half"], "rank"),
        (["--alpha", "8", "--dtype", "fp17"], "fp1"),
    ],
)
def test_wrong_usage_is_2(style: Path, tmp_path: Path, run: Any, parsed: Any, options: list[str], told: str) -> None:
    out = tmp_path / "out.safetensors"
    result = run("rescale-alpha", style, out, *options)
    assert result.exit_code == 2
    assert told in result.stderr
    assert parsed(run("rescale-alpha", style, out, *options, "--json"))["error"]["code"] == "usage"
    assert not out.exists()


def test_outputs_follow_the_rules_of_all_commands(style: Path, tmp_path: Path, run: Any, parsed: Any) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"something")
    result = run("rescale-alpha", style, out, "--fold", "--json")
    assert (result.exit_code, parsed(result)["error"]["code"]) == (2, "output-exists")
    assert out.read_bytes() == b"something"
    assert run("rescale-alpha", style, out, "--fold", "--force").exit_code == 0
    assert run("rescale-alpha", style, style, "--fold", "--force").exit_code == 2
    assert run("rescale-alpha", style, tmp_path / "out.ckpt", "--fold").exit_code == 2


def test_a_strength_of_dora_is_3_and_names_every_site(dora: Path, tmp_path: Path, run: Any, parsed: Any) -> None:
    result = run("rescale-alpha", dora, tmp_path / "out.safetensors", "--strength", "2", "--json")
    assert result.exit_code == 3
    error = parsed(result)["error"]
    assert error["code"] == "unsupported"
    assert error["details"] == [f"denoiser.{ATTENTION}: dora"]
    assert run("rescale-alpha", dora, tmp_path / "out.safetensors", "--alpha", "4").exit_code == 0


@pytest.mark.parametrize("planted", ["unknown", "renamed", "shape"])
def test_bad_inputs_are_3_and_name_the_key(style: Path, tmp_path: Path, run: Any, planted: str) -> None:
    """Lesson 1: an unknown key, a wrong shape, a renamed prefix."""
    tensors = load_file(style)
    key = f"{kohya(ATTENTION)}.lora_up.weight"
    if planted == "unknown":
        tensors["stray.weight_of_nobody"] = torch.ones(3)
        key = "stray.weight_of_nobody"
    elif planted == "renamed":
        stem = kohya(ATTENTION)
        tensors = {name.replace(stem, stem.replace("up_blocks_3", "up_blocks_9")): tensor for name, tensor in tensors.items()}
        key = "up_blocks_9"
    else:
        tensors[key] = torch.ones(16, 5).half()
        key = kohya(ATTENTION)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(render(tensors))
    result = run("rescale-alpha", bad, tmp_path / "out.safetensors", "--alpha", "8")
    assert result.exit_code == 3
    assert key in result.stderr
    assert not (tmp_path / "out.safetensors").exists()


def test_overflow_is_3_and_names_the_tensor_and_the_option(style: Path, tmp_path: Path, run: Any) -> None:
    result = run("rescale-alpha", style, tmp_path / "out.safetensors", "--alpha", "1e-20")
    assert result.exit_code == 3
    assert f"{kohya(CONV)}.lora_up.weight" in result.stderr
    assert "--dtype fp32" in result.stderr
    assert run("rescale-alpha", style, tmp_path / "out.safetensors", "--alpha", "1e-20", "--dtype", "fp32").exit_code == 0


def test_all_problems_at_once(style: Path, tmp_path: Path, run: Any, parsed: Any) -> None:
    """The file is not there, the output is, and the request is none: the code is the first of 3, 2, 1."""
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"something")
    result = run("rescale-alpha", tmp_path / "nothing.safetensors", out, "--json")
    assert result.exit_code == 3
    text = json.dumps(parsed(result)["error"])
    assert "nothing.safetensors" in text
    assert "out.safetensors" in text
    assert "--alpha, --strength and --fold" in text


def test_options_come_from_the_environment(style: Path, tmp_path: Path, run: Any, parsed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORATOOLS_RESCALE_ALPHA_ALPHA", "rank")
    monkeypatch.setenv("LORATOOLS_RESCALE_ALPHA_JSON", "1")
    assert parsed(run("rescale-alpha", style, tmp_path / "out.safetensors"))["alpha_after"] == {"4": 3}

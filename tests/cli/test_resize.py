"""`loratools resize`: every option handed on, what is shown, exit codes, and the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

RESULT: dict[str, Any] = {
    "input": "a.safetensors",
    "output": "out.safetensors",
    "dialect": "kohya",
    "architecture": "sd1",
    "sites": 264,
    "modules": 264,
    "changed": 263,
    "ranks_before": {"4": 1, "64": 263},
    "ranks_after": {"4": 1, "8": 263},
    "relative_error": 0.125,
    "worst": [{"site": "denoiser.conv_in", "rank": 8, "relative_error": 0.5}],
    "warnings": ["3 modules without a rank (full deltas, norms, biases): kept"],
}
GIVEN: dict[str, Any] = dict.fromkeys(
    ("rank", "energy", "error", "ratio", "conv_rank", "max_rank", "loader", "dtype", "arch", "alpha", "base", "threads")
)
STEM = "lora_unet_up_blocks_3_attentions_0_proj_in"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    noise = torch.Generator().manual_seed(3)
    up, down = torch.randn(16, 6, 1, 1, generator=noise), torch.randn(6, 16, 1, 1, generator=noise)
    path = tmp_path / "a.safetensors"
    save_file({f"{STEM}.lora_up.weight": up, f"{STEM}.lora_down.weight": down, f"{STEM}.alpha": torch.tensor(3.0)}, path)
    return path


def test_every_option_is_handed_on(run: Any, fake: Any) -> None:
    calls = fake("resize", RESULT)
    words = "--conv-rank 2 --max-rank 16 --for vllm --dtype bf16 --arch sd1 --alpha 4 --base m --threads 2 --force --dry-run --rank 8"
    assert run("resize", "a.safetensors", "out.safetensors", *words.split()).exit_code == 0
    assert calls[0] == {
        **GIVEN, "arguments": (Path("a.safetensors"), Path("out.safetensors")), "rank": 8, "conv_rank": 2, "max_rank": 16, "loader": "vllm",
        "dtype": "BF16", "arch": "sd1", "alpha": 4.0, "base": Path("m"), "threads": 2, "force": True, "dry_run": True,
    }  # fmt: skip
    for name, value in (("energy", 0.9), ("error", 0.1), ("ratio", 10.0)):
        run("resize", "a", "b", f"--{name}", str(value))
        assert calls[-1] == {**GIVEN, "arguments": (Path("a"), Path("b")), name: value, "force": False, "dry_run": False}


def test_environment_variables(run: Any, fake: Any) -> None:
    calls = fake("resize", RESULT)
    run("resize", "a", "b", env={"LORATOOLS_RESIZE_FOR": "sglang", "LORATOOLS_RESIZE_MAX_RANK": "12"})
    assert (calls[0]["loader"], calls[0]["max_rank"]) == ("sglang", 12)


def test_what_is_shown(run: Any, fake: Any, parsed: Any) -> None:
    fake("resize", RESULT)
    result = run("resize", "a", "b", "--rank", "8")
    for text in (
        "264 modules of sd1 as kohya, 263 changed",
        "ranks 4 (1), 64 (263) -> 4 (1), 8 (263)",
        "relative error 0.125",
        "conv_in  rank 8",
    ):
        assert text in result.stdout
    assert "wrote out.safetensors" in result.stdout
    assert "3 modules without a rank" in result.stderr
    assert parsed(run("resize", "a", "b", "--rank", "8", "--json")) == RESULT
    assert run("resize", "a", "b", "--rank", "8", "-q").output == ""
    fake("resize", {**RESULT, "relative_error": 0, "worst": []})
    assert "exact\n" in run("resize", "a", "b", "--rank", "8").stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "nothing says how large a rank may be"),
        (["--rank", "0"], "0 is not in the range"),
        (["--rank", "4", "--energy", "0.9"], "--rank and --energy: one of them settles the rank"),
        (["--error", "0.1", "--ratio", "3"], "--error and --ratio: one of them settles the rank"),
        (["--energy", "1.5"], "--energy 1.5: expected a share above 0"),
        (["--energy", "0"], "--energy 0.0: expected a share above 0"),
        (["--error", "1"], "--error 1.0: expected a relative error"),
        (["--error", "nan"], "not a finite number"),
        (["--ratio", "0.5"], "--ratio 0.5: expected a quotient"),
        (["--rank", "4", "--for", "vlm"], "did you mean 'vllm'"),
        (["--rank", "4", "--dtype", "fp17"], "fp16"),
    ],
)
def test_wrong_usage_is_2(arguments: list[str], told: str, run: Any, adapter: Path, tmp_path: Path) -> None:
    result = run("resize", adapter, tmp_path / "out.safetensors", *arguments)
    assert result.exit_code == 2
    assert told in result.stderr
    assert not (tmp_path / "out.safetensors").exists()


def test_everything_that_is_wrong_is_told_at_once(run: Any, adapter: Path) -> None:
    result = run("resize", adapter, adapter, "--rank", "4", "--error", "2", "--for", "vlm")
    assert result.exit_code == 2
    for text in ("--rank and --error", "--error 2.0", "unknown loader", "a.safetensors"):
        assert text in result.stderr


def test_exit_codes_of_bad_inputs_and_outputs(run: Any, adapter: Path, tmp_path: Path) -> None:
    assert run("resize", tmp_path / "none.safetensors", tmp_path / "o.safetensors", "--rank", "2").exit_code == 3
    assert run("resize", adapter, tmp_path / "o.pt", "--rank", "2").exit_code == 2
    assert run("resize", adapter, tmp_path / "none" / "o.safetensors", "--rank", "2").exit_code == 1
    (tmp_path / "o.safetensors").write_bytes(b"")
    assert run("resize", adapter, tmp_path / "o.safetensors", "--rank", "2").exit_code == 2
    assert run("resize", adapter, tmp_path / "o.safetensors", "--rank", "2", "--force").exit_code == 0


@pytest.mark.parametrize("arguments", [["--rank", "2"], ["--energy", "0.9"], ["--for", "vllm", "--max-rank", "8"]])
def test_a_plan_writes_nothing_and_its_sizes_hold(arguments: list[str], run: Any, parsed: Any, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    planned = parsed(run("resize", adapter, out, *arguments, "--dry-run", "--json"))
    assert not out.exists()
    assert planned["relative_error"] is None
    done = parsed(run("resize", adapter, out, *arguments, "--json"))
    assert done["ranks_before"] == planned["ranks_before"] == {"6": 1}
    assert max(map(int, done["ranks_after"])) <= max(map(int, planned["ranks_after"]))
    assert planned["plan"]["tensors"] == 3
    assert out.stat().st_size <= planned["plan"]["bytes"] + 1000
    if arguments[0] == "--rank":
        assert planned["ranks_after"] == done["ranks_after"] == {"2": 1}
        assert planned["plan"]["bytes"] == 2 * (16 + 16) * 4 + 4
    told = run("resize", adapter, out, *arguments, "--dry-run", "--force").stdout
    assert "would write" in told

"""`loratools extract`: the contract of its JSON, exit codes, what is shown, and every option on its way to the operation."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.tuned import matrices, tuned
from loratools.cli.main import cli
from tests.hostile.conftest import tree
from tests.operations.made import render
from tests.operations.merge_by_hand import flux, save

KEYS = {"output", "modules", "relative_error", "worst", "skipped", "ranks", "seconds", "peak_rss_mb"}


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    tensors = flux()
    after = tuned(tensors, only=lambda key: matrices(key) or key == "img_in.bias")
    return save(tmp_path / "base.safetensors", tensors), save(tmp_path / "tuned.safetensors", after)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


# ------------------------------------------------------------------------------------------------------------- the contract


def test_json_has_the_keys_of_the_contract(models: tuple[Path, Path], out: Path, run: Any, parsed: Any) -> None:
    result = run("extract", *models, out, "--rank", 3, "--json")
    assert result.exit_code == 0
    found = parsed(result)
    assert found.keys() >= KEYS
    assert "plan" not in found
    assert found["output"] == str(out)
    assert found["modules"] == len(reference_names(out)) == 9
    assert found["ranks"] == {"3": 9}
    assert 0 < found["relative_error"] < 1
    assert [sorted(row) for row in found["worst"]] == [["rank", "relative_error", "site"]] * 5
    errors = [row["relative_error"] for row in found["worst"]]
    assert errors == sorted(errors, reverse=True)
    assert all(sorted(row) == ["reason", "tensor"] for row in found["skipped"])
    assert found["seconds"] >= 0
    assert found["peak_rss_mb"] > 1


def reference_names(path: Path) -> set[str]:
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    return {key.rpartition(".lora_down")[0] for key in header if ".lora_down" in key}


def test_what_is_shown(models: tuple[Path, Path], out: Path, run: Any) -> None:
    """Modules and ranks, the error and where it is largest, what is not in it and why."""
    result = run("extract", *models, out, "--rank", 3)
    assert result.exit_code == 0
    for words in (
        "9 modules of flux as kohya, F32, ranks 3 (9)",
        "relative error",
        "rank 3",
        "not in it: the same in both",
        f"wrote {out}",
    ):
        assert words in result.stdout, words
    quiet = run("extract", *models, out, "--force", "-q")
    assert (quiet.exit_code, quiet.output) == (0, "")


def test_help(run: Any) -> None:
    for flag in ("-h", "--help"):
        result = run("extract", flag)
        assert result.exit_code == 0
        assert "Examples" in result.stdout
        for option in ("--rank", "--energy", "--error", "--budget", "--conv-rank", "--to", "--exact", "--dense-extras", "--oversample"):
            assert option in result.stdout, option


def test_every_option_reaches_the_operation(fake: Any, run: Any) -> None:
    calls = fake("extract", {"warnings": []})
    words = ["--rank", "auto", "--conv-rank", "8", "--to", "comfy", "--dense-extras", "drop", "--component", "denoiser"]
    words += ["--component", "text_encoder", "--include", "*to_q", "--exclude", "re:.*mlp", "--exact", "--oversample", "4"]
    words += ["--iterations", "2", "--dtype", "bf16", "--arch", "flux", "--seed", "7", "--device", "cpu", "--threads", "3", "--force"]
    run("extract", "base", "tuned", "out", *words, "-q")
    given = dict(calls[0])
    assert given.pop("arguments") == (Path("base"), Path("tuned"), Path("out"))
    given.pop("progress")  # there is none without a terminal
    assert str(given.pop("dtype")) == "BF16"
    assert given == {
        "rank": "auto",
        "energy": None,
        "error": None,
        "budget": None,
        "conv_rank": 8,
        "to": "comfy",
        "dense_extras": "drop",
        "component": ("denoiser", "text_encoder"),
        "include": ("*to_q",),
        "exclude": ("re:.*mlp",),
        "exact": True,
        "oversample": 4,
        "iterations": 2,
        "arch": "flux",
        "seed": 7,
        "device": "cpu",
        "threads": 3,
        "force": True,
        "dry_run": False,
    }
    for number, (option, value) in enumerate((("energy", 0.9), ("error", 0.05), ("budget", 100.0)), 1):
        run("extract", "base", "tuned", "out", f"--{option}", value, "-q")
        assert calls[number][option] == value
        assert calls[number]["rank"] is None


def test_options_come_from_the_environment(models: tuple[Path, Path], out: Path, run: Any, parsed: Any) -> None:
    settings = {"LORATOOLS_EXTRACT_RANK": "2", "LORATOOLS_EXTRACT_TO": "comfy", "LORATOOLS_EXTRACT_JSON": "1"}
    found = parsed(run("extract", *models, out, env=settings))
    assert (found["ranks"], found["dialect"]) == ({"2": 9}, "comfy")
    found = parsed(run("extract", *models, out, "--rank", 1, "--force", env=settings))
    assert found["ranks"] == {"1": 9}


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["base", "tuned"],
        ["base", "tuned", "out", "--rank", "0"],
        ["base", "tuned", "out", "--rank", "-3"],
        ["base", "tuned", "out", "--rank", "1.5"],
        ["base", "tuned", "out", "--rank", "all"],
        ["base", "tuned", "out", "--energy", "nan"],
        ["base", "tuned", "out", "--budget", "inf"],
        ["base", "tuned", "out", "--conv-rank", "0"],
        ["base", "tuned", "out", "--dense-extras", "some"],
        ["base", "tuned", "out", "--dtype", "fp7"],
        ["base", "tuned", "out", "--device", "tpu"],
        ["base", "tuned", "out", "--threads", "0"],
        ["base", "tuned", "out", "--no-such-option"],
    ],
)
def test_wrong_usage_is_2(words: list[str], run: Any) -> None:
    assert run("extract", *words).exit_code == 2


def test_requests_that_exclude_each_other(models: tuple[Path, Path], out: Path, run: Any, parsed: Any) -> None:
    result = run("extract", *models, out, "--rank", 4, "--energy", 0.9, "--conv-rank", 2, "--budget", 3, "--json")
    assert result.exit_code == 2
    error = parsed(result)["error"]
    text = json.dumps(error)
    assert "one of them settles the ranks" in text
    assert "the budget settles all ranks" in text
    assert not out.exists()


@pytest.mark.parametrize("json_", [False, True])
def test_dry_run_writes_nothing(json_: bool, models: tuple[Path, Path], out: Path, run: Any, parsed: Any, tmp_path: Path) -> None:
    before = tree(tmp_path)
    result = run("extract", *models, out, "--rank", 4, "--dry-run", *(["--json"] if json_ else []))
    assert result.exit_code == 0
    assert tree(tmp_path) == before
    if json_:
        found = parsed(result)
        assert found["output"] == str(out)
        assert found["modules"] == 10
        assert found["plan"]["bytes"] > 0
    else:
        assert f"would write {out}" in result.stdout
        assert "wrote" not in result.stdout


def test_exit_codes_and_json_errors(models: tuple[Path, Path], out: Path, run: Any, parsed: Any, tmp_path: Path) -> None:
    """3 for inputs, 2 for usage and for outputs in the way, 1 for folders that are not there; one JSON object, no traceback."""
    base, other = models
    spoiled = {key: value.clone() for key, value in flux().items()}
    spoiled["img_in.weight"][0, 0] = float("nan")
    (tmp_path / "nan.safetensors").write_bytes(render(spoiled))
    (tmp_path / "copy.safetensors").write_bytes(render(flux(), {"another": "header"}))
    (tmp_path / "fewer.safetensors").write_bytes(render({key: value for key, value in flux().items() if "proj" not in key}))
    for words, code, name in (
        ([base, tmp_path / "none.safetensors", out], 3, "none.safetensors"),
        ([tmp_path / "none.safetensors", other, out], 3, "none.safetensors"),
        ([base, tmp_path / "nan.safetensors", out], 3, "img_in.weight"),
        ([base, tmp_path / "copy.safetensors", out], 3, "are the same"),
        ([base, tmp_path / "fewer.safetensors", out], 3, "only BASE has it"),
        ([base, other, out, "--include", "*no_such_site*"], 2, "no_such_site"),
        ([base, other, base], 2, "the output is the input"),
        ([base, other, out, "--to", "kohia"], 2, "kohya"),
        ([base, other, out, "--budget", "0.001"], 2, "MB"),
        ([base, other, tmp_path / "no" / "folder.safetensors"], 1, "mkdir"),
    ):
        before = tree(tmp_path)
        result = run("extract", *words, "--json")
        assert result.exit_code == code, (words, result.output)
        error = parsed(result)["error"]
        assert error.keys() >= {"code", "message", "details"}
        assert name in json.dumps(error), (name, error)
        plain = run("extract", *words)
        assert plain.exit_code == code
        assert plain.stdout == ""
        assert "error:" in plain.stderr
        assert "Traceback" not in plain.output
        assert tree(tmp_path) == before
        advised = set(re.findall(r"--[a-z][a-z-]+", plain.stderr))
        known = {name for parameter in cli.get_command(None, "extract").params for name in parameter.opts}  # type: ignore[union-attr, arg-type]
        assert advised <= known | {"--modules", "--check"}  # of inspect, advised - known


def test_no_gpu_here(models: tuple[Path, Path], out: Path, run: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("extract", *models, out, "--device", "cuda")
    assert result.exit_code == 2
    assert "--device cpu" in result.stderr
    assert run("extract", *models, out, "--device", "auto").exit_code == 0


def test_the_output_is_an_adapter_of_these_models(models: tuple[Path, Path], out: Path, run: Any) -> None:
    """The road back through the command line: `merge --verify` and `compare` take what `extract` gives."""
    assert run("extract", *models, out, "--rank", 32).exit_code == 0
    assert run("inspect", out, "--check").exit_code == 0
    assert run("merge", models[0], out, out.with_name("merged.safetensors"), "--verify").exit_code == 0
    assert run("extract", models[0], out.with_name("merged.safetensors"), out.with_name("again.safetensors")).exit_code == 0
    assert run("compare", out, out.with_name("again.safetensors"), "--tolerance", "1e-4").exit_code == 0

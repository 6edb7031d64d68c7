"""`loratools merge`: how paths and weights are typed, the keys of the JSON, exit codes, what is shown and what is left unwritten."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from loratools.cli.main import cli
from tests.hostile.conftest import tree
from tests.operations.made import render
from tests.operations.merged import STEMS, Raw, modulations

KEYS = {"base", "output", "adapters", "tensors", "changed", "unchanged", "unmatched", "delta_retained", "worst", "seconds", "peak_rss_mb"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base of six tensors beside style.safetensors, which changes three of them."""
    return modulations(tmp_path)[0]


@pytest.fixture
def style(base: Path) -> Path:
    return base.with_name("style.safetensors")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


def changed(style: Path, weight: float, base: Path, out: Path) -> bool:
    """Does OUT hold W + weight · ΔW?"""
    adapter, before, after = (Raw.of(path) for path in (style, base, out))
    for stem in STEMS:
        flat = "lora_unet_" + stem.replace(".", "_")
        up, down = (adapter.tensor(f"{flat}.lora_{side}.weight") for side in ("up", "down"))
        wanted = before.tensor(f"{stem}.weight") + weight * 2.0 / 4 * up @ down
        if float((after.tensor(f"{stem}.weight") - wanted).abs().max()) > 1e-5:
            return False
    return True


# --------------------------------------------------------------------------------------------------------------- the contract


def test_json_has_the_keys_of_the_contract(base: Path, style: Path, out: Path, run: Any, parsed: Any) -> None:
    result = run("merge", base, f"{style}:0.5", out, "--json")
    assert result.exit_code == 0
    found = parsed(result)
    assert found.keys() >= KEYS
    assert "plan" not in found
    assert (found["base"], found["output"]) == (str(base), str(out))
    assert found["adapters"] == [{"path": str(style), "weight": 0.5, "dialect": "kohya", "architecture": "flux"}]
    assert (found["tensors"], found["changed"], found["unchanged"], found["unmatched"]) == (6, 3, 3, [])
    assert found["delta_retained"] == pytest.approx(1.0, abs=1e-6)
    assert {row["tensor"] for row in found["worst"]} == {f"{stem}.weight" for stem in STEMS}
    assert all(row["delta_retained"] == pytest.approx(1.0, abs=1e-6) for row in found["worst"])
    assert found["seconds"] >= 0
    assert found["peak_rss_mb"] > 1
    assert changed(style, 0.5, base, out)


def test_what_is_shown(base: Path, style: Path, out: Path, run: Any) -> None:
    result = run("merge", base, f"{style}:0.5", out, "--verify")
    assert result.exit_code == 0
    for words in (
        "style.safetensors  weight 0.5 · kohya · flux",
        "3 of 6 tensors changed at 3 sites, 3 copied",
        "verified: 3 sites",
        "wrote",
    ):
        assert words in result.stdout, words
    quiet = run("merge", base, style, out, "--force", "-q")
    assert (quiet.exit_code, quiet.output) == (0, "")
    assert changed(style, 1.0, base, out)


def test_weight_0_says_that_the_file_was_written(base: Path, style: Path, out: Path, run: Any) -> None:
    result = run("merge", base, f"{style}:0", out)
    assert result.exit_code == 0
    assert "0 of 6 tensors changed" in result.stdout
    assert "wrote" in result.stdout
    assert out.read_bytes() == base.read_bytes()


def test_lost_deltas_are_pointed_out(base: Path, style: Path, out: Path, run: Any) -> None:
    """A delta far below the dtype's step: the tensors, and the options that keep it."""
    result = run("merge", base, f"{style}:0.0001", out, "--dtype", "bf16")
    assert result.exit_code == 0
    assert any(f"{stem}.weight  retained" in result.stdout for stem in STEMS)
    assert "--rounding stochastic" in result.stderr


# ------------------------------------------------------------------------------------------------------- adapters and weights


@pytest.mark.parametrize(
    ("typed", "weight"),
    [
        ("style.safetensors", 1.0),
        ("style.safetensors:0.8", 0.8),
        ("style.safetensors:-0.5", -0.5),
        ("style.safetensors:2e-1", 0.2),
        ("style.safetensors:+1", 1.0),
        ("./style.safetensors:3", 3.0),
        ("a:b.safetensors", 1.0),  # a file whose name holds a colon
        ("a:b.safetensors:0.25", 0.25),
        ("c.safetensors:0.8", 1.0),  # a file of just that name is that file
        ("c.safetensors:0.8:0.5", 0.5),
    ],
)
def test_how_weights_are_typed(typed: str, weight: float, base: Path, style: Path, run: Any, parsed: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(base.parent)
    for name in ("a:b.safetensors", "c.safetensors:0.8"):
        shutil.copy(style, name)
    result = run("merge", "base.safetensors", typed, "out.safetensors", "--json")
    assert result.exit_code == 0, result.output
    assert parsed(result)["adapters"][0]["weight"] == weight
    assert changed(style, weight, base, base.with_name("out.safetensors"))


def test_several_adapters_and_options(base: Path, style: Path, out: Path, fake: Any, run: Any) -> None:
    """All of the line reaches the operation under its own name."""
    calls = fake("merge", {"warnings": []})
    words = [
        "--component",
        "denoiser",
        "--component",
        "text_encoder",
        "--include",
        "*to_q",
        "--exclude",
        "re:.*mlp",
        "--block-weights",
        "b.toml",
    ]
    words += ["--dtype", "bf16", "--rounding", "stochastic", "--seed", "7", "--residual", "r.safetensors", "--verify", "--report", "r.json"]
    words += ["--hash-base", "--arch", "flux", "--alpha", "4", "--threads", "3", "--force", "--json"]
    assert run("merge", "base", "a:0.5", "b:-1", "c", "out", *words).exit_code == 0
    given = dict(calls[0])
    assert given.pop("arguments") == (Path("base"), ((Path("a"), 0.5), (Path("b"), -1.0), (Path("c"), 1.0)), Path("out"))
    assert {key: given[key] for key in ("component", "include", "exclude")} == {
        "component": ("denoiser", "text_encoder"),
        "include": ("*to_q",),
        "exclude": ("re:.*mlp",),
    }
    texts = {"block_weights": "b.toml", "residual": "r.safetensors", "report": "r.json", "dtype": "BF16", "rounding": "stochastic"}
    assert {key: str(given[key]) for key in texts} == texts
    flags = {"arch": "flux", "verify": True, "hash_base": True, "force": True, "dry_run": False, "seed": 7, "threads": 3, "alpha": 4.0}
    assert {key: given[key] for key in flags} == flags


def test_options_come_from_the_environment(fake: Any, run: Any) -> None:
    calls = fake("merge", {"warnings": []})
    settings = {"LORATOOLS_MERGE_ROUNDING": "stochastic", "LORATOOLS_MERGE_THREADS": "2", "LORATOOLS_MERGE_JSON": "1"}
    assert run("merge", "base", "a", "out", env=settings).exit_code == 0
    assert (calls[0]["rounding"], calls[0]["threads"]) == ("stochastic", 2)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["base", "out"],
        ["base", "a:nan", "out"],
        ["base", "a:inf", "out"],
        ["base", "a", "out", "--rounding", "up"],
        ["base", "a", "out", "--dtype", "fp7"],
        ["base", "a", "out", "--threads", "0"],
        ["base", "a", "out", "--seed", "-1"],
        ["base", "a", "out", "--no-such-option"],
    ],
)
def test_wrong_usage_is_2(words: list[str], run: Any) -> None:
    assert run("merge", *words).exit_code == 2


# ---------------------------------------------------------------------------------------------------------- output and inputs


@pytest.mark.parametrize("json_", [False, True])
def test_dry_run_writes_nothing(json_: bool, base: Path, style: Path, out: Path, run: Any, tmp_path: Path, parsed: Any) -> None:
    before = tree(tmp_path)
    beside = ["--report", tmp_path / "r.json", "--residual", tmp_path / "r.safetensors"]
    result = run("merge", base, style, out, "--dry-run", *beside, *(["--json"] if json_ else []))
    assert result.exit_code == 0
    assert tree(tmp_path) == before
    if json_:
        found = parsed(result)
        assert found["plan"]["tensors"] == found["tensors"] == 6
        assert found["plan"]["bytes"] >= base.stat().st_size
        assert (found["changed"], found["delta_retained"]) == (3, None)
    else:
        assert f"would write {out}" in result.stdout
        assert "wrote" not in result.stdout


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_plan_says_the_bytes(dtype: str, out: Path, run: Any, parsed: Any, tmp_path: Path) -> None:
    """What will be written, in the dtype it will be written in; the header gets a record of under 2 KiB."""
    base, style = modulations(tmp_path, 480, 80)
    planned = parsed(run("merge", base, style, out, "--dtype", dtype, "--dry-run", "--json"))["plan"]["bytes"]
    assert run("merge", base, style, out, "--dtype", dtype).exit_code == 0
    assert abs(planned - out.stat().st_size) < 2048


def test_an_existing_output_needs_force(base: Path, style: Path, out: Path, run: Any, tmp_path: Path) -> None:
    out.write_bytes(b"old")
    before = tree(tmp_path)
    for flags in ([], ["--dry-run"]):
        result = run("merge", base, style, out, *flags)
        assert result.exit_code == 2
        assert "--force" in result.stderr
        assert tree(tmp_path) == before
    assert run("merge", base, style, out, "--force").exit_code == 0
    assert changed(style, 1.0, base, out)


def test_the_report(base: Path, style: Path, out: Path, run: Any, parsed: Any, tmp_path: Path) -> None:
    """The JSON of the command and a row for every changed tensor; it is an output like any other."""
    report = tmp_path / "report.json"
    result = run("merge", base, style, out, "--report", report, "--json")
    found = json.loads(report.read_text())
    assert {key: found[key] for key in parsed(result)} == parsed(result)
    rows = {row["tensor"]: row["delta_retained"] for row in found["tensors_changed"]}
    assert rows == {f"{stem}.weight": pytest.approx(1.0, abs=1e-6) for stem in STEMS}
    out.unlink()
    before = tree(tmp_path)
    refused = run("merge", base, style, out, "--report", report)
    assert refused.exit_code == 2
    assert "report.json" in refused.stderr
    assert tree(tmp_path) == before
    assert run("merge", base, style, out, "--report", report, "--force").exit_code == 0


def _same(path: Path, how: str) -> Path:
    """Another way to the same file."""
    other = path.with_name(f"{how}.safetensors")
    if how == "symlink":
        other.symlink_to(path.name)
    elif how == "hard link":
        os.link(path, other)
    return {"path": path, "dots": path.parent / ".." / path.parent.name / path.name}.get(how, other)


@pytest.mark.parametrize("how", ["path", "dots", "symlink", "hard link"])
@pytest.mark.parametrize("which", ["base", "style"])
def test_an_input_is_never_the_output(which: str, how: str, base: Path, style: Path, run: Any, tmp_path: Path) -> None:
    """W2: OUT equal to any input is 2, --force or not; so is a report or a residual in an input's place."""
    target = _same({"base": base, "style": style}[which], how)
    before = tree(tmp_path)
    for flags in ([], ["--force"], ["--force", "--dry-run"]):
        assert run("merge", base, style, target, *flags).exit_code == 2
        assert run("merge", base, style, tmp_path / "new.safetensors", "--report", target, *flags).exit_code == 2
        assert run("merge", base, style, tmp_path / "new.safetensors", "--residual", target, *flags).exit_code == 2
        assert tree(tmp_path) == before


def test_a_file_for_a_folder_and_the_other_way_round(base: Path, style: Path, run: Any, tmp_path: Path) -> None:
    """Exit 2 with the name that would do; a folder is never taken away for a file."""
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(base, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text("{}")
    standing = tmp_path / "standing"
    standing.mkdir()
    (standing / "mine.txt").write_text("mine")
    before = tree(tmp_path)
    for source, target in ((folder, tmp_path / "out.safetensors"), (base, standing), (base, tmp_path / "out.ckpt")):
        result = run("merge", source, style, target, "--force")
        assert result.exit_code == 2, (target, result.output)
        assert "fix:" in result.stderr
        assert tree(tmp_path) == before
    assert run("merge", folder, style, tmp_path / "out").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_a_folder_of_mine_is_not_removed(base: Path, style: Path, run: Any, tmp_path: Path) -> None:
    """--force on a folder that holds other things: they are kept aside, and the warning says where."""
    folder, standing = tmp_path / "model", tmp_path / "out"
    for path in (folder, standing):
        path.mkdir()
    shutil.copy(base, folder / "diffusion_pytorch_model.safetensors")
    (standing / "mine.txt").write_text("mine")
    result = run("merge", folder, style, standing, "--force")
    assert result.exit_code == 0
    assert [path.name for path in standing.iterdir()] == ["diffusion_pytorch_model.safetensors"]
    assert (tmp_path / "out.replaced" / "mine.txt").read_text() == "mine"
    assert "out.replaced" in result.stderr


# ------------------------------------------------------------------------------------------------------------ what goes wrong


def test_exit_codes_and_json_errors(base: Path, style: Path, out: Path, run: Any, parsed: Any, tmp_path: Path) -> None:
    (tmp_path / "flux.safetensors").write_bytes(render({"lora_unet_nobody.lora_up.weight": torch.ones(2, 2)}))
    for words, code, name in (
        (["merge", base, tmp_path / "flux.safetensors", out], 3, "nobody"),
        (["merge", tmp_path / "none.safetensors", style, out], 3, "none.safetensors"),
        (["merge", base, tmp_path / "none.safetensors", out], 3, "none.safetensors"),
        (["merge", base, style, out, "--include", "*no_such_site*"], 2, "no_such_site"),
        (["merge", base, style, tmp_path / "no" / "folder.safetensors"], 1, "mkdir"),
    ):
        result = run(*words, "--json")
        assert result.exit_code == code, (words, result.output)
        error = parsed(result)["error"]
        assert error.keys() >= {"code", "message", "details"}
        assert name in json.dumps(error)
        plain = run(*words)
        assert plain.exit_code == code
        assert plain.stdout == ""
        assert "error:" in plain.stderr
        assert "Traceback" not in plain.output
        assert not out.exists()


def _unknown(base: Path, style: Path) -> Path:
    raw = Raw.of(style)
    stem = "lora_unet_double_blocks_0_img_nod_lin"
    tensors = {key: raw.tensor(key).float() for key in raw.entries} | {f"{stem}.lora_up.weight": torch.ones(48, 4)}
    style.write_bytes(render(tensors | {f"{stem}.lora_down.weight": torch.ones(4, 8)}))
    return style


def _bundled(base: Path, style: Path) -> Path:
    raw = Raw.of(style)
    style.write_bytes(render({key: raw.tensor(key).float() for key in raw.entries} | {"bundle_emb.word.clip_l": torch.ones(2, 8)}))
    return style


def _nobodys(base: Path, style: Path) -> Path:
    style.write_bytes(
        render({"lora_te_model_layers_0.lora_up.weight": torch.ones(4, 2), "lora_te_model_layers_0.lora_down.weight": torch.ones(2, 4)})
    )
    return style


def _text_encoder(base: Path, style: Path) -> Path:
    raw = Raw.of(style)
    stem = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{stem}.lora_up.weight": torch.ones(64, 2), f"{stem}.lora_down.weight": torch.ones(2, 16)}
    style.write_bytes(render({key: raw.tensor(key).float() for key in raw.entries} | tensors))
    return style


@pytest.mark.parametrize("spoil", [_unknown, _bundled, _nobodys, _text_encoder])
def test_advice_names_options_that_there_are(spoil: Callable[[Path, Path], Path], base: Path, style: Path, out: Path, run: Any) -> None:
    """What a message tells people to type is an option of this command."""
    result: Result = run("merge", base, spoil(base, style), out)
    advised = set(re.findall(r"--[a-z][a-z-]+", result.stderr))
    known = {name for parameter in cli.get_command(None, "merge").params for name in parameter.opts}  # type: ignore[union-attr, arg-type]
    assert result.stderr
    assert advised <= known, f"{sorted(advised - known)} in: {result.stderr}"

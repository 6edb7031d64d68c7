"""What the program says in words: weights it cannot read, models in the wrong place, counts, advice after a merge, what it is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.cli.console import Output
from loratools.cli.main import ABOUT, COMMANDS, cli
from loratools.errors import InputError, counted
from loratools.operations.inputs import adapter_as_base
from loratools.tensors.reader import open_source
from tests.operations.merged import modulations

ROOT = Path(__file__).resolve().parents[2]
FACTS = {"metadata", "formats", "env"}  # commands that are no verb of the first sentence


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base of six tensors beside style.safetensors, which changes three of them."""
    return modulations(tmp_path)[0]


@pytest.fixture
def style(base: Path) -> Path:
    return base.with_name("style.safetensors")


# ----------------------------------------------------------------------------------------------------------------- one road out


@pytest.mark.parametrize(
    ("output", "stdout", "stderr"),
    [
        (Output(), "drawn\n", "warning: careful\n"),
        (Output(json=True), '{"warnings": ["careful"]}\n', "warning: careful\n"),
        (Output(quiet=True), "", ""),
        (Output(json=True, quiet=True), '{"warnings": ["careful"]}\n', ""),
    ],
)
def test_a_result_is_told_once(output: Output, stdout: str, stderr: str, capsys: pytest.CaptureFixture[str]) -> None:
    output.result({"warnings": ["careful"]}, lambda: output.say("drawn"))
    assert capsys.readouterr() == (stdout, stderr)


@pytest.mark.parametrize(
    ("count", "words", "told"),
    [(0, ("site",), "0 sites"), (1, ("site",), "1 site"), (2, ("site",), "2 sites"), (1, ("entry", "entries"), "1 entry"),
     (3, ("entry", "entries"), "3 entries")],
)  # fmt: skip
def test_counted(count: int, words: tuple[str, ...], told: str) -> None:
    assert counted(count, *words) == told


def test_one_of_a_thing_is_no_plural(run: Any, fake: Any) -> None:
    converted = {"from": {"dialect": "kohya"}, "to": {"dialect": "peft"}, "sites": 1, "tensors_in": 1, "tensors_out": 1, "output": "o"}
    fake("convert", {**converted, "plan": {"tensors": 1, "bytes": 8}})
    fake("combine", {"inputs": [], "sites": 1, "ranks_after": {}, "output": "o", "plan": {"tensors": 1, "bytes": 8}})
    fake("compare", {"equal": True, "sites": 1})
    for words in (["convert", "a", "--to", "peft"], ["combine", "a", "o"], ["compare", "a", "b"]):
        told = run(*words).stdout
        assert "1 site" in told
        assert "1 sites" not in told
        assert "1 tensors" not in told


# -------------------------------------------------------------------------------------------------------------- what is mistyped


@pytest.mark.parametrize(
    ("tail", "advised"),
    [("abc", "0.8"), ("0,8", "0.8"), ("-1,25", "-1.25"), ("", "0.8"), ("0.5x", "0.8"), ("nan", "0.8"), ("inf", "0.8")],
)
@pytest.mark.parametrize("command", ["merge", "combine"])
def test_a_weight_that_is_no_number(command: str, tail: str, advised: str, base: Path, style: Path, run: Any, tmp_path: Path) -> None:
    """The file is there, so it is the weight that is wrong, and not a missing file."""
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    words = [command, *([base] if command == "merge" else []), f"{style}:{tail}", tmp_path / "out.safetensors"]
    result = run(*words)
    assert result.exit_code == 2
    assert "no such file" not in result.stderr
    assert f"{tail!r} is no finite number" in result.stderr
    assert f"fix: {style}:{advised}\n" in result.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_colon_in_a_name_that_is_not_there(base: Path, run: Any, tmp_path: Path) -> None:
    result = run("merge", base, tmp_path / "none:abc", tmp_path / "out.safetensors")
    assert result.exit_code == 3
    assert f"{tmp_path / 'none:abc'}: no such file" in result.stderr


@pytest.mark.parametrize("value", ["0", "0.0", "-0"])
@pytest.mark.parametrize("words", [["inspect", "a"], ["convert", "a", "--to", "peft"], ["merge", "w", "a", "out"], ["compare", "a", "b"]])
def test_an_alpha_of_0(words: list[str], value: str, run: Any) -> None:
    result = run(*words, "--alpha", value)
    assert result.exit_code == 2
    assert "alpha must not be 0" in result.stderr


# ------------------------------------------------------------------------------------------------------- an adapter as the base


def test_an_adapter_in_the_place_of_the_base(base: Path, style: Path) -> None:
    """Told with the order that would do, where a model stands among the adapters; a model as the base is no problem."""
    assert adapter_as_base(open_source(base), [style]) is None
    assert adapter_as_base(open_source(base)) is None
    swapped = adapter_as_base(open_source(style), [base.with_name("none.safetensors"), base])
    assert isinstance(swapped, InputError)
    assert swapped.message == "style.safetensors is an adapter, where a base model is expected"
    assert swapped.fix == f"the base comes first: loratools merge {base} {style} OUT"
    twice = adapter_as_base(open_source(style), [style])
    assert twice is not None
    assert "comes first" not in str(twice.fix)


@pytest.mark.parametrize("command", ["compare", "combine"])
def test_an_adapter_as_base_of_other_commands(command: str, base: Path, style: Path, run: Any, tmp_path: Path) -> None:
    target = style if command == "compare" else tmp_path / "out.safetensors"
    result = run(command, style, target, "--base", style)
    assert result.exit_code == 3
    assert "style.safetensors is an adapter, where a base model is expected" in result.stderr
    assert "fix: give the model" in result.stderr
    assert run(command, style, target, "--base", base).exit_code == 0


# --------------------------------------------------------------------------------------------------------- advice after a merge

ALL = {"--rounding stochastic", "--residual FILE", "--dtype fp32"}


def _advised(stderr: str) -> set[str]:
    line = next((line for line in stderr.splitlines() if "would keep them" in line), "")
    return {option for option in ALL if option in line}


@pytest.mark.parametrize(
    ("stored", "options", "advised"),
    [
        (torch.bfloat16, [], ALL),
        (torch.float32, ["--dtype", "bf16"], ALL),  # a wider one than the one asked for
        (torch.bfloat16, ["--rounding", "stochastic"], ALL - {"--rounding stochastic"}),
        (torch.bfloat16, ["--residual", "rest.safetensors"], ALL - {"--residual FILE"}),
        (torch.bfloat16, ["--residual", "rest.safetensors", "--rounding", "stochastic"], {"--dtype fp32"}),
        (torch.float8_e4m3fn, [], ALL - {"--dtype fp32"}),  # --dtype leaves fp8 as it is
        (torch.float8_e4m3fn, ["--dtype", "fp32"], ALL - {"--dtype fp32"}),
        (torch.float8_e4m3fn, ["--rounding", "stochastic", "--residual", "rest.safetensors"], set()),
        (torch.float32, [], set()),  # nothing is lost
    ],
)
def test_advice_is_neither_in_use_nor_in_vain(
    stored: torch.dtype, options: list[str], advised: set[str], base: Path, style: Path, run: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({key: tensor.to(stored) for key, tensor in load_file(base).items()}, base)
    result = run("merge", base, f"{style}:0.001", "out.safetensors", *options)
    assert result.exit_code == 0, result.output
    assert _advised(result.stderr) == advised
    assert ("retained" in result.stdout.partition("relative error of the delta")[2]) == (stored != torch.float32 or bool(options))


def test_no_residual_where_no_module_is_a_lora(base: Path, style: Path, run: Any, tmp_path: Path) -> None:
    """Full deltas have no factors it could be made of: --residual would be refused."""
    save_file({key: tensor.to(torch.bfloat16) for key, tensor in load_file(base).items()}, base)
    stem = "lora_unet_double_blocks_0_img_mod_lin"
    save_file({f"{stem}.diff": torch.full((48, 8), 1e-4)}, style)
    result = run("merge", base, style, tmp_path / "out.safetensors")
    assert result.exit_code == 0, result.output
    assert _advised(result.stderr) == ALL - {"--residual FILE"}
    assert run("merge", base, style, tmp_path / "again.safetensors", "--residual", tmp_path / "rest.safetensors").exit_code == 3


def test_what_is_advised_helps(base: Path, style: Path, run: Any, parsed: Any, tmp_path: Path) -> None:
    """Each option alone brings the delta back, in the file or (the residual) beside it."""
    save_file({key: tensor.to(torch.bfloat16) for key, tensor in load_file(base).items()}, base)
    before = parsed(run("merge", base, f"{style}:0.001", tmp_path / "plain.safetensors", "--json"))["delta_retained"]
    assert abs(before - 1) > 0.3
    wide = parsed(run("merge", base, f"{style}:0.001", tmp_path / "wide.safetensors", "--dtype", "fp32", "--json"))
    assert wide["delta_retained"] == pytest.approx(1, abs=1e-3)
    beside = ["--residual", tmp_path / "rest.safetensors"]
    rest = parsed(run("merge", base, f"{style}:0.001", tmp_path / "rested.safetensors", *beside, "--json"))["residual"]
    assert abs(rest["delta_retained"] - 1) < abs(before - 1) / 10


# ------------------------------------------------------------------------------------------------------------------- what it is


def test_the_first_sentence_names_every_verb_everywhere() -> None:
    for name in COMMANDS.keys() - FACTS:
        assert name.partition("-")[0] in ABOUT.lower(), name
    assert (cli.help or "").startswith(ABOUT)
    for page in (ROOT / "README.md", ROOT / "docs" / "index.md"):
        assert page.read_text(encoding="utf-8").split("\n\n")[1].startswith(ABOUT), page


def test_a_file_with_a_colon_still_wins(base: Path, style: Path, fake: Any, run: Any, tmp_path: Path) -> None:
    odd = tmp_path / "style.safetensors:abc"
    shutil.copy(style, odd)
    calls = fake("merge", {"warnings": []})
    assert run("merge", base, odd, tmp_path / "out.safetensors", "--json").exit_code == 0
    assert calls[0]["arguments"][1] == ((odd, 1.0),)

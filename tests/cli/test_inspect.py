"""`loratools inspect`: one page, a batch that does not stop, globs, single values, check, and names that try to be terminal commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loratools.errors import InputError, MalformedError

ESCAPES = "\x1b]0;owned\x07\x9b2J\u202egnp.exe"  # window title, CSI as one C1 byte, right-to-left override
BAD = MalformedError("bad.safetensors: truncated, 12 bytes missing", details=["x"])
FINDING = {"severity": "error", "code": "nan", "site": "denoiser.a", "message": "3 values are NaN"}


def by_name(page: dict[str, Any], **special: Any) -> Callable[..., Any]:
    """An operation that answers by the file's stem: a page, a changed page, or an error."""

    def answer(path: Path) -> Any:
        found = special.get(path.stem, {})
        return found if isinstance(found, Exception) else {**page, "path": str(path), **found}

    return answer


def test_one_file_is_one_object(run: Any, fake: Any, parsed: Any, page: dict[str, Any]) -> None:
    calls = fake("inspect", page)
    found = parsed(run("inspect", "style.safetensors", "--json"))
    assert found == {key: value for key, value in page.items() if key != "modules"}
    assert calls[0]["arguments"] == (Path("style.safetensors"),)
    for flag in ("--modules", "--spectrum"):
        assert parsed(run("inspect", "style.safetensors", flag, "--json")) == page
    assert [call["spectrum"] for call in calls] == [False, False, True]


def test_options_reach_the_operation(run: Any, fake: Any, page: dict[str, Any]) -> None:
    calls = fake("inspect", page)
    run("inspect", "a", "--hashes", "--check", "--arch", "flux", "--alpha", "8")
    assert {key: calls[0][key] for key in ("hashes", "check", "arch", "alpha", "spectrum")} == {
        "hashes": True,
        "check": True,
        "arch": "flux",
        "alpha": 8.0,
        "spectrum": False,
    }


def test_the_page_says_what_matters(run: Any, fake: Any, page: dict[str, Any]) -> None:
    fake("inspect", {**page, "problems": [{**FINDING, "fix": "train longer"}]})
    text = run("inspect", "style.safetensors").stdout
    for words in ("kohya", "sd1", "base.safetensors", "ohwx", "from the alpha tensors", "scale 0.5", "3 values are NaN", "train longer"):
        assert words in text
    assert "None" not in text  # sd-scripts' "None" is no fact


def test_ambiguity_shows_the_candidates(run: Any, fake: Any, page: dict[str, Any]) -> None:
    candidates = [
        {"dialect": "comfy", "architecture": "flux", "score": 1.0, "evidence": ["19 double blocks"]},
        {"dialect": "comfy", "architecture": "chroma", "score": 1.0, "evidence": ["same shapes"]},
    ]
    fake("inspect", {**page, "ambiguous": True, "candidates": candidates})
    result = run("inspect", "a")
    assert result.exit_code == 0
    for words in ("ambiguous", "flux · comfy", "chroma · comfy", "same shapes", "--arch"):
        assert words in result.stdout


def test_an_unknown_file_is_no_failure(run: Any, fake: Any, page: dict[str, Any]) -> None:
    nothing = {"kind": "unknown", "dialect": None, "architecture": None, "adapter": None, "modules": []}
    fake("inspect", {**page, **nothing, "unknown_keys": ["foo.bar"]})
    result = run("inspect", "a")
    assert result.exit_code == 0
    assert "not recognised" in result.stdout
    assert "foo.bar" in result.stdout


def test_a_checkpoint_has_its_page(run: Any, fake: Any, page: dict[str, Any]) -> None:
    checkpoint = {
        "layout": "ldm",
        "components": {"denoiser": 686, "vae": {"tensors": 248}},
        "tensors": 934,
        "parameters": 1_066_235_307,
        "bytes": 2 * 1024**3,
        "dtypes": {"F16": 934},
    }
    fake("inspect", {**page, "kind": "checkpoint", "adapter": None, "checkpoint": checkpoint, "modules": None})
    text = run("inspect", "a").stdout
    for words in ("checkpoint", "ldm", "denoiser 686, vae 248", "934, 2.0 GiB", "1.07 billion"):
        assert words in text


def test_a_bad_file_does_not_stop_the_others(run: Any, fake: Any, parsed: Any, page: dict[str, Any]) -> None:
    fake("inspect", by_name(page, bad=BAD))
    arguments = ["inspect", "one.safetensors", "bad.safetensors", "two.safetensors"]
    result = run(*arguments, "--json")
    assert result.exit_code == 3
    first, second, third = parsed(result)["files"]
    assert (first["path"], third["path"]) == ("one.safetensors", "two.safetensors")
    assert second == {
        "path": "bad.safetensors",
        "error": {"code": "malformed", "message": "bad.safetensors: truncated, 12 bytes missing", "details": ["x"]},
    }
    text = run(*arguments)
    assert text.exit_code == 3
    assert "error: bad.safetensors: truncated" in text.stderr
    assert "one.safetensors" in text.stdout
    assert "two.safetensors" in text.stdout
    assert "truncated" in run(*arguments, "-q").stderr


def test_a_defect_in_one_file_does_not_stop_the_others(run: Any, fake: Any, parsed: Any, page: dict[str, Any]) -> None:
    fake("inspect", by_name(page, strange=KeyError("x")))
    result = run("inspect", "strange", "good", "--json")
    assert result.exit_code == 1
    assert [entry.get("error", {}).get("code") for entry in parsed(result)["files"]] == ["internal", None]


@pytest.mark.parametrize(
    ("flags", "problems", "exit_code"),
    [
        ([], [FINDING], 0),
        (["--check"], [FINDING], 4),
        (["--check"], [{**FINDING, "severity": "warning"}], 0),
        (["--check", "--json"], [FINDING], 4),
    ],
)
def test_check_is_4_on_an_error(run: Any, fake: Any, page: dict[str, Any], flags: list[str], problems: list[Any], exit_code: int) -> None:
    fake("inspect", by_name(page, sick={"problems": problems}))
    assert run("inspect", "sick", *flags).exit_code == exit_code
    assert run("inspect", "good", "sick", *flags).exit_code == exit_code


def test_an_unreadable_file_outranks_a_failed_check(run: Any, fake: Any, page: dict[str, Any]) -> None:
    fake("inspect", by_name(page, sick={"problems": [FINDING]}, bad=BAD))
    assert run("inspect", "sick", "bad", "--check").exit_code == 3


def test_one_bad_file_alone_is_an_error(run: Any, fake: Any, parsed: Any) -> None:
    fake("inspect", BAD)
    result = run("inspect", "bad.safetensors", "--json")
    assert result.exit_code == 3
    assert parsed(result)["error"]["code"] == "malformed"


def test_globs_and_stdin(run: Any, fake: Any, parsed: Any, page: dict[str, Any], tmp_path: Path) -> None:
    fake("inspect", by_name(page))
    for name in ("b.safetensors", "a.safetensors", "sub/c.safetensors", "d[1].safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(*arguments: object, **settings: Any) -> list[str]:
        return [Path(entry["path"]).name for entry in parsed(run("inspect", *arguments, "--json", **settings))["files"]]

    assert names(tmp_path / "*.safetensors") == ["a.safetensors", "b.safetensors", "d[1].safetensors"]
    assert names(tmp_path / "**" / "c*") == ["c.safetensors"]
    assert names("-", input="x.safetensors\n\nname with space.safetensors\n") == ["x.safetensors", "name with space.safetensors"]
    assert parsed(run("inspect", tmp_path / "d[1].safetensors", "--json"))["path"].endswith("d[1].safetensors")  # a file, no pattern
    nothing = run("inspect", tmp_path / "*.nothing", "--json")
    assert nothing.exit_code == 3
    assert "no file matches" in parsed(nothing)["files"][0]["error"]["message"]


def test_metadata_prints_one_value(run: Any, fake: Any, parsed: Any, page: dict[str, Any]) -> None:
    fake("inspect", by_name(page, other={"metadata": {"ss_network_dim": "8"}}))
    assert run("inspect", "a", "--metadata", "ss_network_dim").stdout == "4\n"
    assert run("inspect", "a", "--metadata", "ss_network_dim", "-q").stdout == "4\n"
    assert parsed(run("inspect", "a", "--metadata", "ss_network_dim", "--json")) == {"path": "a", "metadata": {"ss_network_dim": "4"}}
    assert run("inspect", "a", "other", "--metadata", "ss_network_dim").stdout == "a: 4\nother: 8\n"
    missing = run("inspect", "a", "--metadata", "ss_network_dims")
    assert missing.exit_code == 3
    assert "did you mean 'ss_network_dim'" in missing.stderr
    batch = run("inspect", "other", "a", "--metadata", "ss_sd_model_name", "--json")
    assert batch.exit_code == 3
    assert parsed(batch)["files"][1]["metadata"] == {"ss_sd_model_name": "base.safetensors"}


@pytest.mark.parametrize("flags", [[], ["--modules"], ["--spectrum", "--modules"], ["--metadata", "title"], ["--check", "-q"]])
def test_no_name_reaches_the_terminal_raw(run: Any, fake: Any, page: dict[str, Any], flags: list[str]) -> None:
    module = {**page["modules"][0], "site": f"denoiser.{ESCAPES}", "kind": ESCAPES, "dtype": ESCAPES, "delta_norm": 1.0}
    hostile = {
        **page,
        "path": f"{ESCAPES}.safetensors",
        "variant": ESCAPES,
        "container": ESCAPES,
        "metadata": {"title": ESCAPES, "modelspec.title": ESCAPES, "ss_sd_model_name": ESCAPES},
        "trigger_words": [ESCAPES],
        "unknown_keys": [ESCAPES],
        "problems": [{"severity": "error", "code": ESCAPES, "site": ESCAPES, "message": ESCAPES, "fix": ESCAPES}],
        "hashes": {"sha256": ESCAPES},
        "modules": [module],
        "ambiguous": True,
        "candidates": [{"dialect": ESCAPES, "architecture": ESCAPES, "score": 1, "evidence": [ESCAPES]}],
        "adapter": {**page["adapter"], "kinds": {ESCAPES: 1}, "dtypes": {ESCAPES: 1}, "alpha_source": ESCAPES},
    }
    fake("inspect", hostile)
    for arguments in (["x"], ["x", "y"]):
        result = run("inspect", *arguments, *flags)
        for stream in (result.stdout, result.stderr):
            assert all(c.isprintable() or c == "\n" for c in stream)


def test_errors_escape_names_too(run: Any, fake: Any) -> None:
    fake("inspect", InputError(f"{ESCAPES}: bad", details=[ESCAPES], fix=ESCAPES))
    for arguments in (["x"], ["x", "y"]):
        result = run("inspect", *arguments)
        assert result.exit_code == 3
        assert "\\x1b]0;owned" in result.stderr
        assert all(c.isprintable() or c == "\n" for c in result.stderr + result.stdout)


def test_markup_in_names_is_text(run: Any, fake: Any, page: dict[str, Any]) -> None:
    fake("inspect", {**page, "trigger_words": ["[red]x[/red]", ":smile:", "[/]"]})
    assert "[red]x[/red], :smile:, [/]" in run("inspect", "a").stdout


def test_tables_go_to_stderr_never_to_stdout_with_json(run: Any, fake: Any, parsed: Any, page: dict[str, Any]) -> None:
    fake("inspect", by_name(page))
    assert parsed(run("inspect", "a", "b", "--modules", "--json"))["files"][0]["modules"] == page["modules"]


def test_lines_of_module_tables_are_whole_when_piped(run: Any, fake: Any, page: dict[str, Any]) -> None:
    site = "denoiser." + ".".join(f"block_with_a_long_name_{i}" for i in range(8))
    spectrum = {"delta_norm": 1.5, "stable_rank": 2.0, "effective_rank": 3.0}
    fake("inspect", {**page, "modules": [{**page["modules"][0], "site": site, **spectrum}]})
    line = next(line for line in run("inspect", "a", "--modules").stdout.splitlines() if site in line)
    assert line.split()[-1] == "3"


def test_no_colour_codes_in_a_pipe_nor_with_no_color(run: Any, fake: Any, page: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fake("inspect", page)
    assert "\x1b" not in run("inspect", "a").stdout
    monkeypatch.setenv("NO_COLOR", "1")
    fake("inspect", BAD)
    assert "\x1b" not in run("inspect", "a", color=True).stderr

"""The contract of the command line: exit codes, one JSON object on stdout, errors that teach, environment variables, the alias."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loratools.errors import (
    AmbiguousError,
    CheckFailed,
    LoraToolsError,
    OutputExistsError,
    UnknownError,
    UnsafeError,
    WriteError,
)

CONVERTED = {
    "input": "a.safetensors",
    "output": "a.diffusers.safetensors",
    "from": {"dialect": "kohya", "architecture": "sdxl"},
    "to": {"dialect": "diffusers", "architecture": "sdxl"},
    "tensors_in": 30,
    "tensors_out": 20,
    "sites": 10,
    "exact": True,
    "approximated": [],
    "dropped": [],
    "kept": [],
    "max_relative_error": 0.0,
    "warnings": ["alpha was folded"],
}
COMPARED = {
    "equal": False,
    "max_relative_error": 0.25,
    "sites": 2,
    "only_in_a": ["denoiser.a"],
    "only_in_b": [],
    "worst": [{"site": "denoiser.b", "relative_error": 0.25, "cosine": 0.97}],
    "cosine": 0.98,
    "scale_ratio": 2.0,
}


@pytest.mark.parametrize(
    ("error", "exit_code", "code"),
    [
        (WriteError("disk full"), 1, "write-failed"),
        (LoraToolsError("lost"), 1, "failed"),
        (KeyboardInterrupt(), 1, "interrupted"),
        (MemoryError(), 1, "out-of-memory"),
        (OSError(28, "No space left on device", "out.safetensors"), 1, "failed"),
        (ZeroDivisionError("x"), 1, "internal"),
        (OutputExistsError("exists"), 2, "output-exists"),
        (UnknownError("unknown"), 3, "unknown"),
        (AmbiguousError("two"), 3, "ambiguous"),
        (UnsafeError("pickle"), 3, "unsafe"),
        (CheckFailed("no"), 4, "check-failed"),
    ],
)
def test_every_error_has_its_exit_code(run: Any, fake: Any, parsed: Any, error: BaseException, exit_code: int, code: str) -> None:
    fake("convert", error)
    text = run("convert", "a.safetensors", "--to", "diffusers")
    assert text.exit_code == exit_code
    assert text.stdout == ""
    assert "error:" in text.stderr
    assert "Traceback" not in text.stderr
    as_json = run("convert", "a.safetensors", "--to", "diffusers", "--json")
    assert as_json.exit_code == exit_code
    assert parsed(as_json)["error"]["code"] == code
    assert {"code", "message", "details"} <= parsed(as_json)["error"].keys()


def test_an_error_says_all_findings_and_the_fix(run: Any, fake: Any, parsed: Any) -> None:
    fake("convert", UnknownError("2 keys match no table", details=["first.key", "second.key"], fix="--drop-unknown leaves them out"))
    text = run("convert", "a.safetensors", "--to", "peft").stderr
    assert all(word in text for word in ("2 keys match no table", "first.key", "second.key", "fix: --drop-unknown leaves them out"))
    error = parsed(run("convert", "a.safetensors", "--to", "peft", "--json"))["error"]
    assert error["message"] == "2 keys match no table"
    assert error["details"] == ["first.key", "second.key"]


def test_a_defect_is_one_line_and_a_traceback_only_with_debug(run: Any, fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("convert", ZeroDivisionError("by zero"))
    plain = run("convert", "a", "--to", "peft")
    assert "unexpected ZeroDivisionError: by zero" in plain.stderr
    assert "--debug" in plain.stderr
    assert "Traceback" not in plain.stderr
    assert "Traceback" in run("convert", "a", "--to", "peft", "--debug").stderr
    monkeypatch.setenv("LORATOOLS_CONVERT_DEBUG", "1")
    assert "Traceback" in run("convert", "a", "--to", "peft").stderr


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["convrt", "a"], "convert"),  # nearest command
        (["convert", "a"], "--to"),  # missing option
        (["convert", "a", "--to", "peft", "--alhpa", "1"], "--alpha"),  # nearest option
        (["convert", "a", "--to", "peft", "--dtype", "fp17"], "fp1"),  # nearest dtype
        (["convert", "a", "--to", "peft", "--alpha", "nan"], "finite"),
        (["convert", "a", "--to", "peft", "--drop-unknown", "--keep-unknown"], "--keep-unknown"),
        (["compare", "a"], "B"),
        (["compare", "a", "b", "--tolerance", "-1"], "tolerance"),
        (["compare", "a", "b", "--tolerance", "inf"], "tolerance"),
        (["inspect"], "PATH"),
        (["metadata", "a", "b", "--set", "novalue"], "KEY=VALUE"),
        (["metadata", "a", "b", "--set", "k=1", "--set", "k=2"], "more than once"),
    ],
)
def test_wrong_usage_is_2_also_as_json(run: Any, parsed: Any, arguments: list[str], names: str) -> None:
    text = run(*arguments)
    assert text.exit_code == 2
    assert names in text.stderr
    as_json = run(*arguments, "--json")
    assert as_json.exit_code == 2
    assert parsed(as_json)["error"]["code"] == "usage"


def test_json_is_alone_on_stdout(run: Any, fake: Any, parsed: Any) -> None:
    fake("convert", CONVERTED)
    result = run("convert", "a.safetensors", "--to", "diffusers", "--json")
    assert result.exit_code == 0
    assert parsed(result) == CONVERTED
    assert "warning: alpha was folded" in result.stderr


def test_json_has_no_nan_and_only_ascii(run: Any, fake: Any, parsed: Any) -> None:
    fake("compare", {**COMPARED, "cosine": float("nan"), "scale_ratio": float("inf"), "only_in_a": ["caf\u00e9\u202e\ud800"]})
    result = run("compare", "a", "b", "--json")
    assert result.stdout.isascii()
    assert "NaN" not in result.stdout
    assert parsed(result)["cosine"] is None
    assert parsed(result)["scale_ratio"] is None
    assert parsed(result)["only_in_a"] == ["caf\u00e9\u202e\ud800"]


def test_quiet_prints_only_errors(run: Any, fake: Any, parsed: Any) -> None:
    fake("convert", CONVERTED)
    fake("compare", COMPARED)
    for arguments, code in ((["convert", "a", "--to", "diffusers"], 0), (["compare", "a", "b"], 4)):
        result = run(*arguments, "-q")
        assert (result.exit_code, result.stdout, result.stderr) == (code, "", "")
    assert parsed(run("compare", "a", "b", "-q", "--json"))["equal"] is False
    fake("convert", WriteError("disk full"))
    assert "disk full" in run("convert", "a", "--to", "peft", "--quiet").stderr


def test_compare_is_4_when_different_and_0_when_equal(run: Any, fake: Any) -> None:
    calls = fake("compare", COMPARED)
    different = run("compare", "a", "b", "--tolerance", "1e-3", "--base", "m", "--arch", "sdxl", "--alpha", "8", "--modules")
    assert different.exit_code == 4
    assert "different" in different.stdout
    assert "denoiser.a" in different.stdout
    assert "denoiser.b" in different.stdout
    assert calls == [
        {"arguments": (Path("a"), Path("b")), "tolerance": 1e-3, "base": Path("m"), "arch": "sdxl", "alpha": 8.0, "modules": True}
    ]
    fake("compare", {**COMPARED, "equal": True, "only_in_a": []})
    assert run("compare", "a", "b").exit_code == 0


def test_convert_hands_every_option_on(run: Any, fake: Any) -> None:
    calls = fake("convert", {**CONVERTED, "plan": {"tensors": 20, "bytes": 2048}})
    options = "--to diffusers --kind lora --base m --dtype bfloat16 --keep-alpha --allow-lossy --drop-unknown --force --dry-run --arch flux"
    result = run("convert", "a.safetensors", "out.safetensors", *options.split(), "--alpha", "16")
    assert result.exit_code == 0
    assert calls == [
        {
            "arguments": (Path("a.safetensors"), Path("out.safetensors"), "diffusers"),
            "kind": "lora",
            "base": Path("m"),
            "dtype": "BF16",
            "keep_alpha": True,
            "allow_lossy": True,
            "unknown": "drop",
            "force": True,
            "dry_run": True,
            "arch": "flux",
            "alpha": 16.0,
        }
    ]
    assert "would write" in result.stdout
    assert "20 tensors, 2.0 KiB" in result.stdout


@pytest.mark.parametrize(("flag", "unknown"), [([], "fail"), (["--drop-unknown"], "drop"), (["--keep-unknown"], "keep")])
def test_unknown_keys_fail_unless_allowed(run: Any, fake: Any, flag: list[str], unknown: str) -> None:
    calls = fake("convert", CONVERTED)
    run("convert", "a", "--to", "peft", *flag)
    assert calls[0]["unknown"] == unknown


@pytest.mark.parametrize(
    ("spelling", "name"), [("fp16", "F16"), ("FLOAT32", "F32"), ("torch.bfloat16", "BF16"), ("half", "F16"), ("f64", "F64")]
)
def test_a_dtype_may_be_spelled_in_any_usual_way(run: Any, fake: Any, spelling: str, name: str) -> None:
    calls = fake("convert", CONVERTED)
    run("convert", "a", "--to", "peft", "--dtype", spelling)
    assert calls[0]["dtype"] == name


def test_lossy_conversion_tells_its_errors(run: Any, fake: Any) -> None:
    lossy = {
        "exact": False,
        "max_relative_error": 0.125,
        "approximated": [{"site": f"denoiser.{i}", "relative_error": i / 100} for i in range(13)],
        "dropped": [{"key": "emb\x1b[2J", "reason": "not an adapter"}],
        "kept": ["extra.key"],
    }
    fake("convert", {**CONVERTED, **lossy})
    text = run("convert", "a", "--to", "peft", "--allow-lossy").stdout
    assert "largest relative error 0.125" in text
    assert "denoiser.12  relative error 0.12" in text  # the worst first
    assert "denoiser.1 " not in text
    assert "and 3 more" in text
    assert "emb\\x1b[2J  (not an adapter)" in text
    assert "\x1b" not in text
    assert "extra.key" in text


def test_key_convert_is_convert(run: Any, fake: Any) -> None:
    calls = fake("convert", CONVERTED)
    assert run("key-convert", "a", "--to", "peft").exit_code == 0
    assert calls[0]["arguments"][2] == "peft"
    assert run("key-convert", "-h").stdout.replace("key-convert", "convert") == run("convert", "--help").stdout


def test_options_come_from_the_environment_too(run: Any, fake: Any, parsed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake("convert", CONVERTED)
    for name, value in {"TO": "comfy", "JSON": "1", "DTYPE": "fp16", "KEEP_ALPHA": "true"}.items():
        monkeypatch.setenv(f"LORATOOLS_CONVERT_{name}", value)
    assert parsed(run("convert", "a")) == CONVERTED
    assert parsed(run("key-convert", "a", "--to", "kohya")) == CONVERTED  # the command line wins
    assert [(call["arguments"][2], call["dtype"], call["keep_alpha"]) for call in calls] == [("comfy", "F16", True), ("kohya", "F16", True)]
    monkeypatch.delenv("LORATOOLS_CONVERT_TO")
    assert parsed(run("convert", "a"))["error"]["code"] == "usage"  # also where the arguments cannot be parsed


def test_a_reader_that_stops_early_is_no_error_message() -> None:
    """`loratools formats | head -1`: the pipe is closed while the program writes."""
    script = "import sys; from loratools.cli.run import run\nsys.exit(run(lambda: [print('x' * 1000) for _ in range(1000)], []))"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ}) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_env_is_what_a_bug_report_needs(run: Any, parsed: Any) -> None:
    found = parsed(run("env", "--json"))
    assert found["python"] == ".".join(str(part) for part in sys.version_info[:3])
    assert found["packages"]["torch"] is not None
    assert found["memory_bytes"] > 0
    assert "devices" not in found
    text = run("env").stdout
    assert str(Path.home()) not in text
    assert found["packages"]["safetensors"] in text

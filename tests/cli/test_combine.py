"""`loratools combine`: how adapters and weights are typed, what is shown, exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loratools.cli.combine import hints

RESULT: dict[str, Any] = {
    "inputs": [
        {"path": "x/a.safetensors", "weight": 0.8, "dialect": "kohya"},
        {"path": "b.safetensors", "weight": -1.0, "dialect": "peft"},
    ],
    "output": "out.safetensors",
    "dialect": "kohya",
    "architecture": "sd1",
    "method": "sum",
    "pairwise_cosine": [[1.0, 0.25], [0.25, 1.0]],  # and one of the weights is negative
    "ranks_after": {"4": 1, "12": 263},
    "relative_error": 0.125,
    "worst": [{"site": "denoiser.conv_in", "rank": 4, "relative_error": 0.5}],
    "sites": 264,
    "only_in": [],
    "warnings": ["b.safetensors has 3 sites that not every input has"],
}


def test_adapters_weights_and_the_output(run: Any, fake: Any) -> None:
    calls = fake("combine", RESULT)
    result = run("combine", "a.safetensors:0.8", "b.safetensors:-1", "c:d.safetensors", "out.safetensors", "--rank", "8", "--seed", "3")
    assert result.exit_code == 0
    adapters, output = calls[0]["arguments"]
    assert adapters == ((Path("a.safetensors"), 0.8), (Path("b.safetensors"), -1.0), (Path("c:d.safetensors"), 1.0))
    assert output == Path("out.safetensors")
    given = {name: value for name, value in calls[0].items() if name != "arguments"}
    assert given == {
        "rank": 8, "energy": None, "method": "sum", "density": None, "to": None, "dtype": None, "arch": None, "alpha": None, "base": None,
        "seed": 3, "threads": None, "force": False, "dry_run": False,
    }  # fmt: skip


def test_what_is_shown(run: Any, fake: Any) -> None:
    fake("combine", RESULT)
    result = run("combine", "a.safetensors", "b.safetensors", "out.safetensors", env={"COLUMNS": "100"})
    sites = "264 sites of sd1 as kohya, ranks 4 (1), 12 (263)"
    for text in ("a.safetensors:0.8", "0.250", "work against each other", sites, "0.125", "wrote"):
        assert text in result.stdout
    assert "x/a" not in result.stdout
    assert "3 sites that not every input has" in result.stderr
    assert run("combine", "a", "b", "out", "-q").output == ""


def test_json_is_one_object(run: Any, fake: Any, parsed: Any) -> None:
    fake("combine", RESULT)
    assert parsed(run("combine", "a", "b", "out", "--json")) == RESULT


def test_a_plan_says_so(run: Any, fake: Any) -> None:
    planned = {**RESULT, "pairwise_cosine": None, "relative_error": None, "worst": [], "plan": {"tensors": 12, "bytes": 2048}}
    fake("combine", planned)
    result = run("combine", "a", "b", "out", "--dry-run")
    assert "would write" in result.stdout
    assert "12 tensors, 2.0 KiB" in result.stdout
    assert "exact" not in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["out.safetensors"],
        [],
        ["a:nan", "out"],
        ["a:inf", "out"],
        ["a", "b", "out", "--rank", "0"],
        ["a", "b", "out", "--method", "mean"],
        ["a", "b", "out", "--energy", "nan"],
        ["a", "b", "out", "--threads", "0"],
    ],
)
def test_wrong_usage_is_2(run: Any, arguments: list[str]) -> None:
    assert run("combine", *arguments).exit_code == 2


def test_options_come_from_the_environment(run: Any, fake: Any) -> None:
    calls = fake("combine", RESULT)
    run("combine", "a", "out", env={"LORATOOLS_COMBINE_RANK": "5", "LORATOOLS_COMBINE_METHOD": "ties"})
    assert (calls[0]["rank"], calls[0]["method"]) == (5, "ties")


def test_hints_are_for_extremes() -> None:
    names = ["a", "b", "c", "d"]
    similar = [
        [1.0, 0.95, 0.0, None],
        [0.95, 1.0, -0.5, None],
        [0.0, -0.5, 1.0, None],
        [None, None, None, None],
    ]
    told = hints(names, [1.0, 0.5, 2.0, 1.0], similar)
    assert len(told) == 2
    assert "a and b are nearly the same" in told[0]
    assert "b and c work against each other" in told[1]
    opposed = hints(names, [1.0, -0.5, 2.0, 1.0], similar)
    assert [told.partition(" (")[0] for told in opposed] == ["a and b work against each other"]


def test_nothing_is_read_for_a_missing_file(run: Any, tmp_path: Path) -> None:
    result = run("combine", tmp_path / "none.safetensors", tmp_path / "out.safetensors", "--json")
    assert result.exit_code == 3
    assert "no such file" in result.stdout

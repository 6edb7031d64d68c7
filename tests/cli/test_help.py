"""Every command explains itself, in the program and in docs/cli.md, and explaining costs nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from loratools.cli import reference
from loratools.cli.main import ALIASES, COMMANDS, cli

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = click.Context(cli, info_name="loratools", **cli.context_settings)


def command_of(name: str) -> click.Command:
    command = cli.get_command(CONTEXT, name)
    assert command is not None
    return command


def modules_after(*arguments: str) -> set[str]:
    """The top-level modules a fresh interpreter has imported once the command line has run with `arguments`."""
    script = (
        "import sys\nfrom loratools.cli.main import cli\n"
        f"try:\n    cli({list(arguments)!r})\nexcept SystemExit:\n    print('MODULES', *{{m.split('.')[0] for m in sys.modules}})\n"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return set(output.rpartition("MODULES ")[2].split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_examples(run: Any, name: str) -> None:
    for flag in ("-h", "--help"):
        result = run(name, flag)
        assert result.exit_code == 0
        examples = result.stdout.partition("Examples:")[2].strip().splitlines()
        assert examples
        assert all("loratools " in line for line in examples)
        assert any(line.strip().startswith(f"loratools {name}") for line in examples)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_says_what_the_command_says(name: str) -> None:
    """The one-line summaries are in the table so that `--help` need not import the commands; they must not drift."""
    help_text = command_of(name).help or ""
    assert help_text.split("\n\n")[0].replace("\n", " ").strip() == COMMANDS[name].summary
    assert command_of(name).name == name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_named_like_its_variable(name: str) -> None:
    """click forms LORATOOLS_<COMMAND>_<OPTION> from the parameter's name: it has to be the option's long spelling."""
    for option in command_of(name).params:
        if isinstance(option, click.Option):
            long = next(spelling for spelling in option.opts if spelling.startswith("--"))
            assert option.name == long[2:].replace("-", "_")
            assert option.help


@pytest.mark.parametrize("name", COMMANDS)
def test_common_options_are_everywhere(name: str) -> None:
    assert {"json", "quiet", "debug"} <= {parameter.name for parameter in command_of(name).params}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in [*COMMANDS, *ALIASES])])
def test_help_imports_neither_torch_nor_rich(arguments: list[str]) -> None:
    imported = modules_after(*arguments)
    assert "click" in imported
    assert not imported & {"torch", "rich", "numpy", "safetensors", "matplotlib"}


@pytest.mark.parametrize("arguments", [["env"], ["metadata", "nothing-there"]])
def test_what_reads_headers_alone_imports_no_torch(arguments: list[str]) -> None:
    assert "torch" not in modules_after(*arguments)


def test_no_command_shows_the_help(run: Any) -> None:
    result = run()
    assert result.exit_code == 0
    assert all(name in result.stdout for name in (*COMMANDS, *ALIASES))
    assert "Exit codes" in result.stdout


def test_version(run: Any) -> None:
    from loratools import __version__

    assert run("--version").stdout.strip() == f"loratools {__version__}"


def test_docs_are_the_program_s_own_help() -> None:
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == reference.cli_page(), "run `make docs`"


def test_formats_page_is_the_registries() -> None:
    assert (ROOT / "docs" / "formats.md").read_text(encoding="utf-8") == reference.formats_page(), "run `make docs`"


@pytest.mark.parametrize("name", [*COMMANDS, *ALIASES])
def test_every_command_is_in_the_docs(name: str) -> None:
    assert f"\n## {name}\n" in reference.cli_page() or f"`{name}`" in reference.cli_page()


def test_completion_offers_commands_and_dialects(fake: Any, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    fake("formats", {"dialects": [{"name": "kohya", "title": "sd-scripts"}, {"name": "peft", "title": "PEFT"}]})
    script = {"_LORATOOLS_COMPLETE": "bash_complete", "COMP_CWORD": "4"}
    result = run(prog_name="loratools", env={**script, "COMP_WORDS": "loratools convert a --to k"})
    assert result.stdout.split() == ["plain,kohya"]
    result = run(prog_name="loratools", env={**script, "COMP_WORDS": "loratools comp", "COMP_CWORD": "1"})
    assert result.stdout.split() == ["plain,compare"]


def test_python_api_is_lazy_and_complete() -> None:
    script = "import sys, loratools; assert 'torch' not in sys.modules; print(sorted(set(dir(loratools)) & set(loratools.__all__)))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    names = ["__version__", "combine", "compare", "convert", "extract", "inspect", "load", "merge", "rescale_alpha", "resize"]
    assert output.strip() == str(names)
    import loratools

    with pytest.raises(AttributeError, match="no_such_name"):
        _ = loratools.no_such_name

"""`loratools inspect`: what is this file? One file gets a page, several get a table; a bad file does not stop the others."""

from __future__ import annotations

import json as json_text
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from loratools.cli import options
from loratools.cli.console import Output
from loratools.cli.options import PATH, command
from loratools.cli.paths import expand, is_pattern
from loratools.cli.run import Failure, failure_of
from loratools.errors import UsageError

EXAMPLES = """
loratools inspect style.safetensors
loratools inspect style.safetensors --modules --spectrum
loratools inspect style.safetensors --metadata ss_network_dim
loratools inspect style.safetensors --plot style.png
loratools inspect 'loras/**/*.safetensors' --check --json
find . -name '*.safetensors' | loratools inspect -
"""


@command("inspect", examples=EXAMPLES)
@click.argument("paths", metavar="PATH...", type=PATH, nargs=-1, required=True)
@click.option("--modules", is_flag=True, help="List every module: rank, alpha, scale, shape, dtype, keys.")
@click.option("--spectrum", is_flag=True, help="Norm and singular values of every module's weight change, from the factors.")
@click.option("--hashes", is_flag=True, help="sha256 of the file and the hashes other tools store in its header.")
@click.option("--check", is_flag=True, help="Read the values too and exit 4 on an error (NaN, dead factors, orphan halves, false hashes).")
@click.option("--plot", type=PATH, metavar="FILE", help="Draw norms, spectra and ranks into FILE (.png or .svg).")
@click.option("--metadata", metavar="KEY", help="Print the value of one metadata entry.")
@options.arch
@options.alpha
@options.force
def inspect(
    output: Output, paths: tuple[Path, ...], check: bool, plot: Path | None, metadata: str | None, force: bool, **settings: Any
) -> int:
    """Say what a file is, from its header.

    Kind, dialect, architecture, modules, ranks, alpha and where it comes from, dtypes, training facts, trigger words, problems.
    Several paths, a quoted glob and `-` (paths on stdin) work too. Only --check, --spectrum, --hashes and --plot read more than
    the header.
    """
    if len(paths) > 1 or any(map(is_pattern, paths)):
        if plot is not None:
            raise UsageError("--plot draws one file; several paths were given", fix="call loratools inspect once a file")
        return _inspect_many(output, paths, metadata, {**settings, "check": check})
    if plot is not None:
        from loratools.operations.plot import check_plot

        check_plot(plot, paths, force=force)  # what would fail after the work is refused before it
    wanted = settings["modules"] or settings["spectrum"]
    draw_or_list = {"modules": True, "spectrum": settings["spectrum"] or plot is not None}  # the page tells the scales
    result = _inspect(output, paths[0], {**settings, **draw_or_list, "check": check})
    if plot is not None:
        from loratools.operations.plot import plot as draw

        draw(result, plot, force=force)
        output.note(f"wrote {plot}")
    if metadata is not None:
        _show_value(output, result, metadata)
    elif output.json:
        output.emit({key: value for key, value in result.items() if wanted or key != "modules"})
    elif not output.quiet:
        from loratools.cli.inspect_view import show

        show(output.console(), result, modules=settings["modules"], energy=settings["spectrum"])
    return _exit_code([result], [], check)


def _inspect(output: Output, path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    from loratools.operations.inspect import inspect as operation

    with output.working(f"reading {path}"):
        result: dict[str, Any] = operation(path, **settings)
    return result


def _inspect_many(output: Output, paths: tuple[Path, ...], metadata: str | None, settings: dict[str, Any]) -> int:
    """One result a path, in order. The exit code is that of the worst failure: first 3, then 2, then 1."""
    settings["modules"] = settings["modules"] or settings["spectrum"]
    results, failures = [], []
    for result, failure in _results(output, paths, metadata, settings):
        results.append(result)
        if failure is not None:
            failures.append(failure)
    if output.json:
        output.emit({"files": results})
        return _exit_code(results, failures, settings["check"])
    for result in results:
        if "error" in result:
            output.error_line(result["path"], result["error"]["message"])
        elif metadata is not None:
            output.value(f"{result['path']}: {_text(result['metadata'][metadata])}")
    if metadata is None and not output.quiet:
        from loratools.cli.inspect_view import show_many

        show_many(output.console(), results, full=settings["modules"])
    return _exit_code(results, failures, settings["check"])


def _results(
    output: Output, paths: tuple[Path, ...], metadata: str | None, settings: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], Failure | None]]:
    from loratools.operations.metadata import value_of

    for path, problem in expand(paths):
        try:
            if problem is not None:
                raise problem
            result = _inspect(output, path, dict(settings))
            yield result if metadata is None else {"path": str(path), "metadata": {metadata: value_of(result, metadata)}}, None
        except Exception as error:  # a file that breaks the reader must not hide the results of the others
            failure = failure_of(error)
            yield {"path": str(path), "error": failure.as_json()}, failure


def _exit_code(results: list[dict[str, Any]], failures: list[Failure], check: bool) -> int:
    if failures:
        return max(failure.exit_code for failure in failures)
    wrong = any(problem["severity"] == "error" for result in results for problem in result.get("problems", []))
    return 4 if check and wrong else 0


def _show_value(output: Output, result: dict[str, Any], key: str) -> None:
    from loratools.operations.metadata import value_of

    value = value_of(result, key)
    if output.json:
        output.emit({"path": result.get("path"), "metadata": {key: value}})
    else:
        output.value(_text(value))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json_text.dumps(value, ensure_ascii=False)

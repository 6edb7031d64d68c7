"""`loratools metadata`: print or edit what a file says about itself; tensor bytes stay as they are."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import Any

import click

from loratools.cli import options
from loratools.cli.console import Output, clean
from loratools.cli.options import PATH, command
from loratools.errors import UsageError

EXAMPLES = """
loratools metadata style.safetensors
loratools metadata style.safetensors --get ss_network_dim
loratools metadata style.safetensors titled.safetensors --set modelspec.title='My style' --unset ss_training_comment
loratools metadata style.safetensors public.safetensors --strip-private
"""


@command("metadata", examples=EXAMPLES)
@click.argument("source", metavar="SRC", type=PATH)
@click.argument("output_path", metavar="[OUT]", type=PATH, required=False)
@click.option("--get", metavar="KEY", help="Print the value of one entry.")
@click.option("--set", metavar="KEY=VALUE", multiple=True, help="Add or replace an entry; may be repeated.")
@click.option("--unset", metavar="KEY", multiple=True, help="Remove an entry; may be repeated.")
@click.option("--strip-private", is_flag=True, help="Take out paths, user and host names.")
@options.force
@options.dry_run
def metadata(
    output: Output, source: Path, output_path: Path | None, get: str | None, set: tuple[str, ...], unset: tuple[str, ...], **settings: Any
) -> int:
    """Print or edit the metadata of a file; tensor bytes stay as they are.

    Without OUT the entries are printed, and for a PEFT folder its adapter_config.json too. With OUT the file is copied with an
    edited header: nothing is decoded, the tensors are the same bytes. Stored hashes are brought up to date.
    """
    from loratools.operations.metadata import metadata as operation
    from loratools.operations.metadata import value_of

    result = operation(source, output_path, set=_pairs(set), unset=unset, **settings)
    if get is not None:
        value = value_of(result, get)
        if output.json:
            output.emit({**result, "metadata": {get: value}})
        else:
            output.value(value if isinstance(value, str) else json_text.dumps(value, ensure_ascii=False))
    else:
        output.result(result, lambda: show(output, result, settings["dry_run"], stripped=settings["strip_private"]))
    return 0


def _pairs(assignments: tuple[str, ...]) -> dict[str, str]:
    """KEY=VALUE texts as entries. Raises UsageError for all that are no assignment, and for a key given twice."""
    wrong = [text for text in assignments if "=" not in text[1:]]
    if wrong:
        raise UsageError("--set expects KEY=VALUE", details=wrong, fix="--set modelspec.title='My style'")
    keys = [text.partition("=")[0] for text in assignments]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise UsageError("--set gives a key more than once", details=twice)
    return dict(zip(keys, (text.partition("=")[2] for text in assignments), strict=True))


def show(output: Output, result: dict[str, Any], dry_run: bool, *, stripped: bool) -> None:
    """Every entry on a line of its own, long ones in full: `metadata` is where they are read."""
    if result["output"] is None:
        width = min(max((len(clean(key)) for key in result["metadata"]), default=0), 40)
        for key, value in result["metadata"].items():
            output.say(f"{clean(key):<{width}}  {value}")
        for key, value in (result.get("adapter_config") or {}).items():
            output.say(f"adapter_config.{key}: {json_text.dumps(value, ensure_ascii=False)}")
        if not result["metadata"] and not result.get("adapter_config"):
            output.say("no metadata")
    for key in result["removed"]:
        output.say(f"removed {key}")
    for entry in [] if stripped else result["private"]:
        output.warn(f"{entry['key']} holds something private: {entry['reason']} (--strip-private takes it out)")
    if result["output"] is not None:
        output.say(f"{'would write' if dry_run else 'wrote'} {result['output']}")

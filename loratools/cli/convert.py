"""`loratools convert`: parse, call the operation, show what became of every tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratools.cli import options
from loratools.cli.console import Output, number, size
from loratools.cli.options import PATH, command, registry_names
from loratools.errors import UsageError, counted

SHOWN = 10  # rows of a list for people; --json has all of them

EXAMPLES = """
loratools convert style.safetensors --to diffusers
loratools convert style.safetensors style-comfy.safetensors --to comfy --dtype bf16
loratools convert adapter_folder style.safetensors --to kohya --alpha 16
loratools convert lycoris.safetensors --to peft --kind lora
loratools convert style.safetensors --to kohya --dry-run --json
"""


@command("convert", examples=EXAMPLES)
@click.argument("source", metavar="SRC", type=PATH)
@click.argument("output_path", metavar="[OUT]", type=PATH, required=False)
@click.option(
    "--to", metavar="DIALECT", required=True, shell_complete=registry_names("dialects"), help="The dialect to write (`loratools formats`)."
)
@click.option("--kind", metavar="KIND", shell_complete=registry_names("kinds"), help="Turn modules into this kind, exactly: lora.")
@options.arch
@options.alpha
@options.base
@options.dtype
@click.option("--keep-alpha", is_flag=True, help="Write alpha to the header alone instead of folding it into the factors.")
@click.option("--allow-lossy", is_flag=True, help="Approximate what cannot be converted exactly, and print each error.")
@click.option("--drop-unknown", is_flag=True, help="Leave out tensors that no table knows (refused otherwise).")
@click.option("--keep-unknown", is_flag=True, help="Copy tensors that no table knows under their own names.")
@options.force
@options.dry_run
def convert(
    output: Output, source: Path, output_path: Path | None, to: str, drop_unknown: bool, keep_unknown: bool, dry_run: bool, **settings: Any
) -> int:
    """Write an adapter in another dialect.

    Without OUT the result lies beside SRC as <stem>.<dialect>.safetensors (peft: the folder <stem>.peft). Every tensor of SRC is
    converted exactly, approximated (--allow-lossy), kept or dropped by name (--keep-unknown, --drop-unknown), or nothing is written.
    """
    if drop_unknown and keep_unknown:
        raise UsageError("--drop-unknown cannot be used with --keep-unknown", fix="choose one of the two")
    from loratools.operations.convert import convert as operation

    unknown = "drop" if drop_unknown else "keep" if keep_unknown else "fail"
    with output.working(f"converting {source}"):
        result = operation(source, output_path, to, unknown=unknown, dry_run=dry_run, **settings)
    output.result(result, lambda: show(output, result))
    return 0


def show(output: Output, result: dict[str, Any]) -> None:
    """What was converted, what it cost, and the fate of every tensor that is not simply there."""
    origin, target = (result.get(key, {}) for key in ("from", "to"))
    plan = result.get("plan")
    verb = "would write" if plan is not None else "wrote"
    output.say(f"{origin.get('dialect')} -> {target.get('dialect')} ({target.get('architecture') or origin.get('architecture')})")
    exact = not result.get("approximated")
    quality = "exact" if exact else f"not exact, largest relative error {number(result.get('max_relative_error'))}"
    quality += " but for what was dropped" if exact and result.get("dropped") else ""
    tensors = f"{counted(result['tensors_in'], 'tensor')} read, {result['tensors_out']} written"
    output.say(f"{counted(result['sites'], 'site')}, {tensors}; {quality}")
    approximated = sorted(result.get("approximated", []), key=lambda row: -row["relative_error"])
    _rows(output, "approximated", [f"{row['site']}  relative error {number(row['relative_error'])}" for row in approximated])
    _rows(output, "dropped", [f"{row['key']}  ({row['reason']})" for row in result.get("dropped", [])])
    _rows(output, "kept as they are", result.get("kept", []))
    if plan is not None:
        output.say(f"plan: {counted(plan['tensors'], 'tensor')}, {size(plan.get('bytes', 0))}")
    output.say(f"{verb} {result.get('output')}")


def _rows(output: Output, title: str, rows: list[str]) -> None:
    if not rows:
        return
    output.say(f"{title}: {len(rows)}")
    for row in rows[:SHOWN]:
        output.say(f"  {row}")
    if len(rows) > SHOWN:
        output.say(f"  and {len(rows) - SHOWN} more (--json lists all)")

"""`loratools env`: what a bug report needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from loratools.cli.console import Output, size
from loratools.cli.options import command

EXAMPLES = """
loratools env
loratools env --devices --json
"""


@command("env", examples=EXAMPLES)
@click.option("--devices", is_flag=True, help="Ask torch for its GPUs too (imports torch).")
def env(output: Output, devices: bool) -> int:
    """Print what a bug report needs.

    Versions of Python and of the packages in use, platform, processors, memory. No paths, no user or host name.
    """
    from loratools.operations.env import environment

    found = environment(devices=devices)
    output.result(found, lambda: show(output, found, devices=devices))
    return 0


def show(output: Output, found: Mapping[str, Any], *, devices: bool) -> None:
    """A line a fact; the packages that are not installed too."""
    lines = [("loratools", found["loratools"]), ("python", found["python"]), ("platform", found["platform"])]
    lines += [("processors", str(found["cpus"])), ("memory", size(found["memory_bytes"]) if found["memory_bytes"] else "unknown")]
    lines += [(name, version or "not installed") for name, version in found["packages"].items()]
    lines += list(found["settings"].items())
    if devices:
        lines += [("cuda", found["cuda"] or "none"), ("torch threads", str(found["torch_threads"]))]
        lines += [("gpu", f"{gpu['name']}, {size(gpu['memory_bytes'])}, sm {gpu['compute_capability']}") for gpu in found["devices"]]
    width = max(len(label) for label, _ in lines)
    for label, text in lines:
        output.say(f"{label:<{width}}  {text}")

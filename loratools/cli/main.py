"""`loratools`: a table of commands. A command's module is imported when the command is used, so `--help` costs nothing."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import click

from loratools.cli.run import run
from loratools.version import VERSION

# the first words of README and docs too
ABOUT = "Inspect, convert, compare, combine, merge, extract, resize and rescale LoRA adapters of any dialect."


class Entry(NamedTuple):
    """Where a command is, and its line in `loratools --help` (the first sentence of its own help)."""

    module: str
    summary: str


# name → module under loratools.cli, where the command has the module's name, and one line
COMMANDS: dict[str, Entry] = {
    "inspect": Entry("inspect", "Say what a file is, from its header."),
    "convert": Entry("convert", "Write an adapter in another dialect."),
    "compare": Entry("compare", "Tell whether two adapters are the same function."),
    "combine": Entry("combine", "Write the weighted sum of adapters as one adapter."),
    "merge": Entry("merge", "Merge adapters into a base checkpoint."),
    "extract": Entry("extract", "Write what a tuned model has that its base has not, as a LoRA."),
    "resize": Entry("resize", "Write an adapter at smaller ranks."),
    "rescale-alpha": Entry("rescale_alpha", "Change an adapter's alpha, its strength, or fold its scale."),
    "metadata": Entry("metadata", "Print or edit the metadata of a file; tensor bytes stay as they are."),
    "formats": Entry("formats", "List the dialects, architectures and kinds, and what converts exactly."),
    "env": Entry("env", "Print what a bug report needs."),
}
ALIASES = {"key-convert": "convert"}

EPILOG = """\b
Exit codes:
  0  done, all of it
  1  failed while running (disk, memory, interrupted)
  2  wrong usage
  3  input invalid, not recognised, ambiguous or unsupported; nothing was written
  4  a check did not hold

\b
Every option also reads LORATOOLS_<COMMAND>_<OPTION>, for example LORATOOLS_CONVERT_TO=diffusers.
Completion: eval "$(_LORATOOLS_COMPLETE=bash_source loratools)"  (or zsh_source, fish_source)
"""


class Commands(click.Group):
    """The commands of the table, imported one by one; errors and exit codes as the contract has them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = ALIASES.get(cmd_name, cmd_name)
        if name not in COMMANDS:
            return None
        module = COMMANDS[name].module
        command: click.Command = getattr(import_module(f"loratools.cli.{module}"), module)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        command = self.get_command(ctx, name)
        if command is None and not ctx.resilient_parsing and not name.startswith("-"):
            near = difflib.get_close_matches(name, [*COMMANDS, *ALIASES], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Commands: {', '.join(COMMANDS)}."
            raise click.UsageError(f"No such command {name!r}.{hint}", ctx=ctx)
        found, _, rest = super().resolve_command(ctx, args)
        return ALIASES.get(name, found), command, rest

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, entry.summary) for name, entry in COMMANDS.items()]
        rows += [(alias, f"The same as {name}.") for alias, name in ALIASES.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        if not extra.pop("standalone_mode", True):
            return super().main(args, prog_name or "loratools", standalone_mode=False, **extra)
        arguments = list(sys.argv[1:] if args is None else args)
        call = super().main
        sys.exit(run(lambda: call(arguments, prog_name or "loratools", standalone_mode=False, **extra), arguments))


@click.group(
    cls=Commands,
    help=f"""{ABOUT}

    A path is a .safetensors file, a .pt/.bin/.ckpt file, a folder with adapter_config.json, a folder of shards with their
    index, or a diffusers folder. Start with `loratools inspect FILE`.
    """,
    epilog=EPILOG,
    no_args_is_help=False,
    invoke_without_command=True,
    context_settings={"auto_envvar_prefix": "LORATOOLS", "help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(VERSION, "--version", message="loratools %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """The program without a command explains itself."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())

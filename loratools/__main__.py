"""`python -m loratools` is the same as `loratools`."""

from __future__ import annotations

from loratools.cli.main import cli

if __name__ == "__main__":
    cli(prog_name="loratools")

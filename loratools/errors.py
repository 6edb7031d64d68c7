"""What can go wrong, and which exit code each kind of failure has.

The codes are the contract of the command line: 1 failed while running, 2 wrong usage, 3 input invalid,
unrecognised, ambiguous or unsupported, 4 a check did not hold. An error carries everything a reader needs to act:
what is wrong, every single finding (`details`), and the command or option that mends it (`fix`).
"""

from __future__ import annotations

from collections.abc import Sequence


class LoraToolsError(Exception):
    """Base of every error of this package.

    `message` is one sentence; `details` lists all findings, one a line; `fix` is what to do about them.
    """

    exit_code = 1
    code = "failed"

    def __init__(self, message: str, *, details: Sequence[str] = (), fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details = list(details)
        self.fix = fix


class WriteError(LoraToolsError):
    """The output could not be written: disk full, no permission, interrupted."""

    code = "write-failed"


class UsageError(LoraToolsError):
    """The command was asked for something it does not do."""

    exit_code = 2
    code = "usage"


class OutputExistsError(UsageError):
    """The output is already there and `--force` was not given, or it is one of the inputs."""

    code = "output-exists"


class InputError(LoraToolsError):
    """An input that cannot be used as it is; nothing was written."""

    exit_code = 3
    code = "invalid-input"


class MalformedError(InputError):
    """A container (safetensors file, index, pickle, folder) that breaks its own format."""

    code = "malformed"


class UnsafeError(MalformedError):
    """A file that would run code, or leave its folder, if it were loaded as it asks to be."""

    code = "unsafe"


class NotFiniteError(InputError):
    """A tensor on its way out holds NaN or Inf; `tensor` is its name there."""

    code = "not-finite"

    def __init__(self, tensor: str, message: str, *, fix: str | None = None) -> None:
        super().__init__(message, fix=fix)
        self.tensor = tensor


class UnknownError(InputError):
    """Keys, or a whole file, that no table knows."""

    code = "unknown"


class AmbiguousError(InputError):
    """Two or more readings fit equally well; `--arch` or `--alpha` settles it."""

    code = "ambiguous"


class UnsupportedError(InputError):
    """Understood, but what was asked cannot be done, or cannot be done exactly."""

    code = "unsupported"


class CheckFailed(LoraToolsError):
    """A check did not hold."""

    exit_code = 4
    code = "check-failed"


def counted(count: int, what: str, plural: str | None = None) -> str:
    """A number of things in words: 1 site, 2 sites, 0 entries (`plural` where an s does not do)."""
    return f"{count} {what if count == 1 else plural or what + 's'}"


def worst(problems: list[LoraToolsError]) -> LoraToolsError:
    """One error for several: the code is the first of 3, 2, 1 and the details list them all."""
    ranked = sorted(problems, key=lambda error: -error.exit_code)
    first = ranked[0]
    if len(ranked) > 1:
        first.details = [*first.details, *(line for error in ranked[1:] for line in (error.message, *error.details))]
    return first

"""The learning rate as a function of the step: lr(step) = lr · factor(step), with nothing to save and nothing to restore.

    step < warmup     factor = step / warmup
    otherwise         factor = end + (1 - end) · decay(p),   p = min(1, (step - warmup) / (total - warmup))

`step` counts the updates that were made before this one, from 0: with a warm-up the first update moves nothing, as with diffusers and
transformers. `total` is the number of updates of the whole run, which a resume must not recompute from today's data.

The decays are those of diffusers.optimization.get_scheduler, whose values this gives at every step up to `total`. Beyond it the factor
stays where it ended; theirs rises again after a cosine.

Also here: how a function is chosen from a table by name, with options of its own, for this and the other tables of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from inspect import Parameter, signature
from typing import TypeVar

from loratools.errors import UsageError

F = TypeVar("F", bound=Callable[..., object])
T = TypeVar("T")

DECAYS: dict[str, Callable[..., float]] = {}


def entered(table: dict[str, F], name: str | None = None) -> Callable[[F], F]:
    """Enter the decorated function into a table, under its own name where none is given."""

    def enter(function: F) -> F:
        table[name or function.__name__] = function
        return function

    return enter


def options_of(function: Callable[..., object]) -> dict[str, float]:
    """The options of a function of a table and their defaults: its keyword-only parameters."""
    return {name: found.default for name, found in signature(function).parameters.items() if found.kind is Parameter.KEYWORD_ONLY}


def chosen(table: Mapping[str, Callable[..., T]], what: str, name: str, options: Mapping[str, float]) -> Callable[..., T]:
    """The function of that name in a table, with these options set.

    what: of what the table is, for the message. Raises UsageError with the nearest name, or with every option that it does not have:
    an option that changes nothing was meant to change something.
    """
    if name not in table:
        near = get_close_matches(name, table, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"unknown {what} {name!r}{hint}", fix=f"use one of {', '.join(table)}")
    known = options_of(table[name])
    if unknown := [f"{option} = {options[option]}" for option in options if option not in known]:
        raise UsageError(f"{what} {name!r} does not have these options", details=unknown, fix=f"its options: {', '.join(known) or 'none'}")
    return partial(table[name], **options)


def positive(what: str, value: float) -> float:
    """`value`, finite and above 0. Raises UsageError."""
    if not 0 < value < math.inf:
        raise UsageError(f"{what} is {value}, expected a finite number above 0")
    return value


@entered(DECAYS)
def constant(progress: float) -> float:
    """1."""
    return 1.0


@entered(DECAYS)
def linear(progress: float) -> float:
    """1 - p."""
    return 1.0 - progress


@entered(DECAYS)
def cosine(progress: float) -> float:
    """(1 + cos πp) / 2: half a period, from 1 to 0 (Loshchilov and Hutter, 2017, arXiv:1608.03983, without restarts)."""
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


@entered(DECAYS, "cosine-restarts")
def cosine_with_restarts(progress: float, *, cycles: float = 1) -> float:
    """(1 + cos π(cp mod 1)) / 2 and 0 at p = 1: c half periods, each from 1 (Loshchilov and Hutter, 2017, arXiv:1608.03983)."""
    if progress >= 1.0:
        return 0.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (positive("cycles", cycles) * progress % 1.0))))


@entered(DECAYS)
def polynomial(progress: float, *, power: float = 1.0) -> float:
    """(1 - p)^power. The end that diffusers gives it is end = 1e-7 / lr."""
    return float((1.0 - progress) ** positive("power", power))


def factor(step: int, total: int, decay: str = "constant", *, warmup: int = 0, end: float = 0.0, **options: float) -> float:
    """What the learning rate is multiplied by for the update after `step` updates, in [0, 1].

    total: updates of the run. decay: a name in DECAYS. end: the factor at `total`, a share of the learning rate (constant does not
    get there). options: those of the decay. Raises UsageError with all findings.
    """
    law = chosen(DECAYS, "schedule", decay, options)
    if wrong := _wrong(step, total, warmup, end):
        raise UsageError("a schedule cannot have these numbers", details=wrong)
    if step < warmup:
        return step / warmup
    return end + (1.0 - end) * law(min(1.0, (step - warmup) / max(1, total - warmup)))


def _wrong(step: int, total: int, warmup: int, end: float) -> list[str]:
    wrong = {
        f"step {step}: steps count from 0": step < 0,
        f"total {total}: expected at least 1 update": total < 1,
        f"warmup {warmup}: expected 0 or more": warmup < 0,
        f"warmup {warmup} of {total} updates: the learning rate would never be reached": warmup > total,
        f"end {end}: expected a share of the learning rate from 0 to 1": not 0 <= end <= 1,
    }
    return [problem for problem, holds in wrong.items() if holds]

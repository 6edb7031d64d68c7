"""Widths as symbols: what a table's "3h+mlp" says about a file's shapes, and what the shapes say about the symbols.

Nothing is hard-coded to a published size: the symbols are solved from the file, by the vote of all its modules, so a tiny model of
the same structure works like the full one and a single wrong shape is found out instead of spoiling the rest.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cache

from loratools.adapters.adapter import Module
from loratools.mapping.architectures import Architecture
from loratools.mapping.rules import Match, Row

Shape = tuple[int | None, ...]
_TERM = re.compile(r"(\d*)([a-z_]\w*)|(\d+)")
Dims = Mapping[str, int]


@cache
def terms(expression: str) -> Mapping[str, int]:
    """ "3h+mlp" → {"h": 3, "mlp": 1}; a number stands under the empty symbol."""
    found: dict[str, int] = {}
    for term in expression.split("+"):
        match = _TERM.fullmatch(term.strip())
        if match is None:
            raise ValueError(f"not a dimension: {expression!r}")
        factor, symbol, number = match.groups()
        if number is not None:
            found[""] = found.get("", 0) + int(number)
        else:
            found[symbol] = found.get(symbol, 0) + int(factor or 1)
    return found


def evaluate(expression: str, dims: Dims) -> int | None:
    """The value of an expression, or None while a symbol is unknown."""
    if not expression:
        return None
    total = 0
    for symbol, factor in terms(expression).items():
        if symbol and symbol not in dims:
            return None
        total += factor * (dims[symbol] if symbol else 1)
    return total


def solve(expression: str, value: int | None, dims: Dims) -> dict[str, int] | None:
    """What `expression == value` says beyond `dims`: {} for nothing, the one new symbol, or None for a contradiction."""
    if not expression or value is None:
        return {}
    unknown: dict[str, int] = {}
    rest = value
    for symbol, factor in terms(expression).items():
        if not symbol:
            rest -= factor
        elif symbol in dims:
            rest -= factor * dims[symbol]
        else:
            unknown[symbol] = factor
    if not unknown:
        return {} if rest == 0 else None
    if len(unknown) > 1:
        return {} if rest > 0 else None
    ((symbol, factor),) = unknown.items()
    return {symbol: rest // factor} if rest > 0 and rest % factor == 0 else None


def fit(row: Row, out: int | None, in_: int | None, dims: Dims) -> dict[str, int] | None:
    """The symbols that make a row's shape (out, in) hold, on top of `dims`; None when no value does."""
    found = dict(dims)
    for expression, value in ((row.in_, in_), (row.total_out, out), (row.in_, in_)):
        new = solve(expression, value, found)
        if new is None:
            return None
        found.update(new)
    return found


def shapes_of(modules: Sequence[Module], row: Row) -> list[Shape]:
    """The shapes a stem's modules may have on a row: kernels unflattened, and for IA3 either axis (its flag may be wrong)."""
    if not modules:
        return [()]
    module = modules[0]
    shape: Shape = module.shape
    if module.kind in ("loha", "lokr", "dora") and row.layer == "conv" and len(shape) == 2 and row.kernel and isinstance(shape[1], int):
        size = math.prod(row.kernel)
        if shape[1] % size == 0 and size > 1:
            return [(shape[0], shape[1] // size, *row.kernel)]
    if module.kind == "ia3" and len(shape) > 1:
        return [shape, (shape[1], shape[0])]
    return [shape]


def vote_dims(pairs: Sequence[tuple[Row, Shape]]) -> dict[str, int]:
    """The value most modules give each symbol, so that one wrong shape does not make all others look wrong."""
    dims: dict[str, int] = {}
    while True:
        votes: dict[str, Counter[int]] = defaultdict(Counter)
        for row, shape in pairs:
            out, in_ = (*shape[:2], None, None)[:2]
            for expression, value in ((row.in_, in_), (row.total_out, out)):
                for symbol, number in (solve(expression, value, dims) or {}).items():
                    votes[symbol][number] += 1
        if not votes:
            return dims
        # the widest agreement first; the rest is solved again with it
        symbol = max(votes, key=lambda name: votes[name].most_common(1)[0][1])
        for name, counter in votes.items():
            if name == symbol or len(counter) == 1:
                dims[name] = counter.most_common(1)[0][0]


def choose_row(matches: Sequence[Match], shape: Shape, dims: Mapping[str, int]) -> tuple[Match, dict[str, int] | None]:
    """The row whose dimensions this shape fits, with the symbols it settles; (first row, None) when none fits."""
    for match in matches:
        solved = fit_shape(match.row, shape, dims)
        if solved is not None:
            return match, solved
    return matches[0], None


def fit_shape(row: Row, shape: Shape, dims: Mapping[str, int]) -> dict[str, int] | None:
    """`rules.fit` for a module's shape, which may not know its in or out width."""
    out = shape[0] if shape else None
    in_ = shape[1] if len(shape) > 1 else None
    return fit(row, out, in_, dims)


def best_variant(architecture: Architecture, dims: Mapping[str, int]) -> tuple[str | None, int]:
    """The published variant whose widths agree with all solved ones, and how many agree; (None, 0) if none does."""
    best: tuple[str | None, int] = (None, 0)
    for name, published in architecture.variants.items():
        shared = [symbol for symbol in published if symbol in dims]
        if shared and all(published[symbol] == dims[symbol] for symbol in shared) and len(shared) > best[1]:
            best = (name, len(shared))
    return best

"""What is wrong with a request before any file is read: weights, numbers, names, and what the output's name promises.

Everything is listed, nothing is raised: a user mends a command once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from loratools.adapters.algebra import Criterion
from loratools.errors import LoraToolsError, UsageError
from loratools.mapping.dialects import DIALECTS, Dialect, dialect_named
from loratools.operations.combining.recompress import Recipe
from loratools.operations.combining.sparsify import METHODS

PICKLES = (".ckpt", ".pt", ".bin")


def usage_problems(given: Sequence[tuple[Path, float]], recipe: Recipe, density: float | None, to: str | None) -> Iterator[LoraToolsError]:
    """Everything that is wrong with the request itself."""
    yield from criterion_problems(recipe.criterion)
    method, sparse = recipe.method, recipe.method in METHODS
    wrong = {
        f"unknown method {method!r}: sum, {', '.join(METHODS)}": method != "sum" and not sparse,
        f"--density {density}: expected a share above 0, 1 at most": density is not None and not 0 < density <= 1,
        "--density is for ties and dare; a sum keeps everything": density is not None and method == "sum",
        f"--method {method} makes dense deltas: --rank N or --energy E says how large the factors may be": sparse and not recipe.shrinks,
        "no adapter to combine": not given,
        "every weight is 0: nothing is left": bool(given) and not any(weight for _, weight in given),
    }
    yield from (UsageError(text) for text, holds in wrong.items() if holds)
    for path, weight in given:
        if weight and not 1e-30 < abs(weight) < 1e30:  # beyond, as for an alpha, products leave float32
            yield UsageError(f"{path.name}: a weight of {weight:g}: expected 0, or a number between 1e-30 and 1e30")
    if to is not None and to not in DIALECTS:
        try:
            dialect_named(to)
        except UsageError as error:
            yield error


def criterion_problems(criterion: Criterion) -> Iterator[LoraToolsError]:
    """Numbers out of range, and several criteria where one settles the rank. Each field has the name of its option."""
    rank, energy, error, ratio = criterion.rank, criterion.energy, criterion.error, criterion.ratio
    asked = [f"--{name}" for name, value in asdict(criterion).items() if value is not None]
    wrong = {
        f"{' and '.join(asked)}: one of them settles the rank": len(asked) > 1,
        f"--rank {rank}: expected 1 or more": rank is not None and rank < 1,
        f"--energy {energy}: expected a share above 0, 1 at most": energy is not None and not 0 < energy <= 1,
        f"--error {error}: expected a relative error of 0 or more, below 1": error is not None and not 0 <= error < 1,
        f"--ratio {ratio}: expected a quotient of singular values of 1 or more": ratio is not None and not 1 <= ratio < math.inf,
    }
    yield from (UsageError(text) for text, holds in wrong.items() if holds)


def form_problems(out: Path, dialect: Dialect) -> Iterator[LoraToolsError]:
    """A name that promises another container than the dialect's: a file where it is a folder, a pickle where it is a file."""
    if dialect.folder and out.suffix in (".safetensors", *PICKLES):
        yield UsageError(f"{out}: {dialect.name} is a folder, this is the name of a file", fix=f"{out.with_suffix('')}")
    elif not dialect.folder and out.suffix in PICKLES:
        yield UsageError(f"{out}: only safetensors is written, never a pickle", fix=f"{out.with_suffix('.safetensors')}")

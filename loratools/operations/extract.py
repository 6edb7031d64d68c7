"""extract: what a tuned model has that its base has not, as a LoRA.

    D = W_tuned - W_base ≈ up · down      per module, streamed pair by pair, neither model in memory

BASE and TUNED may lie in different layouts. Singular values come from a randomized SVD that goes on until it has converged (the exact
one on request); what is printed as error is measured on the factors as written. Everything headers can tell is checked first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratools.adapters.algebra import Criterion, in_parallel
from loratools.errors import InputError, LoraToolsError, UsageError, worst
from loratools.mapping.selection import Selection
from loratools.mapping.write import plan
from loratools.operations.combining.request import criterion_problems
from loratools.operations.extracting.budget import Cost, spread
from loratools.operations.extracting.decomposing import Extracted, Rule, compared, delta_of, extracted, unbiased
from loratools.operations.extracting.pairing import Pairing, Piece, Twin
from loratools.operations.extracting.preflight import Models, dtype_of, named, open_models, paired
from loratools.operations.extracting.told import RECORD, heading, record, told
from loratools.operations.meter import Meter
from loratools.operations.save import write_adapter
from loratools.tensors.dtypes import DTYPES
from loratools.tensors.spool import Spool
from loratools.tensors.writer import check_output

RANK = 32  # where nothing else is asked for
_ENTRY, _METADATA = 160, 4096  # bytes of a header, at most about: of a tensor beside its site's name, of all that is no tensor


def extract(
    base: Path | str,
    tuned: Path | str,
    output: Path | str,
    *,
    rank: int | str | None = None,
    energy: float | None = None,
    error: float | None = None,
    budget: float | None = None,
    conv_rank: int | None = None,
    to: str | None = None,
    dtype: str | None = None,
    dense_extras: str = "keep",
    component: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    exact: bool = False,
    oversample: int | None = None,
    iterations: int | None = None,
    arch: str | None = None,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the difference of two models as an adapter.

    base, tuned: checkpoints of one architecture in any layout and dtype. rank: of every module at most, or "auto" (what stands above
    the noise); energy: share of Σσ² kept; error: relative Frobenius error of each module; budget: MB of the whole file; rank 32
    without any of them. conv_rank: of kernels larger than 1x1; to: a dialect; dtype: of the factors, the base's without it;
    dense_extras: "keep" | "drop" changed biases, norms and bare parameters; component, include, exclude: see `Selection`;
    exact: no randomized SVD; oversample, iterations: of it; device: auto | cpu | cuda; progress: called with (bytes of TUNED done, all).
    Returns the JSON object of the command. Raises UsageError (2), InputError and its children (3), WriteError (1).
    """
    meter, out = Meter(), Path(output)
    asked = {"rank": rank, "energy": energy, "error": error, "budget": budget, "conv_rank": conv_rank, "dtype": dtype, "seed": seed or None,
             "dense_extras": None if dense_extras == "keep" else dense_extras, "exact": exact or None, "oversample": oversample,
             "iterations": iterations, "component": component, "include": include, "exclude": exclude}  # fmt: skip
    rule = _rule(rank, energy, error, budget, conv_rank)
    rule = replace(rule, exact=exact, iterations=iterations, seed=seed, extras=dense_extras == "keep", device=_device(device))
    rule = rule if oversample is None else replace(rule, oversample=oversample)
    models = open_models(Path(base), Path(tuned), arch, to, out, force)
    pairing = paired(models, Selection(tuple(component), tuple(include), tuple(exclude)))
    rule = replace(rule, dtype=dtype_of(pairing.pieces, dtype))
    nbytes = int(budget * 1e6) if budget is not None else sum(_nbytes(piece, rule) for piece in pairing.pieces)
    check_output(out, (), force, 2 * nbytes)  # the spool's, and the file's
    if dry_run:
        count = len(pairing.pieces)
        return {**heading(models, rule, out), "modules": count, **meter.read(), "plan": {"tensors": 3 * count, "bytes": nbytes}}
    named(pairing, models, rule.extras)
    rule = replace(rule, unbiased=unbiased(pairing.pieces, models.target.dialect))
    if budget is not None:
        rule = replace(rule, ranks=_ranks(pairing.pieces, rule, nbytes, threads))
    found = list(_work(pairing, rule, models, Spool(out.parent), threads, progress))
    entries = tuple(one.entry for _, one in found if one.entry is not None)
    if not entries:
        raise InputError("BASE and TUNED are the same, as far as an adapter can tell: there is nothing to write")
    adapter = models.target.like.replace(entries=entries)
    made = plan(adapter, models.target.architecture, models.target.dialect.name)
    extra = {RECORD: record(models.base.source, models.tuned.source, {name: value for name, value in asked.items() if value})}
    write_adapter(adapter, models.target.architecture, made, made.tensors, out, force=force, extra=extra, new=True)
    return {**told(models, pairing, found, rule, out), **meter.read()}


def _rule(rank: int | str | None, energy: float | None, error: float | None, budget: float | None, conv_rank: int | None) -> Rule:
    """Which singular values are kept. Raises one UsageError that lists everything wrong with the request."""
    given = {"--rank": rank, "--energy": energy, "--error": error, "--budget": budget}
    asked = [name for name, value in given.items() if value is not None]
    auto = rank == "auto"
    fixed = rank if isinstance(rank, int) else (RANK if not asked else None)
    linear = Criterion(rank=fixed, energy=energy, error=error)
    wrong = {
        f"{' and '.join(asked)}: one of them settles the ranks": len(asked) > 1,
        f"--rank {rank}: expected a number of 1 or more, or auto": isinstance(rank, str) and not auto,
        f"--budget {budget}: expected a number of MB above 0": budget is not None and not 0 < budget < math.inf,
        f"--conv-rank {conv_rank}: expected 1 or more": conv_rank is not None and conv_rank < 1,
        "--conv-rank and --budget: the budget settles all ranks": conv_rank is not None and budget is not None,
    }
    problems: list[LoraToolsError] = [UsageError(text) for text, holds in wrong.items() if holds]
    problems += criterion_problems(linear) if len(asked) < 2 else []
    if problems:
        raise worst(problems)
    return Rule(linear, linear if conv_rank is None else Criterion(rank=conv_rank), auto=auto)


def _device(name: str) -> str:
    """cuda where it is asked for or there is one. Raises UsageError."""
    if name == "cpu":
        return name
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if name == "cuda":
        raise UsageError("--device cuda: torch sees no GPU here", fix="--device cpu, or a build of torch for your GPU (`loratools env`)")
    return "cpu"


def _cost(piece: Piece, rule: Rule) -> Cost:
    """What a rank of a piece's LoRA costs."""
    out, *inner = piece.weight.shape if piece.weight is not None else (0,)
    columns = math.prod(inner)
    return Cost((out + columns) * DTYPES[rule.dtype][0] // 8, min(out, columns))


def _extras(piece: Piece, rule: Rule, twins: Sequence[Twin]) -> int:
    """Bytes of those twins of a piece that stay dense, and of the header for all of them."""
    dense = [twin for twin in twins if twin is not piece.weight or not piece.low_rank] if rule.extras else []
    tensors = len(dense) + 3 * (piece.low_rank and piece.weight in twins)  # up, down, alpha
    return 4 * sum(twin.after.numel for twin in dense) + tensors * (_ENTRY + len(piece.name))


def _nbytes(piece: Piece, rule: Rule) -> int:
    """Bytes of what becomes of a piece, at most."""
    cost = _cost(piece, rule)
    factors = min(rule.criterion(piece).rank or cost.most, cost.most) * cost.nbytes if piece.low_rank else 0
    return _extras(piece, rule, piece.twins) + factors


def _ranks(pieces: Sequence[Piece], rule: Rule, budget: int, threads: int | None) -> dict[str, int]:
    """Ranks within a budget for everything that differs, what is dense beside it taken off first. Raises UsageError if it is too small."""
    differ = list(in_parallel(lambda piece: [twin for twin in piece.twins if not twin.same()], pieces, threads))
    changed = {piece.name: piece for piece, twins in zip(pieces, differ, strict=True) if piece.low_rank and piece.weight in twins}
    costs = {name: _cost(piece, rule) for name, piece in changed.items()}
    left = budget - _METADATA - sum(_extras(piece, rule, twins) for piece, twins in zip(pieces, differ, strict=True))
    least = sum(cost.nbytes for cost in costs.values())
    if left < least:
        needed = f"{math.ceil((budget - left + least) / 1e4) / 100:.2f}"
        raise UsageError(f"--budget: rank 1 everywhere already takes {needed} MB", fix=f"--budget {needed} or more")

    def spectrum(item: tuple[str, int]) -> tuple[str, list[float]]:
        piece, count = changed[item[0]], item[1]
        assert piece.weight is not None
        delta = delta_of(piece.weight, rule.device)
        return item[0], rule.decompose(delta.reshape(delta.shape[0], -1), piece, Criterion(rank=count))[1].tolist()

    def spectra(counts: Mapping[str, int]) -> dict[str, list[float]]:
        return dict(in_parallel(spectrum, list(counts.items()), threads))

    return spread(costs, left, spectra)


def _work(
    pairing: Pairing, rule: Rule, models: Models, spool: Spool, threads: int | None, progress: Callable[[int, int], None] | None
) -> Iterator[tuple[Piece, Extracted]]:
    """Every piece with what became of it, in order; tensors of no module are compared beside."""
    pairing.skipped += in_parallel(compared, pairing.beside, threads)
    sizes = [sum(twin.after.nbytes for twin in piece.twins) for piece in pairing.pieces]
    done = 0
    results = in_parallel(lambda piece: extracted(piece, rule, models.target.dialect, spool), pairing.pieces, threads)
    for piece, size, result in zip(pairing.pieces, sizes, results, strict=True):
        done += size
        if progress is not None:
            progress(done, sum(sizes))
        yield piece, result

"""What is told about an extraction: the JSON object of the command, and the record in the output's header."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loratools.operations.combining.recompress import Fit
from loratools.operations.extracting.decomposing import SAME, Extracted, Rule
from loratools.operations.extracting.pairing import Pairing, Piece
from loratools.operations.extracting.preflight import Models
from loratools.operations.merging.lineage import header_digest, text
from loratools.tensors.source import TensorSource
from loratools.version import VERSION

WORST = 5  # rows of the sites that are furthest off
RECORD = "loratools.extract"


def record(base: TensorSource, tuned: TensorSource, asked: dict[str, Any]) -> str:
    """From what and how, for the header: names and hashes of the models' headers, and the options that were given; no paths."""
    origins = [{"name": text(source.path.name), "header_sha256": header_digest(source)} for source in (base, tuned)]
    found = {"version": VERSION, "base": origins[0], "tuned": origins[1], "options": asked}
    return json.dumps(found, sort_keys=True, separators=(",", ":"))


def told(models: Models, pairing: Pairing, found: Sequence[tuple[Piece, Extracted]], rule: Rule, out: Path) -> dict[str, Any]:
    """The JSON object. found: what became of each piece, in order."""
    fits = {piece: one.fit for piece, one in found if one.fit is not None}
    ranks = {piece: one.entry.module.rank for piece, one in found if one.entry is not None and one.fit is not None}
    whole = Fit(math.fsum(fit.error for fit in fits.values()), math.fsum(fit.norm for fit in fits.values()))
    ranked = sorted(fits.items(), key=lambda item: (-item[1].relative_error, item[0].sites))[:WORST]
    count = Counter(rank for rank in ranks.values() if rank)
    return {
        **heading(models, rule, out),
        "modules": sum(one.entry is not None for _, one in found),
        "ranks": {str(rank): count[rank] for rank in sorted(count)},
        "relative_error": whole.relative_error,
        "worst": [{"site": piece.name, "rank": ranks[piece], "relative_error": fit.relative_error} for piece, fit in ranked],
        "skipped": [{"tensor": tensor, "reason": reason} for tensor, reason in _skipped(pairing, found)],
    }


def _skipped(pairing: Pairing, found: Sequence[tuple[Piece, Extracted]]) -> list[tuple[str, str]]:
    """(tensor, reason), each once. Of a fused tensor whose parts are several modules, parts that are the same are not worth a word."""
    rows = dict.fromkeys([*pairing.skipped, *(row for _, one in found for row in one.skipped)])
    differs = {tensor for tensor, reason in rows if reason != SAME}
    for piece, one in found:
        differs |= {key for twin in piece.twins for key in twin.keys} - {tensor for tensor, _ in one.skipped}
    return [(tensor, reason) for tensor, reason in rows if reason != SAME or tensor not in differs]


def heading(models: Models, rule: Rule, out: Path) -> dict[str, Any]:
    """What a plan and a result have in common."""
    return {
        "base": str(models.base.source.path),
        "tuned": str(models.tuned.source.path),
        "output": str(out),
        "dialect": models.target.dialect.name,
        "architecture": models.target.architecture.published,
        "dtype": rule.dtype,
    }

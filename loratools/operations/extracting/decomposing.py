"""One piece of an extraction: D = W_tuned - W_base as a product of two factors, with the error of what is written.

D is subtracted in float32 (float64 where a model is), so that no bit of 16-bit weights is lost. The printed error is measured on the
factors as the file holds them, in float64: ‖D - scale · up · down‖ and not what the singular values promise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loratools.adapters.adapter import Entry, Module, NotExact
from loratools.adapters.algebra import Criterion, balanced
from loratools.adapters.kinds import Dense, Lora, Replacement
from loratools.adapters.sketch import OVERSAMPLE, decompose, residual_norms
from loratools.errors import NotFiniteError
from loratools.mapping.dialects import Dialect
from loratools.mapping.fitting import fit_kind
from loratools.mapping.rules import Row
from loratools.operations.combining.recompress import Fit
from loratools.operations.extracting.pairing import Piece, Twin
from loratools.tensors.dtypes import torch_dtype
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.spool import Spool

if TYPE_CHECKING:
    import torch

    from loratools.adapters.algebra import Pair, Svd

SAME, DROPPED = "the same in both", "changed, and left out by --dense-extras drop"


@dataclass(frozen=True)
class Rule:
    """How pieces are decomposed. linear, conv: of matrices and 1x1 convolutions, of kernels; auto: the noise floor settles the rank."""

    linear: Criterion
    conv: Criterion
    auto: bool = False
    exact: bool = False
    oversample: int = OVERSAMPLE
    iterations: int | None = None
    seed: int = 0
    dtype: str = "F16"  # of the factors
    extras: bool = True  # keep biases, norms and bare parameters where the dialect holds them
    device: str = "cpu"
    ranks: Mapping[str, int] = field(default_factory=dict)  # of single pieces, by name: what a budget gives them
    unbiased: frozenset[str] = frozenset()  # components that cannot have biases beside their LoRAs

    def criterion(self, piece: Piece) -> Criterion:
        if piece.name in self.ranks:
            return Criterion(rank=self.ranks[piece.name])
        return self.conv if piece.kernel else self.linear

    def decompose(self, matrix: torch.Tensor, piece: Piece, criterion: Criterion) -> Svd:
        """What `criterion` keeps of a piece's D. Random numbers are the piece's own: they do not depend on the order of the work."""
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}:{piece.name}".encode()).digest()[:6])
        options: dict[str, Any] = {"exact": self.exact, "oversample": self.oversample, "iterations": self.iterations}
        return decompose(matrix, criterion, seed=seed, auto=self.auto, **options)[0]


@dataclass
class Extracted:
    """What became of a piece: its entry (none where all is equal), the fit of its weight, and what was left out, with the reason."""

    entry: Entry | None = None
    fit: Fit | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)


def extracted(piece: Piece, rule: Rule, dialect: Dialect, spool: Spool) -> Extracted:
    """The module of a piece; its tensors go to the spool at once. Raises NotFiniteError naming the tensor."""
    result = Extracted()
    changed: dict[str, Twin] = {}
    for role, twin in (("weight", piece.weight), ("bias", piece.bias)):
        if twin is not None and twin.same():
            result.skipped += [(key, SAME) for key in twin.keys]
        elif twin is not None:
            changed[role] = twin
    module: Module | None = None
    if piece.low_rank and "weight" in changed:
        twin = changed.pop("weight")
        delta = delta_of(twin, rule.device)
        if _differs(delta, twin, result):
            module, result.fit = _lora(piece, twin, delta, rule, dialect, spool)
            module = _held(module, piece, dialect, twin, result)
    if changed and not rule.extras:
        result.skipped += [(key, DROPPED) for twin in changed.values() for key in twin.keys]
    elif changed:
        module = _with_extras(module, piece, changed, rule, dialect, spool, result)
    if module is not None:
        result.entry = Entry(piece.sites, module, piece.heights, name=piece.sites[0].path)
    return result


def unbiased(pieces: Iterable[Piece], dialect: Dialect) -> frozenset[str]:
    """Components whose embedding differs, for a dialect that then has no LoRA biases: PEFT refuses `lora_bias` beside an embedding."""
    if not {"embedding", "lora-bias"} <= dialect.holds:
        return frozenset()
    changed = (piece for piece in pieces if piece.embedding and piece.weight is not None and not piece.weight.same())
    return frozenset(piece.sites[0].component for piece in changed)


def compared(twin: Twin) -> tuple[str, str]:
    """A tensor of no module, and what is to be said of it."""
    return twin.keys[0], SAME if twin.same() else "differs, but is no module of the architecture: no adapter holds it"


def delta_of(twin: Twin, device: str = "cpu") -> torch.Tensor:
    """W_tuned - W_base in float32, float64 where one of them is. Raises NotFiniteError naming the tensor and the model."""
    import torch

    wide = torch.float64 if "F64" in (twin.before.dtype, twin.after.dtype) else torch.float32
    delta = twin.after.load().to(device, wide, copy=True).sub_(twin.before.load().to(device, wide))
    if not bool(delta.isfinite().all()):
        whose = "TUNED" if not bool(twin.after.load().to(wide).isfinite().all()) else "BASE"
        told = f"{twin.keys[0]}: {whose} holds NaN or Inf here"
        raise NotFiniteError(twin.keys[0], told, fix=f"loratools inspect {whose} --check names every such tensor")
    return delta


def _differs(delta: torch.Tensor, twin: Twin, result: Extracted) -> bool:
    """False, and noted, for equal values in other bits: of two dtypes, or zeros of two signs."""
    found = bool(delta.any())
    result.skipped += [] if found else [(key, SAME) for key in twin.keys]
    return found


def _lora(piece: Piece, twin: Twin, delta: torch.Tensor, rule: Rule, dialect: Dialect, spool: Spool) -> tuple[Lora, Fit]:
    """The best LoRA of the piece's weight, alpha = rank, in the rule's dtype; its fit is measured on what is written."""
    matrix = delta.reshape(delta.shape[0], -1)
    up, down = (side.to(torch_dtype(rule.dtype)) for side in balanced(rule.decompose(matrix, piece, rule.criterion(piece))))
    error, norm = residual_norms(matrix, up, down)
    if not math.isfinite(error):
        raise NotFiniteError(twin.keys[0], f"{twin.keys[0]}: its factors overflow {rule.dtype}", fix="--dtype bf16 or fp32 has the range")
    return Lora(_roles((up, down), piece, dialect, spool), float(up.shape[1]), "tensor"), Fit(error, norm)


def _roles(pair: Pair, piece: Piece, dialect: Dialect, spool: Spool) -> dict[str, LazyTensor]:
    """up (o, k) and down (k, n) in the shapes of the layer's LoRA: kernel axes on a convolution, turned on an embedding."""
    up, down = pair
    if piece.embedding and "embedding" in dialect.holds:
        return {"embedding_down": spool.add(up.t()), "embedding_up": spool.add(down.t())}
    kernel = piece.weight.shape[2:] if piece.weight is not None else ()
    down = down.reshape(down.shape[0], -1, *kernel)
    return {"down": spool.add(down), "up": spool.add(up.reshape(*up.shape, *(1 for _ in kernel)))}


def _held(module: Module, piece: Piece, dialect: Dialect, twin: Twin, result: Extracted) -> Module | None:
    """The module if the dialect's readers apply it; of an embedding only those that know one, or any named weight."""
    if not piece.embedding or {"embedding", "dense"} & dialect.holds:
        return module
    result.fit = None
    result.skipped += [(key, f"changed, but {dialect.name} has no LoRA of embeddings") for key in twin.keys]
    return None


# ----------------------------------------------------------------------------------------------------------------- dense extras


def _with_extras(
    module: Module | None, piece: Piece, changed: Mapping[str, Twin], rule: Rule, dialect: Dialect, spool: Spool, result: Extracted
) -> Module | None:
    """The module with the changes no LoRA holds, as far as the dialect does; the others are noted."""
    deltas = {role: delta_of(twin) for role, twin in changed.items()}  # float32: they are small, and W + diff is to be TUNED
    added = {role: spool.add(delta) for role, delta in deltas.items() if _differs(delta, changed[role], result)}
    if not added:
        return module
    try:
        return _extended(module, piece, added, rule, dialect)
    except NotExact as refused:
        result.skipped += [(key, f"changed, but {refused}") for role in added for key in changed[role].keys]
        return module


def _extended(module: Module | None, piece: Piece, added: Mapping[str, LazyTensor], rule: Rule, dialect: Dialect) -> Module:
    """Raises NotExact with what the dialect cannot hold."""
    row = piece.row or Row(piece.sites[0].path, (piece.sites[0].path,))
    if module is not None and piece.sites[0].component in rule.unbiased:
        raise NotExact(f"{dialect.name} has no LoRA biases beside a LoRA of an embedding (--exclude it for them)")
    if module is not None:  # a LoRA, and the bias beside it; alpha is the rank, so the bias under the scale is the same number
        role = "diff_b" if "dense" in dialect.holds else "bias"
        made: Module = module.with_factors({**module.factors, role: added["bias"]})
    elif "set" in dialect.holds and not {"dense", "norm"} & dialect.holds and not piece.low_rank and _whole(piece):
        twins = {"set_weight": piece.weight, "set_bias": piece.bias}
        made = Replacement({role: twin.after for role, twin in twins.items() if twin is not None})
    else:
        roles = {"weight": "diff", "bias": "diff_b"}
        made = Dense({roles[role]: tensor for role, tensor in added.items()})
    fit_kind(made, dialect, row, plain=False)  # asked here, site by site: the writer refuses all or nothing
    return made


def _whole(piece: Piece) -> bool:
    """Is it a layer, which PEFT can save whole, and not a bare parameter? What the checkpoint calls its weight does not matter."""
    if piece.weight is None:
        return False
    return piece.row.layer == "norm" if piece.row is not None else piece.weight.keys[0].endswith(".weight")

"""What an adapter is, whatever it is called: Site, Module, Entry, Adapter.

The truth about an adapter is its dense delta per site. `Module` is one kind's factors with its formula; `Entry` says which
sites a module of the file serves (several, when the file has q, k and v fused in one) and keeps the file's own spelling of
it, so that writing back in the same dialect is byte-exact. Nothing here knows a file name or imports torch at import.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from loratools.errors import UnsupportedError
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

    import torch


BIAS_ROLES = ("bias", "diff_b", "b_norm", "set_bias")  # what is added to a module's bias, or replaces it


class NotExact(UnsupportedError):
    """An operation on factors that this kind cannot do exactly; the message is the reason."""

    code = "not-exact"


@dataclass(frozen=True, order=True)
class Site:
    """One module of a model: which part of the pipeline, and its name there.

    component: denoiser | denoiser_2 | text_encoder | text_encoder_2 | text_encoder_3 | model (an LLM)
    path: the module's name in diffusers (transformers for text encoders and LLMs), always the finest split.
    """

    component: str
    path: str

    def __str__(self) -> str:
        return f"{self.component}.{self.path}"


@dataclass(frozen=True)
class RowDelta:
    """ΔW of a weight seen as a matrix (out, in · kernel), block by block.

    rows: (start, stop, those rows of W) → ΔW there, a new tensor of shape (stop - start, in · kernel)
    entries: (rows, columns) → ΔW at these places in float64; None where an entry depends on more than its row and column
    reach: (out) float64, a bound of Σ |products| in each row's entries: what a sum in a narrower dtype is off by goes with it
    """

    rows: Callable[[int, int, torch.Tensor], torch.Tensor]
    entries: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    reach: torch.Tensor | None = None

    def times(self, factor: float) -> RowDelta:
        """factor · ΔW."""
        rows, entries = self.rows, self.entries
        return RowDelta(
            lambda start, stop, weight: rows(start, stop, weight).mul_(factor),
            None if entries is None else lambda places, columns: entries(places, columns) * factor,
            None if self.reach is None else self.reach * abs(factor),
        )


@dataclass(frozen=True)
class Module(ABC):
    """One adapter module: factors by role, and alpha.

    factors: role → tensor as the file holds it (see each kind for its roles; an `alpha` tensor is under "alpha")
    alpha: the value whose quotient alpha / rank is the scale; None where nothing records one (scale 1)
    alpha_source: "tensor" | "metadata" | "adapter_config" | "assumed"
    options: what the tensors cannot say and a config does (PEFT's Cayley variant, IA3's feed-forward flag, …)
    """

    factors: Mapping[str, LazyTensor]
    alpha: float | None = None
    alpha_source: str = "assumed"
    options: Mapping[str, Any] = field(default_factory=dict)

    kind: ClassVar[str]
    roles: ClassVar[tuple[str, ...]]  # in the order a file lists them
    linear: ClassVar[bool] = True  # is W' - W proportional to the strength and independent of W?

    @property
    @abstractmethod
    def shape(self) -> tuple[int | None, ...]:
        """Shape of the weight this changes, (out, in, *kernel); None where the factors do not tell."""

    @property
    def rank(self) -> int | None:
        """Inner dimension of the factors; None for kinds without one."""
        return None

    @property
    def scale(self) -> float:
        """alpha / rank, or 1 where either is absent. Kinds whose alpha is no scale override this."""
        return 1.0 if self.alpha is None or not self.rank else self.alpha / self.rank

    def problems(self) -> list[tuple[str, str, str]]:
        """(severity, code, message) for what is wrong by shapes alone: half pairs, rank mismatch, size 0."""
        return []

    @abstractmethod
    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Dense ΔW = W' - W in float64, shape `self.shape`, scale included.

        weight: the base weight, needed by kinds that multiply it. Raises NotExact without it.
        """

    def bias_delta(self, bias: torch.Tensor | None = None) -> torch.Tensor | None:
        """Change of the module's bias in float64, shape (out,), or None.

        bias: the base bias, needed by kinds that multiply or replace it. Raises NotExact without it.
        """
        return None

    @property
    def changes_weight(self) -> bool:
        """False where only the bias is changed."""
        return True

    @property
    def needs_bias(self) -> bool:
        """Does it add to the layer's bias, or replace it? A layer without one cannot take it."""
        return any(role in self.factors for role in BIAS_ROLES)

    @property
    def changes_bias(self) -> bool:
        """Does `bias_delta` change a bias where there is one?"""
        return self.needs_bias

    def by_rows(self, dtype: torch.dtype) -> RowDelta | None:
        """ΔW a block of output rows at a time, for weights too large to hold whole, scale included.

        The factors are read once, at this call, and the products are formed in `dtype`. None where rows cannot be told apart
        (`delta` is the whole).
        """
        return None

    def delta_at(self, strength: float, weight: torch.Tensor | None = None) -> torch.Tensor:
        """ΔW of a merge at this strength: strength · ΔW, except for kinds that apply it inside (BOFT)."""
        return self.delta(weight) * strength

    def norm(self, weight: torch.Tensor | None = None) -> float:
        """Frobenius norm of ΔW."""
        return float(self.delta(weight).norm())

    def singular_values(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Singular values of ΔW as an (out, in · kernel) matrix, float64, largest first; zeros may be left out."""
        import torch

        delta = self.delta(weight)
        values: torch.Tensor = torch.linalg.svdvals(delta.reshape(delta.shape[0], -1))
        return values

    def relative_error(self, other: Module, weight: torch.Tensor | None = None) -> float:
        """|ΔW of other - ΔW| / |ΔW|, Frobenius; 0 where both are zero, inf where only this one is."""
        mine = self.delta(weight)
        return quotient(float((other.delta(weight).reshape(mine.shape) - mine).norm()), float(mine.norm()))

    @property
    def rounded(self) -> bool:
        """True when making this module rounded its factors: its ΔW is then only nearly the source's."""
        return bool(self.options.get("rounded", False))

    def transpose(self) -> Module:
        """The module whose ΔW is this one's transposed (matrices only). Raises NotExact."""
        raise NotExact(f"a {self.kind} module cannot be transposed")

    def to_lora(self, dtype: str = "F32") -> Module:
        """The plain LoRA of the same ΔW, new factors computed in float64 and rounded once to `dtype`. Raises NotExact."""
        raise NotExact(f"a {self.kind} module is no LoRA of smaller rank")

    def split(self, rows: Sequence[int]) -> list[Self | None]:
        """The parts of a fused module, `rows[i]` output rows each; None for a part that is absent (all zero).

        Raises NotExact where the kind cannot be split at these rows.
        """
        raise NotExact(f"a {self.kind} module cannot be split into {list(rows)} rows exactly")

    @classmethod
    def fuse(cls, parts: Sequence[Self | None], rows: Sequence[int]) -> Self:
        """One module whose delta stacks those of `parts` (None: zero rows). Raises NotExact."""
        raise NotExact(f"{cls.kind} modules cannot be fused exactly")

    def swap_halves(self) -> Self:
        """The same module for a weight whose two halves of output rows are exchanged. Its own inverse."""
        raise NotExact(f"a {self.kind} module cannot exchange its row halves exactly")

    def with_factors(self, factors: Mapping[str, LazyTensor], **changes: Any) -> Self:
        """A copy with other factors (and alpha, …)."""
        return replace(self, factors=factors, **changes)


def quotient(error: float, size: float) -> float:
    """error / size, 0 for 0 / 0 and inf for a non-zero error of nothing."""
    if size == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return error / size


@dataclass(frozen=True)
class Form:
    """How one module's keys are spelled in a file: `prefix` + name in `namespace` (dotted or flat) + leaf of `scheme`."""

    prefix: str
    spelling: str  # "dotted" | "flat" | "flat_" (a trailing underscore)
    namespace: str
    scheme: str


@dataclass(frozen=True)
class Entry:
    """A module of the file and the sites it serves.

    sites: one, or the parts of a fused module in row order; rows: output rows of each part when there are several
    swapped: stored with its two row halves exchanged against the sites' own order
    name: the module's name in `form.namespace`; keys: role → the tensor's key in the file
    """

    sites: tuple[Site, ...]
    module: Module
    rows: tuple[int, ...] = ()
    swapped: bool = False
    name: str = ""
    form: Form | None = None
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def component(self) -> str:
        return self.sites[0].component

    def parts(self) -> Iterator[tuple[Site, Module]]:
        """(site, module) at the finest split, in the sites' own row order; absent parts are left out. Raises NotExact."""
        module = self.module.swap_halves() if self.swapped else self.module
        if len(self.sites) == 1:
            yield self.sites[0], module
            return
        if len(self.rows) != len(self.sites):
            raise NotExact(f"the widths of the parts of {self.name} are unknown")
        for site, part in zip(self.sites, module.split(self.rows), strict=True):
            if part is not None:
                yield site, part


@dataclass(frozen=True)
class Adapter:
    """A whole adapter file: its entries in the file's order, and everything needed to write it back as it was.

    residue: tensors that belong to no module (unknown keys, bundled embeddings), by their own key
    metadata: the header's entries in the header's order; config: adapter_config.json of a PEFT folder
    dims: component → the widths solved from the file's shapes (symbols of its table); order: all keys as the file lists them
    """

    architecture: str
    dialect: str
    entries: tuple[Entry, ...]
    variant: str | None = None
    residue: Mapping[str, LazyTensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    dims: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    path: Path | None = None

    @cached_property
    def modules(self) -> dict[Site, tuple[Module, ...]]:
        """Every site with its modules at the finest split (more than one where a file adds two kinds at one site)."""
        found: dict[Site, tuple[Module, ...]] = {}
        for entry in self.entries:
            for site, module in entry.parts():
                found[site] = (*found.get(site, ()), module)
        return found

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(entry.component for entry in self.entries))

    def delta(self, site: Site, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Dense ΔW of one site in float64. Raises KeyError for a site without a module, NotExact where W is needed."""
        deltas = [module.delta(weight) for module in self.modules[site]]
        return sum(deltas[1:], start=deltas[0])

    def replace(self, **changes: Any) -> Adapter:
        return replace(self, **changes)

"""The tensors a merge makes, described before any of them is computed: summed, cast, or new scales beside codes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from loratools.errors import UnsupportedError
from loratools.operations.merging.arithmetic import MergedTensor
from loratools.operations.merging.placing import Region
from loratools.operations.merging.plan import FLOATS, MergePlan
from loratools.operations.merging.storage import Rounding, ScaledStorage, Storage
from loratools.tensors.lazy import LazyTensor


@dataclass
class Work:
    """tensors: those the adapters change; replaced and added: as the writer takes them; nbytes: of everything that will be written."""

    tensors: dict[str, MergedTensor] = field(default_factory=dict)
    replaced: dict[str, LazyTensor] = field(default_factory=dict)
    added: dict[str, tuple[Path, LazyTensor]] = field(default_factory=dict)
    cast: list[str] = field(default_factory=list)  # of the unchanged ones, those whose dtype alone is another
    nbytes: int = 0

    @property
    def made(self) -> dict[str, LazyTensor]:
        """Every tensor that is not the base's own."""
        return {**self.replaced, **{key: tensor for key, (_, tensor) in self.added.items()}}


def work_of(plan: MergePlan, dtype: str | None, rounding: Rounding) -> Work:
    """Everything that will differ from the base. Raises UnsupportedError where `dtype` would take codes out of their scales."""
    if plan.scaled and dtype is not None:
        told = "--dtype: the weights are fp8 codes with scales, which would have to be taken out"
        raise UnsupportedError(told, details=list(plan.scaled)[:8], fix="leave out --dtype")
    work, source = Work(), plan.source.tensors
    for key, regions in plan.placement.regions.items():
        _sum(plan, work, key, regions, dtype, rounding)
    for key, tensor in _casts(plan, work, dtype, rounding) if dtype is not None else ():
        work.replaced[key] = tensor
        work.cast.append(key)
    grown = sum(tensor.nbytes - source[key].nbytes for key, tensor in work.replaced.items())
    work.nbytes = plan.layout.nbytes + grown + sum(tensor.nbytes for _, tensor in work.added.values())
    return work


def _sum(plan: MergePlan, work: Work, key: str, regions: list[Region], dtype: str | None, rounding: Rounding) -> None:
    """Enter a tensor the adapters change; a head that is untied starts from the embedding it was."""
    source = plan.source.tensors
    base = plan.base_of(regions[0]) if regions else plan.any_base
    stored = key if key in source else (base.embedding or key)
    storage: Storage
    if stored in plan.scaled:
        scaled = plan.scaled[stored]
        storage = ScaledStorage(key, source[stored], scaled, source[scaled.scale], rounding)
        work.replaced[scaled.scale] = storage.scale_tensor
    else:
        wanted = dtype if dtype is not None and source[stored].dtype in FLOATS else source[stored].dtype
        storage = Storage(key, source[stored], wanted, plan.placement.grown.get(key, source[stored].shape), rounding)
    work.tensors[key] = tensor = MergedTensor(key, storage, regions, base)
    if key in source:
        work.replaced[key] = tensor
    else:
        work.added[key] = (plan.layout.weights[plan.source.file_of[stored]], tensor)


def _casts(plan: MergePlan, work: Work, dtype: str, rounding: Rounding) -> Iterator[tuple[str, MergedTensor]]:
    """What no adapter changes and only another dtype is asked of."""
    for key, plain in plan.source.tensors.items():
        if key not in work.replaced and plain.dtype in FLOATS and plain.dtype != dtype:
            yield key, MergedTensor(key, Storage(key, plain, dtype, plain.shape, rounding), [], plan.any_base)

"""Before a merge: everything that headers can tell about base, adapters and output, with all problems at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from loratools.adapters.adapter import Site
from loratools.errors import InputError, LoraToolsError, OutputExistsError, UnsupportedError, UsageError, counted, worst
from loratools.mapping.bases import Base
from loratools.mapping.checkpoints import identify
from loratools.mapping.selection import Selection
from loratools.operations.inputs import adapter_as_base
from loratools.operations.merging.placing import Given, Placement, Region, place_all
from loratools.operations.merging.reading import read_given
from loratools.operations.merging.untying import Edits, json_object, language_edits, missing_tokens
from loratools.tensors.layout import Layout, layout_of
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.quantised import scaled_weights, unsupported
from loratools.tensors.reader import open_source
from loratools.tensors.scaled import ScaledTensor, ScaledWeight
from loratools.tensors.source import TensorSource
from loratools.tensors.writer import output_problems

FLOATS = ("F64", "F32", "F16", "BF16")
EIGHT_BIT = ("F8_E4M3", "F8_E5M2")


@dataclass
class MergePlan:
    """What will be merged where.

    given: in the order of summation; config, settings: the base's config.json and what it says, None for a base without one;
    scaled: weights that are stored as codes with a scale.
    """

    source: TensorSource
    given: list[Given]
    bases: dict[str, Base]
    selection: Selection
    placement: Placement
    layout: Layout
    config: Path | None
    settings: dict[str, Any] | None
    scaled: dict[str, ScaledWeight]
    edits: Edits = field(default_factory=Edits)
    warnings: list[str] = field(default_factory=list)

    @property
    def any_base(self) -> Base:
        return next(iter(self.bases.values()))

    def base_of(self, region: Region) -> Base:
        """The base as the first adapter of a region names it (all that meet at a region name it alike)."""
        return next((self.bases[term.given.architecture.name] for term in region.terms), self.any_base)


def prepare(
    base: Path,
    adapters: Sequence[tuple[Path, float]],
    output: Path,
    *,
    selection: Selection,
    arch: str | None = None,
    alpha: float | None = None,
    force: bool = False,
    beside: Sequence[Path] = (),
) -> MergePlan:
    """Check everything that can be checked from headers. beside: further outputs (a residual, a report).

    Raises one error that lists every problem; its code is the first of 3, 2 and 1 among them.
    """
    inputs = [base, *(path for path, _ in adapters)]
    problems = [problem for path in beside for problem in output_problems(path, inputs, force=force)]
    problems += _beside_problems(base, output, beside)
    try:
        source = open_source(base)
        layout = layout_of(source)
        config = config_of(source)
        settings = None if config is None else json_object(config)
        scaled = scaled_weights(source.tensors, settings, source.metadata)
    except LoraToolsError as error:
        raise worst([error, *problems, *output_problems(output, inputs, force=force)]) from error
    misplaced = adapter_as_base(source, [path for path, _ in adapters])
    if misplaced is not None:
        raise worst([misplaced, *problems, *output_problems(output, inputs, force=force)])
    guess = identify({name: tensor.shape for name, tensor in source.tensors.items()})
    given, wrong = read_given(adapters, source, guess, arch, alpha)
    inputs += [*source.files, *(file for one in given for file in one.files)]
    problems += [*wrong, *output_problems(output, inputs, force=force, nbytes=layout.nbytes), *_form_problems(output, layout)]
    if not given:
        raise worst(problems)
    bases = _bases(source, given, settings, scaled)
    plan = MergePlan(source, given, bases, selection, place_all(given, bases, selection), layout, config, settings, scaled)
    problems += _placing_problems(plan)
    if problems:
        raise worst(problems)
    plan.warnings = _warnings(plan)
    return plan


def _bases(
    source: TensorSource, given: Sequence[Given], settings: Mapping[str, Any] | None, scaled: Mapping[str, ScaledWeight]
) -> dict[str, Base]:
    """The base as each architecture of the adapters names it; what is stored with a scale is seen as its values."""
    values: dict[str, LazyTensor] = {
        key: ScaledTensor(source.tensors[key], one, source.tensors[one.scale]) for key, one in scaled.items()
    }
    model_type = str(settings["model_type"]) if settings and settings.get("model_type") else None
    return {one.architecture.name: Base(source, one.architecture, values, model_type) for one in given}


def _placing_problems(plan: MergePlan) -> list[LoraToolsError]:
    """What stands against the places that were found, and against what has to follow from them."""
    problems: list[LoraToolsError] = []
    beside_modules = [key for one in plan.given for key in one.beside]
    on_sites = tuple(glob for glob in plan.selection.exclude if not any(fnmatchcase(key, glob) for key in beside_modules))
    for name, opened in plan.bases.items():
        problems += replace(plan.selection, exclude=on_sites).problems(_sites(plan.given, name), opened.architecture)
    _place_beside(plan.given, plan.selection, plan.placement)
    plan.edits = _language(plan)
    problems += _quantised(plan) or _unmatched(plan)
    return problems + _collected(plan.placement.problems + plan.edits.problems, plan.source.path)


def _place_beside(given: Sequence[Given], selection: Selection, placement: Placement) -> None:
    """Tensors of no module (bundled embeddings, unknown keys) find no weight either; --exclude leaves them out by their own name."""
    for one in given:
        for key, why in one.beside.items():
            if any(fnmatchcase(key, glob) for glob in selection.exclude):
                placement.left_out.append(f"{one.name}: {key} is left out")
            else:
                placement.unmatched.append(f"{one.name}: {why}")


def _sites(given: Sequence[Given], architecture: str) -> dict[str, set[Site]]:
    """File name → sites, of the adapters of one architecture."""
    found: dict[str, set[Site]] = {}
    for one in given:
        if one.architecture.name == architecture:
            found.setdefault(one.name, set()).update(site for entry in one.adapter.entries for site in entry.sites)
    return found


def _form_problems(output: Path, layout: Layout) -> list[LoraToolsError]:
    """A folder asked for where the base is a file, or the other way round; a name that promises another container."""
    if layout.folder and output.suffix in (".safetensors", ".ckpt", ".pt", ".bin"):
        return [UsageError(f"{output}: the base is a folder, so the output is one", fix=f"loratools merge … {output.with_suffix('')}")]
    if not layout.folder and output.is_dir():
        return [UsageError(f"{output}: is a folder, the base is a file", fix=f"loratools merge … {output / layout.source.path.name}")]
    if not layout.folder and output.suffix in (".ckpt", ".pt", ".bin"):
        fix = f"loratools merge … {output.with_suffix('.safetensors')}"
        return [UsageError(f"{output}: only safetensors is written, never a pickle", fix=fix)]
    return []


def _beside_problems(base: Path, output: Path, beside: Sequence[Path]) -> list[LoraToolsError]:
    """Outputs under one name, and an output inside the base: the next merge would take it for a part of it."""
    names = [os.path.realpath(path) for path in (output, *beside)]
    found: list[LoraToolsError] = []
    if len(set(names)) < len(names):
        found.append(UsageError(f"{', '.join(map(str, (output, *beside)))}: two outputs under one name", fix="give each a name of its own"))
    if base.is_dir() and any(Path(os.path.realpath(base)) in Path(name).parents for name in names):
        found.append(OutputExistsError(f"{output}: lies inside the base {base}, which would change it", fix="write it beside the base"))
    return found


def config_of(source: TensorSource) -> Path | None:
    """The config.json of a model folder (not of a pipeline)."""
    folder = source.path if source.path.is_dir() else source.path.parent
    path = folder / "config.json"
    return path if (source.path.is_dir() or source.container == "shards") and path.is_file() else None


def _language(plan: MergePlan) -> Edits:
    """Tied heads and vocabularies, for the bases that are language models; elsewhere a weight may grow only in a file of its own."""
    edits, grown = Edits(), plan.placement.grown
    for base in plan.bases.values():
        if not base.architecture.open_names:
            if grown and base.source.path.is_dir():
                edits.problems += [f"{key}: the adapter widens it to {list(shape)}, which the folder's configuration does not allow"
                                   for key, shape in grown.items()]  # fmt: skip
            continue
        edits = language_edits(plan.placement, base, plan.settings)
        if base.embedding is not None:
            rows = grown.get(base.embedding, base.tensors[base.embedding].shape)[0]
            for one in plan.given:
                lacking = missing_tokens(one.path, rows) if one.path.is_dir() else 0
                if lacking:
                    edits.problems.append(f"{one.name}: its tokenizer has {lacking} tokens for which neither base nor adapter has a row")
    return edits


def _unmatched(plan: MergePlan) -> list[LoraToolsError]:
    found = plan.placement.unmatched
    if not found:
        return []
    told = f"{counted(len(found), 'tensor')} of the adapters found no weight in {plan.source.path.name}"
    parts = sorted({component for one in plan.given for component in one.adapter.components})
    alone = f"--component {parts[0]} merges that part alone; " if len(parts) > 1 else ""
    fix = f"{alone}--exclude GLOB leaves sites, or tensors of no module, out by name"
    return [InputError(told, details=found, fix=fix)]


def _collected(messages: Sequence[str], base: Path) -> list[LoraToolsError]:
    if not messages:
        return []
    told = f"{counted(len(messages), 'module')} cannot be merged into {base.name}"
    return [InputError(told, details=list(messages), fix="--exclude GLOB leaves these sites out by name")]


def _quantised(plan: MergePlan) -> list[LoraToolsError]:
    """Weights that are codes nothing here can read: named with their kind."""
    source, placement = plan.source, plan.placement
    known = unsupported(source.tensors, plan.settings, source.metadata)
    found = []
    for stored in [*(regions[0].place.key if regions else key for key, regions in placement.regions.items()), *placement.misfits]:
        kind = known.get(stored) or known.get(stored.rpartition(".")[0])
        if kind is None and stored in source.tensors and source.tensors[stored].dtype not in (*FLOATS, *EIGHT_BIT):
            kind = f"dtype {source.tensors[stored].dtype}"
        if kind is not None:
            found.append(f"{stored}: {kind}")
    if placement.unmatched and not found:  # packed codes do not even have the weight's name
        found = [f"{name}: {kind}" for name, kind in known.items()]
    if not found:
        return []
    told = f"{source.path.name}: {counted(len(found), 'weight')} quantised in a way that cannot be merged into"
    return [UnsupportedError(told, details=found, fix="merge into the 16-bit model, then quantise it again")]


def _warnings(plan: MergePlan) -> list[str]:
    """What is no problem, yet should be known: told by the adapters, by the layout, by the selection."""
    notes = [warning for one in plan.given for warning in one.warnings]
    notes += [f"{path}: left out, {reason}" for path, reason in plan.layout.left_out]
    notes += plan.placement.left_out
    copies = sum(name.startswith("model_ema.") for name in plan.source.tensors)
    if copies:
        notes.append(f"model_ema.*: {copies} tensors are a second copy of the weights, a merge leaves them as they are")
    for name, base in plan.bases.items():
        for adapter, silent in plan.selection.silent(_sites(plan.given, name), base.architecture).items():
            notes.append(f"{adapter}: {counted(len(silent), 'site')} of weight 0: the list of block weights has no number for their blocks")
    for count, why in (
        (plan.placement.passed_over, "left out by the selection"),
        (plan.placement.silent, "of weight 0: they change nothing"),
    ):
        if count:
            notes.append(f"{counted(count, 'module')} {why}")
    return notes + plan.edits.notes

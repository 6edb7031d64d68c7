"""Before a merge: everything that headers can tell about base, adapters and output, with all problems at once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from loratools.adapters.adapter import Site
from loratools.errors import AmbiguousError, InputError, LoraToolsError, OutputExistsError, UnsupportedError, UsageError, worst
from loratools.mapping import peft_config
from loratools.mapping.bases import Base
from loratools.mapping.checkpoints import CheckpointGuess, identify
from loratools.mapping.read import analyse, checked, tables_of
from loratools.mapping.selection import Selection
from loratools.mapping.stems import REPEATED
from loratools.operations.inputs import needs_alpha
from loratools.operations.merging.lineage import file_digest
from loratools.operations.merging.placing import Given, Placement, Region, place_all
from loratools.operations.merging.untying import Edits, json_object, language_edits, missing_tokens
from loratools.tensors.layout import Layout, layout_of
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.quantised import ScaledTensor, scaled_weights, unsupported
from loratools.tensors.reader import open_source
from loratools.tensors.source import TensorSource
from loratools.tensors.writer import kept_aside, output_problems

FLOATS = ("F64", "F32", "F16", "BF16")
EIGHT_BIT = ("F8_E4M3", "F8_E5M2")
_QUANTISED = re.compile(
    r"(?i)bnb|[-_](?:4|8)-?bit|(?<![a-z])int[48]\b|gptq|awq|nf4|qlora|fp8|gguf|hqq|exl2|mxfp4|w[48]a\d+|[-_.]q[2-8]_[k0-9]"
)
_BASE_NAMES = ("base_model_name_or_path", "base_model", "ss_sd_model_name", "ss_base_model")


@dataclass
class MergePlan:
    """What will be merged where. given: in the order of summation, which does not depend on the order of the arguments."""

    source: TensorSource
    given: list[Given]
    bases: dict[str, Base]
    selection: Selection
    placement: Placement
    layout: Layout
    edits: Edits
    config: Path | None
    warnings: list[str] = field(default_factory=list)

    def base_of(self, region: Region) -> Base:
        """The base as the first adapter of a region names it (all that meet at a region name it alike)."""
        return next((self.bases[term.given.architecture.name] for term in region.terms), next(iter(self.bases.values())))


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
    except LoraToolsError as error:
        raise worst([error, *problems, *output_problems(output, inputs, force=force)]) from error
    guess = identify({name: tensor.shape for name, tensor in source.tensors.items()})
    given: list[Given] = []
    settled = False
    for position, (path, weight) in enumerate(adapters):
        try:
            mine = alpha if alpha is not None and needs_alpha(path, arch, source) else None
            settled = settled or mine is not None
            given.append(_given(path, weight, position, source, guess, arch, mine))
            inputs += given[-1].files
        except LoraToolsError as error:
            problems.append(error)
    problems += output_problems(output, [*inputs, *source.files], force=force, nbytes=layout.nbytes)
    problems += _form_problems(output, layout)
    if alpha is not None and len(given) == len(adapters) and not settled:
        problems.append(UsageError("--alpha is for an adapter that records none; all of these record their own"))
    if not given:
        raise worst(problems)
    given.sort(key=lambda one: (one.digest, json.dumps(one.adapter.config, sort_keys=True, default=str), one.weight))
    config = _config_of(source)
    try:
        settings = settings_of(config)
        values = _values(source, config)
    except LoraToolsError as error:
        raise worst([error, *problems]) from error
    model_type = str(settings["model_type"]) if settings and settings.get("model_type") else None
    bases = {one.architecture.name: Base(source, one.architecture, values, model_type) for one in given}
    problems += _residual_inits(given)
    beside_modules = [key for one in given for key in one.beside]
    on_sites = tuple(glob for glob in selection.exclude if not any(fnmatchcase(key, glob) for key in beside_modules))
    for name, opened in bases.items():
        problems += replace(selection, exclude=on_sites).problems(_sites(given, name), opened.architecture)
    placement = place_all(given, bases, selection)
    _place_beside(given, selection, placement)
    edits = _language(placement, bases, given, config)
    problems += _quantised(source, placement, config) or _unmatched(placement, base, given)
    problems += _collected(placement.problems + edits.problems, base)
    if problems:
        raise worst(problems)
    plan = MergePlan(source, given, bases, selection, placement, layout, edits, config)
    plan.warnings = [*(warning for one in given for warning in one.warnings), *_notes(plan), *edits.notes]
    kept = kept_aside(output, {*layout.weights.values(), *layout.indexes.values(), *layout.copies}) if layout.folder else None
    if kept is not None:
        plan.warnings.append(f"{output} holds files that the new folder does not have: the old one is kept as {kept.name}")
    return plan


def _given(
    path: Path, weight: float, position: int, base: TensorSource, guess: CheckpointGuess, arch: str | None, alpha: float | None
) -> Given:
    """Read one adapter; where its keys leave the architecture open, the base settles it."""
    opened = open_source(path)
    reading = analyse(opened, arch=arch, alpha=alpha, base=base)
    only_unknown = all(finding.code == "unknown-key" for finding in reading.errors)
    try:
        adapter = checked(reading, allow_unknown=only_unknown)  # told with everything else that finds no weight
    except AmbiguousError:
        raise
    except InputError as error:
        error.fix = f"loratools inspect {path}"  # what reading advises are options of convert
        raise
    architecture = tables_of(reading)
    names = {candidate.name for candidate, _, _ in guess.candidates}
    known = guess.layout == "hf" or bool(names)
    fits = architecture.name in names or (architecture.open_names and guess.layout == "hf") or not _registered(architecture.name)
    if known and not fits:
        found = " or ".join(sorted(names)) or "a language model"
        raise InputError(f"{path.name} is an adapter for {architecture.published}, {base.path.name} is {found}")
    companions = reading.detection.stems.companions
    repeated = [key for key in adapter.residue if companions.get(key) in REPEATED]
    beside = {key: f"{key}: belongs to no module" for key in adapter.residue if key not in repeated}
    beside |= {str(found.site): found.message for found in reading.findings if found.code == "unknown-key"}
    warnings = [f"{path.name}: {found.message}" for found in reading.findings if found.severity == "warning" and found.code != "companion"]
    warnings += [f"{path.name}: {key}: {companions[key]}, not merged" for key in repeated]
    warnings += _quantised_base(path, adapter.config or {}, adapter.metadata)
    return Given(path, weight, adapter, architecture, file_digest(opened), position, tuple(warnings), tuple(opened.files), beside)


def _values(source: TensorSource, config: Path | None) -> dict[str, LazyTensor]:
    """The weights that are stored as codes with a scale, as values: what kinds that multiply the weight have to see."""
    settings = settings_of(config)
    found = scaled_weights(source.tensors, settings, source.metadata)
    return {key: ScaledTensor(source.tensors[key], scaled, source.tensors[scaled.scale]) for key, scaled in found.items()}


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


def _registered(name: str) -> bool:
    from loratools.mapping.architectures import registry

    return name in registry()


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


def _residual_inits(given: Sequence[Given]) -> list[LoraToolsError]:
    """PiSSA and its like fit the base they changed: on the original one they need their initial adapter taken away again."""
    changed = [one for one in given if peft_config.residual_init(one.adapter.config or {})]
    if sum(one.weight for one in changed) == 0.0:
        return []
    fix = "give its initial adapter with the opposite weight (TUNED INITIAL:-1), or convert it with PEFT to a plain LoRA"
    return [
        UnsupportedError(
            f"{one.name}: {peft_config.residual_init(one.adapter.config or {})} changed the base it was trained on: "
            "on the original base its delta is wrong",
            fix=fix,
        )
        for one in changed
    ]


def settings_of(config: Path | None) -> dict[str, Any] | None:
    """The object in a config.json (which may hold Infinity, so it is no strict JSON). Raises MalformedError naming the file."""
    return None if config is None else json_object(config)


def _config_of(source: TensorSource) -> Path | None:
    """The config.json of a model folder (not of a pipeline)."""
    folder = source.path if source.path.is_dir() else source.path.parent
    path = folder / "config.json"
    return path if (source.path.is_dir() or source.container == "shards") and path.is_file() else None


def _language(placement: Placement, bases: Mapping[str, Base], given: Sequence[Given], config: Path | None) -> Edits:
    """Tied heads and vocabularies, for the bases that are language models; elsewhere a weight may grow only in a file of its own."""
    edits = Edits()
    settings = settings_of(config)
    for base in bases.values():
        if not base.architecture.open_names:
            if placement.grown and base.source.path.is_dir():
                edits.problems += [f"{key}: the adapter widens it to {list(shape)}, which the folder's configuration does not allow"
                                   for key, shape in placement.grown.items()]  # fmt: skip
            continue
        edits = language_edits(placement, base, settings)
        if base.embedding is not None:
            rows = placement.grown.get(base.embedding, base.tensors[base.embedding].shape)[0]
            for one in given:
                lacking = missing_tokens(one.path, rows) if one.path.is_dir() else 0
                if lacking:
                    edits.problems.append(f"{one.name}: its tokenizer has {lacking} tokens for which neither base nor adapter has a row")
    return edits


def _unmatched(placement: Placement, base: Path, given: Sequence[Given]) -> list[LoraToolsError]:
    if not placement.unmatched:
        return []
    count = len(placement.unmatched)
    told = f"{count} tensor{'s' * (count > 1)} of the adapters find no weight in {base.name}"
    parts = sorted({component for one in given for component in one.adapter.components})
    alone = f"--component {parts[0]} merges that part alone; " if len(parts) > 1 else ""
    fix = f"{alone}--exclude GLOB leaves sites, or tensors of no module, out by name"
    return [InputError(told, details=placement.unmatched, fix=fix)]


def _collected(messages: Sequence[str], base: Path) -> list[LoraToolsError]:
    if not messages:
        return []
    return [InputError(f"{len(messages)} module{'s' * (len(messages) > 1)} cannot be merged into {base.name}", details=list(messages))]


def _quantised(source: TensorSource, placement: Placement, config: Path | None) -> list[LoraToolsError]:
    """Weights that are codes nothing here can read: named with their kind."""
    settings = settings_of(config)
    known = unsupported(source.tensors, settings, source.metadata)
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
    told = f"{len(found)} weights of {source.path.name} are quantised in a way that cannot be merged into"
    return [UnsupportedError(told, details=found, fix="merge into the 16-bit model, then quantise it again")]


def _quantised_base(path: Path, config: Mapping[str, Any], metadata: Mapping[str, str]) -> list[str]:
    """A warning where the adapter was trained on a quantised base: the base it is merged into is not the one it has seen."""
    names = [str(source[key]) for source in (config, metadata) for key in _BASE_NAMES if source.get(key)]
    named = next((name for name in names if _QUANTISED.search(name)), None)
    if named is None and metadata.get("ss_fp8_base") != "True":
        return []
    told = Path(named).name if named else "a base in fp8"
    return [f"{path.name}: trained on {told}, a quantised base: merged into another it differs by what the quantisation took"]


def _notes(plan: MergePlan) -> list[str]:
    notes = [f"{path}: left out, {reason}" for path, reason in plan.layout.left_out]
    notes += plan.placement.left_out
    copies = sum(name.startswith("model_ema.") for name in plan.source.tensors)
    if copies:
        notes.append(f"model_ema.*: {copies} tensors are a second copy of the weights, a merge leaves them as they are")
    for name, base in plan.bases.items():
        for adapter, silent in plan.selection.silent(_sites(plan.given, name), base.architecture).items():
            notes.append(f"{adapter}: {len(silent)} sites get weight 0: the list of block weights has no number for their blocks")
    for count, why in (
        (plan.placement.passed_over, "left out by the selection"),
        (plan.placement.silent, "of weight 0: they change nothing"),
    ):
        if count:
            notes.append(f"{count} module{'s are' if count > 1 else ' is'} {why}")
    return notes

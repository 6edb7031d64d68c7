"""Before an extraction: what two models are, what of them belongs together, and everything that headers say against it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools.adapters.adapter import Adapter
from loratools.errors import InputError, LoraToolsError, UnsupportedError, counted, worst
from loratools.mapping.architectures import Architecture, registry
from loratools.mapping.bases import Base, architecture_of_base
from loratools.mapping.checkpoints import LANGUAGE_MODEL, CheckpointGuess, identify
from loratools.mapping.dialects import DIALECTS, dialect_named
from loratools.mapping.read import named_architecture
from loratools.mapping.selection import Selection
from loratools.operations.combining.request import form_problems
from loratools.operations.combining.units import Target
from loratools.operations.extracting.pairing import Pairing, Piece, pair
from loratools.operations.inputs import adapter_as_base
from loratools.operations.merging.plan import config_of
from loratools.operations.merging.untying import json_object, tied
from loratools.tensors.dtypes import dtype_named
from loratools.tensors.quantised import scaled_weights, unsupported
from loratools.tensors.reader import open_source
from loratools.tensors.scaled import ScaledTensor
from loratools.tensors.source import TensorSource
from loratools.tensors.writer import output_problems

_DIALECTS = {"diffusers": "diffusers", "hf": "peft"}  # layout of BASE → dialect of the output where none is named; kohya else
_FACTORS = ("F32", "F16", "BF16", "F64")  # dtypes factors are written in


@dataclass(frozen=True)
class Models:
    """Both models by site, and where the output goes."""

    base: Base
    tuned: Base
    target: Target
    one_layout: bool
    tied: bool  # language models whose head is their embedding


def open_models(base: Path, tuned: Path, arch: str | None, to: str | None, out: Path, force: bool) -> Models:
    """Open both and settle architecture and dialect. Raises one error that lists all that is wrong with the three paths."""
    problems: list[LoraToolsError] = []
    sources: list[TensorSource] = []
    for path in (base, tuned):
        try:
            sources.append(_model(path))
        except LoraToolsError as error:
            problems.append(error)
    inputs = [base, tuned, *(file for source in sources for file in source.files)]
    problems += output_problems(out, inputs, force=force)
    try:
        dialect = None if to is None else dialect_named(to)
    except LoraToolsError as error:
        problems.append(error)
    if problems:
        raise worst(problems)
    guesses = [identify({name: tensor.shape for name, tensor in source.tensors.items()}) for source in sources]
    architecture = _architecture(sources, guesses, arch)
    dialect = dialect or DIALECTS[_DIALECTS.get(guesses[0].layout, "kohya")]
    problems += form_problems(out, dialect)
    if not dialect.serves(architecture):
        others = [other.name for other in DIALECTS.values() if other.writable and other.serves(architecture)]
        told = f"{dialect.name} has no spelling for {architecture.title}"
        problems.append(UnsupportedError(told, fix=f"--to one of {', '.join(others)}"))
    if problems:
        raise worst(problems)
    before, after = (_seen(source, architecture) for source in sources)
    like = Adapter(architecture.name, dialect.name, (), variant=guesses[0].variant, dims=before.dims)
    target = Target.of(architecture, dialect, like, before.dims)
    one_layout = guesses[0].layout == guesses[1].layout and sources[0].container == sources[1].container
    shared = architecture.open_names and all(tied(one, _settings(one.source)) for one in (before, after))
    return Models(before, after, target, one_layout, shared)


def _model(path: Path) -> TensorSource:
    """An opened model. Raises InputError for an adapter, and for codes that nothing here can read."""
    source = open_source(path)
    misplaced = adapter_as_base(source)
    if misplaced is not None:
        raise InputError(f"{path}: an adapter, and no model", fix="loratools extract BASE TUNED OUT takes two models")
    unknown = unsupported(source.tensors, _settings(source), source.metadata)
    if unknown:
        details = [f"{name}: {kind}" for name, kind in unknown.items()]
        told = f"{path}: {counted(len(unknown), 'weight')} quantised in a way that cannot be read"
        raise UnsupportedError(told, details=details, fix="extract from the models in 16 bits or more")
    return source


def _settings(source: TensorSource) -> dict[str, Any] | None:
    config = config_of(source)
    return None if config is None else json_object(config)


def _seen(source: TensorSource, architecture: Architecture) -> Base:
    """The model by site, codes with a scale as their values."""
    settings = _settings(source)
    scaled = scaled_weights(source.tensors, settings, source.metadata)
    values = {key: ScaledTensor(source.tensors[key], one, source.tensors[one.scale]) for key, one in scaled.items()}
    model_type = str(settings["model_type"]) if settings and settings.get("model_type") else None
    return Base(source, architecture, values, model_type, frozenset(one.scale for one in scaled.values()))


def _architecture(sources: Sequence[TensorSource], guesses: Sequence[CheckpointGuess], arch: str | None) -> Architecture:
    """What both models are: as told, as recognised, else a table of BASE's own module names."""
    if arch is not None:
        return named_architecture(arch)
    found = [_names(guess) for guess in guesses]
    if not any(found):
        return architecture_of_base(sources[0])
    common = [name for name in found[0] if name in found[1]]
    if not common:
        told = [f"{source.path.name} is {' or '.join(names) or 'not recognised'}" for source, names in zip(sources, found, strict=True)]
        raise InputError("; ".join(told) + ": nothing can be extracted from models of two architectures")
    return registry()[common[0]]


def _names(guess: CheckpointGuess) -> list[str]:
    return [LANGUAGE_MODEL] if guess.layout == "hf" else [architecture.name for architecture, _, _ in guess.candidates]


def paired(models: Models, selection: Selection) -> Pairing:
    """All tensors of both models, paired. Raises one error with every shape and every tensor that stands alone."""
    found = pair(models.base, models.tuned, models.target, selection, one_layout=models.one_layout, tied=models.tied)
    sites = {site for piece in found.pieces for site in piece.sites} | {site for site, _, _ in models.tuned.sites()}
    problems = selection.problems({models.tuned.source.path.name: sites}, models.target.architecture)
    if found.problems:
        told = f"{counted(len(found.problems), 'tensor')} that BASE and TUNED do not share, or not in one shape"
        problems.append(InputError(told, details=found.problems, fix="--exclude GLOB leaves such sites out by name"))
    if not found.pieces and not problems:
        problems.append(InputError("BASE and TUNED have no module in common", details=[f"{name}: {why}" for name, why in found.skipped]))
    if problems:
        raise worst(problems)
    return found


def named(found: Pairing, models: Models, extras: bool) -> None:
    """Refuse what differs and has no name in the output's dialect, before the work and not after it; reads those tensors alone.

    extras: are changed biases, norms and bare parameters kept? Raises UnsupportedError listing every such site.
    """
    dialect = models.target.dialect
    if models.target.architecture.open_names:
        return
    dense = extras and "dense" in dialect.holds
    told = [
        f"{piece.name}: {dialect.name} has no name for it"
        for piece in found.pieces
        if piece.row is None and any(not twin.same() for twin in piece.twins if dense or (piece.low_rank and twin is piece.weight))
    ]
    if told:
        fix = "--component or --exclude leaves them out; loratools formats shows what each dialect holds"
        raise UnsupportedError(f"{counted(len(told), 'module')} cannot be written as {dialect.name}", details=told, fix=fix)


def dtype_of(pieces: Sequence[Piece], asked: str | None) -> str:
    """The dtype of the factors: as asked for, else that of most of BASE's weights; bfloat16 where those are narrower than 16 bits."""
    if asked is not None:
        return str(dtype_named(asked))
    counts = Counter(piece.weight.before.dtype for piece in pieces if piece.weight is not None)
    most = counts.most_common(1)[0][0] if counts else "F32"
    return most if most in _FACTORS else "BF16"

"""The adapters of a merge, read with the base beside them: where their keys leave the architecture open, the base settles it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loratools.errors import AmbiguousError, InputError, LoraToolsError, UnsupportedError, UsageError
from loratools.mapping import peft_config
from loratools.mapping.architectures import registry
from loratools.mapping.checkpoints import CheckpointGuess
from loratools.mapping.read import analyse, checked, tables_of
from loratools.mapping.stems import REPEATED
from loratools.operations.inputs import needs_alpha
from loratools.operations.merging.lineage import file_digest
from loratools.operations.merging.placing import Given
from loratools.tensors.reader import open_source
from loratools.tensors.source import TensorSource

_QUANTISED = re.compile(
    r"(?i)bnb|[-_](?:4|8)-?bit|(?<![a-z])int[48]\b|gptq|awq|nf4|qlora|fp8|gguf|hqq|exl2|mxfp4|w[48]a\d+|[-_.]q[2-8]_[k0-9]"
)
_BASE_NAMES = ("base_model_name_or_path", "base_model", "ss_sd_model_name", "ss_base_model")


def read_given(
    adapters: Sequence[tuple[Path, float]], base: TensorSource, guess: CheckpointGuess, arch: str | None, alpha: float | None
) -> tuple[list[Given], list[LoraToolsError]]:
    """The adapters in the order of summation, which does not depend on the order of the arguments, and what is wrong with them."""
    given: list[Given] = []
    problems: list[LoraToolsError] = []
    settled = False
    for position, (path, weight) in enumerate(adapters):
        try:
            mine = alpha if alpha is not None and needs_alpha(path, arch, base) else None
            settled = settled or mine is not None
            given.append(_given(path, weight, position, base, guess, arch, mine))
        except LoraToolsError as error:
            problems.append(error)
    if alpha is not None and len(given) == len(adapters) and not settled:
        problems.append(UsageError("--alpha is for an adapter that records none; all of these record their own"))
    given.sort(key=lambda one: (one.digest, json.dumps(one.adapter.config, sort_keys=True, default=str), one.weight, one.name))
    return given, problems + _residual_inits(given)


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
        if error.fix is None or "--alpha" not in error.fix:
            error.fix = f"loratools inspect {path}"  # what reading advises else are options of convert
        raise
    architecture = tables_of(reading)
    names = {candidate.name for candidate, _, _ in guess.candidates}
    known = guess.layout == "hf" or bool(names)
    fits = architecture.name in names or (architecture.open_names and guess.layout == "hf") or architecture.name not in registry()
    if known and not fits:
        found = " or ".join(sorted(names)) or "a language model"
        fix = f"merge it into a base of {architecture.published}"
        raise InputError(f"{path.name} is an adapter for {architecture.published}, {base.path.name} is {found}", fix=fix)
    companions = reading.detection.stems.companions
    repeated = [key for key in adapter.residue if companions.get(key) in REPEATED]
    beside = {key: f"{key}: belongs to no module" for key in adapter.residue if key not in repeated}
    beside |= {str(found.site): found.message for found in reading.findings if found.code == "unknown-key"}
    warnings = [f"{path.name}: {found.message}" for found in reading.findings if found.severity == "warning" and found.code != "companion"]
    warnings += [f"{path.name}: {key}: {companions[key]}, not merged" for key in repeated]
    warnings += _quantised_base(path, adapter.config or {}, adapter.metadata)
    return Given(path, weight, adapter, architecture, file_digest(opened), position, tuple(warnings), tuple(opened.files), beside)


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


def _quantised_base(path: Path, config: Mapping[str, Any], metadata: Mapping[str, str]) -> list[str]:
    """A warning where the adapter was trained on a quantised base: the base it is merged into is not the one it has seen."""
    names = [str(source[key]) for source in (config, metadata) for key in _BASE_NAMES if source.get(key)]
    named = next((name for name in names if _QUANTISED.search(name)), None)
    if named is None and metadata.get("ss_fp8_base") != "True":
        return []
    told = Path(named).name if named else "a base in fp8"
    return [f"{path.name}: trained on {told}, a quantised base: merged into another it differs by what the quantisation took"]

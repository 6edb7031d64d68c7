"""Folders that hold weights: PEFT adapters, diffusers models and pipelines, transformers models.

Which files a folder is made of is decided from its listing and its configuration, before a weights file is opened.
Where two readings are possible (shards beside a single file, several adapters) the user is asked, never guessed for.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools.errors import AmbiguousError, InputError, MalformedError, UnsafeError
from loratools.report import Finding
from loratools.tensors.header import open_bytes, printable
from loratools.tensors.index import check_members, is_index, leaves_folder, list_folder, open_index
from loratools.tensors.source import TensorSource, open_payload, read_json

ADAPTER_CONFIG, PIPELINE_INDEX = "adapter_config.json", "model_index.json"
COMPONENTS = frozenset(
    ["unet", "transformer", "transformer_2", "prior", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4"]
)
_STEMS = (
    "adapter_model",  # PEFT
    "diffusion_pytorch_model",  # diffusers
    "model",  # transformers, accelerate
    "pytorch_model",  # transformers before safetensors
    "pytorch_lora_weights",  # diffusers, an adapter
)
_WEIGHTS = re.compile(
    rf"(?P<stem>{'|'.join(_STEMS)})(\.(?P<variant>\w+))?\.(?P<kind>safetensors|bin)(?P<index>\.index(\.(?P<index_variant>\w+))?\.json)?"
)
_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.(safetensors|bin)")


@dataclass(frozen=True, order=True)
class _Candidate:
    """A way to read a folder; the smallest is the best: safetensors first, then by stem, then without a variant."""

    kind: int
    stem: int
    variant: str
    is_index: bool
    name: str


def open_folder(folder: Path, root: Path | None = None) -> TensorSource:
    """A folder as one source. Raises InputError (nothing to open), AmbiguousError, MalformedError, UnsafeError."""
    root = root or folder
    names = list_folder(folder)
    if ADAPTER_CONFIG in names:
        return _open_peft(folder, names, root)
    if PIPELINE_INDEX in names:
        return _open_pipeline(folder, names, root)
    name, warnings = choose_weights(folder, names)
    if name is None:
        return _open_peft_components(folder, names, root)
    source = _open_member(folder, name, root)
    if "config.json" in names and _is_diffusers(folder / "config.json", warnings, root):
        source.container = "diffusers"
    source.path = folder
    source.warnings += warnings
    return source


def choose_weights(folder: Path, names: set[str]) -> tuple[str | None, list[Finding]]:
    """The weights file or index to read of a folder, None when it has none; findings for what was passed over."""
    found = sorted(filter(None, (_candidate(name) for name in names)))
    if not found:
        return _choose_unnamed(folder, names), []
    best = found[0]
    rivals = [other for other in found[1:] if (other.kind, other.stem) == (best.kind, best.stem)]
    same = [other.name for other in rivals if other.variant == best.variant]
    if same:
        raise AmbiguousError(
            f"{folder}: holds shards and a single file side by side: {best.name} and {', '.join(same)}",
            fix="give the path of the one you mean, or move the other away",
        )
    if best.variant and rivals:
        choices = ", ".join(other.name for other in [best, *rivals])
        raise AmbiguousError(f"{folder}: several variants, none of them the plain one: {choices}", fix="give the path of the one you mean")
    return best.name, [_passed_over(best, other) for other in found[1:]]


def _candidate(name: str) -> _Candidate | None:
    match = _WEIGHTS.fullmatch(name)
    if not match:
        return None
    variant = match["variant"] or match["index_variant"] or ""
    return _Candidate(("safetensors", "bin").index(match["kind"]), _STEMS.index(match["stem"]), variant, match["index"] is not None, name)


def _passed_over(best: _Candidate, other: _Candidate) -> Finding:
    reason = "variant" if other.variant != best.variant else "second-container"
    return Finding("warning", reason, None, f"{best.name} was read, {other.name} beside it was not")


def _choose_unnamed(folder: Path, names: set[str]) -> str | None:
    """Weights under a name no library prescribes: taken when there is only one."""
    found = sorted(name for name in names if is_index(name)) or sorted(
        name for name in names if name.endswith(".safetensors") and (folder / name).is_file()
    )
    shards = [name for name in found if _SHARD.fullmatch(name)]
    if shards and len(shards) == len(found):
        told = f"{folder}: shards without their index ({shards[0]} …): *.index.json is missing"
        raise MalformedError(told, details=shards, fix="download the index beside them")
    if len(found) > 1:
        fix = f"give the path of the one you mean, or '{folder}/*.safetensors' for all of them"
        raise AmbiguousError(f"{folder}: holds {len(found)} weights files", details=found, fix=fix)
    return found[0] if found else None


def _open_member(folder: Path, name: str, root: Path) -> TensorSource:
    check_members(folder, [name], root)
    return open_index(folder / name, root) if is_index(name) else open_payload(folder / name)


def _open_peft(folder: Path, names: set[str], root: Path) -> TensorSource:
    """adapter_config.json beside adapter_model.safetensors, or .bin."""
    check_members(folder, [ADAPTER_CONFIG], root)
    config = read_json(folder / ADAPTER_CONFIG)
    name, warnings = choose_weights(folder, {name for name in names if name.startswith("adapter_model.")})
    if name is None:
        told = f"{folder}: {ADAPTER_CONFIG} without adapter_model.safetensors or adapter_model.bin"
        raise InputError(told, fix="download the weights into this folder")
    source = _open_member(folder, name, root)
    source.path, source.container, source.config = folder, "peft", config
    source.warnings += warnings
    return source


def _open_peft_components(folder: Path, names: set[str], root: Path) -> TensorSource:
    """One PEFT folder a component (unet/, text_encoder/ …), or one adapter saved under its name."""
    adapters = sorted(name for name in names if (folder / name / ADAPTER_CONFIG).is_file())
    if not adapters:
        raise InputError(
            f"{folder}: no weights found in this folder",
            details=[printable(name) for name in sorted(names)[:20]],
            fix="give a weights file, or a folder with adapter_config.json, model_index.json, *.index.json or one .safetensors file",
        )
    _refuse_linked(folder, adapters, root)
    strangers = [name for name in adapters if name not in COMPONENTS]
    if strangers and len(adapters) > 1:
        raise AmbiguousError(f"{folder}: holds several adapters", details=adapters, fix="give the folder of the one you mean")
    if strangers:
        source = _open_peft(folder / adapters[0], list_folder(folder / adapters[0]), root)
        source.path = folder
        return source
    source = TensorSource(folder, "peft")
    configs: dict[str, Any] = {}
    for name in adapters:
        part = _open_peft(folder / name, list_folder(folder / name), root)
        configs[name] = part.config
        source.add(part, f"{name}.")
    source.config = configs
    return source


def _open_pipeline(folder: Path, names: set[str], root: Path) -> TensorSource:
    """A diffusers pipeline: every component of model_index.json that has weights, as `<component>/<tensor>`."""
    check_members(folder, [PIPELINE_INDEX], root)
    listed = read_json(folder / PIPELINE_INDEX)
    components = [name for name, value in listed.items() if isinstance(value, list) and any(part is not None for part in value)]
    present = [name for name in components if name in names and (folder / name).is_dir()]
    _refuse_linked(folder, present, root)
    source = TensorSource(folder, "diffusers")
    for name in sorted(present):
        members = list_folder(folder / name)
        if any(_candidate(member) for member in members):
            source.add(open_folder(folder / name, root), f"{name}/")
    for name in sorted(set(components) - set(present)):
        message = f"{printable(name)} is in {PIPELINE_INDEX} but not in the folder"
        source.warnings.append(Finding("warning", "missing-component", name, message))
    if not source.files:
        details = sorted(map(printable, components))
        raise InputError(f"{folder}: {PIPELINE_INDEX} names no component with weights in this folder", details=details)
    return source


def _refuse_linked(folder: Path, names: list[str], root: Path) -> None:
    linked = [f"{printable(name)} is a link that leaves the folder" for name in names if leaves_folder(folder / name, root)]
    if linked:
        raise UnsafeError(f"{folder}: {linked[0]}", details=linked)


def _is_diffusers(path: Path, warnings: list[Finding], root: Path) -> bool:
    """True when config.json has a diffusers class. Not strict JSON: transformers configurations do hold Infinity."""
    check_members(path.parent, [path.name], root)
    file, size = open_bytes(path)
    try:
        config = json.loads(file.read(0, min(size, 1 << 24)))
    except (ValueError, RecursionError) as error:
        warnings.append(Finding("warning", "config-unreadable", None, f"{path}: not JSON: {error}"))
        return False
    return isinstance(config, dict) and "_class_name" in config

"""What the tests of `merge` share: the merge by hand under the names of every layout, and a look at files byte by byte.

    W' = W + Σ weight · alpha / rank · B A   in float64,   size = Σ |weight · alpha / rank| · |B| |A|

The names of the layouts are those of `fixtures.layouts`, which nothing in loratools knows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fixtures import adapters, checkpoints, layouts
from tests.operations.made import NAMES, parts, render
from tests.parity.merging import Factors

State = dict[str, torch.Tensor]
States = dict[str, State]

FLOATS = {name: dtype for dtype, name in NAMES.items() if dtype.is_floating_point}
HALF_STEP = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}  # of a number of size 1
SMALLEST = {"F64": 0.0, "F32": 0.0, "F16": 2.0**-25, "BF16": 0.0}  # half a step below the normal numbers


@dataclass(frozen=True)
class Change:
    """What adapters add to one model's tensors, by key: Σ of the terms, and Σ of their sizes."""

    delta: State
    size: State

    def under(self, rename: Callable[[State], State]) -> Change:
        """Under other names: both go the way the weights go."""
        return Change(rename(self.delta), rename(self.size))


# ------------------------------------------------------------------------------------------------------------------- by hand


def terms(one: adapters.Factors, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight · ΔW, its size) of one module, in float64."""
    absolute = replace(one, up=one.up.abs(), down=one.down.abs(), alpha=None if one.alpha is None else abs(one.alpha))
    return one.delta() * weight, absolute.delta() * abs(weight)


def changes(states: Mapping[str, State], given: Sequence[tuple[Factors, float]]) -> tuple[States, States]:
    """(deltas, sizes) by pipeline folder and key, with the shapes of `states`; zeros where nothing changes."""
    deltas, sizes = ({folder: {key: torch.zeros(value.shape).double() for key, value in state.items()} for folder, state in states.items()}
                     for _ in range(2))  # fmt: skip
    for factors, weight in given:
        for folder, modules in factors.items():
            for name, one in modules.items():
                for found, value in zip((deltas, sizes), terms(one, weight), strict=True):
                    tensor = found[folder][f"{name}.weight"]
                    tensor += value.reshape(tensor.shape)
    return deltas, sizes


def base_states(architecture: str) -> States:
    return {folder: checkpoints.state(model) for folder, model in checkpoints.models(architecture).models.items()}


# -------------------------------------------------------------------------------------------------------- names of the layouts

_ENCODERS: Mapping[str, Mapping[str, tuple[str, Callable[[Any], State]]]] = {
    "sd1": {"text_encoder": ("cond_stage_model.transformer.", layouts.clip)},
    "sd2": {"text_encoder": ("cond_stage_model.model.", layouts.open_clip)},
    "sdxl": {
        "text_encoder": ("conditioner.embedders.0.transformer.", layouts.clip),
        "text_encoder_2": ("conditioner.embedders.1.model.", layouts.open_clip),
    },
    "sd3": {
        "text_encoder": ("text_encoders.clip_l.transformer.", layouts.clip),
        "text_encoder_2": ("text_encoders.clip_g.transformer.", layouts.clip),
        "text_encoder_3": ("text_encoders.t5xxl.transformer.", layouts.t5),
    },
    "flux": {
        "text_encoder": ("text_encoders.clip_l.transformer.", layouts.clip),
        "text_encoder_2": ("text_encoders.t5xxl.transformer.", layouts.t5),
    },
}


def in_single(architecture: str, states: Mapping[str, State], prefix: str = "model.diffusion_model.") -> State:
    """Denoiser and text encoders as the original single file names them."""
    found = {prefix + key: value for key, value in layouts.denoiser(architecture, next(iter(states.values()))).items()}
    for folder, (start, rename) in _ENCODERS[architecture].items():
        if folder in states:
            found |= {start + key: value for key, value in rename(states[folder]).items()}
    return found


def in_folder(architecture: str, states: Mapping[str, State]) -> State:
    """A pipeline folder's tensors, `unet/…`; CLIPTextModel has `text_model.` in published folders."""
    found = {}
    for folder, state in states.items():
        clip = type(checkpoints.models(architecture).models[folder]).__name__ == "CLIPTextModel"
        found |= {f"{folder}/{key}": value for key, value in (layouts.clip(state) if clip else state).items()}
    return found


# ------------------------------------------------------------------------------------------------------------------- the files


@dataclass(frozen=True)
class Raw:
    """A safetensors file by the format's own words."""

    metadata: dict[str, str]
    entries: dict[str, Any]
    payload: bytes

    @staticmethod
    def of(path: Path) -> Raw:
        header, payload = parts(path)
        return Raw(header.pop("__metadata__", {}), header, payload)

    def bytes(self, key: str) -> bytes:
        start, stop = self.entries[key]["data_offsets"]
        return self.payload[start:stop]

    def tensor(self, key: str) -> torch.Tensor:
        """A floating tensor in float64."""
        entry = self.entries[key]
        return torch.frombuffer(bytearray(self.bytes(key)), dtype=FLOATS[entry["dtype"]]).reshape(entry["shape"]).double()

    def table(self) -> list[tuple[str, str, list[int]]]:
        """Names, dtypes and shapes in the header's order, which has to be the payload's."""
        starts = [entry["data_offsets"][0] for entry in self.entries.values()]
        assert starts == sorted(starts)
        return [(key, entry["dtype"], entry["shape"]) for key, entry in self.entries.items()]


def weights(path: Path) -> dict[str, Path]:
    """{what a folder puts before a file's keys, and the file's name: the file} of a file or of all below a folder."""
    if not path.is_dir():
        return {"": path}
    return {str(file.relative_to(path)): file for file in sorted(path.rglob("*.safetensors"))}


def assert_merged(base: Path, out: Path, change: Change, given: Sequence[tuple[Path, float]], name: str = "") -> int:
    """Every weights file of OUT against BASE's: order, dtypes, untouched bytes, values, metadata. Returns how many tensors changed.

    name: of the base in the record, where it is not that of the path.
    """
    files, touched = weights(base), 0
    assert list(weights(out)) == list(files)
    for inside, file in files.items():
        prefix = f"{Path(inside).parent}/" if "/" in inside else ""
        touched += _assert_file(file, out / inside, prefix, change, given, name or base.name)
    assert touched == sum(bool(size.any()) for size in change.size.values()), "some of the change has no tensor"
    return touched


def _assert_file(file: Path, written: Path, prefix: str, change: Change, given: Sequence[tuple[Path, float]], base: str) -> int:
    before, after = Raw.of(file), Raw.of(written)
    assert after.table() == before.table()
    touched = [key for key in before.entries if prefix + key in change.size and bool(change.size[prefix + key].any())]
    for key in before.entries.keys() - set(touched):
        assert after.bytes(key) == before.bytes(key), f"{prefix}{key}: nothing changes it"
    for key in touched:
        old, delta, size = before.tensor(key), change.delta[prefix + key], change.size[prefix + key]
        assert_sum(f"{prefix}{key}", after.tensor(key), old, delta, size, before.entries[key]["dtype"])
        assert after.bytes(key) != before.bytes(key), f"{prefix}{key}: is the base's"
    if touched:
        assert_lineage(before, after, given, base)
    else:
        assert written.read_bytes() == file.read_bytes()
    return len(touched)


def assert_sum(name: str, found: torch.Tensor, old: torch.Tensor, delta: torch.Tensor, size: torch.Tensor, dtype: str) -> None:
    """Each value is W + ΔW to 1e-6 of |W| + |terms|, and to the dtype's last rounding."""
    wanted = old + delta.reshape(old.shape)
    allowed = 1e-6 * (old.abs() + size.reshape(old.shape)) + (1 + 1e-6) * (HALF_STEP[dtype] * wanted.abs() + SMALLEST[dtype])
    off = ((found - wanted).abs() - allowed).max()
    assert bool(off <= 0), f"{name}: beyond what rounding allows by {off:.3g}"


def assert_lineage(before: Raw, after: Raw, given: Sequence[tuple[Path, float]], base: str) -> None:
    """The base's metadata, one record more, no path, and the hash of what is there now."""
    old, new = before.metadata, after.metadata
    changed = {key for key in new if new[key] != old.get(key)}
    assert changed == {"modelspec.merged_from", "loratools.merge"} | ({"modelspec.hash_sha256"} & old.keys())
    assert old.keys() <= new.keys()
    if "modelspec.hash_sha256" in old:
        assert new["modelspec.hash_sha256"] == "0x" + hashlib.sha256(after.payload).hexdigest()
    names = new["modelspec.merged_from"].split(", ")
    assert names[0] == base
    assert sorted(names[1:]) == sorted(path.name for path, _ in given)
    record = json.loads(new["loratools.merge"])[-1]
    files = {path.name: (path if path.is_file() else path / "adapter_model.safetensors").read_bytes() for path, _ in given}
    told = {(one["name"], one["weight"], one["sha256"]) for one in record["adapters"]}
    assert told == {(path.name, weight, hashlib.sha256(files[path.name]).hexdigest()) for path, weight in given}
    assert record["command"] == "merge"
    assert not any(str(path.parent) in json.dumps(new) for path, _ in given)


def whole(path: Path) -> State:
    """All floating tensors of a file or a folder without sub-folders, in float64."""
    return {key: raw.tensor(key) for file in weights(path).values() for raw in [Raw.of(file)] for key in raw.entries}


# ------------------------------------------------------------------------------------------------- a base in a few milliseconds

STEMS = [f"double_blocks.{block}.img_mod.lin" for block in range(3)]


def modulations(folder: Path, rows: int = 48, columns: int = 8) -> tuple[Path, Path]:
    """(base.safetensors, style.safetensors): three of Flux' modulations with their biases, and a kohya adapter of alpha 2 and rank 4."""
    noise = torch.Generator().manual_seed(5)
    tensors = {f"{stem}.weight": torch.randn(rows, columns, generator=noise) for stem in STEMS}
    tensors |= {f"{stem}.bias": torch.randn(rows, generator=noise) for stem in STEMS}
    adapter = {}
    for stem in STEMS:
        flat = "lora_unet_" + stem.replace(".", "_")
        adapter |= {f"{flat}.lora_up.weight": torch.randn(rows, 4, generator=noise)}
        adapter |= {f"{flat}.lora_down.weight": torch.randn(4, columns, generator=noise), f"{flat}.alpha": torch.tensor(2.0)}
    files = {"base.safetensors": render(tensors, {"kept": "yes"}), "style.safetensors": render(adapter)}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder / "base.safetensors", folder / "style.safetensors"

"""load and save: an adapter file as an object, and the object as a file of any dialect.

`write_adapter` is the one place where an adapter becomes a file or a PEFT folder; `convert` uses it too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from loratools.adapters.adapter import Adapter
from loratools.errors import UnsupportedError, counted
from loratools.mapping.architectures import Architecture
from loratools.mapping.headers import metadata_for, new_metadata
from loratools.mapping.read import analyse, checked
from loratools.mapping.write import Plan, plan
from loratools.tensors.finite import FiniteTensor
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.reader import open_source
from loratools.tensors.writer import check_output, output_folder, write_safetensors, write_text_file
from loratools.version import VERSION


@dataclass(frozen=True)
class LoadedAdapter(Adapter):
    """An adapter read from a file, with the tables that name its modules; `save` writes it in any dialect that can hold it."""

    tables: Architecture | None = None

    def save(
        self, path: Path | str, dialect: str | None = None, *, plain: bool = False, keep_alpha: bool = False, force: bool = False
    ) -> Path:
        """Write the adapter; the file appears complete or not at all.

        path: a .safetensors file, or a folder for "peft"; dialect: a name of `loratools formats`, None for the adapter's own;
        plain: turn LoHa, LoKr and tucker into LoRA; keep_alpha: leave the scale to the header of "diffusers".
        Raises UnsupportedError listing what the dialect cannot hold, OutputExistsError, WriteError.
        """
        target = dialect or self.dialect
        out = Path(path)
        if self.tables is None or not self.tables.supported:
            raise UnsupportedError(f"{self.architecture} adapters are recognised, but not supported yet")
        made = plan(self, self.tables, target, plain=plain, keep_alpha=keep_alpha)
        if self.residue and target != self.dialect:
            raise UnsupportedError(f"no place in {target} for {counted(len(self.residue), 'tensor')}", details=list(self.residue))
        check_output(out, [self.path] if self.path else [], force)
        write_adapter(self, self.tables, made, {**made.tensors, **self.residue}, out, force=force)
        return out


def load(path: Path | str, *, arch: str | None = None, alpha: float | None = None, base: Path | str | None = None) -> LoadedAdapter:
    """Read an adapter of any dialect; no factor is loaded before it is asked for.

    arch: settles an architecture the keys cannot settle; alpha: of a file that records none; base: a model that supplies module
    names where no table has them. Raises UnknownError, AmbiguousError or InputError with all findings.
    """
    reading = analyse(open_source(path), arch=arch, alpha=alpha, base=Path(base) if base else None)
    adapter = checked(reading)
    values = {field.name: getattr(adapter, field.name) for field in fields(Adapter)}
    return LoadedAdapter(**values, tables=reading.detection.best.architecture if reading.detection.best else None)


def write_adapter(
    adapter: Adapter,
    architecture: Architecture,
    made: Plan,
    tensors: Mapping[str, LazyTensor],
    out: Path,
    *,
    force: bool = False,
    extra: Mapping[str, str] | None = None,
    new: bool = False,
) -> None:
    """Write a plan's tensors (and residue after them) with the metadata that describes them, and `extra` over it.

    new: the adapter comes from no file, whose header could be carried on. Raises InputError on NaN or Inf.
    """
    finite = {key: FiniteTensor(key, tensor) for key, tensor in tensors.items()}
    place = {key: position for position, key in enumerate(adapter.order)}
    if place.keys() >= finite.keys():  # the file's own keys: in the file's own order
        finite = dict(sorted(finite.items(), key=lambda item: place[item[0]]))
    described = new_metadata if new else metadata_for
    metadata = {**described(adapter, architecture, made, version=VERSION), **dict(sorted((extra or {}).items()))}
    if made.dialect.folder:
        _write_folder(out, made, finite, metadata, force=force)
    else:
        stamp = "sshs_model_hash" in adapter.metadata or (made.dialect.hashes and (new or adapter.dialect != made.dialect.name))
        write_safetensors(out, finite, metadata, force=force, stamp_hashes=stamp)


def _write_folder(out: Path, made: Plan, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], *, force: bool) -> None:
    """A PEFT folder; one subfolder per component (unet/, text_encoder/, …) where the adapter has several.

    tensors: the plan's, in its order, and residue after them (in the first component's file).
    """
    owner = {key: written.sites[0].component for written in made.modules for key in written.keys.values()}
    names = list(dict.fromkeys(owner.values()))
    with output_folder(out, force=force) as folder:
        for component, config_name in zip(names, made.configs, strict=True):
            inside = folder if len(names) == 1 else folder / config_name
            inside.mkdir(exist_ok=True)
            chosen = {
                key.removeprefix(f"{config_name}.") if key in owner else key: tensor  # the folder says the component
                for key, tensor in tensors.items()
                if owner.get(key, names[0]) == component
            }
            if len(names) > 1:  # PEFT looks for its own prefix alone; reading puts the folder's name before it again
                chosen = {key.removeprefix(f"{config_name}."): tensor for key, tensor in chosen.items()}
            write_safetensors(inside / "adapter_model.safetensors", chosen, metadata)
            write_text_file(inside / "adapter_config.json", json.dumps(made.configs[config_name], indent=2, sort_keys=True) + "\n")

"""Writing adapters that are folders: PEFT's adapter_config.json beside adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from loratools.mapping.write import Plan
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.writer import output_folder, write_safetensors, write_text_file


def write_adapter_folder(out: Path, plan: Plan, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], *, force: bool) -> None:
    """A PEFT folder; one subfolder per component (unet/, text_encoder/, …) where the adapter has several.

    Appears complete or not at all. tensors: the plan's, in its order, and residue after them (in the first component's file).
    """
    components = list(plan.configs)
    owner = {key: written.sites[0].component for written in plan.modules for key in written.keys.values()}
    names = list(dict.fromkeys(owner.values()))
    with output_folder(out, force=force) as folder:
        for position, (component, config_name) in enumerate(zip(names, components, strict=True)):
            inside = folder if len(components) == 1 else folder / config_name
            inside.mkdir(exist_ok=True)
            chosen = {
                key.removeprefix(f"{config_name}.") if key in owner else key: tensor
                for key, tensor in tensors.items()
                if owner.get(key, names[0] if position == 0 else None) == component
            }
            write_safetensors(inside / "adapter_model.safetensors", chosen, metadata)
            text = json.dumps(plan.configs[config_name], indent=2, sort_keys=True)
            write_text_file(inside / "adapter_config.json", text + "\n")

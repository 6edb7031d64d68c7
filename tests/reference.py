"""What an adapter file means, told without loratools: {module name as in the file: dense ΔW in float64}.

Its own reading of the formats, as plain as possible: safetensors reads the file, the rest is einsum. ΔW has the weight's shape
(norms (n,)); a `.diff` counts as it is, biases do not count. alpha: of PEFT keys without a config.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

_LEAF = re.compile(
    r"^(?P<module>.+?)\.(?P<leaf>alpha|dora_scale|diff|w_norm|lora_mid\.weight|(?:hada|lokr)_\w+|lora_magnitude_vector(?:\.weight)?|"
    r"lora_embedding_[AB]|lora_B\.bias|(?:lora_)?(?:down|up)\.weight|lora(?:_linear_layer)?\.(?:down|up)\.weight|lora_[AB](?:\.(?!weight)\w+)?\.weight)$"
)
_UP, _DOWN = re.compile(r"up\.weight|lora_B|embedding_B"), re.compile(r"down\.weight|lora_A|embedding_A")


def deltas(path: Path, *, alpha: float | None = None) -> dict[str, torch.Tensor]:
    folder = path if path.is_dir() else None
    with safe_open(folder / "adapter_model.safetensors" if folder else path, "pt") as file:
        tensors, header = {key: file.get_tensor(key).double() for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    config = json.loads((folder / "adapter_config.json").read_text()) if folder else json.loads(header.get("lora_adapter_metadata", "{}"))
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        found = _LEAF.match(key)
        assert found, f"{key}: the reference has no word for it"
        leaf = found["leaf"]
        role = leaf if leaf == "lora_B.bias" else "up" if _UP.search(leaf) else "down" if _DOWN.search(leaf) else leaf
        assert role not in modules.setdefault(found["module"], {}), f"{key}: twice"
        modules[found["module"]][role] = tensor
    return {name: _delta(part, _scale(name, part, config, alpha)) for name, part in modules.items() if set(part) - {"alpha"}}


def _scale(name: str, part: dict[str, torch.Tensor], config: dict[str, Any], alpha: float | None) -> float:
    first = next((part[role] for role in ("down", "lokr_w1_b", "lokr_w2_b", "hada_w1_b") if role in part), None)
    if first is None and not ("lokr_w1" in part and config):
        return 1.0  # dense; a LoKr of two full factors, outside PEFT
    for component in ("", f"{name.partition('.')[0]}."):  # a PEFT folder; a part of diffusers' header
        fields = {key.removeprefix(component): value for key, value in config.items() if key.startswith(component)}
        if "r" in fields:
            module = name.removeprefix(component).removeprefix("base_model.model.")
            rank, value = fields["r"], fields.get("lora_alpha", fields.get("alpha"))
            rank = next((r for key, r in (fields.get("rank_pattern") or {}).items() if re.match(rf"(.*\.)?({key})$", module)), rank)
            value = next((a for key, a in (fields.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({key})$", module)), value)
            assert first is None or "down" not in part or rank == len(first) or "embedding" in name, f"{name}: rank {rank}"
            return value / (math.sqrt(rank) if fields.get("use_rslora") else rank)
    value = float(part["alpha"]) if "alpha" in part else alpha
    return 1.0 if value is None or first is None else value / len(first)


def _delta(part: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
    if "diff" in part or "w_norm" in part:
        return part["diff" if "diff" in part else "w_norm"]
    if "lora_mid.weight" in part:
        return scale * torch.einsum("op,pqhw,qi->oihw", part["up"].flatten(1), part["lora_mid.weight"], part["down"].flatten(1))
    if "up" in part:
        return (scale * part["up"].flatten(1) @ part["down"].flatten(1)).reshape(len(part["up"]), *part["down"].shape[1:])
    if "hada_w1_a" in part:
        return scale * _product(part, "hada_w1", "hada_t1") * _product(part, "hada_w2", "hada_t2")
    one, two = _product(part, "lokr_w1"), _product(part, "lokr_w2", "lokr_t2")
    return scale * torch.kron(one.reshape(*one.shape, *[1] * (two.dim() - 2)), two.contiguous())


def _product(part: dict[str, torch.Tensor], name: str, core: str = "") -> torch.Tensor:
    """A factor that is whole, a product a @ b, or a Tucker core with a (rank, out) and b (rank, in)."""
    if name in part:
        return part[name]
    a, b = part[f"{name}_a"], part[f"{name}_b"]
    return torch.einsum("ijhw,io,jn->onhw", part[core], a, b) if core in part else a @ b

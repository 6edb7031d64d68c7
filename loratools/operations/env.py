"""What a bug report needs: versions and the machine. Nothing private: no paths, no user or host name.

Versions come from the installed packages' metadata, so that torch is imported only when devices are asked for.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from loratools.version import VERSION

PACKAGES = (
    "torch", "safetensors", "numpy", "click", "rich", "diffusers", "peft", "transformers", "accelerate", "pydantic", "pillow",
    "matplotlib", "lycoris-lora", "bitsandbytes", "torchao", "prodigyopt", "datasets",
)  # fmt: skip
# settings that change what a run does; values are numbers or switches, never paths
SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "NO_COLOR")


def environment(*, devices: bool = False) -> dict[str, Any]:
    """Versions, platform, processors, memory in bytes; with `devices` (imports torch) the GPUs that torch sees."""
    found: dict[str, Any] = {
        "loratools": VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": usable_cpus(),
        "memory_bytes": memory_bytes(),
        "packages": {name: _version(name) for name in PACKAGES},
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }
    return {**found, **_devices()} if devices else found


def usable_cpus() -> int:
    """Processors this process may use (a container's share, where the system tells)."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Physical memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "cuda": torch.version.cuda,
        "torch_threads": torch.get_num_threads(),
        "devices": [{"name": gpu.name, "memory_bytes": gpu.total_memory, "compute_capability": f"{gpu.major}.{gpu.minor}"} for gpu in gpus],
    }

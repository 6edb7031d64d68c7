"""loratools: one road for LoRA adapters of any dialect, from a file to a function and back.

    import loratools
    adapter = loratools.load(Path("style.safetensors"))
    loratools.convert(Path("style.safetensors"), None, "diffusers")
    loratools.merge(Path("base.safetensors"), [(Path("style.safetensors"), 0.8)], Path("merged.safetensors"))

The names below are imported when they are first used, so that `import loratools` costs nothing and never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loratools.version import VERSION

if TYPE_CHECKING:
    from loratools.operations.combine import combine
    from loratools.operations.compare import compare
    from loratools.operations.convert import convert
    from loratools.operations.extract import extract
    from loratools.operations.inspect import inspect
    from loratools.operations.merge import merge
    from loratools.operations.rescale import rescale_alpha
    from loratools.operations.resize import resize
    from loratools.operations.save import load

__version__ = VERSION

# public name → the module that defines it, and its name there
_PUBLIC = {
    "load": ("loratools.operations.save", "load"),
    "inspect": ("loratools.operations.inspect", "inspect"),
    "convert": ("loratools.operations.convert", "convert"),
    "compare": ("loratools.operations.compare", "compare"),
    "merge": ("loratools.operations.merge", "merge"),
    "combine": ("loratools.operations.combine", "combine"),
    "extract": ("loratools.operations.extract", "extract"),
    "resize": ("loratools.operations.resize", "resize"),
    "rescale_alpha": ("loratools.operations.rescale", "rescale_alpha"),
}

__all__ = ["__version__", "combine", "compare", "convert", "extract", "inspect", "load", "merge", "rescale_alpha", "resize"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'loratools' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    value = globals()[name] = getattr(import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})

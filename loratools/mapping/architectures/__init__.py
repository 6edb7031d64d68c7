"""The registry of architectures: one table a file, found by name.

An `Architecture` is a name, the tables of its components (denoiser, text encoders) with the prefix each dialect gives them, and
the evidence that tells its published sizes apart. Adding one is adding a file here that defines `ARCHITECTURES`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from loratools.mapping.rules import DIFF, Table


@dataclass(frozen=True)
class Component:
    """One model of a pipeline: its table, and dialect → the prefixes its keys carry (the first is written, all are read)."""

    name: str
    table: Table
    prefixes: Mapping[str, tuple[str, ...]]
    widths: Mapping[str, int] = field(default_factory=dict)  # published dimensions, to tell CLIP-L from CLIP-G

    @property
    def folder(self) -> str:
        """Its folder in a diffusers pipeline: `unet`, `transformer`, `text_encoder`, …"""
        return next(iter(self.prefixes.get("diffusers", (self.name,)))).rstrip(".")


@dataclass(frozen=True)
class Architecture:
    """A model family.

    kohya_namespace: the names sd-scripts/musubi flatten ("diff" where they are diffusers' own)
    comfy_namespace: the names ComfyUI's keys carry under `diffusion_model.`
    also_read: further namespaces that some tool puts under the same two prefixes; never written
    variants: variant → published dimensions and index ranges; evidence for `variant` and for telling families apart
    base_versions: values of ss_base_model_version / modelspec.architecture (without "/lora") that name it → variant or ""
    supported: False for families that are recognised and named, but not converted yet
    """

    name: str
    title: str
    components: tuple[Component, ...]
    kohya_namespace: str = "orig"
    comfy_namespace: str = "orig"
    also_read: tuple[str, ...] = ()
    variants: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    base_versions: Mapping[str, str] = field(default_factory=dict)
    modelspec: str = ""  # what modelspec.architecture is written as, without "/lora"
    supported: bool = True
    open_names: bool = False  # an LLM: any dotted name is a site
    family: str = ""  # the name shown, where a variant of a family needs a table of its own (the SDXL refiner)

    @property
    def published(self) -> str:
        """The architecture's name in results; its own name settles it as `--arch`."""
        return self.family or self.name

    def component(self, name: str) -> Component:
        for component in self.components:
            if component.name == name:
                return component
        raise KeyError(name)


@cache
def registry() -> dict[str, Architecture]:
    """All architectures by name, in the order of the files."""
    found: dict[str, Architecture] = {}
    for module in pkgutil.iter_modules(__path__):
        for architecture in getattr(importlib.import_module(f"{__name__}.{module.name}"), "ARCHITECTURES", ()):
            if architecture.name in found:
                raise ValueError(f"two tables for {architecture.name}")
            found[architecture.name] = architecture
    return found


__all__ = ["DIFF", "Architecture", "Component", "registry"]

"""A language model: every dotted name is a site under its own name, so there is no table to keep.

transformers' module names are what PEFT writes behind `base_model.model.`; nothing else spells them.
"""

from __future__ import annotations

from loratools.mapping.architectures import Architecture, Component
from loratools.mapping.rules import Table

ARCHITECTURES = (
    Architecture(
        "llm",
        "Language model",
        (Component("model", Table("model", ()), {"diffusers": ("",)}),),
        kohya_namespace="diff",
        comfy_namespace="diff",
        open_names=True,
    ),
)

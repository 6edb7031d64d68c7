"""Which of a dialect's spellings is written, and the memory that brings a file back to the one it had.

A dialect is written in its first spelling. A file that came from a dialect in another of its spellings (lora_down/lora_up under
`diffusion_model.`, no prefix in diffusers names) says so in the header entry `loratools.spelling`, so that the way back gives the
same keys: dialect → component → [prefix, spelling, namespace, scheme]. `loratools.flat` does the same for factors of convolutions
that had two dimensions: dialect → site → roles.
"""

from __future__ import annotations

import json
from collections import Counter

from loratools.adapters.adapter import Adapter, Form
from loratools.mapping.architectures import Architecture, Component
from loratools.mapping.dialects import DIALECTS, Dialect

KEY = "loratools.spelling"
FLAT = "loratools.flat"


def all_forms(dialect: Dialect, architecture: Architecture, component: Component) -> list[Form]:
    """Every form a dialect may spell a component in, the usual one first."""
    return [
        Form(prefix, spelling.spelling, namespace, scheme)
        for spelling in dialect.spellings
        if spelling.applies(component)
        for namespace in spelling.namespaces_for(architecture, component)
        for prefix in spelling.prefixes_for(component)
        for scheme in spelling.schemes
    ]


def usual_form(dialect: Dialect, architecture: Architecture, component: Component) -> Form | None:
    """The form a dialect is written in, None where it has no spelling for the component."""
    return next(iter(all_forms(dialect, architecture, component)), None)


def remembered_forms(adapter: Adapter, architecture: Architecture, dialect: Dialect) -> dict[str, Form]:
    """component → the form the file had when it was last in this dialect: its own now, or as its header remembers."""
    if dialect.folder:
        return {}  # PEFT loads one spelling only
    if adapter.dialect == dialect.name:
        noted = _forms_of(adapter)
    else:
        noted = {name: Form(*form) for name, form in _noted(adapter).get(dialect.name, {}).items()}
    known = {component.name: all_forms(dialect, architecture, component) for component in architecture.components}
    return {name: form for name, form in noted.items() if form in known.get(name, ())}


def memory(adapter: Adapter, architecture: Architecture) -> str | None:
    """The header entry for an adapter that leaves its dialect; None while every spelling was the usual one."""
    noted = _noted(adapter)
    unusual = {}
    for name, form in _forms_of(adapter).items():
        dialect = DIALECTS[adapter.dialect]
        if form != usual_form(dialect, architecture, architecture.component(name)):
            unusual[name] = [form.prefix, form.spelling, form.namespace, form.scheme]
    if unusual:
        noted[adapter.dialect] = unusual
    return json.dumps(noted, sort_keys=True, separators=(",", ":")) if noted else None


def remembered_flat(adapter: Adapter, dialect: Dialect) -> dict[str, list[str]]:
    """site → roles that had two dimensions when the file was last in this dialect."""
    return {} if adapter.dialect == dialect.name else _noted(adapter, FLAT).get(dialect.name, {})


def flat_memory(adapter: Adapter, reshaped: dict[str, list[str]]) -> str | None:
    """The header entry for factors that got the dimensions of their kernel on the way out of `adapter`'s dialect."""
    noted = _noted(adapter, FLAT)
    if reshaped:
        noted[adapter.dialect] = reshaped
    return json.dumps(noted, sort_keys=True, separators=(",", ":")) if noted else None


def _forms_of(adapter: Adapter) -> dict[str, Form]:
    """component → the form most of its modules have; where there are LoRA factors, they alone say which words are used."""
    counts: dict[str, Counter[Form]] = {}
    for entry in adapter.entries:
        if entry.form is not None:
            counts.setdefault(entry.component, Counter())[entry.form] += len(adapter.entries) if "down" in entry.keys else 1
    return {name: counter.most_common(1)[0][0] for name, counter in counts.items()}


def _noted(adapter: Adapter, key: str = KEY) -> dict[str, dict[str, list[str]]]:
    try:
        noted = json.loads(adapter.metadata.get(key, "{}"))
    except ValueError:
        return {}
    return noted if isinstance(noted, dict) else {}

"""What a conversion writes into the header so that the way back gives the same keys, shapes and factors.

    loratools.spelling   dialect → component → [prefix, spelling, namespace, scheme], where it was not the dialect's usual one
    loratools.flat       dialect → site → roles of convolution factors that had two dimensions
    loratools.alpha      site → alpha before it was folded, or [alpha, the power of two the second factor took, dtype, *shape of
                         its tensor] where these are not 0 and a float32 scalar's; "*": every site

A dialect is written in its first spelling; a file that came in another (lora_down/lora_up under `diffusion_model.`, no prefix
before diffusers names) gets that one back.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loratools.adapters.adapter import Adapter, Form
from loratools.adapters.kinds import Dora
from loratools.adapters.kinds.common import Scaled
from loratools.errors import InputError
from loratools.mapping.architectures import Architecture, Component
from loratools.mapping.dialects import DIALECTS, Dialect
from loratools.tensors.lazy import scalar_tensor

SPELLING = "loratools.spelling"
FLAT = "loratools.flat"
ALPHA = "loratools.alpha"
_ALPHA_DTYPES = ("F32", "F64", "F16", "BF16", "I64", "I32", "I16", "I8", "U8")


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


def of_spelling(adapter: Adapter, architecture: Architecture) -> str | None:
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


def of_shapes(adapter: Adapter, reshaped: dict[str, list[str]]) -> str | None:
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


def _noted(adapter: Adapter, key: str = SPELLING) -> dict[str, dict[str, list[str]]]:
    """The parsed entry: dialect → component or site → words. Raises InputError where it is nothing we write."""
    noted = _parsed(adapter, key)
    rows = [words for entry in noted.values() for words in (entry.values() if isinstance(entry, dict) else [None])]
    length = 4 if key == SPELLING else None
    if not all(isinstance(row, list) and all(isinstance(word, str) for word in row) and length in (None, len(row)) for row in rows):
        raise _foreign(key)
    return noted


def _parsed(adapter: Adapter, key: str) -> dict[str, Any]:
    """A header entry of ours as an object. Raises InputError where it is none."""
    try:
        found = json.loads(adapter.metadata.get(key, "{}"))
    except (ValueError, RecursionError) as error:
        raise _foreign(key) from error
    if not isinstance(found, dict):
        raise _foreign(key)
    return found


def _foreign(key: str) -> InputError:
    return InputError(f"the header entry {key} is not what loratools writes", fix=f"loratools metadata SRC OUT --unset {key}")


def _alpha_record(value: Any) -> list[Any]:
    """[alpha, the second factor's power of two, dtype and shape of its tensor]. Raises InputError for anything else."""
    alpha, took, *tensor = value if isinstance(value, list) and len(value) > 1 else [value, 0]
    dtype, *shape = tensor or ["F32"]
    numbers = isinstance(alpha, int | float) and 0 < abs(alpha) < 1e30 and isinstance(took, int) and abs(took) < 200
    if not (numbers and dtype in _ALPHA_DTYPES and all(size == 1 for size in shape)):
        raise _foreign(ALPHA)
    return [float(alpha), took, *tensor]


def of_alphas(known: Mapping[str, list[Any]], *, complete: int) -> str:
    """The header entry for the alphas of an output with `complete` modules; sites without an entry had none."""
    values = {site: value[0] if value[1:] in ([0], [0, "F32"]) else value for site, value in known.items()}
    first = next(iter(values.values()), None)
    if first is not None and len(values) == complete and all(value == first for value in values.values()):
        return json.dumps({"*": first})
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def unfolded(adapter: Adapter) -> Adapter:
    """The adapter with the alphas that a former conversion took out of the file put back (powers of two bit for bit).

    The header entry `loratools.alpha` holds them: site → alpha, or "*" for all; a site without an entry had none. Where they were
    folded they come out of the factors again, each factor what it took ([alpha, the second factor's power of two]); PEFT's config
    has one for every module. Without the entry nothing changes.
    """
    text = adapter.metadata.get(ALPHA)
    rule = DIALECTS[adapter.dialect].alpha
    if text is None or rule == "tensor":
        return adapter
    recorded = {site: _alpha_record(value) for site, value in _parsed(adapter, ALPHA).items()}
    nothing = [None, 0]
    entries = []
    for entry in adapter.entries:
        module = entry.module
        if isinstance(module, Scaled | Dora):
            alpha, took, *tensor = recorded.get(str(entry.sites[0]), recorded.get("*", nothing))
            if rule != "config":
                module = module.folded()
            if alpha is None:
                module = replace(module, alpha=None) if module.scale == 1.0 else module
            elif module.rank:
                module = module.with_alpha(alpha, -took)
                module = replace(module, options={name: value for name, value in module.options.items() if name != "second_took"})
                if tensor:
                    stored = scalar_tensor(alpha, tensor[0], tuple(tensor[1:]))
                    module = module.with_factors({**module.factors, "alpha": stored})
            elif "always_scale" in module.options:  # PEFT divides the alpha of a LoKr of full factors, other readers ignore it
                options = {name: value for name, value in module.options.items() if name not in ("always_scale", "rank")}
                module = replace(module.folded(), alpha=alpha, options=options)
        entries.append(replace(entry, module=module))
    return adapter.replace(entries=tuple(entries))

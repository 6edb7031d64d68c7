"""Where a file records alpha outside of its tensors, and how these records follow the modules.

    adapter_config.json     lora_alpha (alpha for LoHa, LoKr), alpha_pattern, use_rslora: of a PEFT folder
    lora_adapter_metadata   the same fields in the header, by component: of diffusers, and of whoever else writes it
    ss_network_alpha        one number, "Dynamic" where modules differ: for people, no reader uses it

Invariant: only fields of alpha change, and only where some alpha did. Everything else of a record stays as it was written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from loratools.adapters.adapter import Adapter, Entry, Module
from loratools.adapters.kinds import Dense
from loratools.mapping import peft_config
from loratools.mapping.architectures import Architecture
from loratools.mapping.dialects import DIALECTS, Dialect
from loratools.mapping.memory import ALPHA
from loratools.mapping.rules import DIFF
from loratools.operations.rescaling.modules import Place, Request, has_scale
from loratools.tensors.metadata import PEFT_KEY, lora_adapter_metadata, peft_metadata

NONE = "none"  # in the histograms: modules without a record of alpha
_OF_ALPHA = ("lora_alpha", "alpha", "alpha_pattern", "use_rslora")  # fields that mean something together only
_NETWORK = ("ss_network_dim", "ss_network_module")  # what a change of alpha does not touch

Pairs = Sequence[tuple[Entry, Module]]  # a module of the file, and the one that is written in its place
Config = Mapping[str, Any]


class Records:
    """The records of one adapter: where its alphas are, and the same records for other modules."""

    def __init__(self, adapter: Adapter, architecture: Architecture, request: Request) -> None:
        self.adapter, self.architecture, self.request = adapter, architecture, request
        self.dialect: Dialect = DIALECTS[adapter.dialect]
        self.header = peft_metadata(adapter.metadata)

    def place(self, entry: Entry) -> Place:
        """Where the file keeps the alpha of a module."""
        rule = self.dialect.alpha
        return Place(
            tensor=rule == "tensor" or (rule != "config" and "alpha" in entry.module.factors),
            recorded=rule == "config" or self.folder(entry) in self.header,
            header=rule == "header",
            strength=rule in ("tensor", "config"),
        )

    def folder(self, entry: Entry) -> str:
        return self.architecture.component(entry.component).folder

    # --------------------------------------------------------------------------------------------------------- the new ones

    def configs(self, pairs: Pairs, rendered: Mapping[str, Config]) -> dict[str, dict[str, Any]]:
        """component folder → adapter_config.json: as the folder has it, but for alpha; `rendered` where it lacks a field."""
        found = {}
        for folder, group in self._grouped(pairs).items():
            previous = peft_config.part_of(self.adapter.config, folder)
            own = any(previous.get(field) is not None for field in ("lora_alpha", "alpha"))
            usual = {field: value for field, value in rendered[folder].items() if not (own and field in _OF_ALPHA)}
            config = {**usual, **previous, **{field: value for field, value in usual.items() if previous.get(field) is None}}
            found[folder] = {**config, **self._alpha_fields(group, previous, config)}
        return found

    def metadata(self, pairs: Pairs) -> dict[str, str]:
        """The header entries of the output that are not those of the input, or would not be without being named here."""
        changed = any(_changed(entry, module) for entry, module in pairs)
        kept = (*_NETWORK, *(() if changed else ("ss_network_alpha",)))
        found = {key: self.adapter.metadata[key] for key in kept if key in self.adapter.metadata}
        configs = dict[str, Config](self.header)
        for folder, group in self._grouped(pairs).items():
            configs.update(self._header_of(folder, group))
        return {**found, PEFT_KEY: lora_adapter_metadata(configs)} if configs != self.header else found

    def without_memory(self) -> Adapter:
        """The adapter without what a former conversion noted about alphas, which are not these any more."""
        return self.adapter.replace(metadata={key: text for key, text in self.adapter.metadata.items() if key != ALPHA})

    def _header_of(self, folder: str, group: Pairs) -> dict[str, Config]:
        """The header's part for a component: the former one with other alphas, or a first one where the scale is not 1."""
        if folder in self.header:
            previous = self.header[folder]
            return {folder: {**previous, **self._alpha_fields(group, previous, previous)}}
        if self.dialect.alpha != "header" or all(module.scale == 1.0 or "alpha" in module.factors for _, module in group):
            return {}
        component = self.architecture.component(group[0][0].component)
        known = () if self.architecture.open_names else tuple(row.name for row in component.table.namespaces[DIFF])
        return {folder: peft_config.config_for({entry.name: module for entry, module in group}, known, {}, self.dialect.name)}

    def _alpha_fields(self, group: Pairs, previous: Config, config: Config) -> dict[str, Any]:
        """lora_alpha (or alpha), alpha_pattern and use_rslora for these modules; nothing where no alpha changed.

        previous: the record as it was; config: as it is going to be, but for these fields.
        """
        if not any(_changed(entry, module) for entry, module in group):
            return {}
        name = "alpha" if "alpha" in config and "lora_alpha" not in config else "lora_alpha"
        if self.request.strength is not None and previous.get(name) is not None:
            size = abs(self.request.strength)
            patterns = {pattern: _number(value * size) for pattern, value in (previous.get("alpha_pattern") or {}).items()}
            return {name: _number(previous[name] * size), **({"alpha_pattern": patterns} if patterns else {})}
        modules = {entry.name: module for entry, module in group if not isinstance(module, Dense)}
        ranks = {key: rank for key, module in modules.items() if (rank := peft_config.rank_written(module))}
        alphas = {key: float(rank if (alpha := modules[key].alpha) is None else alpha) for key, rank in ranks.items()}
        rendered = peft_config.render(modules, (), kind="lora", alphas=alphas)
        fields = {name: rendered["lora_alpha"], "alpha_pattern": rendered["alpha_pattern"]}
        return {**fields, **({"use_rslora": False} if name == "lora_alpha" else {})}

    def _grouped(self, pairs: Pairs) -> dict[str, list[tuple[Entry, Module]]]:
        found: dict[str, list[tuple[Entry, Module]]] = {}
        for entry, module in pairs:
            found.setdefault(self.folder(entry), []).append((entry, module))
        return found

    # ----------------------------------------------------------------------------------------------------------- histograms

    def before(self) -> dict[str, int]:
        """alpha → number of modules of the file whose scale it is."""
        entries = self.adapter.entries
        return _histogram([(entry.module, self.adapter.config is not None or self.folder(entry) in self.header) for entry in entries])

    def after(self, pairs: Pairs, metadata: Mapping[str, str]) -> dict[str, int]:
        """The same of what is written, with these new header entries."""
        header = {**self.header, **peft_metadata(metadata)}
        return _histogram([(module, self.dialect.alpha == "config" or self.folder(entry) in header) for entry, module in pairs])


def _histogram(modules: Sequence[tuple[Module, bool]]) -> dict[str, int]:
    """alpha → number of modules. With each module: is there a record, which says the rank where a module has no alpha?"""
    counts: Counter[str] = Counter()
    for module, recorded in modules:
        if has_scale(module):
            alpha = float(module.rank) if module.alpha is None and recorded and module.rank else module.alpha
            counts[NONE if alpha is None else f"{alpha:g}"] += 1
    return dict(counts.most_common())


def _changed(entry: Entry, module: Module) -> bool:
    """Has the module another alpha than the file's?"""
    return entry.module.alpha != module.alpha


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value

"""Keys → Adapter: the left half of the road.

`analyse` understands as much as it can and lists what is wrong; `read` refuses a file with errors. No factor is read here, only
alphas and flags of one element, and torch is not imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratools.adapters.adapter import Adapter, Entry, Form, Module, Site
from loratools.errors import AmbiguousError, InputError, UnknownError, UnsupportedError, UsageError, counted
from loratools.mapping import peft_config
from loratools.mapping.architectures import Architecture, registry
from loratools.mapping.bases import architecture_of_base
from loratools.mapping.checkpoints import LANGUAGE_MODEL, identify
from loratools.mapping.detect import Assignment, Candidate, Detection, detect
from loratools.mapping.dialects import DIALECTS
from loratools.mapping.dimensions import evaluate, fit_shape
from loratools.mapping.names import NameIndex
from loratools.mapping.stems import Stem
from loratools.report import Finding
from loratools.tensors.metadata import peft_metadata
from loratools.tensors.reader import TensorSource, open_source


@dataclass
class Reading:
    """What a file is: the detection, the adapter as its best candidate reads it, and all findings."""

    source: TensorSource
    detection: Detection
    adapter: Adapter | None
    findings: list[Finding]

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "error"]


def named_architecture(name: str) -> Architecture:
    """A registered architecture. Raises UsageError with the nearest name."""
    import difflib

    if name in registry():
        return registry()[name]
    near = difflib.get_close_matches(name, registry(), 1)
    raise UsageError(
        f"unknown architecture {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""), fix="loratools formats lists them"
    )


def analyse(
    source: TensorSource, *, arch: str | None = None, alpha: float | None = None, base: TensorSource | Path | None = None
) -> Reading:
    """Understand an opened file. base: a model that settles which of several architectures it is, and names modules no table does."""
    forced = named_architecture(arch) if arch else None
    detection = detect(source.tensors, source.metadata, arch=forced, container=source.container)
    if base is not None and forced is None and (detection.ambiguous or _unnamed(detection)):
        detection = _settled(source, detection, base if isinstance(base, TensorSource) else open_source(base))
    findings = list(source.warnings)
    best = detection.best
    if best is None:
        findings += _unnamed_findings(source, detection)
        return Reading(source, detection, None, findings)
    if detection.ambiguous:
        names = " and ".join(candidate.architecture.name for candidate in detection.candidates)
        findings.append(Finding("warning", "ambiguous", None, f"the keys fit {names} equally well: --arch settles it"))
    reader = _Reader(source, detection, best, alpha, findings)
    return Reading(source, detection, reader.adapter(), findings)


def _unnamed(detection: Detection) -> bool:
    return detection.best is None or detection.best.matched == 0


def _settled(source: TensorSource, detection: Detection, base: TensorSource) -> Detection:
    """The detection once the base has had its say: what it is among the candidates, else its own module names."""
    guess = identify({name: tensor.shape for name, tensor in base.tensors.items()})
    if guess.layout == "hf":  # whatever its layers are called: nothing but a language model is stored like this
        fitting = [LANGUAGE_MODEL]
    else:
        possible = {candidate.architecture.name for candidate in detection.candidates}
        fitting = [architecture.name for architecture, _, _ in guess.candidates if architecture.name in possible]
    for name in fitting[:1]:
        found = detect(source.tensors, source.metadata, arch=registry()[name], container=source.container)
        if not _unnamed(found):
            return found
    if guess.layout != "hf" and not _unnamed(detection):
        return detection
    return detect(source.tensors, source.metadata, arch=architecture_of_base(base), container=source.container)


def _unnamed_findings(source: TensorSource, detection: Detection) -> list[Finding]:
    """What is wrong with an adapter whose modules no table names; nothing for what is no adapter."""
    found = [Finding(severity, "adapter-config", None, message) for severity, message in peft_config.complaints(source.config or {})]
    if adapter_keys(detection):
        found.append(
            Finding("error", "unknown-architecture", None, "no architecture knows these module names; --base supplies names for convert")
        )
    for name, modules in detection.modules.items():
        found += [Finding(severity, code, name, f"{name}: {text}") for module in modules for severity, code, text in module.problems()]
    return found


def read(
    path: Path | str,
    *,
    arch: str | None = None,
    alpha: float | None = None,
    base: Path | None = None,
    allow_unknown: bool = False,
) -> Adapter:
    """Read an adapter of any dialect.

    arch: settles an architecture the keys cannot settle; alpha: of a file that records none; base: a model that supplies module
    names where no table has them; allow_unknown: keep unknown keys as residue instead of refusing.
    Raises UnknownError, AmbiguousError or InputError (all findings at once), UsageError for an --alpha that is not needed.
    """
    return checked(analyse(open_source(path), arch=arch, alpha=alpha, base=base), allow_unknown=allow_unknown)


def adapter_keys(detection: Detection) -> list[str]:
    """The keys of modules that have a leaf no base model has."""
    return [key for stem in detection.stems.stems.values() if stem.is_adapter for key in (*stem.keys.values(), *stem.duplicates)]


def is_adapter(source: TensorSource, detection: Detection) -> bool:
    """Is the file an adapter: adapter keys make up at least half of it? A checkpoint may have some left inside.

    A PEFT folder is an adapter however many whole modules it saves.
    """
    found = len(adapter_keys(detection))
    return detection.positional or (found > 0 and (source.container == "peft" or found * 2 >= len(source.tensors)))


def checked(reading: Reading, *, allow_unknown: bool = False) -> Adapter:
    """The adapter of a reading without errors; raises what `read` raises."""
    detection, path = reading.detection, reading.source.path
    if detection.positional:
        notes = DIALECTS["cloneofsimo"].notes
        raise UnsupportedError(f"{path.name}: cloneofsimo keys, {notes}", fix="convert it with the trainer that made it")
    foreign = [finding.message for finding in reading.errors if finding.code == "adapter-config"]
    if reading.adapter is None and foreign:
        raise UnsupportedError(f"{path.name}: {foreign[0]}", details=foreign[1:])
    if not is_adapter(reading.source, detection):
        some = adapter_keys(detection)
        among = f"{counted(len(some), 'adapter key')} among {counted(len(reading.source.tensors), 'tensor')}"
        what = f"{among}: a checkpoint" if some else "no adapter keys"
        raise UnknownError(f"{path.name}: {what}", details=_sample(some or list(reading.source.tensors)), fix=f"loratools inspect {path}")
    if reading.adapter is None or detection.best is None:
        raise UnknownError(
            f"{path.name}: no architecture knows these keys",
            details=_sample(list(reading.source.tensors)),
            fix="--base MODEL supplies the module names of a model no table covers",
        )
    if detection.ambiguous:
        names = [candidate.architecture.name for candidate in detection.candidates]
        raise AmbiguousError(
            f"{path.name}: the keys fit {' and '.join(names)} equally well",
            details=[f"{candidate.architecture.name}: {'; '.join(candidate.evidence)}" for candidate in detection.candidates],
            fix="say which: " + " or ".join(f"--arch {name}" for name in names),
        )
    errors = [finding for finding in reading.errors if not (allow_unknown and finding.code == "unknown-key")]
    if errors:
        raise InputError(
            f"{path.name}: {counted(len(errors), 'problem')}",
            details=[finding.message for finding in errors],
            fix=_fix(errors),
        )
    return reading.adapter


def tables_of(reading: Reading) -> Architecture:
    """The tables an adapter was read with. Raises UnsupportedError for a family that is recognised but not handled yet."""
    best = reading.detection.best
    if best is None or not best.architecture.supported:
        title = "these" if best is None else best.architecture.title
        told = f"{reading.source.path.name}: {title} adapters are recognised, but not supported yet"
        raise UnsupportedError(told, fix="loratools formats lists what is")
    return best.architecture


def _fix(errors: list[Finding]) -> str | None:
    codes = {finding.code for finding in errors}
    if codes == {"unknown-key"}:
        return "--drop-unknown leaves these tensors out (and lists them), --keep-unknown carries them along as they are"
    zero = any(finding.code == "bad-alpha" and "alpha is 0" in finding.message for finding in errors)
    return "--alpha A settles an alpha of 0" if zero else None


def _sample(keys: list[str], count: int = 8) -> list[str]:
    return keys[:count] + ([f"… and {len(keys) - count} more"] if len(keys) > count else [])


class _Reader:
    """Builds the entries of one candidate's reading and collects findings."""

    def __init__(self, source: TensorSource, detection: Detection, best: Candidate, alpha: float | None, findings: list[Finding]) -> None:
        self.source, self.detection, self.best, self.alpha, self.findings = source, detection, best, alpha, findings
        self.headers = peft_metadata(source.metadata)
        self.sound: dict[int, Mapping[str, Any]] = {}  # configs as they can be used, by identity
        self.assumed = 0
        self.settled = 0

    def adapter(self) -> Adapter:
        entries: list[Entry] = []
        for name, stem in self.detection.stems.stems.items():
            assignment = self.best.assigned.get(name)
            if assignment is not None:
                entries.extend(self._entries(name, stem, assignment))
        self._config_findings()
        self._unknown_findings()
        self._file_findings(entries)
        residue = {key: self.source.tensors[key] for key in (*self.detection.unknown_keys, *self.detection.stems.companions)}
        return Adapter(
            architecture=self.best.architecture.name,
            dialect=self.best.dialect or "",
            entries=tuple(entries),
            variant=self.best.variant or None,
            residue=residue,
            dims=self.best.dims,
            order=tuple(self.source.tensors),
            metadata=dict(self.source.metadata),
            config=self.source.config,
            path=self.source.path,
        )

    def _error(self, code: str, message: str, site: str | None = None) -> None:
        self.findings.append(Finding("error", code, site, message))

    def _warn(self, code: str, message: str, site: str | None = None) -> None:
        self.findings.append(Finding("warning", code, site, message))

    def _entries(self, name: str, stem: Stem, assignment: Assignment) -> list[Entry]:
        slot, match = assignment.hit.slot, assignment.match
        component = slot.component.name
        sites = tuple(Site(component, path) for path in match.sites)
        where = str(sites[0])
        for key in stem.duplicates:
            self._error("duplicate-key", f"{key}: a second tensor for the same factor of {where}", where)
        found = []
        for stored in self.detection.modules[name]:
            module = self._with_alpha(name, stored, stem, assignment)
            for severity, code, message in module.problems():
                self.findings.append(Finding(severity, code, where, f"{name}: {message}"))
            if not assignment.fits:
                widths = ", ".join(f"{symbol} = {value}" for symbol, value in sorted(self.best.dims.get(component, {}).items()))
                self._error(
                    "wrong-shape",
                    f"{name}: shape {_show(module.shape)} does not fit {match.row.total_out} x {match.row.in_} ({widths})",
                    where,
                )
            keys = {role: stem.keys[role] for role in stored.factors if role in stem.keys}  # an alpha that was settled among them
            scheme = stem.scheme or slot.form.scheme
            form = Form(slot.form.prefix, slot.form.spelling, slot.form.namespace, scheme)
            rows = self._rows(match.row, module, component) if len(sites) > 1 else ()
            found.append(Entry(sites, module, rows, match.row.swapped, match.name, form, keys))
        return found

    def _rows(self, row: Any, module: Module, component: str) -> tuple[int, ...]:
        """Output rows of each part of a fused module; () while its widths are unknown."""
        dims = fit_shape(row, module.shape, self.best.dims.get(component, {})) or self.best.dims.get(component, {})
        rows = [evaluate(expression, dims) for expression in row.out]
        return tuple(value for value in rows if value is not None) if all(rows) else ()

    # ------------------------------------------------------------------------------------------------------------- alpha

    def _with_alpha(self, name: str, module: Module, stem: Stem, assignment: Assignment) -> Module:
        """The module with the alpha the file records for it: tensor, header metadata or adapter_config; disagreement is an error."""
        config, source = self._config_for(assignment)
        path = assignment.match.name  # as PEFT's patterns see it: inside its own model
        rank = module.rank
        recorded: dict[str, float] = {}
        if "alpha" in module.factors and module.alpha is not None:
            recorded["tensor"] = module.alpha
        options: dict[str, Any] = dict(module.options)
        if assignment.match.row.kernel:
            options.setdefault("kernel", assignment.match.row.kernel)
        if assignment.hit.slot.form.prefix.startswith("oft_"):
            options["clamp"] = True  # sd-scripts' own OFT reads a constraint of 0 as one, LyCORIS as none
        if config is not None and module.kind != "dense":
            known = peft_config.rank_of(config, path)
            if known is not None and rank is not None and known != rank and not module.kind.startswith(("oft", "boft", "lokr", "ia3")):
                self._error(
                    "rank-conflict",
                    f"{name}: the factors have rank {rank}, {_SOURCES[source]} says {known}",
                    str(assignment.match.sites[0]),
                )
            value = peft_config.alpha_of(config, path, rank)
            if value is not None and module.kind not in ("ia3", "oft-in"):
                recorded[source] = value
            options.update(peft_config.options_of(config, path, rank))
        values = set(recorded.values())
        if len(values) > 1 and not all(math.isclose(value, recorded["tensor"], rel_tol=4e-3) for value in values):
            shown = ", ".join(f"{where}: {value:g}" for where, value in recorded.items())
            self._error("alpha-conflict", f"{name}: two records of alpha that differ ({shown})", str(assignment.match.sites[0]))
        alpha = next(iter(recorded.values()), None)
        if self.alpha is not None and (alpha is None or alpha == 0) and rank:
            factors = {role: tensor for role, tensor in module.factors.items() if role != "alpha"}
            self.settled += 1
            return replace(module, factors=factors, alpha=self.alpha, alpha_source="assumed", options=options)
        if alpha is None:
            self.assumed += bool(rank)
            return replace(module, options=options)
        return replace(module, alpha=alpha, alpha_source=next(iter(recorded)), options=options)

    def _config_for(self, assignment: Assignment) -> tuple[Mapping[str, Any] | None, str]:
        """The PEFT config that covers a component: the folder's adapter_config.json, or the component's part of the header."""
        folder = assignment.hit.slot.component.folder
        if self.source.config is not None:
            return self._sound(peft_config.part_of(self.source.config, folder), "adapter_config"), "adapter_config"
        header = self.headers.get(folder)
        return (None if header is None else self._sound(header, "metadata")), "metadata"

    def _sound(self, config: Mapping[str, Any], source: str) -> Mapping[str, Any]:
        """The config without values that cannot be; each of those is an error, told once."""
        if id(config) not in self.sound:
            self.sound[id(config)], problems = peft_config.sound(config)
            for problem in problems:
                self._error("bad-config", f"{_SOURCES[source]}: {problem}")
        return self.sound[id(config)]

    # ---------------------------------------------------------------------------------------------------------- findings

    def _config_findings(self) -> None:
        configs = [self.source.config] if self.source.config is not None else list(self.headers.values())
        for config in configs:
            for part in [value for value in config.values() if isinstance(value, dict) and "peft_type" in value] or [config]:
                for severity, message in peft_config.complaints(part):
                    self.findings.append(Finding(severity, "adapter-config", None, message))

    def _unknown_findings(self) -> None:
        index: NameIndex | None = None
        for count, key in enumerate(self.detection.unknown_keys):
            hint = ""
            if count < 8:  # the nearest name costs a search through the whole table
                index = index or NameIndex([self.best.architecture])
                stem = key.partition(".")[0] if key.startswith("lora_") else key.rsplit(".", 2)[0]
                near = index.near(stem, self.best.architecture.name)
                hint = f"; the nearest known name is {near}" if near and near != stem else ""
            self._error("unknown-key", f"{key}: no module of {self.best.architecture.name} has this name{hint}", key)
        for key, what in self.detection.stems.companions.items():
            self._warn("companion", f"{key}: {what}; kept in the same dialect, otherwise --keep-unknown or --drop-unknown", key)

    def _file_findings(self, entries: list[Entry]) -> None:
        owner: dict[Site, Entry] = {}
        for entry in entries:
            for site in entry.sites:
                other = owner.setdefault(site, entry)
                if other is not entry and (other.name, other.form) != (entry.name, entry.form):
                    keys = f"{next(iter(other.keys.values()), '')} and {next(iter(entry.keys.values()), '')}"
                    self._error("duplicate-site", f"{site}: two modules of the file change it ({keys})", str(site))
        for name, clean in list(self.detection.tidied.items())[:1]:
            count = len(self.detection.tidied)
            self._warn(
                "wrapper-debris",
                f"{count} module names carry wrapper debris ({name} for {clean}): no loader finds them; convert repairs them",
            )
        dialects = {self.best.assigned[name].hit.slot.dialect.name for name in self.best.assigned} - {self.best.dialect}
        foreign = {name for name in dialects if not kin(name, self.best.dialect or "")}
        if foreign and self.source.container != "peft":
            self._warn("mixed-dialects", f"keys of {', '.join(sorted(foreign))} beside those of {self.best.dialect}")
        if self.detection.metadata_conflict:
            self._warn("metadata-conflict", self.detection.metadata_conflict)
        if self.assumed and self.best.dialect == "peft" and self.alpha is None:
            self._warn(
                "alpha-assumed",
                f"no alpha recorded for {counted(self.assumed, 'module')} (PEFT keeps it in adapter_config.json): "
                "scale 1 is assumed; --alpha A settles it",
            )
        if self.alpha is not None and not self.settled:
            raise UsageError("--alpha is for a file that records none; this one records its own", fix="leave --alpha out")


_SOURCES = {"adapter_config": "adapter_config.json", "metadata": "lora_adapter_metadata", "tensor": "the alpha tensor"}


def kin(name: str, dialect: str) -> bool:
    """Dialects that share spellings for some components (text encoders of the legacy forms)."""
    if name == dialect:
        return True
    first, second = DIALECTS.get(name), DIALECTS.get(dialect)
    if first is None or second is None:
        return False
    return any(spelling in second.spellings for spelling in first.spellings)


def _show(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"

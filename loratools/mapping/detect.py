"""Which dialect and which architecture a file's keys speak: scored, explained, and called ambiguous where nothing can decide.

Score of an architecture = tensors whose module its tables name with consistent shapes, over all tensors. Among equal scores
the evidence is weighed in this order: kernel ranks (1x1 convs), published widths, exact coverage of the published blocks,
metadata. What is still equal after that is reported as ambiguous; nothing is guessed.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from loratools.adapters.adapter import Module
from loratools.adapters.kinds import Dora, build
from loratools.adapters.kinds.glora import settle_layouts
from loratools.mapping.architectures import Architecture, registry
from loratools.mapping.dialects import DIALECTS
from loratools.mapping.dimensions import Shape, best_variant, choose_row, shapes_of, vote_dims
from loratools.mapping.names import Hit, NameIndex
from loratools.mapping.rules import Match, Row
from loratools.mapping.stems import Stem, Stems, gather, tidy
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.metadata import base_model_hint

# Module names of transformers language models (llama, gpt2, gpt-neox, opt and their kin).
_LLM = re.compile(
    r"^(?:base_model\.model\.)?(?:(?:model|language_model|transformer|gpt_neox|decoder|backbone)\.)*"
    r"(?:(?:layers|h)\.\d+\.|(?:lm_head|embed_out|embed_in|embed_tokens|word_embeddings|tokens_embed|embeddings|wte|wpe|embed_positions|position_embeddings|positions_embed|token_type_embeddings|score|norm|ln_f|final_layer_?norm)$)"
)


# cloneofsimo/lora: the number of a module in the order of the model that was trained
_POSITIONAL = re.compile(r"(?:unet|text_encoder):\d+:(?:up|down)$")


FEW = 8  # a model of so few blocks is not recognised by their being complete


_INSIDE = re.compile(r"(?:layers|h)\.\d+\.|(?:embed_tokens|norm)$")


@dataclass(frozen=True)
class Assignment:
    """What one stem is, in one architecture: the slot that spells it and the row its shape fits."""

    hit: Hit
    match: Match
    fits: bool = True


@dataclass
class Candidate:
    """One architecture's reading of a file."""

    architecture: Architecture
    assigned: dict[str, Assignment]
    dims: dict[str, dict[str, int]]  # component → solved symbols
    matched: int  # tensors named, in range, with consistent shapes
    score: float
    kernel_agreement: int = 0
    variant: str | None = None
    width_agreement: int = 0
    encoder_agreement: int = 0  # text encoders of published widths
    covered: int = 0
    dialect: str | None = None
    evidence: list[str] = field(default_factory=list)
    tied: bool = False  # one of several that nothing tells apart

    @property
    def has_denoiser(self) -> bool:
        return any(not assignment.hit.slot.component.name.startswith("text_encoder") for assignment in self.assigned.values())

    def as_json(self) -> dict[str, object]:
        return {
            "dialect": self.dialect,
            "architecture": self.architecture.published,
            "score": round(self.score, 4),
            "evidence": self.evidence,
            "tied": self.tied,
        }


@dataclass
class Detection:
    """A file's stems and modules, and the architectures that explain them best (one, or several when ambiguous)."""

    stems: Stems
    modules: dict[str, list[Module]]
    candidates: list[Candidate]
    others: list[Candidate]
    tidied: dict[str, str]  # stem → the debris-free name it was understood under
    metadata_conflict: str | None = None

    @property
    def positional(self) -> bool:
        """True for cloneofsimo's files, whose keys are numbers of modules."""
        return bool(self.stems.unknown) and not self.stems.stems and all(_POSITIONAL.match(key) for key in self.stems.unknown)

    @property
    def best(self) -> Candidate | None:
        return self.candidates[0] if self.candidates else None

    @property
    def ambiguous(self) -> bool:
        return len(self.candidates) > 1

    @property
    def dialect(self) -> str | None:
        return self.best.dialect if self.best else None

    @property
    def unknown_keys(self) -> list[str]:
        """Keys no leaf is known for, and all keys of stems the best candidate cannot name."""
        assigned = self.best.assigned if self.best else {}
        lost = [key for name, stem in self.stems.stems.items() if name not in assigned for key in stem.keys.values()]
        return [*self.stems.unknown, *lost]


def detect(
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str],
    *,
    arch: Architecture | None = None,
    container: str = "safetensors",
) -> Detection:
    """Score every architecture (or only `arch`) against a file's keys and shapes. No payload is read but alphas."""
    stems = gather(tensors)
    if not any(stem.is_adapter for stem in stems.stems.values()):
        return Detection(stems, {}, [], [], {})
    modules = {name: build(stem.factors) for name, stem in stems.stems.items()}
    settle_layouts(modules.values())
    index = NameIndex([arch] if arch else registry().values())
    hits, tidied = _all_hits(index, stems.stems)
    by_architecture: dict[str, dict[str, list[Hit]]] = defaultdict(dict)
    for name, found in hits.items():
        for hit in found:
            by_architecture[hit.slot.architecture.name].setdefault(name, []).append(hit)
    candidates = []
    for found_hits in _promising(by_architecture, stems):
        candidate = _evaluate(found_hits, stems, modules, metadata, container, len(tensors))
        if candidate.matched:
            candidates.append(candidate)
    candidates.sort(key=lambda candidate: -candidate.matched)
    kept = _decide(candidates)
    conflict = None
    if arch is None:
        kept, conflict = _ask_metadata(kept, candidates, metadata)
    for candidate in kept:
        candidate.tied = len(kept) > 1
    others = [candidate for candidate in candidates if candidate not in kept]
    return Detection(stems, modules, kept, others, tidied, conflict)


def _promising(by_architecture: Mapping[str, dict[str, list[Hit]]], stems: Stems) -> list[dict[str, list[Hit]]]:
    """The architectures that name at least half as many tensors as the best one does: shapes can only take away."""
    counts = {name: sum(len(stems.stems[stem].keys) for stem in hits) for name, hits in by_architecture.items()}
    enough = max(counts.values(), default=0) / 2
    return [hits for name, hits in by_architecture.items() if counts[name] >= enough]


def _all_hits(index: NameIndex, stems: Mapping[str, Stem]) -> tuple[dict[str, list[Hit]], dict[str, str]]:
    """stem → hits; stems nobody knows are tried again without wrapper debris."""
    hits: dict[str, list[Hit]] = {}
    tidied: dict[str, str] = {}
    for name, stem in stems.items():
        found = [hit for hit in index.hits(name, stem.scheme) if _plausible(hit)]
        if not found or all(hit.slot.architecture.open_names for hit in found):
            clean = tidy(name)
            if clean != name and not (".base_layer" in name and not stem.is_adapter):
                again = [hit for hit in index.hits(clean, stem.scheme) if _plausible(hit)]
                if again:
                    found, tidied[name] = again, clean
        if found:
            hits[name] = found
    return hits, tidied


def _plausible(hit: Hit) -> bool:
    """Any dotted name could be an LLM's; only those that look like one count."""
    if not hit.slot.architecture.open_names:
        return True
    name = hit.matches[0].name
    if hit.slot.form.prefix == "model." and _INSIDE.match(name):
        return False  # `model.layers.…` is a language model's own name, not LoraModel's prefix over `layers.…`
    return hit.slot.form.spelling == "dotted" and bool(_LLM.match(name))


# ------------------------------------------------------------------------------------------------------------------- scoring


def _keeps_kernel(module: Module) -> bool:
    """Kinds whose factors of a 1x1 convolution have four dimensions: evidence of a conv where others are flattened."""
    return (module.inner if isinstance(module, Dora) else module).kind in ("lora", "dense", "glora")


def _evaluate(
    hits: Mapping[str, list[Hit]],
    stems: Stems,
    modules: Mapping[str, list[Module]],
    metadata: Mapping[str, str],
    container: str,
    total: int,
) -> Candidate:
    """Give each stem its component, spelling and row in one architecture; the dimensions are what most modules say."""
    architecture = next(iter(hits.values()))[0].slot.architecture
    component_of = _components_by_prefix(hits, modules)
    counts = _usual_dialects(hits, stems.stems)
    dialect = _dialect(counts, architecture, stems, metadata, container)
    chosen: dict[str, Hit] = {}
    for name, found in hits.items():
        chosen[name] = min(found, key=lambda hit: _preference(hit, component_of, dialect, counts))
    dims = _solve_by_component(chosen, modules)
    assigned: dict[str, Assignment] = {}
    matched = kernel_agreement = 0
    for name, hit in chosen.items():
        shapes = shapes_of(modules[name], hit.matches[0].row)
        match, fits = hit.matches[0], False
        for shape in shapes:
            match, solved = choose_row(hit.matches, shape, dims[hit.slot.component.name])
            fits = fits or solved is not None
            if fits:
                break
        assigned[name] = Assignment(hit, match, fits)
        if fits:
            ranges = hit.slot.component.table.ranges
            if all(number < ranges.get(slot, number + 1) for slot, number in match.index.items()):
                matched += len(stems.stems[name].keys)
            flattened = not modules[name] or not _keeps_kernel(modules[name][0])
            kernel_agreement += flattened or any((len(shape) > 2) == (match.row.layer == "conv") for shape in shapes)
    candidate = Candidate(architecture, assigned, dims, matched, matched / max(total, 1), kernel_agreement, dialect=dialect)
    _weigh(candidate)
    return candidate


def _preference(hit: Hit, component_of: Mapping[str, str], dialect: str | None, counts: Mapping[str, int]) -> tuple[bool, bool, int, int]:
    """Sort key of a stem's hits: the prefix's component, the file's dialect, the commoner dialect, the usual spelling."""
    slot = hit.slot
    return (component_of[slot.form.prefix] != slot.component.name, slot.dialect.name != dialect, -counts[slot.dialect.name], slot.order)


def _solve_by_component(chosen: Mapping[str, Hit], modules: Mapping[str, list[Module]]) -> dict[str, dict[str, int]]:
    grouped: dict[str, list[tuple[Row, Shape]]] = defaultdict(list)
    for name, hit in chosen.items():
        row = hit.matches[0].row
        grouped[hit.slot.component.name].append((row, shapes_of(modules[name], row)[0]))
    return {component: vote_dims(pairs) for component, pairs in grouped.items()}


def _components_by_prefix(hits: Mapping[str, list[Hit]], modules: Mapping[str, list[Module]]) -> dict[str, str]:
    """Which component the keys behind each prefix belong to: the one that knows most of the names, then most widths."""
    votes: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0, 0]))
    for name, found in hits.items():
        shape = modules[name][0].shape if modules[name] else ()
        for hit in {(hit.slot.form.prefix, hit.slot.component.name): hit for hit in found}.values():
            vote = votes[hit.slot.form.prefix][hit.slot.component.name]
            vote[0] += 1
            vote[1] += _width_agrees(hit, shape)
            vote[2] -= hit.slot.order
    return {prefix: max(components, key=lambda name: tuple(components[name])) for prefix, components in votes.items()}


def _width_agrees(hit: Hit, shape: Shape) -> bool:
    solved = choose_row(hit.matches, shape, {})[1]
    return solved is not None and bool(solved) and all(hit.slot.component.widths.get(symbol) == value for symbol, value in solved.items())


def _usual_dialects(hits: Mapping[str, list[Hit]], stems: Mapping[str, Stem]) -> Counter[str]:
    """How many tensors each dialect would explain."""
    counts: Counter[str] = Counter()
    for name, found in hits.items():
        for dialect in {hit.slot.dialect.name for hit in found}:
            counts[dialect] += len(stems[name].keys)
    return counts


def _weigh(candidate: Candidate) -> None:
    """Published widths and block counts, as evidence."""
    architecture = candidate.architecture
    count = len(candidate.assigned)
    candidate.evidence.append(f"{count} modules named by the {architecture.name} table, {candidate.matched} tensors in all")
    dims = candidate.dims.get("denoiser", {})
    candidate.variant, candidate.width_agreement = best_variant(architecture, dims)
    if candidate.width_agreement:
        shown = ", ".join(f"{symbol} = {value}" for symbol, value in sorted(dims.items()))
        candidate.evidence.append(f"widths are published ones: {shown}")
    for component in architecture.components:
        widths = {symbol: value for symbol, value in candidate.dims.get(component.name, {}).items() if symbol in component.widths}
        if widths and all(component.widths[symbol] == value for symbol, value in widths.items()):
            candidate.encoder_agreement += 1
            candidate.evidence.append(f"{component.name} has the widths of {architecture.name}'s")
        depths = {slot: numbers for slot, numbers in _indices(candidate, component.name).items() if slot in component.widths}
        if any(len(numbers) > FEW and numbers == set(range(component.widths[slot])) for slot, numbers in depths.items()):
            candidate.encoder_agreement += 1
            candidate.evidence.append(f"{component.name} has the depth of {architecture.name}'s")
    seen: dict[str, set[int]] = defaultdict(set)
    ranges: dict[str, int] = {}
    for component in architecture.components:
        if component.name.startswith("denoiser"):
            ranges.update(component.table.ranges)
            for slot, numbers in _indices(candidate, component.name).items():
                seen[slot] |= numbers
    if candidate.variant:
        ranges.update({slot: count for slot, count in architecture.variants[candidate.variant].items() if slot in ranges})
    for slot, numbers in seen.items():
        if numbers == set(range(ranges.get(slot, 0))):
            candidate.covered += len(numbers) > FEW  # the first blocks alone may be what somebody chose to train
            candidate.evidence.append(f"all {len(numbers)} blocks of index {slot} are there")
        elif max(numbers) >= ranges.get(slot, 0):
            candidate.evidence.append(f"block {max(numbers)} is beyond the {ranges.get(slot, 0)} of {architecture.name}")


def _indices(candidate: Candidate, component: str) -> dict[str, set[int]]:
    """slot → block indices one component's modules have."""
    found: dict[str, set[int]] = defaultdict(set)
    for assignment in candidate.assigned.values():
        if assignment.hit.slot.component.name == component:
            for slot, number in assignment.match.index.items():
                found[slot].add(number)
    return found


# ------------------------------------------------------------------------------------------------------------------ deciding


def _decide(candidates: list[Candidate]) -> list[Candidate]:
    """The candidates nothing but metadata can tell apart."""
    if not candidates:
        return []
    kept = [candidate for candidate in candidates if candidate.matched == candidates[0].matched]
    kept = _language_models(kept)
    for weight in ("kernel_agreement", "width_agreement_any", "encoder_agreement", "covered"):
        if len(kept) > 1:
            values = [_weight(candidate, weight) for candidate in kept]
            kept = [candidate for candidate, value in zip(kept, values, strict=True) if value == max(values)]
    return kept


def _weight(candidate: Candidate, name: str) -> int:
    if name == "width_agreement_any":  # published or not; how many symbols a table has says nothing
        return int(candidate.width_agreement > 0)
    return int(getattr(candidate, name))


def _language_models(kept: list[Candidate]) -> list[Candidate]:
    """A language model's names are also those of text encoders built on one: alone in a file they are an LLM's."""
    named = [candidate for candidate in kept if not candidate.architecture.open_names]
    if len(named) == len(kept):
        return kept
    with_denoiser = [candidate for candidate in named if candidate.has_denoiser]
    return with_denoiser or [candidate for candidate in kept if candidate.architecture.open_names]


def _ask_metadata(kept: list[Candidate], candidates: list[Candidate], metadata: Mapping[str, str]) -> tuple[list[Candidate], str | None]:
    """Metadata breaks ties and never overrules tensors; a contradiction is reported."""
    hinted = hinted_architecture(metadata)
    if hinted is None or not kept:
        return kept, None
    name, source = hinted
    agreeing = [candidate for candidate in kept if candidate.architecture.name == name]
    if agreeing:
        if len(kept) > 1:
            agreeing[0].evidence.append(f"metadata: {source}")
        return agreeing, None
    return kept, f"metadata says {source}, the tensors say {' or '.join(candidate.architecture.name for candidate in kept)}"


def hinted_architecture(metadata: Mapping[str, str]) -> tuple[str, str] | None:
    """The architecture a file's metadata names, with the words it uses, or None."""
    own = metadata.get("loratools.architecture")
    if own in registry():
        return own, f"loratools.architecture = {own}"
    hint = base_model_hint(metadata)
    if hint is None:
        return None
    bare = hint.removesuffix("/lora")
    for architecture in registry().values():
        if bare in architecture.base_versions or bare == architecture.modelspec:
            return architecture.name, hint
    return None


def _dialect(counts: Counter[str], architecture: Architecture, stems: Stems, metadata: Mapping[str, str], container: str) -> str | None:
    """The dialect that explains most tensors; OneTrainer and PEFT are told from their look-alikes by what lies beside them."""
    if not counts:
        return None
    if container == "peft" and counts["peft"]:
        return "peft"
    most = max(counts.values())
    own = metadata.get("loratools.dialect", "")
    if counts[own] == most:  # look-alikes: kohya and OneTrainer spell a UNet of SD1 the same
        return own
    best = next(name for name in DIALECTS if counts[name] == most)
    beside = any(key.startswith("bundle_emb.") for key in stems.companions) or any(key.startswith("ot_") for key in metadata)
    if beside and counts["onetrainer"] == most:
        return "onetrainer"
    if best == "diffusers" and architecture.open_names:
        return "peft"
    return best

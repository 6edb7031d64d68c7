"""Language models whose head shares the embedding's tensor, and vocabularies that grew.

A change of either one must not reach the other: the head becomes a tensor of its own (`lm_head.weight`) and the configuration says
`tie_word_embeddings: false`. Rows that an adapter adds to embedding and head change `vocab_size`. Source: transformers'
`tie_weights`, PEFT's `modules_to_save`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratools.errors import MalformedError
from loratools.mapping.bases import HEAD, Base
from loratools.operations.merging.placing import Placement

HEAD_WEIGHT = f"{HEAD}.weight"
_HEADS = (HEAD_WEIGHT, f"language_model.{HEAD_WEIGHT}", "embed_out.weight", "output.weight")  # old multimodal ones, GPT-NeoX, InternLM 2


@dataclass
class Edits:
    """What the configuration has to say about the result: key → value, and what stands against it."""

    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def language_edits(placement: Placement, base: Base, config: Mapping[str, Any] | None) -> Edits:
    """What a merge into this language model needs beside its weights; enters a head of its own into the placement.

    config: config.json of the base, None for a file without one.
    """
    edits = Edits()
    embedding = base.embedding
    if embedding is None:
        return edits
    shared = tied(base, config)
    if HEAD_WEIGHT in placement.regions and HEAD_WEIGHT not in base.tensors and not shared:
        edits.problems.append(f"{HEAD_WEIGHT}: the base has no {HEAD}, and by its configuration none that shares {embedding}")
    if shared and (embedding in placement.regions or HEAD_WEIGHT in placement.regions):
        if config is None:
            edits.problems.append(f"{embedding} is also the weight of {HEAD}: a single file has no config.json that could untie them")
        placement.regions.setdefault(HEAD_WEIGHT, [])
        edits.values["tie_word_embeddings"] = False
        edits.notes.append(f"{HEAD} no longer shares {embedding}: both are written, tie_word_embeddings is false")
    grown = {name: placement.grown[name][0] for name in (embedding, HEAD_WEIGHT) if name in placement.grown}
    if grown:
        edits.values["vocab_size"] = max(grown.values())
        heights = {name: grown.get(name, base.tensors[name].shape[0]) for name in (embedding, HEAD_WEIGHT) if name in base.tensors}
        heights |= grown
        if HEAD_WEIGHT in placement.regions:
            heights.setdefault(HEAD_WEIGHT, base.tensors[embedding].shape[0])
        if len(set(heights.values())) > 1:
            told = ", ".join(f"{name} has {rows} rows" for name, rows in heights.items())
            edits.problems.append(f"the vocabulary grew in one place only: {told}")
        if config is None:
            edits.problems.append("the vocabulary grew: a single file has no config.json whose vocab_size could follow")
    return edits


def tied(base: Base, config: Mapping[str, Any] | None) -> bool:
    """Does the head share the embedding's tensor, by the configuration, or where that says nothing by its absence?"""
    text = (config or {}).get("text_config")
    said = (config or {}).get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None)
    headed = config is None or any("LM" in name or "Generation" in name for name in config.get("architectures") or ["LM"])
    return headed and (base.tensors.keys().isdisjoint(_HEADS) if said is None else bool(said))


def missing_tokens(folder: Path, rows: int) -> int:
    """How many tokens of the tokenizer in an adapter's folder have no row among `rows`; 0 where there is no tokenizer."""
    highest = -1
    for name, entries in (("added_tokens.json", _added), ("tokenizer.json", _listed)):
        path = folder / name
        if path.is_file():
            highest = max([highest, *entries(json_object(path))])
    return max(highest + 1 - rows, 0)


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object a file holds. Raises MalformedError naming the file."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise MalformedError(f"{path}: not JSON: {error}", fix="restore the file from where the model came from") from error
    if not isinstance(found, dict):
        raise MalformedError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _added(content: Any) -> list[int]:
    return [value for value in content.values() if isinstance(value, int)] if isinstance(content, dict) else []


def _listed(content: Any) -> list[int]:
    tokens = content.get("added_tokens") if isinstance(content, dict) else None
    return [token["id"] for token in tokens or [] if isinstance(token, dict) and isinstance(token.get("id"), int)]


def edited_config(text: str, values: Mapping[str, Any]) -> str:
    """A config.json with these values, in the order it had; a model of several parts has them where its own say so."""
    config = json.loads(text)
    parts = [config, *(part for part in (config.get("text_config"),) if isinstance(part, dict))]
    for key, value in values.items():
        holders = [part for part in parts if key in part] or [config]
        for part in holders:
            part[key] = value
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"

"""What the metadata of adapter files say, read with tolerance: every value is a string somebody's trainer wrote.

`"None"`, `"False"` and `"True"` are what they say, numbers are numbers, structures are JSON text; what is broken stays
text and gives a finding, never an exception. The one exception is `lora_adapter_metadata` (diffusers), which carries the
scale: broken, it is refused. Sources: sd-scripts (ss_*), Stability AI ModelSpec (modelspec.*), ai-toolkit, OneTrainer,
diffusers, PEFT. No torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from loratools.errors import InputError, MalformedError
from loratools.report import Finding
from loratools.tensors.header import duplicates_of, parse_json, printable
from loratools.tensors.privacy import private_values, strip_private

__all__ = [
    "PEFT_KEY",
    "base_model_hint",
    "bool_field",
    "float_field",
    "json_field",
    "lora_adapter_metadata",
    "parse_value",
    "peft_metadata",
    "private_values",
    "strip_private",
    "text_field",
    "trigger_words",
]

PEFT_KEY = "lora_adapter_metadata"
_WORDS = {"None": None, "null": None, "": None, "True": True, "true": True, "False": False, "false": False}
_TRIGGER_KEYS = ("trigger_word", "trigger_words", "trigger", "triggers", "trigger_phrase", "activation_text", "instance_prompt")
_STRUCTURES = ("training_info", "software", "ss_network_args", "ot_config")  # where trainers put such a field inside JSON
_REPEATS = re.compile(r"\d+_(.+)")  # sd-scripts' folder name: <repeats>_<class tokens>
_MOST_TAGS = 10


def parse_value(text: str) -> Any:
    """The value a metadata string stands for: None, a bool, a number, a structure, else the text itself."""
    stripped = text.strip()
    if stripped in _WORDS:
        return _WORDS[stripped]
    if stripped[:1] not in '{["-0123456789':
        return text
    try:
        return json.loads(stripped, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def text_field(metadata: Mapping[str, str], key: str) -> str | None:
    """The text under a key; None when it is absent, empty or "None"."""
    value = metadata.get(key)
    return None if value is None or value.strip() in ("", "None", "null") else value


def float_field(metadata: Mapping[str, str], key: str) -> float | None:
    """The number under a key; None when it is absent or no number ("Dynamic")."""
    value = parse_value(metadata.get(key, ""))
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def bool_field(metadata: Mapping[str, str], key: str) -> bool | None:
    """The truth value under a key; 0 and 1 count, everything else is None."""
    value = parse_value(metadata.get(key, ""))
    return bool(value) if isinstance(value, bool) or value in (0, 1) else None


def json_field(metadata: Mapping[str, str], key: str, warnings: list[Finding] | None = None) -> Any:
    """The structure (dict or list) under a key; None when it is absent or broken, and a broken one is a finding."""
    text = text_field(metadata, key)
    if text is None:
        return None
    value = parse_value(text)
    if isinstance(value, dict | list):
        return value
    if warnings is not None:
        warnings.append(Finding("warning", "broken-metadata", key, f"metadata {printable(key)} is no JSON structure: read as text"))
    return None


def base_model_hint(metadata: Mapping[str, str]) -> str | None:
    """The base model as the file names it, raw: ss_base_model_version, else modelspec.architecture."""
    return text_field(metadata, "ss_base_model_version") or text_field(metadata, "modelspec.architecture")


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """The words that call an adapter, most explicit source first, each once.

    A trigger field of ModelSpec or of a trainer; then what every caption of a data set has in common; then the class
    tokens of the data set folders.
    """
    found: list[str] = []
    for key in ("modelspec.trigger_phrase", *_TRIGGER_KEYS, *(f"ss_{key}" for key in _TRIGGER_KEYS)):
        found += _words(parse_value(metadata.get(key, "")))
    for key in _STRUCTURES:
        for name, value in _entries(json_field(metadata, key)):
            if name in _TRIGGER_KEYS:
                found += _words(value)
    frequency = json_field(metadata, "ss_tag_frequency")
    folders = json_field(metadata, "ss_dataset_dirs")
    found += _common_tags(frequency, folders)
    for structure in (frequency, folders):
        for folder in structure if isinstance(structure, dict) else ():
            match = _REPEATS.fullmatch(folder)
            found += [match[1].strip()] if match else []
    return list(dict.fromkeys(word for word in found if word))


def _words(value: Any) -> list[str]:
    if isinstance(value, str):
        return [word.strip() for word in value.split(",")]
    return [word for item in value for word in _words(item)] if isinstance(value, list) else []


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every (key, value) pair anywhere inside a structure."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield from item.items()
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def _common_tags(frequency: Any, folders: Any) -> list[str]:
    """The tags that stand in every caption of a folder: as often as it has images, or as the commonest tag of it."""
    found: list[str] = []
    for folder, tags in frequency.items() if isinstance(frequency, dict) else ():
        counts = {tag.strip(): n for tag, n in tags.items() if isinstance(n, int | float)} if isinstance(tags, dict) else {}
        if not counts:
            continue
        record = folders.get(folder) if isinstance(folders, dict) else None
        images = record.get("img_count") if isinstance(record, dict) else None
        most = max(counts.values())
        needed = images if isinstance(images, int | float) and 0 < images <= most else most
        common = [tag for tag, n in sorted(counts.items(), key=lambda item: -item[1]) if n >= needed]
        if len(common) <= _MOST_TAGS and (most > 1 or len(counts) == 1):  # else the captions are sentences of their own
            found += common
    return found


def peft_metadata(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """diffusers' `lora_adapter_metadata`: {"unet": {"r": 4, …}, "text_encoder": {…}}; {} when the file has none.

    Raises InputError when it is there and broken: it holds the scale.
    """
    text = metadata.get(PEFT_KEY)
    if text is None:
        return {}
    try:
        value = parse_json(text.encode("utf-8", "surrogatepass"), f"metadata {PEFT_KEY}")
    except MalformedError as error:
        raise InputError(error.message, fix=f"write the configuration anew, or take {PEFT_KEY} out and give --alpha") from error
    if not isinstance(value, dict) or duplicates_of(value):
        raise InputError(f"metadata {PEFT_KEY}: expected a JSON object with each key once")
    components: dict[str, dict[str, Any]] = {}
    for key, item in value.items():
        component, dot, field = key.partition(".")
        if not dot:
            component, field = "", key
        components.setdefault(component, {})[field] = item
    return components


def lora_adapter_metadata(components: Mapping[str, Mapping[str, Any]]) -> str:
    """The inverse of `peft_metadata`, as diffusers writes it: one flat object, indent 2, sorted keys."""
    flat: dict[str, Any] = {}
    for component, config in components.items():
        flat.update({f"{component}.{field}" if component else field: value for field, value in config.items()})
    return json.dumps(flat, indent=2, sort_keys=True)

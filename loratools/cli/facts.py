"""What the metadata of a file tells about its training, as a table: one row a fact, each with the keys that record it.

Producers: kohya's sd-scripts and its descendants write `ss_*`, modelspec.sai `modelspec.*`, PEFT `adapter_config.json`. A value
of "None" or "" means that the producer had nothing to say (sd-scripts writes Python's None as text).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from loratools.cli.console import clean

# label → keys, the first that says something wins
BASE = ("ss_sd_model_name", "base_model_name_or_path", "ss_base_model_version", "modelspec.architecture")
FACTS: dict[str, tuple[str, ...]] = {
    "title": ("modelspec.title", "ss_output_name"),
    "author": ("modelspec.author",),
    "usage": ("modelspec.usage_hint",),
    "steps": ("ss_steps", "ss_max_train_steps"),
    "epochs": ("ss_epoch", "ss_num_epochs"),
    "images": ("ss_num_train_images",),
    "batch": ("ss_total_batch_size", "ss_batch_size_per_device"),
    "resolution": ("ss_resolution", "modelspec.resolution"),
    "optimizer": ("ss_optimizer",),
    "learning rate": ("ss_learning_rate", "ss_unet_lr"),
    "scheduler": ("ss_lr_scheduler",),
    "precision": ("ss_mixed_precision",),
    "network": ("ss_network_module", "peft_type"),
    "comment": ("ss_training_comment", "modelspec.description"),
}
_EMPTY = frozenset({"", "None", "null", "{}", "[]"})
_LONGEST = 160  # characters of a value on the page; `--metadata KEY` prints all of it


def fact(metadata: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    """The first of `keys` that says something, escaped and cut to one line."""
    for key in keys:
        value = metadata.get(key)
        if value is not None and str(value).strip() not in _EMPTY:
            text = clean(str(value).strip())
            return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    return None


def training_facts(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, text) of every fact that the metadata records."""
    found = [(label, text) for label, keys in FACTS.items() if (text := fact(metadata, keys)) is not None]
    started, finished = (_number(metadata.get(f"ss_training_{moment}_at")) for moment in ("started", "finished"))
    if started is not None:
        day = datetime.fromtimestamp(started, tz=UTC).strftime("%Y-%m-%d")
        hours = f", {(finished - started) / 3600:.1f} h" if finished is not None and finished >= started else ""
        found.append(("trained", day + hours))
    elif (date := fact(metadata, ("modelspec.date",))) is not None:
        found.append(("trained", date))
    return found


def _number(value: object) -> float | None:
    """A timestamp out of a header: a number of seconds in this millennium, or nothing."""
    try:
        seconds = float(str(value))
    except ValueError:
        return None
    return seconds if 0 < seconds < 32503680000 else None

"""What a folder holds beside the weights: configurations that have to say something else now, an adapter's own tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loratools.operations.merging.plan import MergePlan
from loratools.operations.merging.untying import edited_config, json_object
from loratools.tensors.writer import kept_aside

# Files of an adapter's folder that belong to a vocabulary it made larger.
_VOCABULARY = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "spiece.model", "chat_template.jinja",
)  # fmt: skip

_CONFIG_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def texts(plan: MergePlan, dtype: str | None) -> dict[Path, str]:
    """Configurations that have to say something else: an untied head, a larger vocabulary, another dtype."""
    if not plan.layout.folder:
        return {}
    found: dict[Path, str] = {}
    root = plan.source.path if plan.source.path.is_dir() else plan.source.path.parent
    for relative in plan.layout.copies:
        if relative.name != "config.json":
            continue
        content = json_object(root / relative)
        values: dict[str, Any] = dict(plan.edits.values) if plan.config == root / relative else {}
        if dtype is not None:
            values |= {key: _CONFIG_DTYPES[dtype] for key in ("torch_dtype", "dtype") if key in content}
        if values:
            found[relative] = edited_config((root / relative).read_text("utf-8"), values)
    return found


def extra_files(plan: MergePlan) -> dict[Path, Path]:
    """The tokenizer of the adapter that brought new rows of the vocabulary."""
    if "vocab_size" not in plan.edits.values:
        return {}
    folders = [one.path for one in plan.given if one.path.is_dir() and (one.path / "tokenizer_config.json").is_file()]
    return {Path(name): folder / name for folder in folders for name in _VOCABULARY if (folder / name).is_file()}


def aside(plan: MergePlan, output: Path) -> list[str]:
    """A warning where the folder that is replaced holds more than the new one will: then it is kept."""
    layout = plan.layout
    coming = {*layout.weights.values(), *layout.indexes.values(), *layout.copies, *extra_files(plan)}
    kept = kept_aside(output, coming) if layout.folder else None
    return [f"{output} holds files that the new folder does not have: the old one is kept as {kept.name}"] if kept is not None else []

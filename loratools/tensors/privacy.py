"""Private values in metadata: absolute paths, and the user and host names in them or beside them.

Trainers record the command line's paths, so a published adapter tells its maker's home folder. `strip_private` takes out
exactly the offending strings: inside JSON text the entry, in plain text the passage, everything else stays as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

_END = r"[^\s\"'<>|,;]*"  # a path inside a text ends at a space or a quote
_PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("absolute path", re.compile(rf"file://{_END}", re.IGNORECASE)),
    ("absolute path", re.compile(rf"(?<![A-Za-z0-9])[A-Za-z]:(?:\\|/(?!/)){_END}")),  # C:\Users\me, D:/loras
    ("absolute path", re.compile(rf"(?<!\\)\\\\[\w.$-]+\\{_END}")),  # \\server\share
    ("absolute path", re.compile(r"(?<![\w./\\~-])/(?!/)(?:[^/\s\"'<>|,;]+/)+" + _END)),
    ("path in a home folder", re.compile(rf"(?<![\w/~])~[\w.-]*[/\\]{_END}")),
    ("user and host name", re.compile(r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)*")),
    ("host name", re.compile(r"\b(?:DESKTOP|LAPTOP|WIN)-[A-Z0-9]{5,}\b|\b[\w-]+\.(?:local|lan|internal)\b")),
)
_WHOLE_PATH = re.compile(r"\s*(?:/[^\n/\s][^\n]*|[A-Za-z]:[\\/][^\n]*|\\\\[^\n]+|~[\w.-]*[\\/][^\n]*)")  # spaces allowed
_PRIVATE_KEY = re.compile(
    r"(?:.*[._\s-])?(?:user|host|machine|computer|node|login)(?:[_-]?name)?|(?:.*[._-])?(?:home|cwd|pwd|work(?:ing)?_dir)", re.IGNORECASE
)


def private_values(metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    """(key, reason) for each metadata entry that holds something private, each reason once."""
    found: dict[tuple[str, str], None] = {}
    for key, text in metadata.items():
        for reason in _entry_reasons(key, text):
            found[(key, reason)] = None
    return list(found)


def strip_private(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata without what `private_values` finds; entries with nothing private keep every byte, JSON stays JSON."""
    kept: dict[str, str] = {}
    for key, text in metadata.items():
        if not any(_entry_reasons(key, text)):
            kept[key] = text
            continue
        rest = _stripped(key, text)
        if rest.strip():
            kept[key] = rest
    return kept


def _stripped(key: str, text: str) -> str:
    structure = _structure(text)
    if structure is not None:
        return _dump(_without_private(structure), text)
    return "" if _key_is_private(key, text) else _cut(text)


def _structure(text: str) -> Any:
    """The parsed dict or list of a JSON text, else None."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _dump(value: Any, like: str) -> str:
    """JSON text in the layout of `like`."""
    indent = 2 if "\n" in like else None
    separators = None if indent or ", " in like or ": " in like else (",", ":")
    return json.dumps(value, indent=indent, separators=separators, ensure_ascii=like.isascii())


def _entry_reasons(key: str, text: str) -> Iterator[str]:
    structure = _structure(text)
    if structure is None:
        yield from _reasons(text)
        if _key_is_private(key, text):
            yield "user or host name"
        return
    stack = [structure]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            for name, value in item.items():
                yield from _reasons(name)
                if isinstance(value, str) and _key_is_private(name, value):
                    yield "user or host name"
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
        elif isinstance(item, str):
            yield from _reasons(item)


def _key_is_private(key: str, value: str) -> bool:
    return value.strip() not in ("", "None", "null") and _PRIVATE_KEY.fullmatch(key) is not None


def _reasons(text: str) -> Iterator[str]:
    """Why a string is private; nothing for one that is not."""
    if text.startswith("data:"):  # an embedded thumbnail: base64 has slashes
        return
    if _WHOLE_PATH.fullmatch(text):
        yield "absolute path"
        return
    for reason, pattern in _PATTERNS:
        if pattern.search(text):
            yield reason


def _cut(text: str) -> str:
    """A plain text without its private passages."""
    if _WHOLE_PATH.fullmatch(text):
        return ""
    for _, pattern in _PATTERNS:
        text = pattern.sub("", text)
    return text


def _without_private(value: Any) -> Any:
    """A structure without the entries whose key or string is private."""
    if isinstance(value, dict):
        return {
            key: _without_private(item)
            for key, item in value.items()
            if not any(_reasons(key)) and not (isinstance(item, str) and (any(_reasons(item)) or _key_is_private(key, item)))
        }
    if isinstance(value, list):
        return [_without_private(item) for item in value if not (isinstance(item, str) and any(_reasons(item)))]
    return value

"""The page `loratools inspect` shows about a file, and the table it shows about many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loratools.cli.console import clean, file_size, number, size
from loratools.cli.facts import BASE, fact, training_facts
from loratools.cli.spectrum_view import energy_chart, module_table, print_wide
from loratools.errors import counted

_SEVERITY = {"error": "bold red", "warning": "yellow"}
_SHOWN = 12
_ALPHA_FROM = {
    "tensor": "from the alpha tensors",
    "metadata": "from the metadata",
    "adapter_config": "from adapter_config.json",
    "assumed": "assumed; the file records none",
}


def show(console: Console, result: Mapping[str, Any], *, modules: bool = False, energy: bool = False) -> None:
    """One page about one file; `modules`: with the table of all modules; `energy`: with the chart of where the change lies."""
    console.print(_title(result))
    console.print(_verdict(result))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in _rows(result):
        grid.add_row("  " + label, value)
    print_wide(console, grid)
    _candidates(console, result)
    rows = result.get("modules") or []
    if energy and rows:
        console.print()
        console.print(energy_chart(console, rows))
    if modules and rows:
        print_wide(console, module_table(rows))
    _problems(console, result.get("problems") or [])


def show_many(console: Console, results: Iterable[Mapping[str, Any]], *, full: bool = False) -> None:
    """A line a file, or a page a file. Files that could not be read have their line too."""
    if full:
        for result in results:
            if "error" not in result:
                show(console, result, modules=True, energy=True)
                console.print()
        return
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("file", overflow="fold")
    for column in ("dialect", "architecture", "rank", "alpha"):
        table.add_column(column, overflow="fold")
    table.add_column("problems", justify="right")
    for result in results:
        table.add_row(*_line(result))
    print_wide(console, table)


def _line(result: Mapping[str, Any]) -> list[Text]:
    name = Text(clean(result["path"]))
    if "error" in result:
        return [name, Text("cannot be read", "bold red"), *([Text("-")] * 3), Text("1 error", "bold red")]
    adapter = result.get("adapter") or {}
    severities = [problem["severity"] for problem in result.get("problems") or []]
    counts = [counted(severities.count(level), level) for level in _SEVERITY if level in severities]
    style = next((style for level, style in _SEVERITY.items() if level in severities), "")
    what = result.get("dialect") or result.get("kind")
    values = (what, _architecture(result), _spread(adapter.get("ranks")), _spread(adapter.get("alphas")))
    return [name, *(Text(clean(value or "-")) for value in values), Text(", ".join(counts) or "-", style)]


def _title(result: Mapping[str, Any]) -> Text:
    path = Path(result.get("path") or "")
    bytes_on_disk = file_size(path)
    told = [clean(result.get("container") or "unknown container"), *([size(bytes_on_disk)] if bytes_on_disk is not None else [])]
    return Text.assemble((clean(path.name or path), "bold"), "  ", (" · ".join(told), "dim"))


def _verdict(result: Mapping[str, Any]) -> Text:
    """What it is, in one line."""
    kind = result.get("kind") or "unknown"
    if kind == "unknown":
        return Text("  not recognised", "bold yellow")
    kinds = (result.get("adapter") or {}).get("kinds") or {}
    what = f"{' + '.join(kinds)} adapter" if kinds else kind.replace("-", " ")
    names = [word for word in (result.get("dialect"), _architecture(result)) if word]
    words = [(clean(what), "bold cyan"), *((f" · {clean(word)}", "cyan") for word in names)]
    return Text.assemble("  ", *words, *([(" · ambiguous", "bold yellow")] if result.get("ambiguous") else []))


def _architecture(result: Mapping[str, Any]) -> str:
    name, variant = result.get("architecture"), result.get("variant")
    return f"{name} ({variant})" if name and variant else name or ""


def _rows(result: Mapping[str, Any]) -> list[tuple[str, Text]]:
    metadata = result.get("metadata") or {}
    rows = [("trained on", fact(metadata, BASE))]
    rows += _adapter_rows(result) if result.get("adapter") else []
    rows += _checkpoint_rows(result["checkpoint"]) if result.get("checkpoint") else []
    rows += [("trigger words", ", ".join(clean(word) for word in result.get("trigger_words") or []))]
    rows += training_facts(metadata)
    unknown = result.get("unknown_keys") or []
    more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
    rows += [(f"unknown keys ({len(unknown)})", ", ".join(clean(key) for key in unknown[:_SHOWN]) + more)] if unknown else []
    rows += [(name, clean(value)) for name, value in (result.get("hashes") or {}).items() if value]
    return [(label, Text(value)) for label, value in rows if value]


def _adapter_rows(result: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    adapter = result["adapter"]
    source = adapter.get("alpha_source")
    alphas = _spread(adapter.get("alphas")) or "none"
    scales = {number(row.get("scale")): None for row in result.get("modules") or [] if row.get("scale") is not None}
    scale = f"; scale {', '.join(list(scales)[:4])}{' …' if len(scales) > 4 else ''}" if scales else ""
    return [
        ("modules", f"{adapter.get('modules')}: {_spread(adapter.get('components'), each=' ')}"),
        ("kinds", _spread(adapter["kinds"]) if len(adapter.get("kinds") or {}) > 1 else None),
        ("rank", _spread(adapter.get("ranks"))),
        ("alpha", f"{alphas}{f' ({_ALPHA_FROM.get(source, clean(source))})' if source else ''}{scale}"),
        ("parameters", _count(adapter.get("parameters"))),
        ("dtype", _spread(adapter.get("dtypes"))),
    ]


def _checkpoint_rows(checkpoint: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    tensors = checkpoint.get("tensors")
    parts = dict(checkpoint.get("components") or {})
    counts = {name: part.get("tensors", "") if isinstance(part, Mapping) else part for name, part in parts.items()}
    return [
        ("layout", clean(checkpoint.get("layout") or "unknown")),
        ("components", _spread(counts, each=" ")),
        ("tensors", f"{tensors}, {size(checkpoint['bytes'])}" if checkpoint.get("bytes") is not None else number(tensors)),
        ("parameters", _count(checkpoint.get("parameters"))),
        ("dtype", _spread(checkpoint.get("dtypes"))),
    ]


def _spread(counts: Mapping[str, Any] | None, each: str = " × ") -> str:
    """{"16": 722, "8": 264} → "16 × 722, 8 × 264"; a single value stands alone; the rarest of many are left out."""
    if not counts:
        return ""
    if len(counts) == 1 and each != " ":
        return clean(next(iter(counts)))
    common = sorted(counts.items(), key=lambda item: -item[1] if isinstance(item[1], int) else 0)
    told = ", ".join(f"{clean(name)}{each}{count}" for name, count in common[:6])
    return told + (f", {len(common) - 6} more" if len(common) > 6 else "")


def _count(parameters: int | None) -> str | None:
    if not parameters:
        return None
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if parameters >= unit:
            return f"{parameters / unit:.3g} {name}"
    return f"{parameters:,}"


def _candidates(console: Console, result: Mapping[str, Any]) -> None:
    if not result.get("ambiguous") and result.get("kind") != "unknown":
        return
    candidates = result.get("candidates") or []
    if result.get("ambiguous"):
        candidates = [candidate for candidate in candidates if candidate.get("tied", True)]
    if not candidates:
        return
    console.print(Text("  equally good readings; --arch settles it:" if result.get("ambiguous") else "  nearest readings:", "yellow"))
    for candidate in candidates[:6]:
        evidence = candidate.get("evidence") or ""
        told = evidence if isinstance(evidence, str) else "; ".join(str(item) for item in evidence)
        names = " · ".join(clean(candidate.get(key) or "?") for key in ("architecture", "dialect"))
        console.print(Text(f"    {names} (score {number(candidate.get('score'))}): {clean(told)}"))


def _problems(console: Console, problems: list[Mapping[str, Any]]) -> None:
    if not problems:
        return
    console.print()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for problem in sorted(problems, key=lambda problem: problem["severity"] != "error"):
        style = _SEVERITY.get(problem["severity"], "")
        told, site = problem.get("message") or "", problem.get("site")
        where = f"{site}: " if site and site not in told else ""
        message = Text.assemble((clean(problem.get("code") or ""), style), f"  {clean(where + told)}")
        if problem.get("fix"):
            message.append(f"\nfix: {clean(problem['fix'])}", "green")
        grid.add_row(Text(f"  {problem['severity']}", style), message)
    console.print(grid)

"""Pictures of an adapter: norm by block and module type, singular-value spectra, rank histogram.

Norms of several modules in one cell are added as energies, √(Σ ‖ΔW‖²), so that a row's or a column's squares sum to its own.
Input is the JSON object of `inspect` with modules and spectra; matplotlib is imported when something is drawn.
Colours: viridis and Okabe and Ito's palette ("Color Universal Design", 2008), both readable for the colour-blind.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.errors import UnsupportedError, UsageError
from loratools.tensors.atomic import check_output, write_bytes_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
_ORDER = ("down_blocks", "mid_block", "up_blocks", "transformer_blocks", "single_transformer_blocks")  # in the order of the data
_UNET_LISTS = frozenset({"attentions", "resnets", "transformer_blocks"})  # inside a block: which of several says nothing
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_ROWS, _COLUMNS = 60, 24  # cells of the heat map at most


def block_of(site: str) -> tuple[str, str]:
    """A site's block and its module type there; numbers inside the block are left out of the type.

    "denoiser.transformer_blocks.7.attn.to_q" → ("denoiser.transformer_blocks.7", "attn.to_q")
    "denoiser.proj_out" → ("denoiser", "proj_out")
    A UNet's layer is its block, attention and resnet together, as block weights count them:
    "denoiser.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q" → ("denoiser.down_blocks.1.0", "attn1.to_q")
    """
    component, *tokens = site.split(".")
    first = 1 if tokens[:1] == ["mid_block"] else next((i + 1 for i, token in enumerate(tokens) if token.isdigit()), 0)
    block, rest = tokens[:first], tokens[first:]
    if block[:1] in (["down_blocks"], ["up_blocks"]) and rest[:1] in (["attentions"], ["resnets"]):
        block, rest = [*block, *rest[1:2]], rest[2:]
    kind = [token for token in rest if not token.isdigit() and token not in _UNET_LISTS]
    return ".".join([component, *block]), ".".join(kind) or (block[0] if block else component)


def short_name(block: str) -> str:
    """A block's name without what every row would repeat."""
    component, *tokens = block.replace(".text_model.encoder.", ".").split(".")
    return ".".join(tokens) if tokens and component in ("denoiser", "model") else ".".join([component, *tokens])


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key: numbers by value, lists of blocks in the order in which the data pass them."""
    order = {name: index for index, name in enumerate(_ORDER)}
    return [(0, int(token), "") if token.isdigit() else (1, order.get(token, -1), token) for token in name.split(".")]


def energies(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Block → Σ ‖ΔW‖² over its modules, blocks in the model's order. Modules without a finite norm do not count."""
    found: dict[str, float] = {}
    for row in rows:
        norm = row.get("delta_norm")
        if norm is not None and math.isfinite(norm):
            block = block_of(str(row["site"]))[0]
            found[block] = found.get(block, 0.0) + norm * norm
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def group_labels(blocks: Sequence[str], most: int) -> dict[str, str]:
    """Block → the group it is shown in, about `most` groups.

    Where there are more blocks, a text encoder becomes one, a UNet's layers join their block, and then neighbours are joined.
    """
    whole = {name: _coarse(name) if len(blocks) > most else name for name in blocks}
    series: dict[str, list[str]] = {}
    for name in dict.fromkeys(whole.values()):
        stem, _, last = name.rpartition(".")
        series.setdefault(stem if last.isdigit() else name, []).append(name)
    step, longest = 1, max(map(len, series.values()), default=1)
    while step < longest and sum(math.ceil(len(names) / step) for names in series.values()) > most:
        step += 1
    joined: dict[str, str] = {}
    for stem, names in series.items():
        for part in (names[start : start + step] for start in range(0, len(names), step)):
            first, last = (name.rpartition(".")[2] for name in (part[0], part[-1]))
            joined.update(dict.fromkeys(part, part[0] if len(part) == 1 else f"{stem}.{first}-{last}"))
    return {name: joined[group] for name, group in whole.items()}


def _coarse(block: str) -> str:
    """text_encoder.….layers.3 → text_encoder; denoiser.up_blocks.1.2 → denoiser.up_blocks.1"""
    tokens = block.split(".")
    if tokens[0].startswith("text_encoder"):
        return tokens[0]
    return ".".join(tokens[:3]) if tokens[1:2] in (["down_blocks"], ["up_blocks"]) else block


def group_blocks(blocks: Mapping[str, float], most: int) -> dict[str, float]:
    """The sums of `blocks` over the groups of `group_labels`."""
    found: dict[str, float] = {}
    for name, label in group_labels(list(blocks), most).items():
        found[label] = found.get(label, 0.0) + blocks[name]
    return found


def check_plot(path: Path, inputs: Sequence[Path] = (), *, force: bool = False) -> None:
    """Everything that can be wrong with a picture before it is computed: suffix, matplotlib, an existing file.

    Raises UsageError, or OutputExistsError where `path` exists without `force` or is an input, or WriteError.
    """
    from importlib.util import find_spec

    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path}: a picture is written as {' or '.join(SUFFIXES)}", fix=f"--plot {path.stem or 'picture'}.png")
    if find_spec("matplotlib") is None:
        raise UsageError("drawing needs matplotlib, which is not installed", fix="pip install 'loratools[plot]'")
    check_output(path, inputs, force)


def plot(result: Mapping[str, Any], path: Path, *, force: bool = False) -> None:
    """Draw `result` (one file, with modules and spectra) into `path`, complete or not at all; the same picture is the same bytes.

    Raises what `check_plot` raises, UnsupportedError where there is nothing to draw, WriteError.
    """
    check_plot(path, force=force)
    rows = [row for row in result.get("modules") or [] if row.get("delta_norm") is not None and math.isfinite(row["delta_norm"])]
    if not rows:
        raise UnsupportedError(f"{result.get('path')}: no module has a norm to draw; only adapters can be plotted")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 9, "axes.titlesize": 10, "svg.hashsalt": "loratools", "svg.fonttype": "path"}):
        blocks = list(energies(rows))
        figure = Figure(figsize=(13, max(6.0, 2.2 + 0.17 * min(len(blocks), _ROWS))), layout="constrained")
        figure.suptitle(_title(result), fontsize=12)
        grid = figure.add_gridspec(2, 2, width_ratios=(1.5, 1))
        _heat_map(figure, figure.add_subplot(grid[:, 0]), rows)
        _spectra(figure.add_subplot(grid[0, 1]), rows)
        _ranks(figure.add_subplot(grid[1, 1]), rows)
        kind = path.suffix.lower()[1:]
        picture = io.BytesIO()
        figure.savefig(picture, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else {"Software": "loratools"})
    write_bytes_file(path, picture.getvalue(), force=force)


def _title(result: Mapping[str, Any]) -> str:
    """One line, without the characters matplotlib would read as formulas."""
    words = (Path(str(result.get("path"))).name, result.get("dialect"), result.get("architecture"), result.get("variant"))
    return _plain("  ·  ".join(str(word) for word in words if word))


def _plain(text: str) -> str:
    """Printable text that matplotlib takes literally (a `$` starts a formula)."""
    return "".join(c if c.isprintable() else "�" for c in text).replace("$", r"\$")


def _heat_map(figure: Figure, axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Blocks down, module types across, log₁₀ of the cell's norm as colour; grey where the adapter has no module."""
    import numpy as np

    groups = group_labels(list(energies(rows)), _ROWS)
    by_type: Counter[str] = Counter()
    for row in rows:
        by_type[block_of(str(row["site"]))[1]] += row["delta_norm"] ** 2
    kinds = sorted(name for name, _ in by_type.most_common(_COLUMNS - (len(by_type) > _COLUMNS)))
    kinds += ["(others)"] if len(by_type) > _COLUMNS else []
    labels = list(dict.fromkeys(groups.values()))
    cells = np.zeros((len(labels), len(kinds)))
    for row in rows:
        block, kind = block_of(str(row["site"]))
        column = kinds.index(kind) if kind in kinds else len(kinds) - 1
        cells[labels.index(groups[block]), column] += row["delta_norm"] ** 2
    values = np.full(cells.shape, np.nan)
    np.log10(np.sqrt(cells), out=values, where=cells > 0)
    axes.set_facecolor("#e6e6e6")
    image = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_xticks(range(len(kinds)), [_plain(kind) for kind in kinds], rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(labels)), [_plain(short_name(label)) for label in labels], fontsize=8 if len(labels) <= 40 else 6.5)
    axes.set_title("norm of the change by block and module type (grey: no module)")
    figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02, aspect=30).ax.set_title("log₁₀ ‖ΔW‖", fontsize=8)


def _spectra(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Every module's singular values in grey, the median of the strongest module types in colour."""
    import numpy as np

    by_type: dict[str, list[list[float]]] = {}
    energy: Counter[str] = Counter()
    for row in rows:
        values = [value for value in row.get("singular_values") or [] if value is not None and value > 0]
        if values:
            kind = block_of(str(row["site"]))[1]
            by_type.setdefault(kind, []).append(values)
            energy[kind] += row["delta_norm"] ** 2
            axes.plot(range(1, len(values) + 1), values, color="#999999", alpha=0.15, linewidth=0.6, rasterized=True)
    for (kind, _), colour in zip(energy.most_common(len(_PALETTE)), _PALETTE, strict=False):
        spectra = by_type[kind]
        longest = max(map(len, spectra))
        table = np.array([values + [np.nan] * (longest - len(values)) for values in spectra])
        label = f"{_plain(kind)}, median of {len(spectra)}"
        axes.plot(range(1, longest + 1), np.nanmedian(table, axis=0), color=colour, linewidth=1.8, label=label)
    axes.set_yscale("log")
    axes.set_title("singular values of ΔW")
    axes.set_xlabel("index")
    axes.set_ylabel("singular value")
    axes.grid(alpha=0.3)
    if by_type:
        axes.legend(fontsize=7, loc="best")


def _ranks(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """How many modules have which rank: stored, and effective (what the spectrum uses of it)."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    stored = [row["rank"] for row in rows if row.get("rank")]
    effective = [row["effective_rank"] for row in rows if row.get("effective_rank") is not None and math.isfinite(row["effective_rank"])]
    largest = max([*stored, *effective], default=1)
    step = max(1, math.ceil(largest / 40))
    edges = np.arange(0, largest + 2 * step, step) + 0.5 - step
    if effective:
        axes.hist(effective, bins=list(edges), color=_PALETTE[5], label=f"effective rank ({len(effective)} modules)")
    if stored:
        axes.hist(stored, bins=list(edges), histtype="step", color=_PALETTE[1], linewidth=1.8, label=f"stored rank ({len(stored)} modules)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("ranks")
    axes.set_xlabel("rank")
    axes.set_ylabel("modules")
    axes.grid(alpha=0.3, axis="y")
    if stored or effective:
        axes.legend(fontsize=8, loc="best")

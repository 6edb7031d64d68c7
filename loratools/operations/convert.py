"""convert: the same adapter in another dialect.

A conversion is write(read(file)): provably the same function, or refused with the reasons. A file that is already in the wanted
dialect is copied byte for byte. Everything is checked from headers before the first byte is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools.adapters.adapter import Adapter, Entry
from loratools.errors import InputError, LoraToolsError, NotFiniteError, UsageError, counted, worst
from loratools.mapping.architectures import Architecture
from loratools.mapping.bases import Base
from loratools.mapping.dialects import DIALECTS, dialect_named
from loratools.mapping.read import Reading, analyse, checked, kin, tables_of
from loratools.mapping.write import Plan, plan
from loratools.operations.save import write_adapter
from loratools.report import Report
from loratools.tensors.dtypes import dtype_named
from loratools.tensors.finite import first_not_finite
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.reader import open_source
from loratools.tensors.source import TensorSource
from loratools.tensors.writer import check_output, copy_file, kept_aside, output_folder

ERROR_FLOOR = 1e-6  # a site whose ΔW moved by more than this is listed as approximated


def convert(
    source: Path | str,
    output: Path | str | None,
    dialect: str,
    *,
    arch: str | None = None,
    alpha: float | None = None,
    kind: str | None = None,
    base: Path | str | None = None,
    dtype: str | None = None,
    keep_alpha: bool = False,
    allow_lossy: bool = False,
    unknown: str = "fail",
    force: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Convert an adapter file to another dialect and report the fate of every tensor.

    source: file or folder of any dialect; output: None writes beside the source; dialect: a name of `loratools formats`;
    kind: "lora" turns LoHa, LoKr and tucker into LoRA exactly; dtype: fp32 | fp16 | bf16, rounded once;
    base: a model that supplies module names where no table has them; with allow_lossy also the weights on which kinds that
    multiply the base (DoRA, OFT, IA3, …) are turned into full deltas, or into LoRA where the dialect holds nothing else;
    unknown: "fail" | "drop" | "keep" for keys no table knows.
    Returns the JSON object of the command. Raises UsageError (2), InputError and its children (3), WriteError (1).
    """
    target = dialect_named(dialect).name
    wanted = dtype_named(dtype)
    if kind not in (None, "lora"):
        raise UsageError(f"--kind {kind}: only lora can be asked for")
    path = Path(source)
    out = Path(output) if output is not None else _default_output(path, target)
    if DIALECTS[target].folder and out.suffix in (".safetensors", ".pt", ".bin"):
        raise UsageError(f"{out}: {target} is a folder, this is the name of a file", fix=f"{out.with_suffix('.' + target)}")
    if alpha is not None and not 1e-30 < abs(alpha) < 1e30:
        raise UsageError(f"--alpha {alpha:g}: expected a number between 1e-30 and 1e30")
    problems: list[LoraToolsError] = []
    try:
        check_output(out, [path], force)
    except LoraToolsError as error:
        problems.append(error)
    try:
        opened = open_source(path)
        reading = analyse(opened, arch=arch, alpha=alpha, base=Path(base) if base else None)
        adapter = checked(reading, allow_unknown=unknown != "fail")
        architecture = tables_of(reading)
        untouched = wanted is None and kind is None and not keep_alpha and _is_identity(reading, adapter, target, unknown)
        weights = Base(Path(base), architecture) if base and allow_lossy else None
        made = None
        if not untouched:
            plain = kind == "lora"
            made = plan(adapter, architecture, target, plain=plain, keep_alpha=keep_alpha, dtype=wanted, base=weights, lossy=allow_lossy)
        report = made.report if made else Report()
        _residue(adapter, target, unknown, report)
    except LoraToolsError as error:
        problems.append(error)
    if problems:
        raise worst(problems)
    report.findings.extend(finding for finding in reading.findings if finding.severity == "warning")
    if made is None:
        tensors: Mapping[str, LazyTensor] = opened.tensors
        report.mapped.update(key for key in opened.tensors if key not in report.kept)
    else:
        tensors = {**made.tensors, **{key: adapter.residue[key] for key in report.kept}}
    kept = kept_aside(out) if DIALECTS[target].folder else None
    if kept is not None:
        report.warn("kept-aside", f"{out} holds other files than an adapter's: the old folder is kept as {kept.name}")
    if not dry_run:
        report.check_complete(opened.tensors)
        _write(reading, adapter, architecture, made, tensors, out, force)
    return _result(path, out, adapter, architecture, target, report, made, tensors, dry_run)


def _default_output(path: Path, dialect: str) -> Path:
    stem = path.name if path.is_dir() else path.stem
    stem = stem.removesuffix(f".{dialect}")
    return path.parent / (f"{stem}.peft" if DIALECTS[dialect].folder else f"{stem}.{dialect}.safetensors")


def _is_identity(reading: Reading, adapter: Adapter, target: str, unknown: str) -> bool:
    """True when the file is already what is asked for: its bytes can be copied."""
    if adapter.dialect != target or reading.detection.tidied or reading.source.container not in ("safetensors", "peft"):
        return False
    if (reading.source.container == "peft") != DIALECTS[target].folder:
        return False
    if DIALECTS[target].folder and not all(_loads_as_it_is(entry) for entry in adapter.entries):
        return False
    assigned = reading.detection.best.assigned.values() if reading.detection.best else ()
    spoken = {assignment.hit.slot.dialect.name for assignment in assigned}
    settled = any(entry.module.alpha_source == "assumed" and entry.module.alpha is not None for entry in adapter.entries)
    return not settled and unknown != "drop" and all(kin(name, target) for name in spoken)


def _loads_as_it_is(entry: Entry) -> bool:
    """PEFT looks for one of its three spellings only, and adds the adapter's name itself."""
    return entry.form is not None and entry.form.prefix.endswith("base_model.model.") and entry.form.scheme != "peft-named"


def _residue(adapter: Adapter, target: str, unknown: str, report: Report) -> None:
    """Tensors no module owns: kept in their own dialect, otherwise as the user said. Raises InputError when he has not."""
    for key in adapter.residue:
        if unknown == "drop":
            report.dropped[key] = "no module of the architecture has this name"
        elif unknown == "keep" or target == adapter.dialect:
            report.kept.append(key)
    undecided = [key for key in adapter.residue if key not in report.dropped and key not in report.kept]
    if undecided:
        raise InputError(
            f"no place in {target} for {counted(len(undecided), 'tensor')}",
            details=undecided,
            fix="--keep-unknown carries them along as they are, --drop-unknown leaves them out",
        )


def _write(
    reading: Reading,
    adapter: Adapter,
    architecture: Architecture,
    made: Plan | None,
    tensors: Mapping[str, LazyTensor],
    out: Path,
    force: bool,
) -> None:
    source = reading.source
    if made is None:
        for key, tensor in tensors.items():
            if first_not_finite(tensor):
                raise InputError(f"{source.path.name}: {key} holds NaN or Inf", fix="loratools inspect --check names every such tensor")
        if source.container == "peft":
            with output_folder(out, force=force) as folder:
                for file in sorted(source.path.rglob("*")):
                    if file.is_file() and (file in source.files or file.name == "adapter_config.json"):
                        inside = folder / file.relative_to(source.path)
                        inside.parent.mkdir(parents=True, exist_ok=True)
                        copy_file(file, inside)
        else:
            copy_file(source.files[0], out, force=force)
        return
    try:
        write_adapter(adapter, architecture, made, tensors, out, force=force)
    except NotFiniteError as error:
        raise _cause(source, error) from error


def _cause(source: TensorSource, error: NotFiniteError) -> InputError:
    """The input tensor that held NaN or Inf, or else the output dtype that cannot hold a value."""
    culprit = next((key for key, tensor in source.tensors.items() if first_not_finite(tensor)), None)
    if culprit is not None:
        return InputError(f"{source.path.name}: {culprit} holds NaN or Inf", fix="loratools inspect --check names every such tensor")
    return InputError(f"{source.path.name}: a value overflows the dtype of {error.tensor}", fix="--dtype bf16 or fp32 has the range")


def _result(
    path: Path,
    out: Path,
    adapter: Adapter,
    architecture: Architecture,
    target: str,
    report: Report,
    made: Plan | None,
    tensors: Mapping[str, LazyTensor],
    dry_run: bool,
) -> dict[str, Any]:
    sites = made.sites if made is not None else {site for entry in adapter.entries for site in entry.sites}
    listed = {site: error for site, error in report.approximated.items() if error > ERROR_FLOOR or site in report.lossy}
    result: dict[str, Any] = {
        "input": str(path),
        "output": str(out),
        "from": {"dialect": adapter.dialect, "architecture": adapter.architecture},
        "to": {"dialect": target, "architecture": architecture.name},
        "tensors_in": len(report.mapped) + len(report.kept) + len(report.dropped),
        "tensors_out": len(tensors),
        "sites": len(sites),
        "exact": not listed and not report.dropped,
        "approximated": [{"site": site, "relative_error": error} for site, error in sorted(listed.items())],
        "dropped": [{"key": key, "reason": reason} for key, reason in report.dropped.items()],
        "kept": report.kept,
        "max_relative_error": report.max_relative_error,
        "warnings": [finding.message for finding in report.findings],
    }
    if dry_run:
        result["plan"] = {"tensors": len(tensors), "bytes": sum(tensor.nbytes for tensor in tensors.values())}
    return result

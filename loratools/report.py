"""What an operation did to every tensor it was given.

Law: each input tensor ends as mapped, approximated (with its error), kept or dropped (with the reason), and the counts
add up. `Report.check_complete` is called before anything is written, so that a tensor cannot vanish in silence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from loratools.errors import LoraToolsError


@dataclass(frozen=True)
class Finding:
    """One problem of an input: `severity` is "error" or "warning", `code` a stable word, `site` a site or a key."""

    severity: str
    code: str
    site: str | None
    message: str

    def as_json(self) -> dict[str, str | None]:
        return {"severity": self.severity, "code": self.code, "site": self.site, "message": self.message}


@dataclass
class Report:
    """The fate of every input tensor of one operation. Keys are the tensors' own names in the input."""

    mapped: set[str] = field(default_factory=set)
    kept: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    approximated: dict[str, float] = field(default_factory=dict)  # site → relative error of its ΔW
    lossy: set[str] = field(default_factory=set)  # sites approximated because the user allowed it
    findings: list[Finding] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """True when no value was rounded and nothing was dropped."""
        return not self.approximated and not self.dropped

    @property
    def max_relative_error(self) -> float:
        return max(self.approximated.values(), default=0.0)

    def warn(self, code: str, message: str, site: str | None = None) -> None:
        self.findings.append(Finding("warning", code, site, message))

    def check_complete(self, keys: Iterable[str]) -> None:
        """Raise if an input tensor has no fate: a defect of this program, never of the input."""
        lost = [key for key in keys if key not in self.mapped and key not in self.dropped and key not in set(self.kept)]
        if lost:
            raise LoraToolsError(f"{len(lost)} input tensors were not accounted for (a defect in loratools)", details=lost)

"""What the keys of a training configuration have to agree on: one row a rule.

A rule names the keys it reads, the test on their values, and the sentence that says what to change. It is asked only when all
of its keys are good for themselves, so that a misspelt value gives one message and not two. Names of architectures, text
encoders and dialects are looked up where they are defined. No pydantic, no torch at run time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.mapping.architectures import registry
from loratools.mapping.dialects import DIALECTS

if TYPE_CHECKING:
    from pydantic import BaseModel

_FLOW = ("sd3", "flux")  # families whose models predict a velocity of a straight path
_MODE = 2 / (math.pi - 2)  # largest scale of the law `mode` (Esser et al., 2024, arXiv:2403.03206, section 3.1)
_DIFFUSION = ("sd1", "sd2", "sdxl")  # families with a noise schedule of alphas


@dataclass(frozen=True)
class Rule:
    """`holds` gets the values of the keys `reads` in their order; `message` says what to do where it is False."""

    reads: tuple[str, ...]
    holds: Callable[..., bool]
    message: str


def _rule(reads: str, holds: Callable[..., bool], message: str) -> Rule:
    return Rule(tuple(reads.split()), holds, message)


def _has_encoders(family: str, encoders: Collection[str]) -> bool:
    return family == "auto" or set(encoders) <= {component.name for component in registry()[family].components}


def _has_dialects(family: str, names: Collection[str]) -> bool:
    return family == "auto" or all(DIALECTS[name].serves(registry()[family]) for name in names)


RULES: tuple[Rule, ...] = (
    _rule(
        "train.steps train.epochs",
        lambda steps, epochs: (steps is None) != (epochs is None),
        "[train] has to say either steps or epochs, one of the two; --set train.epochs= takes one out",
    ),
    _rule(
        "schedule.warmup train.steps",
        lambda warmup, steps: steps is None or not isinstance(warmup, int) or warmup <= steps,
        "[schedule] warmup is longer than [train] steps",
    ),
    _rule(
        "data.buckets.step data.resolution",
        lambda step, resolution: step <= resolution,
        "[data.buckets] step is longer than [data] resolution",
    ),
    _rule(
        "data.buckets.enabled data.buckets.min_side data.buckets.max_side data.resolution",
        lambda enabled, low, high, resolution: not enabled or (low or resolution) <= resolution <= (high or resolution),
        "[data] resolution lies outside min_side to max_side of [data.buckets]; change these, or set enabled = false",
    ),
    _rule(
        "loss.min_snr_gamma loss.prediction",
        lambda gamma, prediction: gamma is None or prediction != "flow",
        '[loss] min_snr_gamma is for epsilon and v prediction; take it out for prediction = "flow"',
    ),
    _rule(
        "loss.min_snr_gamma model.family",
        lambda gamma, family: gamma is None or family not in _FLOW,
        "[loss] min_snr_gamma is for epsilon and v prediction; sd3 and flux predict flow",
    ),
    _rule(
        "loss.prediction model.family",
        lambda prediction, family: family not in _FLOW or prediction in ("auto", "flow"),
        '[loss] prediction has to be "flow" or "auto" for sd3 and flux',
    ),
    _rule(
        "loss.weighting loss.prediction",
        lambda weighting, prediction: weighting == "none" or prediction in ("auto", "flow"),
        '[loss] weighting is for prediction = "flow"; epsilon and v prediction have min_snr_gamma',
    ),
    _rule(
        "loss.weighting model.family",
        lambda weighting, family: weighting == "none" or family not in _DIFFUSION,
        "[loss] weighting is for flow models; sd1, sd2 and sdxl have min_snr_gamma",
    ),
    _rule(
        "loss.timesteps.low loss.timesteps.high",
        lambda low, high: low < high,
        "[loss.timesteps] low has to be below high",
    ),
    _rule(
        "loss.timesteps.scale loss.timesteps.law",
        lambda scale, law: law != "mode" or -1 <= scale <= _MODE,
        f"[loss.timesteps] scale has to be from -1 to {_MODE:.4} for mode: beyond these its noise levels leave 0 to 1",
    ),
    _rule(
        "loss.timesteps.scale loss.timesteps.law",
        lambda scale, law: law not in ("sigmoid", "shift") or scale > 0,
        "[loss.timesteps] scale has to be more than 0 for sigmoid and shift",
    ),
    _rule(
        "adapter.conv_alpha adapter.conv_rank",
        lambda alpha, rank: alpha is None or rank is not None,
        "[adapter] conv_alpha is without effect unless conv_rank is given",
    ),
    _rule(
        "adapter.init model.quantise",
        lambda init, quantise: quantise == "none" or init in ("default", "gaussian", "orthogonal"),
        '[adapter] init is computed from the base\'s weights, which [model] quantise takes away; set init = "default" or quantise = "none"',
    ),
    _rule("model.family adapter.text_encoders", _has_encoders, "[adapter] text_encoders names one that [model] family does not have"),
    _rule("model.family save.formats", _has_dialects, "[save] formats names a dialect that has no names for [model] family"),
    _rule(
        "optimizer.text_encoder_lr adapter.text_encoders",
        lambda rate, encoders: rate is None or bool(encoders),
        "[optimizer] text_encoder_lr is without effect unless [adapter] text_encoders names some",
    ),
    _rule(
        "save.keep_best data.held_out",
        lambda best, held: not best or held > 0,
        "[save] keep_best goes by the validation loss, which needs pictures: set [data] held_out",
    ),
    _rule(
        "validation.every_steps validation.prompts data.held_out",
        lambda every, prompts, held: every is None or bool(prompts) or held > 0,
        "[validation] every_steps has nothing to do: give prompts, or set [data] held_out",
    ),
)


def broken(values: Mapping[str, Any]) -> list[Rule]:
    """The rules that do not hold, among those whose keys are all in `values` (dotted key → value)."""
    return [rule for rule in RULES if all(key in values for key in rule.reads) and not rule.holds(*(values[key] for key in rule.reads))]


def values_of(table: type[BaseModel], given: Mapping[str, Any], wrong: Collection[str] = (), where: str = "") -> dict[str, Any]:
    """Dotted key → value of a table and the tables in it; defaults where nothing is given.

    wrong: dotted keys, and whole tables, whose values are not to be used; they are left out, as are keys that have no default.
    """
    found: dict[str, Any] = {}
    for name, field in table.model_fields.items():
        key, kind = where + name, field.annotation
        if key in wrong:
            continue
        if isinstance(kind, type) and hasattr(kind, "model_fields"):
            inner = given.get(name, {})
            found |= values_of(kind, inner, wrong, f"{key}.")
        elif name in given:
            found[key] = given[name]
        elif not field.is_required():
            found[key] = field.get_default(call_default_factory=True)
    return found

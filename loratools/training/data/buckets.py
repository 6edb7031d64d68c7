"""Aspect-ratio buckets: pictures are trained in a few shapes of about the same area, so that little is cropped and batches stack.

    for width in min, min + step, … max:   height = min(max, ⌊resolution² / width / step⌋ · step)   and the same turned; and the square

The table is kohya's (sd-scripts, model_util.py, make_bucket_resolutions), which follows NovelAI ("NovelAI Improvements on Stable
Diffusion", 2022). The nearest bucket is the one with the smallest |log ratio − log ratio|; kohya compares the ratios themselves,
which treats wide and tall pictures differently. Invariants: no bucket is larger than resolution²; a turned picture gets the turned
bucket; the order of the samples is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loratools.errors import InputError, counted
from loratools.training.data.pictures import Size
from loratools.training.data.samples import Sample
from loratools.training.data.transform import place

Assignment = Mapping[Size, tuple[Sample, ...]]


@dataclass(frozen=True)
class Buckets:
    """The (width, height) there are, sorted, all multiples of `step`.

    `upscale` False: a picture smaller than its bucket keeps its size and is cropped to multiples of `step`, in a bucket of its own.
    """

    sizes: tuple[Size, ...]
    step: int
    upscale: bool = True


@dataclass(frozen=True)
class BucketRow:
    """One bucket in numbers. `shown`: pictures with repeats; `cropped`: mean share of the area that is cut away, 0 to 1;
    `upscaled`: pictures that are enlarged."""

    size: Size
    pictures: int
    shown: int
    cropped: float
    upscaled: int


def make_buckets(
    resolution: int, *, step: int = 64, min_side: int | None = None, max_side: int | None = None, upscale: bool = True
) -> Buckets:
    """The table for resolution² pixels. Sides lie in min_side..max_side; half and twice the resolution where not given.

    Raises InputError that lists every number that does not fit.
    """
    low = resolution // 2 if min_side is None else min_side
    high = resolution * 2 if max_side is None else max_side
    _check(resolution, step, low, high)
    area = resolution * resolution
    square = resolution // step * step
    sizes = {(square, square)}
    for width in range(-(-low // step) * step, high + 1, step):
        height = min(high, area // width) // step * step
        if height >= low:
            sizes |= {(width, height), (height, width)}
    return Buckets(tuple(sorted(sizes)), step, upscale)


def one_bucket(resolution: int, *, step: int = 64, upscale: bool = True) -> Buckets:
    """No buckets: everything is cropped to a square. Raises InputError."""
    _check(resolution, step, resolution, resolution)
    return Buckets(((resolution // step * step,) * 2,), step, upscale)


def _check(resolution: int, step: int, low: int, high: int) -> None:
    rules = (
        (step >= 1, f"step {step}, expected 1 or more"),
        (resolution >= max(step, 1), f"resolution {resolution}, expected at least the step {step}"),
        (1 <= low <= resolution, f"shortest side {low}, expected 1 to the resolution {resolution}"),
        (high >= resolution, f"longest side {high}, expected at least the resolution {resolution}"),
    )
    problems = [words for holds, words in rules if not holds]
    if problems:
        raise InputError("the buckets cannot be made", details=problems)


def bucket_of(buckets: Buckets, width: int, height: int) -> Size:
    """The bucket of a picture of that size. With `upscale` False a side below the step gives 0."""
    ratio = math.log(width / height)
    across, down = min(buckets.sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - ratio), -size[0] * size[1]))
    if buckets.upscale or (width >= across and height >= down):
        return across, down
    step = buckets.step
    return min(across, width // step * step), min(down, height // step * step)


def bucket_name(size: Size) -> str:
    """A bucket as it is written: 512x768, width first."""
    return f"{size[0]}x{size[1]}"


def assign(samples: Sequence[Sample], buckets: Buckets) -> Assignment:
    """Samples by bucket, buckets sorted by size. Raises InputError that names every picture that is too small for one."""
    groups: dict[Size, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(bucket_of(buckets, sample.width, sample.height), []).append(sample)
    small = [f"{sample.path}: {sample.width}×{sample.height}" for size, group in groups.items() if not all(size) for sample in group]
    if small:
        fix = "allow upscaling, choose a smaller step, or take them out"
        raise InputError(f"{counted(len(small), 'picture')} smaller than the step of {buckets.step} pixels", details=small, fix=fix)
    return {size: tuple(groups[size]) for size in sorted(groups)}


def statistics(assignment: Assignment) -> tuple[BucketRow, ...]:
    """What each bucket holds and what it costs its pictures, for the plan of a run."""
    return tuple(_row(size, samples) for size, samples in assignment.items())


def _row(size: Size, samples: Sequence[Sample]) -> BucketRow:
    resized = [place((sample.width, sample.height), size).resized for sample in samples]
    cropped = [1 - size[0] * size[1] / (across * down) for across, down in resized]
    upscaled = sum(across > sample.width or down > sample.height for sample, (across, down) in zip(samples, resized, strict=True))
    return BucketRow(size, len(samples), sum(sample.repeats for sample in samples), sum(cropped) / len(cropped), upscaled)

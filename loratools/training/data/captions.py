"""What a picture is called this time: dropped, as written, or with its tags in another order.

    dropped        with probability `dropout`: the empty caption, for classifier-free guidance (Ho and Salimans 2022)
    variant k      the first `keep` tags stay, the rest in order k (Fisher and Yates' shuffle)

Everything is a function of numbers in [0, 1) that the caller draws from a place, draw(purpose, *place), never of a history: a
variant's order depends on (sample id, k) alone, which variant is chosen on the place in the run. So variants can be listed and
cached before the first step, and any step can be reached at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

DROPPED = -1  # the variant that is the empty caption, the same for every sample
_ORDERS = 1 << 53  # variants to choose from where none are cached: as many as a float in [0, 1) tells apart


class Draw(Protocol):
    """A number in [0, 1), the same whenever it is asked for by the same purpose and place."""

    def __call__(self, purpose: str, *place: int | str) -> float: ...


@dataclass(frozen=True)
class CaptionSettings:
    """`dropout`: probability of the empty caption. `shuffle`: tags change places, but for the first `keep`.

    `variants`: how many orders a sample has, so that all of them can be cached; None for a new one every time.
    """

    dropout: float = 0.0
    shuffle: bool = False
    keep: int = 0
    separator: str = ","
    variants: int | None = 1


def choose(settings: CaptionSettings, draw: Draw, *place: int | str) -> int:
    """The variant of a sample at a place in the run: epoch, sample id, which of its repeats."""
    if draw("caption-dropout", *place) < settings.dropout:
        return DROPPED
    if not settings.shuffle:
        return 0
    return int(draw("caption-variant", *place) * (settings.variants or _ORDERS))


def caption_of(caption: str, settings: CaptionSettings, draw: Draw, sample: str, variant: int) -> str:
    """The words of one variant of a sample's caption; a shuffled one is joined by the separator and a space."""
    if variant == DROPPED:
        return ""
    if not settings.shuffle:
        return caption
    tags = [tag.strip() for tag in caption.split(settings.separator) if tag.strip()]
    for last in range(len(tags) - 1, settings.keep, -1):
        other = settings.keep + int(draw("caption-shuffle", sample, variant, last) * (last - settings.keep + 1))
        tags[last], tags[other] = tags[other], tags[last]
    return f"{settings.separator.strip()} ".join(tags)


def all_variants(caption: str, settings: CaptionSettings, draw: Draw, sample: str) -> dict[int, str]:
    """Every variant `choose` can name and its words, for the cache. Raises ValueError where they are not counted."""
    if settings.shuffle and settings.variants is None:
        raise ValueError("variants must be a number where captions are cached")
    counted = range(settings.variants or 1) if settings.shuffle else (0,)
    chosen = (*((DROPPED,) if settings.dropout > 0 else ()), *(counted if settings.dropout < 1 else ()))
    return {variant: caption_of(caption, settings, draw, sample, variant) for variant in chosen}

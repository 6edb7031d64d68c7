"""Caption variants from numbers that the test gives: dropout, choice and shuffle by hand."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest

from loratools.training.data.captions import DROPPED, CaptionSettings, all_variants, caption_of, choose
from loratools.training.draws import unit

SEEDED = partial(unit, 7)


class Given:
    """The numbers of each purpose, whatever the place; the places asked for are kept."""

    def __init__(self, **numbers: float) -> None:
        self.numbers = {name.replace("_", "-"): value for name, value in numbers.items()}
        self.asked: list[tuple[str, tuple[int | str, ...]]] = []

    def __call__(self, purpose: str, *place: int | str) -> float:
        self.asked.append((purpose, place))
        return self.numbers[purpose]


@pytest.mark.parametrize(("number", "dropped"), [(0.0, True), (0.0999, True), (0.1, False), (0.9, False)])
def test_dropout(number: float, dropped: bool) -> None:
    draw = Given(caption_dropout=number)
    assert choose(CaptionSettings(dropout=0.1), draw, 3, "a.png", 0) == (DROPPED if dropped else 0)
    assert draw.asked == [("caption-dropout", (3, "a.png", 0))]


@pytest.mark.parametrize(("dropout", "dropped"), [(0.0, 0), (1.0, 200)])
def test_no_dropout_and_nothing_but_dropout(dropout: float, dropped: int) -> None:
    chosen = [choose(CaptionSettings(dropout=dropout), SEEDED, epoch, "a.png", 0) for epoch in range(200)]
    assert chosen.count(DROPPED) == dropped


@pytest.mark.parametrize(("number", "variant"), [(0.0, 0), (0.249, 0), (0.25, 1), (0.999, 3)])
def test_each_cached_variant_has_an_equal_share(number: float, variant: int) -> None:
    draw = Given(caption_dropout=0.5, caption_variant=number)
    assert choose(CaptionSettings(shuffle=True, variants=4), draw, 0, "a.png", 1) == variant


def test_without_variants_every_place_has_an_order_of_its_own() -> None:
    settings = CaptionSettings(shuffle=True, variants=None)
    chosen = {choose(settings, SEEDED, epoch, "a.png", repeat) for epoch in range(20) for repeat in range(5)}
    assert len(chosen) == 100


def test_as_written_and_dropped() -> None:
    assert caption_of("a,  b , ,c", CaptionSettings(), SEEDED, "x", 0) == "a,  b , ,c"
    assert caption_of("a, b", CaptionSettings(), SEEDED, "x", DROPPED) == ""
    assert caption_of("a, b", CaptionSettings(shuffle=True), SEEDED, "x", DROPPED) == ""


# Fisher and Yates from the end: with 0 each last one changes with the first of the free ones, with 0.99 nothing moves
@pytest.mark.parametrize(
    ("number", "keep", "expected"),
    [
        (0.0, 0, "b, c, d, a"),  # abcd → dbca → cbda → bcda
        (0.0, 1, "a, c, d, b"),
        (0.0, 3, "a, b, c, d"),
        (0.0, 9, "a, b, c, d"),
        (0.99, 0, "a, b, c, d"),
        (0.5, 0, "a, d, b, c"),  # last 3 ↔ 2: abdc; 2 ↔ 1: adbc; 1 ↔ 1
    ],
)
def test_shuffle_by_hand(number: float, keep: int, expected: str) -> None:
    draw = Given(caption_shuffle=number)
    assert caption_of(" a,b , c,, d ", CaptionSettings(shuffle=True, keep=keep), draw, "x", 5) == expected
    assert {place[:2] for _, place in draw.asked} <= {("x", 5)}


def test_another_separator() -> None:
    draw = Given(caption_shuffle=0.0)
    assert caption_of("one, two;three", CaptionSettings(shuffle=True, separator=";"), draw, "x", 0) == "three; one, two"


def test_every_order_is_as_likely_as_any_other() -> None:
    settings = CaptionSettings(shuffle=True, keep=1)
    found = Counter(caption_of("k, a, b, c", settings, SEEDED, "x", variant) for variant in range(6000))
    assert len(found) == 6
    assert all(text.startswith("k, ") for text in found)
    assert sum((count - 1000) ** 2 / 1000 for count in found.values()) < 20.5  # chi-square, 5 degrees of freedom, 0.1 %


def test_a_variant_is_a_function_of_seed_sample_and_number() -> None:
    settings = CaptionSettings(shuffle=True, variants=3)
    text = ", ".join("abcdefgh")
    found = [
        caption_of(text, settings, partial(unit, seed), sample, variant) for seed in (7, 8) for sample in ("x", "y") for variant in (0, 1)
    ]
    assert len(set(found)) == 8
    assert all_variants(text, settings, SEEDED, "x") == {k: caption_of(text, settings, SEEDED, "x", k) for k in (2, 1, 0)}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (CaptionSettings(), {0}),
        (CaptionSettings(variants=5), {0}),  # nothing is shuffled: there is one
        (CaptionSettings(dropout=0.1), {DROPPED, 0}),
        (CaptionSettings(dropout=1.0), {DROPPED}),
        (CaptionSettings(shuffle=True, variants=3), {0, 1, 2}),
        (CaptionSettings(dropout=0.5, shuffle=True, variants=2), {DROPPED, 0, 1}),
    ],
)
def test_all_variants_are_those_that_are_chosen(settings: CaptionSettings, expected: set[int]) -> None:
    assert set(all_variants("a, b, c", settings, SEEDED, "x")) == expected
    assert {choose(settings, SEEDED, epoch, "x", 0) for epoch in range(200)} == expected


def test_uncounted_variants_cannot_be_listed() -> None:
    with pytest.raises(ValueError, match="variants must be a number"):
        all_variants("a, b", CaptionSettings(shuffle=True, variants=None), SEEDED, "x")

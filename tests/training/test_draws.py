"""Draws against blake2b and torch by hand, their distributions, and batches that depend on the step alone."""

from __future__ import annotations

import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise

import pytest
import torch

from loratools.errors import InputError, UsageError
from loratools.training.draws import Drawn, batches, generator, model_seed, normal, number, order, per_epoch, unit

BUCKETS = {"512x768": ["a", "b", "c", "d", "e"], "768x512": ["f", "g", "h"]}


def by_hand(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 2**63


def chi_square(cells: Iterable[int], kinds: int) -> float:
    counts = Counter(cells)
    expected = sum(counts.values()) / kinds
    return sum((counts[kind] - expected) ** 2 / expected for kind in range(kinds))


def epoch_of(batch: Callable[[int], list[Drawn]], epoch: int, steps: int) -> list[Drawn]:
    return [drawn for step in range(epoch * steps, (epoch + 1) * steps) for drawn in batch(step)]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((7, "flip", 3, "cat.png", 0), "7/flip/3/cat.png/0"),
        ((0, "noise", 0, 0), "0/noise/0/0"),
        ((-1, "crop", 2, "Müller.png"), "-1/crop/2/Müller.png"),
        ((7, "flip", 3, "cats/1.png"), "7/flip/3/cats%2F1.png"),
        ((7, "flip", 3, "100%.png"), "7/flip/3/100%25.png"),
    ],
)
def test_a_number_is_the_hash_of_its_place(arguments: tuple[int, str, int | str], text: str) -> None:
    expected = by_hand(text)
    assert number(*arguments) == expected
    assert unit(*arguments) == (expected // 2**11 + 0.5) / 2**52
    assert generator(*arguments).initial_seed() == expected
    assert generator(*arguments).device == torch.device("cpu")


def test_a_file_name_that_is_no_text_has_a_number() -> None:
    assert number(0, "crop", 0, "\udcff.png") != number(0, "crop", 0, "\udcfe.png")


def test_seed_purpose_and_each_place_make_a_difference() -> None:
    places: list[tuple[int, str, int | str, int | str]] = [
        (1, "crop", 2, 3), (2, "crop", 2, 3), (1, "flip", 2, 3), (1, "crop", 3, 3), (1, "crop", 2, 4), (1, "crop", 3, 2),
        (12, "crop", 3, 3), (1, "crop", 23, 3), (1, "crop", 2, "3/3"), (1, "crop", 2, "3%2F3"),
    ]  # fmt: skip
    assert len({unit(*place) for place in places}) == len(places)
    assert unit(1, "crop", 2, "3/3") != unit(1, "crop", 2, "3", "3")
    assert len({tuple(torch.rand(4, generator=generator(*place)).tolist()) for place in places}) == len(places)


def test_what_was_drawn_before_makes_no_difference() -> None:
    def drawn() -> tuple[float, list[float], list[int], int]:
        return unit(5, "flip", 1, "a"), normal((2, 3), 5, 4, 1).flatten().tolist(), order(20, 5, 3, "b"), model_seed(5, 1, 0, 0)

    first = drawn()
    torch.manual_seed(999)
    torch.rand(17)
    random.seed(999)
    for other in range(5):
        unit(5, "flip", other, "z"), normal((3,), 5, other, 0), order(7, 5, other)
    assert drawn() == first


def test_the_global_generators_are_not_moved() -> None:
    torch.manual_seed(3)
    random.seed(3)
    before, plain = torch.get_rng_state(), random.getstate()
    unit(5, "flip", 1, "a"), normal((2, 3), 5, 4, 1), order(20, 5, 3), model_seed(5, 1, 0, 0)
    batches(BUCKETS, 2, 0)(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == plain


def test_units_are_uniform_and_neighbours_are_independent() -> None:
    values = [unit(0, "timestep", step, 0) for step in range(20000)]
    assert all(0 < value < 1 for value in values)
    assert chi_square((int(value * 20) for value in values), 20) < 43.8  # the 0.999 quantile with 19 degrees of freedom
    pairs = (int(one * 6) * 6 + int(two * 6) for one, two in pairwise(values))
    assert chi_square(pairs, 36) < 66.6  # 35 degrees


@pytest.mark.parametrize(("digest", "expected"), [(0, 2.0**-53), (2**63 - 1, 1 - 2.0**-53)])
def test_the_ends_of_unit_are_inside(monkeypatch: pytest.MonkeyPatch, digest: int, expected: float) -> None:
    monkeypatch.setattr("loratools.training.draws.number", lambda *place: digest)
    assert unit(0, "timestep", 0, 0) == expected
    assert 0 < expected < 1


def test_noise_is_normal_and_that_of_other_places_is_independent() -> None:
    values = torch.stack([normal((16, 16), 0, step, position).flatten() for step in range(10) for position in range(16)]).double()
    cells = (int(statistics.NormalDist().cdf(value) * 16) for value in values.flatten().tolist())
    assert chi_square(cells, 16) < 37.7  # 15 degrees
    products = (values @ values.t() / 256).fill_diagonal_(0)  # of standard deviation 1/16; 1 where two places draw the same
    assert products.abs().max() < 6 / 16


def test_noise_is_that_of_torch_for_the_place() -> None:
    expected = torch.randn(3, 5, generator=torch.Generator().manual_seed(by_hand("9/noise-offset/12/4")))
    found = normal((3, 5), 9, 12, 4, "noise-offset")
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_noise_of_a_global_batch_is_the_same_however_it_is_split() -> None:
    whole = torch.stack([normal((4, 8), 1, 7, position) for position in range(8)])
    for world in (2, 4, 8):
        share = 8 // world
        ranks = [torch.stack([normal((4, 8), 1, 7, rank * share + own) for own in range(share)]) for rank in reversed(range(world))]
        assert torch.equal(torch.cat(ranks[::-1]), whole)
    assert len({tuple(sample.flatten().tolist()) for sample in whole}) == 8


def test_an_order_is_the_permutation_of_its_epoch_and_bucket() -> None:
    for epoch, bucket in ((0, ()), (3, ()), (3, ("768x512",))):
        text = "/".join(["11", "order", str(epoch), *bucket])
        expected = torch.randperm(50, generator=torch.Generator().manual_seed(by_hand(text))).tolist()
        assert order(50, 11, epoch, *bucket) == expected
        assert sorted(expected) == list(range(50))


def test_a_model_seed_for_each_micro_step_and_rank() -> None:
    assert model_seed(4, 10, 2, 1) == by_hand("4/model/10/2/1")
    seeds = {model_seed(seed, step, micro, rank) for seed in range(3) for step in range(3) for micro in range(3) for rank in range(3)}
    assert len(seeds) == 81


def test_a_batch_by_hand() -> None:
    """One bucket of three samples, batches of two: the samples sorted, put into the epoch's order, and its batches into theirs."""

    def shuffled(count: int, text: str) -> list[int]:
        permutation: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(by_hand(text))).tolist()
        return permutation

    batch = batches({"b": ["z", "x", "y"]}, 2, 6)
    for epoch in range(6):
        inner = [["x", "y", "z"][index] for index in shuffled(3, f"6/order/{epoch}/b")]
        for place, start in enumerate([2 * index for index in shuffled(2, f"6/order/{epoch}")]):
            assert batch(2 * epoch + place) == [(epoch, sample, at, 0) for at, sample in enumerate(inner[start : start + 2])]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("repeats", [{}, {"a": 3, "h": 2}])
def test_an_epoch_has_each_repeat_of_each_sample_once(size: int, repeats: dict[str, int]) -> None:
    steps = per_epoch(BUCKETS, size, repeats=repeats)
    counts = [sum(repeats.get(sample, 1) for sample in samples) for samples in BUCKETS.values()]
    assert steps == sum(-(-count // size) for count in counts)
    batch = batches(BUCKETS, size, 1, repeats=repeats)
    expected = sorted((sample, repeat) for samples in BUCKETS.values() for sample in samples for repeat in range(repeats.get(sample, 1)))
    for epoch in range(3):
        drawn = epoch_of(batch, epoch, steps)
        assert {found.epoch for found in drawn} == {epoch}
        assert sorted((found.sample, found.repeat) for found in drawn) == expected


def test_a_batch_is_of_one_bucket_and_numbered() -> None:
    batch = batches(BUCKETS, 2, 1)
    for step in range(20):
        found = batch(step)
        assert [drawn.position for drawn in found] == list(range(len(found)))
        assert sum({drawn.sample for drawn in found} <= set(samples) for samples in BUCKETS.values()) == 1


def test_drop_last_leaves_out_short_batches_and_other_samples_each_epoch() -> None:
    assert per_epoch(BUCKETS, 2, drop_last=True) == 3
    assert per_epoch(BUCKETS, 3, drop_last=True) == 2
    batch = batches(BUCKETS, 2, 1, drop_last=True)
    assert all(len(batch(step)) == 2 for step in range(30))
    missing = {frozenset({*"abcdefgh"} - {drawn.sample for drawn in epoch_of(batch, epoch, 3)}) for epoch in range(20)}
    assert all(len(left) == 2 for left in missing)
    assert set().union(*missing) == {*"abcdefgh"}


def test_any_step_can_be_asked_for_at_any_time() -> None:
    steps = list(range(40))
    forward = [batches(BUCKETS, 2, 8)(step) for step in steps]
    batch = batches(BUCKETS, 2, 8)
    assert [batch(step) for step in reversed(steps)] == forward[::-1]
    assert [batch(step) for step in steps] == forward


def test_the_order_of_files_makes_no_difference_but_the_seed_does() -> None:
    other = {bucket: samples[::-1] for bucket, samples in reversed(BUCKETS.items())}
    first = [batches(BUCKETS, 2, 8)(step) for step in range(20)]
    assert [batches(other, 2, 8)(step) for step in range(20)] == first
    assert [batches(BUCKETS, 2, 9)(step) for step in range(20)] != first
    assert [[drawn.sample for drawn in found] for found in first[:5]] != [[drawn.sample for drawn in found] for found in first[5:10]]


def test_buckets_take_turns_in_an_order_of_the_epoch() -> None:
    batch = batches(BUCKETS, 2, 8)
    turns = {tuple(batch(5 * epoch + step)[0].sample in BUCKETS["768x512"] for step in range(5)) for epoch in range(30)}
    assert len(turns) > 5  # of ten


def test_all_that_is_wrong_with_samples_is_said_at_once() -> None:
    with pytest.raises(InputError) as caught:
        batches({"one": ["a", "b", "a"], "two": ["b"]}, 0, 0, repeats={"x": 2, "b": 0})
    details = "\n".join(caught.value.details)
    for words in ("a: 2 times", "b: 2 times", "x: has repeats", "batch size: 0", "repeats of b: 0"):
        assert words in details


@pytest.mark.parametrize("buckets", [{}, {"empty": []}])
def test_no_sample_at_all_is_refused(buckets: dict[str, list[str]]) -> None:
    with pytest.raises(InputError) as caught:
        per_epoch(buckets, 1)
    assert caught.value.details == ["no bucket holds a sample"]


def test_samples_that_drop_last_would_never_show_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        batches(BUCKETS, 4, 0, drop_last=True)
    assert caught.value.details == ["bucket 768x512: 3 with repeats, a batch takes 4"]
    assert per_epoch(BUCKETS, 4, drop_last=True, repeats={"f": 2}) == 2
    assert per_epoch(BUCKETS | {"empty": []}, 3, drop_last=True) == 2


def test_numbers_below_one_are_wrong_usage() -> None:
    with pytest.raises(UsageError):
        per_epoch(BUCKETS, -1)
    with pytest.raises(UsageError):
        batches(BUCKETS, 2, 0)(-1)


SCRIPT = """
import json, sys
from loratools.training.draws import batches, model_seed, per_epoch, unit
buckets = {"512x768": ["a", "b", "c", "d", "e"], "768x512": ["f", "g", "h"]}
light = [unit(5, "flip", 1, "a", 0), model_seed(5, 1, 0, 0), per_epoch(buckets, 2)]
assert "torch" not in sys.modules, "torch was imported"
print(json.dumps([light, [batches(buckets, 2, 5)(step) for step in range(7)]]))
"""


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_another_process_draws_the_same_and_without_torch_where_none_is_needed(hash_seed: str) -> None:
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    light = [unit(5, "flip", 1, "a", 0), model_seed(5, 1, 0, 0), per_epoch(BUCKETS, 2)]
    assert json.loads(done.stdout) == [light, [[[*drawn] for drawn in batches(BUCKETS, 2, 5)(step)] for step in range(7)]]

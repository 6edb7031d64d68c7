"""Schedules against their formulas by hand, and against diffusers' at every step."""

from __future__ import annotations

import math

import pytest
import torch

from loratools.errors import UsageError
from loratools.training.schedule import DECAYS, chosen, factor, options_of

LR = 2e-4

BY_HAND = [
    # decay, options, warmup, step of 10, factor
    ("constant", {}, 0, 0, 1.0),
    ("constant", {"end": 0.3}, 0, 10, 1.0),
    ("constant", {}, 4, 0, 0.0),
    ("constant", {}, 4, 3, 0.75),
    ("linear", {}, 0, 0, 1.0),
    ("linear", {}, 0, 3, 0.7),
    ("linear", {}, 2, 1, 0.5),
    ("linear", {}, 2, 2, 1.0),
    ("linear", {}, 2, 6, 0.5),
    ("linear", {"end": 0.2}, 2, 6, 0.6),
    ("linear", {}, 0, 10, 0.0),
    ("linear", {"end": 0.25}, 0, 25, 0.25),
    ("cosine", {}, 0, 5, 0.5),
    ("cosine", {}, 2, 4, (1 + math.sqrt(0.5)) / 2),
    ("cosine", {}, 0, 10, 0.0),
    ("cosine", {}, 0, 15, 0.0),  # where diffusers' is at 0.5 again
    ("cosine", {"end": 0.1}, 0, 5, 0.55),
    ("cosine-restarts", {"cycles": 2}, 0, 0, 1.0),
    ("cosine-restarts", {"cycles": 2}, 2, 4, 0.5),
    ("cosine-restarts", {"cycles": 2}, 2, 6, 1.0),
    ("cosine-restarts", {"cycles": 2}, 2, 10, 0.0),
    ("polynomial", {"power": 2}, 0, 5, 0.25),
    ("polynomial", {"power": 0.5, "end": 0.5}, 2, 8, 0.75),
    ("polynomial", {"power": 2, "end": 0.1}, 0, 11, 0.1),
]


@pytest.mark.parametrize(("decay", "options", "warmup", "step", "expected"), BY_HAND)
def test_a_factor_by_hand(decay: str, options: dict[str, float], warmup: int, step: int, expected: float) -> None:
    assert factor(step, 10, decay, warmup=warmup, **options) == pytest.approx(expected, abs=1e-15)


def test_every_decay_is_in_the_table_by_hand() -> None:
    assert {row[0] for row in BY_HAND} == set(DECAYS)


@pytest.mark.parity
@pytest.mark.parametrize(("warmup", "total"), [(0, 50), (7, 50), (1, 2), (13, 100), (49, 50)])
@pytest.mark.parametrize(
    ("decay", "theirs", "options", "their_options"),
    [
        ("constant", "constant_with_warmup", {}, {}),
        ("linear", "linear", {}, {}),
        ("cosine", "cosine", {}, {}),
        ("cosine-restarts", "cosine_with_restarts", {}, {}),
        ("cosine-restarts", "cosine_with_restarts", {"cycles": 3}, {"num_cycles": 3}),
        ("polynomial", "polynomial", {"end": 1e-7 / LR}, {}),
        ("polynomial", "polynomial", {"end": 1e-7 / LR, "power": 2.5}, {"power": 2.5}),
    ],
)
def test_diffusers_has_the_same_factor_at_every_step(
    decay: str, theirs: str, options: dict[str, float], their_options: dict[str, float], warmup: int, total: int
) -> None:
    optimization = pytest.importorskip("diffusers.optimization")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    scheduler = optimization.get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=total, **their_options)
    for step in range(total + 1):
        assert scheduler.get_last_lr()[0] / LR == pytest.approx(factor(step, total, decay, warmup=warmup, **options), rel=0, abs=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("warmup", [0, 3, 20])
@pytest.mark.parametrize("end", [0.0, 0.1, 1.0])
def test_a_factor_is_a_share_that_ends_where_it_should(decay: str, warmup: int, end: float) -> None:
    factors = [factor(step, 20, decay, warmup=warmup, end=end) for step in range(30)]
    assert all(0 <= value <= 1 for value in factors)
    assert factors[:warmup] == [step / warmup for step in range(warmup)]
    if warmup < 20:
        assert factors[warmup] == 1.0
        assert set(factors[20:]) == {1.0 if decay == "constant" else end}


def test_everything_wrong_with_the_numbers_is_said_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        factor(-1, 0, "linear", warmup=-2, end=float("nan"))
    assert [line.split()[0] for line in caught.value.details] == ["step", "total", "warmup", "end"]


def test_a_warmup_longer_than_the_run_is_refused() -> None:
    assert factor(9, 10, "cosine", warmup=10) == 0.9
    with pytest.raises(UsageError) as caught:
        factor(0, 10, "cosine", warmup=11)
    assert "never be reached" in caught.value.details[0]


def test_an_unknown_schedule_names_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        factor(0, 10, "cosine-restart")
    assert "did you mean 'cosine-restarts'?" in caught.value.message
    assert all(name in (caught.value.fix or "") for name in DECAYS)


def test_an_option_that_a_schedule_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        factor(0, 10, "cosine", power=2.0, cycles=3)
    assert caught.value.details == ["power = 2.0", "cycles = 3"]
    with pytest.raises(UsageError) as caught:
        factor(0, 10, "polynomial", cycles=3)
    assert caught.value.fix == "its options: power"


@pytest.mark.parametrize(("decay", "option"), [("polynomial", "power"), ("cosine-restarts", "cycles")])
@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_an_option_without_sense_is_refused(decay: str, option: str, value: float) -> None:
    with pytest.raises(UsageError):
        factor(5, 10, decay, **{option: value})


def test_options_are_read_from_the_function() -> None:
    assert options_of(DECAYS["linear"]) == {}
    assert options_of(DECAYS["polynomial"]) == {"power": 1.0}
    assert chosen(DECAYS, "schedule", "polynomial", {"power": 3})(0.5) == 0.125

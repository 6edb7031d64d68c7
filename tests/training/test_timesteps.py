"""Timestep laws and loss weights against their formulas by hand, their densities, and diffusers with the same uniform numbers."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

from loratools.errors import UsageError
from loratools.training.timesteps import LAWS, WEIGHTINGS, discrete, flux_mu, resolution_shift, shifted, sigma, weight

DRAWS = [(index + 0.5) / 200 for index in range(200)]
EXTREMES = [2.0**-53, 1e-9, 1 - 1e-9, 1 - 2.0**-53]
PHI1 = 0.8413447460685429  # Φ(1)

BY_HAND = [
    ("uniform", {}, 0.3, 0.3),
    ("logit-normal", {}, 0.5, 0.5),
    ("logit-normal", {}, PHI1, 1 / (1 + math.exp(-1))),
    ("logit-normal", {"mean": -0.5, "std": 2.0}, PHI1, 1 / (1 + math.exp(-1.5))),
    ("logit-normal", {"mean": -0.5, "std": 2.0}, 1 - PHI1, 1 / (1 + math.exp(2.5))),
    ("sigmoid", {}, PHI1, 1 / (1 + math.exp(-1))),
    ("sigmoid", {"scale": 0.25}, 1 - PHI1, 1 / (1 + math.exp(0.25))),
    ("shift", {"scale": 0.25, "shift": 3.0}, 0.5, 0.75),
    ("mode", {"scale": 0.0}, 0.3, 0.7),
    ("mode", {}, 0.5, 0.5),
    ("mode", {}, 1 / 3, 2 / 3 - 1.29 * (0.75 - 2 / 3)),
    ("mode", {"scale": -0.8}, 1 / 3, 2 / 3 + 0.8 * (0.75 - 2 / 3)),
    ("cosmap", {}, 0.5, 0.5),
    ("cosmap", {}, 2 / 3, 1 - 1 / (math.sqrt(3) + 1)),
]


@pytest.mark.parametrize(("law", "options", "u", "expected"), BY_HAND)
def test_a_law_by_hand(law: str, options: dict[str, float], u: float, expected: float) -> None:
    assert sigma(u, law, **options) == pytest.approx(expected, abs=1e-13)


def test_every_law_is_in_the_table_by_hand() -> None:
    assert {row[0] for row in BY_HAND} == set(LAWS)


@pytest.mark.parametrize("law", LAWS)
def test_a_law_is_monotone_symmetric_and_inside(law: str) -> None:
    sigmas = [sigma(u, law) for u in sorted(DRAWS + EXTREMES)]
    assert sorted(sigmas) in (sigmas, sigmas[::-1])
    assert min(sigmas) > 0
    assert max(sigmas) <= 1
    for u in DRAWS:
        assert sigma(1 - u, law) == pytest.approx(1 - sigma(u, law), abs=1e-12)


@pytest.mark.parametrize(("weighting", "law"), [("cosmap", "cosmap"), ("logit-normal-density", "logit-normal")])
def test_a_density_is_the_derivative_of_its_law(weighting: str, law: str) -> None:
    """The law is the quantile function of its density: dσ/du · density(σ) = 1, the derivative by central differences."""
    for u in DRAWS[5:-5]:
        slope = (sigma(u + 1e-6, law) - sigma(u - 1e-6, law)) / 2e-6
        assert slope * weight(sigma(u, law), weighting) == pytest.approx(1, rel=1e-6)


def test_a_density_follows_the_options_of_its_law() -> None:
    options = {"mean": -0.7, "std": 1.6}
    for u in DRAWS[5:-5]:
        slope = (sigma(u + 1e-6, "logit-normal", **options) - sigma(u - 1e-6, "logit-normal", **options)) / 2e-6
        assert slope * weight(sigma(u, "logit-normal", **options), "logit-normal-density", **options) == pytest.approx(1, rel=1e-6)


def test_a_negative_mean_leans_to_the_image() -> None:
    assert sum(sigma(u, "logit-normal", mean=-1.0) for u in DRAWS) / len(DRAWS) < 0.35
    assert sum(sigma(u, "logit-normal", mean=1.0) for u in DRAWS) / len(DRAWS) > 0.65


@pytest.mark.parity
@pytest.mark.parametrize(
    ("law", "options"),
    [
        ("uniform", {}),
        ("logit-normal", {"mean": 0.0, "std": 1.0}),
        ("logit-normal", {"mean": 0.4, "std": 1.7}),
        ("mode", {"scale": 1.29}),
        ("mode", {"scale": -0.5}),
    ],
)
def test_diffusers_gives_the_same_for_the_same_draws(monkeypatch: pytest.MonkeyPatch, law: str, options: dict[str, float]) -> None:
    training_utils = pytest.importorskip("diffusers.training_utils")
    draws = torch.tensor(DRAWS, dtype=torch.float64)
    gaussian = torch.tensor([NormalDist().inv_cdf(u) for u in DRAWS], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: draws.clone())
    monkeypatch.setattr(torch, "normal", lambda mean, std, **kwargs: mean + std * gaussian)
    theirs = training_utils.compute_density_for_timestep_sampling(
        law.replace("-", "_"), len(DRAWS), logit_mean=options.get("mean"), logit_std=options.get("std"), mode_scale=options.get("scale")
    )
    assert theirs.tolist() == pytest.approx([sigma(u, law, **options) for u in DRAWS], abs=1e-12)


@pytest.mark.parity
@pytest.mark.parametrize("weighting", ["none", "sigma-sqrt", "cosmap"])
def test_diffusers_weighs_the_loss_the_same(weighting: str) -> None:
    training_utils = pytest.importorskip("diffusers.training_utils")
    theirs = training_utils.compute_loss_weighting_for_sd3(weighting.replace("-", "_"), torch.tensor(DRAWS, dtype=torch.float64))
    assert theirs.tolist() == pytest.approx([weight(level, weighting) for level in DRAWS], rel=1e-7)  # theirs is float32 for sigma_sqrt


@pytest.mark.parametrize(
    ("weighting", "level", "expected"),
    [
        ("none", 0.3, 1.0),
        ("sigma-sqrt", 0.25, 16.0),
        ("sigma-sqrt", 1.0, 1.0),
        ("cosmap", 0.5, 4 / math.pi),
        ("cosmap", 1.0, 2 / math.pi),
        ("logit-normal-density", 0.5, 4 / math.sqrt(2 * math.pi)),
        ("logit-normal-density", 1.0, 0.0),
    ],
)
def test_a_weight_by_hand(weighting: str, level: float, expected: float) -> None:
    assert weight(level, weighting) == pytest.approx(expected, rel=1e-14)
    assert weighting in WEIGHTINGS


@pytest.mark.parametrize(
    ("level", "shift", "expected"), [(0.5, 3.0, 0.75), (0.2, 1.0, 0.2), (1.0, 7.0, 1.0), (0.0, 7.0, 0.0), (0.75, 1 / 3, 0.5)]
)
def test_a_shift_by_hand(level: float, shift: float, expected: float) -> None:
    assert shifted(level, shift) == pytest.approx(expected, abs=1e-15)


def test_a_shift_of_one_changes_no_bit_and_shifts_multiply() -> None:
    for level in DRAWS + EXTREMES:
        assert shifted(level, 1.0) == level
        assert shifted(shifted(level, 3.0), 0.5) == pytest.approx(shifted(level, 1.5), rel=1e-14)


def test_a_law_is_shifted_after_it_is_drawn() -> None:
    for u in DRAWS:
        drawn = 1 / (1 + math.exp(-0.8 * NormalDist().inv_cdf(u)))
        assert sigma(u, "sigmoid", scale=0.8, shift=3.0) == pytest.approx(3 * drawn / (1 + 2 * drawn), abs=1e-13)


@pytest.mark.parity
def test_diffusers_schedulers_shift_the_same() -> None:
    schedulers = pytest.importorskip("diffusers.schedulers")
    static = schedulers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    ours = [shifted(level / 1000, 3.0) for level in range(1000, 0, -1)]
    assert static.sigmas.tolist() == pytest.approx(ours, abs=1e-6)
    dynamic = schedulers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    theirs = dynamic.time_shift(flux_mu(1024), 1.0, torch.tensor(DRAWS, dtype=torch.float64))
    assert theirs.tolist() == pytest.approx([shifted(level, math.exp(flux_mu(1024))) for level in DRAWS], abs=1e-13)


@pytest.mark.parametrize(("tokens", "expected"), [(256, 0.5), (4096, 1.15), (2176, 0.825), (1024, 0.63)])
def test_mu_is_linear_in_the_tokens(tokens: int, expected: float) -> None:
    assert flux_mu(tokens) == pytest.approx(expected, abs=1e-14)


def test_mu_follows_its_ends() -> None:
    assert flux_mu(300, base=1.0, maximum=2.0, base_tokens=100, maximum_tokens=500) == pytest.approx(1.5)


def test_a_resolution_shift_is_the_root_of_the_pixels() -> None:
    assert resolution_shift(1024 * 1024, 512 * 512) == pytest.approx(2.0)
    assert shifted(0.5, resolution_shift(4096, 1024)) == pytest.approx(2 / 3)


def test_discrete_timesteps_are_cells_of_the_unit_interval() -> None:
    assert [discrete((step + 0.5) / 1000) for step in range(1000)] == list(range(1000))
    assert [discrete(u, 100, 104) for u in (0.01, 0.26, 0.51, 0.99)] == [100, 101, 102, 103]
    assert [discrete(u) for u in EXTREMES] == [0, 0, 999, 999]
    assert discrete(1 - 2.0**-53, 0, 2**60) < 2**60


@pytest.mark.parametrize(("low", "high"), [(-1, 10), (5, 5), (7, 3)])
def test_an_empty_range_of_timesteps_is_refused(low: int, high: int) -> None:
    with pytest.raises(UsageError):
        discrete(0.5, low, high)


@pytest.mark.parametrize("u", [0.0, 1.0, -0.1, float("nan")])
def test_a_draw_outside_is_refused(u: float) -> None:
    with pytest.raises(UsageError):
        sigma(u)
    with pytest.raises(UsageError):
        discrete(u)


@pytest.mark.parametrize("level", [0.0, -0.1, 1.1, float("nan")])
def test_a_level_without_a_weight_is_refused(level: float) -> None:
    with pytest.raises(UsageError):
        weight(level, "sigma-sqrt")


@pytest.mark.parametrize(
    ("law", "options"),
    [
        ("logit-normal", {"std": 0.0}),
        ("sigmoid", {"scale": -1.0}),
        ("mode", {"scale": 1.76}),  # 2 / (π - 2) = 1.7519…
        ("mode", {"scale": -1.01}),
        ("uniform", {"shift": 0.0}),
        ("uniform", {"mean": 0.5}),
        ("logit_normal", {}),
    ],
)
def test_options_that_make_no_law_are_refused(law: str, options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        sigma(0.4, law, **options)


@pytest.mark.parametrize("scale", [-1.0, 1.75])
def test_mode_is_monotone_up_to_the_ends_of_its_range(scale: float) -> None:
    sigmas = [sigma(u, "mode", scale=scale) for u in DRAWS]
    assert sigmas == sorted(sigmas, reverse=True)


def test_a_refused_flux_range_says_so() -> None:
    with pytest.raises(UsageError):
        flux_mu(100, base_tokens=512, maximum_tokens=256)
    with pytest.raises(UsageError):
        flux_mu(0)

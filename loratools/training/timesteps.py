"""Noise levels of training as functions of a uniform draw u in (0, 1), and the weight that the loss has at a level.

Flow matching: x_σ = (1 - σ) x + σ ε, so σ = 1 is noise; a law maps u to σ, and a shift s moves it towards the noise,

    σ' = s σ / (1 + (s - 1) σ).

Laws and weights are those of Esser et al., 2024 (Stable Diffusion 3, arXiv:2403.03206, section 3.1), the shift its section 5.3.2 and
Flux's. They are float64 and of one sample: what a sample gets does not depend on the others of its batch, and no torch is needed.

The number that diffusers.training_utils.compute_density_for_timestep_sampling gives is the σ of these laws, but its training scripts
use it as an index into timesteps that fall from noise to image, which makes it 1 - σ. All laws but one are symmetric; of `logit-normal`
a mean m there is a mean of -m here. Here, as in the paper, a negative mean leans towards the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

from loratools.errors import UsageError
from loratools.training.schedule import chosen, entered, positive

LAWS: dict[str, Callable[..., float]] = {}
WEIGHTINGS: dict[str, Callable[..., float]] = {}

_NORMAL = NormalDist()
_MODE_RANGE = (-1.0, 2 / (math.pi - 2))  # where the law of `mode` is monotone, and so stays within 0 and 1


def discrete(u: float, low: int = 0, high: int = 1000) -> int:
    """The timestep of a diffusion model, uniform over low … high - 1. Raises UsageError unless 0 ≤ low < high."""
    if not 0 <= low < high:
        raise UsageError(f"timesteps from {low} to below {high}: expected 0 ≤ low < high")
    return min(high - 1, low + int(_inside(u) * (high - low)))


def sigma(u: float, law: str = "uniform", *, shift: float = 1.0, **options: float) -> float:
    """The noise level of a uniform draw, in [0, 1] (its ends only where a law's options drive it out of float64).

    law: a name in LAWS; options: those of the law; shift: 1 shifts nothing, e^μ (`flux_mu`) is Flux's. Raises UsageError.
    """
    return shifted(chosen(LAWS, "timestep law", law, options)(_inside(u)), shift)


def weight(sigma: float, weighting: str = "none", **options: float) -> float:
    """The factor of the loss of a sample at a noise level in (0, 1]. weighting: a name in WEIGHTINGS. Raises UsageError."""
    if not 0 < sigma <= 1:
        raise UsageError(f"noise level {sigma}: expected above 0 and at most 1")
    return chosen(WEIGHTINGS, "loss weighting", weighting, options)(sigma)


@entered(LAWS)
def uniform(u: float) -> float:
    """σ = u (rectified flow, Liu et al., 2022, arXiv:2209.03003)."""
    return u


@entered(LAWS, "logit-normal")
def logit_normal(u: float, *, mean: float = 0.0, std: float = 1.0) -> float:
    """σ = sigmoid(mean + std · Φ⁻¹(u)): a logit that is normal. A mean above 0 leans towards the noise."""
    return _sigmoid(mean + positive("std", std) * _NORMAL.inv_cdf(u))


@entered(LAWS, "shift")
@entered(LAWS)
def sigmoid(u: float, *, scale: float = 1.0) -> float:
    """σ = sigmoid(scale · Φ⁻¹(u)): kohya's `sigmoid`, and its `shift` where a shift follows: a logit-normal of mean 0."""
    return logit_normal(u, std=positive("scale", scale))


@entered(LAWS)
def mode(u: float, *, scale: float = 1.29) -> float:
    """σ = 1 - u - scale · (cos²(πu / 2) - 1 + u): heavy tails; scale > 0 leans to the middle, < 0 to the ends, 0 is uniform."""
    low, high = _MODE_RANGE
    if not low <= scale <= high:
        raise UsageError(f"scale of mode is {scale}, expected from {low} to {high:.4f}, where the law is monotone")
    return 1.0 - u - scale * (math.cos(math.pi * u / 2) ** 2 - 1.0 + u)


@entered(LAWS)
def cosmap(u: float) -> float:
    """σ = 1 - 1 / (tan(πu / 2) + 1): the signal-to-noise ratios of the cosine schedule (Nichol and Dhariwal, 2021, arXiv:2102.09672)."""
    tangent = math.tan(math.pi * u / 2)
    return tangent / (tangent + 1.0)  # the same, without a difference of near numbers


def shifted(sigma: float, shift: float) -> float:
    """σ' = s σ / (1 + (s - 1) σ): as noisy to the eye at a higher resolution; 3 for SD3, 1 changes nothing. Raises UsageError for s ≤ 0."""
    noise = positive("shift", shift) * sigma
    return noise / (noise + (1.0 - sigma))


def flux_mu(tokens: int, *, base: float = 0.5, maximum: float = 1.15, base_tokens: int = 256, maximum_tokens: int = 4096) -> float:
    """Flux's μ, linear in the number of image tokens (packed latents); the shift is e^μ. A token is 16 × 16 pixels."""
    if not 0 < base_tokens < maximum_tokens:
        raise UsageError(f"from {base_tokens} to {maximum_tokens} tokens: expected 0 < base_tokens < maximum_tokens")
    slope = (maximum - base) / (maximum_tokens - base_tokens)
    return base + slope * (positive("tokens", tokens) - base_tokens)


def resolution_shift(tokens: int, reference: int) -> float:
    """SD3's shift √(m / n) between two numbers of image tokens or pixels, both positive."""
    return math.sqrt(positive("tokens", tokens) / positive("reference", reference))


@entered(WEIGHTINGS)
def none(sigma: float) -> float:
    """1."""
    return 1.0


@entered(WEIGHTINGS, "sigma-sqrt")
def sigma_sqrt(sigma: float) -> float:
    """σ⁻² (the name is that of diffusers)."""
    return sigma**-2


@entered(WEIGHTINGS, "cosmap")
def cosmap_density(sigma: float) -> float:
    """2 / (π (1 - 2σ + 2σ²)), the density of the law `cosmap`: for uniform draws, in its place."""
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))


@entered(WEIGHTINGS, "logit-normal-density")
def logit_normal_density(sigma: float, *, mean: float = 0.0, std: float = 1.0) -> float:
    """e^(-(logit σ - mean)² / 2 std²) / (std √(2π) σ (1 - σ)), the density of the law `logit-normal`: for uniform draws, in its place."""
    if sigma == 1:
        return 0.0
    logit = math.log(sigma) - math.log1p(-sigma)
    return NormalDist(mean, positive("std", std)).pdf(logit) / (sigma * (1 - sigma))


def _inside(u: float) -> float:
    if not 0 < u < 1:
        raise UsageError(f"uniform draw {u}: expected above 0 and below 1")
    return u


def _sigmoid(logit: float) -> float:
    """1 / (1 + e^-x) from whichever exponential cannot overflow."""
    if logit >= 0:
        return 1.0 / (1.0 + math.exp(-logit))
    return math.exp(logit) / (1.0 + math.exp(logit))

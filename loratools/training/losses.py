"""What a model is asked for and how far it is from it: noisy latents, targets, losses of samples, and their weights.

    x_t = a x + s ε       diffusion: a = √ᾱ_t, s = √(1 - ᾱ_t)       flow matching: a = 1 - σ, s = σ
    epsilon               ε
    v                     a ε - s x           (Salimans and Ho, 2022, arXiv:2202.00512)
    flow                  ε - x = dx_t / dσ   (Liu et al., 2022, arXiv:2209.03003)

Latents, noise, predictions and targets are (batch, …) of one shape; a loss is one number a sample, (batch,), the mean over its other
dimensions, so that weights of samples can be applied to it; the mean over the batch is the caller's.

Invariants: everything is cast to float32 where it comes in and is float32 where it goes out, whatever the model computes in; levels
and ratios are float64 in between. No argument is changed. Shapes are compared, never broadcast: a target (batch, 1, h, w) is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from loratools.errors import InputError, UsageError
from loratools.training.schedule import chosen, entered, positive

if TYPE_CHECKING:
    import torch

    Levels = tuple[torch.Tensor, torch.Tensor]  # a and s of each sample, (batch,) float32 each

LOSSES: dict[str, Callable[..., torch.Tensor]] = {}
TARGETS: dict[str, Callable[..., torch.Tensor]] = {}
MIN_SNR: dict[str, Callable[..., torch.Tensor]] = {}


def diffusion_levels(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor) -> Levels:
    """√ᾱ_t and √(1 - ᾱ_t). alphas_cumprod (steps,) of the noise scheduler; timesteps (batch,) integers on any device."""
    alpha = _alpha(alphas_cumprod, timesteps)
    return alpha.sqrt().float(), (1 - alpha).sqrt().float()


def flow_levels(sigmas: torch.Tensor) -> Levels:
    """1 - σ and σ. sigmas (batch,)."""
    return (1 - sigmas.double()).float(), sigmas.float()


def noised(latents: torch.Tensor, noise: torch.Tensor, levels: Levels) -> torch.Tensor:
    """x_t = a x + s ε, float32 of the latents' shape."""
    latents, noise = _pair("latents", latents, "noise", noise)
    signal, deviation = (_along(level, latents) for level in levels)
    return signal * latents + deviation * noise


def target(prediction: str, latents: torch.Tensor, noise: torch.Tensor, levels: Levels) -> torch.Tensor:
    """What the model is asked for, float32 of the latents' shape. Raises UsageError, InputError.

    prediction: a name in TARGETS; v is diffusers' v_prediction.
    """
    law = chosen(TARGETS, "prediction type", prediction, {})
    return law(*_pair("latents", latents, "noise", noise), levels)


@entered(TARGETS)
def epsilon(latents: torch.Tensor, noise: torch.Tensor, levels: Levels) -> torch.Tensor:
    """ε (Ho et al., 2020, arXiv:2006.11239)."""
    return noise


@entered(TARGETS, "v")
def v_prediction(latents: torch.Tensor, noise: torch.Tensor, levels: Levels) -> torch.Tensor:
    """a ε - s x (Salimans and Ho, 2022)."""
    signal, deviation = (_along(level, latents) for level in levels)
    return signal * noise - deviation * latents


@entered(TARGETS)
def flow(latents: torch.Tensor, noise: torch.Tensor, levels: Levels) -> torch.Tensor:
    """ε - x (Liu et al., 2022)."""
    return noise - latents


def offset_noise(noise: torch.Tensor, draw: torch.Tensor, offset: float) -> torch.Tensor:
    """ε + offset · draw, one number for a whole channel, so that brightness is learned (Guttenberg, 2023, "Diffusion with offset noise").

    noise (batch, channels, …); draw (batch, channels) standard normal. Raises InputError where they do not fit, UsageError for a
    negative offset.
    """
    if tuple(draw.shape) != tuple(noise.shape[:2]):
        raise InputError(f"noise offset: the draw is {tuple(draw.shape)}, expected (batch, channels) = {tuple(noise.shape[:2])}")
    if not 0 <= offset < math.inf:
        raise UsageError(f"noise offset is {offset}, expected 0 or a finite number above")
    return noise.float() + offset * draw.float().reshape(*draw.shape, *[1] * (noise.dim() - 2))


def loss(prediction: torch.Tensor, target: torch.Tensor, name: str = "mse", **options: float) -> torch.Tensor:
    """The loss of each sample, (batch,) float32. name: one in LOSSES; options: its own. Raises UsageError; InputError for unlike shapes."""
    return chosen(LOSSES, "loss", name, options)(prediction, target)


@entered(LOSSES)
def mse(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """d², d = prediction - target."""
    return _mean(_difference(prediction, target).square())


@entered(LOSSES)
def huber(prediction: torch.Tensor, target: torch.Tensor, *, delta: float = 1.0) -> torch.Tensor:
    """d² / 2 up to |d| = delta, delta · (|d| - delta / 2) from there on (Huber, 1964, doi:10.1214/aoms/1177703732)."""
    distance = _difference(prediction, target).abs()
    near = distance.clamp(max=positive("delta", delta))
    return _mean(near * (distance - near / 2))


@entered(LOSSES, "pseudo-huber")
def pseudo_huber(prediction: torch.Tensor, target: torch.Tensor, *, c: float = 0.1) -> torch.Tensor:
    """2c (√(d² + c²) - c), d² for |d| ≪ c and 2c |d| for |d| ≫ c: the `huber` of kohya and of diffusers' examples (arXiv:2403.16728).

    Written as 2c d² / (√(d² + c²) + c): √(d² + c²) - c has no digits left in float32 for a small d.
    """
    square = _difference(prediction, target).square()
    return _mean(2 * positive("c", c) * square / ((square + c * c).sqrt() + c))


def snr(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """ᾱ_t / (1 - ᾱ_t), the signal-to-noise ratio, (batch,) float32; 0 at a zero terminal SNR, infinite without noise."""
    alpha = _alpha(alphas_cumprod, timesteps)
    return (alpha / (1 - alpha)).float()


def min_snr(ratio: torch.Tensor, gamma: float = 5.0, prediction: str = "epsilon") -> torch.Tensor:
    """Min-SNR-γ weights of the losses of samples (Hang et al., 2023, arXiv:2303.09556), (batch,) float32, finite for any SNR from 0 to ∞.

    ratio (batch,): `snr`. prediction: a name in MIN_SNR. Raises UsageError, for flow matching too: its weights are in timesteps.py.
    """
    return chosen(MIN_SNR, "prediction type for min-SNR weights", prediction, {})(ratio.float(), positive("gamma", gamma))


@entered(MIN_SNR, "epsilon")
def _min_snr_epsilon(ratio: torch.Tensor, gamma: float) -> torch.Tensor:
    """min(SNR, γ) / SNR = min(1, γ / SNR), which is 1 at SNR = 0 and not 0 / 0."""
    return (gamma / ratio).clamp(max=1.0)


@entered(MIN_SNR, "v")
def _min_snr_v(ratio: torch.Tensor, gamma: float) -> torch.Tensor:
    """min(SNR, γ) / (SNR + 1): the loss of v is SNR + 1 times that of x."""
    return ratio.clamp(max=gamma) / (ratio + 1)


def prior_preservation(losses: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
    """mean(instance) + weight · mean(class), a scalar (Ruiz et al., 2022, DreamBooth, arXiv:2208.12242).

    losses (batch,): the first half of the batch are instance images, the second class images. Raises InputError for an odd or empty
    batch, UsageError for a weight below 0.
    """
    if losses.dim() != 1 or len(losses) % 2 or not len(losses):
        raise InputError(
            f"prior preservation: the losses are {tuple(losses.shape)}, expected (batch,) with an even batch",
            fix="put an equal number of instance and class images into each batch",
        )
    if not 0 <= weight < math.inf:
        raise UsageError(f"weight of the class images is {weight}, expected 0 or a finite number above")
    instance, prior = losses.float().chunk(2)
    return instance.mean() + weight * prior.mean()


def _alpha(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """ᾱ_t, (batch,) float64 on the device of the timesteps."""
    return alphas_cumprod.to(timesteps.device)[timesteps].double()


def _pair(what: str, first: torch.Tensor, other: str, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in float32. Raises InputError unless they are (batch, …) of one shape."""
    if first.shape != second.shape or first.dim() < 1:
        raise InputError(f"{what} are {tuple(first.shape)} and {other} {tuple(second.shape)}, expected one shape (batch, …)")
    return first.float(), second.float()


def _difference(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    first, second = _pair("predictions", prediction, "targets", target)
    return first - second


def _mean(values: torch.Tensor) -> torch.Tensor:
    """Over all but the first dimension, (batch,)."""
    return values.reshape(len(values), -1).mean(1)


def _along(level: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """(batch,) as (batch, 1, …), float32. Raises InputError where it is not one number a sample."""
    if tuple(level.shape) != (len(latents),):
        raise InputError(f"noise levels are {tuple(level.shape)}, expected one a sample: ({len(latents)},)")
    return level.float().reshape(-1, *[1] * (latents.dim() - 1))

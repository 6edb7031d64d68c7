"""Losses, targets and weights against their formulas in float64 by hand, and diffusers' signal-to-noise ratio."""

from __future__ import annotations

import math

import pytest
import torch

from loratools.errors import InputError, UsageError
from loratools.training.losses import (
    LOSSES,
    MIN_SNR,
    TARGETS,
    diffusion_levels,
    flow_levels,
    loss,
    min_snr,
    noised,
    offset_noise,
    prior_preservation,
    snr,
    target,
)

F64 = torch.float64


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def close(found: torch.Tensor, expected: torch.Tensor | list[float], tolerance: float = 1e-6) -> bool:
    wanted = torch.as_tensor(expected, dtype=F64)
    return (
        found.dtype == torch.float32
        and found.shape == wanted.shape
        and torch.allclose(found.to(F64), wanted, rtol=tolerance, atol=tolerance)
    )


def alphas(zero_terminal: bool = False) -> torch.Tensor:
    """ᾱ of Stable Diffusion in float32: β from 0.00085 to 0.012, linear in its root."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=F64) ** 2
    found = torch.cumprod(1 - betas, 0)
    if zero_terminal:
        found[-1] = 0
    return found.float()


def element(name: str, d: float, **options: float) -> float:
    """A loss of one difference, in Python's floats."""
    if name == "mse":
        return d * d
    if name == "huber":
        delta = options.get("delta", 1.0)
        return d * d / 2 if abs(d) <= delta else delta * (abs(d) - delta / 2)
    c = options.get("c", 0.1)
    return 2 * c * (math.sqrt(d * d + c * c) - c)


CHOICES = [("mse", {}), ("huber", {}), ("huber", {"delta": 0.3}), ("pseudo-huber", {}), ("pseudo-huber", {"c": 2.0})]


@pytest.mark.parametrize(("name", "options"), CHOICES)
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 7), (3,)])
def test_a_loss_of_each_sample_by_hand(name: str, options: dict[str, float], shape: tuple[int, ...]) -> None:
    prediction, wanted = random(*shape).float(), random(*shape, seed=1).float()
    rows = (prediction.to(F64) - wanted.to(F64)).reshape(3, -1).tolist()
    expected = [sum(element(name, d, **options) for d in row) / len(row) for row in rows]
    assert close(loss(prediction, wanted, name, **options), expected)


def test_every_loss_is_tested_by_hand() -> None:
    assert {name for name, _ in CHOICES} == set(LOSSES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_float32_whatever_comes_in(name: str, dtype: torch.dtype) -> None:
    """A batch whose squares fp16 cannot hold and bf16 would round."""
    prediction, wanted = (300 * random(2, 64)).to(dtype), (300 * random(2, 64, seed=1)).to(dtype)
    difference = (prediction.to(F64) - wanted.to(F64)).tolist()
    expected = torch.tensor([sum(element(name, d) for d in row) / len(row) for row in difference], dtype=F64)
    found = loss(prediction, wanted, name)
    assert found.dtype == torch.float32
    assert torch.allclose(found.to(F64), expected, rtol=1e-5)


def test_pseudo_huber_keeps_its_digits_for_small_differences() -> None:
    """√(d² + c²) - c, taken as it is written, is off by 5 % here in float32."""
    difference = torch.tensor([[1e-4], [1e-3], [1e-6]])
    expected = torch.tensor([element("mse", float(d)) for d in difference.flatten()], dtype=F64)  # d² to a relative (d / 2c)²
    found = loss(difference, torch.zeros_like(difference), "pseudo-huber", c=1.0)
    assert torch.allclose(found.to(F64), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "options"), CHOICES)
def test_the_gradient_of_a_loss_is_that_of_its_formula(name: str, options: dict[str, float]) -> None:
    values = [-3.0, -0.31, -0.05, 0.0, 0.02, 0.29, 1.7]
    prediction = torch.tensor([values], requires_grad=True)
    loss(prediction, torch.zeros(1, len(values)), name, **options).sum().backward()
    step = 1e-6
    slopes = [(element(name, d + step, **options) - element(name, d - step, **options)) / (2 * step * len(values)) for d in values]
    assert prediction.grad is not None
    assert close(prediction.grad[0], slopes, 1e-5)


def test_a_target_is_not_broadcast() -> None:
    for name in LOSSES:
        with pytest.raises(InputError) as caught:
            loss(torch.zeros(2, 4, 8, 8), torch.zeros(2, 1, 8, 8), name)
        assert "(2, 4, 8, 8)" in caught.value.message
        assert "(2, 1, 8, 8)" in caught.value.message
    with pytest.raises(InputError):
        loss(torch.zeros(()), torch.zeros(()))


@pytest.mark.parametrize(
    ("name", "options"),
    [("huber", {"delta": 0.0}), ("pseudo-huber", {"c": 0.0}), ("pseudo-huber", {"c": float("nan")}), ("mse", {"delta": 1.0}), ("l2", {})],
)
def test_a_loss_that_is_none_is_refused(name: str, options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        loss(torch.zeros(2, 3), torch.ones(2, 3), name, **options)


def test_levels_and_noisy_latents_of_diffusion_by_hand() -> None:
    steps = torch.tensor([0, 500, 999])
    latents, noise = random(3, 2, 4), random(3, 2, 4, seed=1)
    levels = diffusion_levels(alphas(), steps)
    kept = [float(alphas()[step]) for step in steps]
    assert close(levels[0], [math.sqrt(value) for value in kept])
    assert close(levels[1], [math.sqrt(1 - value) for value in kept])
    expected = torch.stack([math.sqrt(kept[row]) * latents[row] + math.sqrt(1 - kept[row]) * noise[row] for row in range(3)])
    assert close(noised(latents, noise, levels), expected)


def test_levels_and_noisy_latents_of_flow_matching_by_hand() -> None:
    sigmas = torch.tensor([0.1, 0.5, 1.0], dtype=F64)
    latents, noise = random(3, 2, 4), random(3, 2, 4, seed=1)
    levels = flow_levels(sigmas)
    assert close(levels[0], [0.9, 0.5, 0.0])
    assert close(levels[1], [0.1, 0.5, 1.0])
    expected = torch.stack([(1 - level) * latents[row] + level * noise[row] for row, level in enumerate([0.1, 0.5, 1.0])])
    assert close(noised(latents, noise, levels), expected)


@pytest.mark.parity
def test_diffusers_makes_the_same_noisy_latents_and_velocity() -> None:
    schedulers = pytest.importorskip("diffusers.schedulers")
    scheduler = schedulers.DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    steps, latents, noise = torch.tensor([3, 400, 999]), random(3, 4, 2, 2).float(), random(3, 4, 2, 2, seed=1).float()
    levels = diffusion_levels(scheduler.alphas_cumprod, steps)
    assert torch.allclose(noised(latents, noise, levels), scheduler.add_noise(latents, noise, steps), atol=1e-6)
    assert torch.allclose(target("v", latents, noise, levels), scheduler.get_velocity(latents, noise, steps), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_targets_by_hand(dtype: torch.dtype) -> None:
    latents, noise = random(2, 3, 4).to(dtype), random(2, 3, 4, seed=1).to(dtype)
    signal, deviation = [0.8, 0.28], [0.6, 0.96]
    levels = torch.tensor(signal), torch.tensor(deviation)
    x, e = latents.to(F64), noise.to(F64)
    expected = {
        "epsilon": e,
        "flow": e - x,
        "v": torch.stack([signal[row] * e[row] - deviation[row] * x[row] for row in range(2)]),
    }
    assert set(expected) == set(TARGETS)
    for name, wanted in expected.items():
        assert close(target(name, latents, noise, levels), wanted)


def test_a_target_leads_back_to_the_latents() -> None:
    """x = a x_t - s v for diffusion, x = x_t - σ (ε - x) for flow matching."""
    latents, noise = random(2, 3, 4), random(2, 3, 4, seed=1)
    levels = diffusion_levels(alphas(), torch.tensor([10, 700]))
    signal, deviation = (level.reshape(-1, 1, 1) for level in levels)
    assert close(signal * noised(latents, noise, levels) - deviation * target("v", latents, noise, levels), latents)
    levels = flow_levels(torch.tensor([0.2, 0.9]))
    assert close(noised(latents, noise, levels) - levels[1].reshape(-1, 1, 1) * target("flow", latents, noise, levels), latents)


def test_inputs_of_targets_are_compared_and_left_alone() -> None:
    latents, noise = random(2, 3), random(2, 3, seed=1)
    before = latents.clone(), noise.clone()
    levels = flow_levels(torch.tensor([0.2, 0.9]))
    for name in TARGETS:
        target(name, latents, noise, levels)
        with pytest.raises(InputError):
            target(name, latents, noise[:, :1], levels)
    assert torch.equal(latents, before[0])
    assert torch.equal(noise, before[1])
    with pytest.raises(InputError):
        noised(latents, noise, flow_levels(torch.tensor([0.2])))
    with pytest.raises(UsageError) as caught:
        target("vv", latents, noise, levels)
    assert "epsilon, v, flow" in (caught.value.fix or "")


def test_a_noise_offset_is_one_number_a_channel() -> None:
    noise, draw = random(2, 3, 4, 5), random(2, 3, seed=1)
    expected = torch.stack([torch.stack([noise[row, channel] + 0.05 * draw[row, channel] for channel in range(3)]) for row in range(2)])
    assert close(offset_noise(noise, draw, 0.05), expected)
    assert close(offset_noise(noise, draw, 0.0), noise)
    assert offset_noise(random(2, 3, 4, 5, 6), draw, 0.1).shape == (2, 3, 4, 5, 6)


def test_a_noise_offset_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError):
        offset_noise(random(2, 3, 4, 5), random(2, 4), 0.05)
    with pytest.raises(UsageError):
        offset_noise(random(2, 3, 4, 5), random(2, 3), -0.05)


@pytest.mark.parity
def test_diffusers_has_the_same_signal_to_noise_ratio() -> None:
    training_utils = pytest.importorskip("diffusers.training_utils")
    schedulers = pytest.importorskip("diffusers.schedulers")
    scheduler = schedulers.DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    steps = torch.arange(1000)
    assert torch.allclose(snr(scheduler.alphas_cumprod, steps), training_utils.compute_snr(scheduler, steps), rtol=1e-5, atol=0)


def test_the_signal_to_noise_ratio_by_hand() -> None:
    table = torch.tensor([0.9, 0.5, 0.2, 0.0])
    assert close(snr(table, torch.tensor([3, 1, 0, 2])), [0.0, 1.0, 9.0, 0.25])


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        # SNR      0    0.25        5        20       ∞
        ("epsilon", [1.0, 1.0, 1.0, 5 / 20, 0.0]),
        ("v", [0.0, 0.25 / 1.25, 5 / 6, 5 / 21, 0.0]),
    ],
)
def test_min_snr_weights_by_hand(prediction: str, expected: list[float]) -> None:
    ratio = torch.tensor([0.0, 0.25, 5.0, 20.0, math.inf])
    assert close(min_snr(ratio, 5.0, prediction), expected)
    assert prediction in MIN_SNR


def test_min_snr_weights_of_a_schedule_with_zero_terminal_snr_are_finite() -> None:
    ratio = snr(alphas(zero_terminal=True), torch.arange(1000))
    assert ratio[-1] == 0
    for prediction in MIN_SNR:
        assert min_snr(ratio, 5.0, prediction).isfinite().all()


def test_min_snr_makes_each_parametrisation_the_same_loss() -> None:
    """Weighted, the losses of ε and v are min(SNR, γ) times that of x, with the x that each predicts."""
    levels = diffusion_levels(alphas(), torch.tensor([50, 300, 800]))
    ratio = snr(alphas(), torch.tensor([50, 300, 800]))
    latents, noise, wrong = random(3, 16), random(3, 16, seed=1), random(3, 16, seed=2)
    signal, deviation = (level.to(F64).reshape(-1, 1) for level in levels)
    noisy = signal * latents + deviation * noise
    expected = (latents - wrong).square().mean(1) * ratio.to(F64).clamp(max=5.0)
    from_wrong = (noisy - signal * wrong) / deviation  # the ε that goes with x = wrong
    predicted = {"epsilon": from_wrong, "v": signal * from_wrong - deviation * wrong}
    for prediction, values in predicted.items():
        weighted = loss(values, target(prediction, latents, noise, levels)) * min_snr(ratio, 5.0, prediction)
        assert torch.allclose(weighted.to(F64), expected, rtol=1e-4)


@pytest.mark.parametrize(("gamma", "prediction"), [(0.0, "epsilon"), (-1.0, "epsilon"), (5.0, "flow")])
def test_min_snr_weights_that_are_none_are_refused(gamma: float, prediction: str) -> None:
    with pytest.raises(UsageError):
        min_snr(torch.tensor([1.0]), gamma, prediction)


def test_prior_preservation_by_hand() -> None:
    losses = torch.tensor([1.0, 3.0, 10.0, 30.0])
    assert close(prior_preservation(losses, 0.5), torch.tensor(2.0 + 0.5 * 20.0))
    assert close(prior_preservation(losses), torch.tensor(22.0))
    assert close(prior_preservation(losses, 0.0), torch.tensor(2.0))


@pytest.mark.parametrize("losses", [torch.zeros(3), torch.zeros(0), torch.zeros(2, 2), torch.tensor(1.0)])
def test_a_batch_without_halves_is_refused(losses: torch.Tensor) -> None:
    with pytest.raises(InputError):
        prior_preservation(losses)


def test_a_negative_weight_of_class_images_is_refused() -> None:
    with pytest.raises(UsageError):
        prior_preservation(torch.zeros(2), -1.0)

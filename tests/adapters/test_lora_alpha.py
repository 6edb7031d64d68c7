"""Alpha of a LoRA moved into its factors: exact for powers of two within the dtypes' range, announced where it rounds."""

from __future__ import annotations

import math

import pytest
import torch

from loratools.adapters.adapter import NotExact
from loratools.adapters.kinds import Lora
from loratools.tensors.lazy import from_torch, scalar_tensor


def dense(module):
    """(alpha / r) · up · down by hand, float64, from the bytes."""
    up, down = module.factors["up"].load().double(), module.factors["down"].load().double()
    return (1.0 if module.alpha is None else module.alpha / len(down)) * up @ down


def test_folding_a_half_in_bf16_is_bit_exact(rand):
    module = Lora({"up": rand(32, 16, dtype=torch.bfloat16), "down": rand(16, 24, dtype=torch.bfloat16), "alpha": scalar_tensor(8.0)}, 8.0)
    folded = module.folded()
    assert (folded.alpha, folded.rounded, "alpha" in folded.factors) == (None, False, False)
    assert {tensor.dtype for tensor in folded.factors.values()} == {"BF16"}
    assert torch.equal(dense(folded), dense(module))
    assert module.fold_is_exact()


def test_folding_ten_sixteenths_in_bf16_says_that_it_rounds(rand):
    module = Lora({"up": rand(64, 16, dtype=torch.bfloat16), "down": rand(16, 24, dtype=torch.bfloat16)}, 10.0)
    folded = module.folded()
    assert folded.rounded
    assert not module.fold_is_exact()
    error = float((dense(folded) - dense(module)).norm() / dense(module).norm())
    assert 1e-4 < error < 2.5e-3
    assert math.isclose(module.relative_error(folded), error, rel_tol=1e-6)


def test_a_sixty_fourth_of_small_fp16_factors_goes_where_there_is_room(rand):
    """1/64 into an fp16 factor of 1e-5 alone would zero one value in seven."""
    module = Lora({"up": rand(64, 8, dtype=torch.float16, size=1e-5), "down": rand(8, 48, dtype=torch.float16)}, 0.125)
    folded = module.folded()
    assert not folded.rounded
    assert torch.equal(dense(folded), dense(module))
    naive = (module.factors["up"].load() / 64).eq(0) & module.factors["up"].load().ne(0)
    assert naive.float().mean() > 0.1


def test_a_rounded_remainder_does_not_overflow_either(rand, rel):
    up = rand(8, 4, dtype=torch.float16).load()
    up[0, 0] = 40000.0
    module = Lora({"up": from_torch(up), "down": rand(4, 8, dtype=torch.float16)}, 7.0)
    folded = module.folded()
    assert folded.factors["up"].load().isfinite().all()
    assert rel(folded.delta(), dense(module)) < 1e-3


def test_small_fp16_factors_on_both_sides_share_the_loss(rand):
    module = Lora({"up": rand(64, 8, dtype=torch.float16, size=1e-5), "down": rand(8, 48, dtype=torch.float16, size=1e-5)}, 0.125)
    folded = module.folded()
    assert folded.rounded
    for role in ("up", "down"):
        lost = folded.factors[role].load().eq(0) & module.factors[role].load().ne(0)
        assert lost.float().mean() < 0.06


def test_large_fp16_factors_do_not_overflow(rand):
    module = Lora({"up": rand(8, 2, dtype=torch.float16, size=1e4), "down": rand(2, 8, dtype=torch.float16)}, 2.0**10)
    assert torch.equal(dense(module.folded()), dense(module))
    with pytest.raises(NotExact, match="range"):
        Lora({"up": rand(8, 2, dtype=torch.float16, size=1e4), "down": rand(2, 8, dtype=torch.float16, size=1e4)}, 2.0**10).folded()


@pytest.mark.parametrize(("old", "new"), [(8.0, 2.0), (None, 16.0), (3.0, 7.0), (-4.0, 4.0)])
def test_with_alpha_keeps_delta_and_bias(rand, rel, old, new):
    module = Lora({"up": rand(8, 4), "down": rand(4, 8), "bias": rand(8), "diff_b": rand(8)}, old)
    moved = module.with_alpha(new)
    assert moved.alpha == new
    assert rel(moved.delta(), module.delta()) < 1e-6
    assert rel(moved.bias_delta(), module.bias_delta()) < 1e-6
    assert moved.rounded == ((old, new) == (3.0, 7.0))
    assert moved.rounded or torch.equal(moved.with_alpha(old or 4.0).delta(), module.delta())


def test_a_module_without_alpha_is_folded_already(rand):
    module = Lora({"up": rand(8, 4), "down": rand(4, 8)})
    assert module.folded() is module


def test_an_alpha_of_zero_cannot_be_moved(rand):
    with pytest.raises(NotExact):
        Lora({"up": rand(8, 4), "down": rand(4, 8)}, 0.0).folded()

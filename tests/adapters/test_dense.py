"""Dense changes and replacements: formula, row moves, what needs the base."""

from __future__ import annotations

import math

import pytest
import torch

from loratools.adapters.adapter import NotExact
from loratools.adapters.kinds import Dense, Replacement
from loratools.errors import MalformedError
from loratools.tensors.lazy import from_torch, scalar_tensor


def value(module, role):
    return module.factors[role].load().double()


@pytest.mark.parametrize("shape", [(8,), (8, 5), (8, 5, 3, 3)])
def test_diff(rand, shape):
    module = Dense({"diff": rand(*shape), "diff_b": rand(8)})
    assert (module.shape, module.scale, module.linear, module.problems()) == (shape, 1.0, True, [])
    assert torch.equal(module.delta(), value(module, "diff"))
    assert torch.equal(module.bias_delta(), value(module, "diff_b"))


def test_a_stored_alpha_is_no_scale(rand):
    module = Dense({"diff": rand(8, 5), "alpha": scalar_tensor(0.0)}, 0.0)
    assert (module.scale, module.problems()) == (1.0, [])
    assert torch.equal(module.delta(), value(module, "diff"))


def test_norm_deltas(rand):
    module = Dense({"w_norm": rand(8), "b_norm": rand(8)})
    assert module.shape == (8,)
    assert torch.equal(module.delta(), value(module, "w_norm"))
    assert torch.equal(module.bias_delta(), value(module, "b_norm"))


def test_sparse_bias_is_added_where_it_points(rand):
    """LyCORIS extracts: the largest entries of the remainder as a sparse tensor."""
    indices = from_torch(torch.tensor([[0, 3], [4, 1]], dtype=torch.int16))
    values, size = from_torch(torch.tensor([2.0, -3.0])), from_torch(torch.tensor([8, 5]))
    module = Dense({"bias_indices": indices, "bias_values": values, "bias_size": size})
    expected = torch.zeros(8, 5, dtype=torch.float64)
    expected[0, 4], expected[3, 1] = 2.0, -3.0
    assert module.shape == (8, 5)
    assert torch.equal(module.delta(), expected)
    with pytest.raises(NotExact, match="bias_indices"):
        module.split([4, 4])
    for wrong in ([[0, 8], [4, 1]], [[0, -1], [4, 1]], [[0], [4]]):
        with pytest.raises(MalformedError, match="bias_indices"):
            Dense({**module.factors, "bias_indices": from_torch(torch.tensor(wrong))}).delta()


def test_a_bias_alone_changes_no_weight(rand):
    module = Dense({"diff_b": rand(8)})
    assert module.shape == (8, None)
    assert torch.count_nonzero(module.delta(torch.ones(8, 5))) == 0
    with pytest.raises(NotExact):
        module.delta()


def test_reshape_weight_says_the_padded_shape():
    """BFL control widens img_in from 64 to 128 inputs."""
    module = Dense({"reshape_weight": from_torch(torch.tensor([3072, 128]))})
    assert module.padded_shape == (3072, 128)
    assert module.shape == (3072, 128)
    assert torch.count_nonzero(module.delta(torch.ones(4, 4))) == 0


def test_replacement_needs_the_base(rand):
    module = Replacement({"set_weight": rand(8, 5), "set_bias": rand(8), "diff": rand(8, 5)})
    weight, bias = rand(8, 5).load(), rand(8).load()
    assert not module.linear
    expected = value(module, "set_weight") - weight.double() + value(module, "diff")
    assert torch.equal(module.delta(weight), expected)
    assert torch.equal(module.bias_delta(bias), value(module, "set_bias") - bias.double())
    for refused in (module.delta, module.bias_delta):
        with pytest.raises(NotExact, match="base"):
            refused()


def test_rows(rand, identical):
    module = Dense({"diff": rand(8, 5), "diff_b": rand(8)})
    parts = module.split([5, 3])
    assert torch.equal(torch.cat([part.delta() for part in parts]), module.delta())
    identical(Dense.fuse(parts, [5, 3]), module)
    assert torch.equal(module.swap_halves().delta(), module.delta().roll(4, 0))
    assert torch.equal(module.swap_halves().bias_delta(), module.bias_delta().roll(4))
    identical(module.swap_halves().swap_halves(), module)


def test_missing_parts_are_zeros_and_come_back_as_missing(rand, identical):
    part, bias = Dense({"diff": rand(4, 5)}), Dense({"diff": rand(3, 5), "diff_b": rand(3)})
    fused = Dense.fuse([part, None, bias], [4, 2, 3])
    assert torch.count_nonzero(fused.delta()[4:6]) == 0
    assert torch.equal(fused.bias_delta(), torch.cat([torch.zeros(6, dtype=torch.float64), bias.bias_delta()]))
    back = fused.split([4, 2, 3])
    assert back[1] is None
    identical(back[2], bias)


def test_replacements_cannot_have_gaps(rand, identical):
    part = Replacement({"set_weight": from_torch(torch.zeros(4, 5))})
    with pytest.raises(NotExact, match="set_weight"):
        Replacement.fuse([part, None], [4, 2])
    parts = Replacement({"set_weight": from_torch(torch.cat([torch.zeros(4, 5), torch.ones(4, 5)]))}).split([4, 4])
    identical(parts[0], part)  # rows set to zero are set, not absent


def test_sizes_and_transpose(rand):
    module = Dense({"diff": rand(8, 5)})
    assert module.norm() == pytest.approx(float(value(module, "diff").norm()))
    assert torch.allclose(module.singular_values(), torch.linalg.svdvals(value(module, "diff")))
    assert torch.equal(module.transpose().delta(), module.delta().t())
    twice = Dense({"diff": from_torch(value(module, "diff") * 2)})
    assert module.relative_error(twice) == pytest.approx(1.0)
    zero = Dense({"diff": from_torch(torch.zeros(8, 5))})
    assert (zero.relative_error(zero), zero.relative_error(module)) == (0.0, math.inf)
    with pytest.raises(NotExact):
        module.to_lora()


def test_problems(rand):
    assert [code for _, code, _ in Dense({"diff": rand(8, 5), "diff_b": rand(7)}).problems()] == ["bad-shape"]

"""DoRA: the formula on both axes and for convolutions, spellings of the magnitude, row moves."""

from __future__ import annotations

import pytest
import torch

from loratools.adapters.adapter import NotExact
from loratools.adapters.kinds import Dora, Loha, Lokr, Lora
from loratools.tensors.lazy import from_torch


def lora(rand, out=8, inputs=8, kernel=(), rank=3):
    ones = (1,) * len(kernel)
    return {"up": rand(out, rank, *ones), "down": rand(rank, inputs, *kernel)}


def by_hand(module, weight, axis):
    """m (W + D) / |W + D| - W, one row or column at a time."""
    weight = weight.double()
    summed = weight + module.inner.delta().reshape(weight.shape)
    magnitude = next(module.factors[role] for role in ("dora_scale", "magnitude") if role in module.factors).load().double().flatten()
    result = summed.clone()
    for index in range(len(magnitude)):
        place = (index,) if axis == "out" else (slice(None), index)
        result[place] = magnitude[index] * summed[place] / summed[place].pow(2).sum().sqrt()
    return result - weight


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_formula_on_a_square_layer(rand, rel, axis, kernel):
    """LyCORIS#216: the wrong axis is no shape error here, but 36 % of the weight."""
    ones = (1,) * len(kernel)
    scale = rand(8, 1, *ones) if axis == "out" else rand(1, 8, *ones)
    module, weight = Dora({**lora(rand, kernel=kernel), "dora_scale": scale}, 1.5), rand(8, 8, *kernel).load()
    assert (module.axis, module.rank, module.scale, module.problems()) == (axis, 3, 0.5, [])
    assert rel(module.delta(weight), by_hand(module, weight, axis)) < 1e-13
    assert rel(module.delta(weight), by_hand(module, weight, {"out": "in", "in": "out"}[axis])) > 0.1


@pytest.mark.parametrize(("role", "shape"), [("dora_scale", (8,)), ("magnitude", (8,)), ("magnitude", (1, 8, 1, 1))])
def test_other_spellings_are_the_out_axis(rand, rel, role, shape):
    kernel = (3, 3) if len(shape) == 4 else ()
    module, weight = Dora({**lora(rand, kernel=kernel), role: rand(*shape)}), rand(8, 8, *kernel).load()
    assert module.axis == "out"
    assert rel(module.delta(weight), by_hand(module, weight, "out")) < 1e-13


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 1, 1)])
def test_axis_where_one_side_is_one(rand, shape):
    kernel = shape[2:] and (3, 3)
    assert Dora({**lora(rand, 1, 5, kernel), "dora_scale": rand(*shape)}).axis == "out"
    assert Dora({**lora(rand, 5, 1, kernel), "dora_scale": rand(*shape)}).axis == "in"


def test_a_delta_that_does_not_fit_is_not_broadcast(rand):
    module = Dora({**lora(rand, kernel=(1, 1)), "dora_scale": rand(8, 1, 1, 1)})
    with pytest.raises(NotExact, match="fit"):
        module.delta(rand(8, 8, 3, 3).load())
    assert module.delta(rand(8, 8).load()).shape == (8, 8)


def test_base_weight_is_needed_and_a_zero_row_stays_zero(rand):
    up = rand(4, 2).load()
    up[1] = 0
    module = Dora({"up": from_torch(up), "down": rand(2, 5), "dora_scale": rand(4, 1)})
    with pytest.raises(NotExact, match="base"):
        module.delta()
    weight = rand(4, 5).load()
    weight[1] = 0
    assert torch.count_nonzero(module.delta(weight)[1]) == 0


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_magnitude_changes_spelling_bit_for_bit(rand, identical, kernel):
    ones = (1,) * len(kernel)
    module = Dora({**lora(rand, kernel=kernel), "dora_scale": rand(8, 1, *ones)})
    peft = module.magnitude_as("magnitude")
    assert peft.factors["magnitude"].shape == ((1, 8, 1, 1) if kernel else (8,))
    assert "dora_scale" not in peft.factors
    identical(peft.magnitude_as("dora_scale"), module)
    one_dimensional = Dora({**lora(rand, kernel=kernel), "dora_scale": rand(8)})
    assert one_dimensional.magnitude_as("dora_scale").factors["dora_scale"].shape == (8, 1, *ones)


def test_in_axis_is_refused_where_rows_are_parted(rand, identical):
    module = Dora({**lora(rand), "dora_scale": rand(1, 8)})
    for refused in (lambda: module.magnitude_as("magnitude"), lambda: module.split([4, 4]), lambda: Dora.fuse([module, module], [8, 8])):
        with pytest.raises(NotExact, match="inputs"):
            refused()
    identical(module.magnitude_as("dora_scale"), module)


@pytest.mark.parametrize("role", ["dora_scale", "magnitude"])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_out_axis_rows(rand, identical, rel, role, kernel):
    factors = lora(rand, 12, 8, kernel)
    module = Dora({**factors, "dora_scale": rand(12, *(1,) * (1 + len(kernel)))}).magnitude_as(role)
    weight = rand(12, 8, *kernel).load()
    parts, cut = module.split([6, 4, 2]), weight.split([6, 4, 2])
    stacked = torch.cat([by_hand(part, rows, "out") for part, rows in zip(parts, cut, strict=True)])
    assert rel(stacked, by_hand(module, weight, "out")) < 1e-12
    identical(Dora.fuse(parts, [6, 4, 2]), module)
    swapped = module.swap_halves()
    assert rel(swapped.delta(weight.roll(6, 0)), by_hand(module, weight, "out").roll(6, 0)) < 1e-12
    identical(swapped.swap_halves(), module)


def test_in_axis_swap_leaves_the_magnitude(rand, rel):
    module, weight = Dora({**lora(rand), "dora_scale": rand(1, 8)}), rand(8, 8).load()
    swapped = module.swap_halves()
    assert swapped.factors["dora_scale"] is module.factors["dora_scale"]
    assert rel(swapped.delta(weight.roll(4, 0)), by_hand(module, weight, "in").roll(4, 0)) < 1e-12


def test_a_part_without_lora_rows_keeps_its_magnitude(rand):
    up = rand(8, 2).load()
    up[4:] = 0
    module = Dora({"up": from_torch(up), "down": rand(2, 5), "dora_scale": rand(8, 1)})
    weight = rand(8, 5).load()
    parts = module.split([4, 4])
    assert torch.allclose(parts[1].delta(weight[4:]), by_hand(module, weight, "out")[4:], rtol=0, atol=1e-12)
    with pytest.raises(NotExact, match="norms"):
        Dora.fuse([parts[0], None], [4, 4])


def test_transpose_turns_the_axis(rand, rel):
    module, weight = Dora({**lora(rand, 6, 8), "magnitude": rand(6)}), rand(6, 8).load()
    turned = module.transpose()
    assert turned.axis == "in"
    assert rel(turned.delta(weight.t()), by_hand(module, weight, "out").t()) < 1e-13


def test_inner_kinds_and_alpha(rand, rel):
    loha = {f"hada_{name}": rand(*shape) for name, shape in (("w1_a", (8, 2)), ("w1_b", (2, 6)), ("w2_a", (8, 2)), ("w2_b", (2, 6)))}
    lokr = {"lokr_w1": rand(4, 2), "lokr_w2_a": rand(2, 1), "lokr_w2_b": rand(1, 3)}
    weight = rand(8, 6).load()
    for factors, inner in ((lora(rand, 8, 6), Lora), (loha, Loha), (lokr, Lokr)):
        module = Dora({**factors, "dora_scale": rand(8, 1)}, 4.0)
        assert type(module.inner) is inner
        assert rel(module.delta(weight), by_hand(module, weight, "out")) < 1e-12
        assert rel(module.folded().delta(weight), module.delta(weight)) < 1e-6
        assert module.folded().alpha is None


def test_wrong_magnitude_is_a_problem(rand):
    assert [code for _, code, _ in Dora({**lora(rand, 8, 6), "dora_scale": rand(7, 1)}).problems()] == ["bad-shape"]
    assert [code for _, code, _ in Dora({**lora(rand, 8, 6), "dora_scale": rand(1, 8)}).problems()] == ["bad-shape"]

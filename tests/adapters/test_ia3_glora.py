"""IA3 and GLoRA: formulas by hand, axes and layouts, row moves."""

from __future__ import annotations

import pytest
import torch

from loratools.adapters.adapter import NotExact
from loratools.adapters.kinds import Glora, Ia3
from loratools.tensors.lazy import from_torch, scalar_tensor


def flag(value):
    return from_torch(torch.tensor(value))


@pytest.mark.parametrize(("shape", "weight_shape"), [((6,), (6, 6)), ((1, 6, 1, 1), (6, 6, 3, 3))])
def test_lycoris_ia3(rand, rel, shape, weight_shape):
    weight = rand(*weight_shape).load()
    for on_input in (0, 1):
        module = Ia3({"weight": rand(*shape), "on_input": flag(on_input)})
        vector, expected = module.factors["weight"].load().double().flatten(), weight.double().clone()
        for index in range(6):
            expected[(slice(None), index) if on_input else (index,)] *= vector[index]
        assert module.shape == ((None, 6) if on_input else (6, None))
        assert rel(module.delta(weight), expected) < 1e-14
        assert module.bias_delta(torch.ones(6)) is None
    with pytest.raises(NotExact, match="base"):
        module.delta()


def test_peft_ia3_multiplies_the_bias_too(rand, rel):
    weight, bias = rand(6, 5).load(), rand(6).load()
    module = Ia3({"ia3_l": rand(6, 1)})
    vector = module.factors["ia3_l"].load().double()
    assert rel(module.delta(weight), weight.double() * vector - weight.double()) < 1e-14
    assert torch.allclose(module.bias_delta(bias), bias.double() * vector.flatten() - bias.double(), rtol=0, atol=1e-14)
    feedforward = Ia3({"ia3_l": rand(1, 5)})
    vector = feedforward.factors["ia3_l"].load().double()
    assert rel(feedforward.delta(weight), weight.double() * vector - weight.double()) < 1e-14
    assert feedforward.bias_delta(bias) is None


def test_peft_convolution_needs_to_be_told(rand):
    factors, weight = {"ia3_l": rand(1, 6, 1, 1)}, rand(6, 6, 3, 3).load()
    vector = factors["ia3_l"].load().double().flatten() - 1
    rows, columns = Ia3(factors), Ia3(factors, options={"feedforward": True})
    assert torch.equal(rows.delta(weight), weight.double() * vector[:, None, None, None])
    assert torch.equal(columns.delta(weight), weight.double() * vector[None, :, None, None])


@pytest.mark.parametrize(("role", "shape"), [("weight", (8,)), ("weight", (1, 8, 1, 1)), ("ia3_l", (8, 1)), ("ia3_l", (1, 8, 1, 1))])
def test_output_vectors_are_sliced(rand, identical, role, shape):
    module = Ia3({role: rand(*shape), **({"on_input": flag(0)} if role == "weight" else {})}, options={"feedforward": False})
    weight = rand(8, 4, *shape[2:]).load()
    parts = module.split([5, 3])
    assert torch.equal(torch.cat([part.delta(rows) for part, rows in zip(parts, weight.split([5, 3]), strict=True)]), module.delta(weight))
    identical(Ia3.fuse(parts, [5, 3]), module)
    assert torch.equal(module.swap_halves().delta(weight.roll(4, 0)), module.delta(weight).roll(4, 0))
    identical(module.swap_halves().swap_halves(), module)
    wide = torch.cat([weight, weight[:2]])
    assert torch.count_nonzero(Ia3.fuse([module, None], [8, 2]).delta(wide)[8:]) == 0


def test_input_vectors_are_shared(rand, identical):
    module = Ia3({"weight": rand(8), "on_input": flag(1)})
    identical(Ia3.fuse(module.split([5, 3]), [5, 3]), module)
    assert module.swap_halves() is module
    for others in ([module, None], [module, Ia3({"weight": rand(8), "on_input": flag(1)})]):
        with pytest.raises(NotExact):
            Ia3.fuse(others, [4, 3])


SHAPES = {"a1.weight": (5, 2), "a2.weight": (2, 5), "b1.weight": (6, 2), "b2.weight": (2, 5)}
OLDER = {"a1.weight": (2, 5), "a2.weight": (5, 2), "b1.weight": (2, 5), "b2.weight": (6, 2)}


def glora(rand, shapes, alpha=None, **options):
    return Glora({role: rand(*shape) for role, shape in shapes.items()}, alpha, options=options)


def test_both_layouts_are_told_by_their_shapes(rand, rel):
    weight = rand(6, 5).load().double()
    module, older = glora(rand, SHAPES, 3.0), glora(rand, OLDER, 3.0)
    a1, a2, b1, b2 = (module.factors[role].load().double() for role in SHAPES)
    assert (module.layout, module.shape, module.rank, module.scale, module.problems()) == ("new", (6, 5), 2, 1.5, [])
    assert rel(module.delta(weight), 1.5 * (weight @ a1 @ a2 + b1 @ b2)) < 1e-13
    a1, a2, b1, b2 = (older.factors[role].load().double() for role in OLDER)
    assert (older.layout, older.shape, older.rank) == ("old", (6, 5), 2)
    assert rel(older.delta(weight), 1.5 * (weight @ a2 @ a1 + b2 @ b1)) < 1e-13


def test_convolutions_contract_the_channels(rand, rel):
    shapes = {"a1.weight": (5, 2, 1, 1), "a2.weight": (2, 5, 1, 1), "b1.weight": (6, 2, 1, 1), "b2.weight": (2, 5, 3, 3)}
    module, weight = glora(rand, shapes), rand(6, 5, 3, 3).load().double()
    a1, a2, b1, b2 = (module.factors[role].load().double() for role in shapes)
    expected = torch.zeros_like(weight)
    for x in range(3):
        for y in range(3):
            expected[:, :, x, y] = weight[:, :, x, y] @ a1[..., 0, 0] @ a2[..., 0, 0] + b1[..., 0, 0] @ b2[:, :, x, y]
    assert module.shape == (6, 5, 3, 3)
    assert rel(module.delta(weight), expected) < 1e-13
    core = Glora({**module.factors, "b2.weight": rand(2, 5, 1, 1), "bm.weight": rand(2, 2, 3, 3)})
    middle, down = core.factors["bm.weight"].load().double(), core.factors["b2.weight"].load().double()[..., 0, 0]
    for x in range(3):
        for y in range(3):
            expected[:, :, x, y] = weight[:, :, x, y] @ a1[..., 0, 0] @ a2[..., 0, 0] + b1[..., 0, 0] @ middle[:, :, x, y] @ down
    assert core.shape == (6, 5, 3, 3)
    assert rel(core.delta(weight), expected) < 1e-13


def test_square_layers_are_decided_by_the_rank(rand, rel):
    """Read the other way round, the factors of a 5x5 layer of rank 2 would be those of a 2x2 layer of rank 5."""
    module, weight = glora(rand, {**SHAPES, "b1.weight": (5, 2)}), rand(5, 5).load().double()
    a1, a2, b1, b2 = (module.factors[role].load().double() for role in SHAPES)
    assert (module.layout, module.shape, module.problems()) == ("new", (5, 5), [])
    assert rel(module.delta(weight), weight @ a1 @ a2 + b1 @ b2) < 1e-13
    assert glora(rand, {**OLDER, "b2.weight": (5, 2)}).layout == "old"


def test_layout_is_undecided_where_the_rank_is_full(rand):
    shapes = dict.fromkeys(SHAPES, (4, 4))
    module, weight = glora(rand, shapes), rand(4, 4).load()
    assert [(severity, code) for severity, code, _ in module.problems()] == [("error", "ambiguous-layout")]
    with pytest.raises(NotExact, match="layout"):
        module.delta(weight)
    new, old = (Glora(module.factors, options={"layout": layout}) for layout in ("new", "old"))
    assert new.problems() == old.problems() == []
    assert not torch.allclose(new.delta(weight), old.delta(weight))


@pytest.mark.parametrize("shapes", [SHAPES, OLDER])
def test_glora_rows(rand, rel, identical, shapes):
    module, weight = glora(rand, {role: (8, 2) if shape == (6, 2) else shape for role, shape in shapes.items()}, 3.0), rand(8, 5).load()
    parts = module.split([5, 3])
    assert rel(torch.cat([part.delta(rows) for part, rows in zip(parts, weight.split([5, 3]), strict=True)]), module.delta(weight)) < 1e-13
    identical(Glora.fuse(parts, [5, 3]), module)
    assert rel(module.swap_halves().delta(weight.roll(4, 0)), module.delta(weight).roll(4, 0)) < 1e-13
    identical(module.swap_halves().swap_halves(), module)
    for others in ([module, None], [module, glora(rand, shapes, 3.0)]):
        with pytest.raises(NotExact):
            Glora.fuse(others, [8, 6])


def test_problems(rand):
    broken = glora(rand, {**SHAPES, "a1.weight": (5, 3)})
    assert [code for _, code, _ in broken.problems()] == ["bad-shape"]
    zero = glora(rand, SHAPES, 0.0)
    zero = zero.with_factors({**zero.factors, "alpha": scalar_tensor(0.0)})
    assert [code for _, code, _ in zero.problems()] == ["bad-alpha"]

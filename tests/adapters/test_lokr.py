"""LoKr: formula, the scale rule, row moves, the exact LoRA."""

from __future__ import annotations

import pytest
import torch

from loratools.adapters.adapter import NotExact
from loratools.adapters.kinds import Lokr, Lora
from loratools.tensors.lazy import from_torch

W1 = {"lokr_w1": (4, 2)}
W1_AB = {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 2)}
W2 = {"lokr_w2": (3, 5)}
W2_AB = {"lokr_w2_a": (3, 2), "lokr_w2_b": (2, 5)}
CONV = {"lokr_w2": (3, 5, 3, 3)}
CONV_AB = {"lokr_w2_a": (3, 2), "lokr_w2_b": (2, 45)}
TUCKER = {"lokr_w2_a": (2, 3), "lokr_w2_b": (2, 5), "lokr_t2": (2, 2, 3, 3)}


def make(rand, *shapes, alpha=None, **options):
    return Lokr({role: rand(*shape) for group in shapes for role, shape in group.items()}, alpha, options=options)


def kron(module):
    """kron(w1, w2) by hand, without a scale: entry by entry, (o1 o2, i1 i2 · kernel)."""
    value = {role.removeprefix("lokr_"): tensor.load().double() for role, tensor in module.factors.items() if role.startswith("lokr")}
    first = value["w1"] if "w1" in value else value["w1_a"] @ value["w1_b"]
    if "w2" in value:
        second = value["w2"]
    elif "t2" in value:
        a, b, t = value["w2_a"], value["w2_b"], value["t2"]
        second = sum(torch.einsum("kl,p,r->prkl", t[i, j], a[i], b[j]) for i in range(len(a)) for j in range(len(b)))
    else:
        second = value["w2_a"] @ value["w2_b"]
    second = second.reshape(second.shape[0], -1)
    (o1, i1), (o2, i2) = first.shape, second.shape
    result = torch.zeros(o1 * o2, i1 * i2, dtype=torch.float64)
    for a in range(o1):
        for b in range(i1):
            result[a * o2 : (a + 1) * o2, b * i2 : (b + 1) * i2] = first[a, b] * second
    return result


@pytest.mark.parametrize("first", [W1, W1_AB])
@pytest.mark.parametrize(
    ("second", "shape"),
    [(W2, (12, 10)), (W2_AB, (12, 10)), (CONV, (12, 10, 3, 3)), (CONV_AB, (12, 90)), (TUCKER, (12, 10, 3, 3))],
)
def test_delta(rand, rel, first, second, shape):
    module = make(rand, first, second, alpha=3.0)
    scale = 1.0 if first is W1 and second in (W2, CONV) else 1.5
    assert (module.shape, module.scale, module.problems()) == (shape, scale, [])
    assert rel(module.delta(), scale * kron(module).reshape(shape)) < 1e-13


def test_alpha_of_two_full_factors_is_ignored(rand, rel):
    """AnimaLoraStudio#241: LyCORIS ignores it, PEFT applies it."""
    module = make(rand, W1, W2, alpha=4.0)
    assert (module.rank, module.scale) == (None, 1.0)
    assert rel(module.delta(), kron(module)) < 1e-14
    peft = make(rand, W1, W2, alpha=4.0, always_scale=True, rank=16)
    assert rel(peft.delta(), 0.25 * kron(peft)) < 1e-14
    folded = peft.folded()
    assert (folded.alpha, folded.scale, folded.rounded) == (None, 1.0, False)
    assert torch.equal(kron(folded), 0.25 * kron(peft))


def test_kernel_is_told_by_an_option_or_by_the_weight(rand):
    module = make(rand, W1, CONV_AB, alpha=1.0)
    told = module.with_factors(module.factors, options={"kernel": (3, 3)})
    assert told.shape == (12, 10, 3, 3)
    assert torch.equal(told.delta(), module.delta(torch.zeros(12, 10, 3, 3)))


@pytest.mark.parametrize("first", [W1, W1_AB])
@pytest.mark.parametrize("second", [W2, W2_AB, TUCKER])
def test_split_fuse_and_swap(rand, identical, first, second):
    module = make(rand, first, second, {"diff_b": (12,)}, alpha=3.0)
    parts = module.split([6, 3, 3])
    assert torch.allclose(torch.cat([kron(part) for part in parts]), kron(module), rtol=0, atol=1e-13)
    assert torch.equal(torch.cat([part.bias_delta() for part in parts]), module.bias_delta())
    assert {part.scale for part in parts} == {module.scale}
    identical(Lokr.fuse(parts, [6, 3, 3]), module)
    assert torch.allclose(kron(module.swap_halves()), torch.cat([kron(module)[6:], kron(module)[:6]]), rtol=0, atol=1e-13)
    identical(module.swap_halves().swap_halves(), module)


def test_missing_part_is_zero_rows(rand):
    module = make(rand, W1, W2)
    fused = Lokr.fuse([module, None], [12, 6])
    assert torch.equal(fused.delta(), torch.cat([module.delta(), torch.zeros(6, 10, dtype=torch.float64)]))
    assert fused.split([12, 6])[1] is None


def test_factored_first_sides_become_blocks_beside_a_full_second(rand, identical):
    second = rand(3, 5)
    parts = [Lokr({"lokr_w1_a": rand(4, r), "lokr_w1_b": rand(r, 2), "lokr_w2": second}, r / 2) for r in (2, 3)]
    fused = Lokr.fuse(parts, [12, 12])
    assert (fused.rank, fused.alpha) == (5, 2.5)
    assert torch.allclose(fused.delta(), torch.cat([part.delta() for part in parts]), rtol=0, atol=1e-13)
    for found, expected in zip(fused.split([12, 12]), parts, strict=True):
        identical(found, expected)


def test_blocks_beside_a_factored_second_side_keep_the_rank(rand):
    """The rank of both sides is one: it cannot be another in a part."""
    first = torch.zeros(4, 2)
    first[:2, 0], first[2:, 1] = 1.0, 2.0
    module = Lokr({**make(rand, W1_AB, W2_AB).factors, "lokr_w1_a": from_torch(first)}, 3.0)
    parts = module.split([6, 6])
    assert [(part.rank, part.alpha, part.problems()) for part in parts] == [(2, 3.0, []), (2, 3.0, [])]
    assert torch.equal(torch.cat([part.delta() for part in parts]), module.delta())


def test_refusals(rand):
    module = make(rand, W1, W2_AB, alpha=3.0)
    with pytest.raises(NotExact, match="multiples of 3"):
        module.split([7, 5])
    with pytest.raises(NotExact, match="same lokr_w2"):
        Lokr.fuse([module, make(rand, W1, W2_AB, alpha=3.0)], [12, 12])
    with pytest.raises(NotExact, match="scales"):
        Lokr.fuse([module, module.with_factors(module.factors, alpha=1.0)], [12, 12])
    odd = Lokr({"lokr_w1": rand(3, 2), "lokr_w2": rand(4, 5)})
    with pytest.raises(NotExact, match="halves"):
        odd.swap_halves()


@pytest.mark.parametrize(
    ("first", "second", "rank"),
    [(W1, W2, 6), (W1_AB, W2, 6), (W1, W2_AB, 4), (W1_AB, W2_AB, 4), (W1, TUCKER, 4), (W1, CONV, 6), (W1, CONV_AB, 4)],
)
def test_exact_lora(rand, rel, first, second, rank):
    """diffusers PR#13250 multiplied w1 @ w2."""
    module = make(rand, first, second, alpha=3.0)
    plain = module.to_lora("F64")
    assert isinstance(plain, Lora)
    assert (plain.rank, plain.shape, plain.problems()) == (rank, module.shape, [])
    assert rel(plain.delta(), module.scale * kron(module).reshape(plain.shape)) <= 1e-12
    assert rel(module.to_lora().delta(), module.delta()) < 1e-6


def test_sizes_are_products(rand):
    module = make(rand, W1, W2_AB, alpha=3.0)
    expected = 1.5 * kron(module)
    assert module.norm() == pytest.approx(float(expected.norm()), rel=1e-12)
    values = torch.linalg.svdvals(expected)
    assert torch.allclose(module.singular_values()[:4], values[:4], rtol=1e-12)


@pytest.mark.parametrize(("first", "second"), [(W1, W2), (W1_AB, W2_AB)])
def test_transpose(rand, rel, first, second):
    module = make(rand, first, second, alpha=3.0)
    assert rel(module.transpose().delta(), module.delta().t()) < 1e-14


def test_problems(rand):
    module = make(rand, {"lokr_w1_a": (4, 3), "lokr_w1_b": (2, 2)}, W2)
    assert [code for _, code, _ in module.problems()] == ["rank-mismatch"]
    undecided = make(rand, {"lokr_w1_a": (4, 3), "lokr_w1_b": (3, 2)}, W2_AB)
    assert [code for _, code, _ in undecided.problems()] == ["rank-mismatch"]
    empty = Lokr({"lokr_w1": from_torch(torch.zeros(0, 2)), "lokr_w2": rand(3, 5)})
    assert [code for _, code, _ in empty.problems()] == ["empty-tensor"]

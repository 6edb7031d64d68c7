"""LoHa: formula with and without cores, row moves, the exact LoRA."""

from __future__ import annotations

import pytest
import torch

from loratools.adapters.adapter import NotExact
from loratools.adapters.kinds import Loha, Lora
from loratools.tensors.lazy import from_torch, scalar_tensor


def make(rand, out, inputs, rank, alpha=None, second=None, **more):
    second = second or rank
    shapes = {"w1_a": (out, rank), "w1_b": (rank, inputs), "w2_a": (out, second), "w2_b": (second, inputs)}
    return Loha({**{f"hada_{name}": rand(*shape) for name, shape in shapes.items()}, **more}, alpha)


def make_tucker(rand, out, inputs, rank, alpha=None):
    shapes = {"w1_a": (rank, out), "w1_b": (rank, inputs), "w2_a": (rank, out), "w2_b": (rank, inputs)}
    shapes |= {"t1": (rank, rank, 3, 2), "t2": (rank, rank, 3, 2)}
    return Loha({f"hada_{name}": rand(*shape) for name, shape in shapes.items()}, alpha)


def dense(module):
    """By hand, float64."""
    value = {role.removeprefix("hada_"): tensor.load().double() for role, tensor in module.factors.items()}
    rank = module.factors["hada_w1_b"].shape[0]
    scale = 1.0 if module.alpha is None else module.alpha / rank
    if "t1" not in value:
        return scale * (value["w1_a"] @ value["w1_b"]) * (value["w2_a"] @ value["w2_b"])
    halves = []
    for side in "12":
        t, a, b = value[f"t{side}"], value[f"w{side}_a"], value[f"w{side}_b"]
        halves.append(sum(torch.einsum("kl,p,r->prkl", t[i, j], a[i], b[j]) for i in range(rank) for j in range(rank)))
    return scale * halves[0] * halves[1]


def test_delta(rand, rel):
    module = make(rand, 8, 6, 3, 1.5)
    assert (module.shape, module.rank, module.problems()) == ((8, 6), 3, [])
    assert rel(module.delta(), dense(module)) < 1e-13


def test_tucker_delta(rand, rel):
    module = make_tucker(rand, 8, 5, 3, 2.0)
    assert (module.shape, module.problems()) == ((8, 5, 3, 2), [])
    assert rel(module.delta(), dense(module)) < 1e-12


def test_kernel_is_told_by_an_option_or_by_the_weight(rand):
    module = make(rand, 8, 45, 3)
    told = module.with_factors(module.factors, options={"kernel": (3, 3)})
    assert (module.shape, told.shape) == ((8, 45), (8, 5, 3, 3))
    assert torch.equal(told.delta(), module.delta(torch.zeros(8, 5, 3, 3)))
    assert told.to_lora("F64").shape == (8, 5, 3, 3)


@pytest.mark.parametrize("tucker", [False, True])
def test_split_fuse_and_swap(rand, rel, identical, tucker):
    module = (make_tucker if tucker else make)(rand, 12, 5, 3, 2.0)
    parts = module.split([6, 4, 2])
    assert rel(torch.cat([dense(part) for part in parts]), dense(module)) < 1e-13
    identical(Loha.fuse(parts, [6, 4, 2]), module)
    swapped = module.swap_halves()
    assert rel(dense(swapped), torch.cat([dense(module)[6:], dense(module)[:6]])) < 1e-13
    identical(swapped.swap_halves(), module)


@pytest.mark.parametrize("tucker", [False, True])
def test_fused_parts_of_their_own_come_back(rand, rel, identical, tucker):
    build = make_tucker if tucker else make
    parts = [build(rand, 6, 5, 2, 1.0), None, build(rand, 4, 5, 3, 1.5)]
    fused = Loha.fuse(parts, [6, 3, 4])
    assert (fused.rank, fused.alpha, fused.rounded) == (5, 2.5, False)
    zero = torch.zeros(3, *dense(parts[0]).shape[1:], dtype=torch.float64)
    assert rel(dense(fused), torch.cat([dense(parts[0]), zero, dense(parts[2])])) < 1e-13
    back = fused.split([6, 3, 4])
    assert back[1] is None
    identical(back[0], parts[0])
    identical(back[2], parts[2])


def test_blocks_in_one_pair_only_are_split_as_rows(rand, rel):
    module = make(rand, 8, 5, 3, 1.0)
    first, second = torch.zeros(8, 3), torch.zeros(8, 3)
    first[:4, :1], first[4:, 1:], second[:4] = 1.0, 2.0, 3.0
    module = module.with_factors({**module.factors, "hada_w1_a": from_torch(first), "hada_w2_a": from_torch(second)})
    parts = module.split([4, 4])
    assert [part.problems() for part in parts] == [[], []]
    assert rel(torch.cat([dense(part) for part in parts]), dense(module)) < 1e-14


def test_unequal_scales_are_moved_into_the_factors(rand, rel):
    parts = [make(rand, 6, 5, 2, 1.0), make(rand, 6, 5, 2, 3.0)]
    fused = Loha.fuse(parts, [6, 6])
    assert fused.rounded
    assert rel(dense(fused), torch.cat([dense(part) for part in parts])) < 1e-6


def test_folding_a_power_of_two_is_exact(rand):
    module = make(rand, 6, 5, 4, 1.0)
    assert torch.equal(dense(module.folded()), dense(module))
    assert not module.folded().rounded


def test_exact_lora_has_the_product_of_the_ranks(rand, rel):
    """PEFT PR#2939 approximates by SVD; the Khatri-Rao product is exact."""
    module = make(rand, 24, 18, 4, 3.0, second=3, diff_b=rand(24))
    plain = module.to_lora("F64")
    assert isinstance(plain, Lora)
    assert (plain.rank, plain.scale) == (12, 0.75)
    assert rel(plain.delta(), dense(module.with_factors({role: t for role, t in module.factors.items() if role != "diff_b"}))) <= 1e-12
    assert torch.equal(plain.bias_delta(), module.bias_delta())
    tucker = make_tucker(rand, 8, 5, 3, 2.0)
    assert (tucker.to_lora().rank, tucker.to_lora().shape) == (9, (8, 5, 3, 2))
    assert rel(tucker.to_lora("F64").delta(), dense(tucker)) <= 1e-12


def test_sizes(rand):
    module = make(rand, 12, 9, 2, 3.0)
    assert module.norm() == pytest.approx(float(dense(module).norm()), rel=1e-12)
    assert torch.allclose(module.singular_values(), torch.linalg.svdvals(dense(module)))
    assert module.relative_error(module.to_lora("F64")) < 1e-12


def test_transpose(rand, rel):
    module = make(rand, 8, 6, 3, 1.5)
    assert rel(module.transpose().delta(), dense(module).t()) < 1e-13
    with pytest.raises(NotExact):
        make_tucker(rand, 8, 5, 3).transpose()


def test_problems(rand):
    broken = make(rand, 8, 6, 3, alpha=0.0)
    broken = broken.with_factors({**broken.factors, "hada_w2_a": rand(8, 4), "alpha": scalar_tensor(0.0)})
    assert {code for _, code, _ in broken.problems()} == {"rank-mismatch", "bad-alpha"}

"""LoRA: formula, fuse, split, swap, alpha moved into the factors, sizes through the QR cores."""

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
    rank = down.shape[0]
    scale = 1.0 if module.alpha is None else module.alpha / rank
    return (scale * up.reshape(up.shape[0], rank) @ down.reshape(rank, -1)).reshape(up.shape[0], *down.shape[1:])


# --- formula ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("up", "down", "shape"),
    [
        ((6, 2), (2, 5), (6, 5)),
        ((6, 2, 1, 1), (2, 5, 3, 3), (6, 5, 3, 3)),
        ((6, 2), (2, 5, 3, 3), (6, 5, 3, 3)),  # LyCORIS DyLoRA: 2-D up
        ((6, 2, 1, 1), (2, 5, 1, 1), (6, 5, 1, 1)),
        ((6, 2, 1), (2, 5, 3), (6, 5, 3)),
        ((6, 2, 1, 1, 1), (2, 5, 1, 3, 3), (6, 5, 1, 3, 3)),
    ],
)
@pytest.mark.parametrize("alpha", [None, 1.0, 5.0])
def test_delta_is_scale_up_down(rand, rel, up, down, shape, alpha):
    module = Lora({"up": rand(*up), "down": rand(*down)}, alpha)
    assert module.shape == shape
    assert module.rank == 2
    assert module.delta().dtype == torch.float64
    assert rel(module.delta(), dense(module)) < 1e-14
    assert module.problems() == []


def test_linear_and_1x1_convolution_give_the_same_delta(rand):
    up, down = rand(6, 2), rand(2, 5)
    flat = Lora({"up": up, "down": down}, 1.0)
    conv = Lora({"up": up.reshape((6, 2, 1, 1)), "down": down.reshape((2, 5, 1, 1))}, 1.0)
    assert torch.equal(conv.delta()[..., 0, 0], flat.delta())
    fused = Lora.fuse([flat, conv], [6, 6])
    assert torch.equal(fused.delta(), torch.cat([flat.delta(), flat.delta()]))


def test_delta_takes_the_spelling_of_the_weight_and_is_never_broadcast(rand):
    """diffusers#11286: 1x1 convolutions are stored both ways; merge_lora.py:99 adds (o, i, 1, 1) to every place of a 3x3 kernel."""
    flat, conv = Lora({"up": rand(6, 2), "down": rand(2, 5)}), Lora({"up": rand(6, 2, 1, 1), "down": rand(2, 5, 1, 1)})
    assert torch.equal(flat.delta(torch.zeros(6, 5, 1, 1))[..., 0, 0], flat.delta())
    assert torch.equal(conv.delta(torch.zeros(6, 5)), conv.delta()[..., 0, 0])
    assert conv.delta(torch.zeros(6, 5, 3, 3)).shape == (6, 5, 1, 1)
    assert flat.delta(torch.zeros(5, 6)).shape == (6, 5)
    assert Lora({"up": rand(6, 2), "down": rand(2, 45)}).delta(torch.zeros(6, 5, 3, 3)).shape == (6, 45)


def test_tucker_core_and_its_plain_form(rand, rel):
    module = Lora({"up": rand(6, 3, 1, 1), "mid": rand(3, 3, 3, 3), "down": rand(3, 5, 1, 1)}, 1.5)
    up, mid, down = (module.factors[role].load().double() for role in ("up", "mid", "down"))
    expected = torch.zeros(6, 5, 3, 3, dtype=torch.float64)
    for p in range(3):
        for q in range(3):
            expected += 0.5 * torch.einsum("o,kl,i->oikl", up[:, p, 0, 0], mid[p, q], down[q, :, 0, 0])
    assert rel(module.delta(), expected) < 1e-13
    plain = module.to_lora("F64")
    assert (plain.rank, plain.alpha, "mid" in plain.factors) == (3, 1.5, False)
    assert rel(plain.delta(), expected) < 1e-12
    assert rel(module.to_lora().delta(), expected) < 1e-6


def test_embedding_is_transposed(rand, rel):
    module = Lora({"embedding_down": rand(2, 9), "embedding_up": rand(4, 2)}, 6.0)
    down, up = (module.factors[role].load().double() for role in ("embedding_down", "embedding_up"))
    assert module.shape == (9, 4)
    assert rel(module.delta(), 3.0 * (up @ down).t()) < 1e-14
    assert rel(module.folded().delta(), module.delta()) < 1e-6
    for refused in (lambda: module.split([4, 5]), lambda: Lora.fuse([module, module], [9, 9]), module.swap_halves):
        with pytest.raises(NotExact):
            refused()


def test_biases(rand):
    module = Lora({"up": rand(6, 2), "down": rand(2, 5), "bias": rand(6), "diff_b": rand(6)}, 3.0)
    expected = 1.5 * module.factors["bias"].load().double() + module.factors["diff_b"].load().double()
    assert torch.equal(module.bias_delta(), expected)
    assert Lora({"up": rand(6, 2), "down": rand(2, 5)}).bias_delta() is None


def test_transpose(rand):
    module = Lora({"up": rand(6, 2), "down": rand(2, 5)}, 3.0)
    assert torch.allclose(module.transpose().delta(), module.delta().t(), rtol=0, atol=1e-14)
    with pytest.raises(NotExact):
        Lora({"up": rand(6, 2, 1, 1), "down": rand(2, 5, 3, 3)}).transpose()


# --- fuse ------------------------------------------------------------------------------------------------------------


def test_fusing_three_ranks_and_three_alphas(rand, rel):
    """sd-scripts#2204: with alpha kept, n fused parts get 1/n of the strength."""
    parts = [Lora({"up": rand(16, r), "down": rand(r, 12)}, alpha) for r, alpha in ((4, 3.0), (8, 1.0), (16, 40.0))]
    fused = Lora.fuse(parts, [16, 16, 16])
    assert (fused.rank, fused.alpha) == (28, 28.0)
    assert fused.rounded
    assert rel(fused.delta(), torch.cat([dense(part) for part in parts])) <= 1e-6


def test_fusing_equal_scales_keeps_every_factor_bit(rand):
    parts = [Lora({"up": rand(8, r, dtype=torch.bfloat16), "down": rand(r, 6, dtype=torch.bfloat16)}, r / 2) for r in (2, 4)]
    fused = Lora.fuse(parts, [8, 8])
    assert (fused.rank, fused.alpha, fused.rounded) == (6, 3.0, False)
    assert fused.factors["down"].dtype == "BF16"
    assert torch.equal(fused.factors["down"].load(), torch.cat([part.factors["down"].load() for part in parts]))
    assert torch.equal(fused.delta(), torch.cat([dense(part) for part in parts]))


def test_powers_of_two_between_scales_are_exact(rand):
    parts = [Lora({"up": rand(8, 4, dtype=torch.float16), "down": rand(4, 6, dtype=torch.float16)}, alpha) for alpha in (4.0, 1.0, 8.0)]
    fused = Lora.fuse(parts, [8, 8, 8])
    assert (fused.alpha, fused.rounded) == (12.0, False)
    assert torch.equal(fused.delta(), torch.cat([dense(part) for part in parts]))


def test_missing_part_is_zero_rows(rand, rel):
    q, v = (Lora({"up": rand(8, r), "down": rand(r, 6)}, 2.0) for r in (2, 4))
    fused = Lora.fuse([q, None, v], [8, 5, 8])
    assert torch.count_nonzero(fused.delta()[8:13]) == 0
    assert rel(fused.delta()[:8], dense(q)) < 1e-6
    assert rel(fused.delta()[13:], dense(v)) < 1e-6
    back = fused.split([8, 5, 8])
    assert back[1] is None
    assert [part.rank for part in back if part] == [2, 4]


def test_shared_down_is_stacked(rand, identical):
    down, alpha = rand(3, 6), scalar_tensor(3.0)
    parts = [Lora({"up": rand(4, 3), "down": from_torch(down.load().clone()), "alpha": alpha}, 3.0) for _ in range(3)]
    fused = Lora.fuse(parts, [4, 4, 4])
    assert (fused.rank, fused.alpha, fused.factors["alpha"]) == (3, 3.0, alpha)
    for found, expected in zip(fused.split([4, 4, 4]), parts, strict=True):
        identical(found, expected)


def test_shared_down_with_and_without_alpha(rand):
    """No alpha and alpha = rank are the same scale: the fused module has the alpha, the tensor of one part is not all parts'."""
    down = rand(3, 6)
    parts = [Lora({"up": rand(4, 3), "down": down}), Lora({"up": rand(4, 3), "down": down, "alpha": scalar_tensor(3.0)}, 3.0)]
    fused = Lora.fuse(parts, [4, 4])
    assert (fused.rank, fused.alpha, "alpha" in fused.factors) == (3, 3.0, False)
    assert torch.equal(fused.delta(), torch.cat([dense(part) for part in parts]))


def test_shared_down_of_unequal_scales_is_not_stacked(rand, rel):
    down = rand(3, 6)
    parts = [Lora({"up": rand(4, 3), "down": down}, alpha) for alpha in (1.0, 2.0)]
    fused = Lora.fuse(parts, [4, 4])
    assert (fused.rank, fused.alpha) == (6, 6.0)
    assert rel(fused.delta(), torch.cat([dense(part) for part in parts])) < 1e-6


def test_fusing_biases_fills_with_zeros(rand):
    q = Lora({"up": rand(4, 2), "down": rand(2, 6), "diff_b": rand(4)})
    k = Lora({"up": rand(4, 2), "down": rand(2, 6), "bias": rand(4)})
    fused = Lora.fuse([q, k, None], [4, 4, 3])
    expected = torch.cat([q.factors["diff_b"].load(), k.factors["bias"].load(), torch.zeros(3)]).double()
    assert torch.equal(fused.bias_delta(), expected)


def test_fuse_refusals(rand):
    with pytest.raises(ValueError, match="absent"):
        Lora.fuse([None, None], [4, 4])
    part, other = Lora({"up": rand(4, 2), "down": rand(2, 6)}), Lora({"up": rand(4, 2), "down": rand(2, 7)})
    for parts, rows in (([part, other], [4, 4]), ([part, part], [4, 5])):
        with pytest.raises(NotExact):
            Lora.fuse(parts, rows)


def test_tucker_parts_fuse_and_split_exactly(rand, identical):
    parts = [Lora({"up": rand(4, r, 1, 1), "mid": rand(r, r, 3, 3), "down": rand(r, 5, 1, 1)}, float(r)) for r in (2, 3)]
    fused = Lora.fuse(parts, [4, 4])
    assert fused.factors["mid"].shape == (5, 5, 3, 3)
    assert torch.allclose(fused.delta(), torch.cat([part.delta() for part in parts]), rtol=0, atol=1e-12)
    for found, expected in zip(fused.split([4, 4]), parts, strict=True):
        identical(found, expected)


# --- split -----------------------------------------------------------------------------------------------------------


def test_dense_up_gives_its_rows_to_parts_of_the_same_rank(rand, identical):
    """GQA: rows 24 + 8 + 8."""
    fused = Lora({"up": rand(40, 4), "down": rand(4, 6), "alpha": scalar_tensor(3.0), "diff_b": rand(40)}, 3.0)
    parts = fused.split([24, 8, 8])
    assert [part.rank for part in parts] == [4, 4, 4]
    assert [part.alpha for part in parts] == [3.0, 3.0, 3.0]
    assert torch.equal(torch.cat([dense(part) for part in parts]), dense(fused))
    identical(Lora.fuse(parts, [24, 8, 8]), fused)


def test_block_diagonal_up_gives_each_part_its_own_rank(rand, identical):
    parts = [Lora({"up": rand(8, r), "down": rand(r, 6)}, 0.75 * r) for r in (4, 2, 3)]
    fused = Lora.fuse(parts, [8, 8, 8])
    for found, expected in zip(fused.split([8, 8, 8]), parts, strict=True):
        identical(found, expected)
    identical(Lora.fuse(fused.split([8, 8, 8]), [8, 8, 8]), fused)


def test_alpha_of_a_third_comes_back(rand, identical):
    parts = [Lora({"up": rand(8, r), "down": rand(r, 6)}, alpha) for r, alpha in ((3, 1.0), (6, 2.0), (12, 4.0))]
    fused = Lora.fuse(parts, [8, 8, 8])
    assert (fused.alpha, fused.rounded) == (7.0, False)
    for found, expected in zip(fused.split([8, 8, 8]), parts, strict=True):
        identical(found, expected)


def test_a_stored_alpha_of_the_whole_is_not_that_of_the_parts(rand):
    """musubi's Z-Image converter and sd-scripts' split_qkv store alpha beside a block-diagonal up."""
    parts = [Lora({"up": rand(8, r), "down": rand(r, 6)}, float(r)) for r in (2, 4)]
    fused = Lora.fuse(parts, [8, 8])
    stored = fused.with_factors({**fused.factors, "alpha": scalar_tensor(6.0)})
    back = stored.split([8, 8])
    assert [(part.alpha, "alpha" in part.factors) for part in back] == [(2.0, False), (4.0, False)]


def test_untrained_block_keeps_its_rank(rand, identical):
    """k was trained with a zero up: its columns lie between those of q and v."""
    k = Lora({"up": from_torch(torch.zeros(8, 3)), "down": rand(3, 6)})
    parts = [Lora({"up": rand(8, 2), "down": rand(2, 6)}), k, Lora({"up": rand(8, 4), "down": rand(4, 6)})]
    for found, expected in zip(Lora.fuse(parts, [8, 8, 8]).split([8, 8, 8]), parts, strict=True):
        identical(found, expected)


def test_all_zero_up_is_dense(rand):
    fused = Lora({"up": from_torch(torch.zeros(8, 4)), "down": rand(4, 6)})
    assert [part.rank for part in fused.split([4, 4])] == [4, 4]


def test_columns_out_of_order_are_dense(rand):
    """A block-diagonal up whose blocks do not follow the parts: rows are taken, rank stays."""
    up = torch.zeros(8, 4)
    up[:4, 2:], up[4:, :2] = 1.0, 2.0
    fused = Lora({"up": from_torch(up), "down": rand(4, 6)})
    parts = fused.split([4, 4])
    assert [part.rank for part in parts] == [4, 4]
    assert torch.equal(torch.cat([dense(part) for part in parts]), dense(fused))


def test_a_part_with_a_bias_alone_is_not_lost(rand):
    up = torch.zeros(8, 4)
    up[:4] = 1.0
    fused = Lora({"up": from_torch(up), "down": rand(4, 6), "diff_b": rand(8)})
    parts = fused.split([4, 4])
    assert torch.equal(torch.cat([part.bias_delta() for part in parts]), fused.bias_delta())


def test_negative_zeros_survive(rand, identical):
    up = torch.ones(8, 4)
    up[4:] = -0.0
    fused = Lora({"up": from_torch(up), "down": rand(4, 6)})
    identical(Lora.fuse(fused.split([4, 4]), [4, 4]), fused)


def test_rows_that_do_not_add_up_are_refused(rand):
    with pytest.raises(NotExact, match="12"):
        Lora({"up": rand(12, 2), "down": rand(2, 5)}).split([4, 4])


def test_swap_moves_rows_of_up_and_bias_only(rand, identical):
    module = Lora({"up": rand(6, 2), "down": rand(2, 5), "diff_b": rand(6), "bias": rand(6)}, 1.0)
    swapped = module.swap_halves()
    assert torch.equal(swapped.delta(), torch.cat([module.delta()[3:], module.delta()[:3]]))
    assert torch.equal(swapped.bias_delta(), module.bias_delta().roll(3))
    assert swapped.factors["down"] is module.factors["down"]
    identical(swapped.swap_halves(), module)
    with pytest.raises(NotExact):
        Lora({"up": rand(5, 2), "down": rand(2, 5)}).swap_halves()


def test_inputs_stay_and_outputs_share_nothing(rand):
    fused = Lora({"up": rand(8, 4), "down": rand(4, 6), "diff_b": rand(8)}, 3.0)
    before = {role: b"".join(tensor.chunks()) for role, tensor in fused.factors.items()}
    parts = [*fused.split([4, 4]), fused.with_alpha(5.0), fused.swap_halves(), Lora.fuse(fused.split([4, 4]), [4, 4])]
    made = [tensor for part in parts for role, tensor in part.factors.items() if tensor is not fused.factors[role]]
    pointers = [tensor.load() for tensor in made]
    assert len({tensor.untyped_storage().data_ptr() for tensor in pointers}) == len(pointers)
    assert before == {role: b"".join(tensor.chunks()) for role, tensor in fused.factors.items()}


# --- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6,), (6, 3, 3)])
def test_norm_and_singular_values_are_those_of_the_dense_delta(rand, shape):
    ones = (1,) * (len(shape) - 1)
    module = Lora({"up": rand(20, 4, *ones), "down": rand(4, *shape)}, 3.0)
    values = torch.linalg.svdvals(dense(module).reshape(20, -1))
    assert math.isclose(module.norm(), float(dense(module).norm()), rel_tol=1e-12)
    assert torch.allclose(module.singular_values(), values[:4], rtol=1e-12)


def test_relative_error_needs_no_dense_delta(rand, rel):
    module, other = (Lora({"up": rand(20, r), "down": rand(r, 10)}, 3.0) for r in (4, 3))
    assert math.isclose(module.relative_error(other), rel(dense(other), dense(module)), rel_tol=1e-12)
    assert module.relative_error(module.swap_halves().swap_halves()) < 1e-14
    huge = Lora({"up": rand(200_000, 2), "down": rand(2, 200_000)})  # its delta has 4e10 entries
    assert huge.relative_error(huge.with_alpha(3.0)) < 1e-6
    zero = Lora({"up": from_torch(torch.zeros(20, 1)), "down": rand(1, 10)})
    assert (zero.relative_error(zero), zero.relative_error(module), module.relative_error(zero)) == (0.0, math.inf, pytest.approx(1.0))


# --- problems ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "alpha", "code"),
    [
        ({"up": (6, 3), "down": (2, 5)}, None, "rank-mismatch"),
        ({"up": (6, 2), "down": (0, 5)}, None, "empty-tensor"),
        ({"up": (6,), "down": (2, 5)}, None, "bad-shape"),
        ({"up": (6, 2, 3, 3), "down": (2, 5, 1, 1)}, None, "bad-shape"),
        ({"up": (6, 2), "down": (2, 5), "diff_b": (5,)}, None, "bad-shape"),
        ({"up": (6, 2, 1, 1), "down": (2, 5, 1, 1), "mid": (3, 2, 3, 3)}, None, "rank-mismatch"),
        ({"up": (6, 2), "down": (2, 5)}, math.nan, "bad-alpha"),
        ({"up": (6, 2), "down": (2, 5)}, math.inf, "bad-alpha"),
        ({"up": (6, 2), "down": (2, 5)}, 0.0, "bad-alpha"),
    ],
)
def test_problems(shapes, alpha, code):
    module = Lora({role: from_torch(torch.zeros(shape)) for role, shape in shapes.items()}, alpha)
    assert ("error", code) in {(severity, found) for severity, found, _ in module.problems()}


def test_negative_alpha_is_a_warning(rand):
    problems = Lora({"up": rand(6, 2), "down": rand(2, 5)}, -1.0).problems()
    assert [(severity, code) for severity, code, _ in problems] == [("warning", "bad-alpha")]

"""OFT on rows (diag-oft, butterfly) and on inputs: rotations by hand, constraints, row moves."""

from __future__ import annotations

import pytest
import torch

from loratools.adapters.adapter import NotExact
from loratools.adapters.kinds import Boft, InputOft, Oft
from loratools.tensors.lazy import from_torch


def cayley(block, limit=None):
    """(I + Q)(I - Q)^-1 by an explicit inverse, Q = B - B^T."""
    skewed = block - block.T
    unit = torch.eye(len(block), dtype=torch.float64)
    return (unit + skewed) @ torch.linalg.inv(unit - skewed)


def turned(blocks, weight, factor=1.0):
    """R^T W block by block."""
    size = blocks.shape[1]
    rows = [cayley(block * factor).T @ weight.double()[i * size : (i + 1) * size].flatten(1) for i, block in enumerate(blocks)]
    return torch.cat(rows).reshape(weight.shape)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_diag_oft_turns_blocks_of_rows(rand, rel, kernel):
    module = Oft({"oft_blocks": rand(3, 4, 4), "rescale": rand(12, 1, *(1,) * len(kernel))})
    weight = rand(12, 5, *kernel).load()
    blocks, rescale = module.factors["oft_blocks"].load().double(), module.factors["rescale"].load().double()
    assert (module.shape, module.scale, module.linear, module.problems()) == ((12, None), 1.0, False, [])
    assert rel(module.delta(weight), rescale * turned(blocks, weight) - weight.double()) < 1e-12
    with pytest.raises(NotExact, match="base"):
        module.delta()


def test_alpha_is_a_constraint_and_no_scale(rand, rel):
    factors, weight = {"oft_blocks": rand(3, 4, 4)}, rand(12, 5).load()
    blocks = factors["oft_blocks"].load().double()
    norm = float((blocks - blocks.transpose(1, 2)).norm())
    for alpha in (None, 0.0, 1e3):
        assert rel(Oft(factors, alpha).delta(weight), turned(blocks, weight) - weight.double()) < 1e-12
        assert (Oft(factors, alpha).scale, Oft(factors, alpha).problems()) == (1.0, [])
    held = turned(blocks, weight, 0.05 * 12 / norm) - weight.double()
    assert rel(Oft(factors, 0.05).delta(weight), held) < 1e-12


def test_a_list_holds_each_part_by_its_own_rows(rand, rel, identical):
    """sd-scripts oft_flux: always clamped, c · part rows."""
    factors = {f"oft_blocks.{index}": rand(2, size, size) for index, size in enumerate((4, 3, 5))}
    module, weight = Oft(factors, 0.05, options={"clamp": True}), rand(24, 5).load()
    expected, start = [], 0
    for role in factors:
        blocks = factors[role].load().double()
        height = blocks.shape[0] * blocks.shape[1]
        norm = float((blocks - blocks.transpose(1, 2)).norm())
        assert norm > 0.05 * height
        expected.append(turned(blocks, weight[start : start + height], 0.05 * height / norm))
        start += height
    assert module.shape == (24, None)
    assert rel(module.delta(weight), torch.cat(expected) - weight.double()) < 1e-12
    parts = module.split([8, 6, 10])
    stacked = torch.cat([part.delta(rows) for part, rows in zip(parts, weight.split([8, 6, 10]), strict=True)])
    assert rel(stacked, module.delta(weight)) < 1e-14
    identical(Oft.fuse(parts, [8, 6, 10]), module)
    with pytest.raises(NotExact):
        module.split([12, 12])
    still = Oft(factors, 0.0, options={"clamp": True})
    assert float(still.delta(weight).norm()) < 1e-12


@pytest.mark.parametrize("alpha", [None, 0.0, 10.0])
def test_rows_on_block_boundaries(rand, rel, identical, alpha):
    module, weight = Oft({"oft_blocks": rand(6, 4, 4), "rescale": rand(24, 1)}, alpha), rand(24, 5).load()
    parts = module.split([12, 8, 4])
    stacked = torch.cat([part.delta(rows) for part, rows in zip(parts, weight.split([12, 8, 4]), strict=True)])
    assert rel(stacked, module.delta(weight)) < 1e-13
    identical(Oft.fuse(parts, [12, 8, 4]), module)
    swapped = module.swap_halves()
    assert rel(swapped.delta(weight.roll(12, 0)), module.delta(weight).roll(12, 0)) < 1e-13
    identical(swapped.swap_halves(), module)


def test_a_constraint_that_acts_is_moved_into_the_blocks(rand, rel):
    module, weight = Oft({"oft_blocks": rand(6, 4, 4, dtype=torch.float64)}, 0.1), rand(24, 5).load()
    parts = module.split([16, 8])
    assert [part.alpha for part in parts] == [0.0, 0.0]
    assert all(part.rounded for part in parts)
    assert rel(torch.cat([part.delta(rows) for part, rows in zip(parts, weight.split([16, 8]), strict=True)]), module.delta(weight)) < 1e-12
    fused = Oft.fuse([module, None], [24, 8])
    wide = torch.cat([weight, rand(8, 5).load()])
    assert rel(fused.delta(wide)[:24], module.delta(weight)) < 1e-12
    assert float(fused.delta(wide)[24:].norm()) < 1e-12
    with pytest.raises(NotExact, match="always"):
        module.with_factors(module.factors, options={"clamp": True}).split([16, 8])


def test_a_constraint_that_would_act_on_a_part_only_is_lifted(rand, rel):
    blocks = rand(6, 4, 4).load()
    blocks[1:] *= 0.01
    norm = float((blocks - blocks.transpose(1, 2)).norm())
    module, weight = Oft({"oft_blocks": from_torch(blocks)}, norm * 1.5 / 24), rand(24, 5).load()
    assert rel(module.delta(weight), turned(blocks.double(), weight) - weight.double()) < 1e-12
    parts = module.split([4, 20])
    assert [(part.alpha, part.rounded) for part in parts] == [(0.0, False), (0.0, False)]
    stacked = torch.cat([part.delta(rows) for part, rows in zip(parts, weight.split([4, 20]), strict=True)])
    assert rel(stacked, module.delta(weight)) < 1e-12


def test_oft_refusals(rand):
    module, other = Oft({"oft_blocks": rand(3, 4, 4)}), Oft({"oft_blocks": rand(4, 3, 3)})
    for refused in (lambda: module.split([6, 6]), module.swap_halves, lambda: Oft.fuse([module, other], [12, 12])):
        with pytest.raises(NotExact):
            refused()


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_butterfly_stages(rand, rel, kernel, strength):
    """Stage l pairs rows 2^l b/2 apart; the product of explicit permutations and blocks, not transposed."""
    module = Boft({"oft_blocks": rand(2, 4, 4, 4), "rescale": rand(16, 1, *(1,) * len(kernel))})
    weight = rand(16, 5, *kernel).load()
    blocks, rescale = module.factors["oft_blocks"].load().double(), module.factors["rescale"].load().double()
    unit, whole = torch.eye(4, dtype=torch.float64), torch.eye(16, dtype=torch.float64)
    for level in range(2):
        stride = 2**level * 2
        order = torch.arange(16).reshape(-1, 2, stride).transpose(1, 2).flatten()
        stage = torch.block_diag(*[unit + strength * (cayley(block) - unit) for block in blocks[level]])
        permutation = torch.eye(16, dtype=torch.float64)[order]
        whole = permutation.T @ stage @ permutation @ whole
    expected = rescale * (whole @ weight.double().flatten(1)).reshape(weight.shape) - weight.double()
    assert (module.shape, module.scale) == ((16, None), 1.0)
    assert rel(module.delta_at(strength, weight), expected) < 1e-12
    for refused in (lambda: module.split([8, 8]), lambda: Boft.fuse([module, module], [16, 16]), module.swap_halves):
        with pytest.raises(NotExact):
            refused()


def rotations(module, size, factor=1.0):
    """Q of each block from the upper triangle, entry by entry."""
    values = module.factors["oft_R.weight"].load().double() * factor
    result = torch.zeros(len(values), size, size, dtype=torch.float64)
    for row, triangle in zip(result, values, strict=True):
        entries = iter(triangle)
        for i in range(size):
            for j in range(i + 1, size):
                entry = next(entries)
                row[i, j], row[j, i] = entry, -entry
    return result


def neumann(q):
    return torch.eye(len(q), dtype=torch.float64) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q


@pytest.mark.parametrize("shared", [False, True])
def test_input_oft(rand, rel, shared):
    module, weight = InputOft({"oft_R.weight": rand(1 if shared else 3, 6, size=0.1)}), rand(7, 12).load()
    blocks = [neumann(q) for q in rotations(module, 4)]
    whole = torch.block_diag(*(blocks * 3 if shared else blocks))
    assert (module.shape, module.scale, module.problems()) == ((None, None if shared else 12), 1.0, [])
    assert rel(module.delta(weight), weight.double() @ whole.T - weight.double()) < 1e-12


def test_input_oft_variants(rand, rel):
    factors, weight = {"oft_R.weight": rand(3, 6)}, rand(7, 12).load()
    plain = InputOft(factors, options={"use_cayley_neumann": False})
    unit = torch.eye(4, dtype=torch.float64)
    whole = torch.block_diag(*[(unit - q) @ torch.linalg.inv(unit + q) for q in rotations(plain, 4)])
    assert rel(plain.delta(weight), weight.double() @ whole.T - weight.double()) < 1e-12
    flagged = InputOft({**factors, "oft_R.scaled_oft": rand(1)})
    whole = torch.block_diag(*[neumann(q) for q in rotations(flagged, 4, 1 / (2 * 3**0.5))])
    assert rel(flagged.delta(weight), weight.double() @ whole.T - weight.double()) < 1e-12
    conv = rand(7, 4, 3, 1).load()
    for options, side in (({}, whole.T), ({"onetrainer": True}, whole)):
        module = InputOft(flagged.factors, options=options)
        assert rel(module.delta(conv).flatten(1), conv.double().flatten(1) @ side - conv.double().flatten(1)) < 1e-12
    held = InputOft(factors, options={"coft": True, "eps": 1.0})
    limit = 1.0 / 3**0.5
    whole = torch.block_diag(*[neumann(q * min(1.0, limit / float(q.norm()))) for q in rotations(held, 4)])
    assert rel(held.delta(weight), weight.double() @ whole.T - weight.double()) < 1e-12


def test_input_oft_rows_share_the_rotation(rand, identical):
    module = InputOft({"oft_R.weight": rand(3, 6)})
    parts = module.split([4, 3])
    identical(InputOft.fuse(parts, [4, 3]), module)
    assert module.swap_halves() is module
    for others in ([module, None], [module, InputOft({"oft_R.weight": rand(3, 6)})]):
        with pytest.raises(NotExact):
            InputOft.fuse(others, [4, 3])


def test_problems(rand):
    assert [code for _, code, _ in Oft({"oft_blocks": rand(3, 4, 5)}).problems()] == ["bad-shape"]
    assert [code for _, code, _ in InputOft({"oft_R.weight": rand(3, 7)}).problems()] == ["bad-shape"]
    assert [code for _, code, _ in Boft({"oft_blocks": rand(3, 3, 4, 4)}).problems()] == ["bad-shape"]

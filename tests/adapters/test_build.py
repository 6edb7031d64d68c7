"""Which kinds a module name's tensors form, and what is wrong with those that form none."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from loratools.adapters.adapter import NotExact
from loratools.adapters.kinds import KINDS, ROLES, build
from loratools.tensors.lazy import from_torch, scalar_tensor

SHAPES = {
    "up": (8, 2), "down": (2, 6), "diff": (8, 6), "diff_b": (8,), "bias": (8,), "dora_scale": (8, 1), "magnitude": (8,),
    "embedding_down": (2, 8), "embedding_up": (6, 2), "w_norm": (8,), "b_norm": (8,), "set_weight": (8, 6), "weight": (8,),
    "ia3_l": (8, 1), "oft_blocks": (2, 4, 4), "oft_blocks.0": (1, 4, 4), "oft_blocks.1": (1, 4, 4), "rescale": (8, 1),
    "oft_R.weight": (3, 1), "a1.weight": (6, 2), "a2.weight": (2, 6), "b1.weight": (8, 2), "b2.weight": (2, 6),
    "hada_w1_a": (8, 2), "hada_w1_b": (2, 6), "hada_w2_a": (8, 2), "hada_w2_b": (2, 6), "hada_t1": (2, 2, 3, 3),
    "lokr_w1": (4, 2), "lokr_w1_a": (4, 2), "lokr_w1_b": (2, 2), "lokr_w2": (2, 3), "lokr_w2_a": (2, 2), "lokr_w2_b": (2, 3),
}  # fmt: skip
LOHA, GLORA = ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"], ["a1.weight", "a2.weight", "b1.weight", "b2.weight"]


def factors(*roles):
    special = {"alpha": scalar_tensor(1.0), "on_input": from_torch(torch.tensor(0)), "boft": from_torch(torch.zeros(2, 2, 4, 4))}
    made = {role: special[role] if role in special else from_torch(torch.ones(SHAPES[role])) for role in roles}
    return {("oft_blocks" if role == "boft" else role): tensor for role, tensor in made.items()}


@pytest.mark.parametrize(
    ("roles", "kinds"),
    [
        (["alpha", "up", "down"], ["lora"]),
        (["up", "down", "bias"], ["lora"]),
        (["embedding_down", "embedding_up"], ["lora"]),
        (["alpha", "up", "down", "dora_scale"], ["dora"]),
        (["up", "down", "magnitude"], ["dora"]),
        (["alpha", "dora_scale", *LOHA], ["dora"]),
        (["dora_scale", "lokr_w1", "lokr_w2"], ["dora"]),
        (["alpha", *LOHA, "diff_b"], ["loha"]),
        (["lokr_w1", "lokr_w2", "alpha"], ["lokr"]),
        (["lokr_w1_a", "lokr_w1_b", "lokr_w2"], ["lokr"]),
        (["lokr_w1", "lokr_w2_a", "lokr_w2_b"], ["lokr"]),
        (["diff", "diff_b"], ["dense"]),
        (["diff_b"], ["dense"]),
        (["w_norm", "b_norm"], ["dense"]),
        (["set_weight", "diff_b"], ["set"]),
        (["weight"], ["set"]),
        (["weight", "on_input"], ["ia3"]),
        (["ia3_l"], ["ia3"]),
        (["oft_blocks", "alpha", "rescale"], ["oft"]),
        (["oft_blocks.0", "oft_blocks.1", "alpha"], ["oft"]),
        (["boft", "alpha", "rescale"], ["boft"]),
        (["oft_R.weight"], ["oft-in"]),
        ([*GLORA, "alpha"], ["glora"]),
        (["up", "down", "alpha", "diff", "diff_b"], ["lora", "dense"]),
        (["up"], ["orphan"]),
        (["down", "alpha"], ["orphan"]),
        (["alpha"], ["orphan"]),
        (["dora_scale"], ["orphan"]),
        (["up", "dora_scale"], ["orphan"]),
        (["hada_w1_a", "hada_w1_b", "hada_w2_a"], ["orphan"]),
        ([*LOHA, "hada_t1"], ["loha", "orphan"]),
        (["lokr_w1", "lokr_w1_a", "lokr_w2"], ["lokr", "orphan"]),
        (["oft_blocks.1"], ["orphan"]),
        (["up", "down", "lokr_w1"], ["lora", "orphan"]),
    ],
)
def test_every_tensor_ends_in_one_module(roles, kinds):
    given = factors(*roles)
    modules = build(given)
    assert [module.kind for module in modules] == kinds
    held = [role for module in modules for role in module.factors]
    assert sorted(held) == sorted(given)
    for module in modules:
        codes = {code for _, code, _ in module.problems()}
        assert codes == ({"orphan"} if module.kind == "orphan" else set())


def test_alpha_of_the_tensor_of_a_configuration_and_none():
    pair = factors("up", "down")
    stored = {**pair, "alpha": from_torch(torch.tensor([3], dtype=torch.int64))}
    (module,) = build(stored)
    assert (module.alpha, module.alpha_source, module.scale) == (3.0, "tensor", 1.5)
    (module,) = build(pair, alpha=4.0, alpha_source="adapter_config")
    assert (module.alpha, module.alpha_source, module.scale) == (4.0, "adapter_config", 2.0)
    (module,) = build(pair)
    assert (module.alpha, module.alpha_source, module.scale) == (None, "assumed", 1.0)
    (half,) = build({**pair, "alpha": from_torch(torch.tensor(0.5, dtype=torch.bfloat16))})
    assert half.alpha == 0.5


def test_alpha_belongs_to_the_lora_beside_a_dense_change():
    lora, dense = build(factors("up", "down", "alpha", "diff", "diff_b"))
    assert (lora.alpha, dense.alpha) == (1.0, None)
    assert "diff_b" in lora.factors
    lora, dense = build(factors("up", "down", "diff"), alpha=4.0, alpha_source="adapter_config")
    assert (lora.scale, dense.alpha) == (2.0, None)


@pytest.mark.parametrize(
    ("alpha", "code"),
    [(from_torch(torch.tensor(float("nan"))), "bad-alpha"), (from_torch(torch.ones(2)), "bad-alpha"), (scalar_tensor(0.0), "bad-alpha")],
)
def test_bad_alpha_tensors_are_problems_not_exceptions(alpha, code):
    (module,) = build({**factors("up", "down"), "alpha": alpha})
    assert [found for _, found, _ in module.problems()] == [code]


def test_a_constraint_of_zero_is_valid():
    (module,) = build({**factors("oft_blocks"), "alpha": scalar_tensor(0.0)})
    assert (module.alpha, module.problems()) == (0.0, [])


def test_orphans_name_what_is_missing():
    (orphan,) = build(factors("up", "alpha"))
    ((_, _, message),) = orphan.problems()
    assert message == "up, alpha without down"
    with pytest.raises(NotExact, match="up, alpha"):
        orphan.delta()


def test_roles_are_those_of_the_registered_kinds():
    assert set(ROLES) == {role for kind in KINDS.values() for role in kind.roles}
    assert list(KINDS) == [kind.kind for kind in KINDS.values()]


def test_headers_need_no_torch():
    """Kind, shape, rank, scale and problems come from the header."""
    code = """
import sys
from loratools.adapters.kinds import KINDS, build
from loratools.tensors.lazy import BytesTensor, scalar_tensor
shapes = {"up": (8, 2), "down": (2, 6), "diff_b": (8,), "dora_scale": (8, 1), "diff": (8, 6), "reshape_weight": (2,)}
blank = {role: BytesTensor(bytes(4 * 64), "F32", shape) for role, shape in shapes.items()}
blank["reshape_weight"] = BytesTensor((3072).to_bytes(8, "little") + (128).to_bytes(8, "little"), "I64", (2,))
for module in build({**blank, "alpha": scalar_tensor(4.0)}):
    print(module.kind, module.shape, module.rank, module.scale, module.problems())
print(build({"reshape_weight": blank["reshape_weight"]})[0].shape, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["dora (8, 6) 2 2.0 []", "dense (8, 6) None 1.0 []", "(3072, 128) False"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64])
def test_factors_that_are_no_fractions_are_refused(dtype):
    down, up = torch.ones(2, 8, dtype=dtype), torch.ones(8, 2)
    (module,) = build({"down": from_torch(down), "up": from_torch(up)})
    assert [problem[:2] for problem in module.problems()] == [("error", "bad-dtype")]

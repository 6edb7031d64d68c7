"""Deltas against lycoris-lora's own modules, each where it is right.

Known and avoided: `get_diff_weight` of LoHa and LoKr applies the scale twice (scale 1 here, or the forward), and merging
crashes on IA3 and on in-axis DoRA of convolutions.
"""

from __future__ import annotations

import pytest
import torch

from loratools.adapters.kinds import build
from loratools.tensors.lazy import from_torch

pytest.importorskip("lycoris")

from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule

pytestmark = pytest.mark.parity

ROLE = {"lora_up.weight": "up", "lora_down.weight": "down", "lora_mid.weight": "mid"}
LAYERS = {
    "linear": lambda: torch.nn.Linear(12, 16),
    "conv1d": lambda: torch.nn.Conv1d(12, 16, 3, padding=1),
    "conv2d": lambda: torch.nn.Conv2d(12, 16, 3, padding=1),
    "conv2d-1x1": lambda: torch.nn.Conv2d(12, 16, 1),
}
INPUTS = {"linear": (2, 12), "conv1d": (2, 12, 7), "conv2d": (2, 12, 7, 5), "conv2d-1x1": (2, 12, 7, 5)}


def trained(kind, layer, **options):
    """A LyCORIS module over `layer` with every parameter random, and our module from what it saves."""
    torch.manual_seed(7)
    base = LAYERS[layer]()
    theirs = kind("m", base, 1.0, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    state = theirs.custom_state_dict() or theirs.state_dict()
    saved = {ROLE.get(key, key): from_torch(value.detach().clone()) for key, value in state.items()}
    (ours,) = build(saved)
    assert ours.problems() == []
    return base, theirs, ours


def delta_through_forward(base, theirs, layer):
    """ΔW probed by inputs: forward minus the base layer's, which applies every scale once."""
    torch.manual_seed(8)
    probe = torch.randn(INPUTS[layer])
    theirs.apply_to()
    theirs.eval()
    with torch.no_grad():
        return probe, theirs(probe) - theirs.org_forward(probe)


def apply(base, delta, probe):
    function = {3: torch.nn.functional.conv1d, 4: torch.nn.functional.conv2d}.get(delta.dim())
    if function is None:
        return torch.nn.functional.linear(probe, delta.float())
    return function(probe, delta.float().reshape(base.weight.shape), padding=base.padding)


@pytest.mark.parametrize("layer", list(LAYERS))
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LoConModule, {"lora_dim": 4, "alpha": 3}),
        (LoConModule, {"lora_dim": 4, "alpha": 3, "use_tucker": True}),
        (LoConModule, {"lora_dim": 4, "alpha": 2, "rs_lora": True}),
        (LohaModule, {"lora_dim": 4, "alpha": 3}),
        (LohaModule, {"lora_dim": 4, "alpha": 3, "use_tucker": True}),
        (LohaModule, {"lora_dim": 4, "alpha": 2, "rs_lora": True}),
        (LokrModule, {"lora_dim": 1, "alpha": 3, "factor": 4}),
        (LokrModule, {"lora_dim": 1, "alpha": 3, "factor": 4, "decompose_both": True}),
        (LokrModule, {"lora_dim": 1, "alpha": 3, "factor": 4, "use_tucker": True}),
        (LokrModule, {"lora_dim": 100000, "alpha": 3, "factor": 4}),
        (LokrModule, {"lora_dim": 1, "alpha": 2, "factor": 4, "rs_lora": True}),
        (LoConModule, {"lora_dim": 4, "alpha": 3, "weight_decompose": True}),
        (LohaModule, {"lora_dim": 4, "alpha": 3, "weight_decompose": True}),
        (LokrModule, {"lora_dim": 1, "alpha": 3, "factor": 4, "weight_decompose": True}),
        (LoConModule, {"lora_dim": 4, "alpha": 3, "weight_decompose": True, "wd_on_out": False}),
    ],
)
def test_additive_kinds_and_dora(rel, layer, kind, options):
    base, theirs, ours = trained(kind, layer, **options)
    weight = base.weight.detach().clone()
    probe, expected = delta_through_forward(base, theirs, layer)
    delta = ours.delta(weight)
    assert rel(apply(base, delta.reshape(weight.shape), probe), expected) < 1e-5


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (DiagOFTModule, {"lora_dim": 4}),
        (DiagOFTModule, {"lora_dim": 4, "constraint": 0.01}),
        (DiagOFTModule, {"lora_dim": 4, "rescaled": True}),
        (ButterflyOFTModule, {"lora_dim": 4}),
        (ButterflyOFTModule, {"lora_dim": 4, "constraint": 0.01, "rescaled": True}),
        (GLoRAModule, {"lora_dim": 4, "alpha": 3}),
        (IA3Module, {}),
        (IA3Module, {"train_on_input": True}),
    ],
)
def test_multiplicative_kinds(rel, layer, kind, options):
    base, theirs, ours = trained(kind, layer, **options)
    with torch.no_grad():
        expected = theirs.get_diff_weight()[0]
    assert rel(ours.delta(base.weight.detach()), expected) < 1e-5


@pytest.mark.parametrize("strength", [0.25, 0.5])
def test_strength_of_a_butterfly(rel, strength):
    base, theirs, ours = trained(ButterflyOFTModule, "linear", lora_dim=4, rescaled=True)
    with torch.no_grad():
        expected = theirs.get_diff_weight(multiplier=strength)[0]
    assert rel(ours.delta_at(strength, base.weight.detach()), expected) < 1e-5


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_full(rel, layer):
    torch.manual_seed(7)
    base = LAYERS[layer]()
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    theirs = FullModule("m", base, 1.0)
    theirs.apply_to()
    with torch.no_grad():
        theirs.weight.add_(torch.randn(theirs.weight.shape))
        theirs.bias.add_(torch.randn(theirs.bias.shape))
    (ours,) = build({key: from_torch(value.clone()) for key, value in theirs.custom_state_dict().items()})
    assert rel(weight + ours.delta(), theirs.weight.detach()) < 1e-6
    assert rel(bias + ours.bias_delta(), theirs.bias.detach()) < 1e-6


def test_norm(rel):
    torch.manual_seed(7)
    theirs = NormModule("m", torch.nn.LayerNorm(16), 1.0)
    with torch.no_grad():
        theirs.w_norm.copy_(torch.randn(16))
        theirs.b_norm.copy_(torch.randn(16))
    (ours,) = build({key: from_torch(value.detach().clone()) for key, value in theirs.state_dict().items()})
    weight, bias = theirs.get_diff_weight()
    assert rel(ours.delta(), weight.detach()) < 1e-6
    assert rel(ours.bias_delta(), bias.detach()) < 1e-6

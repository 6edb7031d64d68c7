"""Deltas against peft's `merge_and_unload` in float32: merged weight minus the base's."""

from __future__ import annotations

import pytest
import torch

from loratools.adapters.kinds import build
from loratools.tensors.lazy import from_torch

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.parity

ROLES = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_B.bias": "bias",
    "lora_embedding_A": "embedding_down",
    "lora_embedding_B": "embedding_up",
    "lora_magnitude_vector": "magnitude",
}


class Toy(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer


LAYERS = {
    "linear": lambda: torch.nn.Linear(12, 16),
    "conv2d": lambda: torch.nn.Conv2d(12, 16, 3),
    "conv2d-1x1": lambda: torch.nn.Conv2d(12, 16, 1),
    "conv1d": lambda: torch.nn.Conv1d(12, 16, 3),
    "embedding": lambda: torch.nn.Embedding(20, 12),
}


def adapted(layer, config, **build_options):
    """(base weight, base bias, peft's merged layer, our module from what peft saves)."""
    torch.manual_seed(11)
    toy = Toy(LAYERS[layer]())
    weight = toy.layer.weight.detach().clone()
    bias = toy.layer.bias.detach().clone() if getattr(toy.layer, "bias", None) is not None else None
    model = peft.get_peft_model(toy, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                offset = 1.0 if "ia3" in name or "magnitude" in name else 0.0
                parameter.copy_(offset + torch.randn(parameter.shape) * (0.05 if "oft" in name else 0.3))
    saved = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    stem = "base_model.model.layer."
    factors = {ROLES.get(key.removeprefix(stem), key.removeprefix(stem)): from_torch(value.clone()) for key, value in saved.items()}
    (ours,) = build(factors, alpha_source="adapter_config", **build_options)
    assert ours.problems() == []
    return weight, bias, model.merge_and_unload().layer, ours


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        ("linear", {}),
        ("linear", {"use_rslora": True}),
        ("linear", {"lora_bias": True}),
        ("linear", {"use_dora": True}),
        ("conv2d", {}),
        ("conv2d-1x1", {}),
        ("conv1d", {}),
        ("conv2d", {"use_dora": True}),
        ("embedding", {}),
    ],
)
def test_lora(rel, layer, options):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["layer"], init_lora_weights=False, **options)
    alpha = 6.0 * 4**0.5 if options.get("use_rslora") else 6.0  # rsLoRA: alpha / sqrt(r)
    weight, bias, merged, ours = adapted(layer, config, alpha=alpha)
    assert ours.kind == ("dora" if options.get("use_dora") else "lora")
    assert rel(ours.delta(weight), merged.weight.detach() - weight) < 1e-5
    if options.get("lora_bias"):
        assert rel(ours.bias_delta(), merged.bias.detach() - bias) < 1e-5


@pytest.mark.parametrize(("layer", "effective"), [("linear", False), ("conv2d", False), ("conv2d", True), ("conv1d", False)])
def test_loha(rel, layer, effective):
    config = peft.LoHaConfig(r=4, alpha=6, target_modules=["layer"], init_weights=False, use_effective_conv2d=effective)
    weight, _, merged, ours = adapted(layer, config, alpha=6.0)
    assert rel(ours.delta(weight), merged.weight.detach() - weight) < 1e-5


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
@pytest.mark.parametrize(
    "options", [{"r": 1}, {"r": 1, "decompose_both": True}, {"r": 1, "use_effective_conv2d": True}, {"r": 64}], ids=str
)
def test_lokr(rel, layer, options):
    config = peft.LoKrConfig(alpha=6, target_modules=["layer"], init_weights=False, decompose_factor=4, **options)
    weight, _, merged, ours = adapted(layer, config, alpha=6.0, options={"always_scale": True, "rank": options["r"]})
    assert (ours.rank is None) == (options["r"] == 64)
    assert rel(ours.delta(weight), merged.weight.detach() - weight) < 1e-5


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
@pytest.mark.parametrize(
    "options",
    [{"use_cayley_neumann": True}, {"use_cayley_neumann": False}, {"block_share": True}, {"coft": True, "eps": 0.1}],
    ids=str,
)
def test_oft(rel, layer, options):
    config = peft.OFTConfig(r=0, oft_block_size=4, target_modules=["layer"], init_weights=False, **options)
    weight, _, merged, ours = adapted(layer, config, options=options)
    assert rel(ours.delta(weight), merged.weight.detach() - weight) < 1e-4


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
@pytest.mark.parametrize("feedforward", [False, True])
def test_ia3(rel, layer, feedforward):
    config = peft.IA3Config(target_modules=["layer"], feedforward_modules=["layer"] if feedforward else [], init_ia3_weights=False)
    weight, bias, merged, ours = adapted(layer, config, options={"feedforward": feedforward})
    assert rel(ours.delta(weight), merged.weight.detach() - weight) < 1e-5
    change = ours.bias_delta(bias)
    assert torch.equal(merged.bias.detach(), bias) if change is None else rel(change, merged.bias.detach() - bias) < 1e-5
    assert (change is None) == feedforward

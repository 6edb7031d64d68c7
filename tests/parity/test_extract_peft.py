"""What extract writes for PEFT, loaded by PEFT: exactly the modules that are meant, ΔW and biases equal, and the tuned model's logits.

mergekit's extraction writes biases its own config switches off; PEFT then loads without a word and is off by 0.6.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft")
pytest.importorskip("transformers")

from fixtures import language_models, make
from fixtures.tuned import tuned
from loratools.operations.extract import extract
from tests.parity.support import apart

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

State = dict[str, torch.Tensor]


def qwen2() -> torch.nn.Module:
    """Biases on q, k and v, none on the other layers."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=make.VOCABULARY,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    return make._seeded(lambda: Qwen2ForCausalLM(config), 33)


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": make.llama,
    "tied llama": lambda: make.llama(tied=True),
    "gpt2": language_models.gpt2,
    "qwen2": qwen2,
}


def pair(folder: Path, build: Callable[[], torch.nn.Module], only: Callable[[str], bool] = lambda key: True) -> tuple[Any, Any]:
    """(BASE, TUNED) as models, saved as folders `base` and `tuned`."""
    base, other = build(), build()
    state = {key: value for key, value in base.state_dict().items() if key != "lm_head.weight" or not tied(base)}
    after = tuned(state, only=only)
    other.load_state_dict(after, strict=False)
    other.tie_weights()
    for name, model in (("base", base), ("tuned", other)):
        model.save_pretrained(folder / name)
    return base, other


def tied(model: Any) -> bool:
    return bool(model.config.tie_word_embeddings)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[3, 14, 15, 92, 65, 35]])).logits


def injected(model: torch.nn.Module) -> set[str]:
    """Names of the base's modules that have a LoRA now."""
    return {name.removeprefix("base_model.model.") for name, module in model.named_modules() if hasattr(module, "lora_A")}


def loaded(base: torch.nn.Module, folder: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(deepcopy(base), folder)
    lost = [str(one.message) for one in heard if re.search("missing|unexpected|not found|mismatch", str(one.message), re.IGNORECASE)]
    named = [name for text in lost for name in re.findall(r"'(base_model[^']*)'", text)]
    assert all(name.endswith(".lora_B.default.bias") for name in named)  # one switch for all layers; those without one stay at 0
    assert bool(named) == bool(lost)
    return model.eval()


def targets(folder: Path) -> set[str]:
    """Modules of which the file has a LoRA."""
    names = load_file(folder / "adapter_model.safetensors")
    found = {match[1] for key in names if (match := re.match(r"base_model\.model\.(.+)\.lora_(?:embedding_)?A", key))}
    return found


@pytest.mark.parametrize("name", MODELS)
def test_everything_changed(name: str, tmp_path: Path) -> None:
    """Weights, embeddings, biases and norms: PEFT computes what the tuned model computes."""
    base, other = pair(tmp_path, MODELS[name])
    told = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=8)
    model = loaded(base, tmp_path / "out")
    assert injected(model) == targets(tmp_path / "out")
    assert apart(logits(base), logits(other)) > 0.05, "nothing changed, the test could not fail"
    lost = {row["tensor"] for row in told["skipped"] if row["reason"] != "the same in both"}
    biases = {name for name, _ in base.named_parameters() if name.endswith("bias") and "ln_" not in name}
    assert lost == biases  # PEFT refuses lora_bias beside a LoRA of an embedding
    assert all("embedding" in row["reason"] for row in told["skipped"])
    without = deepcopy(other)
    without.load_state_dict({key: value for key, value in base.state_dict().items() if key in biases}, strict=False)
    assert apart(logits(model), logits(without)) <= 1e-5


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_biases_where_embeddings_are_left_out(name: str, tmp_path: Path) -> None:
    """X4: biases beside LoRAs, and layers without one among them."""
    base, other = pair(tmp_path, MODELS[name], only=lambda key: not re.search("wte|wpe|embed_tokens", key))
    told = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=8)
    assert not [row for row in told["skipped"] if row["tensor"].endswith("bias")]
    model = loaded(base, tmp_path / "out")
    assert injected(model) == targets(tmp_path / "out")
    assert apart(logits(base), logits(other)) > 0.05
    assert apart(logits(model), logits(other)) <= 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_merged_by_peft(name: str, tmp_path: Path) -> None:
    """X4: `merge_and_unload` gives TUNED's weights and biases."""
    dense = "norm|ln_|wte|wpe" if name == "gpt2" else "norm|ln_|bias"  # Qwen2 has layers without a bias, which PEFT cannot merge then
    base, other = pair(tmp_path, MODELS[name], only=lambda key: not re.search(dense, key))
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=8)
    model = loaded(base, tmp_path / "out")
    if tied(base):
        assert apart(logits(model), logits(other)) <= 1e-5  # PEFT merges two deltas into one shared tensor
        return
    found = model.merge_and_unload().state_dict()
    for key, value in other.state_dict().items():
        assert apart(found[key], value) <= 2e-6, key


def test_some_layers_of_one_name(tmp_path: Path) -> None:
    """X11: q_proj of the second layer alone: full names, or PEFT would put one into the first layer too."""
    base, other = pair(tmp_path, make.llama, only=lambda key: "layers.1.self_attn.q_proj" in key)
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=4)
    model = loaded(base, tmp_path / "out")
    assert injected(model) == {"model.layers.1.self_attn.q_proj"}
    assert apart(logits(model), logits(other)) <= 1e-5


def test_mixed_ranks(tmp_path: Path) -> None:
    base, other = pair(tmp_path, make.llama)
    other.load_state_dict(tuned(other.state_dict(), rank=1, ratio=0.3, only=lambda key: "layers.1" in key))
    other.save_pretrained(tmp_path / "tuned")
    told = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", error=0.4)
    assert len(told["ranks"]) > 1
    model = loaded(base, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    ranks = [module.lora_A["default"].weight.shape[0] for _, module in model.named_modules() if getattr(module, "lora_A", None)]
    assert len(set(ranks)) > 1
    wanted, before = other.state_dict(), base.state_dict()
    found = model.merge_and_unload().state_dict()
    squares = [
        (
            float((found[key].double() - wanted[key].double()).square().sum()),
            float((before[key].double() - wanted[key].double()).square().sum()),
        )
        for key in wanted
        if "norm" not in key
    ]
    whole = (sum(lost for lost, _ in squares) / sum(size for _, size in squares)) ** 0.5
    assert told["relative_error"] == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("architecture", ["sd1", "flux"])
def test_a_denoiser_in_peft(architecture: str, tmp_path: Path) -> None:
    """Linear and convolution layers of diffusers' own classes; the modules PEFT injects are those of the file."""
    from tests.operations.merged import base_states
    from tests.operations.test_extract_layouts import _folder

    states = base_states(architecture)
    part = next(iter(states))
    after = {**states, part: tuned(states[part], only=lambda key: "norm" not in key)}
    base, other = _folder(architecture, tmp_path / "base", states), _folder(architecture, tmp_path / "tuned", after)
    extract(base / part, other / part, tmp_path / "out", to="peft", rank=8)
    model = loaded(make.base(architecture).models[part], tmp_path / "out")
    assert injected(model) == targets(tmp_path / "out")
    wanted = make.base(architecture)
    wanted.models[part].load_state_dict(after[part])
    found = make.forward(make.Base(architecture, {part: model.base_model.model}))[part]
    assert apart(found, make.forward(make.Base(architecture, {part: wanted.models[part]}))[part]) <= 1e-5
    assert apart(found, make.forward(make.Base(architecture, {part: make.base(architecture).models[part]}))[part]) > 1e-2

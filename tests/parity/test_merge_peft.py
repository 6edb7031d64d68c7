"""Language models: the merged folder, loaded by transformers, against PEFT's `merge_and_unload` and against PEFT at run time.

`merge_and_unload` is right in float32 for LoRA, rsLoRA, DoRA, IA3, LoHa, LoKr and OFT on linear layers and for embeddings. It is not
where weights are tied: there the logits at run time are the truth.
"""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft")
pytest.importorskip("transformers")

from fixtures import adapters, language_models, make
from loratools.errors import InputError
from loratools.operations.merge import merge
from tests.parity.support import apart

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOLERANCE = 2e-6

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 4, "lora_alpha": 6}),
    "rslora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_rslora": True}),
    "dora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_dora": True}),
    "patterns": (
        "LoraConfig",
        {
            "r": 4,
            "lora_alpha": 6,
            "rank_pattern": {"q_proj": 9, r"layers\.1\.mlp\.\w+": 2},
            "alpha_pattern": {"down_proj": 16, r"layers\.0\.self_attn\.v_proj": 3},
        },
    ),
    "embeddings": ("LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": [*LINEAR, "embed_tokens", "lm_head"]}),
    "to-save": ("LoraConfig", {"r": 4, "lora_alpha": 6, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "norms-to-save": ("LoraConfig", {"r": 4, "lora_alpha": 6, "modules_to_save": ["input_layernorm", "model.norm"]}),
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "loha": ("LoHaConfig", {"r": 3, "alpha": 5}),
    "lokr": ("LoKrConfig", {"r": 3, "alpha": 5, "decompose_factor": 4}),
    "lokr-whole": ("LoKrConfig", {"r": 64, "alpha": 5, "decompose_factor": 4}),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": 8}),
    "oft-exact": ("OFTConfig", {"r": 0, "oft_block_size": 8, "use_cayley_neumann": False}),
    "oft-shared": ("OFTConfig", {"r": 0, "oft_block_size": 4, "block_share": True}),
}


def trained(folder: Path, model: torch.nn.Module, kind: str, fields: dict[str, Any]) -> Any:
    """An adapter with random values on a copy of the model, saved; the PeftModel."""
    import peft

    config = getattr(peft, kind)(**{"target_modules": LINEAR, **fields})
    wrapped = adapters.fill(peft.get_peft_model(deepcopy(model), config), 3, 0.1).eval()
    noise = torch.Generator().manual_seed(4)
    for name, parameter in sorted(wrapped.named_parameters()):
        if re.search(r"modules_to_save|ia3_l|oft_R", name):
            parameter.data.add_(torch.randn(parameter.shape, generator=noise) * 0.1)
    wrapped.save_pretrained(folder)
    return wrapped


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[3, 14, 15, 92, 65, 35]])).logits


def check(out: Path, wrapped: Any, model: torch.nn.Module) -> None:
    """The merged folder holds what PEFT merges, and computes what the adapter computes at run time; neither is the base."""
    wanted, base, found = logits(wrapped), model.state_dict(), loaded(out)
    merged = deepcopy(wrapped).merge_and_unload().state_dict()
    state = found.state_dict()
    assert state.keys() == merged.keys()
    for key, tensor in merged.items():
        if torch.equal(tensor, base[key]):
            assert torch.equal(state[key], base[key]), f"{key}: nothing changes it, and it changed"
        assert apart(state[key], tensor) <= TOLERANCE, f"{key}: relative error {apart(state[key], tensor):.2e}"
    assert apart(wanted, logits(model)) > 1e-2, "the adapter does nothing, the test could not fail"
    assert apart(logits(found), wanted) <= 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_merged_with_what_peft_saved(name: str, tmp_path: Path) -> None:
    model = make.llama()
    base = language_models.llama_folder(tmp_path / "base", max_shard_size="20KB" if name == "lora" else None)
    wrapped = trained(tmp_path / "adapter", model, *CONFIGS[name])
    result = merge(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert result["unmatched"] == []
    check(tmp_path / "out", wrapped, model)
    assert listing(tmp_path / "out") == listing(base)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_weights_file(tmp_path: Path) -> None:
    model = make.llama()
    base = language_models.llama_single(tmp_path / "llama.safetensors")
    wrapped = trained(tmp_path / "adapter", model, *CONFIGS["patterns"])
    merge(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    merged = wrapped.merge_and_unload().state_dict()
    assert found.keys() == merged.keys()
    assert max(apart(found[key], merged[key]) for key in found) <= TOLERANCE


@pytest.mark.parametrize("weight", [0.5, -1.0])
@pytest.mark.parametrize("name", ["lora", "dora", "loha", "ia3"])
def test_a_weight_scales_the_change(name: str, weight: float, tmp_path: Path) -> None:
    """W' = W + weight · (merged − W), for DoRA and IA3 as well."""
    model = make.llama()
    base = language_models.llama_folder(tmp_path / "base")
    wrapped = trained(tmp_path / "adapter", model, *CONFIGS[name])
    merge(base, [(tmp_path / "adapter", weight)], tmp_path / "out")
    merged, state, found = wrapped.merge_and_unload().state_dict(), model.state_dict(), loaded(tmp_path / "out").state_dict()
    for key, tensor in merged.items():
        wanted = state[key].double() + weight * (tensor.double() - state[key].double())
        assert apart(found[key], wanted) <= TOLERANCE, key


# -------------------------------------------------------------------------------------------------------------- tied embeddings

TIED = {
    "head": {"target_modules": [*LINEAR, "lm_head"]},
    "embedding": {"target_modules": [*LINEAR, "embed_tokens"]},
    "both": {"target_modules": [*LINEAR, "embed_tokens", "lm_head"]},
    "head-saved": {"modules_to_save": ["lm_head"]},
    "embedding-saved": {"modules_to_save": ["embed_tokens"]},
    "both-saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.parametrize("shards", [None, "20KB"], ids=["one-file", "shards"])
@pytest.mark.parametrize("name", TIED)
def test_tied_weights_that_part_are_untied(name: str, shards: str | None, tmp_path: Path) -> None:
    """peft#2018, transformers#45127: one tensor stood for two that differ now. Both are saved, and the config says so."""
    from peft import PeftModel

    base = language_models.llama_folder(tmp_path / "base", tied=True, max_shard_size=shards)
    assert "lm_head.weight" not in stored(base)
    trained(tmp_path / "adapter", make.llama(tied=True), "LoraConfig", {"r": 4, "lora_alpha": 6, **TIED[name]})
    merge(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    wanted = logits(PeftModel.from_pretrained(loaded(base), tmp_path / "adapter").eval())
    found = loaded(tmp_path / "out")
    assert apart(wanted, logits(loaded(base))) > 1e-2
    assert apart(logits(found), wanted) <= 1e-4
    one, two = found.model.embed_tokens.weight, found.lm_head.weight
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] == torch.equal(one, two)
    assert ("lm_head.weight" in stored(tmp_path / "out")) != config["tie_word_embeddings"]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def test_tied_weights_nothing_parts_stay_tied(tmp_path: Path) -> None:
    base = language_models.llama_folder(tmp_path / "base", tied=True)
    wrapped = trained(tmp_path / "adapter", make.llama(tied=True), "LoraConfig", {"r": 4, "lora_alpha": 6})
    merge(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    assert stored(tmp_path / "out").keys() == stored(base).keys()
    assert apart(logits(loaded(tmp_path / "out")), logits(wrapped)) <= 1e-4


# ------------------------------------------------------------------------------------------------------------ a larger vocabulary


def grown(tied: bool = False) -> Any:
    """The model with two words more, as `resize_token_embeddings` makes it for training."""
    model = make.llama(tied=tied)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        model.resize_token_embeddings(make.VOCABULARY + 2)  # type: ignore[operator]
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_new_words_with_their_rows(tied: bool, tmp_path: Path) -> None:
    """LlamaFactory#3125: the saved embedding and head have the new rows, the config follows, and a new word computes the same."""
    base = language_models.llama_folder(tmp_path / "base", tied=tied)
    fields = {"r": 4, "lora_alpha": 6, "modules_to_save": ["embed_tokens", "lm_head"]}
    wrapped = trained(tmp_path / "adapter", grown(tied), "LoraConfig", fields)
    merge(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    found = loaded(tmp_path / "out")
    assert found.config.vocab_size == make.VOCABULARY + 2
    tokens = torch.tensor([[3, make.VOCABULARY, make.VOCABULARY + 1, 5]])
    with torch.no_grad():
        assert apart(found(input_ids=tokens).logits, wrapped(input_ids=tokens).logits) <= 1e-4


def test_new_words_without_their_rows_are_refused(tmp_path: Path) -> None:
    """A LoRA of 102 words has no place on an embedding of 100."""
    base = language_models.llama_folder(tmp_path / "base")
    fields = {"r": 4, "lora_alpha": 6, "target_modules": [*LINEAR, "embed_tokens"]}
    wrapped = trained(tmp_path / "adapter", grown(), "LoraConfig", fields)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(InputError) as refused:
        merge(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert "embed_tokens" in str([str(refused.value), *refused.value.details])
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------- transposed layers, biases

GPT2 = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "r": 4, "lora_alpha": 6}


@pytest.mark.parametrize("more", [{}, {"lora_bias": True}, {"use_dora": True}], ids=["lora", "lora-bias", "dora"])
def test_transposed_layers(more: dict[str, Any], tmp_path: Path) -> None:
    """GPT-2 keeps (in, out), square layers among them, which a transposed delta would fit without a word."""
    model = language_models.gpt2()
    base = language_models.gpt2_folder(tmp_path / "base")
    wrapped = trained(tmp_path / "adapter", model, "LoraConfig", {**GPT2, **more})
    result = merge(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert result["changed"] == 8 * (2 if "lora_bias" in more else 1)
    check(tmp_path / "out", wrapped, model)


def test_a_bias_without_a_bias_to_add_it_to_is_refused(tmp_path: Path) -> None:
    base = language_models.llama_folder(tmp_path / "base")
    trained(tmp_path / "adapter", make.llama(), "LoraConfig", {"r": 4, "lora_alpha": 6, "lora_bias": True})
    with pytest.raises(InputError) as refused:
        merge(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert "q_proj" in str([str(refused.value), *refused.value.details])
    assert not (tmp_path / "out").exists()

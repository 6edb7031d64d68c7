"""Where keys fit several architectures, a base given beside them settles which; merge, convert and combine read alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fixtures import checkpoints, language_models
from loratools.errors import AmbiguousError
from loratools.mapping.read import read

SELF_ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # the same widths in SD1 and SD2


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    stem = "lora_unet_" + SELF_ATTENTION.replace(".", "_")
    tensors = {f"{stem}.lora_down.weight": torch.ones(2, 320), f"{stem}.lora_up.weight": torch.ones(320, 2)}
    save_file(tensors, tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


def test_a_base_chooses_among_the_candidates(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(AmbiguousError):
        read(adapter)
    base = checkpoints.single("sd2", tmp_path / "base.safetensors")
    assert read(adapter, base=base).architecture == "sd2"
    assert read(adapter, base=base, arch="sd1").architecture == "sd1"  # what is said goes before what is found


def test_a_base_of_another_architecture_leaves_it_open(adapter: Path, tmp_path: Path) -> None:
    base = checkpoints.flux_bare(tmp_path / "base.safetensors")
    with pytest.raises(AmbiguousError):
        read(adapter, base=base)


def test_a_language_models_base_reads_a_language_models_adapter(tmp_path: Path) -> None:
    """A norm alone fits a dozen text encoders; word_embeddings fits nothing."""
    base = language_models.llama_folder(tmp_path / "base")
    for name in ("model.layers.0.input_layernorm", "transformer.word_embeddings"):
        stem = f"base_model.model.{name}"
        tensors = {f"{stem}.lora_A.weight": torch.ones(2, 32), f"{stem}.lora_B.weight": torch.ones(32, 2)}
        save_file(tensors, tmp_path / "adapter.safetensors")
        assert read(tmp_path / "adapter.safetensors", base=base).architecture == "llm"

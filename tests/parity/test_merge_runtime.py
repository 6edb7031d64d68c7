"""A merged model computes what the base computes with the adapter loaded at run time, by diffusers and by PEFT.

Adapters of scale 1 without alpha tensors: what every runtime applies at the same strength. T5 is left out, diffusers loads no adapter
into it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from fixtures import adapters, checkpoints, language_models, make
from loratools.operations.merge import merge
from tests.parity import merging

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

TOLERANCE = 1e-4  # largest difference of an output, float32


def injected(model: torch.nn.Module) -> int:
    return sum(bool(len(getattr(layer, "lora_A", ()))) for layer in model.modules())


@pytest.mark.parametrize("architecture", ["sd1", "sd2", "sdxl", "sd3", "flux"])
def test_a_merged_pipeline_computes_what_diffusers_does_at_run_time(architecture: str, tmp_path: Path) -> None:
    factors = {
        folder: parts
        for folder, parts in merging.uniform(merging.factors_of(architecture), 4.0).items()
        if type(checkpoints.models(architecture).models[folder]).__name__ != "T5EncoderModel"
    }
    adapter = merging.save_adapter(tmp_path / "adapter.safetensors", architecture, "diffusers", factors)
    folder = checkpoints.folder(architecture, tmp_path / "folder")
    merge(folder, [(adapter, 1.0)], tmp_path / "out")

    run_time = merging.loaded(architecture, folder)
    run_time.load_lora_weights(tmp_path, weight_name=adapter.name)
    assert {part: injected(getattr(run_time, part)) for part in factors} == {part: len(found) for part, found in factors.items()}
    merged, bare = merging.loaded(architecture, tmp_path / "out"), merging.loaded(architecture, folder)
    wanted, found, before = (
        merging.outputs(architecture, {part: getattr(pipe, part) for part in factors}) for pipe in (run_time, merged, bare)
    )
    for part in factors:
        close(found[part], wanted[part], before[part])


def close(found: torch.Tensor, wanted: torch.Tensor, before: torch.Tensor) -> None:
    """Both are the same function, and neither is the base's."""
    for output in (found, wanted):
        assert float((output - before).norm() / before.norm()) > 1e-2, "the adapter does nothing, the test could not fail"
    assert float((found - wanted).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("weight", [1.0, -0.7])
def test_a_merged_language_model_computes_what_peft_does_at_run_time(weight: float, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = language_models.llama_folder(tmp_path / "llama", max_shard_size="20KB")
    model = make.llama()
    adapters.peft_folder(tmp_path / "adapter", model, adapters.lora_config(model, alpha=32), seed=3)
    merge(folder, [(tmp_path / "adapter", weight)], tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    close(logits(merged), logits(at_run_time(folder, tmp_path / "adapter", weight)), logits(model))


def at_run_time(folder: Path, adapter: Path, weight: float) -> torch.nn.Module:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, local_files_only=True), adapter)
    for layer in wrapped.modules():
        if hasattr(layer, "scale_layer"):
            layer.scale_layer(weight)
    return wrapped.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[3, 14, 15, 92, 65, 35]])).logits


def test_taking_an_adapter_out_again(tmp_path: Path) -> None:
    """Merged with +1, then with -1: the base, up to rounding."""
    folder = checkpoints.folder("sd1", tmp_path / "folder")
    factors = merging.factors_of("sd1")
    adapter = merging.save_adapter(tmp_path / "adapter.safetensors", "sd1", "kohya", factors)
    merge(folder, [(adapter, 1.0)], tmp_path / "out")
    merge(tmp_path / "out", [(adapter, -1.0)], tmp_path / "back")
    back, base = merging.read_folder("sd1", tmp_path / "back"), merging.base_states("sd1")
    for part, tensors in base.items():
        for key, tensor in tensors.items():
            assert float((back[part][key].double() - tensor.double()).norm()) <= 1e-6 * float(tensor.double().norm()), f"{part}/{key}"

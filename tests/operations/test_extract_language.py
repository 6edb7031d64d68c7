"""extract from language models and from models nobody has heard of: names from the checkpoint itself, tied heads, transposed layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fixtures import language_models
from fixtures.tuned import difference, planted, rewritten, tuned
from loratools.errors import InputError
from loratools.operations.extract import extract
from loratools.operations.merge import merge
from tests import reference
from tests.operations.made import render
from tests.operations.merge_by_hand import noise, save
from tests.operations.merged import whole
from tests.operations.test_extract import apart, assert_back

pytestmark = pytest.mark.filterwarnings("ignore")

PREFIX = "base_model.model."
State = dict[str, torch.Tensor]


def pair(folder: Path, rank: int = 4, kind: str = "llama", **options: Any) -> tuple[Path, Path, State, State]:
    """(BASE, TUNED, tensors of BASE, tensors of TUNED) as transformers folders."""
    make = {"llama": language_models.llama_folder, "gpt2": language_models.gpt2_folder}[kind]
    base, other = make(folder / "base", **options), make(folder / "tuned", **options)
    before = {key: value for file in sorted(base.glob("*.safetensors")) for key, value in load_file(file).items()}
    after = tuned(before, rank)
    return base, rewritten(other, {"": after}), before, after


def assert_folder(found: Path, wanted: Mapping[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    state = whole(found)
    assert wanted.keys() <= state.keys()
    off = {key: apart(state[key], value) for key, value in wanted.items()}
    assert max(off.values()) <= tolerance, max(off, key=lambda key: off[key])


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"max_shard_size": "20KB"}, {"tied": True, "max_shard_size": "20KB"}])
def test_llama(options: dict[str, Any], tmp_path: Path) -> None:
    """Norms and all; a tied head is the embedding changed in both places, so that PEFT's untied layers compute the same."""
    base, other, before, after = pair(tmp_path, **options)
    told = extract(base, other, tmp_path / "out")
    assert told["dialect"] == "peft"
    assert not {row["tensor"] for row in told["skipped"]} & set(before)
    merge(base, [(tmp_path / "out", 1.0)], tmp_path / "merged")
    wanted = {**after, "lm_head.weight": after["model.embed_tokens.weight"]} if "tied" in options else after
    assert_folder(tmp_path / "merged", wanted)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert ("lm_head" in config["target_modules"]) == ("model.embed_tokens" in config["target_modules"]) is True


@pytest.mark.parametrize("base_tied", [False, True])
def test_one_head_tied_and_one_not(base_tied: bool, tmp_path: Path) -> None:
    """The head's own difference is against the embedding where the other model shares it."""
    kinds = {False: {}, True: {"tied": True}}
    base = language_models.llama_folder(tmp_path / "base", **kinds[base_tied])
    other = language_models.llama_folder(tmp_path / "tuned", **kinds[not base_tied])
    before, after = (load_file(path / "model.safetensors") for path in (base, other))
    after = tuned({**before, **after} if base_tied else {key: before[key] for key in after})
    rewritten(other, {"": after})
    extract(base, other, tmp_path / "out", rank=64)
    merge(base, [(tmp_path / "out", 1.0)], tmp_path / "merged")
    wanted = after if base_tied else {**after, "lm_head.weight": after["model.embed_tokens.weight"]}
    assert_folder(tmp_path / "merged", wanted)


def test_gpt2_layers_are_turned(tmp_path: Path) -> None:
    """L7: Conv1D keeps (in, out), some of them square; the factors are those of the layer (out, in)."""
    base, other, before, after = pair(tmp_path, kind="gpt2")
    told = extract(base, other, tmp_path / "out", rank=4)
    extract(base, other, tmp_path / "matrices", rank=4, dense_extras="drop")
    found = reference.deltas(tmp_path / "matrices")
    square = "transformer.h.0.attn.c_proj"
    assert before[f"{square}.weight"].shape == (32, 32)
    delta = after[f"{square}.weight"].double() - before[f"{square}.weight"].double()
    assert apart(found[PREFIX + square], delta.T) <= 1e-5
    assert apart(found[PREFIX + square], delta) > 0.5
    assert told["relative_error"] < 1e-5
    merge(base, [(tmp_path / "out", 1.0)], tmp_path / "merged")
    missing = {row["tensor"] for row in told["skipped"]}
    assert not {key for key in missing if key.endswith(".weight")}
    assert_folder(tmp_path / "merged", {key: value for key, value in after.items() if key not in missing})


def test_an_embedding_is_turned_and_a_vocabulary_that_grew_is_refused(tmp_path: Path) -> None:
    base, other, before, after = pair(tmp_path)
    extract(base, other, tmp_path / "out", rank=4, include=["*embed_tokens"])
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    key = PREFIX + "model.embed_tokens.lora_embedding_"
    assert tensors.keys() == {f"{key}A", f"{key}B"}
    assert (tensors[f"{key}A"].shape, tensors[f"{key}B"].shape) == ((4, 100), (32, 4))
    delta = after["model.embed_tokens.weight"].double() - before["model.embed_tokens.weight"].double()
    assert apart((tensors[f"{key}B"].double() @ tensors[f"{key}A"].double()).T, delta) <= 1e-5
    grown = {key: torch.cat([value, value[:2]]) if len(value) == 100 else value for key, value in after.items()}
    save(other / "model.safetensors", grown)
    with pytest.raises(InputError) as caught:
        extract(base, other, tmp_path / "grown")
    told = "\n".join(caught.value.details)
    assert "embed_tokens" in told
    assert "lm_head" in told
    assert "[100, 32]" in told
    assert "[102, 32]" in told
    assert not (tmp_path / "grown").exists()


def test_what_peft_injects_into_no_module_is_told(tmp_path: Path) -> None:
    """Parameters of their own (Mamba's A_log, fused experts) are no layers: a LoRA under their names would never be loaded."""
    shapes = {"self_attn.q_proj.weight": (32, 32), "mixer.A_log": (32, 8), "mlp.experts.gate_up_proj": (4, 32, 16), "mixer.D": (32,)}
    before = {f"model.layers.0.{name}": noise(*shape, seed=number) for number, (name, shape) in enumerate(shapes.items())}
    before["model.embed_tokens.weight"] = noise(100, 32, seed=9)
    after = tuned(before, only=lambda key: "embed" not in key)
    for name, tensors in (("base", before), ("tuned", after)):
        (tmp_path / name).mkdir()
        save(tmp_path / name / "model.safetensors", tensors)
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
    told = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out")
    assert set(reference.deltas(tmp_path / "out")) == {PREFIX + "model.layers.0.self_attn.q_proj"}
    lost = {row["tensor"] for row in told["skipped"] if row["reason"].startswith("changed")}
    assert lost == {f"model.layers.0.{name}" for name in shapes if "q_proj" not in name}


# ------------------------------------------------------------------------------------------------------------ invented models


INVENTED = {
    "weaver.0.mix.weight": (24, 20),
    "weaver.0.mix.bias": (24,),
    "weaver.0.fold.weight": (16, 12, 3, 3),
    "weaver.0.point.weight": (16, 12, 1, 1),
    "weaver.0.line.weight": (16, 12, 5),
    "weaver.0.cube.weight": (8, 6, 3, 3, 3),
    "weaver.0.calm.weight": (24,),
    "weaver.0.calm.bias": (24,),
    "weaver.gate": (24, 6),
    "weaver.pace": (7,),
}


@pytest.mark.parametrize("dialect", ["kohya", "comfy", "lycoris"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_an_invented_architecture(dialect: str, prefix: str, tmp_path: Path) -> None:
    """X13: any two state dicts; layers of one to three axes, bare parameters, biases and norms come back."""
    before = {prefix + name: noise(*shape, seed=number) for number, (name, shape) in enumerate(INVENTED.items())}
    after = tuned(before)
    base = save(tmp_path / "loom.safetensors", before)
    told = extract(base, save(tmp_path / "tuned.safetensors", after), tmp_path / "out.safetensors", to=dialect)
    assert told["skipped"] == []
    out = tmp_path / "merged.safetensors"
    merge(base, [(tmp_path / "out.safetensors", 1.0)], out)
    found = load_file(out)
    assert max(apart(found[key], value) for key, value in after.items()) <= 1e-6


def test_kernels_have_the_shape_of_the_layer(tmp_path: Path) -> None:
    """up (o, r, 1, …), down (r, i, k, …); planted rank 4 comes back at rank 4 for a linear layer and kernels of one to three axes."""
    names = [name for name, shape in INVENTED.items() if len(shape) > 1 and name.endswith(".weight")]
    before = {name: noise(*INVENTED[name], seed=number) for number, name in enumerate(names)}
    after = {name: (value.double() + planted(value, 4, number)).float() for number, (name, value) in enumerate(before.items())}
    extract(save(tmp_path / "loom.safetensors", before), save(tmp_path / "t.safetensors", after), tmp_path / "out.safetensors", rank=4)
    tensors, found = load_file(tmp_path / "out.safetensors"), reference.deltas(tmp_path / "out.safetensors")
    for name in names:
        stem, (out, in_, *kernel) = "lora_unet_" + name.removesuffix(".weight").replace(".", "_"), INVENTED[name]
        assert tensors[f"{stem}.lora_up.weight"].shape == (out, 4, *(1 for _ in kernel))
        assert tensors[f"{stem}.lora_down.weight"].shape == (4, in_, *kernel)
        assert tensors[f"{stem}.alpha"] == 4
        assert apart(found[stem], difference(before, after)[name]) <= 1e-5


def test_an_invented_model_and_a_known_one_have_nothing_in_common(tmp_path: Path) -> None:
    (tmp_path / "loom.safetensors").write_bytes(render({"weaver.0.mix.weight": noise(24, 20)}))
    (tmp_path / "other.safetensors").write_bytes(render({"reed.weight": noise(24, 20)}))
    with pytest.raises(InputError):
        extract(tmp_path / "loom.safetensors", tmp_path / "other.safetensors", tmp_path / "out.safetensors")
    llama = language_models.llama_single(tmp_path / "llama.safetensors")
    with pytest.raises(InputError, match="not recognised"):
        extract(llama, tmp_path / "other.safetensors", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_language_model_in_one_file(tmp_path: Path) -> None:
    """Without a config.json beside it; the output is a folder all the same."""
    base = language_models.llama_single(tmp_path / "base.safetensors")
    before = load_file(base)
    other = save(tmp_path / "tuned.safetensors", tuned(before))
    extract(base, other, tmp_path / "out")
    assert_back(base, load_file(other), tmp_path / "out")

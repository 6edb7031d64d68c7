"""PEFT as the reader and the writer of adapter folders: nothing missing, nothing unexpected, and the function of a hand merge."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures import adapters, make
from loratools.errors import UnsupportedError
from loratools.operations.convert import convert as operation
from loratools.operations.inspect import inspect
from loratools.tensors.reader import open_source
from tests import reference
from tests.parity.support import apart, assert_deltas, expected, made, save_kohya, truth_of

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

TOLERANCE = 2e-6  # of outputs, float32 forward against float32 forward
FACTORS = ("lora_", "hada_", "lokr_")


def read_by_peft(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """The model with the folder's adapter, as PEFT loads it. Fails on any key that is missing or unexpected."""
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    wrapped = get_peft_model(deepcopy(model), PeftConfig.from_pretrained(folder)).eval()
    result = set_peft_model_state_dict(wrapped, load_file(folder / "adapter_model.safetensors"))
    assert result.unexpected_keys == []
    assert [key for key in result.missing_keys if any(f".{word}" in key for word in FACTORS)] == []
    return wrapped


def injected(wrapped: torch.nn.Module) -> set[str]:
    """Names of the modules that got an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name.removeprefix("base_model.model.") for name, module in wrapped.named_modules() if isinstance(module, BaseTunerLayer)}


def outputs(architecture: str, model: torch.nn.Module) -> torch.Tensor:
    inner = model.base_model.model if hasattr(model, "base_model") and hasattr(model, "peft_config") else model
    if architecture == "llm":
        with torch.no_grad():
            return inner(input_ids=torch.tensor([[3, 14, 15, 92, 65, 35]])).logits
    folder = "transformer" if architecture == "flux" else "unet"
    return make.forward(make.Base(architecture, {folder: inner}))[folder]


def check(architecture: str, model: torch.nn.Module, folder: Path, truth: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """PEFT adapts exactly these modules, and computes what the hand merge computes."""
    wrapped = read_by_peft(model, folder)
    assert injected(wrapped) == set(truth)
    found, wanted = outputs(architecture, wrapped), outputs(architecture, adapters.merged(model, truth))
    assert apart(wanted, outputs(architecture, model)) > 1e-3, "the adapter does nothing, the test could not fail"
    assert apart(found, wanted) <= TOLERANCE
    return wrapped


def rewritten(folder: Path, target: Path, rename: Callable[[str], str], *, config: bool = True, extra: Any = None) -> Path:
    """A PEFT folder with other key names, as wrappers and raw dumps write them."""
    target.mkdir()
    tensors = {rename(key): value for key, value in load_file(folder / "adapter_model.safetensors").items()}
    save_file({**tensors, **(extra or {})}, target / "adapter_model.safetensors")
    if config:
        (target / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    return target


def same_folder(first: Path, second: Path) -> None:
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


# ------------------------------------------------------------------------------------------------------------ from kohya to PEFT


@pytest.mark.parametrize("architecture", ["sd1", "sdxl", "flux"])
def test_every_layer_with_ranks_and_alphas_of_its_own(
    architecture: str, tmp_path: Path, bases: Callable[[str], make.Base], convert: Callable[..., Path]
) -> None:
    of = bases(architecture)
    model = of.models[of.denoiser]
    factors = made(make.Base(architecture, {of.denoiser: model}), ranks=(4, 2, 8, 4, 3), alphas=(2.0, None, 8.0, 1.0, 5.0, 4.0, 0.5))
    folder = convert(save_kohya(tmp_path / "kohya.safetensors", architecture, factors), "peft")
    truth = truth_of(factors)[of.denoiser]
    assert_deltas(reference.deltas(folder), {f"base_model.model.{name}": delta for name, delta in truth.items()})
    check(architecture, model, folder, truth)


def test_each_component_gets_a_folder_of_its_own(tmp_path: Path, bases: Callable[[str], make.Base], convert: Callable[..., Path]) -> None:
    """PEFT knows one model at a time, and SDXL's two text encoders share all module names."""
    of = bases("sdxl")
    factors = made(of, ranks=(4, 2), alphas=(2.0, 8.0, None))
    source = save_kohya(tmp_path / "kohya.safetensors", "sdxl", factors)
    out = convert(source, "peft")
    assert sorted(path.name for path in out.iterdir()) == ["text_encoder", "text_encoder_2", "unet"]
    truth = truth_of(factors)
    for folder, deltas in truth.items():
        found = reference.deltas(out / folder)
        clip = "text_model." if folder == "text_encoder" else ""  # transformers 5 has dropped it from CLIPTextModel
        assert_deltas(found, {f"base_model.model.{clip}{name}": delta for name, delta in deltas.items()})
    check("sdxl", of.models["unet"], out / "unet", truth["unet"])
    second = read_by_peft(of.models["text_encoder_2"], out / "text_encoder_2")
    assert injected(second) == set(truth["text_encoder_2"])
    back = load_file(convert(out, "kohya"))
    assert back.keys() >= load_file(source).keys()


@pytest.mark.parametrize("chosen", ["top", "block", "both"])
def test_names_that_end_alike(chosen: str, tmp_path: Path, bases: Callable[[str], make.Base], convert: Callable[..., Path]) -> None:
    """PEFT matches the ends of names: Flux's last layer `proj_out` must not bring along single_transformer_blocks.N.proj_out."""
    of = bases("flux")
    model = of.models["transformer"]
    names = {
        "top": ["proj_out"],
        "block": ["single_transformer_blocks.1.proj_out"],
        "both": ["proj_out", "single_transformer_blocks.1.proj_out"],
    }
    wanted = [*names[chosen], "norm_out.linear", "transformer_blocks.0.norm1.linear"]
    factors = {"transformer": adapters.factors(model, wanted, ranks=(4, 2), alphas=(1.0, 6.0))}
    folder = convert(save_kohya(tmp_path / "kohya.safetensors", "flux", factors), "peft", arch="flux")
    check("flux", model, folder, truth_of(factors)["transformer"])


# -------------------------------------------------------------------------------------------------------------- PEFT's own files


@pytest.mark.parametrize(
    "config",
    [
        {"alpha": 6},
        {"alpha": 6, "use_rslora": True},
        {
            "alpha": 6,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 9, r"layers\.1\.mlp\.\w+": 2},
            "alpha_pattern": {"lm_head": 3, "down_proj": 16},
        },
        {"alpha": 6, "lora_bias": True},
    ],
    ids=["plain", "rslora", "patterns", "lora-bias"],
)
def test_language_model(config: dict[str, Any], tmp_path: Path, llama: torch.nn.Module, convert: Callable[..., Path]) -> None:
    """LoRA on every linear layer, the head and the embedding; written anew, it loads and computes the same."""
    targets = adapters.layers(llama) + ([] if "lora_bias" in config else ["model.embed_tokens"])
    made_by_peft = adapters.peft_folder(
        tmp_path / "trained", llama, adapters.lora_config(llama, targets=targets, **config), seed=3, save_embedding_layers=False
    )
    wanted = outputs("llm", made_by_peft)
    assert apart(wanted, outputs("llm", llama)) > 1e-3
    source = rewritten(tmp_path / "trained", tmp_path / "bare", lambda key: key.removeprefix("base_model."))
    folder = convert(source, "peft", dtype="fp32")
    assert_deltas(reference.deltas(folder), reference.deltas(tmp_path / "trained"))
    wrapped = read_by_peft(llama, folder)
    assert injected(wrapped) == set(targets)
    assert apart(outputs("llm", wrapped), wanted) <= TOLERANCE


def test_base_weights_beside_an_embedding_ride_along(tmp_path: Path, llama: torch.nn.Module) -> None:
    """PEFT saves `base_layer.weight` of adapted embeddings by default: no adapter of its own, kept for PEFT, refused elsewhere."""
    targets = ["model.embed_tokens", "model.layers.0.self_attn.q_proj"]
    config = adapters.lora_config(llama, targets=targets)
    adapters.peft_folder(tmp_path / "trained", llama, config, seed=3, save_embedding_layers=True)
    riding = "base_model.model.model.embed_tokens.base_layer.weight"
    assert riding in open_source(tmp_path / "trained").tensors
    found = inspect(tmp_path / "trained")
    assert (found["architecture"], found["adapter"]["kinds"], found["unknown_keys"]) == ("llm", {"lora": 2, "set": 1}, [])
    assert [problem["site"] for problem in found["problems"] if problem["code"] == "companion"] == [riding]
    result = operation(tmp_path / "trained", tmp_path / "written", "peft", dtype="fp16")
    assert (result["kept"], result["dropped"]) == ([riding], [])
    assert riding in open_source(tmp_path / "written").tensors
    assert injected(read_by_peft(llama, tmp_path / "written")) == set(targets)


@pytest.mark.parametrize(
    ("what", "prefix"),
    [
        pytest.param("llm", "base_model.model.", id="llm-PeftModel"),
        pytest.param("llm", "model.", id="llm-LoraModel"),
        pytest.param("llm", "", id="llm-inject"),
        pytest.param("sd1", "base_model.model.", id="sd1-PeftModel"),
        pytest.param("sd1", "model.", id="sd1-LoraModel"),
        pytest.param("sd1", "", id="sd1-inject"),
    ],
)
def test_three_prefixes_are_one_adapter(
    what: str, prefix: str, tmp_path: Path, llama: torch.nn.Module, bases: Callable[[str], make.Base], convert: Callable[..., Path]
) -> None:
    """Whatever wrote the folder, what comes out has the keys PEFT looks for."""
    model = llama if what == "llm" else bases("sd1").models["unet"]
    trained = tmp_path / "trained"
    adapters.peft_folder(trained, model, adapters.lora_config(model, alpha=8), save_embedding_layers=False)
    source = rewritten(trained, tmp_path / "other", lambda key: prefix + key.removeprefix("base_model.model."))
    out = convert(source, "peft")
    same_folder(trained, out)
    read_by_peft(model, out)


DEBRIS: dict[str, Callable[[str], str]] = {
    "adapter name": lambda key: key.replace(".weight", ".default.weight"),
    "another name": lambda key: key.replace(".weight", ".style_2.weight"),
    "torch.compile": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "torch.compile, outside": lambda key: "_orig_mod." + key,
    "DataParallel": lambda key: "module." + key,
    "DataParallel, doubled": lambda key: "module.module." + key,
    "base_layer": lambda key: key.replace(".lora_", ".base_layer.lora_"),
    "base_layer, doubled": lambda key: key.replace(".lora_", ".base_layer.base_layer.lora_"),
    "prefix, doubled": lambda key: "base_model.model." + key,
    "everything": lambda key: "module._orig_mod." + key.replace(".lora_", ".base_layer.lora_").replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("debris", DEBRIS)
@pytest.mark.parametrize("what", ["llm", "flux"])
def test_wrapper_debris_is_repaired(
    what: str, debris: str, tmp_path: Path, llama: torch.nn.Module, bases: Callable[[str], make.Base], convert: Callable[..., Path]
) -> None:
    """Keys no loader finds: PEFT would leave every factor at its initial value, with one warning."""
    model = llama if what == "llm" else bases("flux").models["transformer"]
    trained = tmp_path / "trained"
    adapters.peft_folder(trained, model, adapters.lora_config(model, alpha=8), save_embedding_layers=False)
    source = rewritten(trained, tmp_path / "debris", DEBRIS[debris])
    out = convert(source, "peft")
    same_folder(trained, out)
    assert_deltas(reference.deltas(out), reference.deltas(trained))
    read_by_peft(model, out)


def test_named_adapter_in_its_subfolder(tmp_path: Path, bases: Callable[[str], make.Base], convert: Callable[..., Path]) -> None:
    """`save_pretrained` puts every adapter but the one called "default" into a folder of its name; its parent is what people pass on."""
    from peft import get_peft_model

    model = bases("flux").models["transformer"]
    wrapped = adapters.fill(get_peft_model(deepcopy(model), adapters.lora_config(model, alpha=8), adapter_name="style"), 2)
    wrapped.save_pretrained(tmp_path / "saved")
    out = convert(tmp_path / "saved", "kohya")
    truth = {name.removeprefix("base_model.model."): delta for name, delta in reference.deltas(tmp_path / "saved" / "style").items()}
    assert_deltas(reference.deltas(out), expected("flux", {"transformer": truth}, "kohya"))


def test_without_its_config_a_scale_is_assumed_and_said(
    tmp_path: Path, bases: Callable[[str], make.Base], convert: Callable[..., Path]
) -> None:
    of = bases("sd1")
    trained = tmp_path / "trained"
    adapters.peft_folder(trained, of.models["unet"], adapters.lora_config(of.models["unet"], alpha=6))
    alone = rewritten(trained, tmp_path / "alone", lambda key: key, config=False) / "adapter_model.safetensors"
    page = inspect(alone)
    assert page["adapter"]["alpha_source"] == "assumed"
    assert [problem["code"] for problem in page["problems"]] == ["alpha-assumed"]
    truth = {name: delta.double() for name, delta in reference.deltas(trained).items()}
    assert_deltas(reference.deltas(convert(alone, "peft", alpha=6.0)), truth)
    assert_deltas(reference.deltas(convert(alone, "peft")), {name: delta * 4 / 6 for name, delta in truth.items()})


# ----------------------------------------------------------------------------------------------------------------- other kinds


@pytest.mark.parametrize("what", ["llm", "sd1"])
def test_dora(what: str, tmp_path: Path, llama: torch.nn.Module, bases: Callable[[str], make.Base], convert: Callable[..., Path]) -> None:
    """PEFT's magnitude vectors, on linear layers and convolutions; for the UNet through kohya's `dora_scale` and back."""
    model = llama if what == "llm" else bases("sd1").models["unet"]
    trained = tmp_path / "trained"
    config = adapters.lora_config(model, alpha=8, use_dora=True)
    wanted = outputs(what, adapters.peft_folder(trained, model, config, save_embedding_layers=False))
    if what == "llm":
        out = convert(rewritten(trained, tmp_path / "bare", lambda key: key.removeprefix("base_model.")), "peft")
    else:
        kohya = convert(trained, "kohya")
        shapes = {tuple(value.shape[1:]) for key, value in load_file(kohya).items() if key.endswith(".dora_scale")}
        assert shapes == {(1,), (1, 1, 1)}  # the output axis, in LyCORIS' form
        out = convert(kohya, "peft")
    same_folder(trained, out)
    assert json.loads((out / "adapter_config.json").read_text())["use_dora"] is True
    wrapped = read_by_peft(model, out)
    assert apart(outputs(what, wrapped), wanted) <= TOLERANCE


def lycoris_file(path: Path, model: torch.nn.Module, names: list[str], kind: str, alpha: float, seed: int = 0) -> Path:
    """LyCORIS' tensors for linear layers, rank 2, factor 4. kind: "loha", "lokr" (w2 in two factors where that is less) or "lokr-full"."""
    noise = torch.Generator().manual_seed(seed)
    tensors = {}

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=noise) * 0.3

    for name in names:
        out, in_ = model.get_submodule(name).weight.shape
        stem = f"lora_unet_{name.replace('.', '_')}"
        if kind == "loha":
            shapes = {"hada_w1_a": (out, 2), "hada_w1_b": (2, in_), "hada_w2_a": (out, 2), "hada_w2_b": (2, in_)}
        else:
            shapes = {"lokr_w1": (4, 4)}
            whole = kind == "lokr-full" or max(out // 4, in_ // 4) / 2 <= 2
            shapes |= {"lokr_w2": (out // 4, in_ // 4)} if whole else {"lokr_w2_a": (out // 4, 2), "lokr_w2_b": (2, in_ // 4)}
        tensors |= {f"{stem}.{leaf}": random(*shape) for leaf, shape in shapes.items()} | {f"{stem}.alpha": torch.tensor(alpha)}
    save_file(tensors, path, {"ss_network_module": "lycoris.kohya"})
    return path


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr-full"])
def test_lycoris_kinds_keep_their_function(
    kind: str, tmp_path: Path, bases: Callable[[str], make.Base], convert: Callable[..., Path]
) -> None:
    """PEFT scales by alpha / r always, LyCORIS not where both factors of a LoKr are full (alpha is stored and means nothing)."""
    model = bases("sd1").models["unet"]
    names = [name for name in adapters.layers(model) if name.endswith((".attn1.to_q", ".attn2.to_out.0"))]
    source = lycoris_file(tmp_path / f"{kind}.safetensors", model, names, kind, alpha=4.0)
    truth = {name: reference.deltas(source)[f"lora_unet_{name.replace('.', '_')}"] for name in names}
    folder = convert(source, "peft", arch="sd1")
    check("sd1", model, folder, truth)
    back = convert(folder, "kohya", arch="sd1")
    assert_deltas(reference.deltas(back), reference.deltas(source))


@pytest.mark.parametrize("kind", ["LoKr", "LoHa"])
def test_lycoris_kinds_of_peft(kind: str, tmp_path: Path, bases: Callable[[str], make.Base], convert: Callable[..., Path]) -> None:
    """PEFT's own LoKr and LoHa, Tucker cores included: alpha / r holds for whole factors too, so it is baked for kohya."""
    import peft

    model = bases("sd1").models["unet"]
    targets = [name for name in adapters.layers(model) if "mid_block" in name or "down_blocks.1" in name]
    more = {"decompose_factor": 4} if kind == "LoKr" else {}
    config = getattr(peft, f"{kind}Config")(r=3, alpha=5, target_modules=targets, use_effective_conv2d=True, **more)
    trained = tmp_path / "trained"
    wrapped = adapters.fill(peft.get_peft_model(deepcopy(model), config), 4, 0.3).eval()
    wrapped.save_pretrained(trained)
    layers = {name: layer for name, layer in wrapped.named_modules() if hasattr(layer, "get_delta_weight")}
    assert sorted(name.removeprefix("base_model.model.") for name in layers) == sorted(targets)
    truth = {name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach() for name, layer in layers.items()}
    kohya = convert(trained, "kohya", arch="sd1")
    assert_deltas(reference.deltas(kohya), {f"lora_unet_{name.replace('.', '_')}": delta for name, delta in truth.items()})
    check("sd1", model, convert(kohya, "peft", arch="sd1"), truth)


def test_factors_peft_would_shape_otherwise_are_refused(tmp_path: Path, bases: Callable[[str], make.Base]) -> None:
    """One decompose_factor shapes all LoKr modules: a folder that PEFT cannot load is not written."""
    model = bases("sd1").models["unet"]
    noise = torch.Generator().manual_seed(0)
    tensors = {}
    for name, first in (("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 4), ("mid_block.attentions.0.proj_in", 8)):
        out, in_ = model.get_submodule(name).weight.shape[:2]
        stem = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{stem}.lokr_w1"] = torch.randn(first, first, generator=noise)
        tensors[f"{stem}.lokr_w2"] = torch.randn(out // first, in_ // first, *model.get_submodule(name).weight.shape[2:], generator=noise)
    source, out_path = tmp_path / "lokr.safetensors", tmp_path / "out"
    save_file(tensors, source)
    with pytest.raises(UnsupportedError, match="decompose_factor") as refused:
        operation(source, out_path, "peft", arch="sd1")
    assert len(refused.value.details) == 1
    assert not out_path.exists()
    operation(source, out_path, "peft", arch="sd1", kind="lora")
    truth = {f"base_model.model.{name}": delta for name, delta in _lokr_truth(source).items()}
    assert_deltas(reference.deltas(out_path), truth)


def _lokr_truth(source: Path) -> dict[str, torch.Tensor]:
    names = ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0.proj_in")
    found = reference.deltas(source)
    return {name: found[f"lora_unet_{name.replace('.', '_')}"] for name in names}

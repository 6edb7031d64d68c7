"""What merge refuses, all of it at once and before a byte of the base's weights is read; and what looks like it but is taken."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures import checkpoints, language_models, layouts
from loratools.errors import LoraToolsError, UnsupportedError
from loratools.operations.merge import merge
from loratools.tensors.lazy import ByteFile
from tests.hostile.conftest import tree
from tests.operations.made import ATTENTION, FF, PROJ, factors, kohya, kohya_file, parts, written
from tests.operations.merged import Raw, assert_sum
from tests.parity.merging import factors_of, save_adapter

pytestmark = pytest.mark.filterwarnings("ignore")

Tensors = dict[str, torch.Tensor]
CONV = "up_blocks.3.resnets.1.conv1"
SHAPES = {ATTENTION: (16, 16), PROJ: (16, 16, 1, 1), CONV: (16, 32, 3, 3), FF: (16, 64)}
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sd1.safetensors, unet (a model folder), flux.safetensors (the transformer alone), llama: never to be changed."""
    folder = tmp_path_factory.mktemp("bases")
    checkpoints.single("sd1", folder / "sd1.safetensors", "float16")
    checkpoints.flux_bare(folder / "flux.safetensors")
    checkpoints.models("sd1").models["unet"].save_pretrained(folder / "unet")
    language_models.llama_folder(folder / "llama")
    return folder


@pytest.fixture
def good(randn: Any) -> Tensors:
    """A kohya adapter of four SD1 modules."""
    return kohya_file({path: factors(randn, shape) for path, shape in SHAPES.items()})


def told(error: LoraToolsError) -> str:
    return "\n".join([error.message, *error.details])


def refusal(*arguments: Any, **options: Any) -> LoraToolsError:
    with pytest.raises(LoraToolsError) as caught:
        merge(*arguments, **options)
    return caught.value


# ------------------------------------------------------------------------------------------------------------- one fault each


def _renamed(tensors: Tensors) -> None:
    for key in [key for key in tensors if key.startswith(kohya(FF))]:
        tensors[key.replace("lora_unet_", "lora_unit_")] = tensors.pop(key)


def _widened(tensors: Tensors) -> None:
    tensors[f"{kohya(ATTENTION)}.lora_up.weight"] = torch.ones(17, 4)


def _unknown(tensors: Tensors) -> None:
    tensors["somebody.elses.tensor"] = torch.ones(3)


def _orphaned(tensors: Tensors) -> None:
    del tensors[f"{kohya(PROJ)}.lora_up.weight"]


def _flattened(tensors: Tensors) -> None:
    """A 1x1 kernel's delta for a 3x3 kernel: sd-scripts' merge_lora.py adds it to all nine places."""
    tensors[f"{kohya(CONV)}.lora_down.weight"] = tensors[f"{kohya(CONV)}.lora_down.weight"][:, :, :1, :1].clone()


def _biased(tensors: Tensors) -> None:
    tensors[f"{kohya(ATTENTION)}.diff_b"] = torch.ones(16)


def _not_a_number(tensors: Tensors) -> None:
    tensors[f"{kohya(FF)}.alpha"] = torch.tensor(float("nan"))


FAULTS: Mapping[str, tuple[Callable[[Tensors], None], tuple[str, ...]]] = {
    "renamed": (_renamed, tuple(f"lora_unit_{FF.replace('.', '_')}.{leaf}" for leaf in ("lora_up.weight", "lora_down.weight", "alpha"))),
    "widened": (_widened, (kohya(ATTENTION), "[17, 16]")),
    "unknown": (_unknown, ("somebody.elses.tensor",)),
    "orphaned": (_orphaned, (kohya(PROJ), "without up")),
    "flattened": (_flattened, (CONV, "[16, 32, 1, 1]", "[16, 32, 3, 3]")),
    "biased": (_biased, (ATTENTION, "diff_b", "bias")),
    "not a number": (_not_a_number, (kohya(FF), "alpha")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_nothing_is_written(fault: str, good: Tensors, bases: Path, save: Any, tmp_path: Path) -> None:
    spoil, words = FAULTS[fault]
    spoil(good)
    bad, out = save("bad.safetensors", good), tmp_path / "out.safetensors"
    before = tree(tmp_path)
    error = refusal(bases / "sd1.safetensors", [(bad, 1.0)], out)
    assert error.exit_code == 3
    assert "bad.safetensors" in told(error)
    for word in words:
        assert word in told(error)
    assert tree(tmp_path) == before


def test_without_a_fault_every_site_is_merged(good: Tensors, bases: Path, save: Any, tmp_path: Path) -> None:
    """The same file unspoilt: four sites, four tensors, each of them another."""
    base, out = bases / "sd1.safetensors", tmp_path / "out.safetensors"
    result = merge(base, [(save("good.safetensors", good), 1.0)], out)
    first, second = Raw.of(base), Raw.of(out)
    assert (result["sites"], result["changed"], result["unmatched"]) == (4, 4, [])
    assert sum(first.bytes(key) != second.bytes(key) for key in first.entries) == 4


def test_another_architecture_is_named_with_the_bases(bases: Path, tmp_path: Path) -> None:
    for_flux = save_adapter(tmp_path / "style.safetensors", "flux", "kohya", factors_of("flux"))
    for_llama = _llama_adapter(tmp_path / "words")
    for adapter, base, names in (
        (for_flux, bases / "sd1.safetensors", ("flux", "sd1")),
        (for_flux, bases / "unet", ("flux", "sd1")),
        (for_flux, bases / "llama", ("flux", "language model")),
        (for_llama, bases / "sd1.safetensors", ("llm", "sd1")),
        (bases / "flux.safetensors", bases / "sd1.safetensors", ("no adapter keys",)),
    ):
        error = refusal(base, [(adapter, 1.0)], tmp_path / "out")
        assert error.exit_code == 3
        for word in (adapter.name, *names):
            assert word in told(error), (adapter.name, base.name, told(error))
        assert not (tmp_path / "out").exists()


def _llama_adapter(folder: Path) -> Path:
    folder.mkdir()
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{stem}.lora_A.weight": torch.ones(2, 32), f"{stem}.lora_B.weight": torch.ones(32, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    return folder


@pytest.mark.parametrize("what", ["missing", "an adapter", "text", "GGUF", "cut"])
def test_what_is_no_base(what: str, good: Tensors, bases: Path, save: Any, tmp_path: Path) -> None:
    adapter, base = save("good.safetensors", good), tmp_path / "base.safetensors"
    content = {"text": b"not a model", "GGUF": b"GGUF" + bytes(60), "cut": (bases / "sd1.safetensors").read_bytes()[:-1]}
    if what == "an adapter":
        base = save("base.safetensors", good)
    elif what != "missing":
        base.write_bytes(content[what])
    before = tree(tmp_path)
    error = refusal(base, [(adapter, 1.0)], tmp_path / "out.safetensors")
    assert error.exit_code == 3
    assert "base.safetensors" in told(error)
    assert tree(tmp_path) == before


# ------------------------------------------------------------------------------------------------------------- all at once


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, int, int]]:
    """(path, offset, size) of every read of a tensor file."""
    reads: list[tuple[Path, int, int]] = []
    read, read_into = ByteFile.read, ByteFile.read_into

    def counted(self: ByteFile, offset: int, size: int) -> bytes:
        reads.append((self.path, offset, size))
        return read(self, offset, size)

    def counted_into(self: ByteFile, offset: int, target: memoryview) -> None:
        reads.append((self.path, offset, len(target)))
        read_into(self, offset, target)

    monkeypatch.setattr(ByteFile, "read", counted)
    monkeypatch.setattr(ByteFile, "read_into", counted_into)
    return reads


def payload_read(reads: list[tuple[Path, int, int]], base: Path) -> int:
    """Bytes of the base's tensors among the reads."""
    start = len(base.read_bytes()) - len(parts(base)[1])
    return sum(max(offset + size - max(offset, start), 0) for path, offset, size in reads if path.samefile(base))


def test_one_run_tells_everything(good: Tensors, bases: Path, save: Any, served: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Faults of three adapters, an output that is there, a full disk: exit 3, all listed, no tensor of the base read (mergekit#328)."""
    first, second = dict(good), dict(good)
    for spoil in (_renamed, _widened, _unknown, _orphaned):
        spoil(first)
    _flattened(second)
    base, out = shutil.copy(bases / "sd1.safetensors", tmp_path / "base.safetensors"), save("out.safetensors", {"old": torch.ones(1)})
    third = save_adapter(tmp_path / "third.safetensors", "flux", "diffusers", factors_of("flux"))
    given = [(save("first.safetensors", first), 1.0), (save("second.safetensors", second), 1.0), (third, 1.0)]
    before, real = tree(tmp_path), os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((*real(path)[:3], 0, 0, *real(path)[5:])))
    monkeypatch.setattr(os, "pwrite", lambda *_: pytest.fail("a byte was written"))
    error = refusal(base, given, out)
    assert error.exit_code == 3
    words = [word for fault in ("renamed", "widened", "unknown", "orphaned", "flattened") for word in FAULTS[fault][1]]
    for word in (*words, "third.safetensors is an adapter for flux", "already there", "the disk is full"):
        assert word in told(error), word
    assert served
    assert payload_read(served, Path(base)) == 0
    assert tree(tmp_path) == before


def test_reads_of_the_base_are_counted(good: Tensors, bases: Path, save: Any, served: Any, tmp_path: Path) -> None:
    """The proof that the count above could have failed."""
    merge(bases / "sd1.safetensors", [(save("good.safetensors", good), 1.0)], tmp_path / "out.safetensors")
    assert payload_read(served, bases / "sd1.safetensors") >= sum(2 * torch.Size(shape).numel() for shape in SHAPES.values())


# --------------------------------------------------------------------------------------------------- text encoders, components


def test_text_encoder_keys_and_a_denoiser_alone(good: Tensors, bases: Path, save: Any, randn: Any, tmp_path: Path) -> None:
    """kohya_ss#3388: every key is listed, beside the output that is there too; the part is merged when it is asked for by name."""
    both = {**good, **written(TEXT, *factors(randn, (32, 32)))}
    adapter, out = save("both.safetensors", both), tmp_path / "out"
    out.mkdir()
    error = refusal(bases / "unet", [(adapter, 1.0)], out)
    assert error.exit_code == 3
    for leaf in ("lora_up.weight", "lora_down.weight", "alpha"):
        assert f"{TEXT}.{leaf}" in told(error)
    assert kohya(FF) not in told(error)
    assert "already there" in told(error)
    assert list(out.iterdir()) == []
    out.rmdir()
    result = merge(bases / "unet", [(adapter, 1.0)], out, component=["denoiser"])
    assert (result["changed"], result["sites"]) == (4, 4)
    assert any("left out by the selection" in warning for warning in result["warnings"])
    merge(bases / "unet", [(save("without.safetensors", good), 1.0)], tmp_path / "other")
    found, wanted = (Raw.of(folder / "diffusion_pytorch_model.safetensors").payload for folder in (out, tmp_path / "other"))
    assert found == wanted


def test_a_component_nobody_has_is_wrong_usage(good: Tensors, bases: Path, save: Any, tmp_path: Path) -> None:
    error = refusal(bases / "unet", [(save("good.safetensors", good), 1.0)], tmp_path / "out", component=["decoder"])
    assert error.exit_code == 2
    assert "decoder" in told(error)


# ------------------------------------------------------------------------------------------------------ kernels and biases


def test_a_tucker_convolution_is_its_einsum(bases: Path, save: Any, randn: Any, tmp_path: Path) -> None:
    """M7: up (out, r, 1, 1), mid (r, r, 3, 3), down (r, in, 1, 1)."""
    up, mid, down = randn(16, 4, 1, 1) * 0.1, randn(4, 4, 3, 3) * 0.1, randn(4, 32, 1, 1) * 0.1
    tensors = {f"{kohya(CONV)}.{leaf}.weight": value for leaf, value in (("lora_up", up), ("lora_mid", mid), ("lora_down", down))}
    tensors |= {f"{kohya(CONV)}.alpha": torch.tensor(6.0), **written(kohya(PROJ), *factors(randn, SHAPES[PROJ]))}
    base, out = bases / "unet", tmp_path / "out"
    merge(base, [(save("tucker.safetensors", tensors), 0.7)], out)
    before, after = (Raw.of(folder / "diffusion_pytorch_model.safetensors") for folder in (base, out))
    sides = [(value(up), value(mid), value(down)) for value in (torch.Tensor.double, lambda tensor: tensor.double().abs())]
    delta, size = (0.7 * 6.0 / 4 * torch.einsum("op,pqhw,qi->oihw", one.flatten(1), core, other.flatten(1)) for one, core, other in sides)
    assert_sum(CONV, after.tensor(f"{CONV}.weight"), before.tensor(f"{CONV}.weight"), delta, size, "F32")
    assert after.bytes(f"{CONV}.weight") != before.bytes(f"{CONV}.weight")


def test_a_bias_delta_is_added_as_it_is(good: Tensors, bases: Path, save: Any, randn: Any, tmp_path: Path) -> None:
    """M14: `diff_b` is a delta of its own: the weight scales it, alpha does not. PEFT's lora_B.bias is scaled by both."""
    adapter, bias = save("moved.safetensors", {f"{kohya(CONV)}.diff_b": (moved := randn(16)), **good}), f"{CONV}.bias"
    before = Raw.of(bases / "unet" / "diffusion_pytorch_model.safetensors").tensor(bias)
    for weight in (1.0, -0.75):
        merge(bases / "unet", [(adapter, weight)], tmp_path / "out", force=True)
        found = Raw.of(tmp_path / "out" / "diffusion_pytorch_model.safetensors").tensor(bias)
        assert_sum(bias, found, before, weight * moved.double(), moved.double().abs(), "F32")
        assert weight != 1.0 or torch.equal(found.float(), before.float() + moved)

    name = "transformer_blocks.0.attn.to_out.0"  # with a bias, under the original name double_blocks.0.img_attn.proj
    tensors = {f"transformer.{name}.lora_A.weight": randn(4, 32), f"transformer.{name}.lora_B.weight": randn(32, 4)}
    tensors[f"transformer.{name}.lora_B.bias"] = randn(32)
    header = {"transformer.r": 4, "transformer.lora_alpha": 6, "transformer.lora_bias": True, "transformer.target_modules": [name]}
    adapter = save("biased.safetensors", tensors, {"lora_adapter_metadata": json.dumps(header)})
    merge(bases / "flux.safetensors", [(adapter, 0.5)], tmp_path / "out.safetensors")
    first, second = Raw.of(bases / "flux.safetensors"), Raw.of(tmp_path / "out.safetensors")
    bias = "double_blocks.0.img_attn.proj.bias"
    step = 0.5 * 1.5 * tensors[f"transformer.{name}.lora_B.bias"].double()
    assert_sum(bias, second.tensor(bias), first.tensor(bias), step, step.abs(), "F32")


def test_lora_bias_on_a_layer_without_one(bases: Path, peft: Any, randn: Any, tmp_path: Path) -> None:
    """M14: PEFT ends in a RuntimeError; here the site is named before anything is done."""
    stem = "model.layers.1.mlp.up_proj"
    tensors = {"lora_A.weight": randn(4, 32), "lora_B.weight": randn(56, 4), "lora_B.bias": randn(56)}
    named = {f"base_model.model.{stem}.{leaf}": value for leaf, value in tensors.items()}
    adapter = peft("biased", named, {"r": 4, "lora_alpha": 4, "lora_bias": True, "target_modules": ["up_proj"]})
    error = refusal(bases / "llama", [(adapter, 1.0)], tmp_path / "out")
    assert error.exit_code == 3
    assert stem in told(error)
    assert "bias" in told(error)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------ quantised bases


def _nf4(module: str, weight: torch.Tensor) -> Tensors:
    codes = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
    beside = {"absmax": torch.ones(weight.numel() // 64), "quant_map": torch.linspace(-1, 1, 16)}
    named = {f"{module}.weight.{leaf}": value for leaf, value in beside.items()}
    return {f"{module}.weight": codes, f"{module}.weight.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8), **named}


def _gptq(module: str, weight: torch.Tensor) -> Tensors:
    out, in_ = weight.shape
    codes = {"qweight": torch.zeros(in_ // 8, out, dtype=torch.int32), "qzeros": torch.zeros(1, out // 8, dtype=torch.int32)}
    beside = {"scales": torch.ones(1, out).half(), "g_idx": torch.zeros(in_, dtype=torch.int32)}
    return {f"{module}.{leaf}": value for leaf, value in (codes | beside).items()}


def _awq(module: str, weight: torch.Tensor) -> Tensors:
    return {key: value for key, value in _gptq(module, weight).items() if not key.endswith("g_idx")}


def _int8(module: str, weight: torch.Tensor) -> Tensors:
    return {f"{module}.weight": torch.zeros(weight.shape, dtype=torch.int8), f"{module}.SCB": torch.ones(len(weight))}


@pytest.mark.parametrize(("pack", "name"), [(_nf4, "nf4"), (_gptq, "GPTQ"), (_awq, "AWQ"), (_int8, "int8")])
def test_quantised_bases_are_refused_by_name(pack: Callable[..., Tensors], name: str, bases: Path, tmp_path: Path) -> None:
    """Codes that a delta cannot be added to: which they are, and on which module."""
    base = shutil.copytree(bases / "llama", tmp_path / "base")
    tensors, module = load_file(base / "model.safetensors"), "model.layers.0.self_attn.q_proj"
    weight = tensors.pop(f"{module}.weight")
    save_file(tensors | pack(module, weight), base / "model.safetensors", {"format": "pt"})
    error = refusal(base, [(_llama_adapter(tmp_path / "adapter"), 1.0)], tmp_path / "out")
    assert isinstance(error, UnsupportedError)
    assert name in told(error)
    assert module in told(error)
    assert "16-bit" in (error.fix or "")
    assert not (tmp_path / "out").exists()


def test_scaled_fp8_is_no_reason_to_refuse(tmp_path: Path) -> None:
    """Codes with a scale: values are taken out, summed and put back under the same names and dtypes."""
    base = checkpoints.flux_scaled_fp8(tmp_path / "fp8.safetensors")
    found = {"transformer": factors_of("flux")["transformer"]}
    adapter = save_adapter(tmp_path / "style.safetensors", "flux", "diffusers", found)
    merge(base, [(adapter, 4.0)], tmp_path / "out.safetensors", verify=True)
    before, after, key = Raw.of(base), load_file(tmp_path / "out.safetensors"), "double_blocks.1.img_attn.qkv"
    assert Raw.of(tmp_path / "out.safetensors").table() == before.table()
    modules = {name: found["transformer"][name] for name in layouts.modules("flux", found["transformer"])[key][0]}
    wanted = checkpoints.flux_tensors()[f"{key}.weight"].double() + 4.0 * torch.cat([one.delta() for one in modules.values()])
    values = after[f"{key}.weight"].double() * after[f"{key}.scale_weight"].double()
    assert float((values - wanted).abs().max()) <= float(wanted.abs().max()) / 8  # two roundings to 3 bits after the point
    assert float((values - wanted).norm() / (4.0 * torch.cat([one.delta() for one in modules.values()])).norm()) < 0.5


# ------------------------------------------------------------------------------------------------ adapters of quantised bases


@pytest.mark.parametrize(
    ("name", "warned"),
    [
        ("unsloth/llama-3-8b-bnb-4bit", True),
        ("TheBloke/Llama-2-7B-GPTQ", True),
        ("someone/model-AWQ", True),
        ("/home/me/flux-fp8", True),
        ("meta-llama/Llama-3.1-8B", False),
        ("mistralai/Mistral-7B-v0.1", False),
    ],
)
def test_an_adapter_of_a_quantised_base_is_warned_about(name: str, warned: bool, bases: Path, tmp_path: Path) -> None:
    """M15: it has never seen the weights it is merged into. The warning has no path of another machine."""
    adapter = _llama_adapter(tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
    result = merge(bases / "llama", [(adapter, 1.0)], tmp_path / "out", dry_run=True)
    found = [warning for warning in result["warnings"] if "quantised base" in warning]
    assert len(found) == warned
    assert all(name.rpartition("/")[2] in warning and "/home" not in warning for warning in found)


@pytest.mark.parametrize(("metadata", "warned"), [({"ss_fp8_base": "True"}, True), ({"ss_fp8_base": "False"}, False), ({}, False)])
def test_kohyas_fp8_base(metadata: dict[str, str], warned: bool, good: Tensors, bases: Path, save: Any, tmp_path: Path) -> None:
    result = merge(bases / "sd1.safetensors", [(save("good.safetensors", good, metadata), 1.0)], tmp_path / "out.safetensors", dry_run=True)
    assert any("quantised base" in warning for warning in result["warnings"]) == warned


def test_what_an_adapter_carries_beside_its_modules_is_refused_or_left_out_by_name(
    good: Tensors, bases: Path, save: Any, tmp_path: Path
) -> None:
    """An embedding bundled by OneTrainer has no place in a checkpoint: never left behind without a word."""
    adapter = save("bundled.safetensors", {**good, "bundle_emb.word.clip_l": torch.ones(2, 32)})
    with pytest.raises(LoraToolsError) as error:
        merge(bases / "sd1.safetensors", [(adapter, 1.0)], tmp_path / "out.safetensors")
    assert "bundle_emb.word.clip_l" in str(error.value.details)
    assert not (tmp_path / "out.safetensors").exists()
    result = merge(bases / "sd1.safetensors", [(adapter, 1.0)], tmp_path / "out.safetensors", exclude=["bundle_emb.*"])
    assert result["changed"] == 4
    assert any("bundle_emb.word.clip_l is left out" in warning for warning in result["warnings"])

"""extract: every tensor of TUNED is in the adapter or told with its reason; small changes and dense ones are not lost on the way."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fixtures import checkpoints
from fixtures.tuned import difference, matrices, tuned
from loratools.errors import InputError, UnsupportedError
from loratools.operations import extract as operation
from loratools.operations.extract import extract
from loratools.operations.merge import merge
from tests import reference
from tests.operations.merge_by_hand import flux, noise, save
from tests.operations.test_extract import a_module, apart, assert_back

pytestmark = pytest.mark.filterwarnings("ignore")

State = Mapping[str, torch.Tensor]
SAME = "the same in both"
ENCODERS = {"sd1": "cond_stage_model.", "sdxl": "conditioner.", "sd3": "text_encoders.", "flux": "text_encoders."}


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    checkpoints.models("sd1")


def pair(folder: Path, architecture: str, change: Callable[[State], State]) -> tuple[Path, Path, State, State]:
    before = checkpoints.single_tensors(architecture)
    after = change(before)
    base = checkpoints.write(folder / "base.safetensors", dict(before), "base")
    return base, checkpoints.write(folder / "tuned.safetensors", dict(after), "tuned"), before, after


def reasons(told: Mapping[str, Any]) -> dict[str, str]:
    assert len({row["tensor"] for row in told["skipped"]}) == len(told["skipped"]), "told twice"
    return {row["tensor"]: row["reason"] for row in told["skipped"]}


def merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    out = adapter.with_name(f"{adapter.name}-merged.safetensors")
    merge(base, [(adapter, 1.0)], out)
    return load_file(out)


# ------------------------------------------------------------------------------------------------------------- nothing is lost


@pytest.mark.parametrize(
    ("architecture", "dialect"),
    [
        *(("sd1", dialect) for dialect in ("kohya", "peft")),
        *(("sdxl", dialect) for dialect in ("comfy", "diffusers")),
        *((name, dialect) for name in ("sd3", "flux") for dialect in ("kohya", "diffusers", "peft", "comfy", "omi", "onetrainer")),
    ],
)
def test_every_tensor_is_accounted_for(architecture: str, dialect: str, tmp_path: Path) -> None:
    """X3: half of all tensors changed, of every kind. The merged model has TUNED's value, or the tensor is told and has BASE's."""

    def half(before: State) -> State:
        names = set(list(before)[::2])
        return tuned(before, only=lambda key: key in names)

    base, other, before, after = pair(tmp_path, architecture, half)
    out = tmp_path / ("out" if dialect == "peft" else "out.safetensors")
    told = reasons(extract(base, other, out, to=dialect))
    found, changed = merged(base, out), difference({key: value for key, value in before.items() if value.is_floating_point()}, after)
    assert told.keys() <= before.keys()
    for key, value in after.items():
        if key in told:
            assert (told[key] == SAME) == (key not in changed), (key, told[key])
            assert torch.equal(found[key], before[key]), f"{key}: told as not in it, and changed"
        else:
            assert key in changed, f"{key}: the same in both, and not told"
            assert apart(found[key], value) <= 1e-6, key
    lost = {key: reason for key, reason in told.items() if reason != SAME and a_module(key)}
    if dialect in ("kohya", "comfy", "onetrainer", "omi"):
        assert not lost
    if dialect == "peft":  # everything but parameters of no layer and biases of layers whose weight is the same
        assert all(reason.startswith("changed, but peft") for reason in lost.values())
    if dialect == "diffusers":
        assert all("diffusers cannot hold" in reason or "no LoRA of embeddings" in reason for reason in lost.values())


@pytest.mark.parametrize("size", [1e-4, 1e-7])
@pytest.mark.parametrize("architecture", ["sd1", "sdxl", "flux"])
def test_a_text_encoder_that_changed_by_next_to_nothing(architecture: str, size: float, tmp_path: Path) -> None:
    """X2: no threshold. The denoiser is the same in both, and named tensor by tensor."""
    start = ENCODERS[architecture]

    def shifted(before: State) -> State:
        return {key: value + size if key.startswith(start) and matrices(key) else value for key, value in before.items()}

    base, other, before, after = pair(tmp_path, architecture, shifted)
    result = extract(base, other, tmp_path / "out.safetensors", rank=40)
    told = reasons(result)
    assert all(key.startswith("lora_te") for key in load_file(tmp_path / "out.safetensors"))
    assert {key for key, reason in told.items() if reason == SAME} >= {key for key in before if key.startswith("model.diffusion_model.")}
    changed = difference({key: value for key, value in before.items() if value.is_floating_point()}, after)
    assert changed
    assert not changed.keys() & told.keys()
    found = merged(base, tmp_path / "out.safetensors")
    for key, delta in changed.items():
        assert float((found[key].double() - after[key].double()).norm()) <= 1e-6 * float(after[key].double().norm())
        assert float((found[key].double() - before[key].double()).norm()) >= 0.5 * float(delta.norm()), key


def test_an_equal_text_encoder_is_named(tmp_path: Path) -> None:
    """X2, X8: of bit-identical tensors there is no module, and every one of them is told."""
    start = ENCODERS["sdxl"]
    base, other, before, _ = pair(tmp_path, "sdxl", lambda state: tuned(state, only=lambda key: key.startswith("model.diffusion")))
    told = reasons(extract(base, other, tmp_path / "out.safetensors"))
    assert {key for key, reason in told.items() if reason == SAME} >= {key for key in before if key.startswith(start)}
    assert not [key for key in load_file(tmp_path / "out.safetensors") if key.startswith("lora_te")]


# --------------------------------------------------------------------------------------------------------------- dense extras


@pytest.mark.parametrize(
    ("architecture", "dialect"),
    [
        *(("sd1", dialect) for dialect in ("kohya", "diffusers", "lycoris")),
        *(("sdxl", dialect) for dialect in ("comfy", "peft")),
        *((name, dialect) for name in ("sd3", "flux") for dialect in ("kohya", "comfy", "diffusers", "peft", "lycoris")),
    ],
)
def test_dense_extras(architecture: str, dialect: str, tmp_path: Path) -> None:
    """X3: keep reproduces TUNED or tells why not; drop leaves them at BASE's values and tells that; matrices come either way."""
    part = ("denoiser",)

    def perturbed(before: State) -> State:
        return tuned(before, only=lambda key: key.startswith("model.diffusion_model."))

    base, other, before, after = pair(tmp_path, architecture, perturbed)
    suffix = "" if dialect == "peft" else ".safetensors"
    mine = [key for key in before if key.startswith("model.diffusion_model.")]
    kept = reasons(extract(base, other, tmp_path / f"keep{suffix}", to=dialect, component=part))
    dropped = reasons(extract(base, other, tmp_path / f"drop{suffix}", to=dialect, component=part, dense_extras="drop"))
    found, without = merged(base, tmp_path / f"keep{suffix}"), merged(base, tmp_path / f"drop{suffix}")
    for key in mine:
        for told, state in ((kept, found), (dropped, without)):
            if key in told:
                assert torch.equal(state[key], before[key]), key
            else:
                assert apart(state[key], after[key]) <= 1e-6, key
    dense = {key for key in mine if before[key].dim() < 2 or key.endswith("pos_embed")}
    assert {key for key in mine if key in dropped} == dense
    assert {dropped[key] for key in dense} == {"changed, and left out by --dense-extras drop"}
    lost = {key for key in mine if key in kept}
    assert lost <= dense
    if dialect in ("kohya", "comfy", "lycoris"):
        assert not lost
    elif dialect == "diffusers":  # the bias beside a LoRA is held, what is no layer's of its own is not
        biases = {key for key in dense if key.endswith(".bias") and before[key.replace(".bias", ".weight")].dim() > 1}
        assert lost == dense - biases
        assert biases or architecture not in ("sd1", "sdxl")
    else:
        assert lost <= {"model.diffusion_model.pos_embed"}


@pytest.mark.parametrize("name", ["input_blocks.0.0", "out.2", "time_embed.0", "middle_block.0.emb_layers.1"])
@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_one_changed_tensor_is_one_module(name: str, leaf: str, tmp_path: Path) -> None:
    """conv_in, conv_out and time embeddings, which other extractors leave out; a bias alone is a module too."""
    changed = f"model.diffusion_model.{name}.{leaf}"
    base, other, _, after = pair(tmp_path, "sd1", lambda state: tuned(state, only=lambda key: key == changed))
    told = extract(base, other, tmp_path / "out.safetensors")
    assert told["modules"] == 1
    assert changed not in reasons(told)
    assert_back(base, after, tmp_path / "out.safetensors")


def test_a_module_without_a_name_is_refused_before_the_work(tmp_path: Path, monkeypatch: Any) -> None:
    """`lycoris` spells denoisers alone: what differs in the text encoder is listed at once; if nothing does, there is no complaint."""
    base, other, *_ = pair(tmp_path, "sd1", lambda state: tuned(state, only=a_module))
    monkeypatch.setattr(operation, "extracted", lambda *_: pytest.fail("the work began"))
    with pytest.raises(UnsupportedError, match="27 modules cannot be written as lycoris") as caught:
        extract(base, other, tmp_path / "out.safetensors", to="lycoris")
    assert all(re.match(r"text_encoder\.text_model\..*: lycoris has no name for it", line) for line in caught.value.details)
    assert "--component" in str(caught.value.fix)
    assert not (tmp_path / "out.safetensors").exists()
    monkeypatch.undo()
    (tmp_path / "equal").mkdir()
    equal = pair(tmp_path / "equal", "sd1", lambda state: tuned(state, only=lambda key: key.startswith("model.diffusion_model.out.")))
    assert extract(equal[0], equal[1], tmp_path / "out.safetensors", to="lycoris")["modules"] == 2


def test_what_the_checkpoint_calls_a_norm_does_not_matter(tmp_path: Path) -> None:
    """Flux' norms are `.scale` in its own files and `.weight` in diffusers': PEFT saves them whole from either."""
    tensors = flux(width=32)
    after = tuned(tensors, only=lambda key: key.endswith(("query_norm.scale", "img_in.weight")))
    base = save(tmp_path / "a.safetensors", tensors)
    told = extract(base, save(tmp_path / "b.safetensors", after), tmp_path / "out", to="peft")
    assert told["modules"] == 2
    assert_back(base, after, tmp_path / "out")
    assert "base_model.model.transformer_blocks.0.attn.norm_q.weight" in load_file(tmp_path / "out" / "adapter_model.safetensors")


# ------------------------------------------------------------------------------------------------------------------ selection


def test_include_exclude_and_component(tmp_path: Path) -> None:
    base, other, *_ = pair(tmp_path, "sd1", lambda state: tuned(state, only=a_module))
    cases: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
        "component": ({"component": ["text_encoder"]}, lambda name: name.startswith("lora_te_")),
        "include": ({"include": ["*attn1.to_q"]}, lambda name: name.endswith("attn1_to_q")),
        "exclude": ({"exclude": ["*attn*", "text_encoder.*"]}, lambda name: "attn" not in name and name.startswith("lora_unet_")),
    }
    extract(base, other, tmp_path / "all.safetensors", dense_extras="drop")
    everything = reference.deltas(tmp_path / "all.safetensors")
    for case, (settings, wanted) in cases.items():
        told = extract(base, other, tmp_path / f"{case}.safetensors", dense_extras="drop", **settings)
        assert set(reference.deltas(tmp_path / f"{case}.safetensors")) == {name for name in everything if wanted(name)}, case
        assert any(row["reason"] == "left out by the selection" for row in told["skipped"]), case
    with pytest.raises(InputError, match="same, as far as"):
        extract(other, checkpoints.write(tmp_path / "copy.safetensors", load_file(other), "copy"), tmp_path / "none.safetensors")


def test_a_selection_leaves_out_what_does_not_fit(tmp_path: Path) -> None:
    """The way out that the refusal names: another shape and a tensor of one model alone, excluded by name."""
    tensors = flux(width=32)
    after = tuned(tensors, only=matrices)
    after["img_in.weight"] = noise(32, 20)
    del after["double_blocks.0.img_attn.proj.weight"]
    base, other = save(tmp_path / "a.safetensors", tensors), save(tmp_path / "b.safetensors", after)
    with pytest.raises(InputError, match="2 tensors") as caught:
        extract(base, other, tmp_path / "out.safetensors")
    assert "--exclude" in str(caught.value.fix)
    told = extract(base, other, tmp_path / "out.safetensors", exclude=["*x_embedder", "*attn.to_out.0"])
    assert told["modules"] == 7

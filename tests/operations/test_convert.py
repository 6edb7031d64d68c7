"""convert as a command: the fate of every tensor, refusals that list everything, and nothing left behind."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file

from loratools.cli.main import cli
from loratools.errors import InputError, UsageError
from loratools.operations.convert import convert
from tests.mapping.builders import Tensors, lora, noise, refusal, save, told

# Block 3 of the up path has attention in SD1 and SD2 only; its 1x1 convolution is SD1's.
BLOCK = "lora_unet_up_blocks_3_attentions_0_"
PROJ = lora(f"{BLOCK}proj_in", (16, 16, 1, 1))
Q = f"{BLOCK}transformer_blocks_0_attn1_to_q"
K = f"{BLOCK}transformer_blocks_0_attn1_to_k"
TE = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
GOOD: Tensors = {**PROJ, **lora(Q, (16, 16)), **lora(K, (16, 16)), **lora(TE, (12, 12))}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "a.safetensors", GOOD, {"ss_tag_frequency": "{}", "author": "somebody"})


# ------------------------------------------------------------------------------------------------------------- the result


def test_the_json_of_the_contract(source: Path, tmp_path: Path) -> None:
    result = run("convert", source, tmp_path / "b.safetensors", "--to", "diffusers", "--json")
    assert result.exit_code == 0
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["input"] == str(source)
    assert found["output"] == str(tmp_path / "b.safetensors")
    assert found["from"] == {"dialect": "kohya", "architecture": "sd1"}
    assert found["to"] == {"dialect": "diffusers", "architecture": "sd1"}
    assert (found["tensors_in"], found["tensors_out"], found["sites"]) == (12, 8, 4)
    assert found["exact"] is True
    assert (found["approximated"], found["dropped"], found["kept"]) == ([], [], [])
    assert found["max_relative_error"] == 0
    assert len(load_file(tmp_path / "b.safetensors")) == 8


@pytest.mark.parametrize(
    ("dialect", "name"), [("diffusers", "a.diffusers.safetensors"), ("comfy", "a.comfy.safetensors"), ("peft", "a.peft")]
)
def test_the_default_output_lies_beside_the_source(dialect: str, name: str, source: Path) -> None:
    result = convert(source, None, dialect)
    assert result["output"] == str(source.parent / name)
    assert (source.parent / name).exists()
    assert (source.parent / name).is_dir() == (dialect == "peft")


def test_a_dry_run_writes_nothing_and_promises_the_same(source: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    planned = convert(source, tmp_path / "b.safetensors", "diffusers", dry_run=True)
    assert sorted(tmp_path.iterdir()) == before
    real = convert(source, tmp_path / "b.safetensors", "diffusers")
    assert planned["plan"]["tensors"] == real["tensors_out"] == 8
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        sizes = [file.get_tensor(key).nbytes for key in file.keys()]  # noqa: SIM118
    assert planned["plan"]["bytes"] == sum(sizes)
    shared = {key: value for key, value in real.items() if key in planned}
    assert shared == {key: value for key, value in planned.items() if key != "plan"}


def test_the_same_input_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for dialect in ("diffusers", "comfy", "onetrainer"):
        convert(source, tmp_path / "1.safetensors", dialect, force=True)
        convert(source, tmp_path / "2.safetensors", dialect, force=True)
        assert digest(tmp_path / "1.safetensors") == digest(tmp_path / "2.safetensors")


def test_inputs_are_never_changed(source: Path, tmp_path: Path) -> None:
    before, times = digest(source), os.stat(source).st_mtime_ns
    for dialect in ("kohya", "diffusers", "peft", "comfy", "omi", "diffusers-dot"):
        convert(source, tmp_path / f"out.{dialect}", dialect)
    convert(source, tmp_path / "fp16.safetensors", "kohya", dtype="fp16")
    assert digest(source) == before
    assert os.stat(source).st_mtime_ns == times


# ------------------------------------------------------------------------------------------------- lesson 1: nothing in silence


FAULTS: dict[str, tuple[Tensors, str]] = {
    "an unknown key": ({**GOOD, "lora_unet_gadget.lora_up.weight": torch.ones(2, 2)}, "lora_unet_gadget.lora_up.weight"),
    "a wrong shape": ({**GOOD, **lora(K, (24, 24))}, K),
    "a renamed prefix": ({**GOOD, **lora(K.replace("lora_unet", "lora_unnet"), (16, 16))}, "lora_unnet_up_blocks_3"),
    "an orphan": ({**GOOD, f"{BLOCK}transformer_blocks_0_attn1_to_v.lora_up.weight": torch.ones(16, 4)}, "attn1_to_v"),
    "a key of no kind": ({**GOOD, "step": torch.tensor(3)}, "step"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "comfy"])
def test_a_planted_fault_is_refused_by_name(fault: str, dialect: str, tmp_path: Path) -> None:
    tensors, name = FAULTS[fault]
    path = save(tmp_path / "a.safetensors", tensors)
    before = sorted(tmp_path.iterdir())
    result = run("convert", path, tmp_path / "b.safetensors", "--to", dialect, "--json")
    assert result.exit_code == 3
    error = json.loads(result.stdout)["error"]
    assert name in "\n".join([error["message"], *error["details"]])
    assert sorted(tmp_path.iterdir()) == before


def test_all_faults_at_once(tmp_path: Path) -> None:
    """Unknown key, wrong shape, orphan, two alphas and an existing output: one refusal lists them all, with the code of the worst."""
    tensors = {**GOOD, **lora(K, (24, 24)), "lora_unet_gadget.lora_up.weight": torch.ones(2, 2), f"{TE}.alpha": torch.tensor(math.nan)}
    path = save(tmp_path / "a.safetensors", tensors)
    taken = save(tmp_path / "b.safetensors", {"x": torch.ones(1)})
    before = digest(taken)
    error = refusal(convert, path, taken, "diffusers")
    assert error.exit_code == 3
    for word in ("lora_unet_gadget", K, TE, "b.safetensors"):
        assert word in told(error)
    assert digest(taken) == before


def test_unknown_keys_are_dropped_or_kept_on_request(tmp_path: Path) -> None:
    stranger = {"lora_unet_gadget.lora_up.weight": torch.ones(2, 2), "step": torch.tensor(3)}
    path = save(tmp_path / "a.safetensors", {**GOOD, **stranger})
    dropped = convert(path, tmp_path / "b.safetensors", "diffusers", unknown="drop")
    assert {row["key"] for row in dropped["dropped"]} == set(stranger)
    assert all(row["reason"] for row in dropped["dropped"])
    assert dropped["exact"] is False
    assert dropped["tensors_in"] == len(GOOD) + 2
    assert not stranger.keys() & load_file(tmp_path / "b.safetensors").keys()
    kept = convert(path, tmp_path / "c.safetensors", "diffusers", unknown="keep")
    assert set(kept["kept"]) == set(stranger)
    found = load_file(tmp_path / "c.safetensors")
    assert all(torch.equal(found[key], stranger[key]) for key in stranger)
    assert run("convert", path, tmp_path / "d.safetensors", "--to", "comfy", "--drop-unknown", "--keep-unknown").exit_code == 2


def test_bundled_embeddings(tmp_path: Path) -> None:
    """C21: carried in their own dialect byte for byte, refused elsewhere until somebody says what to do."""
    companions = {"bundle_emb.token.clip_l": torch.ones(2, 8), "_aux.3f": torch.zeros(3)}
    path = save(tmp_path / "a.safetensors", {**GOOD, **companions})
    convert(path, tmp_path / "same.safetensors", "onetrainer")
    assert digest(tmp_path / "same.safetensors") == digest(path)
    error = refusal(convert, path, tmp_path / "b.safetensors", "diffusers")
    assert error.exit_code == 3
    for key in companions:
        assert key in told(error)
    dropped = convert(path, tmp_path / "b.safetensors", "diffusers", unknown="drop")
    assert {row["key"] for row in dropped["dropped"]} == set(companions)
    convert(path, tmp_path / "c.safetensors", "diffusers", unknown="keep")
    assert companions.keys() <= load_file(tmp_path / "c.safetensors").keys()


# ------------------------------------------------------------------------------------------------------------ outputs


def test_an_existing_output_needs_force(source: Path, tmp_path: Path) -> None:
    taken = save(tmp_path / "b.safetensors", {"x": torch.ones(1)})
    before = digest(taken)
    assert run("convert", source, taken, "--to", "diffusers").exit_code == 2
    assert digest(taken) == before
    assert run("convert", source, taken, "--to", "diffusers", "--force").exit_code == 0
    assert digest(taken) != before


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("way", ["itself", "symbolic link", "hard link", "another spelling"])
def test_the_output_is_never_the_input(way: str, force: bool, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "link.safetensors"
    if way == "symbolic link":
        target.symlink_to(source)
    elif way == "hard link":
        os.link(source, target)
    else:
        target = source if way == "itself" else tmp_path / "." / "nowhere" / ".." / source.name
    (tmp_path / "nowhere").mkdir()
    before = digest(source)
    assert refusal(convert, source, target, "diffusers", force=force).exit_code == 2
    assert digest(source) == before


def test_a_folder_that_cannot_be_written_leaves_nothing(source: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    error = refusal(convert, source, tmp_path / "missing" / "b.safetensors", "diffusers")
    assert error.exit_code in (1, 2)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dialect", ["kohya", "comfy", "diffusers", "peft"])
def test_not_finite_factors_are_refused_and_nothing_is_left(value: float, dialect: str, tmp_path: Path) -> None:
    tensors = {key: tensor.clone() for key, tensor in GOOD.items()}
    tensors[f"{Q}.lora_up.weight"][3, 1] = value
    path = save(tmp_path / "a.safetensors", tensors)
    before = sorted(tmp_path.iterdir())
    error = refusal(convert, path, tmp_path / ("b" if dialect == "peft" else "b.safetensors"), dialect)
    assert error.exit_code == 3
    assert "attn1" in told(error)
    assert sorted(tmp_path.iterdir()) == before


# ------------------------------------------------------------------------------------------------------------------ usage


def test_wrong_usage(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.safetensors"
    for options, word in (
        ({"dialect": "kohja"}, "kohya"),
        ({"dialect": "diffusers", "kind": "loha"}, "lora"),
        ({"dialect": "diffusers", "dtype": "int8"}, "int8"),
        ({"dialect": "diffusers", "arch": "sd7"}, "sd"),
        ({"dialect": "diffusers", "alpha": 4.0}, "--alpha"),
    ):
        error = refusal(convert, source, out, **options)
        assert isinstance(error, UsageError), told(error)
        assert word in told(error)
        assert not out.exists()


def test_checkpoints_are_refused(tmp_path: Path) -> None:
    weights = {f"model.diffusion_model.input_blocks.{n}.0.op.weight": torch.ones(4, 4, 3, 3) for n in (3, 6)}
    path = save(tmp_path / "model.safetensors", weights)
    error = refusal(convert, path, tmp_path / "b.safetensors", "diffusers")
    assert isinstance(error, InputError)
    left = save(tmp_path / "left.safetensors", {**weights, **{f"w{n}.weight": torch.ones(2, 2) for n in range(20)}, **PROJ})
    assert refusal(convert, left, tmp_path / "b.safetensors", "diffusers").exit_code == 3
    assert not (tmp_path / "b.safetensors").exists()


# ------------------------------------------------------------------------------------------------------------------ dtype


def test_a_cast_rounds_once_and_leaves_alpha(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "b.safetensors", "comfy", dtype="fp16")
    found = load_file(tmp_path / "b.safetensors")
    up = found["diffusion_model.output_blocks.9.1.proj_in.lora_B.weight"]
    assert torch.equal(up, GOOD[f"{BLOCK}proj_in.lora_up.weight"].half())
    assert {tensor.dtype for key, tensor in found.items() if not key.endswith("alpha")} == {torch.float16}
    assert {tensor.dtype for key, tensor in found.items() if key.endswith("alpha")} == {torch.float32}


def test_a_cast_in_the_same_dialect_is_a_conversion(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "b.safetensors", "kohya", dtype="bf16")
    found = load_file(tmp_path / "b.safetensors")
    assert found.keys() == GOOD.keys()
    assert torch.equal(found[f"{Q}.lora_up.weight"], GOOD[f"{Q}.lora_up.weight"].bfloat16())


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "peft"])
def test_overflow_to_infinity_is_refused(dialect: str, tmp_path: Path) -> None:
    tensors = {key: tensor.clone() for key, tensor in GOOD.items()}
    tensors[f"{Q}.lora_up.weight"][0, 0] = 1e6
    path = save(tmp_path / "a.safetensors", tensors)
    before = sorted(tmp_path.iterdir())
    error = refusal(convert, path, tmp_path / "b", dialect, dtype="fp16")
    assert error.exit_code == 3
    assert "attn1" in told(error)
    assert sorted(tmp_path.iterdir()) == before


# --------------------------------------------------------------------------------------------------------------- metadata


def test_metadata_is_carried_and_describes_the_output(source: Path, tmp_path: Path) -> None:
    stale = {
        "ss_network_dim": "99",
        "ss_network_alpha": "99",
        "sshs_model_hash": "0" * 64,
        "sshs_legacy_hash": "00000000",
        "author": "somebody",
    }
    path = save(tmp_path / "stale.safetensors", GOOD, stale)
    convert(path, tmp_path / "b.safetensors", "onetrainer")
    found = metadata(tmp_path / "b.safetensors")
    assert found["author"] == "somebody"
    assert found["ss_network_dim"] == "4"
    assert found["ss_network_alpha"] == "2"
    payload = (tmp_path / "b.safetensors").read_bytes()
    length = int.from_bytes(payload[:8], "little")
    if "sshs_model_hash" in found:
        assert found["sshs_model_hash"] == hashlib.sha256(payload[8 + length :]).hexdigest()
    assert str(tmp_path) not in json.dumps(found)


def test_the_way_to_kohya_has_the_minimum_set_and_true_hashes(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "b.safetensors", "comfy")
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya")
    found = metadata(tmp_path / "c.safetensors")
    for key in ("ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args"):
        assert key in found
    assert found["ss_base_model_version"] == "sd_v1"
    payload = (tmp_path / "c.safetensors").read_bytes()
    length = int.from_bytes(payload[:8], "little")
    assert found["sshs_model_hash"] == hashlib.sha256(payload[8 + length :]).hexdigest()


def test_a_peft_folder_in_its_own_dialect_is_copied(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    save(folder / "adapter_model.safetensors", lora(name, (8, 8), alpha=None, scheme="peft"), {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    convert(folder, tmp_path / "b", "peft")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert digest(folder / file) == digest(tmp_path / "b" / file)


def test_a_pickle_is_converted_not_copied(tmp_path: Path) -> None:
    """A .pt file of the wanted dialect becomes a safetensors file with the same tensors."""
    torch.save(GOOD, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "b.safetensors", "kohya")
    found = load_file(tmp_path / "b.safetensors")
    assert found.keys() == GOOD.keys()
    assert all(torch.equal(found[key], GOOD[key]) for key in GOOD)


def test_alpha_settles_a_file_that_records_none(tmp_path: Path) -> None:
    """--alpha 16 on PEFT keys of rank 4: scale 4, written as the target holds it."""
    stem = "base_model.model.up_blocks.3.attentions.0.proj_in"
    tensors = lora(stem, (16, 16, 1, 1), alpha=None, scheme="peft")
    path = save(tmp_path / "a.safetensors", tensors)
    result = convert(path, tmp_path / "b.safetensors", "kohya", alpha=16.0)
    assert result["from"]["dialect"] == "peft"
    found = load_file(tmp_path / "b.safetensors")
    assert float(found[f"{BLOCK}proj_in.alpha"]) == 16.0
    assumed = convert(path, tmp_path / "c.safetensors", "kohya")
    assert any("alpha" in warning for warning in assumed["warnings"])
    assert f"{BLOCK}proj_in.alpha" not in load_file(tmp_path / "c.safetensors")


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_alpha_settles_an_alpha_of_zero(dialect: str, tmp_path: Path) -> None:
    """Some readers take 0 as the rank, others as a scale of 0: it is refused, and --alpha says which number it is."""
    tensors = lora(f"{BLOCK}proj_in", (16, 16, 1, 1), alpha=0.0)
    path = save(tmp_path / "a.safetensors", tensors)
    assert "alpha is 0" in told(refusal(convert, path, tmp_path / "b.safetensors", dialect))
    convert(path, tmp_path / "b.safetensors", dialect, alpha=8.0)
    parts = {"kohya": ("lora_up", "lora_down"), "diffusers": ("lora_B", "lora_A")}
    before, after = (
        [next(value for key, value in found.items() if part in key).double().flatten(1) for part in parts[name]]
        for found, name in ((tensors, "kohya"), (load_file(tmp_path / "b.safetensors"), dialect))
    )
    scale = 1.0 if dialect == "kohya" else 8.0 / before[1].shape[0]  # kohya: in an alpha tensor, diffusers: in the factors
    assert torch.allclose(after[0] @ after[1], before[0] @ before[1] * scale, rtol=1e-6, atol=1e-9)
    if dialect == "kohya":
        assert float(load_file(tmp_path / "b.safetensors")[f"{BLOCK}proj_in.alpha"]) == 8.0


def test_a_negative_alpha_keeps_its_sign(tmp_path: Path) -> None:
    """Read with a warning; where alpha is folded the sign goes into the up factor."""
    tensors = lora(f"{BLOCK}proj_in", (16, 16, 1, 1), alpha=-2.0)
    result = convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", "diffusers")
    assert any("alpha" in warning for warning in result["warnings"])
    found = load_file(tmp_path / "b.safetensors")
    stem = "unet.up_blocks.3.attentions.0.proj_in"
    product = found[f"{stem}.lora_B.weight"].double().flatten(1) @ found[f"{stem}.lora_A.weight"].double().flatten(1)
    expected = (
        -0.5
        * tensors[f"{BLOCK}proj_in.lora_up.weight"].double().flatten(1)
        @ tensors[f"{BLOCK}proj_in.lora_down.weight"].double().flatten(1)
    )
    assert torch.equal(product, expected)


def test_an_unknown_architecture_through_its_base(tmp_path: Path) -> None:
    """C3: names that no table has are taken from the model itself; flattened ones are looked up, never split at underscores."""
    names = ("mid_tower.my_block_2.0.to_out_0", "mid_tower.my_block_2.1.to_out_0", "head")
    base = save(tmp_path / "base.safetensors", {f"{name}.weight": noise(name, (8, 8)).float() for name in names})
    tensors = {key: tensor for name in names for key, tensor in lora("lora_unet_" + name.replace(".", "_"), (8, 8)).items()}
    path = save(tmp_path / "a.safetensors", tensors)
    assert refusal(convert, path, tmp_path / "b.safetensors", "diffusers").exit_code == 3
    result = convert(path, tmp_path / "b.safetensors", "comfy", base=base)
    assert result["sites"] == 3
    found = load_file(tmp_path / "b.safetensors")
    assert {key.rpartition(".lora_")[0] for key in found if "lora_A" in key} == {f"diffusion_model.{name}" for name in names}
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya", base=base)
    back = load_file(tmp_path / "c.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)

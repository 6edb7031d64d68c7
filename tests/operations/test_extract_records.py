"""extract: what is written beside the factors: ranks and alphas that are true, where it comes from, hashes, and no paths."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from fixtures import checkpoints, language_models
from fixtures.tuned import matrices, rewritten, tuned
from loratools.operations.extract import extract
from loratools.operations.inspect import inspect
from tests.operations.made import parts
from tests.operations.merge_by_hand import flux, save
from tests.operations.test_extract import a_module

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    tensors = flux()
    (tmp_path / "somewhere").mkdir()
    base = save(tmp_path / "somewhere" / "base.safetensors", tensors)
    return base, save(tmp_path / "somewhere" / "tuned.safetensors", tuned(tensors, only=matrices))


def metadata(path: Path) -> dict[str, str]:
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "comfy", "peft", "lycoris", "onetrainer", "bfl-control"])
@pytest.mark.parametrize("settings", [{"rank": 3}, {"error": 0.3}, {"budget": 0.04}])
def test_every_output_passes_the_check(settings: dict[str, Any], dialect: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """`inspect --check` finds nothing: hashes, ranks, dead factors, names; alpha is the rank, so that every reader agrees on 1.0."""
    out = tmp_path / ("out" if dialect == "peft" else "out.safetensors")
    told = extract(*pair, out, to=dialect, **settings)
    page = inspect(out, check=True, modules=True)
    assert page["problems"] == []
    assert (page["dialect"], page["architecture"]) == (dialect, "flux")
    assert {module["scale"] for module in page["modules"]} == {1.0}
    assert page["adapter"]["ranks"] == told["ranks"]
    assert page["adapter"]["modules"] == told["modules"]


def test_kohya_header(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """W4: dim and alpha are those of the file; the hashes are those of the payload."""
    out = tmp_path / "out.safetensors"
    extract(*pair, out, rank=3)
    found, payload = metadata(out), parts(out)[1]
    assert (found["ss_network_dim"], float(found["ss_network_alpha"])) == ("3", 3.0)
    assert found["ss_network_module"] == "networks.lora_flux"
    assert found["sshs_model_hash"] == hashlib.sha256(payload).hexdigest()
    assert inspect(out, check=True)["problems"] == []


def test_mixed_ranks_are_dynamic(pair: tuple[Path, Path], tmp_path: Path) -> None:
    extract(*pair, tmp_path / "out.safetensors", error=0.3)
    assert len({len(value) for key, value in load_file(tmp_path / "out.safetensors").items() if "lora_down" in key}) > 1
    assert metadata(tmp_path / "out.safetensors")["ss_network_dim"] == "Dynamic"


def test_diffusers_header(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """`lora_adapter_metadata` is trusted over shapes by its readers: r, alpha and patterns of what is written."""
    extract(*pair, tmp_path / "out.safetensors", to="diffusers", error=0.3)
    found = json.loads(metadata(tmp_path / "out.safetensors")["lora_adapter_metadata"])
    config = {key.removeprefix("transformer."): value for key, value in found.items()}
    for key, value in load_file(tmp_path / "out.safetensors").items():
        name = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
        if key.endswith(".lora_A.weight"):
            ranks, alphas = (
                [size for pattern, size in (config.get(field) or {}).items() if re.match(rf"(.*\.)?({pattern})$", name)]
                for field in ("rank_pattern", "alpha_pattern")
            )
            assert [*ranks, config["r"]][0] == [*alphas, config["lora_alpha"]][0] == len(value), key


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "peft"])
def test_the_record(dialect: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Where it comes from and how: names and hashes of both headers, the options given; no path, no host, no time."""
    out = tmp_path / ("out" if dialect == "peft" else "out.safetensors")
    extract(*pair, out, to=dialect, rank=3, exclude=["*norm_out*"], seed=5)
    found = metadata(out)
    record = json.loads(found["loratools.extract"])
    for name, path in zip(("base", "tuned"), pair, strict=True):
        raw = path.read_bytes()
        header = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
        assert record[name]["name"] == path.name
        assert re.fullmatch("[0-9a-f]{64}", record[name]["header_sha256"])
        assert record[name]["header_sha256"] in {hashlib.sha256(raw[: 8 + len(header)]).hexdigest(), hashlib.sha256(header).hexdigest()}
    assert record["options"] == {"rank": 3, "exclude": ["*norm_out*"], "seed": 5}
    assert record["version"]
    text = json.dumps(found)
    assert "somewhere" not in text
    assert str(tmp_path) not in text


def test_a_second_run_gives_the_same_bytes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """From another folder, over an old output: the sha256 is an answer."""
    (tmp_path / "other").mkdir()
    copies = [tmp_path / "other" / path.name for path in pair]
    for path, copy in zip(pair, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    extract(*pair, tmp_path / "out.safetensors")
    (tmp_path / "other" / "out.safetensors").write_bytes(b"old")
    extract(*copies, tmp_path / "other" / "out.safetensors", force=True, threads=3)
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "other" / "out.safetensors").read_bytes()


def test_peft_config(tmp_path: Path) -> None:
    """X4, X11: r, alphas, biases and targets as the tensors say; nothing of the models' folders beside it."""
    base = language_models.gpt2_folder(tmp_path / "base")
    before = load_file(base / "model.safetensors")
    other = rewritten(
        language_models.gpt2_folder(tmp_path / "tuned"), {"": tuned(before, only=lambda key: ".wte." not in key and ".wpe." not in key)}
    )
    extract(base, other, tmp_path / "out", rank=4)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_bias"]) == (4, 4, True)
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["modules_to_save"] == sorted(config["modules_to_save"])
    assert inspect(tmp_path / "out", check=True)["problems"] == []


def test_every_architecture_passes_the_check(tmp_path: Path) -> None:
    for architecture, dialects in {"sd1": ("kohya",), "sdxl": ("diffusers",), "sd3": ("kohya", "diffusers")}.items():
        tensors = checkpoints.single_tensors(architecture, "float16")
        base = checkpoints.write(tmp_path / f"{architecture}.safetensors", tensors, "base")
        other = checkpoints.write(tmp_path / f"{architecture}-tuned.safetensors", tuned(tensors, only=a_module), "tuned")
        for dialect in dialects:
            out = tmp_path / f"{architecture}-{dialect}.safetensors"
            extract(base, other, out, rank=4, to=dialect)
            page = inspect(out, check=True)
            assert page["problems"] == []
            assert (page["architecture"], page["dialect"]) == (architecture, dialect)

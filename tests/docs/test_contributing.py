"""The three examples of CONTRIBUTING.md work as they stand there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from loratools.adapters.adapter import NotExact
from loratools.adapters.kinds import common
from loratools.cli.main import cli
from loratools.mapping.architectures import registry
from loratools.mapping.dialects import DIALECTS
from loratools.tensors.lazy import from_torch
from tests.docs.pages import ROOT, blocks

H, IMG, RANK, ALPHA = 16, 6, 4, 2.0
KOHYA = {  # name in kohya's file → (rows, columns)
    "patch_in": (H, IMG),
    "blocks_0_mixer_qkv": (3 * H, H),
    "blocks_0_mixer_out": (H, H),
    "blocks_1_mlp_up": (4 * H, H),
    "blocks_1_mlp_down": (H, 4 * H),
    "last_modulation": (2 * H, H),
}
ATTENTION = "sparrow_blocks.0.attn"
DIFFUSERS = {  # name in diffusers → (name in kohya's file, its rows there)
    "patch_embed.proj": ("patch_in", range(H)),
    f"{ATTENTION}.to_q": ("blocks_0_mixer_qkv", range(H)),
    f"{ATTENTION}.to_k": ("blocks_0_mixer_qkv", range(H, 2 * H)),
    f"{ATTENTION}.to_v": ("blocks_0_mixer_qkv", range(2 * H, 3 * H)),
    f"{ATTENTION}.to_out.0": ("blocks_0_mixer_out", range(H)),
    "sparrow_blocks.1.ff.net.0.proj": ("blocks_1_mlp_up", range(4 * H)),
    "sparrow_blocks.1.ff.net.2": ("blocks_1_mlp_down", range(H)),
    "norm_out.linear": ("last_modulation", [*range(H, 2 * H), *range(H)]),
}


def example(word: str) -> dict[str, Any]:
    """What the python block that contains `word` defines."""
    block = next(block for block in blocks(ROOT / "CONTRIBUTING.md") if block.language == "python" and word in block.text)
    names: dict[str, Any] = {"__name__": "contributed"}
    exec(compile("\n" * block.line + block.text, "CONTRIBUTING.md", "exec"), names)
    return names


@pytest.fixture
def sparrow(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The architecture of the page, registered for one test."""
    (architecture,) = example("ARCHITECTURES")["ARCHITECTURES"]
    monkeypatch.setitem(registry(), architecture.name, architecture)
    return architecture


@pytest.fixture
def kohya_file(tmp_path: Path) -> Path:
    """A seeded LoRA on the toy, fused and flattened as kohya's tools would write it."""
    noise = torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}
    for name, (out, in_) in KOHYA.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(RANK, in_, generator=noise)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(out, RANK, generator=noise)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, tmp_path / "bird.safetensors")
    return tmp_path / "bird.safetensors"


def loratools(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(cli, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def delta(tensors: dict[str, torch.Tensor], up: str, down: str, scale: float) -> torch.Tensor:
    return scale * (tensors[up].double() @ tensors[down].double())


def test_the_table_has_no_defect(sparrow: Any) -> None:
    assert sparrow.components[0].table.check() == []
    assert len(list(sparrow.components[0].table.names("orig"))) == 2 + 6 * 4


def test_a_file_of_the_new_architecture_is_recognised(sparrow: Any, kohya_file: Path) -> None:
    page = loratools("inspect", kohya_file)
    assert (page["dialect"], page["architecture"], page["adapter"]["modules"]) == ("kohya", "sparrow", len(KOHYA))
    assert page["problems"] == []


def test_the_new_architecture_converts_and_returns(sparrow: Any, kohya_file: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    assert loratools("convert", kohya_file, there, "--to", "diffusers-dot")["exact"] is True
    before, after = load_file(kohya_file), load_file(there)
    assert after.keys() == {f"transformer.{name}.lora.{side}.weight" for name in DIFFUSERS for side in ("down", "up")}
    for name, (source, rows) in DIFFUSERS.items():
        mine = delta(after, f"transformer.{name}.lora.up.weight", f"transformer.{name}.lora.down.weight", 1.0)
        whole = delta(before, f"lora_unet_{source}.lora_up.weight", f"lora_unet_{source}.lora_down.weight", ALPHA / RANK)
        torch.testing.assert_close(mine, whole[list(rows)], rtol=0, atol=0)
    loratools("convert", there, back, "--to", "kohya")
    again = load_file(back)
    assert again.keys() == before.keys()
    assert all(torch.equal(again[key], before[key]) for key in before)


def test_the_new_architecture_merges(sparrow: Any, kohya_file: Path, tmp_path: Path) -> None:
    """Into a base in either naming, and nothing that the adapter does not change moves."""
    shapes = {_dotted(name): shape for name, shape in KOHYA.items()} | {"blocks.2.mlp_up": (4 * H, H)}  # the last has no module
    noise = torch.Generator().manual_seed(6)
    weights = {name: torch.randn(shape, generator=noise) for name, shape in shapes.items()}
    apart = {name: weights[_dotted(source)][list(rows)] for name, (source, rows) in DIFFUSERS.items()}
    adapter = load_file(kohya_file)
    for base in (weights, apart):
        save_file({f"{name}.weight": tensor.clone() for name, tensor in base.items()}, tmp_path / "base.safetensors")
        loratools("merge", tmp_path / "base.safetensors", kohya_file, tmp_path / "merged.safetensors", "--force", "--verify")
        merged = load_file(tmp_path / "merged.safetensors")
        places = {_dotted(source): (source, range(shape[0])) for source, shape in KOHYA.items()} if base is weights else DIFFUSERS
        for name, tensor in base.items():
            change = torch.zeros(())
            if name in places:
                source, rows = places[name]
                change = delta(adapter, f"lora_unet_{source}.lora_up.weight", f"lora_unet_{source}.lora_down.weight", ALPHA / RANK)[
                    list(rows)
                ]
            torch.testing.assert_close(merged[f"{name}.weight"].double(), tensor.double() + change, rtol=1e-6, atol=1e-6)


def _dotted(name: str) -> str:
    """A kohya name in the words of the page's table."""
    names = ("patch_in", "blocks.0.mixer.qkv", "blocks.0.mixer.out", "blocks.1.mlp_up", "blocks.1.mlp_down", "last.modulation")
    return next(dotted for dotted in names if dotted.replace(".", "_") == name)


def test_the_new_dialect_is_written_and_read(sparrow: Any, kohya_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studio = example("STUDIO")["STUDIO"]
    monkeypatch.setitem(DIALECTS, studio.name, studio)
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    loratools("convert", kohya_file, there, "--to", "studio")
    before, after = load_file(kohya_file), load_file(there)
    assert after.keys() == {f"studio.{name}.{leaf}" for name in DIFFUSERS for leaf in ("alpha", "lora_A.weight", "lora_B.weight")}
    for name, (source, rows) in DIFFUSERS.items():
        assert float(after[f"studio.{name}.alpha"]) == ALPHA
        assert torch.equal(after[f"studio.{name}.lora_A.weight"], before[f"lora_unet_{source}.lora_down.weight"])
        assert torch.equal(after[f"studio.{name}.lora_B.weight"], before[f"lora_unet_{source}.lora_up.weight"][list(rows)])
    assert loratools("inspect", there)["dialect"] == "studio"
    loratools("convert", there, back, "--to", "kohya")
    assert all(torch.equal(tensor, before[key]) for key, tensor in load_file(back).items())


def test_the_new_dialect_refuses_what_it_does_not_hold(
    sparrow: Any, kohya_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = example("STUDIO")["STUDIO"]
    monkeypatch.setitem(DIALECTS, studio.name, studio)
    tensors = {"lora_unet_patch_in.diff": torch.ones(H, IMG), **{k: v for k, v in load_file(kohya_file).items() if "patch_in" not in k}}
    save_file(tensors, tmp_path / "dense.safetensors")
    result = CliRunner().invoke(cli, ["convert", str(tmp_path / "dense.safetensors"), str(tmp_path / "x"), "--to", "studio"])
    assert result.exit_code == 3
    assert "patch_embed.proj" in result.output
    assert not (tmp_path / "x").exists()


@pytest.fixture
def outer(monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    """The kind of the page, in a registry that is a copy."""
    monkeypatch.setattr(common, "KINDS", dict(common.KINDS))
    found: type[Any] = example("class Outer")["Outer"]
    assert common.KINDS["outer"] is found
    return found


def test_the_new_kind(outer: type[Any]) -> None:
    u, v = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 6.0, 7.0])
    module = outer({"outer_u": from_torch(u), "outer_v": from_torch(v)})
    by_hand = torch.tensor([[a * b for b in (5.0, 6.0, 7.0)] for a in (1.0, 2.0, 3.0, 4.0)], dtype=torch.float64)
    assert module.shape == (4, 3)
    assert module.problems() == []
    assert torch.equal(module.delta(), by_hand)
    assert torch.equal(torch.cat([part.delta() for part in module.split([1, 3])]), by_hand)
    assert torch.equal(module.swap_halves().delta(), by_hand[[2, 3, 0, 1]])
    assert abs(module.norm() - (1 + 4 + 9 + 16) ** 0.5 * (25 + 36 + 49) ** 0.5) < 1e-12


def test_the_new_kind_says_what_is_wrong(outer: type[Any]) -> None:
    module = outer({"outer_u": from_torch(torch.ones(())), "outer_v": from_torch(torch.ones(3))})
    assert [code for _, code, _ in module.problems()] == ["bad-shape"]
    with pytest.raises(NotExact):
        outer.fuse([module], [1])

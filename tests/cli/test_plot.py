"""The picture of an adapter: what is drawn adds up, files are whole, and what cannot be drawn is refused before the work."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest

from loratools.errors import OutputExistsError, UnsupportedError, UsageError
from loratools.operations.plot import block_of, check_plot, energies, group_blocks, plot, short_name


def rows() -> list[dict[str, Any]]:
    sites = [f"denoiser.transformer_blocks.{i}.attn.{name}" for i in range(12) for name in ("to_q", "to_k")]
    sites += [f"text_encoder.text_model.encoder.layers.{i}.self_attn.q_proj" for i in range(3)]
    return [
        {"site": site, "rank": 4, "delta_norm": 1.0 + i, "singular_values": [0.9 + i, 0.4, 0.0], "effective_rank": 1.5, "stable_rank": 1.2}
        for i, site in enumerate(sites)
    ]


@pytest.mark.parametrize(
    ("site", "block", "kind"),
    [
        ("denoiser.transformer_blocks.7.attn.to_q", "denoiser.transformer_blocks.7", "attn.to_q"),
        ("denoiser.transformer_blocks.7.ff.net.0.proj", "denoiser.transformer_blocks.7", "ff.net.proj"),
        ("denoiser.down_blocks.1.attentions.0.transformer_blocks.3.attn1.to_q", "denoiser.down_blocks.1.0", "attn1.to_q"),
        ("denoiser.down_blocks.1.resnets.0.conv1", "denoiser.down_blocks.1.0", "conv1"),
        ("denoiser.down_blocks.1.downsamplers.0.conv", "denoiser.down_blocks.1", "downsamplers.conv"),
        ("denoiser.mid_block.attentions.0.proj_in", "denoiser.mid_block", "proj_in"),
        ("denoiser.proj_out", "denoiser", "proj_out"),
        ("model.model.layers.10.mlp.up_proj", "model.model.layers.10", "mlp.up_proj"),
        ("denoiser", "denoiser", "denoiser"),
    ],
)
def test_block_and_module_type(site: str, block: str, kind: str) -> None:
    assert block_of(site) == (block, kind)


def test_energy_is_the_sum_of_squares_in_the_model_s_order() -> None:
    found = energies(
        [
            {"site": "denoiser.up_blocks.0.attentions.1.proj_in", "delta_norm": 2.0},
            {"site": "denoiser.mid_block.attentions.0.proj_in", "delta_norm": 1.0},
            {"site": "denoiser.down_blocks.10.attentions.0.proj_in", "delta_norm": 3.0},
            {"site": "denoiser.down_blocks.2.attentions.0.proj_in", "delta_norm": 4.0},
            {"site": "denoiser.down_blocks.2.attentions.0.proj_out", "delta_norm": 3.0},
            {"site": "denoiser.down_blocks.2.attentions.0.norm", "delta_norm": math.nan},
            {"site": "denoiser.down_blocks.2.attentions.0.norm"},
        ]
    )
    assert list(found.items()) == [
        ("denoiser.down_blocks.2.0", 25.0),
        ("denoiser.down_blocks.10.0", 9.0),
        ("denoiser.mid_block", 1.0),
        ("denoiser.up_blocks.0.1", 4.0),
    ]


def test_groups_keep_the_sums() -> None:
    blocks = {f"denoiser.blocks.{i}": float(i) for i in range(40)} | {f"text_encoder.layers.{i}": 1.0 for i in range(12)}
    grouped = group_blocks(blocks, 11)
    assert len(grouped) == 11
    assert sum(grouped.values()) == sum(range(40)) + 12
    assert grouped["denoiser.blocks.0-3"] == 0 + 1 + 2 + 3
    assert grouped["text_encoder"] == 12
    assert group_blocks(blocks, 100) == blocks
    assert group_blocks({}, 5) == {}


def test_short_names_leave_out_what_repeats() -> None:
    assert short_name("denoiser.transformer_blocks.3") == "transformer_blocks.3"
    assert short_name("text_encoder_2.text_model.encoder.layers.3") == "text_encoder_2.layers.3"
    assert short_name("denoiser") == "denoiser"


@pytest.mark.parametrize(("name", "magic"), [("p.png", b"\x89PNG\r\n\x1a\n"), ("p.SVG", b"<?xml")])
def test_a_picture_is_whole_and_reproducible(tmp_path: Path, name: str, magic: bytes) -> None:
    result = {"path": "cost$5\x1b.safetensors", "dialect": "kohya", "architecture": "flux", "modules": rows()}
    first, second = tmp_path / f"1{name}", tmp_path / f"2{name}"
    plot(result, first)
    plot(result, second)
    assert first.read_bytes().startswith(magic)
    assert first.stat().st_size > 10_000
    assert first.read_bytes() == second.read_bytes()
    assert sorted(tmp_path.iterdir()) == [first, second]  # no temporary file is left


def test_one_module_without_a_spectrum_is_enough(tmp_path: Path) -> None:
    plot({"path": "a", "modules": [{"site": "denoiser.a", "rank": None, "delta_norm": 0.0}]}, tmp_path / "p.png")
    assert (tmp_path / "p.png").exists()


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="png"):
        check_plot(tmp_path / "p.pdf")
    (tmp_path / "p.png").touch()
    with pytest.raises(OutputExistsError):
        check_plot(tmp_path / "p.png")
    check_plot(tmp_path / "p.png", force=True)
    with pytest.raises(OutputExistsError):
        check_plot(tmp_path / "p.png", [tmp_path / "p.png"], force=True)
    with pytest.raises(UnsupportedError, match="no module"):
        plot({"path": "model", "modules": None}, tmp_path / "q.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        check_plot(tmp_path / "r.png")
    assert caught.value.fix == "pip install 'loratools[plot]'"
    assert caught.value.exit_code == 2


def test_plot_from_the_command_line(run: Any, fake: Any, parsed: Any, page: dict[str, Any], tmp_path: Path) -> None:
    calls = fake("inspect", {**page, "modules": rows()})
    result = run("inspect", "a", "--plot", tmp_path / "p.png", "--json")
    assert result.exit_code == 0
    assert "modules" not in parsed(result)
    assert "wrote" in result.stderr
    assert (calls[0]["modules"], calls[0]["spectrum"]) == (True, True)
    again = run("inspect", "a", "--plot", tmp_path / "p.png")
    assert again.exit_code == 2
    assert "--force" in again.stderr
    assert len(calls) == 1  # refused before the work
    assert run("inspect", "a", "--plot", tmp_path / "p.png", "--force").exit_code == 0
    assert run("inspect", "a", "b", "--plot", tmp_path / "q.png").exit_code == 2

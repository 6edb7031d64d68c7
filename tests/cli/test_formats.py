"""`loratools formats`: the registries as tables, on the terminal and as a page; what a registry does not say is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loratools.cli.formats import FATES, LEGEND, tables
from loratools.cli.reference import formats_page
from loratools.operations.formats import HOLDABLE, conversion, formats

REGISTRIES = {
    "dialects": [
        {"name": "kohya", "title": "sd-scripts", "prefixes": ["lora_unet_", ""], "alpha": "tensor"},
        {"name": "peft", "title": "PEFT", "alpha": "config | folded", "tools": "peft"},
    ],
    "architectures": [
        {"name": "sdxl", "title": "SDXL", "supported": True, "components": ["denoiser", "text_encoder"], "dialects": {"peft": ["denoiser"]}}
    ],
    "kinds": [{"name": "loha", "title": "Hadamard product"}],
    "conversions": {"peft": {"lora": "exact", "loha": "refused"}, "kohya": {"lora": "folded"}},
}


def test_json_is_the_registries(run: Any, fake: Any, parsed: Any) -> None:
    fake("formats", REGISTRIES)
    assert parsed(run("formats", "--json")) == REGISTRIES


def test_terminal_shows_every_entry_and_explains_its_signs(run: Any, fake: Any) -> None:
    fake("formats", REGISTRIES)
    text = run("formats").stdout
    text = " ".join(text.split())
    for words in ("Dialects", "kohya", "peft", "Architectures", "sdxl", "Kinds", "loha", *LEGEND.values()):
        assert words in text


def test_signs_and_words_of_the_kinds() -> None:
    terminal, page = tables(REGISTRIES, page=False)[-1], tables(REGISTRIES, page=True)[-1]
    assert terminal.columns == ("kind", "1", "2")
    assert terminal.rows == [("lora", "f", "="), ("loha", ".", ".")]
    assert page.columns == ("kind", "kohya", "peft")
    assert page.rows == [("lora", "scale folded", "exact"), ("loha", "-", "-")]


def test_names_matrix_tells_all_parts_from_some() -> None:
    sheet = tables(REGISTRIES, page=True)[-2]
    assert sheet.rows == [("sdxl", "-", "part")]


@pytest.mark.parametrize("registries", [{}, {"dialects": [], "conversions": {}}, {"dialects": [{"name": "x"}]}])
def test_missing_keys_are_empty(run: Any, fake: Any, registries: dict[str, Any]) -> None:
    fake("formats", registries)
    assert run("formats").exit_code == 0


def test_a_bar_inside_a_cell_is_no_border(fake: Any) -> None:
    fake("formats", REGISTRIES)
    assert "config \\| folded" in formats_page()


def test_the_committed_page_is_the_generated_one() -> None:
    page = Path(__file__).parents[2] / "docs" / "formats.md"
    assert page.read_text(encoding="utf-8") == formats_page(), "run `make docs`"


def test_every_fate_is_explained() -> None:
    fates = {fate for row in formats()["conversions"].values() for fate in row.values()}
    assert fates <= set(FATES)
    assert {FATES[fate][0] for fate in fates} <= set(LEGEND)


def test_what_a_dialect_holds_is_named() -> None:
    from loratools.mapping.dialects import DIALECTS

    for dialect in DIALECTS.values():
        assert dialect.holds <= set(HOLDABLE), dialect.name
    assert conversion(DIALECTS["kohya"], "tucker") == "exact"
    assert conversion(DIALECTS["diffusers"], "tucker") == "contracted"
    assert conversion(DIALECTS["diffusers"], "loha") == "kind-lora"
    assert conversion(DIALECTS["peft"], "dense") == "refused"
    assert conversion(DIALECTS["comfy"], "lora-bias") == "as-diff_b"
    assert conversion(DIALECTS["xlabs"], "lora") == "folded"

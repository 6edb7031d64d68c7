"""`loratools formats`: the registries as tables, on the terminal and as a page; what a registry does not say is left out."""

from __future__ import annotations

from typing import Any

import pytest

from loratools.cli.formats import tables
from loratools.cli.reference import formats_page

REGISTRIES = {
    "dialects": [
        {"name": "kohya", "title": "sd-scripts", "prefixes": ["lora_unet_", ""], "alpha": "tensor", "kinds": ["lora", "loha"]},
        {"name": "peft", "title": "PEFT", "alpha": "config | folded", "kinds": ["lora"], "tools": "peft"},
    ],
    "architectures": [{"name": "sdxl", "title": "Stable Diffusion XL", "supported": True, "components": ["denoiser"], "variants": []}],
    "kinds": [{"name": "loha", "title": "Hadamard product", "exact_to": ["lora"]}],
    "conversions": {"peft": {"lora": "exact", "loha": "refused"}, "kohya": {"lora": "folded"}},
}


def test_json_is_the_registries(run: Any, fake: Any, parsed: Any) -> None:
    fake("formats", REGISTRIES)
    assert parsed(run("formats", "--json")) == REGISTRIES


def test_tables_show_every_entry(run: Any, fake: Any) -> None:
    fake("formats", REGISTRIES)
    text = run("formats").stdout
    for words in ("Dialects", "kohya", "peft", "Architectures", "sdxl", "yes", "Kinds", "loha", "Conversions", "refused", "folded"):
        assert words in text


def test_conversions_are_a_matrix() -> None:
    sheet = tables(REGISTRIES)[-1]
    assert sheet.columns == ("to", "lora", "loha")
    assert sheet.rows == [("peft", "exact", "refused"), ("kohya", "folded", "-")]


def test_empty_columns_are_left_out() -> None:
    columns = {sheet.title: sheet.columns for sheet in tables(REGISTRIES)}
    assert columns["Architectures"] == ("name", "what", "supported", "components")
    assert "Spelling" not in columns


@pytest.mark.parametrize("registries", [{}, {"dialects": [], "conversions": {}}, {"dialects": [{"name": "x"}]}])
def test_missing_keys_are_empty(run: Any, fake: Any, registries: dict[str, Any]) -> None:
    fake("formats", registries)
    assert run("formats").exit_code == 0


def test_the_page_has_a_row_an_entry(fake: Any) -> None:
    fake("formats", REGISTRIES)
    page = formats_page()
    assert "| kohya | sd-scripts | lora_unet_, (none) | tensor | lora, loha |" in page
    assert "config \\| folded" in page  # a bar inside a cell is no border

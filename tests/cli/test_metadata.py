"""`loratools metadata`: the header changes, the payload does not. Files are made here byte by byte."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest

PAYLOAD = struct.pack("<4f", 1.0, -2.0, float("nan"), 0.5)
ENTRIES = {
    "b.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "a.weight": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
}
METADATA = {"ss_network_dim": "4", "title": "line one\nline two", "ss_train_data_dir": "/home/alice/pictures", "note": "x\x1b[2J"}


def write(path: Path, metadata: dict[str, str], payload: bytes = PAYLOAD) -> Path:
    header = json.dumps({"__metadata__": metadata, **ENTRIES}).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + payload)
    return path


def read(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in.safetensors", METADATA)


def test_it_prints_every_entry(run: Any, parsed: Any, source: Path) -> None:
    found = parsed(run("metadata", source, "--json"))
    assert found["metadata"] == METADATA
    assert (found["path"], found["output"], found["removed"]) == (str(source), None, [])
    assert {entry["key"] for entry in found["private"]} == {"ss_train_data_dir"}
    text = run("metadata", source)
    assert "ss_network_dim" in text.stdout
    assert "x\\x1b[2J" in text.stdout
    assert "\x1b" not in text.stdout
    assert "--strip-private" in text.stderr


def test_get_prints_one_value(run: Any, parsed: Any, source: Path) -> None:
    assert run("metadata", source, "--get", "title").stdout == "line one\nline two\n"
    assert run("metadata", source, "--get", "note", "-q").stdout == "x\\x1b[2J\n"
    assert parsed(run("metadata", source, "--get", "note", "--json"))["metadata"] == {"note": "x\x1b[2J"}
    missing = run("metadata", source, "--get", "titel")
    assert missing.exit_code == 3
    assert "did you mean 'title'" in missing.stderr


def test_edits_change_the_header_alone(run: Any, parsed: Any, source: Path, tmp_path: Path) -> None:
    before, out = source.read_bytes(), tmp_path / "out.safetensors"
    result = run("metadata", source, out, "--set", "title=a=b", "--set", "new=", "--unset", "ss_network_dim", "--strip-private", "--json")
    assert result.exit_code == 0
    header, payload = read(out)
    assert payload == PAYLOAD
    assert source.read_bytes() == before
    assert header.pop("__metadata__") == {"title": "a=b", "note": "x\x1b[2J", "new": ""}
    assert header == ENTRIES
    assert parsed(result)["removed"] == ["ss_network_dim", "ss_train_data_dir"]
    assert parsed(result)["metadata"] == {"title": "a=b", "note": "x\x1b[2J", "new": ""}


def test_stored_hashes_are_those_of_the_result(run: Any, parsed: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "in.safetensors", {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "00000000"})
    out = tmp_path / "out.safetensors"
    found = parsed(run("metadata", source, out, "--set", "ss_a=b", "--json"))["metadata"]
    assert found["sshs_model_hash"] == hashlib.sha256(PAYLOAD).hexdigest()
    assert found["sshs_legacy_hash"] == "e3b0c442"  # of a file under 1 MiB: sha256 of nothing
    assert read(out)[0]["__metadata__"] == found


def test_nothing_is_overwritten(run: Any, source: Path, tmp_path: Path) -> None:
    before, out = source.read_bytes(), tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    assert run("metadata", source, out, "--set", "a=b").exit_code == 2
    assert out.read_bytes() == b"old"
    assert run("metadata", source, out, "--set", "a=b", "--force").exit_code == 0
    assert read(out)[1] == PAYLOAD
    link = tmp_path / "link.safetensors"
    link.symlink_to(source)
    for same in (source, link, source.parent / "." / source.name):
        assert run("metadata", source, same, "--set", "a=b", "--force").exit_code == 2
    assert source.read_bytes() == before


def test_dry_run_shows_and_writes_nothing(run: Any, parsed: Any, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    for outputs in ([out], []):
        result = run("metadata", source, *outputs, "--unset", "title", "--dry-run", "--json")
        assert result.exit_code == 0
        assert parsed(result)["removed"] == ["title"]
    assert not out.exists()
    assert "would write" in run("metadata", source, out, "--dry-run").stdout


def test_an_edit_without_an_output_is_wrong_usage(run: Any, source: Path) -> None:
    for flags in (["--set", "a=b"], ["--unset", "title"], ["--strip-private"]):
        assert run("metadata", source, *flags).exit_code == 2


def test_all_edits_that_cannot_be_made_are_listed(run: Any, parsed: Any, source: Path, tmp_path: Path) -> None:
    result = run("metadata", source, tmp_path / "out", "--unset", "titel", "--unset", "zzz", "--set", "k=\udcff", "--json")
    assert result.exit_code == 3
    assert len(parsed(result)["error"]["details"]) == 3
    assert "did you mean 'title'" in parsed(result)["error"]["details"][0]
    assert not (tmp_path / "out").exists()


def test_a_peft_folder_shows_its_config(run: Any, parsed: Any, tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"], "base_model_name_or_path": "/home/alice/model"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write(folder / "adapter_model.safetensors", {"format": "pt"})
    found = parsed(run("metadata", folder, "--json"))
    assert found["adapter_config"] == config
    assert found["metadata"] == {"format": "pt"}
    assert [entry["key"] for entry in found["private"]] == ["adapter_config.base_model_name_or_path"]
    assert run("metadata", folder, "--get", "lora_alpha").stdout == "8\n"
    refused = run("metadata", folder, tmp_path / "out", "--set", "a=b")
    assert refused.exit_code == 3
    assert "adapter_model.safetensors" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_read_is_3(run: Any, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    assert run("metadata", tmp_path / "cut.safetensors").exit_code == 3
    assert run("metadata", tmp_path / "nothing.safetensors").exit_code == 3

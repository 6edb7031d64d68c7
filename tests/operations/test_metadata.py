"""metadata on real files: get, set, unset, strip; the payload and the input stay as they are."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.errors import InputError, OutputExistsError, UnsupportedError, UsageError
from loratools.operations.metadata import metadata
from tests.operations.made import Save

STEM = "lora_unet_up_blocks_3_attentions_0_proj_in"
ENTRIES = {"ss_network_dim": "4", "modelspec.title": "A title", "ss_train_data_dir": "/home/alice/pictures", "ss_steps": "None"}


@pytest.fixture
def source(save: Save, randn: Callable[..., torch.Tensor]) -> Path:
    tensors = {
        f"{STEM}.lora_up.weight": randn(16, 4, 1, 1, dtype=torch.float16),
        f"{STEM}.lora_down.weight": randn(4, 16, 1, 1, dtype=torch.bfloat16),
        f"{STEM}.alpha": torch.tensor(2.0),
        "not finite": torch.tensor([float("nan"), float("inf")]),
    }
    return save("in.safetensors", tensors, ENTRIES)


def opened(path: Path) -> tuple[dict[str, Any], dict[str, str], bytes]:
    """(tensors' entries, metadata, payload), by hand."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    return header, header.pop("__metadata__", {}), data[end:]


def test_reading_changes_nothing(source: Path, digest: Callable[[Path], str]) -> None:
    before = digest(source)
    result = metadata(source)
    assert result["metadata"] == ENTRIES
    assert (result["output"], result["removed"]) == (None, [])
    assert [entry["key"] for entry in result["private"]] == ["ss_train_data_dir"]
    assert digest(source) == before
    assert os.listdir(source.parent) == ["in.safetensors"]


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ({"set": {"new": "x", "ss_network_dim": "8"}}, {**ENTRIES, "ss_network_dim": "8", "new": "x"}),
        ({"unset": ["ss_steps"]}, {key: value for key, value in ENTRIES.items() if key != "ss_steps"}),
        ({"strip_private": True}, {key: value for key, value in ENTRIES.items() if key != "ss_train_data_dir"}),
        ({"unset": list(ENTRIES)}, {}),
        ({"set": {"json": '{"a": "\\u00e9\\n"}', "": "empty key", "long": "x" * 200_000}}, None),
    ],
)
def test_edits_leave_every_payload_byte(edit: dict[str, Any], expected: dict[str, str] | None, source: Path, tmp_path: Path) -> None:
    """SimpleTuner#2714: an edit of the metadata re-saved the tensors and shipped corrupt files."""
    entries, _, payload = opened(source)
    out = tmp_path / "out.safetensors"
    result = metadata(source, out, **edit)
    new_entries, new_metadata, new_payload = opened(out)
    wanted = {**ENTRIES, **edit["set"]} if expected is None else expected
    assert result["metadata"] == new_metadata == wanted
    assert list(new_metadata) == list(wanted)
    assert (new_entries, list(new_entries), new_payload) == (entries, list(entries), payload)
    assert opened(source)[2] == payload


def test_stored_hashes_follow_the_entries(source: Path, save: Save, tmp_path: Path) -> None:
    """The legacy hash reaches 1 MiB into a file of its ss_ entries alone: a longer entry moves the window."""
    tensors = {"a": torch.arange(600_000, dtype=torch.float32)}
    path = save("large.safetensors", tensors, {"ss_a": "1", "sshs_legacy_hash": "00000000", "sshs_model_hash": "0" * 64})
    out = tmp_path / "out.safetensors"
    found = metadata(path, out, set={"ss_comment": "y" * 5000})["metadata"]
    payload = opened(path)[2]
    assert found["sshs_model_hash"] == hashlib.sha256(payload).hexdigest()
    blob = save("only.safetensors", tensors, {"ss_a": "1", "ss_comment": "y" * 5000}).read_bytes()
    assert found["sshs_legacy_hash"] == hashlib.sha256(blob[0x100000:0x110000]).hexdigest()[:8]
    assert opened(out)[1] == found


def same_file(source: Path, how: str) -> Path:
    if how == "relative":
        return Path(os.path.relpath(source))
    if how == "dots":
        return source.parent / ".." / source.parent.name / source.name
    other = source.with_name(f"{how}.safetensors")
    if how == "symlink":
        other.symlink_to(source)
    elif how == "hard link":
        os.link(source, other)
    return source if how == "path" else other


@pytest.mark.parametrize("how", ["path", "relative", "dots", "symlink", "hard link"])
@pytest.mark.parametrize("force", [False, True])
def test_the_input_is_never_the_output(how: str, force: bool, source: Path, digest: Callable[[Path], str]) -> None:
    """safetensors#762: overwriting a mapped input wrote zeros."""
    before, out = digest(source), same_file(source, how)
    with pytest.raises(OutputExistsError, match="is the input"):
        metadata(source, out, set={"a": "b"}, force=force)
    assert digest(source) == before


def test_refusals_name_what_is_wrong(source: Path, peft: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    with pytest.raises(UsageError, match="output"):
        metadata(source, set={"a": "b"})
    with pytest.raises(InputError) as caught:
        metadata(source, out, unset=["modelspec.titel", "nothing like it"])
    assert "modelspec.title" in caught.value.details[0]
    assert len(caught.value.details) == 2
    folder = peft(
        "folder", {"base_model.model.x.lora_A.weight": torch.ones(1, 2)}, {"r": 1, "base_model_name_or_path": "/home/alice/llama"}
    )
    assert [entry["key"] for entry in metadata(folder)["private"]] == ["adapter_config.base_model_name_or_path"]
    with pytest.raises(UnsupportedError, match="single safetensors"):
        metadata(folder, out, set={"a": "b"})
    assert not out.exists()


def test_dry_run_shows_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    result = metadata(source, tmp_path / "out.safetensors", strip_private=True, dry_run=True)
    assert result["removed"] == ["ss_train_data_dir"]
    assert os.listdir(tmp_path) == ["in.safetensors"]


def test_the_command_line(source: Path, run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert run("metadata", source, "--get", "modelspec.title").stdout == "A title\n"
    assert run("metadata", source, out, "--set", "modelspec.title=B", "--unset", "ss_steps", "--strip-private").exit_code == 0
    assert opened(out)[1] == {"ss_network_dim": "4", "modelspec.title": "B"}
    assert run("metadata", source, out, "--set", "a=b").exit_code == 2
    assert run("metadata", source, source, "--set", "a=b", "--force").exit_code == 2
    assert run("metadata", source, "--get", "nothing").exit_code == 3

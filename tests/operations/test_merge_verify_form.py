"""`merge --verify` and the form of what was written: names, dtypes and shapes. Each defect is told once, all in one go."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.errors import CheckFailed
from loratools.operations.merge import merge
from tests.operations import merge_by_hand as hand
from tests.operations import test_merge_numbers as numbers
from tests.operations import test_merge_scaled as scales
from tests.operations.merge_by_hand import NORM, Q
from tests.operations.test_merge_verify import SIZE, Case, K, damaged, flipped, overwrite

Header = dict[str, dict[str, Any]]


def with_header(path: Path, change: Callable[[Header], None]) -> None:
    """The same bytes of tensors under another header."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def relabelled(key: str, dtype: str) -> Callable[[Path], None]:
    return lambda path: with_header(path, lambda header: header[key].update(dtype=dtype))


@pytest.mark.parametrize("key", [f"{NORM}.weight", f"{K}.weight"], ids=["untouched", "merged"])
@pytest.mark.parametrize(("dtype", "was", "label"), [(torch.float16, "F16", "BF16"), (torch.bfloat16, "BF16", "F16")])
def test_the_same_bytes_under_another_dtype(
    dtype: torch.dtype, was: str, label: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path, dtype)
    damaged(monkeypatch, relabelled(key, label))
    shape = list(case.base[key].shape)
    assert case.found(key) == f"{key}: is {label} {shape}, expected {was} {shape}"


@pytest.mark.parametrize("key", [f"{NORM}.weight", f"{K}.weight"], ids=["untouched", "merged"])
def test_the_same_bytes_in_another_shape(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path, torch.bfloat16)
    shape = [2, case.base[key].numel() // 2]
    damaged(monkeypatch, lambda path: with_header(path, lambda header: header[key].update(shape=shape)))
    assert case.found(key) == f"{key}: is BF16 {shape}, expected BF16 {list(case.base[key].shape)}"


@pytest.mark.parametrize("key", [f"{NORM}.weight", f"{K}.weight"], ids=["untouched", "merged"])
def test_another_name(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor is missing, another was not asked for."""
    case = Case(tmp_path, torch.bfloat16)
    damaged(monkeypatch, lambda path: with_header(path, lambda header: header.update({"stranger": header.pop(key)})))
    with pytest.raises(CheckFailed) as caught:
        case.merge()
    assert caught.value.details == [f"{key}: is missing", "stranger: was not in the base"]


def test_every_defect_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong label keeps nobody from looking at the other tensors."""
    case = Case(tmp_path, torch.bfloat16)

    def change(path: Path) -> None:
        overwrite(path, f"{K}.weight", flipped(7))
        overwrite(path, f"{Q}.bias", flipped(7))
        relabelled(f"{NORM}.weight", "F16")(path)

    damaged(monkeypatch, change)
    told = case.found(f"{NORM}.weight", f"{Q}.bias", f"{K}.weight").splitlines()
    assert [line.split(" ")[0] for line in told] == [f"{NORM}.weight:", f"{Q}.bias:", f"{K}.weight"]


@pytest.mark.parametrize(("leaf", "label"), [("scale_weight", "I32"), ("weight", "F8_E5M2")])
def test_codes_and_scales_under_another_dtype(leaf: str, label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = scales.scaled(*scales.SCALES["scale_weight"])
    adapter = hand.peft(tmp_path / "adapter", numbers.pairs_for(hand.language_model(176, torch.float32), 0.01))
    source = hand.save(tmp_path / "base.safetensors", base)
    damaged(monkeypatch, relabelled(f"{Q}.{leaf}", label))
    with pytest.raises(CheckFailed) as caught:
        merge(source, [(adapter, 1.0)], tmp_path / "out.safetensors", verify=True)
    (line,) = caught.value.details
    assert line.startswith(f"{Q}.{leaf}: is {label} ")


def test_a_large_untouched_tensor_is_looked_at_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one piece of 8 MiB; the last byte of it."""
    case = Case(tmp_path, torch.float32)
    case.base["table"] = torch.zeros(SIZE, 12 * 1024)
    hand.save(case.source, case.base)
    damaged(monkeypatch, lambda path: overwrite(path, "table", lambda data: data[:-1] + bytearray([1])))
    assert "no adapter changes it" in case.found("table")

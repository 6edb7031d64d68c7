"""Refusals that tell all they know."""

import os

import pytest

from loratools.errors import LoraToolsError
from loratools.tensors import atomic
from loratools.tensors.atomic import check_output, write_text_file


def test_the_folder_is_forced_to_disk_after_the_rename(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(atomic, "sync_folder", lambda folder: calls.append((folder, (tmp_path / "x").exists())))
    write_text_file(tmp_path / "x", "y")
    assert calls == [(tmp_path, True)]


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, bytes(data)[:3], offset))
    write_text_file(tmp_path / "x", "hello world")
    assert (tmp_path / "x").read_text() == "hello world"


def test_all_that_is_wrong_with_an_output(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(LoraToolsError) as caught:
        check_output(tmp_path / "x", nbytes=1 << 60)
    assert ["already there" in line or "disk is full" in line for line in caught.value.details] == [True, True]

"""The folder the pages work in: made once, linked for each page."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fixtures import examples


@pytest.fixture(scope="session")
def example_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    examples.write(folder)
    return folder


@pytest.fixture
def workplace(example_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh folder with the example files, and the current one."""
    folder = tmp_path / "here"
    shutil.copytree(example_files, folder, copy_function=os.link)
    monkeypatch.chdir(folder)
    return folder

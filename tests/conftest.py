"""Fixtures for every test."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test sees no LORATOOLS_* option and no colour setting of whoever runs it."""
    for name in list(os.environ):
        if (name.startswith("LORATOOLS_") and name != "LORATOOLS_MANIFESTS") or name in {"NO_COLOR", "FORCE_COLOR", "COLUMNS"}:
            monkeypatch.delenv(name)

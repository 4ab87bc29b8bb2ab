"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real recordings, texts and a small text LM: `SALAD_DATA`, or `../shared/data` beside the checkout."""
    folder = Path(os.environ.get("SALAD_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set SALAD_DATA to its folder")
    return folder

"""A copy of the small dataset that a test may harm."""

from pathlib import Path

import pytest

from tests.helpers.prepped import Small


@pytest.fixture
def made(small: Small, tmp_path: Path) -> Path:
    """A finished dataset to damage."""
    out = tmp_path / "out"
    assert small.run(out).exit_code == 0
    return out

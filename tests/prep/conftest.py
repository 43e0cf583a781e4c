"""Running the shards command on a drawn dataset."""

from pathlib import Path

import pytest
from click.testing import Result

from tests.helpers.prepped import Drawn, Run, Small, run_shards


@pytest.fixture
def prepped(drawn: Drawn) -> Run:
    """Run the command on the drawn dataset with one worker; must succeed."""

    def go(*extra: str, out: str = "out") -> Result:
        result = run_shards(drawn.write(), drawn.folder / "images", drawn.folder / out, "--workers", "1", *extra)
        assert result.exit_code == 0, result.output
        return result

    return go


@pytest.fixture
def made(small: Small, tmp_path: Path) -> Path:
    """A finished dataset to damage."""
    out = tmp_path / "out"
    assert small.run(out).exit_code == 0
    return out

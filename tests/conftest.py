"""What all tests share: where real data lies, and one thread a process so that two test processes fit two cores."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# What prep remembers of its outputs' inputs, away from the user's own.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="jigsaw-tests-")

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers.prepped import Drawn
from tests.helpers.settings import REAL_DATA, SOAK

settings.register_profile("short", max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("soak", max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("soak" if SOAK else "short")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real datasets; the test is skipped, saying so, where it is absent."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real datasets at {REAL_DATA} (set JIGSAW_DATA to a folder that has them)")
    return REAL_DATA


@pytest.fixture
def drawn(tmp_path: Path) -> Drawn:
    """An empty dataset to draw into."""
    (tmp_path / "images").mkdir()
    return Drawn(tmp_path)


LONGEST = (
    "test_killed_ranks",
    "test_torchrun",
    "test_compare",
    "test_ranks",
    "test_remote",
    "test_resume",
    "test_loop",
)
"""The longest files, longest first: begun first, so that none is left for one of two processes at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the order within a file stays."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))

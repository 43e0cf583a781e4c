"""A tiny dataset, and a run on it that the commands share."""

from pathlib import Path

import pytest

from tests.helpers.commands import call
from tests.helpers.jobs import BASE
from tests.helpers.tiny import make_dataset


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder, {"S": [30], "T": [10], "W": [12]})
    return folder


@pytest.fixture(scope="session")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps without workers."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert call("pretrain", "--data", data, "--run", run, "--workers", 0, "--log-digest", *BASE).exit_code == 0
    return run

"""Shards in an object store: the same batches as from a folder, and no more requests than needed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from formats.dataset import Dataset
from formats.errors import UserError
from tests.servers import FaultyProxy
from tests.train.stores import OPTIONS, gets, lines, proxied_store, upload
from tests.train.tiny import make_dataset
from train.access import AHEAD, Access


class Remote:
    """A dataset in a folder and the same one behind the proxy of a store."""

    def __init__(self, folder: Path, url: str, proxy: FaultyProxy, local: Dataset) -> None:
        self.folder, self.url, self.proxy, self.local = folder, url, proxy, local
        self.expected = lines(local)


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    folder = tmp_path_factory.mktemp("remote")
    local = make_dataset(folder, {"S": [25, 14], "T": [11, 9, 3], "W": [20]})
    with proxied_store() as (store, proxy):
        yield Remote(folder, upload(store, folder, "set"), proxy, local)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    ("world", "workers", "start_method"),
    [(world, workers, "fork") for world in (1, 2, 4) for workers in (0, 1, 3)] + [(2, 1, "spawn")],
)
def test_lines_are_those_of_the_folder(
    remote: Remote, tmp_path: Path, world: int, workers: int, start_method: str, cached: bool
) -> None:
    access = Access(cache=tmp_path / "cache" if cached else None)
    # This process uses the store first, and a forked worker all the same builds its own driver.
    dataset = access.open_dataset(remote.url)
    before = len(gets(remote.proxy))
    found = lines(dataset, access, world=world, workers=workers, start_method=start_method, steps=3)
    assert found == remote.expected[:3]
    if cached:
        assert len(gets(remote.proxy)) - before == len(dataset.shards)


def test_forkserver_and_a_resume_on_other_ranks(remote: Remote, tmp_path: Path) -> None:
    access = Access(cache=tmp_path)
    dataset = access.open_dataset(remote.url)
    assert lines(dataset, access, world=1, workers=1, start_method="forkserver", steps=2) == remote.expected[:2]
    assert lines(dataset, access, world=4, workers=1, first=2, steps=2) == remote.expected[2:4]
    assert lines(dataset, access, world=2, workers=3, first=4, steps=1) == remote.expected[4:5]

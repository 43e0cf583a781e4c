"""What all tests share: where real data lies, and one thread a process so that two test processes fit two cores."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# What nobody foresaw is a test's failure, with its traceback.
os.environ["JIGSAW_DEBUG"] = "1"

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers.prepped import Drawn, Small, tree, write_sample
from tests.helpers.settings import REAL_DATA, SOAK

# The same examples every time, so that what fails was broken by the change that is tested. `make soak` draws anew.
settings.register_profile(
    "short", max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
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


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """The first images of coco_small_train (all of them in `make soak`), drawn ones where that is absent."""
    folder = tmp_path_factory.mktemp("small")
    source = REAL_DATA / "coco_small_train"
    if not source.is_dir():
        write_sample(folder, 8)
        source = folder
    lists = json.loads((source / "annotations.json").read_text())
    chosen = lists["images"] if SOAK else lists["images"][:8]
    ids = {image["id"] for image in chosen}
    lists["images"], lists["annotations"] = chosen, [a for a in lists["annotations"] if a["image_id"] in ids]
    (folder / "annotations.json").write_text(json.dumps(lists))
    (folder / "pictures").mkdir()
    for image in chosen:
        shutil.copy(source / "images" / image["file_name"], folder / "pictures")
    made = Small(folder / "annotations.json", folder / "pictures", 60 if SOAK else 12, {})
    result = made.run(folder / "out")
    assert result.exit_code == 0, result.output
    return replace(made, tree=tree(folder / "out"))


@pytest.fixture(scope="session", autouse=True)
def maps_found_once() -> Iterator[None]:
    """Find where each network is cut once in a process: half a second, of which a suite of small runs has hundreds."""
    if "torchvision" not in sys.modules:
        # What needs no network does not pay for importing one.
        yield
        return
    from jigsaw_pretrain.train.models import feature_maps

    find, found = feature_maps._find_maps, {}

    def once(name: str, whole: Any, in_channels: int, pooled: bool) -> Any:
        # Two networks of one name differ in what they print.
        key = (name, repr(whole), in_channels, pooled)
        if key not in found:
            found[key] = find(name, whole, in_channels, pooled)
        return found[key]

    feature_maps._find_maps = once
    yield
    feature_maps._find_maps = find


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files of slow tests first, longest first, so that none is left for one of two processes at the end.

    A file takes what its marks say, each counted once: ``pytestmark`` for the file, a mark on a test for that test.
    The order within a file stays.
    """
    marks: dict[Path, dict[int, float]] = {}
    for item in items:
        for mark in item.iter_markers("slow"):
            marks.setdefault(item.path, {})[id(mark)] = mark.kwargs.get("seconds", 10)
    items.sort(key=lambda item: -sum(marks.get(item.path, {}).values()))

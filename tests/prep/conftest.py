"""Running the shards command on a drawn dataset, and a small dataset that is prepped already."""

import json
import shutil
from dataclasses import replace

import pytest
from click.testing import Result

from tests.helpers.prepped import Drawn, Run, Small, run_shards, tree, write_sample
from tests.helpers.settings import REAL_DATA, SOAK


@pytest.fixture
def prepped(drawn: Drawn) -> Run:
    """Run the command on the drawn dataset with one worker; must succeed."""

    def go(*extra: str, out: str = "out") -> Result:
        result = run_shards(drawn.write(), drawn.folder / "images", drawn.folder / out, "--workers", "1", *extra)
        assert result.exit_code == 0, result.output
        return result

    return go


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

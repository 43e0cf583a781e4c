"""A stranger's dataset: no traceback, no hang, nothing touched outside it, whatever its files say."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset.dataset import open_dataset
from jigsaw_pretrain.prep.commands.finish import finish_command
from jigsaw_pretrain.prep.commands.report import report
from jigsaw_pretrain.prep.commands.shards import shards
from jigsaw_pretrain.prep.commands.status import status
from jigsaw_pretrain.prep.commands.verify import verify
from jigsaw_pretrain.storage.store import Storage
from jigsaw_pretrain.train.cli import main as train
from jigsaw_pretrain.train.data.reader import SOURCE, CropReader, LocalShards
from tests.helpers.attacks import attack, bounded, in_store, listing, withstands
from tests.helpers.commands import run_command
from tests.helpers.prepped import Small, invoke, run_shards, tree, write_sample
from tests.helpers.settings import SOAK

COMMANDS: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "status": lambda out: (status, "--out", out),
    "report": lambda out: (report, "--out", out),
    "verify": lambda out: (verify, "--out", out, "--workers", "1"),
    "finish": lambda out: (finish_command, "--out", out),
}


def read_all(out: str) -> None:
    """What the trainer reads: every crop of every shard."""
    dataset = open_dataset(out)
    reader = CropReader(dataset, LocalShards(dataset), capacity=2, with_keys=True)
    for shard in dataset.shards:
        crops = reader.crops(shard.index)
        reader.keys(crops)
        for crop in crops[SOURCE].tolist():
            pixels = reader.decode(*crop)
            assert pixels is None or pixels.size
    reader.close()


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of three images, and what prep makes of it in out/."""
    folder = tmp_path_factory.mktemp("few")
    write_sample(folder, 3)
    assert Small(folder / "annotations.json", folder / "images", 12, {}).run(folder / "out").exit_code == 0
    return folder


STREAM = [f"--set={one}" for one in ("data.batch=4", "data.lanes=4", "data.template_size=64", "data.template_split=32")]
TRAINING = {
    "digest": ("digest", "--data", "DATA", *STREAM, "--steps", "2"),
    "digest, skipping": ("digest", "--data", "DATA", *STREAM, "--steps", "2", "--on-bad-shard", "skip"),
    "preview": ("preview", "--data", "DATA", *STREAM, "--count", "2", "--out", "OUT/preview.png"),
}


@pytest.mark.parametrize("folder", ["shards", "manifests", "manifests/parts"])
def test_nothing_is_written_through_a_linked_folder(few: Path, tmp_path: Path, folder: str) -> None:
    data, elsewhere = Path(shutil.copytree(few / "out", tmp_path / "data")), tmp_path / "elsewhere"
    (data / folder).rename(elsewhere)
    (data / folder).symlink_to(elsewhere)
    before = listing(tmp_path)
    small = Small(few / "annotations.json", few / "images", 12, {})
    for command, words in (
        (shards, small.arguments(data, "--workers", "1", "--overwrite")),
        (finish_command, ["--out", str(data)]),
        (verify, ["--out", str(data), "--repair"]),
    ):
        result = invoke(command, *words)
        if command is not verify:
            assert result.exit_code == 2 and str(data / folder) in result.output, result.output
        assert listing(tmp_path) == before


@pytest.mark.slow(seconds=15)
# An attack is as small as it can be; shrinking would only cost time.
@settings(max_examples=1000 if SOAK else 110, phases=(Phase.explicit, Phase.generate))
@given(draw=st.data())
def test_any_attack_costs_a_line(few: Path, draw: st.DataObject) -> None:
    # Threads that fetch a shard may write to the cache a moment longer than the command.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch, pytest.MonkeyPatch.context() as patch:
        around = Path(scratch)
        data, out, cache = (around / "a" / name for name in ("data", "out", "cache"))
        patch.setenv("XDG_CACHE_HOME", str(cache))
        out.mkdir(parents=True)
        (around / "victim").write_bytes(b"private")
        shutil.copytree(few / "out", data)
        name = draw.draw(st.sampled_from(["shards", "repair", *COMMANDS, *TRAINING]), label="command")
        at_url = name in TRAINING and draw.draw(st.booleans(), label="at a URL")
        named = "memory://bucket/data" if at_url else str(data)
        words = [{"DATA": named}.get(word, word.replace("OUT/", f"{out}/")) for word in TRAINING.get(name, ("digest",))]
        if at_url and draw.draw(st.booleans(), label="its cache"):
            # What lies in the cache is attacked in place of the dataset.
            in_store(data, named, draw)
            assert run_command(train, *words).exit_code == 0
            done = f"cache: {attack(cache, draw)}"
        else:
            done = attack(data, draw)
            if at_url:
                in_store(data, named, draw)
            with bounded(), np.errstate(all="raise"), contextlib.suppress(UserError):
                read_all(str(data))
        if name in TRAINING:
            withstands(done, train, words, around, (out, cache))
        elif name == "repair":
            named_source = ("--annotations", few / "annotations.json", "--images", few / "images")
            mending = ("--out", data, "--repair", "--workers", "1", *named_source)
            withstands(done, verify, mending, around, (data, cache))
        elif name == "shards":
            small = Small(few / "annotations.json", few / "images", 12, {})
            withstands(done, shards, small.arguments(data, "--workers", "1"), around, (data, cache))
        else:
            command, *options = COMMANDS[name](str(data))
            withstands(done, command, options, around, (data, cache))


def test_a_shrinking_shard_is_named(small: Small, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, data in small.tree.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    dataset = open_dataset(str(out))
    for skip in (False, True):
        reader = CropReader(dataset, LocalShards(dataset), capacity=2, skip_bad=skip)
        crop = reader.crops(0)[SOURCE].tolist()[-1]
        path = out / "shards" / dataset.shards[0].name
        whole = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(1000)
        if skip:
            assert reader.decode(*crop) is None and list(reader.left_out) == [0]
        else:
            with pytest.raises(UserError, match=dataset.shards[0].name):
                reader.decode(*crop)
        path.write_bytes(whole)


def test_a_finished_dataset_is_one_whose_shards_are_there(small: Small, made: Path) -> None:
    assert "nothing to do" in small.run(made).output
    shard = next((made / "shards").iterdir())
    kept = shard.read_bytes()
    shard.write_bytes(kept[:-1])
    refused = small.run(made)
    assert refused.exit_code == 2 and shard.name in refused.output and "nothing to do" not in refused.output
    shard.write_bytes(kept)
    description = made / "manifests" / "dataset.json"
    description.write_text("{}")
    assert small.run(made).exit_code == 0 and tree(made) == small.tree
    (made / "manifests" / "plan.json").unlink()
    foreign = small.run(made)
    assert foreign.exit_code == 2 and "plan.json" in foreign.output


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_annotations_that_are_no_file_are_named(kind: str, small: Small, tmp_path: Path) -> None:
    path = tmp_path / "annotations.json"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    result = run_shards(path, small.images, tmp_path / "out")
    assert result.exit_code == 2 and str(path) in result.output and not (tmp_path / "out").exists()


def test_overwriting_what_another_command_writes_is_refused(small: Small, made: Path) -> None:
    with Storage(made).locked(exclusive=False):
        refused = small.run(made, "--overwrite")
        assert refused.exit_code == 2 and str(made) in refused.output
    assert tree(made) == small.tree
    assert small.run(made, "--overwrite").exit_code == 0 and tree(made) == small.tree

"""Format versions: what was prepped by the first version still trains, and members of the second have margins."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from click.testing import CliRunner

from jigsaw_pretrain.formats.dataset import layout, schema
from jigsaw_pretrain.formats.dataset.dataset import EXTENDED, open_dataset
from jigsaw_pretrain.storage import Storage
from jigsaw_pretrain.train.cli import main
from jigsaw_pretrain.train.data.reader import SOURCE, CropReader, LocalShards
from tests.helpers.jobs import SMALL
from tests.helpers.tiny import make_dataset

FIRST = Path(__file__).parents[1] / "fixtures" / "version-1"


def test_the_first_versions_dataset_gives_the_lines_it_gave() -> None:
    options = ["--batch", "8", "--lanes", "4", "--size", "96", "--split", "32", "--steps", "6"]
    result = CliRunner().invoke(main, ["digest", "--data", str(FIRST), *options], catch_exceptions=False)
    lines = (FIRST / "digest.txt").read_text().splitlines()
    # Pixels are promised under one lock and class of processor only.
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [line.split()[:2] for line in lines]


def test_the_first_versions_dataset_trains(tmp_path: Path) -> None:
    settings = [part for one in (*SMALL, "steps=2") for part in ("--set", one)]
    arguments = ["pretrain", "--data", str(FIRST), "--run", str(tmp_path / "run"), "--workers", "0", *settings]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "backbone.pth").exists()


def test_training_sees_the_crop_and_never_its_members_margin(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, {"S": [9], "T": [4], "W": [5]})
    rng, tables, expected = np.random.default_rng(3), [], []
    for shard in dataset.shards:
        rows = pq.ParquetFile(tmp_path / layout.CROPS).read_row_group(shard.index).to_pylist()
        raw = (tmp_path / layout.SHARDS / shard.name).read_bytes()
        for row in rows:
            left, top, right, bottom = margins = rng.integers(0, 5, 4).tolist()
            row |= dict(zip(schema.MARGINS, margins, strict=True))
            row |= {"left": row["left"] + left, "right": row["right"] - right}
            row |= {"top": row["top"] + top, "bottom": row["bottom"] - bottom}
            whole = simplejpeg.decode_jpeg(raw[row["offset"] : row["offset"] + row["size"]])
            expected.append(whole[top : whole.shape[0] - bottom, left : whole.shape[1] - right])
        tables.append(pa.Table.from_pylist(rows, schema=schema.crops_schema(EXTENDED)))
    storage = Storage(tmp_path)
    storage.publish(layout.CROPS, schema.table_bytes(schema.crops_schema(EXTENDED), tables))
    description = (tmp_path / layout.DATASET).read_bytes().replace(b'"format_version": 1', b'"format_version": 2')
    storage.publish(layout.DATASET, description)
    dataset = open_dataset(str(tmp_path))
    reader = CropReader(dataset, LocalShards(dataset), capacity=3)
    crops = np.concatenate([reader.crops(shard.index) for shard in dataset.shards])
    for crop, pixels in zip(crops, expected, strict=True):
        found = reader.decode(*crop[SOURCE].tolist())
        assert found is not None and np.array_equal(found, pixels)
        assert (crop["width"], crop["height"]) == pixels.shape[1::-1]

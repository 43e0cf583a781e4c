"""Members of the second format version have margins, which training never sees."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg

from jigsaw_pretrain.formats.dataset import layout, schema
from jigsaw_pretrain.formats.dataset.dataset import EXTENDED, open_dataset
from jigsaw_pretrain.storage.store import Storage
from jigsaw_pretrain.train.data.reader import SOURCE, CropReader, LocalShards
from tests.helpers.tiny import make_dataset


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

"""Opening a finished dataset, and what is said of a damaged one."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset import dataset, layout, schema
from jigsaw_pretrain.formats.dataset.dataset import FORMAT_VERSION, CropIndex, Description, open_dataset
from jigsaw_pretrain.storage.store import Storage


def _description(**changes: object) -> Description:
    fields: dict[str, object] = {
        "format_version": FORMAT_VERSION,
        "classes": ["a", "b"],
        "background": 2,
        "seed": 0,
        "plan": "0" * 64,
        "options": {"context": 2.0},
        "versions": {"numpy": "2"},
        "totals": {"crops": 5},
    }
    return Description(**{**fields, **changes})  # type: ignore[arg-type]


def _crop(shard: str, row: int) -> dict[str, object]:
    group, part = layout.parse_shard_name(shard)
    return {
        "key": layout.crop_key(f"image{row}", row, False),
        "image_id": f"image{row}",
        "image_file": f"image{row}.jpg",
        "annotation_id": row,
        "ordinal": row,
        "label": row % 2,
        "group": group,
        "left": 0,
        "top": 0,
        "right": 10 + row,
        "bottom": 10,
        "box_x": 0.0,
        "box_y": 0.0,
        "box_width": 5.0,
        "box_height": 5.0,
        "part": part,
        "shard": shard,
        "offset": 512,
        "size": 100,
    }


def _write(root: Path) -> None:
    storage = Storage(root)
    shards = {"S-000000.tar": 3, "W-000000.tar": 2}
    tables = [pa.Table.from_pylist([_crop(s, i) for i in range(n)], schema.CROPS) for s, n in shards.items()]
    rows = [
        {"name": s, "group": s[0], "part": 0, "crops": n, "bytes": 10240, "sha256": "0" * 64} for s, n in shards.items()
    ]
    storage.publish(layout.CROPS, schema.table_bytes(schema.CROPS, tables))
    storage.publish(layout.SHARD_TABLE, schema.table_bytes(schema.SHARDS, [pa.Table.from_pylist(rows, schema.SHARDS)]))
    storage.publish(layout.DATASET, _description().to_json())


def test_round_trip_and_one_row_group_a_shard(tmp_path: Path) -> None:
    _write(tmp_path)
    dataset = open_dataset(str(tmp_path))
    assert [s.name for s in dataset.shards] == ["S-000000.tar", "W-000000.tar"]
    assert dataset.label_count == 3
    assert [s.crops for s in dataset.of_group("W")] == [2]
    assert dataset.of_group("T") == ()
    rows = CropIndex(dataset).rows(dataset.shards[1])
    assert rows["key"].tolist() == [layout.crop_key(f"image{i}", i, False) for i in range(2)]
    assert (rows["right"] - rows["left"]).tolist() == [10, 11]
    raw = (tmp_path / layout.DATASET).read_bytes() + (tmp_path / layout.SHARD_TABLE).read_bytes()
    assert dataset.fingerprint == hashlib.sha256(raw).hexdigest()


def test_a_table_has_class_names_and_no_word_of_sql(tmp_path: Path) -> None:
    _write(tmp_path)
    table = open_dataset(str(tmp_path)).table()
    assert table.column("class_name").to_pylist() == ["a", "b", "a", "a", "b"]
    assert table.column("aspect_group").to_pylist() == list("SSSWW")
    assert table.column("crop_right").to_pylist() == [10, 11, 12, 10, 11]
    assert not {"group", "left", "right", "offset", "order", "select"} & set(table.column_names)
    background = pa.Table.from_pylist([{**_crop("S-000000.tar", i), "label": 2} for i in range(3)], schema.CROPS)
    whole = pa.Table.from_pylist([_crop("W-000000.tar", i) for i in range(2)], schema.CROPS)
    Storage(tmp_path).publish(layout.CROPS, schema.table_bytes(schema.CROPS, [background, whole]))
    assert open_dataset(str(tmp_path)).table().column("class_name").to_pylist()[:3] == ["background"] * 3


def test_unfinished_dataset_is_refused(tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / layout.DATASET).unlink()
    with pytest.raises(UserError, match="no dataset has been finished"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"format_version": 1}', b'{"format_version": 1, "classes": 3}'])
def test_damaged_description_is_named(tmp_path: Path, content: bytes) -> None:
    _write(tmp_path)
    (tmp_path / layout.DATASET).write_bytes(content)
    with pytest.raises(UserError, match=r"dataset\.json is damaged"):
        open_dataset(str(tmp_path))


def test_other_format_version_is_refused(tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / layout.DATASET).write_bytes(_description(format_version=99).to_json())
    with pytest.raises(UserError, match="format version 99"):
        open_dataset(str(tmp_path))


def test_damaged_shard_table_is_named(tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / layout.SHARD_TABLE).write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"shards\.parquet is damaged"):
        open_dataset(str(tmp_path))


def test_the_index_of_a_dataset_at_a_url_has_a_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path)
    MemoryFileSystem().put(f"{tmp_path}/manifests", "/index/", recursive=True)
    opened = open_dataset("memory://index")
    assert set(CropIndex(opened).rows(opened.shards[0])["label"]) == {0, 1}
    monkeypatch.setattr(dataset, "MOST_BYTES", 0)
    monkeypatch.setattr(dataset, "MOST_ROW_BYTES", 1)
    with pytest.raises(OSError, match="more than the 5 bytes"):
        CropIndex(opened)


def test_a_row_group_that_grows_beyond_its_most_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path)
    rows = pa.Table.from_pylist([{**_crop("S-000000.tar", 0), "key": "x" * 100_000}], schema.CROPS)
    raw = schema.table_bytes(schema.CROPS, [rows])
    assert len(raw) < 20_000
    monkeypatch.setattr(schema, "MOST_TEXT", 50_000)
    monkeypatch.setattr(schema.pq.ParquetFile, "read_row_group", None)
    with pytest.raises(schema.DamagedTable, match="key"):
        schema.read_table(raw, schema.CROPS)

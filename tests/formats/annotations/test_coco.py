"""COCO files: labels, ordinals, what cannot be used, and files that are not what they should be."""

import json
from typing import Any

import numpy as np
import pytest

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.coco import parse, read_coco
from jigsaw_pretrain.formats.annotations.table import Annotations


def read(images: list[Any], annotations: list[Any], categories: list[Any] | None = None) -> Annotations:
    lists = {"images": images, "annotations": annotations, "categories": categories or [{"id": 1, "name": "thing"}]}
    return parse(json.dumps(lists).encode(), "file.json", "")


def image(number: int, name: str, **extra: Any) -> dict[str, Any]:
    return {"id": number, "file_name": name, "width": 100, "height": 80, **extra}


def box(image_id: Any, number: Any = 5, **extra: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image_id, "category_id": 1, "bbox": [1, 2, 3, 4], **extra}


def test_labels_follow_ascending_category_id() -> None:
    found = read([image(1, "a.jpg")], [box(1, category_id=9)], [{"id": 9, "name": "z"}, {"id": 2, "name": "y"}])
    assert found.classes == ("y", "z")
    assert found.label.tolist() == [1]


def test_ordinals_count_all_boxes_of_an_image_in_file_order() -> None:
    found = read([image(1, "a.jpg"), image(2, "b.jpg")], [box(2), box(1), box(2, iscrowd=1), box(2), box(1)])
    assert found.image.tolist() == [1, 0, 1, 1, 0]
    assert found.ordinal.tolist() == [0, 0, 1, 2, 1]
    assert found.crowd.tolist() == [False, False, True, False, False]


def test_one_file_named_twice_is_one_image() -> None:
    found = read([image(1, "a.jpg"), image(2, "./a.jpg")], [box(2), box(1), box(2)])
    assert found.files == ("a.jpg",)
    assert found.ordinal.tolist() == [0, 1, 2]
    assert not found.skipped


def test_one_file_with_two_sizes_loses_the_later_boxes() -> None:
    found = read([image(1, "a.jpg"), image(2, "a.jpg", width=50)], [box(2), box(1)])
    assert found.files == ("a.jpg",)
    assert (found.reason != 0).tolist() == [True, False]


def test_what_cannot_be_used_is_listed() -> None:
    found = read(
        [image(1, "a.jpg"), image(2, "../b.jpg"), image(3, "c.jpg", width=None), image(4, "d.jpg", width=10**6 * 3000)],
        [box(1), box(2), box(3), box(77), box(1, category_id=44), box(1, number=2**63), box(1, bbox=[1, 2, 3])],
    )
    reasons = [(row.image_file, row.reason.split(":")[0]) for row in found.skipped]
    assert reasons == [
        ("../b.jpg", "file name leaves the image folder"),
        ("c.jpg", "image has no usable width and height in the annotation file"),
        ("d.jpg", "image has no usable width and height in the annotation file"),
        (None, "image is not in the annotation file"),
        ("../b.jpg", "image of the box cannot be used"),
        ("c.jpg", "image of the box cannot be used"),
    ]
    assert (found.reason != 0).tolist() == [False, True, True, False]
    assert np.isnan(found.xywh[3]).all()


def test_numbers_that_json_does_not_have_are_read_all_the_same() -> None:
    text = (
        '\ufeff{"images":[{"id":1,"file_name":"a.jpg","width":9,"height":9}],"categories":[{"id":1,"name":"t"}],'
        '"annotations":[{"id":1,"image_id":1,"category_id":1,"bbox":[NaN,1,1e999,2],"segmentation":[[1]]}]}'
    )
    found = parse(text.encode(), "file.json", "")
    assert np.isnan(found.xywh[0, 0]) and np.isinf(found.xywh[0, 2])


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "not whole JSON"),
        (b"[]", "not a COCO annotation file"),
        (b'{"images": []}', "annotations"),
        (b'{"images": [], "annotations": [{"image_id": 1, "category_id": 1, "bbox": ["1"]}]', "not whole JSON"),
        (b'{"images": [], "annotations": [{"image_id": {}, "category_id": 1}], "categories": []}', "$.annotations[0]"),
        (b'{"images": ' + b"[" * 100_000, "file.json"),
        (b"\xff\xd8\xff\xe0", "UTF-8"),
        (b'{"images": [], "annotations": [], "categories": [{"id": ' + b"9" * 5000 + b"}]}", "file.json"),
    ],
)
def test_other_files_end_in_one_line_that_names_the_file(raw: bytes, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(raw, "file.json", "")
    assert said in caught.value.message and "file.json" in caught.value.message
    assert "\n" not in caught.value.message


def test_ids_that_belong_to_two_things_are_refused() -> None:
    with pytest.raises(UserError, match="image id 1"):
        read([image(1, "a.jpg"), image(1, "b.jpg")], [])
    with pytest.raises(UserError, match="category id 1"):
        read([image(1, "a.jpg")], [], [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}])


def test_a_list_that_stands_there_twice_is_refused() -> None:
    whole = b'{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}], "annotations": []}'
    with pytest.raises(UserError, match=r"x.json: 'annotations' stands there 2 times"):
        read_coco(whole, "x.json")
    nested = b'{"info": {"images": 3, "annotations": "none"}, "images": [], "annotations": [], "categories": []}'
    assert read_coco(nested, "x.json").entries == []


def test_lvis_names_come_from_the_url() -> None:
    entry = {"id": 1, "coco_url": "http://images.cocodataset.org/train2017/000000391895.jpg", "width": 9, "height": 9}
    assert read([entry], [box(1)]).files == ("train2017/000000391895.jpg",)

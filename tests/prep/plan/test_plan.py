"""The plan: what it holds, what it depends on, where its parts end."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.coco import parse
from jigsaw_pretrain.formats.annotations.table import Annotations
from jigsaw_pretrain.formats.jigsaw import GROUPS, aspect_group
from jigsaw_pretrain.prep.plan import plan as plans
from jigsaw_pretrain.prep.plan.plan import PlanOptions, make_plan


def scatter(count: int, seed: int = 0, boxes: int = 6) -> dict[str, list[Any]]:
    rng = np.random.default_rng(seed)
    images = [{"id": i, "file_name": f"d/{i}.jpg", "width": 200, "height": 150} for i in range(count)]
    annotations = []
    for number in range(count * boxes):
        x, y, w, h = rng.uniform(0, 150), rng.uniform(0, 100), *rng.uniform(1, 60, 2)
        box = [round(float(v), 2) for v in (x, y, w, h)]
        annotations.append({"id": number, "image_id": number // boxes, "category_id": number % 3, "bbox": box})
    return {"images": images, "annotations": annotations, "categories": [{"id": c, "name": str(c)} for c in range(3)]}


def read(lists: dict[str, list[Any]]) -> Annotations:
    return parse(json.dumps(lists).encode(), "file.json", "")


def test_every_usable_box_is_one_positive_in_its_group() -> None:
    annotations = read(scatter(30))
    plan = make_plan(annotations, PlanOptions(), 0)
    positive = plan.crops.label < plan.background
    assert positive.sum() == 180 and (~positive).sum() == 18
    assert sorted(plan.crops.annotation_id[positive].tolist()) == list(range(180))
    for crop, group in zip(plan.crops.boxes.tolist(), plan.crops.group, strict=True):
        assert GROUPS[group] == aspect_group(crop[2] - crop[0], crop[3] - crop[1])


def test_order_of_images_in_the_file_does_not_matter() -> None:
    lists = scatter(30)
    turned = {
        **lists,
        "images": lists["images"][::-1],
        "annotations": lists["annotations"][90:] + lists["annotations"][:90],
    }
    assert make_plan(read(lists), PlanOptions(), 5).digest == make_plan(read(turned), PlanOptions(), 5).digest


def test_ids_do_not_matter_to_geometry() -> None:
    lists = scatter(10)
    other = json.loads(json.dumps(lists))
    for annotation in other["annotations"]:
        annotation["id"] = 0
    first, second = (make_plan(read(each), PlanOptions(), 5).crops for each in (lists, other))
    assert (first.boxes == second.boxes).all() and (first.member == second.member).all()


def test_seed_and_options_change_the_digest() -> None:
    annotations = read(scatter(10))
    options = PlanOptions()
    variants = [
        options,
        replace(options, context=1.5),
        replace(options, negatives_per_positive=0.2),
        replace(options, crops_per_part=7),
        replace(options, jpeg_quality=90),
        replace(options, subsampling="420"),
        replace(options, exif="apply"),
    ]
    digests = [make_plan(annotations, each, 0).digest for each in variants]
    digests.append(make_plan(annotations, options, 1).digest)
    digests.append(make_plan(annotations, options, -1).digest)
    assert len(set(digests)) == len(digests)
    assert make_plan(annotations, options, 0).digest == digests[0]


def test_a_box_keeps_its_enlargement_when_others_come_and_go() -> None:
    lists = scatter(10)
    fewer = {**lists, "annotations": [a for a in lists["annotations"] if a["image_id"] != 4]}
    first, second = (make_plan(read(each), PlanOptions(negatives_per_positive=0), 0).crops for each in (lists, fewer))
    crop_of = dict(zip(first.annotation_id.tolist(), first.boxes.tolist(), strict=True))
    assert all(crop_of[i] == b for i, b in zip(second.annotation_id.tolist(), second.boxes.tolist(), strict=True))


@pytest.mark.parametrize("limit", [1, 7, 20, 1000])
def test_parts_are_as_full_as_the_limit_lets_them(limit: int) -> None:
    plan = make_plan(read(scatter(30)), PlanOptions(crops_per_part=limit), 0)
    counts = np.diff(plan.first_crop)
    images = np.diff(plan.first_image)
    assert counts.sum() == len(plan.crops) and images.sum() == len(plan.images)
    assert ((counts <= limit) | (images == 1)).all()
    by_image = np.bincount(plan.crops.image)
    next_image = by_image[plan.first_image[1:-1]]
    assert (counts[:-1] + next_image > limit).all()
    for number in range(plan.part_count):
        part_images, crops = plan.part(number)
        assert crops.image.min() == 0 and crops.image.max() == len(part_images) - 1


def test_parts_end_before_64_mb() -> None:
    lists = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 5000, "height": 5000} for i in range(20)],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [0, 0, 5000, 5000]} for i in range(20)],
        "categories": [{"id": 1, "name": "whole"}],
    }
    plan = make_plan(read(lists), PlanOptions(), 0)
    assert np.diff(plan.first_crop).max() <= 5 and plan.part_count <= 7
    assert plan.wanted_negatives == 2 and len(plan.crops) == 20


def test_equal_keys_are_ordered_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    annotations = read(scatter(6))
    monkeypatch.setattr(plans.rng, "keys_of_texts", lambda seed, texts: np.zeros(len(texts), dtype=np.uint64))
    ordered, _ = plans.shuffle(annotations, 0)
    assert list(ordered.ids) == sorted(annotations.ids)


def test_nothing_to_cut_says_why() -> None:
    lists = scatter(2)
    for annotation in lists["annotations"]:
        annotation["iscrowd"] = 1
    with pytest.raises(UserError, match=r"no box that can be used; not used: crowd region \(12\)"):
        make_plan(read(lists), PlanOptions(), 0)
    with pytest.raises(UserError, match="no box"):
        make_plan(read({"images": [], "annotations": [], "categories": []}), PlanOptions(), 0)


def test_background_sizes_follow_the_positives() -> None:
    plan = make_plan(read(scatter(400, boxes=3)), PlanOptions(negatives_per_positive=0.5), 0)
    sizes, positive = plan.crops.sizes.prod(axis=1), plan.crops.label < plan.background
    quartiles = np.percentile(sizes[positive], [25, 50, 75])
    shares = np.diff([0, *((sizes[~positive] <= q).mean() for q in quartiles), 1])
    assert (np.abs(shares - 0.25) < 0.12).all()

"""One truth as COCO, VOC and YOLO with the oddities of people's files: crops are the truth's, the rest is listed.

Pictures come from a small pool and are linked, so a case costs some ten milliseconds. Plans are compared in every case,
the cut members of some.
"""

import itertools
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jigsaw_pretrain.formats.annotations.read import listed, read_annotations
from jigsaw_pretrain.formats.images.decode import decode
from jigsaw_pretrain.formats.images.source import ImageSource
from jigsaw_pretrain.prep.crops import encode_crops
from jigsaw_pretrain.prep.parts import cut_images
from jigsaw_pretrain.prep.pipeline import PrepJob, task_of
from jigsaw_pretrain.prep.plan.plan import PlanOptions, make_plan
from tests.helpers.prepped import ramp
from tests.helpers.settings import SOAK
from tests.helpers.writers import (
    COCO_ODD,
    VOC_ODD,
    YOLO_ODD,
    Box,
    Picture,
    Written,
    odd_coco,
    odd_voc,
    odd_yolo,
)

SIZES = ((64, 48), (40, 61), (57, 33))
SUFFIXES = (".jpg", ".JPG", ".jpeg", ".png", ".PNG")
NAMES = ("no", "b c", "\u6c7d\u8f66", "<&>")
STEMS = ("a", "b.c", "x y", "n/a", "p%20q", "\u00fc")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of each size and kind of file, called by both."""
    folder = tmp_path_factory.mktemp("pool")
    for nth, size in enumerate(SIZES):
        for suffix in SUFFIXES:
            form = "PNG" if suffix.lower() == ".png" else "JPEG"
            Image.fromarray(ramp(*size, seed=nth)).save(folder / f"{nth}{suffix}", format=form, quality=95)
    return folder


@dataclass(frozen=True)
class Truth:
    """Pictures with the pool's files that they are; cut: whether members are cut and compared too."""

    names: tuple[str, ...]
    pictures: tuple[Picture, ...]
    files: tuple[str, ...]
    cut: bool


def truth(seed: int, count: int) -> Truth:
    """A truth of so many pictures, the first of them with an object and of the split ``train``."""
    rng = random.Random(seed)
    names = tuple(rng.sample(NAMES, rng.randint(1, 3)))
    pictures, files = [], []
    for nth, stem in enumerate(rng.sample(STEMS, count)):
        number, suffix = rng.randrange(len(SIZES)), rng.choice(SUFFIXES)
        width, height = SIZES[number]
        # Cells of a grid of 4 x 4 hold a box or a part of one each, so that no two boxes are the same.
        cells = rng.sample(list(itertools.product(range(4), range(4))), 8)
        boxes: list[Box] = []
        for column, row in cells:
            left, top = column * width // 4, row * height // 4
            left, top = left + rng.randint(0, 2), top + rng.randint(0, 2)
            boxes.append((left, top, rng.randint(2, width - left), rng.randint(2, height - top)))
        split = "train" if nth == 0 else rng.choice(("train", "val"))
        things = tuple((rng.choice(names), box) for box in boxes[: rng.randint(not nth, 4)])
        pictures.append(Picture(f"{split}/{stem}", suffix, (width, height), things, tuple(boxes[4:])))
        files.append(f"{number}{suffix}")
    return Truth(names, tuple(pictures), tuple(files), seed % 5 == 0)


Writer = Callable[[Sequence[Picture], Sequence[str], Path, Set[str]], Written]
counter = itertools.count()


@pytest.mark.slow(seconds=20)
@settings(max_examples=5000 if SOAK else 500)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 4),
    coco=st.sets(st.sampled_from(COCO_ODD), max_size=8),
    voc=st.sets(st.sampled_from(VOC_ODD), max_size=8),
    yolo=st.sets(st.sampled_from(YOLO_ODD), max_size=8),
)
def test_three_writers_of_one_truth_give_its_crops_and_list_the_rest(
    pool: Path, seed: int, count: int, coco: set[str], voc: set[str], yolo: set[str]
) -> None:
    drawn = truth(seed, count)
    folder = pool / f"case{next(counter)}"
    images = folder / "yolo" / "images"
    for picture, file in zip(drawn.pictures, drawn.files, strict=True):
        path = images / picture.file
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(pool / file, path)
    writers: tuple[tuple[Writer, Set[str]], ...] = ((odd_coco, coco), (odd_voc, voc), (odd_yolo, yolo))
    for write, odd in writers:
        made = write(drawn.pictures, drawn.names, folder / write.__name__.removeprefix("odd_"), odd)
        check(drawn, made, images, pool)


def check(drawn: Truth, made: Written, images: Path, pool: Path) -> None:
    """The plan of what was written has the truth's objects and lists the rest; so have the members that are cut."""
    options = PlanOptions(context=1, negatives_per_positive=1, **made.reading)
    source = ImageSource(str(images))
    plan = make_plan(listed(read_annotations(str(made.annotations), str(images)), source, options.reading), options, 0)
    used = [picture for picture in drawn.pictures if not (picture.held_out and "split" in made.reading)]
    wanted = Counter((picture.file, name, box) for picture in used for name, box in picture.things)
    files = [plan.images.files[image] for image in plan.crops.image]
    found = Counter(
        (file, plan.classes[label], (left, top, right - left, bottom - top))
        for file, label, (left, top, right, bottom) in zip(
            files, plan.crops.label, plan.crops.boxes.tolist(), strict=True
        )
        if label < plan.background
    )
    assert found == wanted
    assert Counter((row.image_file, row.reason) for row in plan.skipped) == made.lost
    things = [thing for note in plan.notes for thing in note.things]
    assert all(any(thing.endswith(name) for thing in things) for name in made.told), (made.told, things)
    taken = [*made.taken, *((picture.file, box) for picture in used for _, box in picture.things)]
    for file, label, crop in zip(files, plan.crops.label, plan.crops.boxes.tolist(), strict=True):
        if label == plan.background:
            assert not any(other == file and meets(crop, box) for other, box in taken)
    if drawn.cut:
        pixels = {picture.file: pool / file for picture, file in zip(drawn.pictures, drawn.files, strict=True)}
        job = PrepJob(str(made.annotations), str(images), str(images), 0, options)
        for number in range(plan.part_count):
            task = task_of(plan, job, source, number)
            members = cut_images(task).members
            for image, crop, member in zip(task.crops.image.tolist(), task.crops.boxes, members, strict=True):
                file = task.images.files[image]
                whole = decode(
                    pixels[file].read_bytes(), int(task.images.widths[image]), int(task.images.heights[image])
                )
                assert [member] == encode_crops(whole, crop[None], options.jpeg_quality, options.subsampling)


def meets(crop: Sequence[int], box: Box) -> bool:
    """Whether a crop and a box share a pixel."""
    x, y, w, h = box
    return crop[0] < x + w and x < crop[2] and crop[1] < y + h and y < crop[3]

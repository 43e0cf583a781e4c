"""The order of images, and what a detector is shown of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jigsaw_pretrain.detect.annotations import read_ground_truth
from jigsaw_pretrain.detect.data import (
    Augmentation,
    DetectionDataset,
    ImageReader,
    Order,
    ResizeCrop,
    Sample,
    evaluation_transform,
    fit_size,
    load_sample,
    object_mask,
    pasted,
    shared_bytes,
    training_transform,
    transform_boxes,
    transform_pixels,
)
from jigsaw_pretrain.detect.evaluation import evaluate
from jigsaw_pretrain.detect.recipe import (
    ScaledRecipe,
)
from jigsaw_pretrain.detect.run import CONFIG, read_config
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.read import Reading
from jigsaw_pretrain.formats.pixels import RGB8
from tests.helpers.prepped import Drawn
from tests.helpers.sensors import tiles


def tiny_paths(folder: Path) -> tuple[str, str]:
    return str(folder / "train" / "annotations.json"), str(folder / "train" / "images")


PLAN = ScaledRecipe(100, 0, (), 0.02, 80, 133, 0.1, 1.0)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 5))
def test_an_epoch_draws_no_image_twice(count: int, batch: int, seed: int) -> None:
    landscape = np.arange(count) % 3 == 0
    order = Order(landscape, batch, seed)
    drawn = np.concatenate([order.batch(step) for step in range(order.per_epoch)])
    if count >= batch:
        assert len(set(drawn.tolist())) == len(drawn) == count // batch * batch
    again = Order(landscape, batch, seed)
    assert (again.batch(order.per_epoch + 1) == order.batch(order.per_epoch + 1)).all()


def test_batches_are_of_one_orientation_where_they_can_be() -> None:
    landscape = np.arange(1000) % 2 == 0
    order = Order(landscape, 10, 0)
    mixed = [landscape[order.batch(step)].sum() not in (0, 10) for step in range(order.per_epoch)]
    assert sum(mixed) <= 1
    assert (order.batch(0) != order.batch(100)).any()


@given(st.integers(20, 300), st.integers(20, 300), st.integers(0, 2**40), st.booleans())
def test_boxes_follow_their_pixels(width: int, height: int, key: int, jitter: bool) -> None:
    transform = training_transform(width, height, PLAN, 0.5, (0.3, 2.0) if jitter else (0.0, 0.0), key)
    pixels = np.zeros((height, width), dtype=np.uint8)
    box = np.array([[width // 4, height // 4, width // 4 + width // 2, height // 4 + height // 2]], dtype=np.float64)
    pixels[int(box[0, 1]) : int(box[0, 3]), int(box[0, 0]) : int(box[0, 2])] = 255
    drawn = transform_pixels(pixels, transform)
    assert drawn.shape == (transform.out_height, transform.out_width)
    moved, kept = transform_boxes(box, (width, height), transform)
    if not kept[0]:
        return
    ys, xs = np.nonzero(drawn > 127)
    if len(xs):
        tolerance = 1.5 + 0.02 * max(transform.width, transform.height)
        assert np.abs(moved[0] - [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).max() <= tolerance


def test_resizing_keeps_to_both_limits() -> None:
    assert fit_size(640, 480, 800, 1333) == (1067, 800)
    assert fit_size(1000, 200, 800, 1333) == (1333, 267)
    assert evaluation_transform(200, 1000, PLAN) == ResizeCrop(27, 133, 0, 0, 27, 133, False)


def test_masks_and_crowds(tiny_data: Path) -> None:
    read = read_ground_truth(*tiny_paths(tiny_data))
    record = read.images[0]
    left, top, right, bottom = (int(one) for one in record.boxes[0])
    mask = object_mask(record, 0)
    assert mask[top:bottom, left:right].all() and mask.sum() == (right - left) * (bottom - top)
    transform = ResizeCrop(record.width, record.height, 0, 0, record.width, record.height, True)
    reader = ImageReader(tiny_paths(tiny_data)[1], read)
    sample = load_sample(reader, record, 0, transform, True)
    assert sample.masks is not None and sample.masks.shape == (2, record.height, record.width)
    assert (sample.masks[0].numpy() == mask[:, ::-1]).all()
    assert sample.image.shape == (3, record.height, record.width)
    crowded = type(record)(**{**vars(record), "crowd": np.array([True, False])})
    assert len(load_sample(reader, crowded, 0, transform, False).boxes) == 1


@pytest.mark.parametrize(("jitter", "masks"), [((0.0, 0.0), False), ((0.0, 0.0), True), ((0.5, 1.5), True)])
def test_samples_in_shared_memory_are_counted_as_large_as_they_are(
    tiny_data: Path, jitter: tuple[float, float], masks: bool
) -> None:
    read = read_ground_truth(*tiny_paths(tiny_data))
    training = Augmentation(0.5, jitter, 0)
    dataset = DetectionDataset(read, tiny_paths(tiny_data)[1], PLAN, training, masks)
    samples = [dataset[nth, 0, nth] for nth in range(len(read.images))]
    sizes = [one.image.nbytes + (0 if one.masks is None else one.masks.nbytes) for one in samples]
    found = shared_bytes(read, PLAN, RGB8, 2, 3, training=training, masks=masks)
    # Three workers read two batches of two each ahead; one is in use, one just received. Jitter may cut objects away.
    assert np.mean(sizes) * 16 + max(sizes) <= found * (1.02 if jitter[1] == 0 else 1)
    assert jitter[1] > 0 or found <= 1.02 * (np.mean(sizes) * 16 + max(sizes))
    assert shared_bytes(read, PLAN, RGB8, 2, 0, training=training, masks=masks) == 0


def test_images_that_do_not_fit_their_annotations_are_named(tiny_data: Path, tmp_path: Path) -> None:
    read = read_ground_truth(*tiny_paths(tiny_data))
    record = read.images[0]
    transform = evaluation_transform(record.width, record.height, PLAN)
    reader = ImageReader(str(tmp_path), read)
    for raw, said in ((None, "missing"), (b"no image", "not an image"), (b"", "empty")):
        if raw is not None:
            (tmp_path / record.file_name).write_bytes(raw)
        with pytest.raises(UserError, match=said) as caught:
            load_sample(reader, record, 0, transform, False)
        assert f"{tmp_path}/{record.file_name}" in caught.value.message
    wrong = type(record)(**{**vars(record), "width": 5})
    with pytest.raises(UserError, match="size disagrees"):
        load_sample(ImageReader(tiny_paths(tiny_data)[1], read), wrong, 0, transform, False)


def test_pasted_objects_cover_what_lies_below(tiny_data: Path) -> None:
    def sample(*boxes: tuple[int, int, int, int], value: int) -> Sample:
        masks = torch.zeros(len(boxes), 20, 20, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
            mask[top:bottom, left:right] = 1
        image = torch.full((3, 20, 20), value, dtype=torch.uint8)
        return Sample(0, image, torch.tensor(boxes).float(), torch.full((len(boxes),), value), masks)

    base = sample((0, 0, 10, 10), (12, 12, 14, 14), (0, 15, 5, 20), value=1)
    other = sample((5, 0, 15, 15), (0, 0, 3, 3), value=2)
    found = pasted(base, other, torch.tensor([True, False]))
    assert found.masks is not None
    # The first keeps its left half, the second is covered whole, the third is untouched, one of the others is added.
    assert found.boxes.tolist() == [[0, 0, 5, 10], [0, 15, 5, 20], [5, 0, 15, 15]] and found.labels.tolist() == [
        1,
        1,
        2,
    ]
    assert int(found.image.sum()) == 3 * (400 + 150) and int(found.masks.sum()) == 50 + 25 + 150
    assert pasted(base, other, torch.tensor([False, False])) is base
    read = read_ground_truth(*tiny_paths(tiny_data))
    changed = []
    for paste in (0.0, 1.0):
        augmentation = Augmentation(0.5, (0.5, 1.5), 7, paste)
        dataset = DetectionDataset(read, tiny_paths(tiny_data)[1], PLAN, augmentation, masks=False)
        samples = [dataset[(nth, 0, nth)] for nth in range(6)]
        assert all(one.masks is None for one in samples)
        changed.append(samples)
    assert any(not torch.equal(one.image, more.image) for one, more in zip(*changed, strict=True))
    again = dataset[(2, 0, 2)]
    assert torch.equal(again.image, changed[1][2].image) and torch.equal(again.boxes, changed[1][2].boxes)


@pytest.mark.slow(seconds=2)
def test_missing_data_is_refused_until_it_is_named_and_then_left_out_and_filled(
    drawn: Drawn, detect: Callable[..., Any], plain_runs: None
) -> None:
    file, images = tiles(drawn, -9999.0, count=20, affected=4), drawn.folder / "images"
    flags = ["--annotations", str(file), "--images", str(images), "--val-annotations", str(file)]
    flags += ["--val-images", str(images)]
    settings = {"model": "retinanet", "norm": "gn", "steps": 1}
    run = drawn.folder / "run"
    said = detect(run, *flags, expect=2, **settings).output
    assert "--nodata -9999" in said and not (run / CONFIG).exists()
    detect(run, *flags, "--nodata", "-9999", **settings)
    config = read_config(run)
    assert config.mean == pytest.approx((300, 300), abs=3) and config.std == pytest.approx((15, 15), abs=1.5)
    truth = read_ground_truth(str(file), str(images), Reading(nodata="-9999"))
    reader = ImageReader(str(images), truth, config.pixels)
    assert min(float(reader.read(record).min()) for record in truth.images) > 200
    # The run's own images are read as it read them; others must be named again.
    assert evaluate(run, workers=0, out=drawn.folder / "ap").boxes.stats
    with pytest.raises(UserError, match="--nodata -9999"):
        evaluate(run, file, images, workers=0, out=drawn.folder / "ap")
    said = detect(run, *flags, "--resume", expect=2, **settings).output
    assert "--nodata -9999" in said

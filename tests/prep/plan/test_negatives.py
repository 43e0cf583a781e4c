"""Background boxes: how many, where, of which sizes; two ways of testing a place against brute force."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jigsaw_pretrain import rng
from jigsaw_pretrain.prep.plan import negatives


def touches(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1]))


def scene(seed: int, boxes_by_image: list[int], side: int) -> tuple[np.ndarray, np.ndarray, negatives.Obstacles]:
    rng = np.random.default_rng(seed)
    image = np.repeat(np.arange(len(boxes_by_image)), boxes_by_image)
    corner = rng.integers(0, side - 1, (len(image), 2))
    far = np.minimum(corner + rng.integers(1, side // 2, (len(image), 2)), side)
    boxes = np.concatenate([corner, far], axis=1).astype(np.int32)
    sizes = np.full(len(boxes_by_image), side)
    shuffled = rng.permutation(len(image))
    return image, boxes, negatives.obstacles(image[shuffled], boxes[shuffled], sizes, sizes)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, 6), min_size=1, max_size=12), st.floats(0, 2))
def test_no_negative_touches_anything(seed: int, boxes_by_image: list[int], ratio: float) -> None:
    image, boxes, found = scene(seed, boxes_by_image, 40)
    due = negatives.shares(np.array(boxes_by_image), ratio)
    keys = rng.derive_key(seed, np.arange(len(boxes_by_image)))
    placed = negatives.place(found, keys, due, boxes[:, 2:] - boxes[:, :2])
    assert placed.wanted == int(np.floor(ratio * len(boxes) + 0.5)) == due.sum()
    assert len(placed.image) <= placed.wanted
    sizes = {tuple(size) for size in boxes[:, 2:] - boxes[:, :2]}
    for where, box in zip(placed.image, placed.boxes, strict=True):
        assert 0 <= box[0] < box[2] <= 40 and 0 <= box[1] < box[3] <= 40
        assert tuple(box[2:] - box[:2]) in sizes
        assert not any(touches(box, other) for other in boxes[image == where])
    for where in np.unique(placed.image):
        assert placed.ordinal[placed.image == where].tolist() == list(range((placed.image == where).sum()))


def test_map_and_pairs_find_the_same_places() -> None:
    _, boxes, found = scene(3, [9, 0, 30], 50)
    rng = np.random.default_rng(0)
    size = rng.integers(1, 12, (200, 2)).astype(np.int32)
    left, top = rng.integers(0, 38, (2, 200, negatives.PLACES)).astype(np.int32)
    for image in (0, 2):
        where = np.full(200, image)
        by_pairs = negatives._free_by_pairs(found, where, left, top, size)
        by_map = negatives._free_by_map(found, image, left, top, size)
        assert (by_pairs == by_map).all() and 0 < by_map.mean() < 1
        mine = found.boxes[found.starts[image] : found.starts[image + 1]]
        for row, place in ((0, 0), (5, 3), (77, 1)):
            corner = np.array([left[row, place], top[row, place]])
            box = np.concatenate([corner, corner + size[row]])
            assert by_map[row, place] == (not any(touches(box, other) for other in mine))


def test_full_images_hand_their_share_on() -> None:
    boxes = np.array([[0, 0, 50, 50]] * 40 + [[0, 0, 10, 10]], dtype=np.int32)
    image = np.array([0] * 40 + [1])
    side = np.array([50, 50])
    found = negatives.obstacles(image, boxes, side, side)
    small = np.array([[8, 8]], dtype=np.int32)
    placed = negatives.place(found, rng.derive_key(0, np.arange(2)), negatives.shares(np.array([40, 1]), 0.1), small)
    assert placed.image.tolist() == [1] * 4
    assert len({tuple(box) for box in placed.boxes.tolist()}) == 4


def test_a_dataset_without_room_falls_short_quickly() -> None:
    side = np.full(20, 50)
    boxes = np.tile(np.array([[0, 0, 50, 50]], dtype=np.int32), (20_000, 1))
    image = np.repeat(np.arange(20), 1000)
    found = negatives.obstacles(image, boxes, side, side)
    placed = negatives.place(found, rng.derive_key(0, np.arange(20)), np.full(20, 100), np.ones((1, 2), dtype=np.int32))
    assert placed.wanted == 2000 and len(placed.image) == 0


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.floats(0, 3))
def test_shares_add_up(positives: list[int], ratio: float) -> None:
    due = negatives.shares(np.array(positives), ratio)
    assert (due >= 0).all() and due.sum() == int(np.floor(sum(positives) * ratio + 0.5))

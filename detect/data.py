"""Images with their targets, from a COCO file and a folder, as the detector takes them.

One worker process reads and resamples about 60 images of 640 x 480 a second at 800 pixels. Batches come in order for
any number of workers; what a batch holds depends on (seed, step) alone (detect/order.py, detect/views.py).
"""

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask as rle
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from jigsaw_pretrain import rng
from jigsaw_pretrain.detect.annotations import Annotations, Photo
from jigsaw_pretrain.detect.order import Order
from jigsaw_pretrain.detect.scaling import Plan
from jigsaw_pretrain.detect.views import View, drawn_view, still_view, view_boxes, view_pixels
from jigsaw_pretrain.errors import UserError


@dataclass(frozen=True)
class Sample:
    """image: uint8 [3, h, w], RGB. boxes: float32 [n, 4]; labels: int64 [n], 0..C-1; masks: uint8 [n, h, w] or None.

    index: the photo's place in the annotations.
    """

    index: int
    image: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor | None


def read_photo(folder: Path, photo: Photo) -> npt.NDArray[np.uint8]:
    """The stored pixels as uint8 [height, width, 3], RGB, not rotated by EXIF (COCO boxes refer to stored pixels)."""
    path = folder / photo.file_name
    try:
        raw = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): is it the folder of these annotations?") from error
    pixels = cv2.imdecode(raw, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION) if raw.size else None
    if pixels is None:
        raise UserError(f"{path} is not an image that can be decoded: replace it, or take it out of the annotations")
    if pixels.shape[:2] != (photo.height, photo.width):
        raise UserError(
            f"{path} is {pixels.shape[1]} x {pixels.shape[0]} pixels, its annotations say {photo.width} x "
            f"{photo.height}: its boxes refer to another picture; mend one of the two"
        )
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def object_mask(photo: Photo, which: int) -> npt.NDArray[np.uint8]:
    """0/1 mask [height, width] of one object: its segmentation, or its whole box where it has none."""
    segmentation = photo.segmentations[which]
    if segmentation is None:
        mask = np.zeros((photo.height, photo.width), dtype=np.uint8)
        left, top, right, bottom = photo.boxes[which]
        mask[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] = 1
        return mask
    if isinstance(segmentation, list):
        encoded = rle.merge(rle.frPyObjects(segmentation, photo.height, photo.width))
    elif isinstance(segmentation["counts"], list):
        encoded = rle.frPyObjects(segmentation, photo.height, photo.width)
    else:
        encoded = segmentation
    return np.asarray(rle.decode(encoded), dtype=np.uint8)


def seen(folder: Path, photo: Photo, index: int, view: View, with_masks: bool) -> Sample:
    """A photo through a view; crowd regions are no objects to learn."""
    image = torch.from_numpy(view_pixels(read_photo(folder, photo), view)).permute(2, 0, 1).contiguous()
    boxes, kept = view_boxes(photo.boxes, (photo.width, photo.height), view)
    kept &= ~photo.crowd
    masks: Tensor | None = None
    if with_masks:
        drawn = [view_pixels(object_mask(photo, int(i)), view) for i in np.flatnonzero(kept)]
        shape = (0, view.out_height, view.out_width)
        masks = torch.from_numpy(np.stack(drawn) if drawn else np.zeros(shape, dtype=np.uint8))
    return Sample(index, image, torch.from_numpy(boxes[kept]).float(), torch.from_numpy(photo.labels[kept]), masks)


@dataclass(frozen=True)
class Augmentation:
    """flip: probability; jitter: range of large-scale jitter, (0, 0) for none; key: of the stream of draws."""

    flip: float
    jitter: tuple[float, float]
    key: int


class Views(Dataset[Sample]):
    """Samples by (photo, step, place in the batch); without an augmentation the still view."""

    def __init__(
        self, annotations: Annotations, folder: Path, plan: Plan, augmentation: Augmentation | None, masks: bool
    ) -> None:
        self._photos = annotations.photos
        self._folder = folder
        self._plan = plan
        self._augmentation = augmentation
        self._masks = masks

    def __len__(self) -> int:
        return len(self._photos)

    def __getitem__(self, where: tuple[int, int, int]) -> Sample:
        index, step, place = where
        photo = self._photos[index]
        if self._augmentation is None:
            view = still_view(photo.width, photo.height, self._plan)
        else:
            key = int(rng.derive_key(self._augmentation.key, step, place)[0])
            view = drawn_view(
                photo.width, photo.height, self._plan, self._augmentation.flip, self._augmentation.jitter, key
            )
        return seen(self._folder, photo, index, view, self._masks)


class _Steps:
    """The batches of one rank from a step on: the DataLoader's batch sampler."""

    def __init__(self, order: Order, first: int, last: int, rank: int, share: int) -> None:
        self._order, self._first, self._last, self._rank, self._share = order, first, last, rank, share

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for step in range(self._first, self._last):
            indices = self._order.batch(step)
            start = self._rank * self._share
            yield [(int(indices[place]), step, place) for place in range(start, start + self._share)]

    def __len__(self) -> int:
        return self._last - self._first


def _quiet_worker(_: int) -> None:
    """A worker leaves signals to its parent and does not start threads of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _as_list(samples: list[Sample]) -> list[Sample]:
    return samples


def training_batches(views: Views, order: Order, steps: range, rank: int, share: int, workers: int) -> Any:
    """An iterable of lists of ``share`` samples: this rank's part of each global batch of ``steps``."""
    sampler = _Steps(order, steps.start, steps.stop, rank, share)
    return DataLoader(
        views,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_as_list,
        worker_init_fn=_quiet_worker,
    )


def validation_batches(views: Views, indices: list[int], batch: int, workers: int) -> Any:
    """An iterable of lists of samples: the still views of these photos, in order."""
    chunks = [[(index, 0, 0) for index in indices[at : at + batch]] for at in range(0, len(indices), batch)]
    return DataLoader(
        views,
        batch_sampler=chunks,
        num_workers=workers,
        collate_fn=_as_list,
        worker_init_fn=_quiet_worker,
    )

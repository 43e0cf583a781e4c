"""Which images form batch ``step``: a pure function of (seed, step), so resuming needs the step alone.

Each epoch is its own permutation, cut into batches of images that lie or that stand (padding both to one size wastes
up to half of a batch), with mixed ones from what is left over; what does not fill a batch is left to the next epoch's
permutation. An epoch of 118,287 images is ordered in about 20 ms and kept until the next.

How an image is placed in what the detector sees: resize, large-scale jitter, flip. Pure geometry, then pixels.

A view is a scaling of the whole image, a window of the result (cut or zero-padded) and a flip; boxes and masks follow
it. Training draws a view from (seed, step, place in the batch), so no worker, rank or resumption changes it.
Pixels are resampled by OpenCV, averaging areas where they shrink.

Images with their targets, from a COCO file and a folder, as the detector takes them.

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
from jigsaw_pretrain.detect.annotations import GroundTruth, ImageRecord
from jigsaw_pretrain.detect.recipe import ScaledRecipe
from jigsaw_pretrain.errors import UserError


class Order:
    """Batches of indices into ``lying`` (bool [n]: wider than high)."""

    def __init__(self, lying: npt.NDArray[np.bool_], batch: int, seed: int) -> None:
        self._lying = lying
        self._batch = batch
        self._key = rng.key_of_text(seed, "detector's order of images")
        self.per_epoch = max(1, len(lying) // batch)
        self._epoch = -1
        self._batches: npt.NDArray[np.int64] = np.zeros((0, batch), dtype=np.int64)

    def batch(self, step: int) -> npt.NDArray[np.int64]:
        """The image indices of one global batch, int64 [batch]."""
        epoch = step // self.per_epoch
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._order(epoch)
        return self._batches[step % self.per_epoch]

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        count = len(self._lying)
        key = rng.derive_key(self._key, epoch)
        order = rng.permutation(rng.derive_key(key, 0), count)
        if count < self._batch:
            return np.resize(order, (1, self._batch))
        groups, left = [], []
        for side in (True, False):
            of_side = order[self._lying[order] == side]
            whole = len(of_side) // self._batch * self._batch
            groups.append(of_side[:whole].reshape(-1, self._batch))
            left.append(of_side[whole:])
        rest = np.concatenate(left)
        groups.append(rest[: len(rest) // self._batch * self._batch].reshape(-1, self._batch))
        batches = np.concatenate(groups)
        return batches[rng.permutation(rng.derive_key(key, 1), len(batches))]


@dataclass(frozen=True)
class ResizeCrop:
    """width, height: of the resized image; left, top: the window's corner in it; out_width, out_height: the window."""

    width: int
    height: int
    left: int
    top: int
    out_width: int
    out_height: int
    flip: bool


def fitted(width: int, height: int, short_side: int, long_side: int) -> tuple[int, int]:
    """Width and height with the short side at ``short_side``, unless the long one would pass ``long_side``."""
    scale = min(short_side / min(width, height), long_side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def still_view(width: int, height: int, plan: ScaledRecipe) -> ResizeCrop:
    """The view of evaluation: resized, neither cut nor flipped."""
    w, h = fitted(width, height, plan.short_side, plan.long_side)
    return ResizeCrop(w, h, 0, 0, w, h, False)


def drawn_view(
    width: int, height: int, plan: ScaledRecipe, flip: float, jitter: tuple[float, float], key: int
) -> ResizeCrop:
    """The view of training drawn from ``key``: flipped with probability ``flip``; ``jitter`` (0, 0) for none.

    With jitter the image is fitted into the plan's square, scaled by a ratio from U[jitter], and the square is filled
    from a random place of it, padded at the right and bottom where it is smaller.
    """
    raw = rng.uniform(rng.random_u64(key, 4))[0]
    flipped = bool(raw[0] < flip)
    w, h = fitted(width, height, plan.short_side, plan.long_side)
    if jitter[1] <= 0:
        return ResizeCrop(w, h, 0, 0, w, h, flipped)
    ratio = jitter[0] + (jitter[1] - jitter[0]) * raw[1]
    w, h = max(1, round(w * ratio)), max(1, round(h * ratio))
    left = int(raw[2] * (max(0, w - plan.short_side) + 1))
    top = int(raw[3] * (max(0, h - plan.long_side) + 1))
    return ResizeCrop(w, h, left, top, plan.short_side, plan.long_side, flipped)


def view_pixels(pixels: npt.NDArray[np.uint8], view: ResizeCrop) -> npt.NDArray[np.uint8]:
    """uint8 [height, width, 3] or [height, width] -> the view's window, padded with zeros."""
    shrinks = view.width * view.height < pixels.shape[0] * pixels.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    if (view.height, view.width) != pixels.shape[:2]:
        pixels = np.asarray(cv2.resize(pixels, (view.width, view.height), interpolation=method), dtype=np.uint8)
    window = pixels[view.top : view.top + view.out_height, view.left : view.left + view.out_width]
    if window.shape[:2] != (view.out_height, view.out_width):
        padded = np.zeros((view.out_height, view.out_width, *pixels.shape[2:]), dtype=np.uint8)
        padded[: window.shape[0], : window.shape[1]] = window
        window = padded
    return np.ascontiguousarray(window[:, ::-1] if view.flip else window)


def view_boxes(
    boxes: npt.NDArray[np.float64], size: tuple[int, int], view: ResizeCrop
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Boxes [n, 4] of an image of ``size`` (width, height) in the view, and which keep at least a pixel there."""
    factor = np.array([view.width / size[0], view.height / size[1]] * 2)
    moved = boxes * factor - np.array([view.left, view.top] * 2)
    moved = np.clip(moved, 0, np.array([view.out_width, view.out_height] * 2))
    if view.flip:
        moved = np.stack((view.out_width - moved[:, 2], moved[:, 1], view.out_width - moved[:, 0], moved[:, 3]), axis=1)
    kept = (moved[:, 2] - moved[:, 0] >= 1) & (moved[:, 3] - moved[:, 1] >= 1)
    return moved, kept


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


def read_photo(folder: Path, photo: ImageRecord) -> npt.NDArray[np.uint8]:
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


def object_mask(photo: ImageRecord, which: int) -> npt.NDArray[np.uint8]:
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


def load_sample(folder: Path, photo: ImageRecord, index: int, view: ResizeCrop, with_masks: bool) -> Sample:
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


class DetectionDataset(Dataset[Sample]):
    """Samples by (photo, step, place in the batch); without an augmentation the still view."""

    def __init__(
        self, annotations: GroundTruth, folder: Path, plan: ScaledRecipe, augmentation: Augmentation | None, masks: bool
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
        return load_sample(self._folder, photo, index, view, self._masks)


class _StepDataset:
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


def training_batches(views: DetectionDataset, order: Order, steps: range, rank: int, share: int, workers: int) -> Any:
    """An iterable of lists of ``share`` samples: this rank's part of each global batch of ``steps``."""
    sampler = _StepDataset(order, steps.start, steps.stop, rank, share)
    return DataLoader(
        views,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_as_list,
        worker_init_fn=_quiet_worker,
    )


def validation_batches(views: DetectionDataset, indices: list[int], batch: int, workers: int) -> Any:
    """An iterable of lists of samples: the still views of these photos, in order."""
    chunks = [[(index, 0, 0) for index in indices[at : at + batch]] for at in range(0, len(indices), batch)]
    return DataLoader(
        views,
        batch_sampler=chunks,
        num_workers=workers,
        collate_fn=_as_list,
        worker_init_fn=_quiet_worker,
    )

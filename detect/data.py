"""The detector's data: which images form a batch, how an image is transformed, and the loaders that read them.

- *Order.* Batch ``step`` is a pure function of (seed, step), so resuming needs the step alone. Each epoch is its own
  permutation, cut into batches of landscape or of portrait images (padding both to one size wastes up to half of a
  batch), with mixed ones from what is left over; what does not fill a batch is left to the next epoch's permutation.
  An epoch of 118,287 images is ordered in about 20 ms and kept until the next.
- *Transform.* The whole image is resized (with large-scale jitter if asked for), a window of the result is cut out or
  zero-padded, and it is flipped; boxes and masks follow. Training draws a transform from (seed, step, place in the
  batch), so no worker, rank or resumption changes it. OpenCV resamples, averaging areas where images shrink.
- *Loading.* Batches come in order for any number of workers. One worker process reads and resamples about 60 images of
  640 x 480 per second at 800 pixels.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from jigsaw_pretrain.formats.images.decode import ImageError, decode_raster, fill_missing
from jigsaw_pretrain.formats.images.nodata import check_nodata
from jigsaw_pretrain.formats.images.pixel_format import SAMPLE
from jigsaw_pretrain.formats.images.source import ImageSource
from jigsaw_pretrain.formats.pixels import RGB8, Array, PixelFormat, missing_value
from jigsaw_pretrain.train.data.loader import (
    end_workers,
    leave_signals_to_rank,
    next_from_workers,
    start_workers,
    worker_context,
)


class Order:
    """Batches of indices into ``landscape`` (bool [n]: wider than high)."""

    def __init__(self, landscape: npt.NDArray[np.bool_], batch: int, seed: int) -> None:
        self._landscape = landscape
        self._batch = batch
        self._key = rng.key_of_text(seed, "detector's order of images")
        self.per_epoch = max(1, len(landscape) // batch)
        self._epoch = -1
        self._batches: npt.NDArray[np.int64] = np.zeros((0, batch), dtype=np.int64)

    def batch(self, step: int) -> npt.NDArray[np.int64]:
        """The image indices of one global batch, int64 [batch]."""
        epoch = step // self.per_epoch
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._order(epoch)
        return self._batches[step % self.per_epoch]

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        count = len(self._landscape)
        key = rng.derive_key(self._key, epoch)
        order = rng.permutation(rng.derive_key(key, 0), count)
        if count < self._batch:
            return np.resize(order, (1, self._batch))
        groups, left = [], []
        for side in (True, False):
            of_side = order[self._landscape[order] == side]
            whole = len(of_side) // self._batch * self._batch
            groups.append(of_side[:whole].reshape(-1, self._batch))
            left.append(of_side[whole:])
        rest = np.concatenate(left)
        groups.append(rest[: len(rest) // self._batch * self._batch].reshape(-1, self._batch))
        batches = np.concatenate(groups)
        return batches[rng.permutation(rng.derive_key(key, 1), len(batches))]


@dataclass(frozen=True)
class ResizeCrop:
    """A window of a resized image.

    width, height: of the resized image; left, top: the window's corner in it; out_width, out_height: the window.
    """

    width: int
    height: int
    left: int
    top: int
    out_width: int
    out_height: int
    flip: bool


def fit_size(width: int, height: int, short_side: int, long_side: int) -> tuple[int, int]:
    """Width and height with the short side at ``short_side``, unless the long one would pass ``long_side``."""
    scale = min(short_side / min(width, height), long_side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def evaluation_transform(width: int, height: int, plan: ScaledRecipe, short_side: int | None = None) -> ResizeCrop:
    """The transform of evaluation: resized, neither cut nor flipped; ``short_side`` in place of the plan's."""
    w, h = fit_size(width, height, *_sides(plan, short_side))
    return ResizeCrop(w, h, 0, 0, w, h, False)


def _sides(plan: ScaledRecipe, short_side: int | None) -> tuple[int, int]:
    """Short and long side where the short one is ``short_side``; one above the plan's takes the long one along."""
    if short_side is None:
        return plan.short_side, plan.long_side
    return short_side, max(plan.long_side, round(plan.long_side * short_side / plan.short_side))


def training_transform(
    width: int, height: int, plan: ScaledRecipe, flip: float, jitter: tuple[float, float], key: int
) -> ResizeCrop:
    """The transform of training, drawn from ``key``: flipped with probability ``flip``; ``jitter`` (0, 0) for none.

    In multi-scale training the short side is one of the plan's.

    With jitter the image is fitted into the plan's square, scaled by a ratio from U[jitter], and the square is filled
    from a random place of it, padded at the right and bottom where it is smaller.
    """
    raw = rng.uniform(rng.random_u64(key, 4))[0]
    flipped = bool(raw[0] < flip)
    chosen = None
    if plan.train_short_sides:
        chosen = plan.train_short_sides[int(raw[1] * len(plan.train_short_sides))]
    w, h = fit_size(width, height, *_sides(plan, chosen))
    if jitter[1] <= 0:
        return ResizeCrop(w, h, 0, 0, w, h, flipped)
    ratio = jitter[0] + (jitter[1] - jitter[0]) * raw[1]
    w, h = max(1, round(w * ratio)), max(1, round(h * ratio))
    left = int(raw[2] * (max(0, w - plan.short_side) + 1))
    top = int(raw[3] * (max(0, h - plan.long_side) + 1))
    return ResizeCrop(w, h, left, top, plan.short_side, plan.long_side, flipped)


def transform_pixels(pixels: Array, transform: ResizeCrop) -> Array:
    """[height, width, channels] or [height, width] -> the transform's window of the same type, padded with zeros."""
    shrinks = transform.width * transform.height < pixels.shape[0] * pixels.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    if (transform.height, transform.width) != pixels.shape[:2]:
        size = (transform.width, transform.height)
        # OpenCV averages areas of four channels at most, and drops a single one's axis.
        parts = [pixels] if pixels.ndim == 2 else np.split(pixels, range(4, pixels.shape[2], 4), axis=2)
        resized = [cv2.resize(np.ascontiguousarray(part), size, interpolation=method) for part in parts]
        if pixels.ndim == 3:
            resized = [one.reshape(*one.shape[:2], -1) for one in resized]
        pixels = resized[0] if len(resized) == 1 else np.concatenate(resized, axis=2)
    window = pixels[
        transform.top : transform.top + transform.out_height, transform.left : transform.left + transform.out_width
    ]
    if window.shape[:2] != (transform.out_height, transform.out_width):
        padded = np.zeros((transform.out_height, transform.out_width, *pixels.shape[2:]), dtype=pixels.dtype)
        padded[: window.shape[0], : window.shape[1]] = window
        window = padded
    return np.ascontiguousarray(window[:, ::-1] if transform.flip else window)


def transform_boxes(
    boxes: npt.NDArray[np.float64], size: tuple[int, int], transform: ResizeCrop
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Boxes [n, 4] of an image of ``size`` (width, height) after the transform, and which keep at least a pixel."""
    factor = np.array([transform.width / size[0], transform.height / size[1]] * 2)
    moved = boxes * factor - np.array([transform.left, transform.top] * 2)
    moved = np.clip(moved, 0, np.array([transform.out_width, transform.out_height] * 2))
    if transform.flip:
        moved = np.stack(
            (transform.out_width - moved[:, 2], moved[:, 1], transform.out_width - moved[:, 0], moved[:, 3]), axis=1
        )
    kept = (moved[:, 2] - moved[:, 0] >= 1) & (moved[:, 3] - moved[:, 1] >= 1)
    return moved, kept


@dataclass(frozen=True)
class Sample:
    """An image with its objects, as the detector takes them.

    image: [channels, h, w], of the pixel format's type. boxes: float32 [n, 4]; labels: int64 [n], 0..C-1.
    masks: uint8 [n, h, w] or None. index: the image's place in the annotations.
    """

    index: int
    image: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor | None


class ImageReader:
    """Reads the images of some annotations from a folder, a store or an archive, as prep does; may be pickled.

    The source is opened in the process that reads. Of an archive each process takes along where the images lie.
    """

    def __init__(self, images: str, annotations: GroundTruth, pixels: PixelFormat = RGB8) -> None:
        self._url, self._exif, self._pixels = images, annotations.exif, pixels
        self._nodata = missing_value(annotations.nodata)
        self._members = ImageSource(images).member_offsets([record.file_name for record in annotations.images])
        self._source: ImageSource | None = None
        self._process = 0

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open source behind."""
        return {**vars(self), "_source": None}

    def read(self, record: ImageRecord) -> Array:
        """The image, [height, width, channels]; UserError where it is unreadable, or of another size or format.

        Missing data is filled by the mean of the rest, as in prep.
        """
        pixels = self.marked(record)
        return np.require(fill_missing(pixels) if pixels.dtype == np.float32 else pixels, requirements="W")

    def marked(self, record: ImageRecord) -> Array:
        """The same with NaN where data is missing."""
        if self._source is None or self._process != os.getpid():
            self._source, self._process = ImageSource(self._url, self._members), os.getpid()
        try:
            raw = self._source.read(record.file_name)
            return decode_raster(raw, record.width, record.height, self._exif, self._pixels, nodata=self._nodata)
        except ImageError as error:
            raise UserError(
                f"{self._source.describe().rstrip('/')}/{record.file_name} cannot be trained on ({error}): replace it, "
                "or take it out of the annotations"
            ) from error


def looked_at(annotations: GroundTruth) -> list[ImageRecord]:
    """Some images, drawn by a key, whose pixels are looked at."""
    order = rng.permutation(rng.key_of_text(0, "images whose pixels are looked at"), len(annotations.images))
    return [annotations.images[place] for place in order[:SAMPLE]]


def check_missing_data(annotations: GroundTruth, images: str, pixels: PixelFormat) -> None:
    """Raise UserError where a value of float images looks like missing data, as prep does; decodes a sample of them."""
    files = [record.file_name for record in looked_at(annotations)]
    check_nodata(files, ImageSource(images), pixels, annotations.nodata)


def measured_mean_and_std(
    reader: ImageReader, records: Sequence[ImageRecord], pixels: PixelFormat
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over some images, in units of full scale.

    Pixels without data are left out. A channel that never changes has a deviation of 1, whatever it is divided by.
    Costs reading the images.
    """
    count, sums, squares = 0, np.zeros(pixels.channels), np.zeros(pixels.channels)
    for record in records:
        values = reader.marked(record).reshape(-1, pixels.channels).astype(np.float64) / pixels.full_scale
        values = values[~np.isnan(values).any(axis=1)]
        count += len(values)
        sums += values.sum(axis=0)
        squares += np.square(values).sum(axis=0)
    mean = sums / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    rounded = [[float(f"{one:.6g}") for one in values] for values in (mean, std)]
    return tuple(rounded[0]), tuple(one or 1.0 for one in rounded[1])


def object_mask(record: ImageRecord, which: int) -> npt.NDArray[np.uint8]:
    """0/1 mask [height, width] of one object: its segmentation, or its whole box where it has none."""
    segmentation = record.segmentations[which]
    if segmentation is None:
        mask = np.zeros((record.height, record.width), dtype=np.uint8)
        left, top, right, bottom = record.boxes[which]
        mask[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] = 1
        return mask
    return np.asarray(rle.decode(encoded_mask(segmentation, record.height, record.width)), dtype=np.uint8)


def encoded_mask(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """A segmentation that is a mask (annotations.mask_trouble) as a compressed RLE."""
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return rle.frPyObjects(segmentation, height, width)
    return segmentation


def load_sample(
    reader: ImageReader, record: ImageRecord, index: int, transform: ResizeCrop, with_masks: bool
) -> Sample:
    """An image after a transform; crowd regions are no objects to learn."""
    image = torch.from_numpy(transform_pixels(reader.read(record), transform)).permute(2, 0, 1).contiguous()
    boxes, kept = transform_boxes(record.boxes, (record.width, record.height), transform)
    kept &= ~record.crowd
    masks: Tensor | None = None
    if with_masks:
        drawn = [transform_pixels(object_mask(record, int(i)), transform) for i in np.flatnonzero(kept)]
        shape = (0, transform.out_height, transform.out_width)
        masks = torch.from_numpy(np.stack(drawn) if drawn else np.zeros(shape, dtype=np.uint8))
    return Sample(index, image, torch.from_numpy(boxes[kept]).float(), torch.from_numpy(record.labels[kept]), masks)


def to_device(
    sample: Sample, device: torch.device, offset: int, full_scale: float = 255.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """A sample as torchvision's models take it: image float [channels, h, w] in units of ``full_scale``, its target."""
    image = sample.image.to(device, non_blocking=True).float() / full_scale
    target = {"boxes": sample.boxes.to(device), "labels": sample.labels.to(device) + offset}
    if sample.masks is not None:
        target["masks"] = sample.masks.to(device)
    return image, target


def pasted(base: Sample, other: Sample, chosen: Tensor) -> Sample:
    """``base`` with the objects of ``other`` that are ``chosen`` (bool [n]) on top, both of one size and with masks.

    What is covered is cut out of the masks, boxes follow their masks, and what is covered whole is gone (Ghiasi et al.
    2021).
    """
    assert base.masks is not None and other.masks is not None
    if not bool(chosen.any()):
        return base
    covering = other.masks[chosen]
    over = covering.amax(dim=0) > 0
    image = torch.where(over, other.image, base.image)
    left = base.masks * ~over
    touched = (left != base.masks).flatten(1).any(dim=1)
    boxes = base.boxes.clone()
    # Of uint8, any() is uint8, which is no index that torch goes on taking for a mask.
    kept = (left > 0).flatten(1).any(dim=1)
    for nth in torch.nonzero(touched & kept).flatten().tolist():
        ys, xs = torch.nonzero(left[nth], as_tuple=True)
        boxes[nth] = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], dtype=boxes.dtype)
    return Sample(
        base.index,
        image,
        torch.cat((boxes[kept], other.boxes[chosen])),
        torch.cat((base.labels[kept], other.labels[chosen])),
        torch.cat((left[kept], covering)),
    )


@dataclass(frozen=True)
class Augmentation:
    """How images are changed for training.

    flip: probability; jitter: range of large-scale jitter, (0, 0) for none; key: of the stream of draws.
    copy_paste: probability that objects of another image are pasted.
    """

    flip: float
    jitter: tuple[float, float]
    key: int
    copy_paste: float = 0.0


class DetectionDataset(Dataset[Sample]):
    """Samples by (image, step, place in the batch); without an augmentation the transform of evaluation."""

    def __init__(
        self,
        annotations: GroundTruth,
        images: str,
        plan: ScaledRecipe,
        augmentation: Augmentation | None,
        masks: bool,
        pixels: PixelFormat = RGB8,
        short_side: int | None = None,
    ) -> None:
        """short_side: of evaluation, in place of the plan's."""
        self._short_side = short_side
        self._records = annotations.images
        self._reader = ImageReader(images, annotations, pixels)
        self._plan = plan
        self._augmentation = augmentation
        self._masks = masks

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, where: tuple[int, int, int]) -> Sample:
        index, step, place = where
        record = self._records[index]
        if self._augmentation is None:
            transform = evaluation_transform(record.width, record.height, self._plan, self._short_side)
            return load_sample(self._reader, record, index, transform, self._masks)
        key = int(rng.derive_key(self._augmentation.key, step, place)[0])
        if not self._augmentation.copy_paste:
            return self._augmented(index, self._augmentation, key, self._masks)
        return self._with_pasted(index, self._augmentation, key)

    def _augmented(self, index: int, augmentation: Augmentation, key: int, masks: bool) -> Sample:
        record = self._records[index]
        transform = training_transform(
            record.width, record.height, self._plan, augmentation.flip, augmentation.jitter, key
        )
        return load_sample(self._reader, record, index, transform, masks)

    def _with_pasted(self, index: int, augmentation: Augmentation, key: int) -> Sample:
        word = rng.random_u64(rng.derive_key(key, 1), 2)
        if rng.uniform(word[:, 0])[0] >= augmentation.copy_paste:
            return self._augmented(index, augmentation, key, self._masks)
        sample = self._augmented(index, augmentation, key, True)
        source = int(rng.randint(word[:, 1], len(self._records))[0])
        other = self._augmented(source, augmentation, int(rng.derive_key(key, 2)[0]), True)
        drawn = rng.uniform(rng.random_u64(rng.derive_key(key, 3), max(1, len(other.boxes))))[0][: len(other.boxes)]
        sample = pasted(sample, other, torch.from_numpy(drawn < 0.5))
        return sample if self._masks else replace(sample, masks=None)


class _StepSampler:
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


READ_AHEAD = 2
"""Batches that each worker reads ahead."""


def shared_bytes(
    annotations: GroundTruth,
    plan: ScaledRecipe,
    pixels: PixelFormat,
    batch: int,
    workers: int,
    *,
    training: Augmentation | None = None,
    masks: bool = False,
) -> int:
    """Bytes of samples that a loader's workers keep in shared memory, those with masks as they are on average.

    training: its augmentation; None for evaluation. masks: whether samples have masks.
    """
    if not workers:
        return 0
    records = annotations.images
    sides = np.array([(one.width, one.height) for one in records], dtype=np.float64)
    tested = plan.test_short_sides if training is None else plan.train_short_sides
    short, long = _sides(plan, max(tested) if tested else None)
    scale = np.minimum(short / sides.min(axis=1), long / sides.max(axis=1))
    area = sides.prod(axis=1) * scale**2
    pasted_too = training is not None and training.copy_paste > 0
    if training is not None and training.jitter[1] > 0:
        area[:] = plan.short_side * plan.long_side
    objects = np.array([np.count_nonzero(~one.crowd) for one in records]) * (1 + pasted_too)
    each = area * (pixels.channels * pixels.itemsize + objects * masks)
    # The batch in use and the one that is received, beside those ahead.
    return math.ceil(each.mean() * batch * (workers * READ_AHEAD + 2) + each.max())


def _prepare_worker(_: int) -> None:
    """Leave signals to the rank, and start no threads."""
    leave_signals_to_rank()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


class _OrMessage(Dataset["Sample | str"]):
    """The samples of a dataset, or what a UserError says: as an exception it would leave a worker as a traceback."""

    def __init__(self, dataset: DetectionDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, where: tuple[int, int, int]) -> Sample | str:
        try:
            return self._dataset[where]
        except UserError as error:
            return error.message


class SampleLoader:
    """Lists of samples, one for each list of places that ``batches`` gives, read by worker processes in that order.

    Raises UserError while iterating for an image that cannot be trained on and for a worker that ended.
    """

    def __init__(self, dataset: DetectionDataset, batches: Any, workers: int) -> None:
        self._loader: Any = DataLoader(
            _OrMessage(dataset),
            batch_sampler=batches,
            num_workers=workers,
            prefetch_factor=READ_AHEAD if workers else None,
            collate_fn=list,
            worker_init_fn=_prepare_worker,
            multiprocessing_context=worker_context() if workers else None,
            # Without one it would draw from the caller's global generator.
            generator=torch.Generator(),
        )
        self._received: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[list[Sample]]:
        """The lists; a second iterator ends the first one's workers."""
        self.close()
        received = self._received = start_workers(self._loader)
        try:
            while True:
                try:
                    samples = next_from_workers(received)
                except StopIteration:
                    return
                for one in samples:
                    if isinstance(one, str):
                        raise UserError(one)
                yield samples
        finally:
            if self._received is received:
                self.close()

    def close(self) -> None:
        """End the workers."""
        received, self._received = self._received, None
        if received is not None:
            end_workers(received)


def training_batches(
    dataset: DetectionDataset, order: Order, steps: range, rank: int, share: int, workers: int
) -> SampleLoader:
    """Lists of ``share`` samples: this rank's part of each global batch of ``steps``."""
    return SampleLoader(dataset, _StepSampler(order, steps.start, steps.stop, rank, share), workers)


def validation_batches(dataset: DetectionDataset, indices: list[int], batch: int, workers: int) -> SampleLoader:
    """Lists of samples: these images as evaluation sees them, in order."""
    chunks = [[(index, 0, 0) for index in indices[at : at + batch]] for at in range(0, len(indices), batch)]
    return SampleLoader(dataset, chunks, workers)

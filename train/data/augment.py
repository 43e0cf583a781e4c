"""Decides by chance how each crop is augmented, and resamples only the part of it that lands in its region.

Draws are keyed by (seed, lane, position, region): a crop's depend on nothing but its key, so no worker, batch size or
earlier position can change them. One call draws for a whole step: about 60 us however many crops, and 70 us plus 0.6 us
per jigsaw where the trainer draws the context.

Windows (section 4.1 and Table 1): scale the crop by one ratio to the nearest whole size with pixel centres at half,
flip it, then per axis cut a window out of it or lay it into the region, the rest of the region staying zero. Only the
window is computed: by cv2.resize where most of the scaled crop lands (three crops of four; within 1 level of the exact
bilinear value), by cv2.warpAffine where the window is a small part (its 1/32 pixel steps are within 5 levels at a hard
edge, 0.3 on average). On COCO crops that takes 24 us per crop; either alone takes 33 and 46, decoding the crop 198.

Context: in datasets prepped with ``--context-at train`` members hold all the context there may be, and how far each
crop reaches beyond its object is drawn anew each time, by prep's formula (formats/boxes.py). Decoding the larger
members costs 0.3 ms per jigsaw.
"""

from dataclasses import dataclass, fields
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from jigsaw_pretrain.formats.boxes import MEAN_SHIFT, draw_crops
from jigsaw_pretrain.formats.jigsaw import REGIONS, Template
from jigsaw_pretrain.rng import U64, derive_key, key_of_text, randint, random_u64, uniform
from jigsaw_pretrain.train.data.reader import CropArray
from jigsaw_pretrain.train.recipe import DataOptions

I64 = npt.NDArray[np.int64]
Pixels = npt.NDArray[Any]
"""An image's pixels: uint8 [height, width, 3], or as another sensor has them (formats/pixels.py)."""

AREA_BELOW = 0.5
"""Below this scale bilinear samples skip pixels altogether, so ``crop`` averages areas as well."""

_WHOLE_UP_TO = 2
_WARP_LIMIT = 32766
_AFFINE = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP


@dataclass(frozen=True)
class Draws:
    """Draws for n jigsaws: every array is [n, 4], by region.

    ratio: float64, the resize ratio (1 for the fits that have none). flip: bool. across, down: uint64 words that decide
    the place in each axis; None for the centre. substitute: uint64 words that choose a crop where the slot's own group
    gives none. shifts: float64 [n, 4, 4], how far left, top, right and bottom of the object's box move outwards, of the
    most that they may, where the trainer draws the context, without augmentation too; None where prep did. jitter:
    float64 [n, 4, 1 + channels], the factor of the contrast and the gain of each channel; None for colours as they are.
    """

    ratio: npt.NDArray[np.float64]
    flip: npt.NDArray[np.bool_]
    across: U64 | None
    down: U64 | None
    substitute: U64
    shifts: npt.NDArray[np.float64] | None = None
    jitter: npt.NDArray[np.float64] | None = None


def draw(
    options: DataOptions,
    lanes: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    with_shifts: bool = False,
    channels: int = 3,
) -> Draws:
    """The draws of the jigsaws at ``positions`` [n] of ``lanes`` [n]; with_shifts: of the context as well.

    channels: of the crops, for the jitter.
    """
    key = key_of_text(options.seed, "augment")
    # Words of a stream do not depend on how many are drawn: the context's come last.
    raw = random_u64(
        derive_key(key, lanes[:, None], positions[:, None], np.arange(len(REGIONS))), 9 if with_shifts else 5
    )
    shifts = uniform(raw[..., 5:]) if with_shifts else None
    ratio = np.ones(raw.shape[:-1])
    if not options.augment:
        return Draws(ratio, np.zeros(ratio.shape, dtype=bool), None, None, raw[..., 4], shifts)
    if options.fit == "crop":
        ratio = options.resize_low + uniform(raw[..., 0]) * (options.resize_high - options.resize_low)
    jitter = None
    if options.jitter:
        key = key_of_text(options.seed, "jitter")
        words = derive_key(key, lanes[:, None], positions[:, None], np.arange(len(REGIONS)))
        jitter = 1 + options.jitter * (2 * uniform(random_u64(words, 1 + channels)) - 1)
    return Draws(ratio, uniform(raw[..., 1]) < options.flip, raw[..., 2], raw[..., 3], raw[..., 4], shifts, jitter)


@dataclass(frozen=True)
class Windows:
    """Where crops land, arrays [n, 4] by region.

    scaled_width, scaled_height: the crop's size after resizing. flip: whether it is then mirrored. from_x, from_y: the
    window's first pixel in that image. to_x, to_y: its first pixel in the jigsaw. width, height: its size.
    smooth: whether to average areas where the crop shrinks. All int64 but flip and smooth, which are bool.
    """

    scaled_width: I64
    scaled_height: I64
    flip: npt.NDArray[np.bool_]
    from_x: I64
    from_y: I64
    to_x: I64
    to_y: I64
    width: I64
    height: I64
    smooth: npt.NDArray[np.bool_]

    def table(self) -> I64:
        """The fields in their order as int64 [n, 4, 10]."""
        return np.stack([np.asarray(getattr(self, field.name), dtype=np.int64) for field in fields(self)], axis=-1)


def _is_small_part(width: Any, height: Any, scaled_x: Any, scaled_y: Any, window: Any) -> Any:
    """Whether a window of so many pixels is a small part of the scaled crop: of whole numbers, or arrays of them."""
    in_range = (width <= _WARP_LIMIT) & (height <= _WARP_LIMIT)
    return in_range & (scaled_x * scaled_y > _WHOLE_UP_TO * window)


def scaled_sizes(width: I64, height: I64, ratio: npt.NDArray[Any], room: tuple[I64, I64], fit: str) -> tuple[I64, I64]:
    """Sides of whole crops after ``fit`` to their regions' ``room``, at least 1 pixel; a half is rounded up."""
    room_x, room_y = room
    if fit == "crop":
        scaled_x, scaled_y = (np.floor(side * ratio + 0.5).astype(np.int64) for side in (width, height))
    else:
        scaled_x, scaled_y = room_x + 0 * width, room_y + 0 * height
        if fit == "resize":
            # Whole numbers only: the side that fills its region does so exactly.
            wide = width * room_y >= height * room_x
            scaled_y = np.where(wide, (2 * height * room_x + width) // (2 * width), scaled_y)
            scaled_x = np.where(wide, scaled_x, (2 * width * room_y + height) // (2 * height))
    return np.maximum(1, scaled_x), np.maximum(1, scaled_y)


def place_along(scaled: I64, room: I64, word: U64 | None, pad: str) -> tuple[I64, I64, I64]:
    """One axis: the window's first pixel in the crop, in its region, and its length."""
    slack = scaled - room
    middle = np.abs(slack) // 2
    offset = middle if word is None else randint(word, np.abs(slack) + 1)
    padded = middle if pad == "centre" else offset
    return np.where(slack > 0, offset, 0), np.where(slack < 0, padded, 0), np.minimum(scaled, room)


def place_windows(width: I64, height: I64, draws: Draws, template: Template, fit: str, pad: str = "random") -> Windows:
    """Where crops of ``width`` x ``height`` pixels (int64 [n, 4] by region) land, by ``fit`` and ``pad``."""
    left, top, room_x, room_y = np.array([(r.left, r.top, r.width, r.height) for r in template.regions]).T
    scaled_x, scaled_y = scaled_sizes(width, height, draws.ratio, (room_x, room_y), fit)
    smooth = draws.ratio < AREA_BELOW if fit == "crop" else np.ones(scaled_x.shape, dtype=bool)
    from_x, to_x, lands_x = place_along(scaled_x, room_x, draws.across, pad)
    from_y, to_y, lands_y = place_along(scaled_y, room_y, draws.down, pad)
    return Windows(scaled_x, scaled_y, draws.flip, from_x, from_y, left + to_x, top + to_y, lands_x, lands_y, smooth)


def resample(
    pixels: Pixels, scaled: tuple[int, int], flip: bool, start: tuple[int, int], smooth: bool, out: Pixels
) -> None:
    """Write the window of a scaled, flipped crop that starts at ``start`` (x, y) over all of ``out``.

    pixels: uint8 [height, width, 3]. scaled: width and height after resizing. out: uint8 [h, w, 3], rows may be apart.
    The crop's border pixels are repeated outwards, never blended with padding.
    """
    height, width = pixels.shape[:2]
    (scaled_x, scaled_y), (x, y) = scaled, start
    rows, columns = out.shape[:2]
    shrinks = smooth and (scaled_x < width or scaled_y < height)
    if shrinks or not _is_small_part(width, height, scaled_x, scaled_y, rows * columns):
        whole = (scaled_x, scaled_y) == (columns, rows) and not flip
        if whole and not shrinks:
            cv2.resize(pixels, scaled, out, interpolation=cv2.INTER_LINEAR)
            return
        image = _resized(pixels, scaled, shrinks)
        if flip:
            # Mirror the window alone: its place counts from the right-hand side of the image.
            cv2.flip(image[y : y + rows, scaled_x - x - columns : scaled_x - x], 1, out)
        else:
            out[...] = image[y : y + rows, x : x + columns]
        return
    step_x, step_y = width / scaled_x, height / scaled_y
    first_x = scaled_x - x - 0.5 if flip else x + 0.5
    matrix = np.array(
        [[-step_x if flip else step_x, 0.0, first_x * step_x - 0.5], [0.0, step_y, (y + 0.5) * step_y - 0.5]]
    )
    cv2.warpAffine(pixels, matrix, (columns, rows), out, _AFFINE, cv2.BORDER_REPLICATE)


def _resized(pixels: Pixels, scaled: tuple[int, int], smooth: bool) -> Pixels:
    """The whole crop at its scaled size, an axis that shrinks by area averages where ``smooth``."""
    height, width = pixels.shape[:2]
    if scaled == (width, height):
        return pixels
    if smooth:
        # OpenCV averages areas only where neither axis grows.
        lower = (min(width, scaled[0]), min(height, scaled[1]))
        pixels = cv2.resize(pixels, lower, interpolation=cv2.INTER_AREA)
        if lower == scaled:
            return pixels
    return cv2.resize(pixels, scaled, interpolation=cv2.INTER_LINEAR)


def resample_channels(
    pixels: Pixels, scaled: tuple[int, int], flip: bool, start: tuple[int, int], smooth: bool, out: Pixels
) -> None:
    """``resample`` for any number of channels, [..., channels]; OpenCV takes up to four at a time."""
    for first in range(0, pixels.shape[2], 4):
        part = np.ascontiguousarray(pixels[..., first : first + 4])
        window = np.empty((*out.shape[:2], part.shape[2]), dtype=out.dtype)
        flat = part.shape[2] == 1
        resample(part[..., 0] if flat else part, scaled, flip, start, smooth, window[..., 0] if flat else window)
        out[..., first : first + 4] = window


def jitter_colours(window: Pixels, factors: npt.NDArray[np.float64]) -> None:
    """Change a window's contrast and the gain of each of its channels, in place: ``gain (mean + contrast (x - mean))``.

    window: [height, width, channels], whose mean is taken per channel. factors: float64 [1 + channels], as in Draws.
    Integers are rounded, and cut off where their type ends. Costs 20 us for 160 x 160 pixels of uint8.
    """
    contrast, gains = factors[0], factors[1:]
    means = cv2.meanStdDev(window)[0][:, 0]
    scale, shift = gains * contrast, gains * means * (1 - contrast)
    if window.dtype == np.uint8:
        table = np.clip(np.arange(256)[:, None] * scale + shift, 0, 255).round().astype(np.uint8)
        window[...] = cv2.LUT(window, table[None]).reshape(window.shape)
        return
    changed = window * scale + shift
    if np.issubdtype(window.dtype, np.integer):
        limits = np.iinfo(window.dtype)
        changed = np.clip(changed, limits.min, limits.max).round()
    window[...] = changed


def resized(pixels: Pixels, size: tuple[int, int], method: int) -> Pixels:
    """cv2.resize of [height, width, channels] to ``size`` (width, height), for any number of channels."""
    if pixels.shape[2] == 3:
        return cv2.resize(pixels, size, interpolation=method)
    parts = [pixels[..., first : first + 4] for first in range(0, pixels.shape[2], 4)]
    done = [cv2.resize(np.ascontiguousarray(part), size, interpolation=method) for part in parts]
    shaped = [one.reshape(size[1], size[0], part.shape[2]) for one, part in zip(done, parts, strict=True)]
    return np.concatenate(shaped, axis=2).astype(pixels.dtype, copy=False)


def with_drawn_context(crops: CropArray, shifts: npt.NDArray[np.float64], context: float) -> CropArray:
    """Crops (IN_CONTEXT [...], as read) with the part of their members that these shifts (float64 [..., 4]) show.

    Background crops stay as they are. Group and label are untouched: they are the box's.
    """
    left, top = crops["left"], crops["top"]
    first_x, first_y = left - crops["x"], top - crops["y"]
    boxes = np.stack([left, top, left + crops["width"], top + crops["height"]], axis=-1)
    members = np.stack([first_x, first_y, first_x + crops["stored_width"], first_y + crops["stored_height"]], axis=-1)
    drawn = draw_crops(boxes, crops["box"], shifts, context, members)
    found = crops.copy()
    found["left"], found["top"] = drawn[..., 0], drawn[..., 1]
    found["x"], found["y"] = drawn[..., 0] - first_x, drawn[..., 1] - first_y
    found["width"], found["height"] = drawn[..., 2] - drawn[..., 0], drawn[..., 3] - drawn[..., 1]
    return found


def with_mean_context(crops: CropArray, context: float) -> CropArray:
    """The same with the context that a crop has on average: a fixed choice, where nothing is to be drawn."""
    return with_drawn_context(crops, np.full((*crops.shape, 4), MEAN_SHIFT), context)

"""How an image is placed in what the detector sees: resize, large-scale jitter, flip. Pure geometry, then pixels.

A view is a scaling of the whole image, a window of the result (cut or zero-padded) and a flip; boxes and masks follow
it. Training draws a view from (seed, step, place in the batch), so no worker, rank or resumption changes it.
Pixels are resampled by OpenCV, averaging areas where they shrink.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from jigsaw_pretrain import rng
from jigsaw_pretrain.detect.scaling import Plan


@dataclass(frozen=True)
class View:
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


def still_view(width: int, height: int, plan: Plan) -> View:
    """The view of evaluation: resized, neither cut nor flipped."""
    w, h = fitted(width, height, plan.short_side, plan.long_side)
    return View(w, h, 0, 0, w, h, False)


def drawn_view(width: int, height: int, plan: Plan, flip: float, jitter: tuple[float, float], key: int) -> View:
    """The view of training drawn from ``key``: flipped with probability ``flip``; ``jitter`` (0, 0) for none.

    With jitter the image is fitted into the plan's square, scaled by a ratio from U[jitter], and the square is filled
    from a random place of it, padded at the right and bottom where it is smaller.
    """
    raw = rng.uniform(rng.random_u64(key, 4))[0]
    flipped = bool(raw[0] < flip)
    w, h = fitted(width, height, plan.short_side, plan.long_side)
    if jitter[1] <= 0:
        return View(w, h, 0, 0, w, h, flipped)
    ratio = jitter[0] + (jitter[1] - jitter[0]) * raw[1]
    w, h = max(1, round(w * ratio)), max(1, round(h * ratio))
    left = int(raw[2] * (max(0, w - plan.short_side) + 1))
    top = int(raw[3] * (max(0, h - plan.long_side) + 1))
    return View(w, h, left, top, plan.short_side, plan.long_side, flipped)


def view_pixels(pixels: npt.NDArray[np.uint8], view: View) -> npt.NDArray[np.uint8]:
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
    boxes: npt.NDArray[np.float64], size: tuple[int, int], view: View
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Boxes [n, 4] of an image of ``size`` (width, height) in the view, and which keep at least a pixel there."""
    factor = np.array([view.width / size[0], view.height / size[1]] * 2)
    moved = boxes * factor - np.array([view.left, view.top] * 2)
    moved = np.clip(moved, 0, np.array([view.out_width, view.out_height] * 2))
    if view.flip:
        moved = np.stack((view.out_width - moved[:, 2], moved[:, 1], view.out_width - moved[:, 0], moved[:, 3]), axis=1)
    kept = (moved[:, 2] - moved[:, 0] >= 1) & (moved[:, 3] - moved[:, 1] >= 1)
    return moved, kept

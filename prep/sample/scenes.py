"""Scenes of the sample dataset, a small detection dataset that the project draws itself (`prep sample-data`).

Scenes of textured, occluding objects (sprites.py) on cluttered backgrounds, with COCO JSON beside them: what
`make pretrain` runs on when it is given nothing. 240 images take about 15 s on one core. The same seed gives the same
images under the same Pillow. Boxes bound what is visible of an object.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from jigsaw_pretrain import rng
from jigsaw_pretrain.config import Count, checked
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.prep.sample.sprites import SPRITES, Dice, Sprite, render
from jigsaw_pretrain.storage.store import Storage, location

SIZES = ((480, 360), (360, 480), (420, 420), (512, 320))
VISIBLE_AT_LEAST = 0.5


@dataclass
class Scene:
    """An image under construction: its pixels, whose object each pixel shows (-1 for none), and every object's area."""

    image: Image.Image
    owner: npt.NDArray[np.int64]
    areas: list[int]
    labels: list[int]


def _background(width: int, height: int, dice: Dice) -> Image.Image:
    horizon = dice.real(0.25, 0.75)
    sky, ground = dice.colour((0.5, 0.65), 0.25, 0.8), dice.colour((0.05, 0.4), 0.3, 0.6)
    rows = np.linspace(0, 1, height)[:, None, None]
    blend = 1 / (1 + np.exp(-(rows - horizon) * 30))
    pixels = (1 - blend) * np.array(sky) * (1.1 - 0.3 * rows) + blend * np.array(ground) * (0.8 + 0.4 * rows)
    image = Image.fromarray(np.broadcast_to(np.clip(pixels, 0, 255), (height, width, 3)).astype(np.uint8), "RGB")
    for _ in range(dice.whole(18, 34)):
        _clutter(image, dice)
    image = image.filter(ImageFilter.GaussianBlur(dice.real(0.6, 1.8)))
    coarse = rng.uniform(rng.random_u64(rng.derive_key(dice.whole(0, 2**31)), width * height)).reshape(height, width, 1)
    return Image.fromarray(np.clip(np.asarray(image) * (0.9 + 0.2 * coarse), 0, 255).astype(np.uint8), "RGB")


def _clutter(image: Image.Image, dice: Dice) -> None:
    """A translucent blot, slab or stroke: things that are no objects."""
    layer = Image.new("L", image.size, 0)
    draw = ImageDraw.Draw(layer)
    x, y = dice.real(0, image.width), dice.real(0, image.height)
    w, h = dice.real(0.05, 0.3) * image.width, dice.real(0.03, 0.25) * image.height
    strength, kind = dice.whole(50, 150), dice.whole(0, 3)
    if kind == 0:
        draw.ellipse((x, y, x + w, y + h), fill=strength)
    elif kind == 1:
        corners = [(x + dice.real(-w, w), y + dice.real(-h, h)) for _ in range(dice.whole(3, 5))]
        draw.polygon(corners, fill=strength)
    elif kind == 2:
        end = (x + dice.real(-2 * w, 2 * w), y + dice.real(-2 * h, 2 * h))
        draw.line([(x, y), end], fill=strength, width=dice.whole(2, 9))
    else:
        for i in range(dice.whole(3, 7)):
            draw.line([(x + i * 7, y), (x + i * 7, y + h)], fill=strength, width=3)
    image.paste(dice.colour((0, 1), 0.35, 0.55), mask=layer)


def _place(scene: Scene, sprite: Sprite, label: int, dice: Dice) -> bool:
    """Try to paste one object; refused where it would hide too much of another or show too little of itself."""
    area = math.exp(dice.real(math.log(40**2), math.log(150**2)))
    aspect = dice.real(*sprite.aspect)
    width, height = max(8, round(math.sqrt(area * aspect))), max(8, round(math.sqrt(area / aspect)))
    left = dice.whole(-width // 5, scene.image.width - width * 4 // 5)
    top = dice.whole(-height // 5, scene.image.height - height * 4 // 5)
    drawn = render(sprite, width, height, dice)
    x0, y0 = max(0, left), max(0, top)
    x1, y1 = min(scene.image.width, left + width), min(scene.image.height, top + height)
    if x1 - x0 < 12 or y1 - y0 < 12:
        return False
    drawn = drawn.crop((x0 - left, y0 - top, x1 - left, y1 - top))
    solid = np.asarray(drawn)[..., 3] > 127
    under = scene.owner[y0:y1, x0:x1]
    for other, whole_area in enumerate(scene.areas):
        hidden = np.count_nonzero(solid & (under == other))
        if hidden and np.count_nonzero(scene.owner == other) - hidden < VISIBLE_AT_LEAST * whole_area:
            return False
    shadow = Image.new("L", scene.image.size, 0)
    shadow.paste(90, (x0 + 4, y0 + 5), drawn.getchannel("A").point(lambda a: 255 if a > 127 else 0))
    scene.image.paste((20, 20, 30), mask=shadow.filter(ImageFilter.GaussianBlur(4)))
    scene.image.paste(drawn, (x0, y0), drawn)
    under[solid] = len(scene.areas)
    scene.areas.append(int(np.count_nonzero(solid)))
    scene.labels.append(label)
    return True


def draw_scene(seed: int, index: int) -> tuple[Image.Image, list[tuple[int, list[float], int]]]:
    """Image ``index`` of a seed, and its objects as (label, [x, y, width, height] of what is visible, visible area)."""
    dice = Dice(rng.key_of_text(seed, f"sample image {index}"))
    width, height = SIZES[dice.whole(0, len(SIZES) - 1)]
    empty = np.full((height, width), -1, dtype=np.int64)
    scene = Scene(_background(width, height, dice), empty, [], [])
    wanted, tries = dice.whole(5, 10), 0
    while len(scene.areas) < wanted and tries < 40:
        label = dice.whole(0, len(SPRITES) - 1)
        _place(scene, SPRITES[label], label, dice)
        tries += 1
    objects = []
    for i, label in enumerate(scene.labels):
        ys, xs = np.nonzero(scene.owner == i)
        x, y = int(xs.min()), int(ys.min())
        box = [float(x), float(y), float(xs.max() + 1 - x), float(ys.max() + 1 - y)]
        objects.append((label, box, len(xs)))
    return scene.image, objects


def sample_data(
    out: str | Path, images: int = 240, seed: int = 0, progress: Callable[[Iterable[int]], Iterable[int]] = iter
) -> int:
    """Draw a small detection dataset of twelve classes: OUT/images/ and OUT/annotations.json.

    Args:
        out: folder to fill.
        images: how many.
        seed: another one draws other images.
        progress: passes on the indices of the images as they are drawn.

    Returns:
        The number of objects.

    Raises:
        UserError: where annotations are there already, or the folder cannot be made.
    """
    place = Path(location(out, "out"))
    checked(images, Count, "images")
    checked(seed, int, "seed")
    folder = place / "images"
    if (place / "annotations.json").exists():
        raise UserError(f"{place / 'annotations.json'} is already there: remove {place}, or name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): name another folder") from error
    records: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for index in progress(range(images)):
        image, objects = draw_scene(seed, index)
        name = f"{index:06d}.jpg"
        image.save(folder / name, quality=92, subsampling=0)
        records.append({"id": index + 1, "file_name": name, "width": image.width, "height": image.height})
        for label, box, area in objects:
            boxes.append(
                {
                    "id": len(boxes) + 1,
                    "image_id": index + 1,
                    "category_id": label + 1,
                    "bbox": box,
                    "area": area,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i + 1, "name": sprite.name} for i, sprite in enumerate(SPRITES)]
    document = {"images": records, "annotations": boxes, "categories": categories}
    Storage(place).publish("annotations.json", msgspec.json.encode(document))
    return len(boxes)

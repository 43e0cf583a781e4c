"""``prep sample-data`` draws a small detection dataset to try everything on."""

from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.progress import track

from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.prep.sample.scenes import draw_scene
from jigsaw_pretrain.prep.sample.sprites import SPRITES
from jigsaw_pretrain.storage import Storage


@click.command(cls=Command)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder to fill with images/ and annotations.json."
)
@click.option("--images", default=240, show_default=True, type=click.IntRange(1, 100_000), help="Number of images.")
@click.option("--seed", default=0, show_default=True, type=int, help="Another seed draws other images.")
def sample_data(out: Path, images: int, seed: int) -> None:
    """Draw a small detection dataset of twelve classes and write OUT/images/ and OUT/annotations.json."""
    folder = out / "images"
    if (out / "annotations.json").exists():
        raise UserError(f"{out / 'annotations.json'} is already there: remove {out}, or name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): name another folder") from error
    records: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    console = Console(stderr=True)
    for index in track(range(images), "drawing", console=console, disable=not console.is_terminal):
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
    Storage(out).publish("annotations.json", msgspec.json.encode(document))
    click.echo(f"{images} images with {len(boxes)} objects of {len(categories)} classes in {out}")

"""`split`: training and validation annotations of a dataset that has no such split of its own."""

from pathlib import Path

import click

import jigsaw_pretrain as jp
from jigsaw_pretrain.cli import Command, Share, tell_next
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations import options
from jigsaw_pretrain.formats.annotations.read import Exif, Reading
from jigsaw_pretrain.words import counted


@click.command(cls=Command)
@options.annotations
@options.images
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Write train.json and val.json to this folder."
)
@click.option("--share", type=Share(), default="10%", show_default=True, help="Validate on this share of the images.")
@click.option("--seed", default=0, show_default=True, help="Draw the images from this seed; another one draws others.")
@click.option(
    "--group",
    metavar="KEY",
    help="Keep together what is alike. `folder` keeps the images of one folder together, a key of COCO's "
    "image entries, such as video_id, those that have the same value. By default every image stands "
    "alone.",
)
@click.option(
    "--val-list",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Validate on the images that FILE names, one per line, and draw none.",
)
@options.exif
@options.voc_origin
def split(
    annotations: str,
    images: str,
    out: Path,
    share: float,
    seed: int,
    group: str | None,
    val_list: Path | None,
    exif: Exif,
    voc_origin: int | None,
) -> None:
    """Split annotations into a training and a validation file, by image or by group.

    Pre-train and fine-tune on train.json alone: a backbone that has seen the validation images makes AP look better
    than it is. Frames of one video are nearly the same picture, so keep them together with --group.
    """
    held_out = None if val_list is None else _lines(val_list)
    reading = Reading(exif, voc_origin=voc_origin)
    made = jp.split(annotations, images, out, share=share, seed=seed, group=group, held_out=held_out, reading=reading)
    for file, count, boxes in zip((made.train, made.val), made.images, made.boxes, strict=True):
        click.echo(f"{file}: {count:,} images with {boxes:,} boxes")
    if made.left_out or made.images_left_out:
        lost = f"{counted(made.images_left_out, 'image')} and {counted(made.left_out, 'box', 'boxes')}"
        click.echo(f"in neither file: {lost} that cannot be used; `jigsaw-prep doctor` says what is wrong with them")
    words = ["jigsaw-prep", "shards", "--annotations", str(made.train), "--images", images, "--out", f"{out}-crops"]
    # The two files' boxes are counted from 0 whatever the original's were.
    words += Reading(exif).words()
    tell_next((f"cut crops of the training images; {made.val} is for validation, with the same images", words))


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}): name a text file with one image name per line") from error

"""`detect subset`: some of the images as a COCO file, for pre-training and fine-tuning on the same few.

The images are those that `detect train` takes for data.images_limit and data.subset_seed: drawn without regard to their
classes, a smaller number's among a larger one's. Reads annotations of any kind, of which a COCO file keeps every field;
seconds for a million boxes.
"""

import json
from pathlib import Path

import click

from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.detect.annotations import subset_document
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations import options as reads
from jigsaw_pretrain.formats.annotations.read import Reading
from jigsaw_pretrain.storage.files import holds, is_taken, publish_locally
from jigsaw_pretrain.words import counted


@click.command("subset", cls=Command)
@reads.annotations
@reads.images
@reads.reading
@click.option("--images-limit", required=True, type=click.IntRange(1), help="Keep this many images.")
@click.option(
    "--subset-seed", default=0, show_default=True, help="Draw the images from this seed; another one draws others."
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="Write the COCO JSON to this file."
)
def write_subset(
    annotations: str, images: str, reading: Reading, images_limit: int, subset_seed: int, out: Path
) -> None:
    """Write the annotations of some of the images as COCO JSON, which prep and detect take."""
    made = subset_document(annotations, images, reading, images_limit, subset_seed)
    content = json.dumps(made.document).encode()
    if is_taken(out) and not holds(out, content):
        raise UserError(f"{out} is already there and is not this subset: name another file with --out, or remove it")
    publish_locally(out, content)
    counts = len(made.document["images"]), len(made.document["annotations"])
    click.echo(f"{out}: {counted(counts[0], 'image')}, {counted(counts[1], 'annotation')}")
    if made.left_out or made.images_left_out:
        lost = f"{counted(made.images_left_out, 'image')} and {counted(made.left_out, 'annotation')}"
        click.echo(f"left out: {lost} that cannot be used; `jigsaw-prep doctor` says what is wrong with them")

"""`detect subset`: some of the images as a COCO file, for pre-training and fine-tuning on the same few.

The images are those that `detect train` takes for data.images_limit and data.subset_seed: drawn without regard to their
classes, a smaller number's among a larger one's. Reads annotations of any kind; seconds for a million boxes.
"""

import json
from pathlib import Path

import click

from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.detect.annotations import read_ground_truth, subset
from jigsaw_pretrain.formats.annotations import options as reads
from jigsaw_pretrain.formats.annotations.read import Reading
from jigsaw_pretrain.storage.files import publish_locally


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
    whole = read_ground_truth(annotations, images, reading)
    kept = {record.id for record in subset(whole, images_limit, subset_seed).images}
    truth = {
        "images": [one for one in whole.truth["images"] if one["id"] in kept],
        "annotations": [one for one in whole.truth["annotations"] if one["image_id"] in kept],
        "categories": whole.truth["categories"],
    }
    publish_locally(out, json.dumps(truth).encode())
    click.echo(f"{out}: {len(truth['images'])} images, {len(truth['annotations'])} annotations")

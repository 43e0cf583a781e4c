"""Options that several commands of the prep stage share, as decorators of click."""

import click

from jigsaw_pretrain.cli import Share
from jigsaw_pretrain.prep.records import MAX_SKIPPED

annotations = click.option(
    "--annotations",
    required=True,
    metavar="FILE",
    help="COCO JSON, CrowdHuman odgt, or a folder of Pascal VOC XML, YOLO txt or MOT files; a path or a URL.",
)
images = click.option(
    "--images",
    required=True,
    metavar="DIR",
    help="What the file names are relative to: a folder, zip or tar; a path or a URL.",
)
exif = click.option(
    "--exif",
    type=click.Choice(("ignore", "apply")),
    default="ignore",
    show_default=True,
    help="How EXIF rotation is treated, as in `shards`.",
)
ignored = click.option(
    "--ignored",
    type=click.Choice(("skip", "use")),
    default="skip",
    show_default=True,
    help="What the annotations mark as ignored (COCO's and CrowdHuman's `ignore`, VOC's `difficult`, MOT's flag 0). "
    "skip: no object, and no background over it. use: an object as any other.",
)
split = click.option(
    "--split", metavar="NAME", help="The split of a YOLO or VOC dataset to use, such as train; all images by default."
)
voc_origin = click.option(
    "--voc-origin",
    type=click.IntRange(0, 1),
    help="From which number Pascal VOC files count pixels; found out by default, and told.",
)
nodata = click.option(
    "--nodata",
    metavar="VALUE",
    help="What marks missing data in float images, such as -9999 or nan, beside the value that GDAL's tag says: left "
    "out of mean and std, and filled by the image's mean. none: every value was measured. By default a value that "
    "looks like it stops the plan.",
)
again_annotations = click.option(
    "--annotations", metavar="FILE", help="The annotations, as given to `shards`; needed where parts are cut again."
)
again_images = click.option(
    "--images", metavar="DIR", help="The images, as given to `shards`; needed where parts are cut again."
)
workers = click.option(
    "--workers", type=click.IntRange(1), default=None, help="Processes; all usable cores by default."
)
scheduler = click.option("--scheduler", metavar="tcp://HOST:PORT", help="Cut on a Dask cluster.")
max_skipped = click.option(
    "--max-skipped",
    type=Share(),
    default=f"{MAX_SKIPPED:.0%}",
    show_default=True,
    help="The largest share of the images, and of the boxes, that may be unusable.",
)

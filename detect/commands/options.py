"""Options that several commands of the detection stage share, as decorators of click."""

import click

exif = click.option(
    "--exif",
    type=click.Choice(("ignore", "apply")),
    default="ignore",
    show_default=True,
    help="ignore: boxes refer to stored pixels (COCO). apply: boxes were drawn on upright pictures, as in prep.",
)
ignored = click.option(
    "--ignored",
    type=click.Choice(("skip", "use")),
    default="skip",
    show_default=True,
    help="what is marked as ignored or difficult: skip it, in AP as COCO's crowd, or use it as any object",
)

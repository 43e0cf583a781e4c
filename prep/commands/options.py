"""What several commands of the prep stage share: options, as decorators of click, and what follows a dataset."""

from pathlib import Path

import click

from jigsaw_pretrain.cli import HELD_OUT, Share, run_named, tell_next
from jigsaw_pretrain.formats.dataset import layout
from jigsaw_pretrain.prep.records import MAX_SKIPPED

again_annotations = click.option(
    "--annotations",
    metavar="FILE",
    help="Read the annotations in FILE, as given to `shards`. They are needed where parts are cut again.",
)
again_images = click.option(
    "--images",
    metavar="DIR",
    help="Look for the images in DIR, as given to `shards`. They are needed where parts are cut again.",
)
workers = click.option(
    "--workers",
    type=click.IntRange(1),
    default=None,
    help="Work in this many processes. All usable cores are used by default.",
)
scheduler = click.option("--scheduler", metavar="tcp://HOST:PORT", help="Cut on the Dask cluster of this scheduler.")
max_skipped = click.option(
    "--max-skipped",
    type=Share(),
    default=f"{MAX_SKIPPED:.0%}",
    show_default=True,
    help="Stop where more than this share of the images, or of the boxes, is unusable.",
)


def tell_next_of(out: str, recipe: str | None = None, report: bool = True) -> None:
    """Say what to do with the dataset in ``out``, or, where a run has its name, with that run's held-out crops.

    recipe: the one that was named. report: whether to name the page too.
    """
    out = out.rstrip("/") or out
    run = out.removesuffix(HELD_OUT)
    if run != out and Path(run).is_dir():
        evaluate = ["jigsaw-train", "evaluate", "--run", run, "--data", out]
        tell_next((f"how well {run} names crops that it has not seen", evaluate))
        return
    data = ["--data", out, "--recipe", recipe or f"{out}/{layout.RECIPE}"]
    page = (f"look at the crops: writes {out}/report.html", ["jigsaw-prep", "report", "--out", out])
    tell_next(
        *([page] if report else []),
        ("look at what the trainer will see", ["jigsaw-train", "preview", *data, "--out", "preview.png"]),
        ("how long training takes here", ["jigsaw-train", "estimate", *data]),
        (
            "train; for a short first try add --set optim.steps=200 --set optim.warmup_steps=20",
            ["jigsaw-train", "pretrain", *data, "--run", run_named(out), "--resume"],
        ),
    )

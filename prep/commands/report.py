"""``prep report`` writes one HTML page that shows whether the crops are right."""

import click

from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.prep.report.page import page
from jigsaw_pretrain.storage import Storage


@click.command(cls=Command)
@click.option("--out", required=True, help="the dataset: a folder or an fsspec URL, as given to `shards`")
@click.option("--file", "name", default="report.html", show_default=True, help="the page, below OUT")
def report(out: str, name: str) -> None:
    """Write one HTML page about a prepped dataset: contact sheets, shapes, classes, what was skipped."""
    storage = Storage(out)
    storage.publish(name, page(out).encode())
    click.echo(storage.describe(name))

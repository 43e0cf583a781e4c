"""``prep report`` writes one HTML page that shows whether the crops are right."""

import logging

import click

from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.errors import redacted
from jigsaw_pretrain.formats.dataset import layout
from jigsaw_pretrain.prep.commands import options
from jigsaw_pretrain.prep.report.page import report as write_report
from jigsaw_pretrain.storage.store import Storage

logger = logging.getLogger(__name__)


@click.command(cls=Command)
@click.option(
    "--out", required=True, metavar="OUT", help="Show the dataset in OUT, a folder or a URL, as given to `shards`."
)
@click.option("--file", "name", default="report.html", show_default=True, help="Write the page to this file below OUT.")
def report(out: str, name: str) -> None:
    """Write one HTML page about a prepped dataset: contact sheets, shapes, classes, what was skipped."""
    logger.info("%s: drawing its page", redacted(out))
    click.echo(write_report(out, name))
    if Storage(out).exists(layout.DATASET):
        options.tell_next_of(out, report=False)

"""``prep finish`` makes the manifests, after the tasks of an array job."""

import time

import click

from jigsaw_pretrain.cli import Command, console_for_names, one_line_errors, plain
from jigsaw_pretrain.errors import redacted
from jigsaw_pretrain.prep.commands import options
from jigsaw_pretrain.prep.manifests import finish
from jigsaw_pretrain.prep.report.console import print_summary


@click.command("finish", cls=Command)
@click.option("--out", required=True, metavar="OUT", help="Finish what the tasks wrote to OUT, a folder or a URL.")
@options.max_skipped
def finish_command(out: str, max_skipped: float) -> None:
    """Make the manifests once all tasks of an array job are done. It needs the output alone and may be run again."""
    begun = time.monotonic()
    console = console_for_names()
    with one_line_errors(out):
        found = finish(out, max_skipped)
    title = f"dataset in {plain(redacted(out))}"
    print_summary(console, title, found, time.monotonic() - begun, estimated=False)
    options.tell_next_of(out)

"""`report`: one HTML page about a run, or several side by side."""

from pathlib import Path

import click

from jigsaw_pretrain.cli import Command, tell_next
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.storage.files import publish_locally
from jigsaw_pretrain.train.commands.options import exporting, tell_loading
from jigsaw_pretrain.train.engine.run_folder import RunFolder


@click.command(cls=Command)
@click.option(
    "--run",
    "runs",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="Show the run in this folder. The option may be given several times.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Write the HTML page to this file. [default: RUN/report.html; compared-runs/report.html for several]",
)
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write one HTML page about a run, or several side by side."""
    for run in runs:
        if not run.is_dir():
            raise UserError(f"{run} is no folder: name the folder that was given as --run to `pretrain`")
        folder = RunFolder(run)
        if not folder.begun and not folder.metrics.exists():
            raise UserError(f"{run} holds no run: name the folder that was given as --run to `pretrain`")
    tell_loading(" and ".join(map(str, runs)))

    from jigsaw_pretrain.train.report.page import page

    target = out or (runs[0] / "report.html" if len(runs) == 1 else Path("compared-runs/report.html"))
    publish_locally(target, page(runs).encode())
    click.echo(str(target))
    if len(runs) == 1 and RunFolder(runs[0]).backbone.exists():
        tell_next(exporting(str(runs[0]), "the weights for another library"))

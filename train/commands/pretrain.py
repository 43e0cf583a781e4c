"""`pretrain`: from a prepped dataset to a backbone, alone or under torchrun."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.config import choices
from jigsaw_pretrain.train.commands.options import read_options, read_options_from, recipe_options
from jigsaw_pretrain.train.engine.distributed import DEVICES, rank_zero_errors, start
from jigsaw_pretrain.train.engine.loggers import NAMES, wanted
from jigsaw_pretrain.train.engine.pretraining import TrainingJob, digest_lines, execute, loader_source
from jigsaw_pretrain.train.engine.run_folder import check_classes, check_pixels, choose_recipe, open_run, origin_of
from jigsaw_pretrain.train.engine.step import COMPILE, MachineOptions
from jigsaw_pretrain.train.evaluate import validation
from jigsaw_pretrain.train.recipe import Balance, Neck
from jigsaw_pretrain.train.report.page import RunPage


@click.command(cls=Command)
@click.option("--data", required=True, metavar="OUT", help="Folder or URL that `jigsaw-prep shards` wrote.")
@click.option("--run", required=True, help="Folder or URL of the run: made, or continued.")
@recipe_options
@click.option("--balance", type=click.Choice(choices(Balance)), help="Short for --set data.balance=...")
@click.option("--neck", type=click.Choice(choices(Neck)), help="Short for --set model.neck=...")
@click.option("--resume", is_flag=True, help="Continue the run from its newest checkpoint (or begin it).")
@click.option("--stop-after", type=click.IntRange(min=1), help="End once the run has this many steps; same schedule.")
@click.option("--keep", type=click.IntRange(min=1), help="Checkpoints that stay; default the recipe's.")
@click.option("--val-data", metavar="OUT2", help="Dataset to judge the model on, with the same classes.")
@click.option(
    "--val-every",
    default=0,
    metavar="STEPS",
    type=click.IntRange(min=0),
    help="Validate every STEPS steps (default: 20 times per run).",
)
@read_options
@click.option("--workers", default=2, show_default=True, type=click.IntRange(min=0), help="Data processes per rank.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(DEVICES), help="Where to train.")
@click.option(
    "--compile", "compiling", default="auto", show_default=True, type=click.Choice(COMPILE), help="torch.compile."
)
@click.option("--deterministic", is_flag=True, help="The same bits on the same GPU, or an error; slower.")
@click.option("--page/--no-page", default=True, show_default=True, help="Keep RUN/report.html up to date.")
@click.option(
    "--log",
    multiple=True,
    type=click.Choice([*NAMES, "none"]),
    help="Where else numbers and pictures go; again for more. [default: tensorboard, where it is installed]",
)
@click.option("--log-digest", is_flag=True, help="Write what every batch held to RUN/digest.txt (see `digest`).")
def pretrain(
    data: str,
    run: str,
    recipe: Path | None,
    settings: tuple[str, ...],
    balance: str | None,
    neck: str | None,
    resume: bool,
    stop_after: int | None,
    workers: int,
    device: str,
    compiling: str,
    deterministic: bool,
    page: bool,
    log: tuple[str, ...],
    log_digest: bool,
    keep: int | None,
    val_data: str | None,
    val_every: int,
    **access_settings: Any,
) -> None:
    """Pre-train a backbone; the same under `torchrun --nproc-per-node N -m train -- pretrain ...`.

    The two dashes keep torchrun from taking --run for an option of its own.
    SIGTERM and SIGINT save a checkpoint and end with status 0; so does --stop-after. Continue with --resume.
    """
    with rank_zero_errors():
        ranks = start(device)
        access = read_options_from(**access_settings)
        settings += (f"data.balance={balance}",) if balance else ()
        settings += (f"model.neck={neck}",) if neck else ()
        folder = ranks.run_on_all(lambda: open_run(run))
        if folder.remote:
            ranks.run_on_rank_zero(folder.remote.pull)
        # torchrun starts all ranks anew after a failure, with the same command line.
        resume = resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        dataset = ranks.run_on_all(lambda: access.open_dataset(data))
        chosen = ranks.run_on_rank_zero(lambda: choose_recipe(folder, recipe, settings, resume, dataset))
        options, logs = MachineOptions(compiling, deterministic), ranks.run_on_rank_zero(lambda: wanted(log))
        origin = origin_of(dataset, chosen.data)
        callbacks = (RunPage(folder.path, chosen, origin),) if page else ()
        job = TrainingJob(chosen, origin, folder, ranks, callbacks, logs, options, keep, title="pretrain")
        if val_data:
            held_out = ranks.run_on_all(lambda: access.open_dataset(val_data))
            check_classes(folder, job.origin.classes, tuple(held_out.classes))
            check_pixels(folder, job.origin.pixels, held_out.pixels)
            validate = validation(job, held_out, workers, access)
            job = replace(job, validate=validate, val_every=val_every or max(1, chosen.optim.steps // 20))
        open_source = loader_source(job, dataset, workers, log_digest, access)
        execute(job, open_source, stop_after=stop_after, digest_line=digest_lines(job) if log_digest else None)

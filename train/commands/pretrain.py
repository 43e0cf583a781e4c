"""`pretrain`: from a prepped dataset to a backbone, alone or under torchrun.

What the user named is checked, and a first line printed, before torch is imported, which takes seconds.
"""

import logging
from typing import Any

import click

import jigsaw_pretrain as jp
from jigsaw_pretrain.cli import HELD_OUT, Command, is_first_rank, is_restarted, tell_next
from jigsaw_pretrain.config import choices
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset import layout
from jigsaw_pretrain.storage.store import Storage
from jigsaw_pretrain.train.commands.options import (
    DEVICES,
    exporting,
    read_options,
    read_options_from,
    recipe_options,
)
from jigsaw_pretrain.train.engine.loggers import NAMES, wanted
from jigsaw_pretrain.train.engine.run_folder import RunFolder, choose_recipe, open_run_folder, read_description
from jigsaw_pretrain.train.recipe import Balance, Compile, Neck, Recipe
from jigsaw_pretrain.words import counted

logger = logging.getLogger(__name__)


@click.command(cls=Command)
@click.option(
    "--data",
    required=True,
    metavar="OUT",
    help="Read the dataset in OUT, a folder or URL that `jigsaw-prep shards` wrote.",
)
@click.option("--run", required=True, help="Write the run to this folder or URL, which is made if it does not exist.")
@recipe_options
@click.option("--balance", type=click.Choice(choices(Balance)), help="This is short for --set data.balance=...")
@click.option("--neck", type=click.Choice(choices(Neck)), help="This is short for --set model.neck=...")
@click.option("--resume", is_flag=True, help="Continue from the newest checkpoint, or begin.")
@click.option("--stop-after", type=click.IntRange(min=1), help="Stop at this step; the schedule stays as it is.")
@click.option("--keep", type=click.IntRange(min=1), help="Keep this many checkpoints. [default: run.keep_checkpoints]")
@click.option("--val-data", metavar="OUT2", help="Validate on OUT2, a dataset of other images with the same classes.")
@click.option(
    "--val-every",
    default=0,
    metavar="STEPS",
    type=click.IntRange(min=0),
    help="Validate every STEPS steps. [default: 20 times per run]",
)
@read_options
@click.option(
    "--workers",
    default=2,
    show_default=True,
    type=click.IntRange(min=0),
    help="Read data in this many processes per rank.",
)
@click.option("--device", default="auto", show_default=True, type=click.Choice(DEVICES), help="Train on this device.")
@click.option(
    "--compile",
    "compiling",
    default="auto",
    show_default=True,
    type=click.Choice(choices(Compile)),
    help="Use torch.compile, or not. auto uses it on GPUs.",
)
@click.option(
    "--deterministic",
    is_flag=True,
    help="Compute the same bits on the same GPU every time, or end with an error. This is slower.",
)
@click.option("--page/--no-page", default=True, show_default=True, help="Keep RUN/report.html up to date.")
@click.option(
    "--log",
    multiple=True,
    type=click.Choice([*NAMES, "none"]),
    help="Also log numbers and pictures there. The option may be given several times. [default: "
    "tensorboard, where it is installed]",
)
@click.option("--log-digest", is_flag=True, help="Write each batch's digest to RUN/digest.txt (see `digest`).")
def pretrain(
    data: str,
    run: str,
    recipe: str | None,
    settings: tuple[str, ...],
    balance: str | None,
    neck: str | None,
    resume: bool,
    stop_after: int | None,
    workers: int,
    device: str,
    compiling: Compile,
    deterministic: bool,
    page: bool,
    log: tuple[str, ...],
    log_digest: bool,
    keep: int | None,
    val_data: str | None,
    val_every: int,
    **access_settings: Any,
) -> None:
    """Pre-train a backbone, also under `torchrun --nproc-per-node N --no-python jigsaw-train -- pretrain ...`.

    The two dashes keep torchrun from taking --run for an option of its own.
    Ctrl-C and SIGTERM save a checkpoint and end with status 3, --stop-after with 0. Continue with --resume.
    """
    access = read_options_from(**access_settings)
    settings += (f"data.balance={balance}",) if balance else ()
    settings += (f"model.neck={neck}",) if neck else ()
    resume = resume or is_restarted()
    if val_every and not val_data:
        raise UserError(
            f"--val-every {val_every} has nothing to validate on: name a dataset with --val-data, or leave it out"
        )
    given = validation = None
    if is_first_rank():
        wanted(log)
        folder, given = open_run_folder(run), access.open_dataset(data)
        validation = access.open_dataset(val_data) if val_data else None
        # At a URL only what has been fetched tells it, which all ranks wait for.
        if folder.remote is None:
            choose_recipe(folder, recipe, settings, resume, given)
        else:
            Recipe.load(recipe, settings)
        crops = sum(shard.crops for shard in given.shards)
        of = counted(len(given.classes), "class", "classes")
        logger.info("%s: %s of %s; loading torch", data, counted(crops, "crop"), of)

    from jigsaw_pretrain.train.engine.distributed import rank_zero_errors, start

    with rank_zero_errors():
        ranks = start(device)
        dataset = ranks.run_on_all(lambda: given or access.open_dataset(data))
        held_out = ranks.run_on_all(lambda: validation or (access.open_dataset(val_data) if val_data else None))
        jp.pretrain(
            dataset,
            run,
            recipe,
            settings,
            resume=resume,
            stop_after=stop_after,
            workers=workers,
            device=device,
            compiling=compiling,
            deterministic=deterministic,
            page=page,
            log=log,
            log_digest=log_digest,
            keep=keep,
            held_out=held_out,
            val_every=val_every,
            access=access,
            title="pretrain",
        )
        folder = open_run_folder(run)
        if folder.backbone.exists():
            _tell_next(folder, run, data, dataset.description.options.get("split"))


def _tell_next(folder: RunFolder, run: str, data: str, split: str | None) -> None:
    """What to do with a finished run; split: the one that its crops are of."""
    run, data = run.rstrip("/"), data.rstrip("/")
    held_out = f"{run}{HELD_OUT}"
    fitted = Storage(data).exists(layout.DETECT_RECIPE)
    unseen = ["--annotations", "VAL_ANNOTATIONS", "--images", "VAL_IMAGES"]
    both = ["--annotations", "ANNOTATIONS", "--images", "IMAGES"]
    both += ["--val-annotations", "VAL_ANNOTATIONS", "--val-images", "VAL_IMAGES"]
    if split is not None:
        # The files are the same ones; the name of the other split is not known here.
        unseen += ["--split", "VAL_SPLIT"]
        both += ["--split", split, "--val-split", "VAL_SPLIT"]
    # A --set may have chosen another backbone than the fitted recipes': weights are of use in their own network alone.
    backbone = read_description(folder)["recipe"]["model"]["backbone"]
    begin = ["--init", run, *(["--recipe", f"{data}/{layout.DETECT_RECIPE}"] if fitted else []), "--backbone", backbone]
    tell_next(
        (
            f"look: open {run}/report.html. Check it on images that it has not seen, cut once",
            ["jigsaw-prep", "shards", *unseen, "--out", held_out],
        ),
        ("how well it names their crops", ["jigsaw-train", "evaluate", "--run", run, "--data", held_out]),
        exporting(run, "the weights for another library (timm, mmdet, detectron2, safetensors)"),
        (
            "a detector, and its AP; ANNOTATIONS and IMAGES are those that prep was given. For a short first try add "
            "--set optim.steps=50",
            ["jigsaw-detect", "train", *both, *begin, "--run", f"{run}-detector", "--resume"],
        ),
    )

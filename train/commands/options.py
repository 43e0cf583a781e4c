"""Options that several commands of the training stage share."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from jigsaw_pretrain.cli import ByteCount, FiniteRange, run_named, tell_next
from jigsaw_pretrain.config import choices
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.data.remote import BAD_SHARD, ReadOptions, default_cache
from jigsaw_pretrain.train.engine.run_folder import open_run_folder, read_description
from jigsaw_pretrain.train.recipe import Device

DEVICES = choices(Device)

RECIPE = (
    "Take this recipe: a TOML file or its URL, such as OUT/recipe.toml, which prep fits to the dataset, or one that "
    "comes with the program (sample, paper-r50). [default: the paper's]"
)

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])


def own_backbone(command: F) -> F:
    """Give a click command --backbone, whose presence on the command line is all that counts (models/backbones.py)."""
    told = "Allow the run's own backbone (module:callable) to run its code."
    return click.option("--backbone", metavar="NAME", expose_value=False, help=told)(command)


def recipe_options(command: F) -> F:
    """Add --recipe and --set to a click command, as the arguments ``recipe`` and ``settings`` of Recipe.load."""
    file = click.option("--recipe", metavar="FILE", help=RECIPE)
    settings = click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="SECTION.KEY=VALUE",
        help="Override one key of the recipe. The option may be given several times.",
    )
    return file(settings(command))


def check_run(run: str) -> None:
    """Raise UserError where a local folder holds no run, before torch is imported; a URL is looked at later.

    Says that torch is loaded, so that the first word comes within a second.
    """
    folder = open_run_folder(run)
    if folder.remote is None:
        read_description(folder)
    tell_loading(run)


def tell_loading(what: str) -> None:
    """Say that torch is about to be imported for something, which takes seconds."""
    logger.info("%s: loading torch", what)


def tell_training(purpose: str, data: str, recipe: str | None, settings: Sequence[str]) -> None:
    """Say how the pre-training is begun that a command has looked at; purpose: why now."""
    words = ["jigsaw-train", "pretrain", "--data", data, *(["--recipe", recipe] if recipe else [])]
    words += [word for setting in settings for word in ("--set", setting)]
    tell_next((purpose, [*words, "--run", run_named(data), "--resume"]))


def exporting(run: str, purpose: str) -> tuple[str, Sequence[str]]:
    """A step of what can be typed next: the weights of a run for another library."""
    run = run.rstrip("/")
    return purpose, ["jigsaw-train", "export", "--run", run, "--to", "torchvision", "--out", f"{run}-torchvision.pth"]


def read_options(command: F) -> F:
    """Add the options of ReadOptions to a click command, as the keyword arguments that ``read_options_from`` takes."""
    retries, timeout, bad = click.IntRange(min=0), FiniteRange(min=0.1), click.Choice(BAD_SHARD)
    options = (
        click.option(
            "--cache",
            type=click.Path(path_type=Path),
            help="Keep fetched shards in this folder, where --data is a URL.",
        ),
        click.option(
            "--cache-bytes",
            type=ByteCount(),
            help="Let the cache grow to this size, such as 200G. [default: half of what the disk has free and the "
            "cache holds]",
        ),
        click.option("--no-cache", is_flag=True, help="Fetch each shard to a temporary file instead of the cache."),
        click.option(
            "--read-retries", default=5, show_default=True, type=retries, help="Repeat a failed read this many times."
        ),
        click.option(
            "--read-timeout",
            default=30.0,
            show_default=True,
            type=timeout,
            help="Give up a read after this many seconds without data.",
        ),
        click.option(
            "--on-bad-shard",
            default="stop",
            show_default=True,
            type=bad,
            help="Stop at a missing or corrupt shard, or skip it.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def read_options_from(
    cache: Path | None,
    cache_bytes: int | None,
    no_cache: bool,
    read_retries: int,
    read_timeout: float,
    on_bad_shard: str,
) -> ReadOptions:
    """Make ReadOptions of the options that ``read_options`` added."""
    if no_cache and (cache or cache_bytes):
        raise UserError("--no-cache contradicts --cache and --cache-bytes: leave one out")
    folder = None if no_cache else cache or default_cache()
    return ReadOptions(folder, cache_bytes, read_retries, read_timeout, on_bad_shard)

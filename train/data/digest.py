"""Digests: one line a step that says which crops, how placed, and which pixels a global batch holds.

The identity digest covers crop keys, labels and every augmentation parameter and is the same on all machines; the
pixels digest is the same under one requirements.lock and class of processor. Both hash the jigsaws' own digests in
global lane order, so any number of ranks and workers prints the same lines. About 0.2 ms a jigsaw beyond assembling it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import click

from jigsaw_pretrain.formats.dataset.dataset import Dataset
from jigsaw_pretrain.formats.jigsaw import Template
from jigsaw_pretrain.train.data.access import Access, access_from, access_options
from jigsaw_pretrain.train.data.loader import JigsawLoader
from jigsaw_pretrain.train.streams import BALANCES, FITS, StreamOptions

Pair = tuple[bytes, bytes]


def interleave(per_rank: Sequence[Sequence[Pair]], world: int, lanes: int, chunk: int) -> list[Pair]:
    """The jigsaws' digests in global lane order from each rank's, in its own lane order.

    Lane ``l`` is the ``l // world``-th of rank ``l % world`` and has ``chunk`` jigsaws. Raises ValueError where the
    ranks' lists are not lanes * chunk / world long.
    """
    if len(per_rank) != world or any(len(part) * world != lanes * chunk for part in per_rank):
        raise ValueError(f"{[len(part) for part in per_rank]} digests do not make {lanes} lanes of {chunk} jigsaws")
    ordered: list[Pair] = []
    for lane in range(lanes):
        first = lane // world * chunk
        ordered += per_rank[lane % world][first : first + chunk]
    return ordered


def batch_digest(pairs: Sequence[Pair]) -> tuple[str, str]:
    """The (identity, pixels) digests of a batch as hexadecimal sha256, from its jigsaws' in global lane order."""
    identity, pixels = zip(*pairs, strict=True)
    return hashlib.sha256(b"".join(identity)).hexdigest(), hashlib.sha256(b"".join(pixels)).hexdigest()


def digest_line(step: int, pairs: Sequence[Pair]) -> str:
    """``step identity-sha256 pixels-sha256`` of a global batch, without a newline."""
    return f"{step} {' '.join(batch_digest(pairs))}"


def loaders_of(
    dataset: Dataset,
    template: Template,
    options: StreamOptions,
    *,
    world: int,
    workers: int,
    first: int,
    steps: int,
    start_method: str | None = None,
    access: Access | None = None,
) -> list[JigsawLoader]:
    """The loaders of all ranks of a run in one process, with digests, from step ``first`` on for ``steps`` steps."""
    return [
        JigsawLoader(
            dataset,
            template,
            options,
            rank=rank,
            world=world,
            workers=workers,
            start_step=first,
            stop_step=first + steps,
            with_digests=True,
            start_method=start_method,
            access=access,
        )
        for rank in range(world)
    ]


def digest_lines(loaders: Sequence[JigsawLoader], options: StreamOptions) -> Iterator[str]:
    """The lines of a run whose ranks are ``loaders``, made with digests; ends when they end, and closes them."""
    try:
        for batches in zip(*loaders, strict=True):
            per_rank = [batch.digests or () for batch in batches]
            pairs = interleave(per_rank, len(loaders), options.lane_count, options.chunk)
            yield digest_line(batches[0].step, pairs)
    finally:
        for loader in loaders:
            loader.close()


@click.command()
@click.option("--data", required=True, metavar="OUT", help="The prepped dataset: a folder or URL.")
@click.option("--batch", default=64, show_default=True, help="Jigsaws in a global batch.")
@click.option("--lanes", type=int, help="Streams of the run. [default: the largest divisor of the batch up to 64]")
@click.option("--steps", default=4, show_default=True, help="How many steps to print.")
@click.option("--from-step", default=0, show_default=True, help="The first of them.")
@click.option("--world", default=1, show_default=True, help="Ranks to simulate.")
@click.option("--workers", default=0, show_default=True, help="Worker processes of each rank.")
@click.option("--seed", default=0, show_default=True, help="Seed of the run.")
@click.option("--size", default=224, show_default=True, help="Side of a jigsaw in pixels.")
@click.option("--split", default=64, show_default=True, help="Where the template is cut.")
@click.option("--fit", type=click.Choice(FITS), default="crop", show_default=True, help="How a crop meets its region.")
@click.option("--resize-low", default=0.8, show_default=True, help="Least resize ratio.")
@click.option("--resize-high", default=1.5, show_default=True, help="Greatest resize ratio.")
@click.option("--flip", default=0.5, show_default=True, help="Probability of a horizontal flip.")
@click.option("--max-repeat", default=20, show_default=True, help="How often a thin group's crops may repeat.")
@click.option("--balance", type=click.Choice(BALANCES), default="none", show_default=True, help="Favour rare classes.")
@access_options
@click.option("--start-method", type=click.Choice(["fork", "spawn", "forkserver"]), help="How workers are started.")
def digest(
    data: str,
    batch: int,
    lanes: int | None,
    steps: int,
    from_step: int,
    world: int,
    workers: int,
    seed: int,
    size: int,
    split: int,
    fit: str,
    resize_low: float,
    resize_high: float,
    flip: float,
    max_repeat: int,
    balance: str,
    start_method: str | None,
    **access_settings: Any,
) -> None:
    """Print `step identity-sha256 pixels-sha256` for each step of a run: two machines see the same data if these agree.

    The defaults are the paper's; a run of other options has the lines of those options.
    """
    options = StreamOptions(
        seed=seed,
        batch=batch,
        lanes=lanes,
        fit=fit,
        resize_low=resize_low,
        resize_high=resize_high,
        flip=flip,
        max_repeat=max_repeat,
        balance=balance,
    )
    access = access_from(**access_settings)
    dataset, template = access.open_dataset(data), Template(size, split)
    loaders = loaders_of(
        dataset,
        template,
        options,
        world=world,
        workers=workers,
        first=from_step,
        steps=steps,
        start_method=start_method,
        access=access,
    )
    for note in loaders[0].notes:
        click.echo(note, err=True)
    for line in digest_lines(loaders, options):
        click.echo(line)

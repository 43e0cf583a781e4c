"""Context drawn at training time or once by prep: which features name held-out crops better, at equal steps?

    python bench/context.py [--seeds 3] [--recipe recipes/sample.toml] [--set KEY=VALUE ...] [--workers 1]

Draws the sample dataset (240 images, seed 0), preps it both ways, pre-trains the recipe on each over the seeds, and
evaluates every run on the same held-out images (120, seed 1, context at prep). The two runs of a seed begin with the
same weights; the difference is taken within the seed. Prints a table and writes bench/results/context.json. What is
finished stays in --out and is not done again, so a call that was cut short is continued by the same call. About 80 s
per run of the sample recipe on two cores.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
from rich.console import Console
from rich.table import Table

from bench.sample import ROOT, command, draw, prep
from bench.timing import RESULTS, write
from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.formats.jigsaw import REGIONS

WAYS = ("prep", "train")


def accuracy(folder: Path, data: Path, held_out: Path, settings: list[str], machine: tuple[object, ...]) -> Any:
    """What ``train evaluate`` reports of a run, which is made or continued first."""
    report = folder / "held-out.json"
    if not report.exists():
        command("train", "pretrain", "--data", data, "--run", folder, *settings, *machine, "--resume")
        command("train", "evaluate", "--run", folder, "--data", held_out, "--json", report, *machine)
    return json.loads(report.read_text())


def table(found: dict[str, list[Any]], differences: list[float]) -> Table:
    """Accuracy over all regions by seed, and in the mean by region."""
    shown = Table(title="held-out accuracy by where the context is drawn")
    for head in ("", *WAYS, "train - prep"):
        shown.add_column(head, justify="right" if head else "left")

    def add(name: str, values: list[float], spread: str = "") -> None:
        shown.add_row(name, *(f"{value:.1%}" for value in values), f"{100 * (values[1] - values[0]):+.1f}{spread}")

    for seed, pair in enumerate(zip(*(found[way] for way in WAYS), strict=True)):
        add(f"seed {seed}", [one["overall"]["accuracy"] for one in pair])
    shown.add_section()
    spread = f" (sd {100 * statistics.stdev(differences):.1f})" if len(differences) > 1 else ""
    add("mean", [statistics.mean(one["overall"]["accuracy"] for one in found[way]) for way in WAYS], spread)
    for region in REGIONS:
        means = [statistics.mean(one["regions"][region]["accuracy"] for one in found[way]) for way in WAYS]
        add(f"mean of {region}", means)
    return shown


@click.command(cls=Command)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "context", help="Where all is kept.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--recipe", type=click.Path(path_type=Path, exists=True), default=ROOT / "recipes" / "sample.toml")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Of the recipe.")
@click.option("--workers", default=1, show_default=True)
@click.option("--device", default="auto", show_default=True)
def main(out: Path, seeds: int, recipe: Path, settings: tuple[str, ...], workers: int, device: str) -> None:
    """Print the table and write bench/results/context.json."""
    out = out.resolve()
    drawn, other = draw(out / "drawn", 240), draw(out / "drawn-held-out", 120, seed=1)
    held_out = prep(other, out / "held-out", "--context-at", "prep", "--workers", 1)
    machine = ("--workers", workers, "--device", device)
    found: dict[str, list[Any]] = {way: [] for way in WAYS}
    for seed in range(seeds):
        chosen = [
            "--recipe",
            str(recipe),
            *(part for one in (*settings, f"data.seed={seed}") for part in ("--set", one)),
        ]
        for way in WAYS:
            data = prep(drawn, out / f"at-{way}", "--context-at", way, "--workers", 1)
            found[way].append(accuracy(out / f"{way}-{seed}", data, held_out, chosen, machine))
    pairs = zip(*(found[way] for way in WAYS), strict=True)
    differences = [after["overall"]["accuracy"] - before["overall"]["accuracy"] for before, after in pairs]
    Console().print(table(found, differences))
    size = {way: json.loads((out / f"at-{way}/manifests/dataset.json").read_text())["totals"]["bytes"] for way in WAYS}
    click.echo(
        f"shard bytes: {size['prep']:,} at prep, {size['train']:,} at train ({size['train'] / size['prep']:.2f}x)"
    )
    write("context", {"differences": differences, "bytes": size, **found})


if __name__ == "__main__":
    main()

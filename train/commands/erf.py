"""`erf`: the receptive field of any weights, drawn and in numbers, side by side."""

import json
from pathlib import Path

import click

from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.formats.dataset.dataset import open_dataset
from jigsaw_pretrain.storage.files import publish_locally
from jigsaw_pretrain.train.commands.options import recipe_options, tell_loading
from jigsaw_pretrain.train.engine.run_folder import DESCRIPTION, RunFolder, read_description
from jigsaw_pretrain.train.recipe import Recipe


@click.command(cls=Command)
@click.option(
    "--weights",
    required=True,
    multiple=True,
    help="Measure this weights file or run, or `random` for new weights. The option may be given several times.",
)
@click.option("--data", required=True, metavar="OUT", help="Measure on jigsaws of this dataset.")
@click.option(
    "--count", default=16, show_default=True, type=click.IntRange(1, 4096), help="Measure on this many jigsaws."
)
@recipe_options
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("erf/report.html"),
    show_default=True,
    help="Write the HTML page to this file.",
)
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Also write the numbers to this file."
)
def erf(
    weights: tuple[str, ...],
    data: str,
    count: int,
    recipe: str | None,
    settings: tuple[str, ...],
    out: Path,
    json_file: Path | None,
) -> None:
    """Measure and draw the effective receptive fields of weights files, side by side.

    A run, and a file that one wrote, say which backbone, norm, mean and std are theirs; of other weights the recipe
    says it. The recipe gives the jigsaws too, the first ones of its run: where none is named, that of the first RUN.
    """
    run = next((name for name in weights if (Path(name) / DESCRIPTION).exists()), None)
    if recipe is None and run is not None:
        own = read_description(RunFolder(Path(run)))
        chosen = Recipe.from_dict(own["recipe"], f"{run}/{DESCRIPTION}").updated(*settings)
    else:
        chosen = Recipe.load(recipe, settings)
    dataset = open_dataset(data)
    tell_loading(data)

    from jigsaw_pretrain.train.erf import SHARES
    from jigsaw_pretrain.train.report import fields

    found = fields.erf(weights, dataset, chosen, count)
    numbers = {}
    for name, one in found.items():
        sides = {f"{share:.0%}": side for share, side in zip(SHARES, one.numbers.sides, strict=True)}
        numbers[name] = {"sides": sides, "rms_radius": one.numbers.rms_radius}
        told = ", ".join(f"{share} of the gradient in {side} x {side} px" for share, side in sides.items())
        radius = f"{one.numbers.rms_radius:.3g}"
        click.echo(f"{name}, at the middle position: {told} around it; root-mean-square distance {radius} px")
    publish_locally(out, fields.erf_page(found, chosen, count).encode())
    click.echo(str(out))
    if json_file is not None:
        publish_locally(json_file, (json.dumps(numbers, indent=2) + "\n").encode())

"""`erf`: the receptive field of any weights, drawn and in numbers, side by side.

Compares pre-trainings of one backbone (scratch, jigsaw, block-wise, ImageNet): the field of the map's central position
and of the four regions on jigsaws of a dataset, and the squares that hold 20, 30, 50 and 99 % of the central field's
mass (Luo et al. 2016). Costs five backward passes
per file: ResNet-50 at 224 px with 16 jigsaws takes about 20 s on one core.
"""

import json
from functools import partial
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.formats.dataset.dataset import open_dataset
from jigsaw_pretrain.formats.jigsaw import REGIONS
from jigsaw_pretrain.html import Figure, Section, Table, chart, render
from jigsaw_pretrain.rng import key_of_text
from jigsaw_pretrain.storage import publish_locally
from jigsaw_pretrain.train.commands.options import recipe_options
from jigsaw_pretrain.train.data.loader import JigsawLoader
from jigsaw_pretrain.train.engine.optim import seeded
from jigsaw_pretrain.train.erf import SHARES, FieldNumbers, eval_mode, field_map, field_numbers
from jigsaw_pretrain.train.models import backbones
from jigsaw_pretrain.train.models.classifier import DenseClassifier
from jigsaw_pretrain.train.models.weights import load_weights
from jigsaw_pretrain.train.recipe import Recipe
from jigsaw_pretrain.train.report.figures import draw_fields

RANDOM = "random"


def measure(
    module: nn.Module, images: Tensor, region_map: npt.NDArray[np.int64], stride: int
) -> tuple[list[Tensor], FieldNumbers]:
    """The fields of the central position and of the four regions, each [H, W], and the central one's numbers."""
    middle = region_map.shape[0] // 2
    places = [[(middle, middle)]]
    places += [[(int(j), int(k)) for j, k in np.argwhere(region_map == region)] for region in range(len(REGIONS))]
    with eval_mode(module):
        maps = [field_map(module, images, positions).cpu() for positions in places]
    centre = (middle + 0.5) * stride - 0.5
    return maps, field_numbers(maps[0], (centre, centre))


def _figure(named: dict[str, list[Tensor]]) -> Figure:
    rows = {name: [field.numpy() for field in maps] for name, maps in named.items()}
    draw = partial(draw_fields, rows=rows, titles=["centre", *REGIONS], label_size=8)
    alt = f"effective receptive fields of {', '.join(named)}: of the central position and of each region"
    caption = "Gradient magnitude on the input, logarithmic over two decades (bright is most)."
    return chart(draw, alt, caption, (9.5, 2.0 * len(named) + 0.3))


@click.command(cls=Command)
@click.option("--weights", required=True, multiple=True, help=f"Weights file, or `{RANDOM}`; again for more.")
@click.option("--data", required=True, metavar="OUT", help="The prepped dataset whose jigsaws are measured on.")
@click.option("--count", default=16, show_default=True, type=click.IntRange(1, 4096), help="How many jigsaws.")
@recipe_options
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("erf.html"), show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="The numbers as JSON.")
def erf(
    weights: tuple[str, ...],
    data: str,
    count: int,
    recipe: Path | None,
    settings: tuple[str, ...],
    out: Path,
    json_file: Path | None,
) -> None:
    """Measure and draw the effective receptive field of weights, to compare pre-trainings.

    The weights are of the recipe's backbone; they are measured on the first jigsaws of the recipe's run.
    """
    dataset = open_dataset(data)
    chosen = Recipe.load(recipe, settings).resolved(dataset)
    options, backbone = chosen.data, chosen.model.backbone
    pixels, (mean, std) = dataset.pixels, options.normalisation
    pictures = JigsawLoader(dataset, options, workers=0).first(count).images
    fields: dict[str, list[Tensor]] = {}
    rows, found_numbers = [], {}
    for file in dict.fromkeys(weights):
        with seeded(key_of_text(options.seed, "random weights")):
            built = backbones.build(backbone, in_channels=pixels.channels)
        region_map = options.template.region_map(built.stride)
        if file != RANDOM:
            load_weights(built, file)
        images = DenseClassifier(built.module, built.channels, 2, mean, std, pixels=pixels).normalise(pictures)
        maps, found = measure(built.module, images, region_map, built.stride)
        fields[file] = maps
        rows.append([file, *found.sides, found.rms_radius])
        found_numbers[file] = {
            "sides": {f"{share:.0%}": side for share, side in zip(SHARES, found.sides, strict=True)},
            "rms_radius": found.rms_radius,
        }
        sides = ", ".join(f"{share:.0%} {side} px" for share, side in zip(SHARES, found.sides, strict=True))
        click.echo(f"{file}: {sides}; RMS radius {found.rms_radius:.1f} px")
    heads = ["weights", *(f"{share:.0%} of the mass, px" for share in SHARES), "RMS radius, px"]
    text = (
        f"{backbone} at {options.template_size} px on {count} jigsaws. The table gives the side of the smallest square "
        "about the central position that holds a share of its field's mass."
    )
    section = Section("Effective receptive fields", text, [Table(heads, rows)], figures=[_figure(fields)])
    publish_locally(out, render("Receptive fields", "What a feature looks at.", [section]).encode())
    if json_file is not None:
        publish_locally(json_file, (json.dumps(found_numbers, indent=2) + "\n").encode())

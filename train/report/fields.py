"""Compares the receptive fields of several weights, in numbers and as a page.

Sets pre-trainings side by side (scratch, jigsaw, block-wise, ImageNet): the field of the map's central position and of
the four regions on jigsaws of a dataset, and the squares that hold 20, 30, 50 and 99 % of the central field's mass (Luo
et al. 2016). Costs five backward passes per file: ResNet-50 at 224 px with 16 jigsaws takes about 20 s on one core.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset.dataset import Dataset
from jigsaw_pretrain.formats.jigsaw import REGION_WORDS, REGIONS
from jigsaw_pretrain.html import Section, Table, chart, render
from jigsaw_pretrain.rng import key_of_text
from jigsaw_pretrain.train.data.loader import JigsawLoader
from jigsaw_pretrain.train.engine.checkpoint import backbone_state, trained_state
from jigsaw_pretrain.train.engine.optim import seeded
from jigsaw_pretrain.train.engine.run_folder import RunFolder, open_trained
from jigsaw_pretrain.train.engine.weights_info import info_of, read_weights_info
from jigsaw_pretrain.train.erf import SHARES, FieldNumbers, eval_mode, field_map, field_numbers
from jigsaw_pretrain.train.models import backbones
from jigsaw_pretrain.train.models.classifier import DenseClassifier
from jigsaw_pretrain.train.models.weights import load_state, load_weights
from jigsaw_pretrain.train.recipe import Recipe
from jigsaw_pretrain.train.report.figures import draw_fields, short_names
from jigsaw_pretrain.words import counted

RANDOM = "random"
"""In place of a weights file: the backbone as its library initialises it."""


@dataclass(frozen=True)
class MeasuredFields:
    """Receptive fields of one weights file.

    maps: of the central position and of the four regions, each float [H, W]. numbers: of the central one.
    """

    maps: list[Tensor]
    numbers: FieldNumbers


def erf(weights: Iterable[str], dataset: Dataset, recipe: Recipe, count: int = 16) -> dict[str, MeasuredFields]:
    """Measure the receptive fields of weights of the recipe's backbone on the first jigsaws of the recipe's run.

    Args:
        weights: files, folders of runs (the newest checkpoint's are taken), or RANDOM.
        dataset: the prepped dataset whose jigsaws are measured on.
        recipe: how jigsaws are made; of weights that do not say it, the backbone, its norm, mean and std.
        count: jigsaws.

    Returns:
        The fields of each of the weights, by name.

    Raises:
        UserError: for weights that are not the backbone's.
    """
    chosen = recipe.resolved(dataset)
    options, pixels = chosen.data, dataset.pixels
    own = info_of(chosen, pixels)
    pictures = JigsawLoader(dataset, options, workers=0).first(count).images
    found = {}
    for name in dict.fromkeys(weights):
        said = (None if name == RANDOM else read_weights_info(Path(name))) or own
        if (said.pixels.channels, said.pixels.dtype) != (pixels.channels, pixels.dtype):
            raise UserError(f"{name} was trained on pixels of {said.pixels}, and {dataset.url} has {pixels}")
        with seeded(key_of_text(options.seed, "random weights")):
            norm = "gn" if said.norm == "gn" else "bn"
            built = backbones.build(said.backbone, norm, in_channels=pixels.channels)
        if name != RANDOM and Path(name).is_dir():
            trained = trained_state(open_trained(RunFolder(Path(name)))[2])
            load_state(built, backbone_state(trained), name)
        elif name != RANDOM:
            load_weights(built, name)
        classifier = DenseClassifier(built.module, built.channels, 2, said.mean, said.std, pixels=pixels)
        images = classifier.normalise(pictures)
        measured = measure(built.module, images, options.template.region_map(built.stride), built.stride)
        if not all(bool(one.isfinite().all()) for one in measured.maps):
            raise UserError(f"{name} has no receptive field: its numbers are so large that its gradient is not finite")
        found[name] = measured
    return found


def measure(module: nn.Module, images: Tensor, region_map: npt.NDArray[np.int64], stride: int) -> MeasuredFields:
    """The fields of the central position and of the four regions, and the central one's numbers."""
    middle = region_map.shape[0] // 2
    places = [[(middle, middle)]]
    places += [[(int(j), int(k)) for j, k in np.argwhere(region_map == region)] for region in range(len(REGIONS))]
    with eval_mode(module):
        maps = [field_map(module, images, positions).cpu() for positions in places]
    centre = (middle + 0.5) * stride - 0.5
    return MeasuredFields(maps, field_numbers(maps[0], (centre, centre)))


def erf_page(found: Mapping[str, MeasuredFields], recipe: Recipe, count: int) -> str:
    """The HTML page of measured fields."""
    heads = ["weights", *(f"{share:.0%}, px" for share in SHARES), "RMS radius, px"]
    rows = [[name, *one.numbers.sides, one.numbers.rms_radius] for name, one in found.items()]
    text = (
        f"On {counted(count, 'jigsaw')} of {recipe.data.template_size} px. The table gives the side of the smallest "
        "square about the central position that holds a share of its gradient, and the root mean square distance of "
        "the gradient from it."
    )
    short = short_names(list(found))
    named = {name: [field.numpy() for field in one.maps] for name, one in zip(short, found.values(), strict=True)}
    figure = chart(
        partial(draw_fields, rows=named, titles=["centre", *REGION_WORDS.values()]),
        f"effective receptive fields of {', '.join(named)}: of the central position and of each region",
        "Gradient magnitude on the input, logarithmic over two decades (bright is most).",
        (9.5, 2.0 * len(named) + 0.3),
        large=True,
    )
    section = Section("Measured", text, [Table(heads, rows)], figures=[figure])
    lead = "How much of a jigsaw a feature of the last map looks at, by the gradient on the input."
    return render("Effective receptive fields", lead, [section])

"""What weights were trained with, told by the run or the file that they come from: backbone, norm, mean, std, pixels.

A run says it in run.json; its backbone.pth and what `export` writes say it of themselves (models/weights.py), wherever
they are copied to. Weights from elsewhere say nothing. What is built on weights takes it from here, so that the numbers
that an image is normalised with are never guessed where they are known. A file costs reading it once more.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.pixels import RGB8, PixelFormat, named
from jigsaw_pretrain.train.engine.run_folder import DESCRIPTION, RunFolder, pixels_of, read_description
from jigsaw_pretrain.train.models.weights import read_about
from jigsaw_pretrain.train.recipe import Recipe

BACKBONE_FILES = ("backbone.pth", "backbone-fpn.pth")


@dataclass(frozen=True)
class WeightsInfo:
    """What weights were trained with.

    source: where this is said. backbone: its name. norm: one of "bn" and "gn" in pre-training, of the detector's norms
    in a detector. mean, std: of each channel, of pixels in 0..1. pixels: what images are read as.
    """

    source: str
    backbone: str
    norm: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pixels: PixelFormat = RGB8

    def to_about(self) -> dict[str, str]:
        """The entries that a weights file keeps."""
        about = {
            "backbone": self.backbone,
            "norm": self.norm,
            "mean": json.dumps(self.mean),
            "std": json.dumps(self.std),
            "order": "RGB",
        }
        if not self.pixels.is_rgb8:
            about |= {"order": "as stored", "channels": str(self.pixels.channels), "dtype": self.pixels.dtype}
        return about


def info_of(recipe: Recipe, pixels: PixelFormat, source: str = "") -> WeightsInfo:
    """That of a run's weights, by its recipe with mean and std written out."""
    mean, std = recipe.data.normalisation
    return WeightsInfo(source, recipe.model.backbone, recipe.model.norm, mean, std, pixels)


def read_weights_info(source: Path) -> WeightsInfo | None:
    """What a run's folder or a weights file says of its training; None where it says nothing.

    Raises UserError for a run or file that cannot be read, and for entries that this program does not know.
    """
    if not source.is_dir() and (about := read_about(str(source))):
        return _from_about(about, str(source))
    folder = source if source.is_dir() else source.parent if source.name in BACKBONE_FILES else None
    if folder is None:
        return None
    if (folder / DESCRIPTION).exists():
        run = RunFolder(folder)
        description = read_description(run)
        recipe = Recipe.from_dict(description["recipe"], str(run.description))
        return info_of(recipe, pixels_of(run, description), str(folder))
    file = folder / BACKBONE_FILES[0]
    return _from_about(about, str(file)) if source.is_dir() and (about := read_about(str(file))) else None


def _from_about(about: dict[str, str], source: str) -> WeightsInfo:
    try:
        mean, std = (tuple(float(one) for one in json.loads(about[key])) for key in ("mean", "std"))
        pixels = named(f"{about['channels']}x{about['dtype']}") if "dtype" in about else RGB8
        if not len(mean) == len(std) == pixels.channels or not all(one > 0 for one in std):
            raise ValueError("mean and std are not of the pixels' channels")
        return WeightsInfo(source, about["backbone"], about.get("norm", "bn"), mean, std, pixels)
    except (KeyError, ValueError, TypeError, RecursionError, UserError) as error:
        raise UserError(
            f"{source} says of its training what this program does not know ({error!r}): export it anew"
        ) from error

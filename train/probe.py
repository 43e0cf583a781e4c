"""A linear probe: do a run's features tell crops apart better than the same backbone's at random?

The cheap check before a detector: a linear classifier on averaged features of held-out crops (another dataset than the
run's, prepped with the same classes), beside one on the same backbone at its random initialisation. Images of that
dataset are split in four: three parts to fit the classifier, one to judge it, so no image is on both sides. The random
backbone's batch norms get statistics of the crops to fit (without any it would be no rival); all else is the same.
Weights from elsewhere, of the same backbone, stand beside where they are named. Costs two forward passes per crop, one
more per weights file, and seconds to fit. Prefer `detect train` for what counts in the end.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from jigsaw_pretrain import rng
from jigsaw_pretrain.config import Count, checked
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset.dataset import Dataset, require_dataset
from jigsaw_pretrain.formats.jigsaw import Fit
from jigsaw_pretrain.train.data.augment import place_along, resample_channels, resized, scaled_sizes, with_mean_context
from jigsaw_pretrain.train.data.reader import SOURCE, CropReader, LocalShards
from jigsaw_pretrain.train.engine.checkpoint import trained_state
from jigsaw_pretrain.train.engine.distributed import start
from jigsaw_pretrain.train.engine.run_folder import (
    check_classes,
    check_pixels,
    open_run_folder,
    open_trained,
    pixels_of,
    was_trained_on,
)
from jigsaw_pretrain.train.engine.state import build_model
from jigsaw_pretrain.train.models.classifier import DenseClassifier
from jigsaw_pretrain.train.models.layers import measure_batch_norms
from jigsaw_pretrain.train.models.weights import load_weights
from jigsaw_pretrain.train.recipe import Device

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Weight penalties tried, on a quarter of the crops to fit."""

BATCH = 64

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbeCrops:
    """Crops of a dataset, all of one size.

    pixels: [n, side, side, channels] of the dataset's type. labels: int64 [n], the background being class C. fold: 0
    to 3 by image.
    """

    pixels: npt.NDArray[Any]
    labels: Tensor
    fold: npt.NDArray[np.int64]


@dataclass(frozen=True)
class ProbeResult:
    """How well a linear classifier does.

    top1: share of crops named right. class_mean: the mean of that share over the classes judged. penalty: of the
    classifier, one of PENALTIES.
    """

    top1: float
    class_mean: float
    penalty: float


def read_crops(dataset: Dataset, side: int, most: int, fit: Fit = "warp", ratio: float = 1.0) -> ProbeCrops:
    """At most ``most`` crops of the dataset, drawn by keys, each shown in ``side`` x ``side`` pixels as ``fit`` says.

    Where the trainer draws the context they have half of it on each side, always. ratio: of sizes, for ``crop``.
    """
    reader = CropReader(dataset, LocalShards(dataset), capacity=1, with_keys=True)
    count = sum(shard.crops for shard in dataset.shards)
    chosen = np.zeros(count, dtype=np.bool_)
    chosen[rng.permutation(rng.key_of_text(0, "probe's crops"), count)[:most]] = True
    pixels, labels, images, begin = [], [], [], 0
    for shard in dataset.shards:
        crops = reader.crops(shard.index)
        mine = crops[chosen[begin : begin + shard.crops]]
        if reader.context is not None:
            mine = with_mean_context(mine, reader.context)
        begin += shard.crops
        for key, crop in zip(reader.keys(mine), mine, strict=True):
            found = reader.decode(*(int(crop[field]) for field in SOURCE))
            if found is None:
                continue
            pixels.append(shown(found, side, fit, ratio))
            labels.append(int(crop["label"]))
            images.append(int(key.split("-")[0][:12], 16))
    if not pixels:
        raise UserError(f"{dataset.url} has no crop that can be read: prep it again")
    fold = rng.randint(rng.derive_key(rng.key_of_text(0, "probe's folds"), np.array(images, dtype=np.int64)), 4)
    return ProbeCrops(np.stack(pixels), torch.tensor(labels), fold)


def shown(pixels: npt.NDArray[Any], side: int, fit: Fit, ratio: float) -> npt.NDArray[Any]:
    """A crop [height, width, channels] in the middle of a square, as training shows it by ``fit`` (Table 1).

    ``crop`` resizes it by ``ratio``, ``resize`` until it fits. Where it is smaller than the square there are zeros.
    """
    height, width = pixels.shape[:2]
    if fit == "warp":
        return resized(pixels, (side, side), cv2.INTER_AREA if height * width > side * side else cv2.INTER_LINEAR)
    room = np.array([side, side])
    sizes = scaled_sizes(np.array(width), np.array(height), np.array(ratio), (room[0], room[1]), fit)
    scaled = int(sizes[0]), int(sizes[1])
    first, to, length = place_along(np.array(scaled), room, None, "centre")
    square = np.zeros((side, side, pixels.shape[2]), pixels.dtype)
    window = square[to[1] : to[1] + length[1], to[0] : to[0] + length[0]]
    resample_channels(pixels, scaled, False, (int(first[0]), int(first[1])), True, window)
    return square


@torch.inference_mode()
def features(model: DenseClassifier, crops: ProbeCrops, device: torch.device) -> Tensor:
    """The backbone's last map (below any neck), averaged over positions: float32 [n, channels] on the CPU."""
    model.eval()
    found = []
    for begin in range(0, len(crops.pixels), BATCH):
        images = torch.from_numpy(crops.pixels[begin : begin + BATCH]).to(device)
        found.append(model.last_map(model.normalise(images)).float().mean((2, 3)).cpu())
    return torch.cat(found)


def gather_statistics(model: DenseClassifier, crops: ProbeCrops, device: torch.device) -> None:
    """Give the backbone's batch norms the statistics of the crops to fit; nothing where there are none."""
    fitting = crops.pixels[crops.fold != 0]
    # Batch norm takes no batch of one crop.
    starts = range(0, len(fitting) - 1, BATCH)
    batches = (torch.from_numpy(fitting[start : start + BATCH]).to(device) for start in starts)
    measure_batch_norms(model.backbone, (model.normalise(images) for images in batches))


def fitted(values: Tensor, labels: Tensor, classes: int, penalty: float) -> Tensor:
    """Weights [channels + 1, classes] of multinomial logistic regression, by L-BFGS on standardised features."""
    weights = torch.zeros(values.shape[1] + 1, classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(values @ weights[:-1] + weights[-1], labels) + penalty * weights[:-1].square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def judged(values: Tensor, labels: Tensor, fold: npt.NDArray[np.int64], classes: int) -> ProbeResult:
    """Fit on folds 1 to 3, with the penalty that is best on fold 1 when fitted on 2 and 3; judge on fold 0."""
    part = torch.from_numpy(fold)
    fitting = part != 0
    values = (values - values[fitting].mean(0)) / values[fitting].std(0).clamp(min=1e-6)
    best = (-1.0, PENALTIES[0])
    for penalty in PENALTIES:
        weights = fitted(values[part > 1], labels[part > 1], classes, penalty)
        share = (predicted(values[part == 1], weights) == labels[part == 1]).double().mean().item()
        best = max(best, (share, penalty), key=lambda one: one[0])
    weights = fitted(values[fitting], labels[fitting], classes, best[1])
    right = predicted(values[~fitting], weights) == labels[~fitting]
    by_class = [right[labels[~fitting] == label].double().mean() for label in labels[~fitting].unique()]
    return ProbeResult(right.double().mean().item(), torch.stack(by_class).mean().item(), best[1])


def predicted(values: Tensor, weights: Tensor) -> Tensor:
    """The class of each row."""
    return (values @ weights[:-1] + weights[-1]).argmax(1)


def probe(
    run: str | Path,
    dataset: Dataset,
    *,
    weights: Sequence[str] = (),
    crops: int = 20_000,
    side: int | None = None,
    fit: Fit = "warp",
    device: str = "auto",
) -> dict[str, Any]:
    """How well a linear classifier on a run's features names held-out crops, beside one on random features.

    Args:
        run: the run's folder or URL.
        dataset: a prepped dataset of other images than the run's, with its classes and pixels.
        weights: files of the run's backbone that others trained (ImageNet's, another method's), to stand beside. They
            get pixels by the run's mean and std.
        crops: how many crops to use, at most.
        side: of the square that a crop is shown in, in pixels; None takes that of the large region.
        fit: how it is shown there, as the recipe's ``data.fit``. ``warp`` shows the whole of every crop as large as can
            be, and is kind to a run that was trained so; ``crop`` is nearest to what a detector sees.
        device: ``auto``, ``cpu`` or ``cuda``.

    Returns:
        The figures of the run, of random features and, in ``weights``, of each file (``top1``, ``class_mean``: shares,
        0 to 1), and of what.

    Raises:
        UserError: for a run without a checkpoint, another dataset's classes or pixels, too few images, and weights of
            another backbone.
    """
    checked(crops, Count, "crops")
    checked(side, Count | None, "side")
    checked(fit, Fit, "fit")
    checked(device, Device, "device")
    require_dataset(dataset)
    folder = open_run_folder(run)
    description, recipe, content = open_trained(folder)
    check_classes(folder, description["classes"], tuple(dataset.classes))
    check_pixels(folder, pixels_of(folder, description), dataset.pixels)
    if was_trained_on(description, dataset):
        log.warning("%s is the dataset that %s was trained on: nothing is held out", dataset.url, run)
    chosen = start(device).device
    data = recipe.data
    ratio = (data.resize_low + data.resize_high) / 2
    found = read_crops(dataset, side or data.template_size - data.template_split, crops, fit, ratio)
    sizes = [int((found.fold == one).sum()) for one in range(4)]
    if not all(sizes):
        raise UserError(f"{dataset.url} has too few images for a probe: prep a larger held-out dataset")
    results: list[ProbeResult] = []
    for name in ("run", "random", *weights):
        backbone, model = build_model(recipe, dataset.label_count, dataset.pixels)
        if name == "run":
            model.load_state_dict(trained_state(content))
        elif name != "random":
            load_weights(backbone, name)
        model.to(device=chosen, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if name == "random":
            gather_statistics(model, found, chosen)
        results.append(judged(features(model, found, chosen), found.labels, found.fold, dataset.label_count))
    about = {"backbone": recipe.model.backbone, "step": content["step"]}
    return {**about, **summary(results[0], results[1], dict(zip(weights, results[2:], strict=True)), found)}


def summary(
    run: ProbeResult, random: ProbeResult, weights: Mapping[str, ProbeResult], crops: ProbeCrops
) -> dict[str, Any]:
    """The figures of a probe."""
    judging = crops.labels[torch.from_numpy(crops.fold == 0)]
    return {
        "crops_to_fit": int((crops.fold != 0).sum()),
        "crops_to_judge": len(judging),
        "classes_judged": len(judging.unique()),
        "majority_share": judging.bincount().max().item() / len(judging),
        "run": asdict(run),
        "random": asdict(random),
        "weights": {name: asdict(one) for name, one in weights.items()},
        "class_mean_ratio": run.class_mean / max(random.class_mean, 1e-12),
    }

"""How well a model names the regions of jigsaws, of this or another dataset: by region, class and group.

Jigsaws are made without augmentation (ratio 1, no flip, centred). A region's prediction is the class with the largest
logit after averaging the logits over the region's positions, whatever the run's strategy, and with a neck over its
levels, each counting alike. Beside every accuracy stands the majority share: what always naming the commonest class of
those crops would reach. Where the dataset leaves the context to the trainer (``--context-at train``) it is drawn here
as in training, by the recipe's seed and the position: the same crops each time. Costs a forward pass per jigsaw. It
measures the pre-training task, not detection: compare runs of one dataset by it, and backbones by a detector's AP.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from msgspec.structs import replace

from jigsaw_pretrain.config import Count, checked
from jigsaw_pretrain.formats.dataset.dataset import Dataset, require_dataset
from jigsaw_pretrain.formats.jigsaw import GROUPS, REGION_GROUPS, REGIONS
from jigsaw_pretrain.train import losses
from jigsaw_pretrain.train.data.batch import BatchSource
from jigsaw_pretrain.train.data.loader import JigsawLoader
from jigsaw_pretrain.train.data.remote import ReadOptions
from jigsaw_pretrain.train.engine.checkpoint import trained_state
from jigsaw_pretrain.train.engine.distributed import start
from jigsaw_pretrain.train.engine.optim import autocast
from jigsaw_pretrain.train.engine.pretraining import TrainingJob, Validate
from jigsaw_pretrain.train.engine.run_folder import (
    check_classes,
    check_pixels,
    open_run_folder,
    open_trained,
    pixels_of,
    was_trained_on,
)
from jigsaw_pretrain.train.engine.state import State, build_model, region_maps
from jigsaw_pretrain.train.engine.trainer import Stopped
from jigsaw_pretrain.train.recipe import Device

MOST_JIGSAWS = 4096
"""The default limit: enough for one percent of standard error on each region."""

SEEN = "this tells how well it knows them, not how it does on images that it has not seen"

Labels = npt.NDArray[np.int64]

log = logging.getLogger(__name__)


def evaluate(
    run: str | Path,
    dataset: Dataset,
    *,
    jigsaws: int | None = None,
    batch: int = 64,
    workers: int = 2,
    device: str = "auto",
    access: ReadOptions | None = None,
) -> dict[str, Any]:
    """How well a run's newest weights name the crops of a dataset, by region, group and class.

    Args:
        run: the run's folder or URL.
        dataset: a prepped dataset of the run's classes and pixels, held out or not.
        jigsaws: how many to look at; None takes one pass over the dataset, at most MOST_JIGSAWS.
        batch: jigsaws at a time.
        workers: processes that make them.
        device: ``auto``, ``cpu`` or ``cuda``.
        access: how shards at a URL are read.

    Returns:
        ``step``, ``backbone``, ``trained_on`` (whether these are the crops of the run's training), ``jigsaws``, and
        scores (count, accuracy 0 to 1, majority share) under ``overall``, ``regions``, ``groups`` and ``classes``.

    Raises:
        UserError: for a run without a checkpoint, and for a dataset of other classes or pixels.
    """
    checked(jigsaws, Count | None, "jigsaws")
    checked(batch, Count, "batch")
    checked(device, Device, "device")
    require_dataset(dataset)
    folder = open_run_folder(run)
    description, recipe, content = open_trained(folder)
    check_classes(folder, description["classes"], tuple(dataset.classes))
    check_pixels(folder, pixels_of(folder, description), dataset.pixels)
    trained_on = was_trained_on(description, dataset)
    if trained_on:
        log.warning("%s is the dataset that %s was trained on: %s", dataset.url, run, SEEN)
    backbone, model = build_model(recipe, dataset.label_count, dataset.pixels)
    model.load_state_dict(trained_state(content))
    chosen = start(device).device
    model.to(device=chosen, memory_format=torch.channels_last)  # type: ignore[call-overload]
    wanted = jigsaws or min(MOST_JIGSAWS, one_pass(dataset))
    batch = min(batch, wanted)
    options = replace(recipe.data, batch=batch, lanes=None, augment=False, balance="none")
    source = JigsawLoader(dataset, options, workers=workers, stop_step=-(-wanted // batch), access=access)
    for note in source.notes:
        log.info("%s", note)
    try:
        found = predict(model, source, region_maps(recipe, backbone, chosen))
    finally:
        source.close()
    return {
        "step": content["step"],
        "backbone": recipe.model.backbone,
        "trained_on": trained_on,
        **summarise(found, dataset.classes),
    }


@dataclass(frozen=True)
class Predictions:
    """What was predicted: predictions, labels (classes) and groups (indices into GROUPS), each [n, 4] by region."""

    predictions: Labels
    labels: Labels
    groups: Labels


@torch.inference_mode()
def predict(
    model: torch.nn.Module,
    source: BatchSource,
    region_maps: Sequence[torch.Tensor],
    precision: str = "fp32",
    stopped: Callable[[], bool] = lambda: False,
) -> Predictions:
    """The model's prediction for every region of every jigsaw of the source; the model is put in eval mode.

    region_maps: of each map that the model gives logits of. precision: of the forward passes (run.precision). stopped:
    asked before each batch; what was predicted until then is returned.
    """
    model.eval()
    none = np.zeros((0, len(REGIONS)), dtype=np.int64)
    predictions, labels, groups = [none], [none], [none]
    device = region_maps[0].device
    for batch in source:
        if stopped():
            break
        with autocast(precision, device):
            logits = [one.float() for one in model(batch.images.to(device))]
        predictions.append(losses.predictions(logits, region_maps).cpu().numpy())
        # The source uses a batch's memory again.
        labels.append(batch.labels.numpy().astype(np.int64))
        groups.append(batch.groups.numpy().astype(np.int64))
    return Predictions(np.concatenate(predictions), np.concatenate(labels), np.concatenate(groups))


def score(predictions: Labels, labels: Labels) -> dict[str, Any]:
    """Count, accuracy and majority share of some predictions; the latter two None where there are none."""
    count = labels.size
    if not count:
        return {"count": 0, "accuracy": None, "majority_share": None}
    return {
        "count": int(count),
        "accuracy": float((predictions == labels).mean()),
        "majority_share": float(np.bincount(labels.ravel()).max() / count),
    }


def summarise(found: Predictions, classes: list[str]) -> dict[str, Any]:
    """Scores overall, by region, by group and by class (label order, the background last).

    Overall it has the balanced accuracy too: the mean over the classes that occur, each counting alike.
    A class's ``share`` is its part of all crops; its majority share would be 1 and is not given.
    """
    predictions, labels = found.predictions, found.labels
    by_class = []
    for label, name in enumerate([*classes, "background"]):
        mine = labels == label
        scores = score(predictions[mine], labels[mine])
        by_class.append(
            {"class": name, "count": scores["count"], "accuracy": scores["accuracy"], "share": float(mine.mean())}
        )
    known = [one["accuracy"] for one in by_class if one["accuracy"] is not None]
    by_group = {group: found.groups == code for code, group in enumerate(GROUPS)}
    return {
        "jigsaws": len(labels),
        "overall": {**score(predictions, labels), "balanced_accuracy": sum(known) / len(known) if known else None},
        "regions": {region: score(predictions[:, i], labels[:, i]) for i, region in enumerate(REGIONS)},
        "groups": {group: score(predictions[mine], labels[mine]) for group, mine in by_group.items()},
        "classes": by_class,
    }


def one_pass(dataset: Dataset) -> int:
    """Jigsaws that show every crop at least once, each slot taking the crops of its own group."""
    crops = {group: sum(shard.crops for shard in dataset.of_group(group)) for group in GROUPS}
    return max(1, *(-(-count // REGION_GROUPS.count(group)) for group, count in crops.items()))


def validation(job: TrainingJob, dataset: Dataset, workers: int, access: ReadOptions) -> Validate:
    """A function that evaluates a state of the job's run on ``dataset``, which has the run's classes.

    It gives None where a signal came meanwhile: the evaluation is then made when the run goes on.

    Call it on all ranks, every so often. It takes the same jigsaws every time (unaugmented, from the first position of
    every lane), each rank its own lanes, so the figures depend on no number of ranks. It leaves no trace in the run:
    weights, statistics and randomness after it are those of a run without. Costs a forward pass per jigsaw (at most
    MOST_JIGSAWS) and the start of the workers.
    """
    recipe, ranks = job.recipe, job.ranks
    if was_trained_on({"dataset": job.origin.fingerprint, "facts": job.origin.facts}, dataset):
        ranks.log_rank_zero(f"{dataset.url} is the dataset that is trained on: {SEEN}", logging.WARNING)
    wanted = min(MOST_JIGSAWS, one_pass(dataset))
    stream = replace(recipe.data, augment=False, balance="none")

    def validate(state: State, stopped: Stopped) -> dict[str, Any] | None:
        # Running statistics differ between ranks; those that count are rank 0's.
        ranks.broadcast_buffers(state.model)
        maps = region_maps(recipe, state.backbone, ranks.device)
        source = JigsawLoader(
            dataset,
            stream,
            rank=ranks.rank,
            world=ranks.world,
            workers=workers,
            stop_step=-(-wanted // recipe.data.batch),
            access=access,
        )
        try:
            found = predict(state.model, source, maps, recipe.run.precision, stopped)
        finally:
            source.close()
        if ranks.all_reduce_max(int(stopped())):
            return None
        shares = ranks.all_gather((found.predictions, found.labels, found.groups))
        gathered = Predictions(*(np.concatenate(parts) for parts in zip(*shares, strict=True)))
        report = summarise(gathered, dataset.classes)
        overall = report["overall"]
        ranks.log_rank_zero(
            f"step {state.step}: validation accuracy {overall['accuracy']:.1%} on {report['jigsaws']} jigsaws "
            f"(every class counting alike {overall['balanced_accuracy']:.1%}, always the commonest class "
            f"{overall['majority_share']:.1%})"
        )
        return report

    return validate

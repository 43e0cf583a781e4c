"""Trains one detector, from its arguments to a finished run's files; detect/task.py is what its steps are.

What does not fit (other classes, weights of another backbone, resuming as another run) is refused before the first
step.
"""

import json
import logging
import os
import posixpath
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from jigsaw_pretrain import rng
from jigsaw_pretrain.config import Count, CountOrZero, checked
from jigsaw_pretrain.detect.annotations import (
    GroundTruth,
    check_images,
    check_masks,
    read_ground_truth,
    require_objects,
    require_same_classes,
    subset,
)
from jigsaw_pretrain.detect.coco_eval import AP_FILE, save_evaluation
from jigsaw_pretrain.detect.data import ImageReader, check_missing_data, looked_at, measured_mean_and_std
from jigsaw_pretrain.detect.evaluation import WritePage
from jigsaw_pretrain.detect.models import backbone
from jigsaw_pretrain.detect.models.weights import (
    BACKBONE_FILE,
    brings_statistics,
    load,
    load_neck,
    pyramid_of,
    read_backbone,
    read_neck,
)
from jigsaw_pretrain.detect.recipe import DetectorRecipe, fit_to_dataset
from jigsaw_pretrain.detect.run import (
    CONFIG,
    DETECTOR,
    SUMMARY,
    DetectorConfig,
    backbone_from_config,
    detector_from_config,
    read_config,
)
from jigsaw_pretrain.detect.task import DetectorJob, DetectorTask, PeriodicAP, summarise
from jigsaw_pretrain.errors import Interrupted, UserError, redacted
from jigsaw_pretrain.formats.annotations.read import Reading
from jigsaw_pretrain.formats.images.pixel_format import pixels_of_images
from jigsaw_pretrain.formats.images.source import ImageSource
from jigsaw_pretrain.formats.pixels import RGB8, PixelFormat, named
from jigsaw_pretrain.storage.store import Storage, location
from jigsaw_pretrain.train.engine.checkpoint import list_checkpoints, save_file
from jigsaw_pretrain.train.engine.distributed import Ranks, start
from jigsaw_pretrain.train.engine.loggers import known
from jigsaw_pretrain.train.engine.optim import arithmetic
from jigsaw_pretrain.train.engine.run_folder import RunFolder, check_same_recipe, continues, open_run_folder
from jigsaw_pretrain.train.engine.trainer import Trainer, TrainerOptions
from jigsaw_pretrain.train.engine.weights_info import WeightsInfo, read_weights_info
from jigsaw_pretrain.train.models.feature_maps import Backbone
from jigsaw_pretrain.train.models.weights import with_about
from jigsaw_pretrain.train.recipe import MEAN, STD
from jigsaw_pretrain.words import counted

LONG = 200
"""From this many steps on the user is told how to try fewer."""

STATISTICS_OF = 64
"""Images over which mean and std are measured, where neither weights nor recipe give them."""


def train(
    annotations: str | Path,
    images: str | Path,
    run: str | Path,
    recipe: DetectorRecipe | None = None,
    *,
    val_annotations: str | Path | None = None,
    val_images: str | Path | None = None,
    val_split: str | None = None,
    init: str | Path = "scratch",
    reading: Reading | None = None,
    resume: bool = False,
    stop_after: int | None = None,
    workers: int = 2,
    device: str = "auto",
    log: Sequence[str] = (),
    write_page: WritePage | None = None,
    title: str | None = None,
) -> RunFolder:
    """Fine-tune a detector; under torchrun every rank calls it.

    Args:
        annotations: COCO JSON, or a folder of VOC or YOLO files, as prep takes them.
        images: their images, a folder, zip or tar; a path or a URL.
        run: folder or URL of the run, made or continued.
        recipe: None for the Jigsaw paper's.
        val_annotations: annotations to report AP on.
        val_images: their images.
        val_split: the split of the validation annotations, as ``reading`` has that of the training annotations.
        init: ``scratch``, a weights file, or a pre-training run's folder.
        reading: how annotations are read; None for the defaults of prep.
        resume: continue from the newest checkpoint, or begin.
        stop_after: end at this step and leave the schedule as it is.
        workers: processes that read images; 0 reads them in this one.
        device: ``auto``, ``cpu`` or ``cuda``.
        log: names of loggers (train/engine/loggers.py).
        write_page: draws the finished run's page, where there is a validation set.
        title: of a progress bar on a terminal; None logs lines.

    Returns:
        The run's folder. torch's global random state and switches are afterwards as they were.

    Raises:
        UserError: for what the user can put right.
        Interrupted: a signal ended it, after a checkpoint.
    """
    recipe = DetectorRecipe() if recipe is None else recipe
    if not isinstance(recipe, DetectorRecipe):
        raise UserError(f"recipe must be a DetectorRecipe: give DetectorRecipe.load({str(recipe)!r})")
    annotations, images = location(annotations, "annotations"), location(images, "images")
    val_annotations = None if val_annotations is None else location(val_annotations, "val_annotations")
    val_images = None if val_images is None else location(val_images, "val_images")
    init = location(init, "init")
    checked(stop_after, Count | None, "stop_after")
    checked(workers, CountOrZero, "workers")
    if (val_annotations is None) != (val_images is None):
        raise UserError("--val-annotations and --val-images belong together: give both, or neither for no AP")
    if val_split is not None and val_annotations is None:
        raise UserError(f"--val-split {val_split} is a split of --val-annotations: give these too, or leave it out")
    if reading and reading.split and val_split is None and val_annotations == annotations:
        raise UserError(
            f"--val-annotations are those of --split {reading.split} too: name their split with --val-split"
        )
    ranks = start(device)
    if recipe.data.batch % ranks.world:
        raise UserError(f"a batch of {recipe.data.batch} is not divisible by {ranks.world} ranks: --set data.batch=...")
    folder = ranks.run_on_all(lambda: open_run_folder(run, CONFIG))
    with closing(folder):
        if folder.remote:
            ranks.run_on_rank_zero(folder.remote.pull)
        data = (annotations, images, val_annotations, val_images)
        job = DetectorJob(
            *data, folder, init, workers, resume, ranks, reading or Reading(), known(log), title, val_split
        )
        with (
            arithmetic(ranks.device, tf32=recipe.run.tf32, one_shape=False),
            torch.random.fork_rng([ranks.device] if ranks.device.type == "cuda" else []),
        ):
            _run(job, recipe, stop_after, write_page)
    return folder


def _run(job: DetectorJob, recipe: DetectorRecipe, stop_after: int | None, write_page: WritePage | None) -> None:
    ranks, folder = job.ranks, job.folder
    every = ranks.run_on_all(lambda: read_ground_truth(job.annotations, job.images, job.reading))
    training = subset(every, recipe.data.images_limit, recipe.data.subset_seed)
    ranks.run_on_all(lambda: _check_objects(training, every))
    validation = ranks.run_on_all(lambda: _validation(training, job))
    with_masks = recipe.model.name == "mask-rcnn-fpn"
    if with_masks or recipe.data.copy_paste:
        ranks.run_on_all(lambda: check_masks(training, needed=False))
    if validation is not None and with_masks:
        ranks.run_on_all(lambda: check_masks(validation, needed=False))
    ranks.run_on_rank_zero(lambda: check_images(training, job.images))
    if validation is not None and (held_out := job.val_images) is not None:
        ranks.run_on_rank_zero(lambda: check_images(validation, held_out, "--val-images"))
    task = build_task(job, recipe, training, len(every.images))
    ranks.run_on_rank_zero(lambda: _check_missing_data(task, training, validation))
    ranks.run_on_all(lambda: task.check_shared_memory(validation))
    evaluation = None
    if validation is not None and job.val_images is not None:
        evaluation = PeriodicAP(task, validation, job.val_images, job.workers)
    options = TrainerOptions(
        folder,
        ranks,
        recipe.run.log_every,
        recipe.run.checkpoint_every,
        recipe.run.keep_checkpoints,
        lambda: task.config.write(folder.path),
        recipe.to_dict(),
        (),
        job.log,
        evaluation,
        job.title,
    )
    trainer = Trainer(task, options)
    if not trainer.resume():
        _describe(task.config, training, ranks)
    ending = trainer.run(min(task.steps, stop_after or task.steps))
    if ending or task.step < task.steps:
        where = f"after step {task.step} of {task.steps}: continue with --resume"
        if ending:
            raise Interrupted(f"stopped on {ending} {where}")
        ranks.log_rank_zero(f"stopped {where}")
        return
    _finish(task, evaluation, folder)
    if validation is not None and (val_images := job.val_images) is not None and write_page is not None:
        ranks.run_on_rank_zero(lambda: str(write_page(folder.path, validation, val_images, task.config)))
    ranks.run_on_rank_zero(folder.push)
    of = "device time" if ranks.device.type == "cuda" else "processor time"
    spent = f"{task.seconds * ranks.world:,.0f}"
    ranks.log_rank_zero(f"{folder}: finished after {counted(task.step, 'step')}, {spent} s of {of} in training steps")


def _check_missing_data(task: "DetectorTask", training: GroundTruth, validation: GroundTruth | None) -> None:
    """Raise UserError where a new run would take missing data for measurements."""
    job = task.job
    if list_checkpoints(job.folder.checkpoints):
        return
    check_missing_data(training, job.images, task.config.pixels)
    if validation is not None and job.val_images is not None:
        check_missing_data(validation, job.val_images, task.config.pixels)


def _validation(training: GroundTruth, job: DetectorJob) -> GroundTruth | None:
    if job.val_annotations is None:
        return None
    found = read_ground_truth(job.val_annotations, job.val_images, replace(job.reading, split=job.val_split))
    require_same_classes(training, found)
    require_objects(found)
    trained, held_out = _image_place(job.images), _image_place(str(job.val_images))
    files = {posixpath.join(trained, record.file_name) for record in training.images}
    if shared := sum(posixpath.join(held_out, record.file_name) in files for record in found.images):
        job.ranks.log_rank_zero(
            f"{shared:,} of {len(found.images):,} validation images are trained on: AP says little about images that "
            "the detector has not seen",
            logging.WARNING,
        )
    return found


def _image_place(images: str) -> str:
    """What a name of images refers to, however it is spelled: a real path, or a store and the path in it."""
    storage = Storage(images)
    if storage.is_local:
        return os.path.realpath(storage.root)
    return f"{images.partition('://')[0]}:{posixpath.normpath(storage.root)}"


def _check_objects(training: GroundTruth, every: GroundTruth) -> None:
    """Raise UserError where there is nothing to learn; ``every``: what ``training`` may be a subset of."""
    if training.objects:
        return
    not_used = f"{counted(training.regions, 'box', 'boxes')} are crowd regions or ignored, {training.unusable} unusable"
    images = counted(len(training.images), "image")
    if every.objects:
        raise UserError(
            f"{training.source}: none of the {images} drawn has an object to learn ({not_used}): give more with "
            "data.images_limit, or draw others with data.subset_seed"
        )
    raise UserError(
        f"{training.source} has no object to learn in {images} ({not_used}): check that --annotations is the file of "
        "these images"
    )


def build_task(
    job: DetectorJob, recipe: DetectorRecipe, training: GroundTruth, images: int | None = None
) -> DetectorTask:
    """The detector with the weights that it starts from; the same on every rank.

    images: how many there are, where ``training`` is a subset.
    """
    ranks, folder = job.ranks, job.folder
    found = ranks.run_on_rank_zero(lambda: _config_of_run(job, recipe, training))
    is_fresh = ranks.run_on_rank_zero(lambda: not list_checkpoints(folder.checkpoints))
    weights = None
    if is_fresh and job.init != "scratch":
        weights = ranks.run_on_all(lambda: read_backbone(Path(job.init)))
    config = found or _config(job, recipe, training, weights, images or len(training.images))
    torch.manual_seed(int(rng.key_of_text(recipe.data.seed, "detector's initial weights")) >> 1)
    network = ranks.run_on_all(lambda: backbone_from_config(config, ranks.device))
    if config.norm_built != recipe.model.norm and not backbone.has_batch_norm(network):
        config = replace(config, norm_built=recipe.model.norm)
    if weights is not None:
        report = ranks.run_on_all(lambda: load(network, weights, job.init, recipe.model.partial))
        ranks.log_rank_zero(f"weights {report.text}")
        if told := _other_norm(network, weights, job.init, config.norm_built):
            ranks.log_rank_zero(told, logging.WARNING)
        config = replace(config, weights=asdict(report))
    model, frozen = detector_from_config(config, network, ranks.device)
    if is_fresh:
        config = _with_neck(job, config, model)
    return DetectorTask(job, config, training, model, frozen)


def _other_norm(network: Backbone, weights: dict[str, Tensor], source: str, norm: str) -> str | None:
    """What to say where weights were trained under another norm than the network has; None where they were not."""
    own = any(name.endswith("running_mean") for part in network.parts for name in part.state_dict())
    theirs = any(name.endswith("running_mean") for name in weights)
    if own == theirs:
        return None
    words = {True: "batch norm", False: "group norm"}
    return (
        f"{source} was trained with {words[theirs]}, and this detector has {words[own]} ({norm}): weights are worth "
        f"little under another norm. Fine-tune with --norm {'frozen-bn' if theirs else 'gn'}, or pre-train with --set "
        f"model.norm={'bn' if own else 'gn'}"
    )


def _config_of_run(job: DetectorJob, recipe: DetectorRecipe, training: GroundTruth) -> DetectorConfig | None:
    """The config of the run that goes on, None for a new one; UserError where it would go on as another run."""
    folder = job.folder
    if not continues(folder, job.resume):
        return None
    config = read_config(folder.path)
    check_same_recipe(folder, recipe.differences(config.recipe))
    if config.categories != training.categories:
        raise UserError(f"{folder} was begun with other categories than {job.annotations} has: name its own file")
    if config.init != job.init:
        raise UserError(f"{folder} was begun with --init {config.init}, not {job.init}: give that, or another --run")
    if config.reading is not None and config.reading.differences() != job.reading.differences():
        told = ", ".join(f"--{name.replace('_', '-')} {one}" for name, one in config.reading.differences().items())
        raise UserError(f"{folder} was begun with {told or 'no --exif, --nodata or the like'}: give the same")
    return config


def _config(
    job: DetectorJob,
    recipe: DetectorRecipe,
    training: GroundTruth,
    weights: dict[str, Tensor] | None,
    images: int,
) -> DetectorConfig:
    """A new run's config, without the reports on weights."""
    short = float(np.median([min(record.width, record.height) for record in training.images]))
    built = recipe.model.norm
    if recipe.model.norm == "frozen-bn" and (weights is None or not brings_statistics(weights)):
        built = "sync-bn"
    data = {
        "annotations": redacted(job.annotations),
        "images": redacted(job.images),
        "val_annotations": job.val_annotations and redacted(job.val_annotations),
        "val_images": job.val_images and redacted(job.val_images),
        **({"val_split": job.val_split} if job.val_split else {}),
    }
    count = len(training.images)
    plan = fit_to_dataset(recipe, images if recipe.data.subset_schedule == "whole" else count, short, count)
    labels = [record.labels[~record.crowd] for record in training.images]
    boxes = tuple(np.bincount(np.concatenate(labels), minlength=len(training.categories)).tolist())
    read_as = job.ranks.run_on_rank_zero(lambda: _image_options(job, recipe, training))
    return DetectorConfig(
        recipe, plan, built, training.categories, job.init, data, None, None, *read_as, boxes, job.reading
    )


def _image_options(
    job: DetectorJob, recipe: DetectorRecipe, training: GroundTruth
) -> tuple[tuple[float, ...], tuple[float, ...], PixelFormat]:
    """Mean, std and pixels: the weights' own, else the recipe's, else what suits the images.

    Raises UserError for a recipe that contradicts the weights.
    """
    said = None if job.init == "scratch" else read_weights_info(Path(job.init))
    given = named(recipe.data.pixels) if recipe.data.pixels else None
    if said is not None:
        mean, std, pixels = said.mean, said.std, said.pixels
        for key, ours, theirs in (
            ("pixels", given and str(given), str(pixels)),
            ("mean", recipe.data.mean, mean),
            ("std", recipe.data.std, std),
        ):
            if ours is not None and ours != theirs:
                raise UserError(
                    f"data.{key} = {ours} and {said.source} was trained with {theirs}: leave it out, for weights are "
                    "of use with their own only"
                )
        if recipe.model.backbone != said.backbone:
            job.ranks.log_rank_zero(f"{said.source} says it is of {said.backbone}", logging.WARNING)
        return mean, std, pixels
    source = ImageSource(job.images)
    pixels = given or _pixels(training, source, job.ranks)
    measured = None
    if not pixels.is_rgb8 and (recipe.data.mean is None or recipe.data.std is None):
        if job.init != "scratch":
            raise UserError(
                f"{job.init} does not say which mean and std its {pixels} were normalised with: give data.mean and "
                "data.std"
            )
        records = looked_at(training)[:STATISTICS_OF]
        measured = measured_mean_and_std(ImageReader(job.images, training, pixels), records, pixels)
    default = measured or (MEAN, STD)
    mean, std = recipe.data.mean or default[0], recipe.data.std or default[1]
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != pixels.channels:
            raise UserError(f"data.{key} = {list(values)} must be {pixels.channels} numbers, one for each channel")
    if job.init != "scratch" and recipe.data.mean is None:
        job.ranks.log_rank_zero(
            f"{job.init} does not say which mean and std it was trained with: ImageNet's are taken (data.mean, "
            "data.std)"
        )
    return mean, std, pixels


def _pixels(training: GroundTruth, source: ImageSource, ranks: Ranks) -> PixelFormat:
    """What images hold; 8 bits are read as RGB, as detectors' weights from elsewhere want it."""
    files = [record.file_name for record in looked_at(training)]
    found = pixels_of_images(files, source, "--set data.pixels")
    if found.pixels.dtype == "uint8" and found.pixels.channels == 1:
        return RGB8
    if found.note:
        ranks.log_rank_zero(found.note)
    return found.pixels


def _with_neck(job: DetectorJob, config: DetectorConfig, model: nn.Module) -> DetectorConfig:
    """Put the neck that the weights come with into the model's pyramid, if so; the config with its report."""
    ranks = job.ranks
    neck = {} if job.init == "scratch" else ranks.run_on_all(lambda: read_neck(Path(job.init)))
    if not neck:
        return config
    pyramid, recipe = pyramid_of(model), config.recipe
    if pyramid is None or recipe.model.pretrained_neck == "none":
        why = "model.pretrained_neck = none" if pyramid else f"this {recipe.model.name} has no pyramid that takes one"
        ranks.log_rank_zero(f"neck {job.init}: left out ({why})")
        return config
    report = ranks.run_on_all(lambda: load_neck(pyramid, neck, job.init))
    ranks.log_rank_zero(f"neck {report.text}")
    return replace(config, neck=asdict(report))


def _describe(config: DetectorConfig, training: GroundTruth, ranks: Ranks) -> None:
    """Log what the run is about to do, with warnings, in a few lines."""
    recipe, plan = config.recipe, config.plan
    ranks.log_rank_zero(
        f"{recipe.model.name}, {recipe.model.backbone}, {config.norm_built}, freeze {recipe.model.freeze}, "
        f"from {config.init}; {counted(len(training.images), 'image')}, "
        f"{counted(len(training.categories), 'class', 'classes')}, {counted(ranks.world, 'process', 'processes')} on "
        f"{ranks.device}"
    )
    short = "; for a short first try: optim.steps = 50, in the recipe's file or by --set" if plan.steps >= LONG else ""
    ranks.log_rank_zero(
        f"fitted to this dataset: {counted(plan.steps, 'step')} of {recipe.data.batch} ({plan.epochs:.1f} epochs), "
        f"rate {plan.lr:.3g}, warm-up {plan.warmup_steps}, drops at {', '.join(map(str, plan.drops)) or 'none'}, "
        f"images {plan.short_side} x {plan.long_side}, anchors x {plan.anchor_scale:.2f}{short}"
    )
    if training.regions:
        of = f"{training.regions:,} of {training.regions + training.objects:,} boxes"
        ranks.log_rank_zero(f"{of} are crowd regions or marked as ignored: left out of training")
    warnings = []
    if config.norm_built != recipe.model.norm:
        warnings.append(
            "frozen-bn needs weights that bring batch statistics, and these bring none: batch norm that learns "
            "(sync-bn) is built in its place"
        )
    if recipe.model.freeze == "backbone" and config.init == "scratch":
        warnings.append("a frozen backbone from scratch stays random: give --init weights")
    if training.unusable:
        warnings.append(f"{training.unusable} boxes cannot be used and are left out of training")
    if recipe.model.name == "mask-rcnn-fpn" and training.segmented < 1:
        warnings.append(
            f"{1 - training.segmented:.0%} of the boxes have no segmentation: their masks are the whole boxes, so the "
            "mask head learns rectangles from them"
        )
    if recipe.data.copy_paste and training.segmented < 1:
        warnings.append(f"{1 - training.segmented:.0%} of the boxes have no segmentation: their whole boxes are pasted")
    for warning in warnings:
        ranks.log_rank_zero(warning, logging.WARNING)


def _finish(task: DetectorTask, evaluation: PeriodicAP | None, folder: RunFolder) -> None:
    """Write the weights, the evaluation's files and the summary."""
    ranks, path = task.ranks, folder.path
    has_files = ranks.run_on_rank_zero(lambda: (path / AP_FILE).exists())
    if evaluation is not None and evaluation.last is None and not has_files:
        # A run that was killed between its last evaluation and here.
        evaluation(lambda: False)

    def write() -> None:
        save_file(path / DETECTOR, {key: value.cpu().contiguous() for key, value in task.model.state_dict().items()})
        config = task.config
        info = WeightsInfo("", config.recipe.model.backbone, config.norm_built, config.mean, config.std, config.pixels)
        save_file(path / BACKBONE_FILE, with_about(backbone.backbone_state(task.model), info.to_about()))
        if evaluation is not None and evaluation.last is not None:
            save_evaluation(path, evaluation.last, config.boxes)
        Storage(path).publish(SUMMARY, json.dumps(summarise(task, folder), indent=2).encode() + b"\n")

    ranks.run_on_rank_zero(write)

"""One run from its arguments to its end: data, weights, model, loop, and what the run says of itself.

Refuses what does not fit (other classes, weights of another backbone, resuming as another run) before the first step.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jigsaw_pretrain import rng
from jigsaw_pretrain.detect.annotations import Annotations, read_annotations, require_same_classes
from jigsaw_pretrain.detect.data import Augmentation, Views, training_batches
from jigsaw_pretrain.detect.loop import Progress, Trainer, optimizer_of, train_steps
from jigsaw_pretrain.detect.models.neck import load_neck, pyramid_of, read_neck
from jigsaw_pretrain.detect.models.weights import CHECKPOINTS, brings_statistics, load, read_weights
from jigsaw_pretrain.detect.order import Order
from jigsaw_pretrain.detect.outcome import Evaluator, finish
from jigsaw_pretrain.detect.recipe import Recipe
from jigsaw_pretrain.detect.run import DETECTOR, METRICS, Config, detector, empty_network, read_config
from jigsaw_pretrain.detect.scaling import fit
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.engine.checkpoint import list_checkpoints, remove_leftovers
from jigsaw_pretrain.train.engine.distributed import Ranks, StopRequest


@dataclass(frozen=True)
class Job:
    """The command's arguments that are no part of the recipe."""

    annotations: Path
    images: Path
    val_annotations: Path | None
    val_images: Path | None
    run: Path
    init: str
    workers: int
    resume: bool
    stop_after: int | None


def run_job(job: Job, recipe: Recipe, ranks: Ranks) -> None:
    """Train as ``job`` says; every rank calls it. Raises UserError for what the user can mend."""
    training = ranks.together(lambda: read_annotations(job.annotations))
    validation = ranks.together(lambda: _validation(training, job))
    with StopRequest() as stop:
        trainer, fresh = _trainer(job, recipe, ranks, training, validation)
        if fresh:
            ranks.say(_described(trainer.config, training, ranks))
        batches = _batches(trainer, training, job)
        done = train_steps(trainer, batches, min(trainer.config.plan.steps, job.stop_after or 2**62), stop)
        if stop.name or not done:
            ranks.say(f"stopped at step {trainer.progress.step}, which --resume continues")
            return
        if trainer.progress.step < trainer.config.plan.steps:
            ranks.say(f"ended at step {trainer.progress.step} as asked, which --resume continues")
            return
    finish(trainer, validation, job.val_images)


def _validation(training: Annotations, job: Job) -> Annotations | None:
    if job.val_annotations is None:
        return None
    found = read_annotations(job.val_annotations)
    require_same_classes(training, found)
    return found


def _config(job: Job, recipe: Recipe, training: Annotations) -> tuple[Config, dict[str, torch.Tensor] | None]:
    """The run's config but for the weights report, and the weights."""
    short = float(np.median([min(photo.width, photo.height) for photo in training.photos]))
    state = None if job.init == "scratch" else read_weights(Path(job.init))
    built = recipe.norm
    if recipe.norm == "frozen-bn" and (state is None or not brings_statistics(state)):
        built = "sync-bn"
    data = {
        "annotations": str(job.annotations),
        "images": str(job.images),
        "val_annotations": None if job.val_annotations is None else str(job.val_annotations),
        "val_images": None if job.val_images is None else str(job.val_images),
    }
    plan = fit(recipe, len(training.photos), short)
    return Config(recipe, plan, built, training.categories, job.init, data, None), state


def _trainer(
    job: Job, recipe: Recipe, ranks: Ranks, training: Annotations, validation: Annotations | None
) -> tuple[Trainer, bool]:
    """A trainer at its first step or where the newest checkpoint is, and whether it is the former."""
    resuming = job.resume and ranks.on_first(lambda: bool(list_checkpoints(job.run / CHECKPOINTS)))
    state: dict[str, torch.Tensor] | None = None
    if resuming:
        config = ranks.together(lambda: read_config(job.run))
        _require_same(config, recipe, training, job)
    else:
        ranks.on_first(lambda: _prepare_folder(job))
        config, state = ranks.together(lambda: _config(job, recipe, training))
    torch.manual_seed(int(rng.key_of_text(recipe.seed, "detector's initial weights")) >> 1)
    network = empty_network(config, ranks.device)
    if not resuming and state is not None:
        found, partial = state, recipe.partial
        report = ranks.together(lambda: load(network, found, job.init, partial))
        for line in report.lines():
            ranks.say(line)
        config = replace(config, weights=asdict(report))
    model, held = detector(config, network, ranks.device)
    if not resuming:
        settled = config = _with_neck(job, config, model, ranks)
        ranks.on_first(lambda: settled.write(job.run))
    evaluate = None
    if validation is not None and job.val_images is not None:
        evaluate = Evaluator(model, config, validation, job.val_images, ranks, job.workers)
    trainer = Trainer(job.run, config, ranks, model, held, optimizer_of(model, config.recipe), Progress(), evaluate)
    return trainer, not (resuming and trainer.resume())


def _with_neck(job: Job, config: Config, model: torch.nn.Module, ranks: Ranks) -> Config:
    """Put the neck that the weights come with into the model's pyramid, if so; the config with its report."""
    neck = {} if job.init == "scratch" else ranks.together(lambda: read_neck(Path(job.init)))
    if not neck:
        return config
    pyramid, recipe = pyramid_of(model), config.recipe
    if pyramid is None or recipe.neck == "none":
        ranks.say(f"neck {job.init}: left out ({'neck = none' if pyramid else f'{recipe.model} has no pyramid'})")
        return config
    report = ranks.together(lambda: load_neck(pyramid, neck, job.init))
    for line in report.lines():
        ranks.say(line)
    return replace(config, neck=asdict(report))


def _prepare_folder(job: Job) -> None:
    """Make the run's folder; refuse one that holds a run."""
    if list_checkpoints(job.run / CHECKPOINTS) or (job.run / DETECTOR).exists():
        raise UserError(f"{job.run} holds a run already: continue it with --resume, or name another folder")
    try:
        job.run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{job.run} cannot be made ({error.strerror}): name another folder") from error
    remove_leftovers(job.run / CHECKPOINTS)
    (job.run / METRICS).unlink(missing_ok=True)


def _require_same(config: Config, recipe: Recipe, training: Annotations, job: Job) -> None:
    """Refuse to resume a run as another one."""
    changed = [key for key, value in asdict(config.recipe).items() if getattr(recipe, key) != value]
    if changed:
        key = changed[0]
        raise UserError(
            f"{job.run} was begun with {key} = {getattr(config.recipe, key)!r}, not {getattr(recipe, key)!r}: resume "
            "it with the options it was begun with, or name another folder"
        )
    if config.categories != training.categories:
        raise UserError(f"{job.run} was begun with other categories than {job.annotations} has: name its own file")
    if config.init != job.init:
        raise UserError(f"{job.run} was begun with --init {config.init}, not {job.init}: name that, or another folder")


def _batches(trainer: Trainer, training: Annotations, job: Job) -> Any:
    recipe, ranks, plan = trainer.config.recipe, trainer.ranks, trainer.config.plan
    lying = np.array([photo.width >= photo.height for photo in training.photos])
    order = Order(lying, recipe.batch, recipe.seed)
    key = rng.key_of_text(recipe.seed, "detector's augmentation")
    augmentation = Augmentation(recipe.flip, (recipe.jitter_low, recipe.jitter_high), key)
    views = Views(training, job.images, plan, augmentation, masks=recipe.model == "mask-rcnn-fpn")
    steps = range(trainer.progress.step, plan.steps)
    return training_batches(views, order, steps, ranks.rank, recipe.batch // ranks.world, job.workers)


def _described(config: Config, training: Annotations, ranks: Ranks) -> str:
    """What the run is about to do, in a few lines."""
    recipe, plan = config.recipe, config.plan
    lines = [
        f"{recipe.model}, {recipe.backbone}, {config.norm_built}, freeze {recipe.freeze}, from {config.init}; "
        f"{len(training.photos)} images, {len(training.categories)} classes, {ranks.world} rank(s) on {ranks.device}",
        f"fitted to this dataset: {plan.steps} steps of {recipe.batch} ({plan.epochs:.1f} epochs), rate {plan.lr:.4g}, "
        f"warm-up {plan.warmup_steps}, drops at {', '.join(map(str, plan.drops)) or 'none'}, images "
        f"{plan.short_side} x {plan.long_side}, anchors x {plan.anchor_scale:.2f}",
    ]
    if config.norm_built != recipe.norm:
        lines.append(
            "warning: frozen-bn needs weights that bring batch statistics, and these bring none: batch norm that "
            "learns (sync-bn) is built in its place"
        )
    if recipe.freeze == "backbone" and config.init == "scratch":
        lines.append("warning: a frozen backbone from scratch stays random: give --init weights")
    if training.unusable:
        lines.append(f"warning: {training.unusable} boxes have no area inside their image and are left out of training")
    if recipe.model == "mask-rcnn-fpn" and training.segmented < 1:
        lines.append(
            f"warning: {1 - training.segmented:.0%} of the boxes have no segmentation: their masks are the whole "
            "boxes, so the mask head learns rectangles from them"
        )
    return "\n".join(lines)

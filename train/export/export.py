"""Writes a run's backbone for another library, with the configuration that must go with it.

The newest checkpoint is read (its averaged weights where the recipe keeps an average), the weights are renamed and
checked (export/targets.py) before anything is written, and a README beside the file says how to load it. A key that
finds no place or a swapped channel order is the classic way to lose a pre-training: the one is an error here, the other
is spelt out there. Costs seconds.

``recalibrate_bn`` (``--recalibrate-bn N``) first measures batch norm's running statistics anew over N jigsaws
of the dataset, the weights left as they are: N forward passes without gradients. A run's own come from one rank's
micro-batches and lag behind the weights, and averaged weights (`ema`) have theirs only approximately; a detector that
freezes batch norm lives with them. Prefer the run's own where each GPU had 32 jigsaws or more at once.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from msgspec.structs import replace
from torch import Tensor

from jigsaw_pretrain.config import Count, checked
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset.dataset import MOST_BYTES, Dataset
from jigsaw_pretrain.storage.files import is_taken, publish_locally
from jigsaw_pretrain.storage.store import Storage
from jigsaw_pretrain.train.data.loader import JigsawLoader
from jigsaw_pretrain.train.engine.checkpoint import backbone_state, pyramid_state, trained_state
from jigsaw_pretrain.train.engine.distributed import start
from jigsaw_pretrain.train.engine.optim import seeded
from jigsaw_pretrain.train.engine.run_folder import (
    RunFolder,
    check_classes,
    check_pixels,
    open_run_folder,
    open_trained,
    pixels_of,
    read_description,
)
from jigsaw_pretrain.train.engine.state import build_model
from jigsaw_pretrain.train.engine.weights_info import info_of
from jigsaw_pretrain.train.export.readme import MARK, PYRAMID_TARGET, ExportInfo, readme
from jigsaw_pretrain.train.export.targets import TARGETS, check_own, normalisation_of_timm, stem
from jigsaw_pretrain.train.models.layers import measure_batch_norms
from jigsaw_pretrain.train.recipe import Device, Recipe


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    file: the weights. readme: what to paste, beside it. backbone: its name. step, steps: of the run, done and in all.
    tensors, bytes: of the file's entries. leaves_neck: whether the run has a neck that this target leaves out.
    """

    file: Path
    readme: Path
    backbone: str
    step: int
    steps: int
    tensors: int
    bytes: int
    leaves_neck: bool


@seeded(0)  # what is built to be compared draws its first weights
def export(
    run: str | Path,
    to: str,
    out: str | Path,
    *,
    backbone: str | None = None,
    recalibrate_bn: int | None = None,
    dataset: Dataset | None = None,
    workers: int = 2,
    device: str = "auto",
) -> Exported:
    """Write the backbone of a run's newest checkpoint for another library, and a README of what to paste there.

    Args:
        run: the run's folder or URL.
        to: the library, one of TARGETS.
        out: the file to write; the README is put beside it.
        backbone: refuse the run unless this is its backbone's name.
        recalibrate_bn: measure batch norm's statistics over so many jigsaws of ``dataset`` first.
        dataset: the run's, for ``recalibrate_bn``.
        device: ``auto``, ``cpu`` or ``cuda``, for ``recalibrate_bn``.
        workers: processes that make these jigsaws.

    Returns:
        What was written. Nothing is where this raises.

    Raises:
        UserError: for a run without a checkpoint, a backbone that the library does not have or computes otherwise, and
            a file that is the run's own, or there already and of no export: its README tells that.
    """
    if to not in TARGETS:
        raise UserError(f"to must be one of {', '.join(TARGETS)}, not {to}")
    checked(recalibrate_bn, Count | None, "recalibrate_bn")
    checked(device, Device, "device")
    folder, target, out = open_run_folder(run), TARGETS[to], Path(out)
    if os.path.realpath(out) in {os.path.realpath(one) for one in (folder.backbone, folder.pyramid)}:
        raise UserError(f"--out {out} is the run's own file: name another one")
    # The whole name, as backbone.pth and backbone.pkl are two exports.
    note = out.with_name(f"{out.name}.README.md")
    _check_replaceable(out, note)
    description, recipe, content = open_trained(folder)
    if backbone is not None and backbone != recipe.model.backbone:
        raise UserError(f"{run} is of {recipe.model.backbone}, not of {backbone}: name another --run or --backbone")
    if out.suffix != target.suffix and to in ("detectron2", "safetensors"):
        raise UserError(f"--out {out}: {to} picks its loader by the extension: end the name with {target.suffix}")
    state = trained_state(content)
    if recalibrate_bn is not None:
        if dataset is None:
            raise UserError("--recalibrate-bn measures on the run's jigsaws: add --data OUT")
        state = recalibrated(folder, description["classes"], recipe, state, dataset, recalibrate_bn, workers, device)
    weights, pyramid = backbone_state(state), pyramid_state(state)
    if to == PYRAMID_TARGET and not pyramid:
        raise UserError(f"{run} has no neck (model.neck = none): export --to torchvision")
    pixels, (mean, std) = pixels_of(folder, description), recipe.data.normalisation
    found = check_own(recipe.model.backbone, weights, recipe.model.norm, pixels.channels)
    converted = target.convert(found, pyramid if to == PYRAMID_TARGET else weights)
    info = ExportInfo(
        out.name,
        recipe.model.backbone,
        found.channels,
        found.stride,
        mean,
        std,
        tuple(sorted(found.head)),
        recipe.model.norm,
        recipe.model.neck_channels,
        pixels,
        stem(found),
        tuple(description["classes"]),
        normalisation_of_timm(recipe.model.backbone) if to == "timm" else None,
    )
    averaged = ", weights averaged over steps" if content.get("average") else ""
    origin = (
        f"{MARK}{content['step']} of {recipe.optim.steps} steps, "
        f"batch {recipe.data.batch}, {len(description['classes'])} classes{averaged}."
    )
    packed = target.pack(converted, info_of(recipe, pixels).to_about())
    # The README first: the same export goes on where it was cut short, as weights without one are taken for another's.
    publish_locally(note, readme(info, to, origin).encode())
    publish_locally(out, packed)
    size = sum(value.numel() * value.element_size() for value in converted.values())
    return Exported(
        out,
        note,
        recipe.model.backbone,
        content["step"],
        recipe.optim.steps,
        len(converted),
        size,
        bool(pyramid) and to != PYRAMID_TARGET,
    )


def _check_replaceable(out: Path, note: Path) -> None:
    """Refuse to write over what is no export: a README that is not ours, or a file that has none of ours beside it."""
    try:
        is_ours = MARK.encode() in Storage(note.parent).read(note.name, MOST_BYTES)
    except FileNotFoundError:
        is_ours = False
    except OSError as error:
        raise UserError(
            f"{note} cannot be read ({error.strerror or error}): move it away, or name another --out"
        ) from error
    for file in (note, out):
        if not is_ours and is_taken(file):
            raise UserError(f"{file} is already there and no export's: move it away, or name another --out")


def recalibrated(
    folder: RunFolder,
    classes: list[str],
    recipe: Recipe,
    state: dict[str, Tensor],
    dataset: Dataset,
    jigsaws: int,
    workers: int,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """The model's state with statistics of (at least) ``jigsaws`` jigsaws of the dataset, augmented as in training.

    Raises UserError for a dataset of other classes and for a backbone without batch norm.
    """
    check_classes(folder, classes, tuple(dataset.classes))
    check_pixels(folder, pixels_of(folder, read_description(folder)), dataset.pixels)
    _, model = build_model(recipe, dataset.label_count, dataset.pixels)
    model.load_state_dict(state)
    model.to(device=start(device).device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch = min(recipe.optim.micro_batch or recipe.data.batch, 64, jigsaws)
    stream = replace(recipe.data, batch=batch, lanes=None)
    source = JigsawLoader(dataset, stream, workers=workers, stop_step=-(-jigsaws // batch))
    try:
        place = next(model.parameters()).device
        found = measure_batch_norms(model, (batch.images.to(place) for batch in source))
    finally:
        source.close()
    if not found:
        raise UserError(
            f"--recalibrate-bn: {recipe.model.backbone} has no batch norm with running statistics; leave it out"
        )
    return model.cpu().state_dict()

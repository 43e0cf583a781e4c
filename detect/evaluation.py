"""AP of a finished detector, or of any detector's COCO results file: what ``detect eval`` calls.

A run is evaluated on its own validation set or on another one of the same classes. A results file needs no run and no
GPU. Costs a forward pass per image, and seconds for COCOeval (detect/coco_eval.py).
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from jigsaw_pretrain.detect.annotations import (
    GroundTruth,
    check_images,
    check_masks,
    read_ground_truth,
    require_objects,
)
from jigsaw_pretrain.detect.coco_eval import (
    AP_FILE,
    Evaluation,
    Score,
    ap_document,
    check_result_masks,
    evaluate_model,
    read_results,
    save_evaluation,
    score,
)
from jigsaw_pretrain.detect.data import check_missing_data, shared_bytes
from jigsaw_pretrain.detect.run import CONFIG, DetectorConfig, load_detector, read_config
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.read import Reading
from jigsaw_pretrain.storage.store import Storage
from jigsaw_pretrain.train.data.loader import check_shared_memory
from jigsaw_pretrain.train.engine.distributed import start
from jigsaw_pretrain.train.engine.optim import arithmetic
from jigsaw_pretrain.train.engine.run_folder import open_run_folder

WritePage = Callable[[Path, GroundTruth, str, DetectorConfig], object]
"""Draws the page of a run: its folder, the validation set, the folder of its images, and the run's config."""


def evaluate(
    run: str | Path,
    annotations: str | Path | None = None,
    images: str | Path | None = None,
    *,
    reading: Reading | None = None,
    backbone: str | None = None,
    out: str | Path | None = None,
    workers: int = 2,
    device: str = "auto",
    write_page: WritePage | None = None,
) -> Evaluation:
    """AP of a finished detector run; under torchrun every rank calls it.

    Args:
        run: the run's folder or URL.
        annotations: what to evaluate on, as prep takes it; None for the run's own validation set.
        images: their images.
        reading: how annotations and images are read; None for prep's defaults, of the run's own validation set for
            what the run was begun with.
        backbone: refuse the run unless this is its backbone's name.
        out: folder for results.json and ap.json; None for the run's, where that is no URL.
        workers: processes that read images.
        device: ``auto``, ``cpu`` or ``cuda``.
        write_page: draws the page.

    Returns:
        AP of boxes, and of masks where the detector has them (0 to 1), overall, by size and by class.

    Raises:
        UserError: for a run that has not finished, and annotations of other categories.
    """
    ranks, opened = start(device), open_run_folder(run, CONFIG)
    if opened.remote and out is None:
        raise UserError(f"{opened} is at a URL, where only its own training writes: name a folder with --out")
    ranks.run_on_all(opened.read_apart)
    run = opened.path
    config = ranks.run_on_all(lambda: read_config(run))
    if backbone is not None and backbone != config.recipe.model.backbone:
        raise UserError(
            f"{run} is of {config.recipe.model.backbone}, not of {backbone}: name another --run or --backbone"
        )
    chosen = None if annotations is None else str(annotations)
    named = None if images is None else str(images)
    truth, folder = ranks.run_on_all(lambda: _validation(config, run, chosen, named, reading or Reading()))
    ranks.run_on_rank_zero(lambda: check_images(truth, folder))
    if annotations is not None:
        ranks.run_on_rank_zero(lambda: check_missing_data(truth, folder, config.pixels))
    with torch.random.fork_rng([ranks.device] if ranks.device.type == "cuda" else []):
        model = ranks.run_on_all(lambda: load_detector(run, config, ranks.device))
    batch = max(1, config.recipe.data.batch // ranks.world)
    needed = shared_bytes(truth, config.plan, config.pixels, batch, workers)
    ranks.run_on_all(lambda: check_shared_memory(needed))
    with arithmetic(ranks.device, tf32=config.recipe.run.tf32, one_shape=False):
        found = evaluate_model(model, config.recipe, config.plan, config.pixels, truth, folder, ranks, workers, batch)
    assert found is not None
    place = run if out is None else Path(out)

    def write() -> None:
        save_evaluation(place, found, config.boxes)
        if write_page is not None:
            write_page(place, truth, folder, config)

    ranks.run_on_rank_zero(write)
    return found


def evaluate_results(
    results: str | Path,
    annotations: str | Path,
    images: str | Path | None = None,
    *,
    reading: Reading | None = None,
    kind: str = "bbox",
    out: str | Path | None = None,
) -> Score:
    """AP of a COCO results file of any detector.

    Args:
        results: the file, a JSON list of detections.
        annotations: the ground truth, as prep takes it.
        images: their images, where the annotations do not tell sizes.
        reading: how annotations are read; None for prep's defaults.
        kind: ``bbox`` or ``segm``.
        out: folder for ap.json, if any.

    Raises:
        UserError: for a file that is no list of detections of these images.
    """
    truth = read_ground_truth(str(annotations), None if images is None else str(images), reading or Reading())
    require_objects(truth)
    # An image that is listed twice is one image; detections may be of either entry.
    listed = truth.other_ids
    path = Path(results)
    given = [{**one, "image_id": listed.get(one["image_id"], one["image_id"])} for one in read_results(path, kind)]
    if kind == "segm":
        check_masks(truth, needed=True)
        check_result_masks(path, given, truth.truth)
    found = score(truth.truth, given, kind)
    if out is not None:
        document = ap_document(Evaluation(found, None, [], 0.0)) if kind == "bbox" else {"bbox": None, "segm": found}
        Storage(Path(out)).publish(AP_FILE, json.dumps(document, indent=2, default=vars).encode() + b"\n")
    return found


def _validation(
    config: DetectorConfig, run: Path, annotations: str | None, images: str | None, reading: Reading
) -> tuple[GroundTruth, str]:
    """The validation set given, or the run's own."""
    if annotations and not images:
        raise UserError("--annotations needs --images DIR: give both, or neither for the run's own validation set")
    chosen = annotations or config.data["val_annotations"]
    folder = images or config.data["val_images"]
    if annotations is None:
        own = replace(config.reading or Reading(), split=config.data.get("val_split"))
        reading = replace(own, **reading.differences())
    if chosen is None or folder is None:
        raise UserError(f"{run} was trained without a validation set: give --annotations FILE --images DIR")
    found = read_ground_truth(chosen, folder, reading)
    if found.categories != config.categories:
        raise UserError(f"{chosen} does not define the categories that {run} was trained on: give both the same list")
    require_objects(found)
    return found, folder

"""Evaluating a model on the validation set: the ranks predict, rank 0 scores; files of a run's evaluation.

``results.json`` (COCO), ``ap.json`` (what detect/ap.py found) and ``page.html`` (detect/page.py) lie in the run's
folder. With segmentations for every validation box and a mask model, masks are scored too.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from jigsaw_pretrain.detect.annotations import Annotations
from jigsaw_pretrain.detect.ap import Detection, Score, score
from jigsaw_pretrain.detect.data import Views, validation_batches
from jigsaw_pretrain.detect.predict import detections
from jigsaw_pretrain.detect.recipe import Recipe
from jigsaw_pretrain.detect.scaling import Plan
from jigsaw_pretrain.storage import Storage
from jigsaw_pretrain.train.engine.distributed import Ranks

RESULTS = "results.json"
AP = "ap.json"


@dataclass(frozen=True)
class Evaluation:
    """boxes: AP of boxes; masks: of masks, or None. results: what was scored. seconds: it took, all told."""

    boxes: Score
    masks: Score | None
    results: list[Detection]
    seconds: float


def evaluate_model(
    model: nn.Module,
    recipe: Recipe,
    plan: Plan,
    annotations: Annotations,
    images: Path,
    ranks: Ranks,
    workers: int,
    batch: int,
    stopped: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Score a model on ``annotations``; None where any rank was stopped before it was through. Ends in eval mode."""
    began = time.perf_counter()
    views = Views(annotations, images, plan, None, masks=False)
    mine = list(range(ranks.rank, len(annotations.photos), ranks.world))
    batches = validation_batches(views, mine, batch, workers)
    autocast = recipe.precision == "bf16"

    def predict() -> list[Detection]:
        return detections(model, recipe.model, batches, annotations, ranks.device, autocast, stopped)

    found = [one for part in ranks.gathered(ranks.together(predict)) for one in part]
    if ranks.largest(int(stopped())):
        return None
    masks_too = recipe.model == "mask-rcnn-fpn" and annotations.segmented == 1

    def scored() -> tuple[Score, Score | None]:
        boxes = score(annotations.truth, [{k: v for k, v in one.items() if k != "segmentation"} for one in found])
        return boxes, score(annotations.truth, found, "segm") if masks_too else None

    box_score, mask_score = ranks.on_first(scored)
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    return Evaluation(box_score, mask_score, found, time.perf_counter() - began)


def save_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write results.json and ap.json, each whole or not at all."""
    storage = Storage(folder)
    storage.publish(RESULTS, json.dumps(evaluation.results).encode())
    storage.publish(AP, json.dumps(ap_document(evaluation), indent=2).encode() + b"\n")


def ap_document(evaluation: Evaluation) -> dict[str, object]:
    """ap.json's contents."""
    return {"bbox": asdict(evaluation.boxes), "segm": evaluation.masks and asdict(evaluation.masks)}

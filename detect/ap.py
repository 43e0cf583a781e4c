"""AP by pycocotools' COCOeval: overall, by size and by class, with precision-recall curves.

The detections are evaluated as the results file holds them, so running COCOeval by hand on that file gives the same
numbers. COCOeval takes about 10 s for COCO's 5,000 validation images; its printing is kept quiet.
"""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from jigsaw_pretrain.errors import UserError

STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""Names of COCOeval's twelve numbers; -1 where a size has no ground truth."""

Detection = dict[str, Any]


@dataclass(frozen=True)
class Score:
    """stats: by STATS. classes: AP, AP50 and the count of ground-truth boxes (no crowds) by class name.

    curves: mean precision over classes at recall 0, 0.01, ... 1 by IoU threshold.
    """

    stats: dict[str, float]
    classes: dict[str, dict[str, float]]
    curves: dict[str, list[float]]


def read_results(path: Path) -> list[Detection]:
    """A COCO results file: [{image_id, category_id, bbox [x, y, w, h], score}]; raises UserError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a COCO results file") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    if not isinstance(found, list):
        raise UserError(f"{path} is not a COCO results file: it holds no list of detections")
    for index, one in enumerate(found):
        if not isinstance(one, dict) or not {"image_id", "category_id", "bbox", "score"} <= one.keys():
            raise UserError(f"{path}: detection {index} lacks one of image_id, category_id, bbox, score")
    return found


def score(truth: dict[str, Any], detections: list[Detection], kind: str = "bbox") -> Score:
    """AP of detections against ``truth`` (detect.annotations.Annotations.truth); ``kind`` "bbox" or "segm".

    Without any detection AP is 0. Raises UserError for detections of images or categories the truth does not have.
    """
    images = {image["id"] for image in truth["images"]}
    categories = {one["id"]: one["name"] for one in truth["categories"]}
    for one in detections:
        if one["image_id"] not in images or one["category_id"] not in categories:
            raise UserError(
                f"a detection is of image {one['image_id']!r} and category {one['category_id']!r}, which the "
                "annotations do not have: the results are of another dataset"
            )
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO()
        # A copy, for COCOeval writes into the records.
        ground.dataset = {key: [dict(one) for one in value] for key, value in truth.items()}
        ground.createIndex()
        found = _loaded(ground, detections)
        evaluation = COCOeval(ground, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = {name: float(value) for name, value in zip(STATS, evaluation.stats, strict=True)}
    precision: npt.NDArray[np.float64] = evaluation.eval["precision"]
    counts = _counts(truth)
    classes = {}
    for place, category in enumerate(evaluation.params.catIds):
        of_class = precision[:, :, place, 0, -1]
        classes[categories[category]] = {
            "AP": _mean(of_class),
            "AP50": _mean(of_class[0]),
            "boxes": float(counts.get(category, 0)),
        }
    curves = {
        f"{threshold:.2f}": [_mean(precision[index, recall, :, 0, -1]) for recall in range(precision.shape[1])]
        for index, threshold in enumerate(evaluation.params.iouThrs)
    }
    return Score(stats, classes, curves)


def _loaded(ground: COCO, detections: list[Detection]) -> COCO:
    if detections:
        return ground.loadRes([dict(one) for one in detections])
    empty = COCO()
    empty.dataset = {**ground.dataset, "annotations": []}
    empty.createIndex()
    return empty


def _mean(values: npt.NDArray[np.float64]) -> float:
    """The mean over what has ground truth (COCOeval marks the rest with -1); -1 where nothing has."""
    there = values[values > -1]
    return float(there.mean()) if there.size else -1.0


def _counts(truth: dict[str, Any]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for one in truth["annotations"]:
        if not one["iscrowd"]:
            counts[one["category_id"]] = counts.get(one["category_id"], 0) + 1
    return counts

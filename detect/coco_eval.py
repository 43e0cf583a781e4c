"""AP of a model on a validation set, or of a COCO results file, by pycocotools' COCOeval.

The ranks share the images; each keeps its detections on the host, gathered once for rank 0 to score. Boxes are brought
back to the stored image's pixels and rounded to 1/100 pixel, scores to 6 digits, before they are scored, so that
running COCOeval by hand on ``results.json`` gives the numbers of ``ap.json``: AP overall, by size and by class, and
precision-recall curves. Masks are scored too where the model has them and every box of the validation set has a
segmentation. COCOeval takes about 10 s for COCO's 5,000 validation images; what it prints is discarded.
"""

import contextlib
import io
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import batched_nms

from jigsaw_pretrain.detect.annotations import POLYGONS, GroundTruth, ImageRecord, class_names, mask_trouble
from jigsaw_pretrain.detect.data import DetectionDataset, Sample, encoded_mask, to_device, validation_batches
from jigsaw_pretrain.detect.models.detectors import label_offset
from jigsaw_pretrain.detect.recipe import DetectorRecipe, ScaledRecipe
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.boxes import finite
from jigsaw_pretrain.formats.pixels import PixelFormat
from jigsaw_pretrain.storage.store import Storage
from jigsaw_pretrain.train.engine.distributed import Ranks

STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""Names of COCOeval's twelve numbers; -1 where a size has no ground truth."""

RESULTS_FILE = "results.json"
AP_FILE = "ap.json"

STRATA_KEY = "by_training_annotations"
"""The key in AP_FILE of AP by how often a class was annotated for training."""

Detection = dict[str, Any]


@dataclass(frozen=True)
class Score:
    """stats: by STATS. classes: AP, AP50 and the count of ground-truth boxes (no crowds) by class, in label order.

    Classes are called as annotations.class_names calls them, for several may have one name.

    curves: mean precision over classes at recall 0, 0.01, ... 1 by IoU threshold.
    """

    stats: dict[str, float]
    classes: dict[str, dict[str, float]]
    curves: dict[str, list[float]]


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found.

    boxes: AP of boxes; masks: of masks, or None. results: the detections that were scored, on rank 0. seconds: what it
    took, all told.
    """

    boxes: Score
    masks: Score | None
    results: list[Detection]
    seconds: float


def evaluate_model(
    model: nn.Module,
    recipe: DetectorRecipe,
    plan: ScaledRecipe,
    pixels: PixelFormat,
    annotations: GroundTruth,
    images: str,
    ranks: Ranks,
    workers: int,
    batch: int,
    stopped: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Score a model on ``annotations``; None where any rank was stopped before it was through. Ends in eval mode."""
    began = time.perf_counter()
    mine = list(range(ranks.rank, len(annotations.images), ranks.world))

    def predict() -> list[Detection]:
        found: list[Detection] = []
        for short_side in plan.test_short_sides or (None,):
            dataset = DetectionDataset(annotations, images, plan, None, False, pixels, short_side)
            with contextlib.closing(validation_batches(dataset, mine, batch, workers)) as batches:
                found += detections(model, recipe, pixels, batches, annotations, ranks.device, stopped)
        return merged(found, recipe.model.detections) if len(plan.test_short_sides) > 1 else found

    found = [one for part in ranks.gather(ranks.run_on_all(predict)) for one in part]
    if ranks.all_reduce_max(int(stopped())):
        return None
    has_masks = all("segmentation" in one for one in annotations.truth["annotations"])
    masks_too = recipe.model.name == "mask-rcnn-fpn" and has_masks

    def scored() -> tuple[Score, Score | None]:
        boxes = score(annotations.truth, [{k: v for k, v in one.items() if k != "segmentation"} for one in found])
        return boxes, score(annotations.truth, found, "segm") if masks_too else None

    box_score, mask_score = ranks.run_on_rank_zero(scored)
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    return Evaluation(box_score, mask_score, found, time.perf_counter() - began)


@torch.no_grad()
def detections(
    model: nn.Module,
    recipe: DetectorRecipe,
    pixels: PixelFormat,
    batches: Iterable[list[Sample]],
    annotations: GroundTruth,
    device: torch.device,
    stopped: Callable[[], bool],
) -> list[Detection]:
    """The detections of this process's batches, until ``stopped``; the model is left in eval mode."""
    model.eval()
    offset, autocast = label_offset(recipe.model.name), recipe.run.precision == "bf16"
    found: list[Detection] = []
    for batch in batches:
        if stopped():
            break
        images = [to_device(sample, device, offset, pixels.full_scale)[0] for sample in batch]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            results = model(images)
        for sample, image, result in zip(batch, images, results, strict=True):
            record = annotations.images[sample.index]
            found += _detections_of(result, record, image.shape, annotations, offset)
    return found


MERGED_ABOVE = 0.5
"""IoU above which two detections of one class, found at two sizes, are one."""


def merged(found: list[Detection], most: int) -> list[Detection]:
    """Detections of several tests of the same images by non-maximum suppression per class, ``most`` per image."""
    by_image: dict[Any, list[Detection]] = {}
    for one in found:
        by_image.setdefault(one["image_id"], []).append(one)
    kept = []
    for detected in by_image.values():
        boxes = torch.tensor([one["bbox"] for one in detected], dtype=torch.float64)
        boxes[:, 2:] += boxes[:, :2]
        scores = torch.tensor([one["score"] for one in detected], dtype=torch.float64)
        classes = torch.tensor([one["category_id"] for one in detected])
        kept += [detected[int(place)] for place in batched_nms(boxes, scores, classes, MERGED_ABOVE)[:most]]
    return kept


def _detections_of(
    result: dict[str, Tensor], record: ImageRecord, shape: torch.Size, annotations: GroundTruth, offset: int
) -> list[Detection]:
    """One image's detections in the stored image's coordinates."""
    factor = result["boxes"].new_tensor([record.width / shape[2], record.height / shape[1]] * 2)
    boxes = result["boxes"].float() * factor
    masks: list[Any] = [None] * len(boxes)
    if "masks" in result and len(boxes):
        pasted = paste_masks_in_image(result["masks"].float(), boxes, (record.height, record.width))
        masks = [_encoded(one) for one in (pasted[:, 0] > 0.5).cpu().numpy()]
    corners = boxes.cpu().double().numpy()
    scores, labels = result["scores"].float().cpu().tolist(), (result["labels"] - offset).cpu().tolist()
    found = []
    for (left, top, right, bottom), score, label, mask in zip(corners, scores, labels, masks, strict=True):
        detection: Detection = {
            "image_id": record.id,
            "category_id": annotations.categories[label][0],
            "bbox": [round(float(one), 2) for one in (left, top, right - left, bottom - top)],
            "score": round(score, 6),
        }
        if mask is not None:
            detection["segmentation"] = mask
        found.append(detection)
    return found


def _encoded(mask: Any) -> dict[str, Any]:
    """A bool mask as compressed RLE with text counts, as JSON holds it."""
    encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(one) for one in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def score(truth: dict[str, Any], detections: list[Detection], kind: str = "bbox") -> Score:
    """AP of detections against ``truth`` (GroundTruth.truth); ``kind`` "bbox" or "segm", where all have masks.

    Without any detection AP is 0. Raises UserError for detections of images or categories the truth does not have.
    """
    images = {image["id"]: image for image in truth["images"]}
    listed = [(one["id"], one["name"]) for one in truth["categories"]]
    categories = dict(zip((number for number, _ in listed), class_names(listed), strict=True))
    for one in detections:
        if one["image_id"] not in images or one["category_id"] not in categories:
            raise UserError(
                f"a detection is of image {one['image_id']!r} and category {one['category_id']!r}, which the "
                "annotations do not have: the results are of another dataset"
            )
    if kind == "segm":
        detections = [
            {**one, "segmentation": encoded_mask(one["segmentation"], image["height"], image["width"])}
            for one in detections
            for image in [images[one["image_id"]]]
        ]
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO()
        # A copy, for COCOeval writes into the records.
        ground.dataset = {key: [dict(one) for one in value] for key, value in _with_regions(truth, detections).items()}
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


def _with_regions(truth: dict[str, Any], detections: list[Detection]) -> dict[str, Any]:
    """The truth with its regions of no category as crowd regions of every class that is detected in their images.

    Those of other classes would change nothing. Where a region has no mask, its box is one.
    """
    detected: dict[Any, set[int]] = {}
    for one in detections:
        detected.setdefault(one["image_id"], set()).add(one["category_id"])
    sizes = {one["id"]: (one["width"], one["height"]) for one in truth["images"]}
    annotations = list(truth["annotations"])
    for region in truth.get("regions", ()):
        corners = np.array(region["bbox"]).reshape(2, 2).cumsum(axis=0)
        (left, top), (right, bottom) = np.clip(corners, 0, sizes[region["image_id"]]).tolist()
        mask = {"segmentation": [[left, top, right, top, right, bottom, left, bottom]]}
        for category in sorted(detected.get(region["image_id"], ())):
            annotations.append({**mask, **region, "id": len(annotations) + 1, "category_id": category})
    return {"images": truth["images"], "annotations": annotations, "categories": truth["categories"]}


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


STRATA = (("1-10", 1, 10), ("11-100", 11, 100), ("101-1000", 101, 1000), ("more", 1001, math.inf))
"""Ranges of how many annotations a class has in training."""


def by_stratum(found: Score, boxes: Sequence[int]) -> dict[str, dict[str, float]]:
    """AP averaged over the classes of each of STRATA that has any with ground truth.

    Args:
        found: the score.
        boxes: annotations trained on, by class in the score's order; empty where they are not known.

    Returns:
        By stratum: ``classes``, their number, and ``AP``.
    """
    strata = {}
    for name, least, most in STRATA if boxes else ():
        of_classes = [
            one["AP"] for one, count in zip(found.classes.values(), boxes, strict=True) if least <= count <= most
        ]
        scored = [ap for ap in of_classes if ap >= 0]
        if scored:
            strata[name] = {"classes": len(scored), "AP": sum(scored) / len(scored)}
    return strata


def save_evaluation(folder: Path, evaluation: Evaluation, boxes: Sequence[int]) -> None:
    """Write results.json and ap.json, each whole or not at all; ``boxes`` as of by_stratum."""
    storage = Storage(folder)
    storage.publish(RESULTS_FILE, json.dumps(evaluation.results).encode())
    storage.publish(AP_FILE, json.dumps(ap_document(evaluation, boxes), indent=2).encode() + b"\n")


def ap_document(evaluation: Evaluation, boxes: Sequence[int] = ()) -> dict[str, object]:
    """ap.json's contents."""
    strata = by_stratum(evaluation.boxes, boxes)
    return {
        "bbox": asdict(evaluation.boxes),
        "segm": evaluation.masks and asdict(evaluation.masks),
        **({STRATA_KEY: strata} if strata else {}),
    }


def read_results(path: Path, kind: str = "bbox") -> list[Detection]:
    """A COCO results file: [{image_id, category_id, score, bbox [x, y, w, h]}]; raises UserError for anything else.

    Of ``kind`` "segm" each has a segmentation, and a bbox is left to the file: all have one, or none.
    """
    try:
        found = json.loads(Storage(path.parent).read(path.name))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or 'missing'}): name a COCO results file") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    if not isinstance(found, list):
        raise UserError(f"{path} is not a COCO results file: it holds no list of detections")
    form, place = (_MaskResult, "segmentation") if kind == "segm" else (_Result, "bbox")
    keys = ("image_id", "category_id", place, "score")
    for index, one in enumerate(found):
        lacking = [key for key in keys if not isinstance(one, dict) or key not in one]
        if lacking:
            others = {"bbox": ("segmentation", "masks", "say"), "segm": ("bbox", "boxes", "do not say")}
            other, of, say = others[kind]
            is_other = lacking == [place] and other in one
            remedy = f"of {of} {say} --kind segm" if is_other else "write it for every detection"
            raise UserError(f"{path}: detection {index} lacks {', '.join(lacking)}: {remedy}")
    try:
        typed: Sequence[_Result | _MaskResult] = msgspec.convert(found, list[form])  # type: ignore[valid-type]
    except msgspec.ValidationError as error:
        raise UserError(
            f"{path} is not a COCO results file ({error}): write numbers, and boxes as four of them"
        ) from error
    boxes = [one.bbox for one in typed if one.bbox is not None]
    if 0 < len(boxes) < len(typed):
        first = next(index for index, one in enumerate(typed) if one.bbox is None)
        raise UserError(f"{path}: detection {first} has no bbox, and others have: give all of them one, or none")
    good = np.isfinite([one.score for one in typed])
    good &= finite(np.array(boxes).reshape(-1, 4)) if boxes else True
    if not good.all():
        raise UserError(
            f"{path}: detection {int(np.argmin(good))} has a score or a box that is not finite, or a box far "
            "outside of any image: correct or remove it"
        )
    return found if boxes else [{key: value for key, value in one.items() if key != "bbox"} for one in found]


def check_result_masks(path: Path, found: Sequence[Detection], truth: dict[str, Any]) -> None:
    """Raise UserError where a detection of an image of ``truth`` has no mask of that image."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    for index, one in enumerate(found):
        size = sizes.get(one["image_id"])
        if size is not None and (trouble := mask_trouble(one["segmentation"], *size)) is not None:
            raise UserError(f"{path}: detection {index} {trouble}: write {POLYGONS}")


class _Result(msgspec.Struct):
    """A detection of a COCO results file, as far as it is checked."""

    image_id: int | float | str
    category_id: int | float
    bbox: tuple[float, float, float, float]
    score: float


class _MaskResult(msgspec.Struct):
    """A detection with a mask, as far as its form is checked here."""

    image_id: int | float | str
    category_id: int | float
    score: float
    bbox: tuple[float, float, float, float] | None = None

"""Detections of a model on a set of images, as a COCO results list.

The ranks share the images; each keeps a running list on the host, gathered once. Boxes are brought back to the stored
image's pixels and rounded to 1/100 pixel, scores to 6 digits, before they are evaluated, so the file holds exactly
what was evaluated.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

from jigsaw_pretrain.detect.annotations import Annotations, Photo
from jigsaw_pretrain.detect.ap import Detection
from jigsaw_pretrain.detect.data import Sample
from jigsaw_pretrain.detect.models.detectors import label_offset


def to_device(sample: Sample, device: torch.device, offset: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A sample as torchvision's models take it: image float [3, h, w] in 0..1, and its target."""
    image = sample.image.to(device, non_blocking=True).float() / 255
    target = {"boxes": sample.boxes.to(device), "labels": sample.labels.to(device) + offset}
    if sample.masks is not None:
        target["masks"] = sample.masks.to(device)
    return image, target


@torch.no_grad()
def detections(
    model: nn.Module,
    name: str,
    batches: Iterable[list[Sample]],
    annotations: Annotations,
    device: torch.device,
    autocast: bool,
    stopped: Callable[[], bool],
) -> list[Detection]:
    """The detections of this process's batches, until ``stopped``; the model is left in eval mode."""
    model.eval()
    offset = label_offset(name)
    found: list[Detection] = []
    for batch in batches:
        if stopped():
            break
        images = [to_device(sample, device, offset)[0] for sample in batch]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            results = model(images)
        for sample, image, result in zip(batch, images, results, strict=True):
            photo = annotations.photos[sample.index]
            found += _records(result, photo, image.shape, annotations, offset)
    return found


def _records(
    result: dict[str, Tensor], photo: Photo, shape: torch.Size, annotations: Annotations, offset: int
) -> list[Detection]:
    """One image's detections in the stored image's coordinates."""
    factor = result["boxes"].new_tensor([photo.width / shape[2], photo.height / shape[1]] * 2)
    boxes = result["boxes"].float() * factor
    masks: list[Any] = [None] * len(boxes)
    if "masks" in result and len(boxes):
        pasted = paste_masks_in_image(result["masks"].float(), boxes, (photo.height, photo.width))
        masks = [_encoded(one) for one in (pasted[:, 0] > 0.5).cpu().numpy()]
    corners = boxes.cpu().double().numpy()
    scores, labels = result["scores"].float().cpu().tolist(), (result["labels"] - offset).cpu().tolist()
    records = []
    for (left, top, right, bottom), score, label, mask in zip(corners, scores, labels, masks, strict=True):
        record: Detection = {
            "image_id": photo.id,
            "category_id": annotations.categories[label][0],
            "bbox": [round(float(one), 2) for one in (left, top, right - left, bottom - top)],
            "score": round(score, 6),
        }
        if mask is not None:
            record["segmentation"] = mask
        records.append(record)
    return records


def _encoded(mask: Any) -> dict[str, Any]:
    """A bool mask as compressed RLE with text counts, as JSON holds it."""
    encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(one) for one in encoded["size"]], "counts": encoded["counts"].decode("ascii")}

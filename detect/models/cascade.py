"""Cascade R-CNN's box heads on torchvision's parts: three stages, each refining the boxes of the one before.

IoU thresholds 0.5, 0.6, 0.7, box codes of rising weight, class-agnostic boxes, losses weighted 1, 1/2, 1/4; at
inference the stages' scores are averaged and the last boxes kept. About 1.3 times a Faster R-CNN's step. The capacity a
frozen backbone wants (the frozen-backbone paper); prefer faster-rcnn-fpn where the backbone learns and time is short.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import _utils as parts
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image

THRESHOLDS = (0.5, 0.6, 0.7)
CODE_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
LOSS_WEIGHTS = (1.0, 0.5, 0.25)


class CascadePredictor(nn.Module):
    """Class scores and one class-agnostic box code for each region: [n, features] -> [n, classes], [n, 4]."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(features, classes)
        self.bbox_pred = nn.Linear(features, 4)
        for layer, spread in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=spread)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [n, classes] and codes [n, 4]."""
        features = features.flatten(start_dim=1)
        return self.cls_score(features), self.bbox_pred(features)


class CascadeRoIHeads(RoIHeads):
    """Three box heads in a row, in place of torchvision's RoIHeads."""

    def __init__(
        self,
        pool: MultiScaleRoIAlign,
        heads: list[nn.Module],
        predictors: list[nn.Module],
        rois: int,
        score_threshold: float,
        detections: int,
    ) -> None:
        super().__init__(
            pool,
            nn.ModuleList(heads),
            nn.ModuleList(predictors),
            fg_iou_thresh=THRESHOLDS[0],
            bg_iou_thresh=THRESHOLDS[0],
            batch_size_per_image=rois,
            positive_fraction=0.25,
            bbox_reg_weights=CODE_WEIGHTS[0],
            score_thresh=score_threshold,
            nms_thresh=0.5,
            detections_per_img=detections,
        )
        self.matchers = [parts.Matcher(one, one, allow_low_quality_matches=False) for one in THRESHOLDS]
        self.coders = [parts.BoxCoder(weights) for weights in CODE_WEIGHTS]

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """As RoIHeads.forward: detections in eval mode, losses by stage in train mode."""
        losses: dict[str, Tensor] = {}
        scores: list[Tensor] = []
        logits = codes = torch.empty(0)
        for stage, (head, predictor) in enumerate(zip(self.box_head, self.box_predictor, strict=True)):
            if stage:
                proposals = self._refined(codes, proposals, image_shapes, stage - 1)
            if targets is not None and self.training:
                proposals, labels, wanted = self._assigned(proposals, targets, stage)
            logits, codes = predictor(head(self.box_roi_pool(features, proposals, image_shapes)))
            if targets is not None and self.training:
                losses |= _stage_losses(logits, codes, torch.cat(labels), torch.cat(wanted), stage)
            else:
                scores.append(F.softmax(logits, -1))
        if self.training:
            return [], losses
        # postprocess_detections takes a softmax of its own and a code for each class.
        mean = torch.stack(scores).mean(0).clamp(min=1e-12).log()
        self.box_coder = self.coders[-1]
        boxes, kept, names = self.postprocess_detections(mean, codes.repeat(1, mean.shape[1]), proposals, image_shapes)
        found = [{"boxes": b, "labels": n, "scores": s} for b, n, s in zip(boxes, names, kept, strict=True)]
        return found, losses

    def _refined(
        self, codes: Tensor, proposals: list[Tensor], image_shapes: list[tuple[int, int]], stage: int
    ) -> list[Tensor]:
        """The boxes a stage's codes make of its proposals, cut to the image; in training without empty ones."""
        boxes = self.coders[stage].decode(codes.detach(), proposals).reshape(-1, 4)
        refined = []
        for box, shape in zip(boxes.split([len(one) for one in proposals]), image_shapes, strict=True):
            cut = clip_boxes_to_image(box, shape)
            if self.training:
                cut = cut[((cut[:, 2:] - cut[:, :2]) > 1e-2).all(dim=1)]
            refined.append(cut)
        return refined

    def _assigned(
        self, proposals: list[Tensor], targets: list[dict[str, Tensor]], stage: int
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Proposals with their labels and box codes: drawn at the first stage, all of them at the later ones."""
        self.proposal_matcher, self.box_coder = self.matchers[stage], self.coders[stage]
        if stage == 0:
            proposals, _, labels, codes = self.select_training_samples(proposals, targets)
            return proposals, labels, list(codes)
        boxes = [target["boxes"].to(proposals[0].dtype) for target in targets]
        matched, labels = self.assign_targets_to_proposals(proposals, boxes, [target["labels"] for target in targets])
        truth: list[Any] = []
        for own, index, proposal in zip(boxes, matched, proposals, strict=True):
            truth.append(own[index] if len(own) else torch.zeros_like(proposal))
        return proposals, labels, list(self.box_coder.encode(truth, proposals))


def _stage_losses(logits: Tensor, codes: Tensor, labels: Tensor, wanted: Tensor, stage: int) -> dict[str, Tensor]:
    """Cross entropy over all regions, smooth L1 over those that hold an object; zero where there is no region."""
    count = max(1, labels.numel())
    positive = labels > 0
    classes = F.cross_entropy(logits, labels, reduction="sum") / count
    boxes = F.smooth_l1_loss(codes[positive], wanted[positive], beta=1 / 9, reduction="sum") / count
    weight = LOSS_WEIGHTS[stage]
    return {f"loss_classifier_{stage}": weight * classes, f"loss_box_reg_{stage}": weight * boxes}

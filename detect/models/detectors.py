"""The five detectors, built on torchvision's detection parts around a residual backbone.

- ``faster-rcnn-c4``: the original Faster R-CNN, RPN on layer3 and the RoI head from layer4. Most of it is transferred,
  so it is the one to judge pre-training by.
- ``faster-rcnn-fpn``: torchvision's, its state dict's names too. The common baseline.
- ``mask-rcnn-fpn``: the same with a mask head, where there are segmentations.
- ``retinanet``: one stage with focal loss, the fastest at inference.
- ``cascade-rcnn-fpn``: three box heads in a row (detect/models/cascade.py), for a frozen backbone.

Under bf16 only convolutions and matrices run in bfloat16: its 8 bits would move a box at pixel 800 by 4, so features
and predictions are brought back to float32 before torchvision makes anchors and boxes of them.
"""

from typing import Any

from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.resnet import ResNet
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from jigsaw_pretrain.detect.models.backbone import STAGES, NormLayer, stage_channels
from jigsaw_pretrain.detect.models.cascade import THRESHOLDS, CascadePredictor, CascadeRoIHeads
from jigsaw_pretrain.detect.recipe import DetectorRecipe

ANCHORS = (32, 64, 128, 256, 512)
"""Anchor sides in pixels for a short side of 800."""

RATIOS = (0.5, 1.0, 2.0)
LEVELS = ["0", "1", "2", "3"]


def label_offset(model: str) -> int:
    """What is added to labels 0..C-1 for the model: 1 where class 0 is the background."""
    return 0 if model == "retinanet" else 1


def build_detector(
    recipe: DetectorRecipe, network: ResNet, classes: int, anchor_scale: float, added: NormLayer | None
) -> nn.Module:
    """A detector of ``classes`` foreground classes around ``network``.

    ``added``: the norm of the layers that the detector adds (see added_norm). Takes images as a list of float [3, h, w]
    in 0..1 and targets as torchvision's models do.
    """
    if recipe.model.name == "faster-rcnn-c4":
        model: nn.Module = _c4(recipe, network, classes, anchor_scale)
    elif recipe.model.name == "retinanet":
        model = _retinanet(recipe, network, classes, anchor_scale, added)
    else:
        model = _pyramid(recipe, network, classes, anchor_scale, added)
    size = {"min_size": 800, "max_size": 1333}
    old = model.transform
    assert isinstance(old, GeneralizedRCNNTransform)
    model.transform = IdentityTransform(image_mean=old.image_mean, image_std=old.image_std, size_divisible=32, **size)
    for module in model.modules():
        if isinstance(module, _PREDICT):
            module.register_forward_hook(_as_float32)
    model.get_submodule("backbone").register_forward_hook(_as_float32)
    model.get_submodule("rpn.head" if hasattr(model, "rpn") else "head").register_forward_hook(_as_float32)
    return model


def _c4(recipe: DetectorRecipe, network: ResNet, classes: int, scale: float) -> FasterRCNN:
    channels = stage_channels(network)
    layer4 = network.layer4
    body = IntermediateLayerGetter(network, {"layer3": "0"})
    return FasterRCNN(
        _Body(body, channels[2]),
        rpn_anchor_generator=AnchorGenerator((tuple(side * scale for side in ANCHORS),), (RATIOS,)),
        rpn_pre_nms_top_n_train=12_000,
        rpn_pre_nms_top_n_test=6_000,
        rpn_post_nms_top_n_train=2 * recipe.model.proposals,
        rpn_post_nms_top_n_test=recipe.model.proposals,
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=2),
        box_head=RegionHead(layer4),
        box_predictor=FastRCNNPredictor(channels[3], classes + 1),
        **_box_options(recipe),
    )


def _pyramid(
    recipe: DetectorRecipe, network: ResNet, classes: int, scale: float, added: NormLayer | None
) -> FasterRCNN:
    backbone = _pyramid_backbone(network, recipe.model.neck_channels, added, 0, LastLevelMaxPool())
    canonical = max(1, round(224 * scale))
    pool = MultiScaleRoIAlign(LEVELS, output_size=7, sampling_ratio=2, canonical_scale=canonical)
    options: dict[str, Any] = {
        "rpn_anchor_generator": AnchorGenerator(tuple((side * scale,) for side in ANCHORS), (RATIOS,) * len(ANCHORS)),
        "rpn_post_nms_top_n_train": recipe.model.proposals,
        "rpn_post_nms_top_n_test": recipe.model.proposals,
        "box_roi_pool": pool,
        "box_head": _box_head(recipe, added),
        "box_predictor": FastRCNNPredictor(recipe.model.fc, classes + 1),
        **_box_options(recipe),
    }
    if recipe.model.name == "mask-rcnn-fpn":
        return MaskRCNN(
            backbone,
            mask_roi_pool=MultiScaleRoIAlign(LEVELS, output_size=14, sampling_ratio=2, canonical_scale=canonical),
            mask_head=MaskRCNNHeads(recipe.model.neck_channels, [recipe.model.neck_channels] * 4, 1, added),
            mask_predictor=MaskRCNNPredictor(recipe.model.neck_channels, recipe.model.neck_channels, classes + 1),
            **options,
        )
    model = FasterRCNN(backbone, **options)
    if recipe.model.name == "cascade-rcnn-fpn":
        model.roi_heads = CascadeRoIHeads(
            pool,
            [_box_head(recipe, added) for _ in THRESHOLDS],
            [CascadePredictor(recipe.model.fc, classes + 1) for _ in THRESHOLDS],
            recipe.model.rois,
            recipe.model.score_threshold,
            recipe.model.detections,
        )
    return model


def _retinanet(
    recipe: DetectorRecipe, network: ResNet, classes: int, scale: float, added: NormLayer | None
) -> RetinaNet:
    backbone = _pyramid_backbone(
        network,
        recipe.model.neck_channels,
        added,
        1,
        LastLevelP6P7(recipe.model.neck_channels, recipe.model.neck_channels),
    )
    octaves = tuple(tuple(side * scale * 2 ** (third / 3) for third in range(3)) for side in ANCHORS)
    anchors = AnchorGenerator(octaves, (RATIOS,) * len(ANCHORS))
    head = RetinaNetHead(recipe.model.neck_channels, anchors.num_anchors_per_location()[0], classes, added)
    return RetinaNet(
        backbone,
        classes,
        anchor_generator=anchors,
        head=head,
        score_thresh=recipe.model.score_threshold,
        detections_per_img=recipe.model.detections,
    )


def _pyramid_backbone(network: ResNet, width: int, added: NormLayer | None, first: int, extra: Any) -> BackboneWithFPN:
    """The network with a pyramid on its stages from ``first`` (0 is layer1)."""
    layers = {stage: str(level) for level, stage in enumerate(STAGES[first:])}
    return BackboneWithFPN(network, layers, stage_channels(network)[first:], width, extra, added)


def _box_head(recipe: DetectorRecipe, added: NormLayer | None) -> nn.Module:
    if recipe.model.head == "4conv1fc":
        return FastRCNNConvFCHead(
            (recipe.model.neck_channels, 7, 7), [recipe.model.neck_channels] * 4, [recipe.model.fc], added
        )
    return TwoMLPHead(recipe.model.neck_channels * 49, recipe.model.fc)


def _box_options(recipe: DetectorRecipe) -> dict[str, Any]:
    return {
        "box_batch_size_per_image": recipe.model.rois,
        "box_score_thresh": recipe.model.score_threshold,
        "box_detections_per_img": recipe.model.detections,
    }


class IdentityTransform(GeneralizedRCNNTransform):
    """torchvision's transform for images that come resized: normalises and batches, resizes nothing back or forth."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """The image and target as they are."""
        return image, target

    def postprocess(self, result: list[dict[str, Tensor]], image_shapes: Any, original_image_sizes: Any) -> Any:
        """The detections as they are: boxes in the resized image, masks of 28 x 28 in their boxes."""
        return result


class RegionHead(nn.Module):
    """C4's box head: the backbone's layer4 on 14 x 14 regions, averaged: [n, C3, 14, 14] -> [n, C4]."""

    def __init__(self, layer4: nn.Module) -> None:
        super().__init__()
        self.layer4 = layer4

    def forward(self, regions: Tensor) -> Tensor:
        """One vector per region."""
        features: Tensor = self.layer4(regions)
        return features.mean((2, 3))


class _Body(nn.Module):
    """A body without a pyramid, as FasterRCNN wants it: a dict of one map, and its channel count."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body = body
        self.out_channels = channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """{"0": [n, C, h / 16, w / 16]}."""
        maps: dict[str, Tensor] = self.body(images)
        return maps


_PREDICT = (FastRCNNPredictor, MaskRCNNPredictor, CascadePredictor)


def _as_float32(module: nn.Module, inputs: Any, output: Any) -> Any:
    """A forward hook: every floating tensor of the output in float32."""
    if isinstance(output, Tensor):
        return output.float()
    if isinstance(output, dict):
        return {key: _as_float32(module, inputs, value) for key, value in output.items()}
    return type(output)(_as_float32(module, inputs, value) for value in output)

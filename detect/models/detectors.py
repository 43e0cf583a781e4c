"""The five detectors, built on torchvision's detection parts around any backbone (detect/models/backbone.py).

- ``faster-rcnn-c4``: the original Faster R-CNN, RPN on the map of stride 16 and the last stage as RoI head. Most of it
  is transferred, so it is the one to judge pre-training by. A network whose last stage is a pooling alone (VGG) gets
  two fully connected layers on 7 x 7 regions, as in Fast R-CNN; VGG's own are no part of pre-training.
- ``faster-rcnn-fpn``: torchvision's, its state dict's names too. The common baseline.
- ``mask-rcnn-fpn``: the same with a mask head, where there are segmentations.
- ``retinanet``: one stage with focal loss, the fastest at inference.
- ``cascade-rcnn-fpn``: three box heads in a row (detect/models/cascade.py), for a frozen backbone.

Under bf16 only convolutions and matrices run in bfloat16: its 8 bits would move a box at pixel 800 by 4, so features
and predictions are brought back to float32 before torchvision makes anchors and boxes of them.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from jigsaw_pretrain.detect.models.backbone import SyncBatchNorm2d
from jigsaw_pretrain.detect.models.cascade import THRESHOLDS, CascadePredictor, CascadeRoIHeads
from jigsaw_pretrain.detect.models.nas_fpn import NasFpn
from jigsaw_pretrain.detect.recipe import DetectorRecipe
from jigsaw_pretrain.train.models.feature_maps import Backbone

NormLayer = Callable[[int], nn.Module]

ANCHORS = (32, 64, 128, 256, 512)
"""Anchor sides in pixels for a short side of 800."""

RATIOS = (0.5, 1.0, 2.0)
LEVELS = ["0", "1", "2", "3"]


def label_offset(model: str) -> int:
    """What is added to labels 0..C-1 for the model: 1 where class 0 is the background."""
    return 0 if model == "retinanet" else 1


def build_detector(
    recipe: DetectorRecipe,
    network: Backbone,
    classes: int,
    anchor_scale: float,
    added: NormLayer | None,
    mean: Sequence[float],
    std: Sequence[float],
) -> nn.Module:
    """A detector around a backbone.

    Args:
        recipe: its settings.
        network: the backbone, cut as the detector needs it (detect/models/backbone.py).
        classes: foreground classes.
        anchor_scale: of the anchors, against COCO's.
        added: the norm of the layers that the detector adds (see norm_layer).
        mean: of each channel of the images, which come in 0..1.
        std: standard deviation of each channel.

    Returns:
        A module that takes images as a list of float [channels, h, w] and targets as torchvision's models do.
    """
    if recipe.model.name == "faster-rcnn-c4":
        model: nn.Module = _c4(recipe, network, classes, anchor_scale)
    elif recipe.model.name == "retinanet":
        model = _retinanet(recipe, network, classes, anchor_scale, added)
    else:
        model = _pyramid(recipe, network, classes, anchor_scale, added)
    model.transform = IdentityTransform(800, 1333, list(mean), list(std), size_divisible=32)
    for module in model.modules():
        if isinstance(module, _PREDICT):
            module.register_forward_hook(_as_float32)
    model.get_submodule("backbone").register_forward_hook(_as_float32)
    model.get_submodule("rpn.head" if hasattr(model, "rpn") else "head").register_forward_hook(_as_float32)
    return model


def _c4(recipe: DetectorRecipe, network: Backbone, classes: int, scale: float) -> FasterRCNN:
    stage = network.stages[0]
    rest = network.rest
    assert rest is not None
    learns = bool(rest.state_dict())
    head = rest if learns else TwoMLPHead(stage.channels * 49, recipe.model.fc)
    predictor = MeanPredictor(network.channels, classes + 1) if learns else None
    return FasterRCNN(
        _Body(network.module, stage.channels),
        rpn_anchor_generator=AnchorGenerator((tuple(side * scale for side in ANCHORS),), (RATIOS,)),
        rpn_pre_nms_top_n_train=12_000,
        rpn_pre_nms_top_n_test=6_000,
        rpn_post_nms_top_n_train=2 * recipe.model.proposals,
        rpn_post_nms_top_n_test=recipe.model.proposals,
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=14 if learns else 7, sampling_ratio=2),
        box_head=head,
        box_predictor=predictor or FastRCNNPredictor(recipe.model.fc, classes + 1),
        **_box_options(recipe),
    )


def _pyramid(
    recipe: DetectorRecipe, network: Backbone, classes: int, scale: float, added: NormLayer | None
) -> FasterRCNN:
    backbone = _pyramid_backbone(network, recipe, added, 0, LastLevelMaxPool())
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
    recipe: DetectorRecipe, network: Backbone, classes: int, scale: float, added: NormLayer | None
) -> RetinaNet:
    backbone = _pyramid_backbone(
        network,
        recipe,
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


def _pyramid_backbone(
    network: Backbone, recipe: DetectorRecipe, added: NormLayer | None, first: int, extra: Any
) -> nn.Module:
    """The network with a pyramid on its stages from ``first`` (0 is that of stride 4; NAS-FPN's is always 8)."""
    width = recipe.model.neck_channels
    if recipe.model.neck == "nas-fpn":
        three = [stage.channels for stage in network.stages[1:]]
        return PyramidBody(network.module, NasFpn(three, width, added or SyncBatchNorm2d), width, 1)
    channels = [stage.channels for stage in network.stages[first:]]
    return PyramidBody(network.module, FeaturePyramidNetwork(channels, width, extra, added), width, first)


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


class PyramidBody(nn.Module):
    """A backbone of several maps and its pyramid, under torchvision's names of a BackboneWithFPN: body, fpn."""

    def __init__(self, body: nn.Module, fpn: nn.Module, channels: int, first: int) -> None:
        super().__init__()
        self.body, self.fpn = body, fpn
        self.out_channels, self._first = channels, first

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """[n, C, H, W] to the levels by name, "0" the finest."""
        maps = self.body(images)[self._first :]
        levels: dict[str, Tensor] = self.fpn(OrderedDict((str(level), one) for level, one in enumerate(maps)))
        return levels


class MeanPredictor(FastRCNNPredictor):
    """C4's predictor: it averages what the backbone's last stage makes of regions, [n, C, 7, 7]."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [n, classes] and box codes [n, 4 classes]."""
        found: tuple[Tensor, Tensor] = super().forward(x.mean((2, 3)))
        return found


class _Body(nn.Module):
    """A body without a pyramid, as FasterRCNN wants it: a dict of one map, and its channel count."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body = body
        self.out_channels = channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """{"0": [n, C, h / 16, w / 16]}."""
        return {"0": self.body(images)}


_PREDICT = (FastRCNNPredictor, MaskRCNNPredictor, CascadePredictor)


def _as_float32(module: nn.Module, inputs: Any, output: Any) -> Any:
    """A forward hook: every floating tensor of the output in float32."""
    if isinstance(output, Tensor):
        return output.float()
    if isinstance(output, dict):
        return {key: _as_float32(module, inputs, value) for key, value in output.items()}
    return type(output)(_as_float32(module, inputs, value) for value in output)

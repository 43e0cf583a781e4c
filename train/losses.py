"""The three classification strategies (section 3.3, Table 2): ERF-adaptive, block-wise and global.

Pure functions of the dense logits. All work on the log-softmax gathered at the four labels, so no soft-label tensor of
all classes is ever made, and in float32 even under autocast (float64 stays float64). At [64, 81, 7, 7] each costs about
a millisecond on one CPU core. ERF-adaptive is the paper's and best (36.3 AP against 35.2 and 34.3); with tau = 1 it is
per-position cross entropy on the own region's label. Block-wise needs no table; global is CutMix by area.

``smoothing`` is that of torch's cross_entropy: a share of each label is spread evenly over all classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from jigsaw_pretrain.formats.jigsaw import REGIONS
from jigsaw_pretrain.train.erf import RegionMap


def erf_adaptive_loss(
    logits: Tensor, labels: Tensor, weights: Tensor, region_map: RegionMap, smoothing: float = 0.0
) -> Tensor:
    """Equation 1 with the region balance: a scalar, the mean over images.

    ``map[j, k] = -sum over i of w[i, j, k] log softmax(logits[:, j, k])[y_i]``, averaged over the positions of each
    region, then over the four regions.

    logits: [n, classes, h, w]. labels: int [n, 4], the class of each region. weights: [4, h, w], summing to 1 over the
    regions (erf.label_weights). region_map: int [h, w], 0 to 3. Raises ValueError where shapes disagree.
    """
    shares = _region_shares(region_map, logits)
    if weights.shape != shares.shape:
        raise ValueError(f"weights of shape {list(weights.shape)} for logits of shape {list(logits.shape)}")
    with torch.autocast(logits.device.type, enabled=False):
        log_probabilities = functional.log_softmax(_wide(logits), dim=1)
        height, width = logits.shape[2:]
        places = labels.long()[:, :, None, None].expand(-1, -1, height, width)
        picked = _smoothed(log_probabilities.gather(1, places), log_probabilities, smoothing)
        # Each position counts 1 / (4 * positions of its region): the mean within a region, then over the four.
        balance = weights.to(picked.dtype) * (shares.sum(dim=0) / len(REGIONS))
        return -(picked * balance).sum(dim=(1, 2, 3)).mean()


def block_wise_loss(logits: Tensor, labels: Tensor, region_map: RegionMap, smoothing: float = 0.0) -> Tensor:
    """Cross entropy of each region's average-pooled logits with its label, mean of the four and of the images.

    logits: [n, classes, h, w]. labels: int [n, 4]. region_map: int [h, w]. Returns a scalar.
    """
    with torch.autocast(logits.device.type, enabled=False):
        pooled = region_logits(logits, region_map)
        return functional.cross_entropy(pooled.flatten(0, 1), labels.long().flatten(), label_smoothing=smoothing)


def global_loss(logits: Tensor, labels: Tensor, region_map: RegionMap, smoothing: float = 0.0) -> Tensor:
    """Cross entropy of the logits averaged over all positions with one soft label, mean over the images: a scalar.

    The soft label holds each region's class by the region's share of the area (CutMix).
    logits: [n, classes, h, w]. labels: int [n, 4]. region_map: int [h, w].
    """
    area = (_region_shares(region_map, logits) > 0).to(_wide(logits).dtype).mean(dim=(1, 2))
    with torch.autocast(logits.device.type, enabled=False):
        log_probabilities = functional.log_softmax(_wide(logits).mean(dim=(2, 3)), dim=1)
        picked = _smoothed(log_probabilities.gather(1, labels.long()), log_probabilities, smoothing)
        return -(picked * area).sum(dim=1).mean()


def region_logits(logits: Tensor, region_map: RegionMap) -> Tensor:
    """The logits averaged over the positions of each region: [n, 4, classes], float32 (float64 stays).

    Their largest is what the trainer and `evaluate` call the prediction of a region, under every strategy (with a neck
    that of their mean over the levels, see predictions).
    """
    shares = _region_shares(region_map, logits)
    with torch.autocast(logits.device.type, enabled=False):
        return torch.einsum("nchw,rhw->nrc", _wide(logits), shares)


def predictions(logits: Sequence[Tensor], region_maps: Sequence[RegionMap]) -> Tensor:
    """The predicted class of each region, int64 [n, 4]: the largest of region_logits, averaged over the maps of a neck.

    logits, region_maps: of each map classified, all of the same images and classes.
    """
    found = [region_logits(one, regions) for one, regions in zip(logits, region_maps, strict=True)]
    return torch.stack(found).mean(dim=0).argmax(dim=2)


def _smoothed(picked: Tensor, log_probabilities: Tensor, smoothing: float) -> Tensor:
    """The labels' log-probabilities, with a share of each moved to the mean over all classes (dimension 1)."""
    if not smoothing:
        return picked
    return (1 - smoothing) * picked + smoothing * log_probabilities.mean(dim=1, keepdim=True)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _region_shares(region_map: RegionMap, logits: Tensor) -> Tensor:
    """[4, h, w] in the logits' wide dtype: 1 / (positions of the region) at its positions, 0 elsewhere."""
    regions = torch.as_tensor(region_map, device=logits.device)
    if logits.dim() != 4 or logits.shape[2:] != regions.shape:
        raise ValueError(f"logits of shape {list(logits.shape)} for a region map of {list(regions.shape)}")
    masks = torch.stack([regions == region for region in range(len(REGIONS))]).to(_wide(logits).dtype)
    return masks / masks.sum(dim=(1, 2), keepdim=True).clamp(min=1)

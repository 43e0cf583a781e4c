"""Equations 1 and 2 and the two other strategies as slow float64 loops over positions, written apart from train/.

And how a crop that is not resampled lies in its region.
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def weights_by_hand(masses: Array, region_map: Ints, tau: float) -> Array:
    result = np.zeros(masses.shape)
    for j in range(region_map.shape[0]):
        for k in range(region_map.shape[1]):
            mass = [float(value) for value in masses[:, j, k]]
            r = int(region_map[j, k])
            others = math.fsum(mass[i] for i in range(4) if i != r)
            if others == 0:
                result[r, j, k] = 1.0
                continue
            result[r, j, k] = max(tau, mass[r] / math.fsum(mass))
            for i in range(4):
                if i != r:
                    result[i, j, k] = (1 - result[r, j, k]) * (mass[i] / others)
    return result


def centred(pixels: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """Pixels [h, w, 3] cut or padded with zeros to a region's size, the odd one of the rest at the end."""
    for axis, room in ((0, height), (1, width)):
        spare = abs(pixels.shape[axis] - room)
        if pixels.shape[axis] > room:
            pixels = np.take(pixels, range(spare // 2, spare // 2 + room), axis=axis)
        else:
            around = [(0, 0)] * 3
            around[axis] = (spare // 2, spare - spare // 2)
            pixels = np.pad(pixels, around)
    return pixels


def log_softmax_by_hand(scores: Array) -> list[float]:
    largest = max(scores)
    total = math.log(math.fsum(math.exp(score - largest) for score in scores)) + largest
    return [float(score - total) for score in scores]


def positions(region_map: Ints, region: int) -> list[tuple[int, int]]:
    return [
        (j, k) for j in range(region_map.shape[0]) for k in range(region_map.shape[1]) if region_map[j, k] == region
    ]


def cross_entropy_by_hand(scores: Array, soft: Array, smoothing: float) -> float:
    """The loss of one position's scores with a soft label, of which a share is spread over all classes."""
    spread = (1 - smoothing) * soft + smoothing / len(soft)
    return -math.fsum(share * one for share, one in zip(spread, log_softmax_by_hand(scores), strict=True))


def erf_adaptive_by_hand(
    logits: Array, labels: Ints, weights: Array, region_map: Ints, smoothing: float = 0.0
) -> float:
    losses = []
    for image, label in zip(logits, labels, strict=True):
        by_region = []
        for region in range(4):
            values = []
            for j, k in positions(region_map, region):
                soft = np.zeros(logits.shape[1])
                for i in range(4):
                    soft[label[i]] += weights[i, j, k]
                values.append(cross_entropy_by_hand(image[:, j, k], soft, smoothing))
            by_region.append(math.fsum(values) / len(values))
        losses.append(math.fsum(by_region) / 4)
    return math.fsum(losses) / len(losses)


def block_wise_by_hand(logits: Array, labels: Ints, region_map: Ints, smoothing: float = 0.0) -> float:
    losses = []
    for image, label in zip(logits, labels, strict=True):
        for region in range(4):
            places = positions(region_map, region)
            pooled = sum(image[:, j, k] for j, k in places) / len(places)
            losses.append(cross_entropy_by_hand(pooled, np.eye(logits.shape[1])[label[region]], smoothing))
    return math.fsum(losses) / len(losses)


def global_by_hand(logits: Array, labels: Ints, region_map: Ints, smoothing: float = 0.0) -> float:
    losses = []
    for image, label in zip(logits, labels, strict=True):
        soft = np.zeros(logits.shape[1])
        for region, one in enumerate(label):
            soft[one] += len(positions(region_map, region)) / region_map.size
        losses.append(cross_entropy_by_hand(image.mean(axis=(1, 2)), soft, smoothing))
    return math.fsum(losses) / len(losses)

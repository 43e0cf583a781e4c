"""Snapshots for the run's HTML page: ERF tables and sample predictions, beside the numbers in metrics.jsonl.

RUN/looks/fields-NNNNNNNN.npz at every ERF refresh (the four regions' fields, masses and weights), and
RUN/looks/answers-NNNNNNNN.npz at a checkpoint, at most once a minute (a few jigsaws of the last batch with what the
network took their crops for, and what it confused since the time before). About 1 MB each at the paper's size, 20 ms to
write, rank 0's share only; training neither reads them nor changes by them. Remove the folder and the page says so.
"""

import io
import re
import zipfile
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from jigsaw_pretrain.formats import pixels
from jigsaw_pretrain.formats.jigsaw import REGIONS
from jigsaw_pretrain.storage.store import Storage
from jigsaw_pretrain.train.data.batch import Batch
from jigsaw_pretrain.train.erf import eval_mode, field_map

FOLDER = "looks"
"""Names of the folder and its files are those of the first version, so that old runs stay readable."""

MOST_BYTES = 64 << 20
"""The most of one array of a snapshot."""

JIGSAWS = 6
FIELD_IMAGES = 8

_NAME = re.compile(r"(fields|answers)-(\d{8,})\.npz")


@dataclass(frozen=True)
class ErfSnapshot:
    """ERFs of one refresh: fields float32 [4, H, W] of the regions, masses and weights float32 [4, h, w]."""

    kind: ClassVar[str] = "fields"
    fields: npt.NDArray[np.float32]
    masses: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]

    def picture(self) -> npt.NDArray[np.uint8]:
        """The four fields side by side, brightness uint8 [H, 4 W, 3]."""
        grey = np.concatenate([(255 * brightness(field)).astype(np.uint8) for field in self.fields], axis=1)
        return np.repeat(grey[:, :, None], 3, axis=2)


@dataclass(frozen=True)
class PredictionSnapshot:
    """Predictions of the steps since the snapshot before.

    images: a few jigsaws as pixels.displayed gives them, uint8 [n, size, size, 3]. labels, predictions and groups: of
    their crops, int64 [n, 4]. confusion: int64 [m, 3], rows of label, predicted class and count over all the steps.
    """

    kind: ClassVar[str] = "answers"
    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    predictions: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]
    confusion: npt.NDArray[np.int64]

    def picture(self) -> npt.NDArray[np.uint8]:
        """The jigsaws side by side, uint8 [size, n size, 3]."""
        return np.concatenate(list(self.images), axis=1)


def brightness(field: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """A field's brightness for display: logarithm over the top two decades, 0 to 1. Never compute ratios of it."""
    top = float(field.max())
    if top <= 0:
        return np.zeros(field.shape)
    return np.clip(1 + np.log10(np.maximum(field / top, 1e-12)) / 2, 0, 1)


Snapshot = TypeVar("Snapshot", ErfSnapshot, PredictionSnapshot)


class PredictionRecorder:
    """Gathers the predictions of the steps between two snapshots, on the device until they are asked for."""

    def __init__(self, label_count: int, display: pixels.DisplayRange) -> None:
        self._label_count, self._display = label_count, display
        self._pairs: list[Tensor] = []
        self._last: tuple[Batch, Tensor] | None = None

    def note(self, batch: Batch, labels: Tensor, predictions: Tensor) -> None:
        """Note one step: labels and predictions int [n, 4] on the device."""
        self._pairs.append((labels.long() * self._label_count + predictions).flatten())
        self._last = (batch, predictions)

    def take(self) -> PredictionSnapshot | None:
        """What was noted since the last call; None where nothing was."""
        if self._last is None:
            return None
        (batch, predictions), display = self._last, self._display
        pairs, counts = np.unique(torch.cat(self._pairs).cpu().numpy(), return_counts=True)
        confusion = np.stack([*np.divmod(pairs, self._label_count), counts], axis=1).astype(np.int64)
        self._pairs, self._last = [], None
        return PredictionSnapshot(
            images=pixels.displayed(
                batch.images[:JIGSAWS].cpu().numpy(), display.pixels, display.mean, display.std
            ).copy(),
            labels=batch.labels[:JIGSAWS].cpu().numpy().astype(np.int64),
            predictions=predictions[:JIGSAWS].cpu().numpy().astype(np.int64),
            groups=batch.groups[:JIGSAWS].cpu().numpy().astype(np.int64),
            confusion=confusion,
        )


def region_fields(
    backbone: nn.Module, images: Tensor, region_map: Tensor, masses: Tensor, weights: Tensor
) -> ErfSnapshot:
    """The field of each region's summed features on a few normalised images, with the refresh's masses and weights."""
    with eval_mode(backbone):
        maps = [
            field_map(backbone, images[:FIELD_IMAGES], [(int(j), int(k)) for j, k in (region_map == region).nonzero()])
            for region in range(len(REGIONS))
        ]
    drawn = torch.stack(maps).cpu().numpy().astype(np.float32)
    return ErfSnapshot(drawn, masses.float().cpu().numpy(), weights.float().cpu().numpy())


def save_snapshot(run: Path, step: int, snapshot: ErfSnapshot | PredictionSnapshot) -> None:
    """Write a snapshot of ``step`` into the run folder, whole or not at all."""
    sink = io.BytesIO()
    arrays: dict[str, Any] = {field.name: getattr(snapshot, field.name) for field in fields(snapshot)}
    np.savez_compressed(sink, **arrays)
    Storage(run).publish(f"{FOLDER}/{snapshot.kind}-{step:08d}.npz", sink.getvalue())


def snapshots(run: Path, kind: type[Snapshot]) -> dict[int, Path]:
    """The snapshots of a kind by step, oldest first; none where the folder is missing."""
    found = {}
    for path in sorted((run / FOLDER).glob(f"{kind.kind}-*.npz")):
        match = _NAME.fullmatch(path.name)
        if match:
            found[int(match[2])] = path
    return dict(sorted(found.items()))


def load_snapshot(path: Path, kind: type[Snapshot]) -> Snapshot:
    """Read one snapshot; raises OSError or ValueError for what is not one.

    Each array's header is held against the bytes that are there before anything is allocated.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for field in fields(kind):
                with archive.open(f"{field.name}.npy") as file:
                    raw = file.read(MOST_BYTES + 1)
                if len(raw) > MOST_BYTES:
                    raise ValueError(f"{path}: {field.name} is too large for a snapshot")
                arrays[field.name] = pixels.npy_array(raw)
    except (zipfile.BadZipFile, KeyError, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path} is no snapshot ({type(error).__name__})") from error
    return kind(**arrays)

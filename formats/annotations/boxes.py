"""Boxes gathered one by one, for readers of formats that hold them in many small files."""

import numpy as np

from jigsaw_pretrain.formats.annotations.skipped import BoxReason
from jigsaw_pretrain.formats.annotations.table import BoxColumns

NOWHERE = (float("nan"),) * 4
"""What stands for a box that is none."""


class BoxList:
    """Collects boxes in order and turns them into columns; such boxes have no annotation ids."""

    def __init__(self) -> None:
        self._entry: list[int] = []
        self._xywh: list[tuple[float, float, float, float]] = []
        self._label: list[int] = []
        self._crowd: list[bool] = []

    def add(self, entry: int, xywh: tuple[float, float, float, float], label: int, crowd: bool = False) -> None:
        """Add a box of an image entry; label -1: of an unknown category."""
        self._entry.append(entry)
        self._xywh.append(xywh)
        self._label.append(label)
        self._crowd.append(crowd)

    def columns(self) -> BoxColumns:
        """All boxes."""
        count = len(self._entry)
        label = np.array(self._label, dtype=np.int64)
        return BoxColumns(
            entry=np.array(self._entry, dtype=np.int64),
            xywh=np.array(self._xywh, dtype=np.float64).reshape(count, 4),
            label=label,
            annotation_id=np.zeros(count, dtype=np.int64),
            has_id=np.zeros(count, dtype=bool),
            crowd=np.array(self._crowd, dtype=bool),
            reason=np.where(label < 0, BoxReason.UNKNOWN_CATEGORY, BoxReason.USABLE).astype(np.uint8),
        )

"""Sheets of jigsaws: outlines and names."""

import numpy as np

from jigsaw_pretrain.formats.jigsaw import Template
from jigsaw_pretrain.train.report.sheet import COLOURS, sheet


def test_regions_are_outlined_and_named() -> None:
    images = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    template = Template(64, 16)
    page = np.asarray(sheet(images, [[0, 1, 2, 0]], [[0, 2, 1, 0]], template, ["a cat", "a dog"]))
    scale = 7
    for region, group in zip(template.regions, (0, 2, 1, 0), strict=True):
        corner = page[16 + region.top * scale, 16 + region.left * scale]
        assert tuple(corner) == COLOURS[group]
        inside = page[16 + region.top * scale + 3 :, 16 + region.left * scale + 3 :][
            : region.height * scale - 6, : region.width * scale - 6
        ]
        assert (inside.max(axis=(0, 1)) > 100).any(), "no label is written"

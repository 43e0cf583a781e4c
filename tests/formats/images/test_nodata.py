"""Pixels that mark missing data are no measurements: such an image is told, and never averaged or trained on."""

import io

import numpy as np
import pytest
import tifffile

from jigsaw_pretrain.formats.images.decode import ImageError, decode_raster
from jigsaw_pretrain.formats.pixels import named


@pytest.mark.parametrize(("value", "tagged"), [(-9999.0, True), (-3.4028235e38, True), (-3.4028235e38, False)])
def test_an_image_with_nodata_is_told_with_its_value(value: float, tagged: bool) -> None:
    for some in (True, False):
        pixels = np.random.default_rng(0).normal(400, 20, (16, 20)).astype(np.float32)
        pixels[:, :3] = value if some else 400
        buffer = io.BytesIO()
        tags = [(42113, "s", 0, str(value), True)] if tagged else []
        tifffile.imwrite(buffer, pixels, photometric="minisblack", extratags=tags)
        if some:
            with pytest.raises(ImageError, match="nodata"):
                decode_raster(buffer.getvalue(), 20, 16, "ignore", named("1xfloat32"))
        else:
            assert (decode_raster(buffer.getvalue(), 20, 16, "ignore", named("1xfloat32"))[..., 0] == pixels).all()

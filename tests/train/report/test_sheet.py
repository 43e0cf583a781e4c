"""The preview command's sheet."""

from pathlib import Path

import numpy as np
from click.testing import CliRunner
from PIL import Image, ImageFont

from jigsaw_pretrain.formats.jigsaw import Template
from jigsaw_pretrain.train.cli import main
from jigsaw_pretrain.train.report.sheet import COLOURS, sheet, shortened
from tests.helpers.tiny import make_dataset


def test_the_command_draws_a_sheet(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", {"S": [20], "T": [9], "W": [8]})
    out = tmp_path / "new" / "sheet.png"
    arguments = ["preview", "--data", str(tmp_path / "set"), "--out", str(out), "--count", "5", "--size", "128"]
    result = CliRunner().invoke(main, [*arguments, "--split", "32"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    image = Image.open(out)
    assert image.width == 3 * (512 + 16) + 16 and image.height == 2 * (512 + 16) + 16
    result = CliRunner().invoke(main, [*arguments[:3], "--out", str(tmp_path / "sheet.nope"), "--count", "1"])
    assert result.exit_code == 2 and "choose another file" in result.output


def test_regions_are_outlined_and_named() -> None:
    images = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    template = Template(64, 16)
    page = np.asarray(sheet(images, [[0, 1, 2, 0]], [[0, 2, 1, 0]], template, ["a cat", "a dog"]))
    scale = 7
    for region, group in zip(template.regions, "SWTS", strict=True):
        corner = page[16 + region.top * scale, 16 + region.left * scale]
        assert tuple(corner) == COLOURS[group]
        inside = page[16 + region.top * scale + 3 :, 16 + region.left * scale + 3 :][
            : region.height * scale - 6, : region.width * scale - 6
        ]
        assert (inside.max(axis=(0, 1)) > 100).any(), "no label is written"


def test_long_names_are_shortened() -> None:
    font = ImageFont.load_default(14)
    assert shortened("cat", 100, font) == "cat"
    text = shortened("a very long name of a class", 90, font)
    assert text.endswith("…") and font.getlength(text) <= 90

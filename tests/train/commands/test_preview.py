"""The preview command."""

from pathlib import Path

import numpy as np
from click.testing import CliRunner
from PIL import Image

from jigsaw_pretrain.train.cli import main
from jigsaw_pretrain.train.data.loader import JigsawLoader
from jigsaw_pretrain.train.recipe import Recipe
from jigsaw_pretrain.train.report.sheet import sheet
from tests.helpers.settings import sets
from tests.helpers.tiny import make_dataset


def test_the_sheet_shows_the_first_jigsaws_of_the_recipes_run(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", {"S": [20], "T": [9], "W": [8]})
    file, out = tmp_path / "own.toml", tmp_path / "new" / "sheet.png"
    file.write_text("[data]\ntemplate_size = 128\ntemplate_split = 32\nbatch = 2\nlanes = 2\nresize_low = 0.3\n")
    arguments = ["preview", "--data", str(tmp_path / "set"), "--recipe", str(file), *sets("data.seed=3")]
    result = CliRunner().invoke(main, [*arguments, "--out", str(out), "--count", "5"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    options = Recipe.load(file, ["data.seed=3"]).data
    seen = JigsawLoader(dataset, options, workers=0).first(5)
    drawn = sheet(seen.images.numpy(), seen.labels.tolist(), seen.groups.tolist(), options.template, dataset.classes)
    assert drawn.size == (3 * (512 + 16) + 16, 2 * (512 + 16) + 16)
    np.testing.assert_array_equal(np.asarray(Image.open(out)), np.asarray(drawn))
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "sheet.nope"), "--count", "1"])
    assert result.exit_code == 2 and "sheet.nope" in result.output

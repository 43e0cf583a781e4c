"""The preview command."""

from pathlib import Path

from click.testing import CliRunner
from PIL import Image

from jigsaw_pretrain.train.cli import main
from tests.helpers.tiny import make_dataset


def test_the_command_draws_a_sheet(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", {"S": [20], "T": [9], "W": [8]})
    file = tmp_path / "own.toml"
    file.write_text("[data]\ntemplate_size = 128\ntemplate_split = 32\nbatch = 2\nlanes = 2\nbalance = 'sqrt'\n")
    out = tmp_path / "new" / "sheet.png"
    arguments = ["preview", "--data", str(tmp_path / "set"), "--out", str(out), "--count", "5"]
    result = CliRunner().invoke(main, [*arguments, "--recipe", str(file)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    image = Image.open(out)
    assert image.width == 3 * (512 + 16) + 16 and image.height == 2 * (512 + 16) + 16
    result = CliRunner().invoke(main, [*arguments[:3], "--out", str(tmp_path / "sheet.nope"), "--count", "1"])
    assert result.exit_code == 2 and "choose another file" in result.output

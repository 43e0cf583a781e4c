"""Training on datasets of other sensors: stems, normalisation, windows, exact resuming, exports and pages."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from click.testing import CliRunner
from PIL import Image

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset.dataset import open_dataset
from jigsaw_pretrain.formats.pixels import displayed
from jigsaw_pretrain.train.cli import main
from jigsaw_pretrain.train.data.reader import SOURCE, CropReader, LocalShards
from jigsaw_pretrain.train.engine.run_folder import open_run_folder, read_description
from jigsaw_pretrain.train.engine.state import build_model
from jigsaw_pretrain.train.models import backbones
from jigsaw_pretrain.train.models.weights import load_weights
from jigsaw_pretrain.train.recipe import Recipe
from tests.helpers.detection import TINY
from tests.helpers.jobs import SMALL
from tests.helpers.sensors import multispectral, thermal
from tests.helpers.settings import sets
from tests.helpers.tiny import make_dataset, spoil

NAMES = {"thermal": (thermal, 1), "multispectral": (multispectral, 6)}


@pytest.fixture(scope="module", params=NAMES)
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A prepped dataset and its number of channels."""
    make, channels = NAMES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    make(folder / "drawn").shards(folder / "out", "--crops-per-part", "5", "--workers", "1")
    return folder / "out", channels


def command(*arguments: str) -> str:
    result = CliRunner().invoke(main, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def pretrain(data: Path, run: Path, *more: str, workers: int = 0) -> str:
    chosen = (*SMALL, "optim.steps=3", "loss.erf_every=2")
    settings = [part for one in chosen for part in ("--set", one)]
    return command("pretrain", "--data", str(data), "--run", str(run), "--workers", str(workers), *settings, *more)


@pytest.mark.slow(seconds=32)
def test_from_shards_to_an_export(data: tuple[Path, int], tmp_path: Path) -> None:
    out, channels = data
    said = pretrain(out, tmp_path / "whole", "--log-digest", workers=2)
    assert f"pixels {channels} x uint16" in said
    pretrain(out, tmp_path / "parts", "--log-digest", "--stop-after", "2", "--no-page")
    pretrain(out, tmp_path / "parts", "--log-digest", "--resume", "--no-page")
    runs = [tmp_path / "whole", tmp_path / "parts"]
    first, second = (torch.load(run / "backbone.pth", weights_only=True) for run in runs)
    assert all(torch.equal(first[key], second[key]) for key in {*first, *second})
    assert (runs[0] / "digest.txt").read_bytes() == (runs[1] / "digest.txt").read_bytes()
    recipe = read_description(open_run_folder(runs[0]))["recipe"]
    mean, std = open_dataset(str(out)).measured
    assert (recipe["data"]["mean"], recipe["data"]["std"]) == (list(mean), list(std))
    # The export loads into the library's own model with the stem of its README.
    file = tmp_path / "backbone.pth"
    command("export", "--run", str(runs[0]), "--to", "torchvision", "--out", str(file))
    note = Path(f"{file}.README.md").read_text()
    assert f"**{channels} x uint16**" in note and "divided by 65535" in note
    line = next(line for line in note.splitlines() if "torch.nn.Conv2d" in line)
    scope: dict[str, Any] = {"model": torchvision.models.get_model(TINY), "torch": torch}
    exec(line, scope)
    found = scope["model"].load_state_dict(torch.load(file, weights_only=True), strict=False)
    assert found.unexpected_keys == [] and set(found.missing_keys) == {"fc.weight", "fc.bias"}
    # Pages, sheets and figures show and say something.
    command("preview", "--data", str(out), "--out", str(tmp_path / "sheet.png"), "--count", "2", *sets(*SMALL))
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet[16:464, 16:464].std() > 20
    page = (runs[0] / "report.html").read_text()
    assert ("One channel, as grey" if channels == 1 else "Channels 1, 2 and 3 of 6") in page
    assert page.count("data:image/webp") >= 1
    result = command("evaluate", "--run", str(runs[0]), "--data", str(out), "--workers", "0", "--jigsaws", "8")
    assert "all regions" in result
    # Both say which backbone they are of, and what its pixels are normalised with.
    weights = ("--weights", str(file), "--weights", str(runs[0]))
    lines = command("erf", "--data", str(out), *weights, "--count", "1", "--out", str(tmp_path / "erf.html"))
    told = [line for line in lines.splitlines() if "gradient" in line]
    assert told[0].split(": ", 1)[1] == told[1].split(": ", 1)[1]


@pytest.mark.slow(seconds=4)
def test_a_run_keeps_to_its_pixels(data: tuple[Path, int], tmp_path: Path) -> None:
    out, channels = data
    other = make_dataset(tmp_path / "rgb", {"S": [4], "T": [2], "W": [2]})
    for mean in ("[0.5, 0.5]", "[0.5, 0.5, 0.5]"):
        arguments = ["pretrain", "--data", str(out), "--run", str(tmp_path / "run"), "--set", f"data.mean={mean}"]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2 and f"must be {channels} numbers, one for each channel" in result.output
    weights = tmp_path / "rgb.pth"
    torch.save(backbones.build(TINY).module.state_dict(), weights)
    with pytest.raises(UserError, match=f"over 3 input channels .* and the crops have {channels}"):
        load_weights(backbones.build(TINY, in_channels=channels), str(weights))
    assert Recipe().resolved(other).data.mean == Recipe().data.normalisation[0]


def test_normalised_crops_have_mean_0_and_deviation_1(data: tuple[Path, int]) -> None:
    dataset = open_dataset(str(data[0]))
    recipe = Recipe.load(None, [f"model.backbone={TINY}"]).resolved(dataset)
    _, model = build_model(recipe, dataset.label_count, dataset.pixels)
    reader = CropReader(dataset, LocalShards(dataset), capacity=9)
    crops = np.concatenate([reader.crops(shard.index) for shard in dataset.shards])
    every = [reader.decode(*crop[SOURCE].tolist()) for crop in crops]
    values = np.concatenate([pixels.reshape(-1, data[1]) for pixels in every if pixels is not None])
    normalised = model.normalise(torch.from_numpy(values[None, :, None]))
    assert normalised.dtype == torch.float32
    assert torch.allclose(normalised.mean((0, 2, 3)), torch.zeros(data[1]), atol=1e-3)
    assert torch.allclose(normalised.std((0, 2, 3)), torch.ones(data[1]), atol=1e-2)
    shown = displayed(values, dataset.pixels, *dataset.measured)
    assert shown.shape[-1] == 3 and 60 < shown.mean() < 200 and shown.std() > 30


def test_a_member_that_is_damaged_is_replaced(tmp_path: Path) -> None:
    multispectral(tmp_path / "drawn").shards(tmp_path / "out", "--workers", "1")
    dataset = open_dataset(str(tmp_path / "out"))
    reader = CropReader(dataset, LocalShards(dataset), capacity=3, with_keys=True)
    crop = reader.crops(0)[:1]
    assert reader.decode(*crop[0][SOURCE].tolist()) is not None
    spoil(dataset, reader.keys(crop)[0])
    assert CropReader(dataset, LocalShards(dataset), capacity=3).decode(*crop[0][SOURCE].tolist()) is None
    line = command("digest", "--data", str(tmp_path / "out"), "--steps", "1", *sets(*SMALL))
    assert len(line.splitlines()[-1].split()) == 3

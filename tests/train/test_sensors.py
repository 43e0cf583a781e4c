"""Training on datasets of other sensors: stems, normalisation, windows, exact resuming, exports and pages."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torchvision
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from jigsaw_pretrain.detect.models import backbone
from jigsaw_pretrain.detect.models.weights import load
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset.dataset import open_dataset
from jigsaw_pretrain.formats.pixels import displayed, named
from jigsaw_pretrain.train.cli import main
from jigsaw_pretrain.train.data.augment import resample, resample_channels, resized
from jigsaw_pretrain.train.data.reader import SOURCE, CropReader, LocalShards
from jigsaw_pretrain.train.engine.run_folder import open_run, read_description
from jigsaw_pretrain.train.engine.state import build_model
from jigsaw_pretrain.train.models import backbones
from jigsaw_pretrain.train.models.layers import input_convolutions
from jigsaw_pretrain.train.models.weights import load_weights
from jigsaw_pretrain.train.recipe import Recipe
from tests.sensors import multispectral, thermal
from tests.train.jobs import SMALL
from tests.train.tiny import make_dataset, spoil

SIZE = ("--size", "64", "--split", "32")
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
    chosen = (*SMALL, "steps=3", "erf_every=2")
    settings = [part for one in chosen for part in ("--set", one)]
    return command("pretrain", "--data", str(data), "--run", str(run), "--workers", str(workers), *settings, *more)


def test_from_shards_to_an_export(data: tuple[Path, int], tmp_path: Path) -> None:
    out, channels = data
    said = pretrain(out, tmp_path / "whole", "--log-digest", workers=2)
    assert f"pixels {channels} x uint16" in said
    pretrain(out, tmp_path / "parts", "--log-digest", "--stop-after", "2")
    pretrain(out, tmp_path / "parts", "--log-digest", "--resume")
    runs = [tmp_path / "whole", tmp_path / "parts"]
    first, second = (torch.load(run / "backbone.pth", weights_only=True) for run in runs)
    assert all(torch.equal(first[key], second[key]) for key in {*first, *second})
    assert (runs[0] / "digest.txt").read_bytes() == (runs[1] / "digest.txt").read_bytes()
    recipe = read_description(open_run(runs[0]))["recipe"]
    mean, std = open_dataset(str(out)).measured
    assert (recipe["mean"], recipe["std"]) == (list(mean), list(std))
    # The export loads into the library's own model with the stem of its README.
    file = tmp_path / "backbone.pth"
    command("export", "--run", str(runs[0]), "--to", "torchvision", "--out", str(file))
    note = file.with_suffix(".README.md").read_text()
    assert f"**{channels} x uint16**" in note and "divided by 65535" in note
    line = next(line for line in note.splitlines() if "torch.nn.Conv2d" in line)
    scope: dict[str, Any] = {"model": torchvision.models.shufflenet_v2_x0_5(), "torch": torch}
    exec(line, scope)
    found = scope["model"].load_state_dict(torch.load(file, weights_only=True), strict=False)
    assert found.unexpected_keys == [] and set(found.missing_keys) == {"fc.weight", "fc.bias"}
    # Pages, sheets and figures show and say something.
    command(
        "preview",
        "--data",
        str(out),
        "--out",
        str(tmp_path / "sheet.png"),
        "--count",
        "2",
        "--size",
        "64",
        "--split",
        "32",
    )
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet[16:464, 16:464].std() > 20
    page = (runs[0] / "report.html").read_text()
    assert ("One channel, as grey" if channels == 1 else "Channels 1, 2 and 3 of 6") in page
    assert page.count("data:image/webp") >= 1
    result = command("evaluate", "--run", str(runs[0]), "--data", str(out), "--workers", "0", "--jigsaws", "8")
    assert "all regions" in result
    weights = ("--weights", str(file), "--backbone", "shufflenet_v2_x0_5", *SIZE)
    command("erf", "--data", str(out), *weights, "--count", "1", "--out", str(tmp_path / "erf.html"))


def test_a_run_keeps_to_its_pixels(data: tuple[Path, int], tmp_path: Path) -> None:
    out, channels = data
    other = make_dataset(tmp_path / "rgb", {"S": [4], "T": [2], "W": [2]})
    for mean in ("[0.5, 0.5]", "[0.5, 0.5, 0.5]"):
        arguments = ["pretrain", "--data", str(out), "--run", str(tmp_path / "run"), "--set", f"mean={mean}"]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2 and f"must be {channels} numbers, one for each channel" in result.output
    weights = tmp_path / "rgb.pth"
    torch.save(backbones.build("shufflenet_v2_x0_5").module.state_dict(), weights)
    with pytest.raises(UserError, match=f"over 3 input channels .* and the crops have {channels}"):
        load_weights(backbones.build("shufflenet_v2_x0_5", colours=channels), str(weights))
    assert Recipe().resolved(other).mean == Recipe().normalisation[0]


def test_detectors_say_what_they_read() -> None:
    network = backbone.build_backbone("resnet18", "frozen", torch.device("cpu"))
    with pytest.raises(UserError, match="takes images of 6 channels, and these detectors read 8-bit RGB"):
        load(network, {"conv1.weight": torch.zeros(64, 6, 7, 7)}, "file.pth", False)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "timm:resnet18", "tests.train.own:plain"])
@pytest.mark.parametrize("channels", [1, 6])
def test_stems_of_any_number_of_channels(name: str, channels: int) -> None:
    torch.manual_seed(0)
    rgb = backbones.build(name)
    torch.manual_seed(0)
    found = backbones.build(name, colours=channels)
    assert (found.channels, found.stride, found.head, found.colours) == (rgb.channels, rgb.stride, rgb.head, channels)
    size = 2 * found.stride
    assert found.module.eval()(torch.rand(1, channels, size, size)).shape == (1, found.channels, 2, 2)
    (stem,) = input_convolutions(found.module, channels).values()
    (old,) = input_convolutions(rgb.module, 3).values()
    assert stem.weight.shape == (old.weight.shape[0], channels, *old.weight.shape[2:])
    if not name.startswith("timm"):
        assert float(stem.weight.detach().std()) == pytest.approx(float(old.weight.detach().std()), rel=0.4)


def takes_any(in_channels: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(in_channels, 4, 4, 4), nn.Conv2d(4, 8, 2, 2))


def sees_nothing() -> nn.Module:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(1, 8, 8, 8)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.inner(x[:, :1])
            return result

    return Sliced()


def test_ones_own_backbone_is_told_or_rebuilt() -> None:
    found = backbones.build("tests.train.test_sensors:takes_any", colours=5)
    assert found.module(torch.rand(1, 5, 16, 16)).shape == (1, 8, 2, 2)
    with pytest.raises(UserError, match="no plain convolution over its input that could take 5 channels"):
        backbones.build("tests.train.test_sensors:sees_nothing", colours=5)


@given(
    st.integers(1, 9), st.sampled_from(["uint8", "uint16", "float32"]), st.booleans(), st.booleans(), st.integers(0, 9)
)
def test_windows_of_many_channels_are_those_of_each(
    channels: int, dtype: str, flip: bool, smooth: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    height, width, rows, columns = (int(side) for side in rng.integers(8, 40, 4))
    scaled = columns + int(rng.integers(0, 60)), rows + int(rng.integers(0, 60))
    start = tuple(int(rng.integers(0, whole - part + 1)) for whole, part in zip(scaled, (columns, rows), strict=True))
    pixels = (rng.random((height, width, channels)) * 255).astype(dtype)
    out = np.zeros((rows + 3, columns + 3, channels), dtype=dtype)
    resample_channels(pixels, scaled, flip, (start[0], start[1]), smooth, out[1:-2, 2:-1])
    for channel in range(channels):
        one = np.zeros((rows, columns), dtype=dtype)
        resample(np.ascontiguousarray(pixels[..., channel]), scaled, flip, (start[0], start[1]), smooth, one)
        difference = np.abs(out[1:-2, 2:-1, channel].astype(float) - one.astype(float))
        # OpenCV's kernels for one and for four channels round apart.
        assert difference.max() <= (0.01 if dtype == "float32" else 1)
    assert not out[0].any() and not out[:, :2].any()
    assert resized(pixels, (7, 5), cv2.INTER_AREA).shape == (5, 7, channels)


def test_normalised_crops_have_mean_0_and_deviation_1(data: tuple[Path, int]) -> None:
    dataset = open_dataset(str(data[0]))
    recipe = Recipe(backbone="shufflenet_v2_x0_5").resolved(dataset)
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
    line = command(
        "digest", "--data", str(tmp_path / "out"), "--batch", "4", "--steps", "1", "--size", "64", "--split", "32"
    )
    assert len(line.splitlines()[-1].split()) == 3


def test_a_channel_that_never_changes_is_divided_by_one() -> None:
    class Flat:
        pixels, measured = named("2xuint16"), ((0.5, 0.25), (0.0, 0.125))

    assert Recipe().resolved(Flat()).std == (1.0, 0.125)  # type: ignore[arg-type]

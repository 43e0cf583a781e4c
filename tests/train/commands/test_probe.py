"""The probe command."""

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from jigsaw_pretrain.formats.jigsaw import Fit
from jigsaw_pretrain.train.cli import main
from jigsaw_pretrain.train.commands.probe import show
from jigsaw_pretrain.train.probe import judged, read_crops, shown
from tests.helpers.detection import TINY
from tests.helpers.tiny import make_dataset


def coloured(group: str, count: int, seed: int) -> list[np.ndarray]:
    """Crops of noise; the dataset's labels are drawn by make_dataset."""
    width, height = {"S": (32, 32), "T": (16, 48), "W": (48, 16)}[group]
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 256, (height, width, 3), dtype=np.uint8) for _ in range(count)]


def dataset(folder: Path, seed: int) -> Path:
    pictures = {group: coloured(group, 24, seed) for group in "STW"}
    make_dataset(folder, {group: [24] for group in "STW"}, pictures=pictures, seed=seed)
    return folder


@pytest.mark.slow(seconds=10)
def test_probe_compares_a_run_with_its_random_backbone(tmp_path: Path) -> None:
    data, held_out = dataset(tmp_path / "data", 0), dataset(tmp_path / "held-out", 1)
    settings = [
        f"model.backbone={TINY}",
        "data.template_size=64",
        "data.template_split=32",
        "data.batch=4",
        "optim.steps=1",
        "optim.lr_batch=512",
    ]
    sets = [part for setting in settings for part in ("--set", setting)]
    run = str(tmp_path / "run")
    runner = CliRunner()
    made = runner.invoke(main, ["pretrain", "--data", str(data), "--run", run, "--workers", "0", "--no-page", *sets])
    assert made.exit_code == 0, made.output
    # What is named next takes the run's own network, whatever the fitted recipes say.
    assert f"--init {run} --backbone {TINY}" in made.stderr
    report = tmp_path / "probe.json"
    command = ["probe", "--run", run, "--data", str(held_out), "--json", str(report), "--device", "cpu"]
    result = runner.invoke(main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(report.read_text())
    assert found["crops_to_fit"] + found["crops_to_judge"] == 72
    for name in ("run", "random"):
        assert 0 <= found[name]["top1"] <= 1 and 0 <= found[name]["class_mean"] <= 1
    assert "random initialisation" in result.output
    again = runner.invoke(main, command, catch_exceptions=False)
    assert json.loads(report.read_text()) == found and again.exit_code == 0
    warned = runner.invoke(main, ["probe", "--run", run, "--data", str(data), "--device", "cpu"])
    assert "nothing is held out" in warned.output
    # The run's own weights from a file are judged as the run is; another backbone's are refused.
    file = f"{run}/backbone.pth"
    beside = runner.invoke(main, [*command, "--weights", file], catch_exceptions=False)
    assert beside.exit_code == 0, beside.output
    assert json.loads(report.read_text()) == {**found, "weights": {file: found["run"]}}
    # Shown in another way they are told apart otherwise, the run's as the same weights from a file.
    other = runner.invoke(main, [*command, "--fit", "crop", "--weights", file], catch_exceptions=False)
    padded = json.loads(report.read_text())
    assert other.exit_code == 0 and padded["weights"][file] == padded["run"] != found["run"]
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    refused = runner.invoke(main, [*command, "--weights", str(tmp_path / "other.pth")])
    assert refused.exit_code == 2 and "other.pth" in refused.output


def test_no_image_is_on_both_sides_of_the_probe(tmp_path: Path) -> None:
    from jigsaw_pretrain.formats.dataset.dataset import open_dataset

    dataset(tmp_path / "data", 0)
    crops = read_crops(open_dataset(str(tmp_path / "data")), 32, 1000)
    assert crops.pixels.shape == (72, 32, 32, 3) and len(crops.labels) == 72 and set(crops.fold) <= {0, 1, 2, 3}
    fewer = read_crops(open_dataset(str(tmp_path / "data")), 32, 20)
    assert len(fewer.pixels) == 20


@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 24), st.sampled_from([0.5, 1.0, 1.5]))
def test_a_crop_is_shown_as_training_shows_it_but_in_the_middle(
    width: int, height: int, side: int, ratio: float
) -> None:
    pixels = np.random.default_rng(0).integers(1, 256, (height, width, 3), dtype=np.uint8)
    assert shown(pixels, side, "warp", ratio).all()
    scales: dict[Fit, Fraction] = {"crop": Fraction(ratio), "resize": Fraction(side, max(width, height))}
    for fit, scale in scales.items():
        square = shown(pixels, side, fit, ratio)
        lit = np.any(square, axis=2)
        for axis, length in ((1, height), (0, width)):
            found = np.flatnonzero(np.any(lit, axis=axis))
            visible = min(side, max(1, math.floor(length * scale + Fraction(1, 2))))
            assert len(found) == visible and found[-1] - found[0] == visible - 1
            assert found[0] == (side - visible) // 2
    whole = shown(pixels, 2 * max(width, height), "crop", 1.0)
    top, left = (len(whole) - height) // 2, (len(whole) - width) // 2
    assert np.array_equal(whole[top : top + height, left : left + width], pixels)
    part = shown(pixels, 1, "crop", 1.0)
    assert np.array_equal(part[0, 0], pixels[(height - 1) // 2, (width - 1) // 2])


def test_a_crop_that_a_ratio_makes_huge_is_made_no_further_than_it_is_shown() -> None:
    assert shown(np.ones((2000, 2000, 3), np.uint8), 8, "crop", 1000.0).all()


def test_separable_features_are_told_apart_and_noise_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (400,), generator=generator)
    noise = torch.randn(400, 8, generator=generator)
    fold = np.arange(400) % 4
    clear = judged(noise + 6 * torch.nn.functional.one_hot(labels, 8), labels, fold, 3)
    assert clear.top1 > 0.97 and clear.class_mean > 0.97
    assert judged(noise, labels, fold, 3).top1 == pytest.approx(1 / 3, abs=0.15)


def test_files_are_shown_as_they_are_called(capsys: pytest.CaptureFixture[str]) -> None:
    share = {"top1": 0.5, "class_mean": 0.5}
    report = {"backbone": "resnet18", "step": 1, "crops_to_judge": 4, "classes_judged": 2, "majority_share": 0.5}
    names = ["w [/M3].pth", "lego [red].pth", ":car:"]
    show({**report, "run": share, "random": share, "weights": dict.fromkeys(names, share), "class_mean_ratio": 1.0})
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)

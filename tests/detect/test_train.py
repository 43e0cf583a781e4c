"""Training a detector: run folders in a store, data that is broken, and what a caller's process keeps."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import jigsaw_pretrain as jp
from jigsaw_pretrain.detect import training
from jigsaw_pretrain.detect.annotations import read_ground_truth
from jigsaw_pretrain.detect.data import Order
from jigsaw_pretrain.detect.evaluation import evaluate
from jigsaw_pretrain.detect.recipe import DetectorRecipe
from jigsaw_pretrain.detect.run import CONFIG, load_detector, read_config
from jigsaw_pretrain.detect.training import train
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.engine.checkpoint import list_checkpoints
from jigsaw_pretrain.train.engine.distributed import Ranks
from jigsaw_pretrain.train.engine.metrics import read_rows
from jigsaw_pretrain.train.engine.run_folder import open_run_folder
from tests.helpers.detection import SETTINGS, TINY, set_options
from tests.helpers.jobs import same
from tests.helpers.stores import proxied_store
from tests.helpers.streams import FakeStreams

Run = Callable[..., Any]


@pytest.mark.slow(seconds=8)
def test_a_run_in_a_store_goes_on_after_its_machine_is_lost(
    tmp_path: Path, detect: Run, plain_runs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = {"model": "retinanet", "norm": "gn", "steps": 4}
    detect(tmp_path / "whole", **options)
    with proxied_store() as (store, _):
        run = f"s3://{store.bucket}/runs/detector"
        detect(run, "--stop-after", "2", **options)
        folder = open_run_folder(run, CONFIG)
        shutil.rmtree(folder.path)
        assert "already holds a run" in detect(run, expect=2, **options).output
        said = detect(run, "--resume", **options).output
        assert f"{run}: finished after 4 steps" in said
        with pytest.raises(UserError, match="--out"):
            evaluate(run)
        evaluate(run, out=tmp_path / "ap", workers=0)
        assert json.loads((tmp_path / "ap" / "ap.json").read_text())["bbox"]
        shutil.rmtree(folder.path)
        assert folder.remote is not None
        folder.remote.pull()
        assert [row["step"] for row in read_rows(folder.metrics)] == [0, 1, 2, 3, 3]
        whole, there = (
            torch.load(one / "detector.pth", weights_only=True) for one in (tmp_path / "whole", folder.path)
        )
    assert same(dict(whole), dict(there))


def test_an_image_that_cannot_be_read_ends_the_run_in_one_line_after_a_checkpoint(
    tmp_path: Path, detect: Run, tiny_data: Path, plain_runs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A sample of the images is looked at first, which of these few would be all.
    monkeypatch.setattr("jigsaw_pretrain.detect.annotations.ASKED", 0)
    shutil.copytree(tiny_data / "train", tmp_path / "train")
    truth = read_ground_truth(str(tmp_path / "train" / "annotations.json"), str(tmp_path / "train" / "images"))
    landscape = np.array([record.width >= record.height for record in truth.images])
    chosen = truth.images[int(Order(landscape, 2, 0).batch(2)[1])]
    (tmp_path / "train" / "images" / chosen.file_name).write_bytes(b"no picture")
    for workers in (0, 1):
        run = tmp_path / f"run-{workers}"
        flags = ("--images", str(tmp_path / "train" / "images"), "--workers", str(workers))
        said = detect(run, *flags, expect=2, model="retinanet", norm="gn", steps=6).output
        assert said.count("Error: ") == 1 and chosen.file_name in said and "Traceback" not in said
        assert [step for step, _ in list_checkpoints(run / "checkpoints")] == [2]
        assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [0, 1]


def allowed() -> tuple[bool, bool]:
    """Whether TF32 is allowed in convolutions and in products."""
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.mark.slow(seconds=3)
def test_a_caller_keeps_its_random_state_and_switches_and_reads_the_log(
    tmp_path: Path,
    tiny_data: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {**SETTINGS, "model.name": "retinanet", "model.norm": "gn", "model.backbone": TINY, "run.tf32": False}
    recipe = DetectorRecipe.load(None, set_options(**settings)[1::2])
    folders = (tiny_data / "train", tiny_data / "val")
    data, held_out = ((str(one / "annotations.json"), str(one / "images")) for one in folders)
    validated = partial(train, *data, val_annotations=held_out[0], val_images=held_out[1], device="cpu")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before, within = (torch.get_rng_state(), allowed()), []

    def page(*_: object) -> None:
        within.append(allowed())

    folder = validated(tmp_path / "run", recipe, workers=0, log=("tensorboard",), write_page=page)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == allowed()
    assert within == [(False, False)]
    assert (folder.path / "summary.json").exists() and list((folder.path / "tensorboard").iterdir())
    assert "finished after 2 steps" in caplog.text and capfd.readouterr().out == ""
    detector = load_detector(folder.path, read_config(folder.path), torch.device("cpu"))
    kernels = [one for one in detector.parameters() if one.dim() == 4 and min(one.shape[1:]) > 1]
    assert kernels and all(one.is_contiguous(memory_format=torch.channels_last) for one in kernels)

    # Enough for the training images alone; an evaluation makes its batches while those of training are there.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=200_000))
    streams = FakeStreams()
    monkeypatch.setattr(training, "start", lambda _: Ranks(streams=streams))
    train(*data, tmp_path / "alone", recipe, workers=1, device="cpu")
    # Of a GPU it is noted when each batch is there and when each step is done.
    assert streams.calls.count("event") >= 4
    with pytest.raises(UserError, match="--shm-size"):
        validated(tmp_path / "refused", recipe, workers=1)
    assert not (tmp_path / "refused" / CONFIG).exists()
    with pytest.raises(UserError, match="--shm-size"):
        evaluate(folder.path, workers=4, device="cpu", out=tmp_path)


@pytest.mark.slow(seconds=2)
def test_places_may_be_paths_and_arguments_are_checked(tiny_data: Path, tiny_weights: Path, tmp_path: Path) -> None:
    both = [tiny_data / side / name for side in ("train", "val") for name in ("annotations.json", "images")]
    given: dict[str, Any] = {"val_annotations": both[2], "val_images": both[3], "workers": 0, "device": "cpu"}
    untyped: Any = jp.detect
    wrong: list[tuple[str, Any, str]] = [
        ("recipe", "detect-sample", "recipe must be a DetectorRecipe: give DetectorRecipe.load('detect-sample')"),
        ("stop_after", 0, "stop_after must be a whole number"),
        ("device", "gpu", "device must be one of auto, cpu, cuda, not gpu"),
        ("log", ["x"], "log must be a list of names"),
        ("val_images", 5, "val_images must be a path or a URL, not 5"),
    ]
    for name, value, said in wrong:
        with pytest.raises(jp.UserError) as caught:
            untyped.train(*both[:2], tmp_path / "run", **{**given, name: value})
        assert caught.value.message.startswith(said) and not (tmp_path / "run").exists()
    settings = {**SETTINGS, "model.name": "retinanet", "model.norm": "gn", "model.backbone": TINY, "partial": True}
    recipe = DetectorRecipe.load(None, set_options(**settings)[1::2])
    untyped.train(*both[:2], tmp_path / "run", recipe, init=tiny_weights, **given)
    assert jp.detect.evaluate(tmp_path / "run", device="cpu", workers=0).boxes.stats["AP"] >= 0

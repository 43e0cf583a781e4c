"""Arguments of the functions of training in Python: each is checked before anything is read or written."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jigsaw_pretrain as jp
from jigsaw_pretrain.train.data.remote import ReadOptions
from tests.helpers.prepped import tree
from tests.helpers.settings import FIRST_VERSION

UNTYPED: Any = jp


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("device", "gpu", "device must be one of auto, cpu, cuda, not gpu"),
        ("compiling", "On", "MachineOptions.compile must be one of auto, on, off, not On"),
        ("log", "none", "log must be a list of names (tensorboard, wandb, mlflow, none), not none"),
        ("log", ["numpy"], "log must be a list of names (tensorboard, wandb, mlflow, none), not ['numpy']"),
        ("stop_after", 0, "stop_after must be a whole number from 1 to 1,000,000,000 or none, not 0"),
        ("stop_after", math.nan, "stop_after must be a whole number from 1 to 1,000,000,000 or none, not nan"),
        ("workers", -1, "workers must be a whole number from 0 to 1,000,000,000, not -1"),
        ("keep", 0, "keep must be a whole number from 1 to 1,000,000,000 or none, not 0"),
        ("val_every", -1, "val_every must be a whole number from 0 to 1,000,000,000, not -1"),
        ("val_every", 2, "val_every = 2 has nothing to validate on: give held_out, or leave it out"),
    ],
)
def test_a_wrong_argument_of_pretrain_is_named(tmp_path: Path, name: str, value: Any, said: str) -> None:
    dataset = jp.open_dataset(Path(FIRST_VERSION))
    with pytest.raises(jp.UserError) as caught:
        UNTYPED.pretrain(dataset, tmp_path / "run", **{name: value})
    assert caught.value.message == said and not tree(tmp_path)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda run: UNTYPED.evaluate(run, None, jigsaws=0), "jigsaws must be a whole number"),
        (lambda run: UNTYPED.evaluate(run, None, batch=0), "batch must be a whole number"),
        (lambda run: UNTYPED.evaluate(run, None, device="gpu"), "device must be one of auto, cpu, cuda, not gpu"),
        (lambda run: UNTYPED.probe(run, None, crops=math.inf), "crops must be a whole number"),
        (lambda run: UNTYPED.probe(run, None, fit="Warp"), "fit must be one of crop, warp, resize, not Warp"),
        (lambda run: UNTYPED.estimate(None, steps=0), "steps must be a whole number"),
        (lambda run: UNTYPED.pretrain("crops", run), "dataset must be a Dataset, not 'crops'"),
        (lambda run: UNTYPED.evaluate(run, Path("crops")), "dataset must be a Dataset, not PosixPath('crops')"),
        (lambda run: UNTYPED.probe(run, None), "dataset must be a Dataset, not None"),
        (lambda run: UNTYPED.estimate("crops"), "dataset must be a Dataset, not 'crops'"),
        (lambda run: UNTYPED.export(run, "Torchvision", run / "x"), "to must be one of torchvision, "),
        (lambda run: UNTYPED.export(run, "timm", run / "x", recalibrate_bn=0), "recalibrate_bn must be a whole"),
    ],
)
def test_arguments_of_other_functions_are_checked(tmp_path: Path, call: Callable[[Path], Any], said: str) -> None:
    with pytest.raises(jp.UserError) as caught:
        call(tmp_path)
    assert caught.value.message.startswith(said) and not tree(tmp_path)


@pytest.mark.parametrize(("name", "value"), [("read_timeout", math.nan), ("read_retries", -1), ("cache_bytes", 0.5)])
def test_options_of_reading_check_themselves(name: str, value: Any) -> None:
    with pytest.raises(jp.UserError, match=f"^{name} must be a "):
        ReadOptions(**{name: value})

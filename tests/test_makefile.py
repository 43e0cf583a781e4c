"""The Makefile: the sample dataset is for those who name nothing, and a typo never trains on it."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.helpers.settings import REPOSITORY


def make(*arguments: str, environment: Mapping[str, str] | None = None, holds: str = "") -> tuple[int, str]:
    """What `make -n` would run in a fresh checkout, and its status; the environment counts as made.

    holds: a file that is there.
    """
    command = ["make", "-n", "-f", str(REPOSITORY / "Makefile"), "--assume-old", ".venv/.ready", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        if holds:
            (Path(folder) / holds).parent.mkdir(parents=True)
            (Path(folder) / holds).touch()
        given = {**os.environ, **(environment or {})}
        done = subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, timeout=30, check=False)
    return done.returncode, done.stdout + done.stderr


def draws_the_sample(printed: str) -> bool:
    return "sample-data" in printed or "--out .sample" in printed


@pytest.mark.parametrize("target", ["shards", "pretrain", "preview", "detect", "compare"])
def test_the_sample_is_drawn_for_those_who_name_nothing(target: str, tmp_path: Path) -> None:
    assert ".sample/annotations.json" in make(target)[1]
    for named in ("RUN=runs/x", "RECIPE=recipes/paper-r50.toml", f"OUT={tmp_path}"):
        status, printed = make(target, named)
        # -n shows the refusal as the command that it would run.
        assert not draws_the_sample(printed) and "exit 2" in printed, named
        assert f"make {target} ANNOTATIONS=FILE IMAGES=DIR {named}" in printed


def test_data_of_ones_own_is_prepped_and_no_run_of_it_is_the_samples() -> None:
    status, printed = make("pretrain", "ANNOTATIONS=a.json", "IMAGES=images")
    assert status == 0 and not draws_the_sample(printed)
    assert '--annotations "a.json"' in printed and '--run "runs/mine"' in printed
    assert '--run "runs/paper-r50"' in make("pretrain", "ANNOTATIONS=a", "IMAGES=i", "RECIPE=recipes/paper-r50.toml")[1]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("IMAGES=images", "ANNOTATIONS"),
        ("ANNOTATIONS=a.json", "IMAGES"),
        ("VAL_ANNOTATIONS=a.json", "VAL_IMAGES"),
        ("VAL_IMAGES=images", "VAL_ANNOTATIONS"),
        ("SPLIT=train", "ANNOTATIONS"),
        ("VAL_SPLIT=val", "ANNOTATIONS"),
        ("ANNOTATION=a.json", "ANNOTATIONS"),
        ("out=crops", "OUT"),
    ],
)
def test_a_half_or_a_misspelt_variable_is_refused(given: str, named: str) -> None:
    status, printed = make("pretrain", given)
    assert status == 2 and given.split("=")[0] in printed and named in printed
    assert not draws_the_sample(printed)


def test_a_misspelt_variable_is_answered_with_the_line_to_type() -> None:
    assert "make pretrain ANNOTATIONS=a.json" in make("pretrain", "ANNOTATION=a.json")[1]
    assert "make shards RECIPE=x.toml" in make("shards", "RECIPIE=x.toml")[1]
    status, printed = make("pretrain", "colour=blue")
    assert status == 2 and "colour" in printed and "ANNOTATIONS" in printed


def test_a_variable_of_the_environment_counts_as_given() -> None:
    for name, value in (("OUT", "/data/crops"), ("RUN", "runs/x")):
        status, printed = make("pretrain", environment={name: value})
        assert not draws_the_sample(printed) and f"ANNOTATIONS=FILE IMAGES=DIR {name}={value}" in printed


def test_own_data_is_trained_on_by_the_recipes_that_prep_fitted_to_it() -> None:
    own = ("ANNOTATIONS=a.json", "IMAGES=i", "OUT=/data/crops")
    assert '--recipe "/data/crops/recipe.toml"' in make("pretrain", *own)[1]
    assert '--recipe "/data/crops/detect.toml"' in make("detect", *own)[1]
    assert '--recipe "s3://bucket/crops/recipe.toml"' in make("pretrain", "OUT=s3://bucket/crops")[1]
    printed = make("pretrain", *own, "RECIPE=recipes/paper-r50.toml")[1]
    # Prep's table is of the recipe that training will use, too.
    assert printed.count('--recipe "recipes/paper-r50.toml"') == 2
    for target, recipe in (("pretrain", "recipes/sample.toml"), ("detect", "recipes/detect-sample.toml")):
        printed = make(target)[1]
        assert f'--recipe "{recipe}"' in printed and "recipe.toml" not in printed


def test_data_of_ones_own_at_the_default_place_is_no_sample() -> None:
    printed = make("pretrain", holds="manifests/dataset.json")[1]
    assert not draws_the_sample(printed) and '--run "runs/mine"' in printed and '--recipe "./recipe.toml"' in printed
    # It was made before there were recipes: finishing it once more writes them.
    assert "prep finish" in printed and "prep finish" not in make("pretrain", "OUT=s3://bucket/crops")[1]


def test_run_and_file_overwrite_nothing_of_each_other() -> None:
    for file in ("runs/x/backbone.pth", "runs/x", "./runs/../runs/x/y.pth"):
        status, printed = make("export", "RUN=runs/x", f"FILE={file}")
        assert status == 2 and f"FILE={file}" in printed and "make export RUN=runs/x FILE=" in printed
    assert make("export", "RUN=runs/x", "FILE=runs/x.pth")[0] == 0
    files = {make("export", f"RUN=runs/{run}")[1].split('--out "')[1] for run in ("x", "y")}
    assert len(files) == 2
    status, printed = make("pretrain", "ANNOTATIONS=a", "IMAGES=i", "RUN=runs/sample")
    assert status == 2 and "make pretrain RUN=" in printed


def test_paths_have_spaces(tmp_path: Path) -> None:
    folder = tmp_path / "my data"
    (folder / "manifests").mkdir(parents=True)
    (folder / "manifests" / "dataset.json").touch()
    (folder / "recipe.toml").touch()
    status, printed = make("pretrain", f"OUT={folder}", f"RUN={folder}/my run")
    assert status == 0 and f'--data "{folder}"' in printed and "prep shards" not in printed, printed
    status, printed = make("export", f"RUN={folder}/my run", f"FILE={folder}/my run/x.pth")
    assert status == 2 and "FILE=" in printed


def test_several_gpus_are_asked_for_by_name() -> None:
    for target in ("pretrain", "detect", "compare"):
        printed = make(target, "GPUS=2")[1]
        assert "device_count" in printed and "--device cuda" in printed
        printed = make(target)[1]
        assert "device_count" not in printed and "--device" not in printed


@pytest.mark.slow(seconds=3)
def test_more_gpus_than_there_are_are_refused() -> None:
    given = [f"VENV={Path(sys.prefix)}", "--assume-old", f"{sys.prefix}/.ready"]
    command = ["make", "--assume-old", ".venv/.ready", "gpus", "GPUS=2", *given]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=REPOSITORY, env=hidden, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "GPUS=2" in done.stderr and "leave GPUS out" in done.stderr


def test_a_run_is_judged_on_images_that_it_has_not_seen() -> None:
    printed = make("evaluate", "RUN=runs/x")[1]
    assert "VAL_ANNOTATIONS=FILE VAL_IMAGES=DIR" in printed and "exit 2" in printed
    printed = make("evaluate", "RUN=runs/x", "VAL_ANNOTATIONS=v.json", "VAL_IMAGES=v")[1]
    assert '--annotations "v.json" --images "v" --out "runs/x-validation"' in printed
    assert '--run "runs/x" --data "runs/x-validation"' in printed
    own = ("ANNOTATIONS=a.json", "IMAGES=i", "VAL_ANNOTATIONS=v.json", "VAL_IMAGES=v")
    for target in ("detect", "compare"):
        assert '--val-annotations "v.json" --val-images "v"' in make(target, *own)[1]


def test_an_export_is_no_file_of_the_run() -> None:
    printed = make("export", "RUN=runs/x")[1]
    assert '--run "runs/x"' in printed and '--out "runs/x-torchvision.pth"' in printed


def test_clean_leaves_data_and_runs_of_ones_own() -> None:
    printed = make("clean")[1]
    removed = next(line for line in printed.splitlines() if line.startswith("rm -rf")).split()[2:]
    assert "runs" not in removed and "runs/mine" not in removed and "runs/sample" in removed
    assert not {"runs/sample-*", "runs/sample-own"} & set(removed) and "runs/sample-detector" in removed
    # What `make export` writes of the sample: the weights, and the README beside them by export's own rule.
    assert {"runs/sample-torchvision.pth", "runs/sample-torchvision.pth.README.md"} <= set(removed)
    # Own data in the sample's place takes it out of what is removed.
    own = make("shards", "ANNOTATIONS=a.json", "IMAGES=images")[1]
    assert "rm -f .sample/prepped" in own and "find shards" not in printed


def test_make_names_its_own_targets_next_with_what_was_given() -> None:
    printed = make("pretrain", "ANNOTATIONS=a.json", "IMAGES=my images")[1]
    assert r"evaluate IMAGES=my\ images ANNOTATIONS=a.json VAL_ANNOTATIONS=FILE VAL_IMAGES=DIR" in printed
    assert "VAL_" not in make("pretrain")[1].rpartition("whichever")[2]
    assert "VAL_ANNOTATIONS=v" in make("detect", "ANNOTATIONS=a", "IMAGES=b", "VAL_ANNOTATIONS=v", "VAL_IMAGES=w")[1]
    # What preps on the way to training names what follows training alone.
    assert make("pretrain")[1].count("whichever") == 1


def test_stated_splits_are_cut_judged_on_and_fine_tuned_on_apart() -> None:
    given = [f"{name}ANNOTATIONS=data.yaml" for name in ("", "VAL_")] + [f"{name}IMAGES=." for name in ("", "VAL_")]
    splits = ["SPLIT=train", "VAL_SPLIT=val"]
    assert '--split "train" --out' in make("shards", *given, *splits)[1]
    assert '--split "val" --out' in make("evaluate", *given, *splits)[1]
    assert '--split "train" --val-annotations' in make("detect", *given, *splits)[1]
    assert '--val-split "val"' in make("detect", *given, *splits)[1]
    assert "split" not in make("detect", *given)[1].replace("template_split", "")
    # Both splits are of one folder where no other is named, and the screen says so.
    one = ["ANNOTATIONS=data.yaml", "IMAGES=.", "SPLIT=train"]
    detect = make("detect", *one, "VAL_SPLIT=val")[1]
    assert '--val-annotations "data.yaml" --val-images "." --val-split "val"' in detect
    assert "detect SPLIT=train IMAGES=. ANNOTATIONS=data.yaml VAL_SPLIT=NAME" in make("pretrain", *one)[1]
    refused = make("evaluate", *one)[1]
    assert "make evaluate VAL_SPLIT=NAME ANNOTATIONS=data.yaml IMAGES=. SPLIT=train" in refused
    assert "FILE" not in refused
    # Without the split to train on the other's images would be trained on as well.
    status, printed = make("pretrain", *one[:2], "VAL_SPLIT=val")
    assert status == 2 and "VAL_SPLIT=val is given without SPLIT" in printed and "SPLIT=NAME" in printed
    assert make("pretrain", *one[:2], "VAL_SPLIT=val", "VAL_ANNOTATIONS=other.yaml", "VAL_IMAGES=o")[0] == 0
    # Of a prepped dataset alone the annotations are not known.
    assert "detect OUT=crops ANNOTATIONS=FILE" in make("export", "OUT=crops")[1]

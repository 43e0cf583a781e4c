"""The Makefile: the sample dataset is for those who name nothing, and a typo never trains on it."""

import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.helpers.settings import REPOSITORY


def make(*arguments: str) -> tuple[int, str]:
    """What `make -n` would run in a fresh checkout, and its status; the environment counts as made."""
    command = ["make", "-n", "-f", str(REPOSITORY / "Makefile"), "--assume-old", ".venv/.ready", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=30, check=False)
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
        ("ANNOTATION=a.json", "ANNOTATIONS"),
        ("out=crops", "OUT"),
    ],
)
def test_a_half_or_a_misspelt_variable_is_refused(given: str, named: str) -> None:
    status, printed = make("pretrain", given)
    assert status == 2 and given.split("=")[0] in printed and named in printed
    assert not draws_the_sample(printed)


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

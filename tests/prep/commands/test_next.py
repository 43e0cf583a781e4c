"""What the commands of prep say can be typed next."""

import shlex
from pathlib import Path

import pytest
from PIL import Image

from jigsaw_pretrain.prep.cli import main
from jigsaw_pretrain.prep.commands.options import tell_next_of
from tests.helpers.commands import run_command
from tests.helpers.prepped import Drawn, Small, ramp


def lines(told: str) -> list[list[str]]:
    """The commands of a text, their programs' folders left out."""
    found = [shlex.split(line) for line in told.splitlines() if line.startswith("  ") and "# " not in line]
    return [[Path(words[0]).name, *words[1:]] for words in found]


def test_doctor_names_the_plan_with_what_it_was_given(drawn: Drawn) -> None:
    drawn.add("a b.jpg", (200, 100), [(10, 10, 80, 60)])
    source = ["--annotations", str(drawn.write()), "--images", str(drawn.folder / "images"), "--exif", "ignore"]
    result = run_command(main, "doctor", *source, "--deep")
    (words,) = lines(result.stderr)
    assert words == ["jigsaw-prep", "shards", *source, "--out", "crops", "--dry-run"]
    assert run_command(main, *words[1:]).exit_code == 0
    # Nothing follows of what cannot be prepped, and nothing is told beside JSON.
    assert not lines(run_command(main, "doctor", *source[:3], str(drawn.folder)).stderr)
    assert not run_command(main, "doctor", *source, "--json").stderr


def test_of_stated_splits_the_training_images_alone_are_cut_next(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
        (tmp_path / "labels" / split).mkdir(parents=True)
        Image.fromarray(ramp(200, 100)).save(tmp_path / "images" / split / f"{split}.jpg")
        (tmp_path / "labels" / split / f"{split}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    data = tmp_path / "data.yaml"
    data.write_text("path: .\ntrain: images/train\nval: images/val\nnames: [a]\n")
    source = ["--annotations", str(data), "--images", str(tmp_path), "--out", str(tmp_path / "crops")]
    result = run_command(main, "shards", *source, "--dry-run")
    assert lines(result.stderr) == [["jigsaw-prep", "shards", *source, "--split", "train"]]
    assert "--split val is for validation" in result.stderr
    assert "train (1)" in result.stderr


def test_a_split_is_to_read_as_the_plan_did(drawn: Drawn) -> None:
    drawn.add("a.jpg", (200, 100), [(10, 10, 80, 60)])
    source = ["--annotations", str(drawn.write()), "--images", str(drawn.folder / "images")]
    reading = ["--exif", "apply"]
    told = lines(run_command(main, "shards", *source, "--out", "crops", *reading, "--dry-run").stderr)
    assert told[0] == ["jigsaw-prep", "split", *source, "--out", "split", *reading]


def test_a_finished_dataset_is_looked_at_and_trained_on(small: Small) -> None:
    out = str(small.annotations.parent / "out")
    told = lines(run_command(main, "finish", "--out", out).stderr)
    assert [words[:2] for words in told] == [
        ["jigsaw-prep", "report"],
        ["jigsaw-train", "preview"],
        ["jigsaw-train", "estimate"],
        ["jigsaw-train", "pretrain"],
    ]
    assert all(out in words for words in told) and all(f"{out}/recipe.toml" in words for words in told[1:])


def test_crops_that_a_run_has_not_seen_are_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tell_next_of("runs/x-validation")
    assert "pretrain" in capsys.readouterr().err
    Path("runs/x").mkdir(parents=True)
    tell_next_of("runs/x-validation/")
    assert lines(capsys.readouterr().err) == [
        ["jigsaw-train", "evaluate", "--run", "runs/x", "--data", "runs/x-validation"]
    ]


def test_annotations_and_images_the_wrong_way_round_are_told(drawn: Drawn) -> None:
    drawn.add("a.jpg", (20, 20), [(1, 1, 9, 9)])
    given = ["--annotations", str(drawn.folder / "images"), "--images", str(drawn.write()), "--out", str(drawn.folder)]
    refused = run_command(main, "shards", *given)
    assert refused.exit_code == 2 and "exchanged" in refused.stderr


def test_a_command_says_what_it_reads_before_it_reads(drawn: Drawn) -> None:
    for name, more in (("doctor", []), ("shards", ["--out", str(drawn.folder / "out")])):
        given = ["--annotations", str(drawn.folder / "nothing.json"), "--images", str(drawn.folder / "images")]
        assert "nothing.json: reading" in run_command(main, name, *given, *more).stderr.splitlines()[0]

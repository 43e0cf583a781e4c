"""MOT's sequences: boxes from 1, classes, the consider flag, and lines of other forms."""

from pathlib import Path

import pytest
from PIL import Image

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.read import Ignored, Reading, listed, read_annotations
from jigsaw_pretrain.formats.annotations.table import Annotations
from jigsaw_pretrain.formats.images.source import ImageSource
from jigsaw_pretrain.prep.plan.plan import PlanOptions, make_plan

INFO = "[Sequence]\nname=A\nimDir=img1\nseqLength=3\nimWidth=100\nimHeight=50\nimExt=.jpg\n"
TRUTH = "1,1,11,6,20,30,1,1,1\r\n1,2,51,6,20,30,0,3,0.5\n2,1,12,6,20,30,1,1,1\n\n2,3,61,1,20,30,0,8,1\n"


def sequence(folder: Path, name: str, truth: str, info: str = INFO) -> None:
    (folder / name / "gt").mkdir(parents=True)
    (folder / name / "img1").mkdir()
    (folder / name / "det").mkdir()
    (folder / name / "gt" / "gt.txt").write_text(truth)
    (folder / name / "det" / "det.txt").write_text("1,-1,1,1,9,9,0.7\n")
    if info:
        (folder / name / "seqinfo.ini").write_text(info)
    for frame in (1, 2, 3):
        Image.new("RGB", (100, 50)).save(folder / name / "img1" / f"{frame:06d}.jpg")


def read(folder: Path, ignored: Ignored = "skip") -> Annotations:
    return listed(read_annotations(str(folder), str(folder)), ImageSource(str(folder)), Reading(ignored=ignored))


@pytest.mark.parametrize("info", [INFO, ""])
def test_flagged_boxes_are_objects_and_the_rest_is_ignored(tmp_path: Path, info: str) -> None:
    sequence(tmp_path, "A", TRUTH, info)
    sequence(tmp_path, "B", "3,1,1,1,10,10,1,-1,-1,-1\n", info)
    found = read(tmp_path)
    frames = 3 if info else 2
    assert found.files[:2] == ("A/img1/000001.jpg", "A/img1/000002.jpg") and len(found.files) == frames + (
        3 if info else 1
    )
    assert found.classes == ("pedestrian",) and found.ignored.tolist() == [False, True, False, True, False]
    assert found.xywh[[0, 4]].tolist() == [[10, 5, 20, 30], [0, 0, 10, 10]]
    assert found.files[found.image[4]] == "B/img1/000003.jpg"
    plan = make_plan(found, PlanOptions(negatives_per_positive=0), 0)
    assert plan.positives == 3 and len(plan.skipped) == 2
    used = read(tmp_path, "use")
    assert used.classes == ("pedestrian", "car", "distractor") and used.label.tolist() == [0, 1, 0, 2, 0]
    assert make_plan(used, PlanOptions(negatives_per_positive=0), 0).positives == 5
    assert {thing for note in found.notes for thing in note.things} == {"A/det/det.txt", "B/det/det.txt"}


def test_sequences_that_are_one_are_told(tmp_path: Path) -> None:
    for name in ("A-DPM", "A-FRCNN", "B"):
        sequence(tmp_path, name, TRUTH if name != "B" else "1,1,1,1,10,10,1,1,1\n")
    told = {note.check: note.things for note in read(tmp_path).notes}
    assert told["repeated sequences"] == ("A-FRCNN/gt/gt.txt",)


def test_one_sequence_may_be_named(tmp_path: Path) -> None:
    sequence(tmp_path, "A", TRUTH)
    assert read(tmp_path / "A").files[0] == "img1/000001.jpg"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("1,1,11,6,20,30,0.87,1,1", "score"),
        ("1 1 11 6 20 30 1 1 1", "commas"),
        ("1,1,1_1,6,20,30,1,1,1", "numbers"),
        ("1,1,11,6", "flag"),
        ("0,1,11,6,20,30,1,1,1", "frame"),
        ("nan,1,11,6,20,30,1,1,1", "frame"),
        ("inf,1,11,6,20,30,1,1,1", "frame"),
        ("1,1,11,6,20,30,1,44,1", "44"),
    ],
)
def test_other_lines_are_refused_with_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    sequence(tmp_path, "A", f"{TRUTH}{line}\n")
    with pytest.raises(UserError, match=said) as caught:
        read(tmp_path)
    assert "A/gt/gt.txt, line 6" in caught.value.message and "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("seqLength=30000000", "30,000,000"),
        (f"seqLength={'9' * 5000}", "seqLength"),
        ("seqLength=three", "three"),
        ("imWidth=1e400", "1e400"),
    ],
)
def test_a_seqinfo_that_cannot_be_is_refused(tmp_path: Path, entry: str, said: str) -> None:
    sequence(tmp_path, "A", TRUTH, f"[Sequence]\n{entry}\n")
    with pytest.raises(UserError, match=said) as caught:
        read(tmp_path)
    assert "A/seqinfo.ini" in caught.value.message and "\n" not in caught.value.message


def test_a_sequence_may_be_called_anything(tmp_path: Path) -> None:
    sequence(tmp_path, "seq{1}", TRUTH)
    assert read(tmp_path).files[0] == "seq{1}/img1/000001.jpg"

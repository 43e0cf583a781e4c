"""Mistakes of whole datasets are told with their cause, and lost boxes have a limit."""

import json
import unicodedata
from urllib.parse import quote

import pytest

from jigsaw_pretrain.prep.commands.doctor import doctor
from jigsaw_pretrain.prep.commands.finish import finish_command
from jigsaw_pretrain.prep.plan.plan import PLAN_VERSION
from tests.helpers.commands import told
from tests.helpers.prepped import Drawn, inputs, invoke, rows, run_shards

SIZE = (120, 90)


def examined(drawn: Drawn) -> dict[str, str]:
    result = invoke(doctor, *inputs(drawn.write(), drawn.folder / "images"), "--json")
    return {finding["check"]: finding["text"] for finding in json.loads(result.output)["findings"]}


@pytest.mark.parametrize(("form", "check"), [("shares", "unit square"), ("corners", "leave"), ("pixels", "")])
def test_boxes_in_shares_or_as_corners_are_told_with_the_cause(drawn: Drawn, form: str, check: str) -> None:
    for number in range(6):
        x, y, w, h = 8 * number, 5 * number, 60, 40
        corners = [x, y, x + w, y + h]
        forms: dict[str, list[float]] = {"pixels": [x, y, w, h], "corners": list(corners)}
        forms["shares"] = [x / 120, y / 90, w / 120, h / 90]
        drawn.add(f"{number}.jpg", SIZE, [forms[form]])
    found = {name: text for name, text in examined(drawn).items() if name.startswith("boxes")}
    assert len(found) == bool(check) and all(check in name for name in found)
    assert all({"shares": "normalised", "corners": "corners"}[form] in text for text in found.values())


def test_repeats_are_dropped_counted_and_told(drawn: Drawn) -> None:
    image = drawn.add("a.jpg", SIZE, [(10, 10, 30, 30)] * 3 + [(50, 10, 30, 30)])
    drawn.box(image, (10, 10, 30, 30), category=7)
    assert "boxes given more than once" in examined(drawn)
    result = run_shards(drawn.write(), drawn.folder / "images", drawn.folder / "out", "--workers", "1")
    assert result.exit_code == 0
    assert len([row for row in rows(drawn.folder / "out", "crops") if row["box_x"] is not None]) == 3
    assert [row["ordinal"] for row in rows(drawn.folder / "out", "skipped")] == [1, 2]


def test_lost_boxes_have_a_limit_and_ignored_ones_are_not_lost(drawn: Drawn) -> None:
    image = drawn.add(
        "a.jpg", SIZE, [(10, 10, 30, 30)] + [(500, 500, 9, 9)] * 3 + [(500 + n, 5, 9, 9) for n in range(4)]
    )
    run = (drawn.folder / "images", drawn.folder / "out", "--workers", "1")
    result = run_shards(drawn.write(), *run)
    assert result.exit_code == 2 and "7 of 8 boxes" in result.output
    assert run_shards(drawn.write(), *run, "--max-skipped", "90%").exit_code == 0
    drawn.annotations = drawn.annotations[:1]
    drawn.box(image, (60, 10, 30, 30), ignore=1)
    drawn.box(image, (60, 50, 30, 30), iscrowd=1)
    assert run_shards(drawn.write(), *run, "--overwrite").exit_code == 0
    used = run_shards(drawn.write(), *run, "--overwrite", "--ignored", "use", "--negatives-per-positive", "0")
    assert used.exit_code == 0 and len(rows(drawn.folder / "out", "crops")) == 2


def test_boxes_lost_with_images_that_cannot_be_cut_count_too(drawn: Drawn) -> None:
    for number in range(9):
        drawn.add(f"{number}.jpg", SIZE, [(10, 10, 30, 30)])
    drawn.add("full.jpg", SIZE, [(5 * n, 10, 30, 30) for n in range(15)])
    (drawn.folder / "images" / "full.jpg").write_bytes(b"\xff\xd8")
    images, out = drawn.folder / "images", drawn.folder / "out"
    # One of ten images may be lost, and with it most of the boxes are.
    result = run_shards(drawn.write(), images, out, "--workers", "1", "--max-skipped", "20%")
    assert result.exit_code == 2 and "15 of 24 boxes" in result.output
    result = invoke(finish_command, "--out", str(out), "--max-skipped", "20%")
    assert result.exit_code == 2 and "15 of 24 boxes" in result.output
    assert not (out / "manifests" / "dataset.json").exists()
    assert run_shards(drawn.write(), images, out, "--workers", "1", "--max-skipped", "70%").exit_code == 0


def test_boxes_of_images_that_cannot_be_used_are_listed_and_count(drawn: Drawn) -> None:
    drawn.add("a.jpg", SIZE, [(10, 10, 30, 30)])
    drawn.add("b.jpg", SIZE, [(10, 10, 30, 30), (20, 10, 30, 30)])
    drawn.images[1]["file_name"] = "../b.jpg"
    images, out = drawn.folder / "images", drawn.folder / "out"
    assert "2 of 3 boxes" in run_shards(drawn.write(), images, out, "--workers", "1", "--max-skipped", "60%").output
    assert run_shards(drawn.write(), images, out, "--workers", "1", "--max-skipped", "70%").exit_code == 0
    found = [(row["image_file"], row["annotation_id"], row["ordinal"]) for row in rows(out, "skipped")]
    assert found == [("../b.jpg", None, None), ("../b.jpg", 101, 0), ("../b.jpg", 102, 1)]


def test_a_plan_of_another_version_is_told_as_such(drawn: Drawn) -> None:
    drawn.add("a.jpg", SIZE, [(10, 10, 30, 30)])
    images, out = drawn.folder / "images", drawn.folder / "out"
    assert run_shards(drawn.write(), images, out, "--workers", "1").exit_code == 0
    path = out / "manifests" / "plan.json"
    plan = json.loads(path.read_text())
    assert plan.pop("plan_version") == PLAN_VERSION and plan.pop("positives") == 1
    path.write_text(json.dumps(plan))
    result = run_shards(drawn.write(), images, out, "--workers", "1")
    assert result.exit_code == 2 and "plan version 1" in result.output and str(path) in result.output
    assert len(told(result.output)) == 1
    # The manifests of an older plan can be made again, without a count of its boxes.
    (out / "manifests" / "dataset.json").unlink()
    assert invoke(finish_command, "--out", str(out), "--max-skipped", "0").exit_code == 0
    assert run_shards(drawn.write(), images, out, "--workers", "1", "--overwrite").exit_code == 0


def test_everything_that_is_told_can_be_listed(drawn: Drawn) -> None:
    drawn.add("a.jpg", SIZE, [(10, 10, 30, 30), *((200 + n, 10, 30, 30) for n in range(5))])
    named = ("--json", *inputs(drawn.write(), drawn.folder / "images"))
    for more, count in (((), 3), (("--all",), 5)):
        found = {one["check"]: one for one in json.loads(invoke(doctor, *named, *more).output)["findings"]}
        for check in ("box lies outside the image", "boxes that leave their image by more than rounding"):
            assert found[check]["count"] == 5 and len(set(found[check]["examples"])) == count
    result = run_shards(*named[2::2], drawn.folder / "out", "--dry-run", "--max-skipped", "1")
    assert "doctor --all" in result.output


def test_pictures_that_no_annotation_lists_are_told(drawn: Drawn) -> None:
    drawn.add("a.jpg", SIZE, [(10, 10, 30, 30)])
    Drawn(drawn.folder).add("more/b.JPG", SIZE)
    (drawn.folder / "images" / "._a.jpg").write_bytes(b"")
    (drawn.folder / "images" / "out").symlink_to(drawn.folder)
    result = invoke(doctor, *inputs(drawn.write(), drawn.folder / "images"), "--json")
    found = {one["check"]: one["examples"] for one in json.loads(result.output)["findings"]}
    assert found["images without annotations"] == ["more/b.JPG"] and found["hidden files"] == ["._a.jpg"]
    assert found["links not followed"] == ["out"]


def test_an_object_without_a_box_has_that_of_its_polygon_or_keeps_background_off(drawn: Drawn) -> None:
    image = drawn.add("a.jpg", SIZE, [(0, 0, 20, 20)])
    drawn.box(image, [], segmentation=[[30, 10, 90, 12, 60, 70]])
    drawn.box(image, None, segmentation={"size": [90, 120], "counts": [95, 10, 80, 10, 10605]})
    run = (drawn.folder / "images", drawn.folder / "out", "--workers", "1", "--context", "1")
    assert run_shards(drawn.write(), *run).exit_code == 0
    boxes = {(row["box_x"], row["box_y"], row["box_width"], row["box_height"]) for row in rows(run[1], "crops")}
    assert {(0, 0, 20, 20), (30, 10, 60, 60), (1, 5, 2, 10)} <= boxes
    drawn.box(image, [])
    more = ("--overwrite", "--negatives-per-positive", "2", "--max-skipped", "1")
    assert run_shards(drawn.write(), *run, *more).exit_code == 0
    assert all(row["box_x"] is not None for row in rows(run[1], "crops"))


def test_image_ids_of_another_type_are_told(drawn: Drawn) -> None:
    drawn.add("a.jpg", SIZE, [(0, 0, 20, 20)])
    drawn.annotations.append({"id": 5, "image_id": "1", "category_id": 3, "bbox": [1, 1, 9, 9]})
    assert "image_id of another type" in examined(drawn)


def form(kind: str) -> tuple[str, str]:
    """A name as it lies on the disk and as the annotations give it."""
    umlaut = "\u00fcber {}.jpg"
    return {
        "unicode": (unicodedata.normalize("NFD", umlaut), umlaut),
        "percent": ("cam 1 {}.jpg", quote("cam 1 ") + "{}.jpg"),
        "capitals": ("IMG_{}.JPG", "IMG_{}.jpg"),
        "folder": ("{}.jpg", "images/1/{}.jpg"),
        "deeper": ("patch0/{}.jpg", "{}.jpg"),
        "gone": ("x{}.jpg", "{}.jpg"),
    }[kind]


@pytest.mark.parametrize("kind", ["unicode", "percent", "capitals", "folder", "deeper", "gone"])
def test_names_that_nearly_match_are_told_before_anything_is_cut(drawn: Drawn, kind: str) -> None:
    disk, named = form(kind)
    for number in range(3):
        drawn.add(named.format(number), SIZE, [(10, 10, 40, 40)], draw=False)
        path = drawn.folder / "images" / disk.format(number)
        other = Drawn(drawn.folder)
        other.add(str(path.relative_to(drawn.folder / "images")), SIZE)
    for more in (("--dry-run",), ()):
        result = run_shards(drawn.write(), drawn.folder / "images", drawn.folder / "o", *more)
        assert result.exit_code == 2 and not (drawn.folder / "o").exists()
        assert "0.jpg" in result.output or "1.jpg" in result.output or "2.jpg" in result.output
        said = {"deeper": f"{drawn.folder}/images/patch0 as --images", "gone": "no file of nearly that name"}
        assert said.get(kind, "but ") in result.output


def test_the_names_of_objects365_are_read_as_it_unpacks(drawn: Drawn) -> None:
    drawn.add("patch0/objects365_v1_1.jpg", SIZE, [(10, 10, 40, 40)])
    drawn.images[0]["file_name"] = "images/v1/patch0/objects365_v1_1.jpg"
    result = run_shards(drawn.write(), drawn.folder / "images", drawn.folder / "out", "--workers", "1")
    assert result.exit_code == 0 and {row["image_file"] for row in rows(drawn.folder / "out", "crops")} == {
        "patch0/objects365_v1_1.jpg"
    }

"""Pascal VOC files: names of classes and images, and damaged boxes."""

import pytest

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.voc import read_voc


def test_voc_names_and_damaged_boxes() -> None:
    text = (
        b"<annotation><filename>c/d.jpg</filename><object><name>x</name></object><object><name>y</name><bndbox>"
        b"<xmin>a</xmin></bndbox></object></annotation>"
    )
    read = read_voc({"a/b.xml": text, "classes.txt": b"y\n"}, "f")
    classes, entries, boxes = read.classes, read.entries, read.boxes
    assert classes == ["y"] and entries[0].file_name == "c/d.jpg" and entries[0].width is None
    assert boxes.label.tolist() == [-1, 0] and str(boxes.xywh[0, 0]) == "nan"


def xml(name: str, *boxes: tuple[float, float, float, float], more: str = "", tag: str = "") -> bytes:
    objects = "".join(
        f"<object><name>x</name>{tag}<bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox>"
        "</object>"
        for a, b, c, d in boxes
    )
    return f"<annotation><filename>{name}</filename>{more}{objects}</annotation>".encode()


def test_the_picture_of_the_files_own_name_beats_a_stale_filename() -> None:
    files = {"a.xml": xml("a.jpg"), "a_flip.xml": xml("a.jpg"), "sub/b.XML": xml("old.jpg"), "c.xml": xml("d.png")}
    images = ["a.jpg", "a_flip.jpg", "sub/b.jpg", "sub/._b.png", "old.jpg", "d.png"]
    read = read_voc(files, "f", lambda: images)
    assert [one.file_name for one in read.entries] == ["a.jpg", "a_flip.jpg", "d.png", "sub/b.jpg"]
    (note,) = read.notes
    assert len(note.things) == 2 and "a_flip.xml" in note.things[0]


def test_a_filename_that_is_there_beats_a_picture_of_the_files_own_name_in_another_folder() -> None:
    read = read_voc({"s/a.xml": xml("s/other.jpg")}, "f", lambda: ["s/other.jpg", "a.jpg"])
    assert [one.file_name for one in read.entries] == ["s/other.jpg"]


@pytest.mark.parametrize(("named", "there"), [("", ["a.png"]), ("a", ["a.png"]), ("a.jpg", ["a.png", "a.npy"])])
def test_a_filename_without_its_suffix_or_with_another_is_completed(named: str, there: list[str]) -> None:
    assert read_voc({"a.xml": xml(named)}, "f", lambda: there).entries[0].file_name == "a.png"


def test_two_files_of_one_picture_and_two_pictures_of_one_file_are_named() -> None:
    for images in ([], ["a.jpg"]):
        with pytest.raises(UserError) as caught:
            read_voc({"a.xml": xml("a.jpg"), "b.xml": xml("a.jpg")}, "f", lambda images=images: images)  # type: ignore[misc]
        assert "f/a.xml" in caught.value.message and "f/b.xml" in caught.value.message
    with pytest.raises(UserError) as caught:
        read_voc({"a.xml": xml("other.jpg")}, "f", lambda: ["a.jpg", "a.png"])
    assert "a.jpg" in caught.value.message and "a.png" in caught.value.message
    assert read_voc({"a.xml": xml("a.png")}, "f", lambda: ["a.jpg", "a.png"]).entries[0].file_name == "a.png"


PATH = "<path>/home/me/a.jpg</path>"
VOC = "<source><database>The VOC2007 Database</database></source>"


@pytest.mark.parametrize(
    ("boxes", "more", "said", "left"),
    [
        ([(5, 6, 20, 30)], "", None, 4),
        ([(5, 6, 20, 30), (3, 0, 9, 9)], "", None, 5),
        ([(5, 6.5, 20, 30)], "", None, 5),
        ([(5, 6, 20, 30)], PATH, None, 5),
        ([(5, 6, 20, 30)], PATH + VOC, None, 4),
        ([(5, 6.5, 20, 30)], VOC, None, 4),
        ([(5, 6, 20, 30)], PATH, 1, 4),
        ([(5, 6, 20, 30)], VOC, 0, 5),
    ],
)
def test_where_pixels_begin_is_decided_by_all_files_or_said(
    boxes: list[tuple[float, float, float, float]], more: str, said: int | None, left: int
) -> None:
    read = read_voc({"a.xml": xml("a.jpg", *boxes, more=more)}, "f", None, said)
    assert read.boxes.xywh[0, [0, 2]].tolist() == [left, 20 - left]
    assert bool(read.notes) == (said is None)


def test_difficult_objects_are_ignored_and_truncated_ones_are_not() -> None:
    box = (5, 6, 20, 30)
    for tag, ignored in (("<difficult>1</difficult>", True), ("<difficult>0</difficult>", False)):
        read = read_voc({"a.xml": xml("a.jpg", box, tag=tag + "<truncated>1</truncated>")}, "f")
        assert read.boxes.ignored.tolist() == [ignored]


@pytest.mark.parametrize(("mark", "ignored"), [("1.0", True), ("True", True), ("0.0", False), ("Unspecified", False)])
def test_a_mark_of_difficulty_is_read_in_any_writing(mark: str, ignored: bool) -> None:
    read = read_voc({"a.xml": xml("a.jpg", (5, 6, 20, 30), tag=f"<difficult> {mark}</difficult>")}, "f")
    assert read.boxes.ignored.tolist() == [ignored]


@pytest.mark.parametrize("mark", ["2", "Y", "-1", "easy"])
def test_a_mark_of_difficulty_that_means_nothing_is_refused(mark: str) -> None:
    with pytest.raises(UserError, match=f"f/a.xml: <difficult> is '{mark}'"):
        read_voc({"a.xml": xml("a.jpg", (5, 6, 20, 30), tag=f"<difficult>{mark}</difficult>")}, "f")


def test_tags_in_capitals_are_read_and_told() -> None:
    box = (5, 6, 20, 30)
    small, capitals = xml("a.jpg", box), xml("b.jpg", box).replace(b"object", b"Object").replace(b"xmin", b"XMin")
    read = read_voc({"a.xml": small, "b.xml": capitals}, "f")
    assert read.boxes.entry.tolist() == [0, 1] and read.boxes.xywh[0].tolist() == read.boxes.xywh[1].tolist()
    assert [note.things for note in read.notes if note.check == "VOC tags"] == [("b.xml",)]


@pytest.mark.parametrize("number", ["0_5", "1_0", "\uff11"])
def test_what_only_python_calls_a_number_is_none(number: str) -> None:
    raw = xml("a.jpg", (5, 6, 20, 30)).replace(b">5<", f">{number}<".encode())
    assert str(read_voc({"a.xml": raw}, "f").boxes.xywh[0, 0]) == "nan"

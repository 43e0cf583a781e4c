"""Pascal VOC files: names of classes and images, and damaged boxes."""

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

"""Writes a drawn COCO dataset as Pascal VOC and as YOLO."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.helpers.prepped import Drawn


def boxes_of(drawn: Drawn) -> dict[str, list[dict[str, Any]]]:
    """The annotations by file name."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for annotation in drawn.annotations:
        found[drawn.images[annotation["image_id"] - 1]["file_name"]].append(annotation)
    return found


def write_voc(drawn: Drawn, folder: Path, origin: int) -> None:
    """XML files beside each other as the images are; origin: from which number pixels are counted."""
    for image in drawn.images:
        objects = "".join(
            f"<object><name>{drawn.categories[a['category_id'] - 1]['name']}</name><bndbox>"
            f"<xmin>{a['bbox'][0] + origin}</xmin><ymin>{a['bbox'][1] + origin}</ymin>"
            f"<xmax>{a['bbox'][0] + a['bbox'][2]}</xmax><ymax>{a['bbox'][1] + a['bbox'][3]}</ymax></bndbox>"
            "<part><name>leg</name><bndbox><xmin>0</xmin><ymin>0</ymin><xmax>1</xmax><ymax>1</ymax></bndbox></part>"
            "</object>"
            for a in boxes_of(drawn)[image["file_name"]]
        )
        path = (folder / image["file_name"]).with_suffix(".xml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f"<annotation><folder>x</folder><filename>{Path(image['file_name']).name}</filename>"
            f"<size><width>{image['width']}</width><height>{image['height']}</height><depth>3</depth></size>{objects}"
            "</annotation>"
        )


def write_yolo(drawn: Drawn, folder: Path, empty: bool) -> None:
    """labels/ and data.yaml; empty: whether images without boxes get a file."""
    for image in drawn.images:
        lines = []
        for a in boxes_of(drawn)[image["file_name"]]:
            x, y, w, h = a["bbox"]
            values = (
                (x + w / 2) / image["width"],
                (y + h / 2) / image["height"],
                w / image["width"],
                h / image["height"],
            )
            lines.append(" ".join([str(a["category_id"] - 1), *(f"{value:.10f}" for value in values)]))
        path = (folder / "labels" / image["file_name"]).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        if lines or empty:
            path.write_text("\n".join(lines) + "\n")
    (folder / "data.yaml").write_text("path: ../x\ntrain: images\nnc: 2\nnames: [ant, bee]\n")

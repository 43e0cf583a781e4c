"""Writes datasets as COCO, VOC and YOLO: drawn ones plainly, one truth with the oddities of people's files."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from jigsaw_pretrain.formats.annotations.skipped import OF_UNUSABLE_IMAGE, UNKNOWN_IMAGE, UNSAFE_NAME, BoxReason
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


Box = tuple[int, int, int, int]
"""Left, top, width, height in whole pixels."""


@dataclass(frozen=True)
class Picture:
    """An image below a folder, its size, its objects (class name and box), and places that hold no object.

    The first folder of its stem is its split, ``train`` or ``val``.
    """

    stem: str
    suffix: str
    size: tuple[int, int]
    things: tuple[tuple[str, Box], ...]
    spare: tuple[Box, ...]

    @property
    def held_out(self) -> bool:
        """Whether it is of the split ``val``."""
        return self.stem.startswith("val/")

    @property
    def file(self) -> str:
        """Its path."""
        return self.stem + self.suffix


@dataclass
class Written:
    """What a writer wrote: where, how it is to be read, what of it is no object and why, and files to be told.

    lost: by image file and reason. taken: the places of ``lost`` that are known, by image file; no background is there.
    """

    annotations: Path
    reading: dict[str, Any] = field(default_factory=dict)
    lost: Counter[tuple[str | None, str]] = field(default_factory=Counter)
    taken: list[tuple[str, Box]] = field(default_factory=list)
    told: set[str] = field(default_factory=set)

    def lose(self, picture: Picture, reason: BoxReason, box: Box | None = None) -> None:
        """Note a box that is no object."""
        self.lost[picture.file, reason.text] += 1
        if box is not None:
            self.taken.append((picture.file, box))


def put(path: Path, data: str | bytes, odd: Set[str] = frozenset()) -> None:
    """Write a file; of ``odd``, ``bom`` and ``crlf`` are the editor's."""
    raw = data.encode() if isinstance(data, str) else data
    raw = raw.replace(b"\n", b"\r\n") if "crlf" in odd else raw
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\xef\xbb\xbf" + raw if "bom" in odd else raw)


COCO_ODD = (
    "bom", "crlf", "text ids", "sparse categories", "backslashes", "no sizes", "no iscrowd", "polygons", "zeros", "rle",
    "listed again", "repeat", "unknown image", "unknown category", "flat", "outside", "crowd", "ignore", "extra",
    "mot_conf", "no category", "not a number", "three numbers", "shuffled", "unsafe name",
)  # fmt: skip


def odd_coco(pictures: Sequence[Picture], names: Sequence[str], folder: Path, odd: Set[str]) -> Written:
    """A COCO file with oddities."""
    made = Written(folder / "coco.json")
    numbers = [90 - 7 * nth for nth in range(len(names))] if "sparse categories" in odd else range(1, len(names) + 1)
    category = dict(zip(names, numbers, strict=True))
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []

    def add(image: Any, name: str, box: Any, **extra: Any) -> None:
        row = {"id": len(boxes), "image_id": image, "category_id": category[name], "bbox": box, "iscrowd": 0, **extra}
        if "no iscrowd" in odd and not row["iscrowd"]:
            del row["iscrowd"]
        boxes.append(row)

    def key(nth: int) -> Any:
        return f"image {nth}" if "text ids" in odd else nth

    for nth, picture in enumerate(pictures):
        written = picture.file.replace("/", "\\") if "backslashes" in odd else picture.file
        size = {} if "no sizes" in odd else {"width": picture.size[0], "height": picture.size[1]}
        images.append({"id": key(nth), "file_name": written, **size})
        if "listed again" in odd:
            images.append({"id": key(nth + 100), "file_name": f"./{picture.file}", **size})
        for count, (name, box) in enumerate(picture.things):
            x, y, w, h = box
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            own = key(nth + 100) if "listed again" in odd and count % 2 else key(nth)
            if "rle" in odd and count % 3 == 0:
                add(own, name, [], segmentation={"size": picture.size[::-1], "counts": runs(box, *picture.size)})
            elif "polygons" in odd and count % 3 < 2:
                add(own, name, None, segmentation=[corners[:4] + corners[2:4], corners[4:] + corners[6:]])
            elif "zeros" in odd:
                add(own, name, [0, 0, 0, 0], segmentation=[corners])
            else:
                add(own, name, list(box), segmentation=[corners])

    first, name = pictures[0], names[0]
    marks: dict[str, dict[str, Any]] = {
        "crowd": {"iscrowd": 1},
        "ignore": {"ignore": 1},
        "extra": {"extra": {"ignore": 1}},
    }
    marks |= {"mot_conf": {"mot_conf": 0}, "no category": {"category_id": -1}, "unknown category": {"category_id": 55}}
    reasons = {"crowd": BoxReason.CROWD, "no category": BoxReason.CROWD, "unknown category": BoxReason.UNKNOWN_CATEGORY}
    for nth, (oddity, mark) in enumerate(marks.items()):
        if oddity in odd:
            box = first.spare[nth % len(first.spare)]
            add(key(0), name, list(box), **mark)
            made.lose(first, reasons.get(oddity, BoxReason.IGNORED), box)
    if "repeat" in odd:
        add(key(0), first.things[0][0], list(first.things[0][1]))
        made.lose(first, BoxReason.REPEATED)
    forms: dict[str, tuple[list[Any], BoxReason]] = {
        "flat": ([3, 3, 9, 0], BoxReason.DEGENERATE),
        "outside": ([500, 3, 9, 9], BoxReason.OUTSIDE),
        "not a number": ([float("nan"), 1, 2, 3], BoxReason.NOT_FINITE),
        "three numbers": ([1, 2, 3], BoxReason.NOT_FINITE),
    }
    for oddity, (values, reason) in forms.items():
        if oddity in odd:
            add(key(0), name, values)
            made.lose(first, reason)
    if "unknown image" in odd:
        add(key(77), name, [1, 1, 5, 5])
        made.lost[None, UNKNOWN_IMAGE] += 1
    if "unsafe name" in odd:
        images.append({"id": key(88), "file_name": "../x.jpg", "width": 9, "height": 9})
        add(key(88), name, [1, 1, 5, 5])
        made.lost["../x.jpg", UNSAFE_NAME] += 1
        made.lost["../x.jpg", OF_UNUSABLE_IMAGE] += 1
    if "shuffled" in odd:
        images, boxes = images[::-1], boxes[::-1]
    categories = [{"id": category[one], "name": one} for one in names] + [{"id": 200, "name": "unused"}]
    put(made.annotations, json.dumps({"images": images, "annotations": boxes, "categories": categories}), odd)
    return made


def runs(box: Box, width: int, height: int) -> list[int]:
    """A filled box as the run lengths of COCO's RLE, down the columns."""
    x, y, w, h = box
    mask = np.zeros((height, width), dtype=bool)
    mask[y : y + h, x : x + w] = True
    flat = np.r_[False, mask.T.ravel()]
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.r_[0, edges, width * height]).tolist()


VOC_ODD = (
    "bom", "crlf", "from 0", "labelImg", "said", "stale", "no filename", "no suffix", "windows path", "namespace",
    "difficult", "truncated", "parts", "decimals", "blanks", "no sizes", "capitals", "classes", "unnamed", "half a box",
    "repeat", "hidden", "readme", "split", "flat", "outside",
)  # fmt: skip


def odd_voc(pictures: Sequence[Picture], names: Sequence[str], folder: Path, odd: Set[str]) -> Written:
    """A VOC folder with oddities."""
    made = Written(folder)
    origin = 0 if odd & {"from 0", "labelImg"} else 1
    if "said" in odd or (
        odd & {"from 0", "labelImg"} == {"from 0"} and not any(0 in one[:2] for _, one in pictures[0].things)
    ):
        made.reading["voc_origin"] = origin
    space = ' xmlns="http://example.org/voc"' if "namespace" in odd else ""

    def thing(name: str, box: Box, more: str = "", last: bool = True) -> str:
        x, y, w, h = box
        values = [f"{value}.0" if "decimals" in odd else str(value) for value in (x + origin, y + origin, x + w, y + h)]
        sides = zip(("xmin", "ymin", "xmax", "ymax")[: 4 if last else 3], values, strict=False)
        shown = f"\n {escape(name)} " if "blanks" in odd else escape(name)
        part = "<part><name>leg</name><bndbox><xmin>0</xmin><ymin>0</ymin><xmax>1</xmax><ymax>1</ymax></bndbox></part>"
        return (
            f"<object><name>{shown}</name>{more}<bndbox>{''.join(f'<{s}>{v}</{s}>' for s, v in sides)}</bndbox>"
            f"{part * ('parts' in odd)}</object>\n"
        )

    for nth, picture in enumerate(pictures):
        more = "<truncated>1</truncated>" if "truncated" in odd else ""
        objects = "".join(thing(name, box, more) for name, box in picture.things)
        if nth == 0:
            name, spare = picture.things[0][0], picture.spare
            if "difficult" in odd:
                objects += thing(name, spare[0], "<difficult>1</difficult>")
                made.lose(picture, BoxReason.IGNORED, spare[0])
            if "unnamed" in odd:
                objects += thing("", spare[1])
                made.lose(picture, BoxReason.UNKNOWN_CATEGORY, spare[1])
            if "half a box" in odd:
                objects += thing(name, spare[0], last=False)
                made.lose(picture, BoxReason.NOT_FINITE)
            if "repeat" in odd:
                objects += thing(*picture.things[0])
                made.lose(picture, BoxReason.REPEATED)
            if "flat" in odd:
                objects += thing(name, (3, 3, 9, 0))
                made.lose(picture, BoxReason.DEGENERATE)
            if "outside" in odd:
                objects += thing(name, (500, 3, 9, 9))
                made.lose(picture, BoxReason.OUTSIDE)
        called = PurePosixPath(picture.file).name
        if "stale" in odd:
            called = PurePosixPath(pictures[nth - 1].file).name
        elif "no filename" in odd:
            called = ""
        elif "no suffix" in odd:
            called = PurePosixPath(picture.stem).name
        elif "windows path" in odd:
            called = f"C:\\data\\{called}"
        width, height = (0, 0) if "no sizes" in odd else picture.size
        source = "<path>/home/me/x.jpg</path>" if "labelImg" in odd else ""
        if origin == 1:
            source = "<source><database>The VOC2007 Database</database></source>"
        put(
            folder / "Annotations" / f"{picture.stem}{'.XML' if 'capitals' in odd else '.xml'}",
            f"<annotation{space}>\n<filename>{escape(called)}</filename>{source}<size><width>{width}</width>"
            f"<height>{height}</height></size>{objects}</annotation>\n",
            odd,
        )
    if "classes" in odd:
        put(folder / "Annotations" / "classes.txt", "\n\n".join((*names, "unused")), odd)
    if "hidden" in odd:
        put(folder / "Annotations" / "._a.xml", b"\0\1")
        put(folder / "Annotations" / "__MACOSX" / "a.xml", "<annotation/>")
        made.told |= {"._a.xml", "__MACOSX/a.xml"}
    if "readme" in odd:
        put(folder / "Annotations" / "README.md", "hello")
        made.told |= {"README.md"}
    if "split" in odd:
        for split in ("train", "val"):
            ids = [picture.stem for picture in pictures if picture.held_out == (split == "val")]
            put(folder / "ImageSets" / "Main" / f"{split}.txt", "".join(f"{one}\n" for one in ids), odd - {"bom"})
        made.reading["split"] = "train"
    return made


YOLO_ODD = (
    "bom", "crlf", "blank lines", "tabs", "capitals", "numbered names", "classes.txt", "other yaml", "pose", "polygons",
    "short", "not a number", "beyond", "no image", "empty files", "copies", "beside", "hidden", "readme", "split",
    "list", "decimals", "repeat", "flat", "outside",
)  # fmt: skip


def odd_yolo(pictures: Sequence[Picture], names: Sequence[str], folder: Path, odd: Set[str]) -> Written:
    """YOLO's files around ``folder / "images"``, with oddities."""
    listed = "classes.txt" in odd and not odd & {"pose", "polygons", "split"}
    made = Written(folder / "classes.txt" if listed else folder)
    home = folder / ("images" if "beside" in odd else "labels")
    suffix = ".TXT" if "capitals" in odd else ".txt"
    pose = "pose" in odd and "polygons" not in odd

    def line(name: str, box: Box, size: tuple[int, int]) -> str:
        x, y, w, h = (value / side for value, side in zip(box, size * 2, strict=True))
        values = [x + w / 2, y + h / 2, w, h]
        if "polygons" in odd and w and h:
            values = [x, y, x + w, y, x + w, y + h, x, y + h]
        number = names.index(name)
        tail = " 0.5 0.5 2 0 0 0" if pose else ""
        digits = 10 if "decimals" in odd else 6
        text = " ".join([f"{number}.0" if "decimals" in odd else f"{number}", *(f"{v:.{digits}f}" for v in values)])
        return (text.replace(" ", " \t") if "tabs" in odd else text) + tail

    for nth, picture in enumerate(pictures):
        lines = [line(name, box, picture.size) for name, box in picture.things]
        if nth == 0:
            extra = {"short": ("0 0.5 0.5", BoxReason.NOT_FINITE), "repeat": (lines[0], BoxReason.REPEATED)}
            extra["not a number"] = ("0 nan 0.5 0.5 0.5", BoxReason.NOT_FINITE)
            extra["flat"] = (line(names[0], (3, 3, 9, 0), picture.size), BoxReason.DEGENERATE)
            extra["outside"] = (line(names[0], (picture.size[0] + 1, 3, 6, 6), picture.size), BoxReason.OUTSIDE)
            extra["beyond"] = (f"{len(names)}{lines[0][lines[0].index(' ') :]}", BoxReason.UNKNOWN_CATEGORY)
            if "decimals" in odd:
                extra["beyond"] = (f"{len(names)}.0{lines[0][3:]}", BoxReason.UNKNOWN_CATEGORY)
            # Where every line were a class beyond 0, classes would count from 1.
            for oddity, (text, reason) in extra.items():
                if oddity in odd and not (oddity == "beyond" and all(one[:1] != "0" for one in lines)):
                    lines.append(text)
                    made.lose(picture, reason)
        if lines or "empty files" in odd:
            gap = "\n  \n" if "blank lines" in odd else "\n"
            put(home / f"{picture.stem}{suffix}", gap.join(lines) + gap * bool(lines), odd)
        if "copies" in odd:
            put(folder / "images" / f"{picture.stem}.npy", b"\x93NUMPY")
            made.told.add(f"{picture.stem}.npy")
    for holder in {PurePosixPath(picture.stem).parent for picture in pictures}:
        # A folder of images without any label file is not looked at.
        put(home / holder / "gone.txt", lines[0] if "no image" in odd and lines else "")
        if "split" in odd:
            made.told.add(str(holder / "gone.txt"))
        else:
            made.lost[str(holder / "gone.jpg"), "image file is missing"] += 1
    if "hidden" in odd:
        put(folder / "images" / "._a.jpg", b"\0")
        put(folder / "labels" / ".DS_Store", b"\0")
        made.told |= {"._a.jpg", "labels/.DS_Store"}
    if "readme" in odd:
        put(folder / "README.roboflow.txt", "hello")
        put(folder / "labels" / "notes.md", "hello")
        made.told |= {"README.roboflow.txt", "labels/notes.md"}
    if listed:
        put(folder / "classes.txt", "\n".join(names) + "\n\n", odd)
        return made
    given = "\n".join(f"  {nth}: {json.dumps(name, ensure_ascii=False)}" for nth, name in enumerate(names))
    if "numbered names" not in odd:
        given = "\n".join(f"- {json.dumps(name, ensure_ascii=False)}" for name in names)
    yaml = f"nc: {len(names)}\nnames:\n{given}\n"
    yaml += "kpt_shape: [2, 3]\n" if pose else "task: segment\n" if "polygons" in odd else ""
    if "split" in odd:
        for split in ("train", "val"):
            files = [picture.file for picture in pictures if picture.held_out == (split == "val")]
            if "list" in odd:
                start = "C:\\data\\images\\"
                put(folder / f"{split}.txt", "".join(f"{start}{file}\n" for file in files), odd - {"bom"})
            yaml += f"{split}: {split}.txt\n" if "list" in odd else f"{split}: images\\{split}\n"
        made.reading["split"] = "train"
    put(folder / "data.yaml", yaml, odd)
    if "other yaml" in odd:
        put(folder / "args.yaml", "task: detect\nepochs: 3\n")
        put(folder / "coco.yaml", "names: {0: person}\n")
        made.told |= {"args.yaml", "coco.yaml"}
    return made

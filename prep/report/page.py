"""The HTML page of a dataset (`prep report`), which shows whether the crops are right.

Contact sheets by group and by class, sizes and shapes against the group limits, class counts, what was skipped and
why, and the options that shaped the data. Reads the manifests and about 300 single crops: 3 s for a small dataset, and
about 1 s more per million crops. The page of a dataset that is not finished says what is missing.
"""

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from jigsaw_pretrain import rng
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset import layout, schema
from jigsaw_pretrain.formats.dataset.dataset import CropIndex, Dataset, open_dataset
from jigsaw_pretrain.formats.jigsaw import GROUP_WORDS, GROUPS, TALL_BELOW, WIDE_ABOVE
from jigsaw_pretrain.formats.pixels import RGB8, DisplayRange, display_note
from jigsaw_pretrain.html import Bars, Figure, Section, Table, chart, picture, render
from jigsaw_pretrain.prep.plan.crop_table import expected_sizes
from jigsaw_pretrain.prep.records import read_skipped
from jigsaw_pretrain.prep.report.contact_sheet import CropRow, sheet
from jigsaw_pretrain.storage.store import Storage
from jigsaw_pretrain.words import counted, noun, setting

CLASSES_SHOWN = 60
Columns = dict[str, npt.NDArray[Any]]


def display_range(dataset: Dataset) -> DisplayRange | None:
    """How crops are shown that are no JPEG."""
    return None if dataset.pixels == RGB8 else DisplayRange(dataset.pixels, *dataset.measured)


def read_crops(dataset: Dataset) -> Columns:
    """The columns of crops.parquet that the page needs, each [crops], the margins zero where there are none.

    ``width`` and ``height`` are the crops', or those of the mean enlargement where the trainer draws the context.
    """
    index = CropIndex(dataset)
    wanted = ("offset", "size", "label", *schema.EDGES, *schema.BOX, *schema.MARGINS)
    tables = [index.rows(shard, wanted) for shard in dataset.shards]
    crops = {name: np.concatenate([table[name] for table in tables]) for name in wanted} if tables else {}
    counts = [shard.crops for shard in dataset.shards]
    for name in ("name", "group"):
        values = np.array([getattr(shard, name) for shard in dataset.shards], dtype=object)
        crops["shard" if name == "name" else name] = np.repeat(values, counts)
    none = np.zeros(sum(counts), dtype=np.int32)
    boxes, truth, margins = (
        np.stack([crops[name] for name in columns], axis=1) for columns in (schema.EDGES, schema.BOX, schema.MARGINS)
    )
    members = boxes + margins * np.array([-1, -1, 1, 1], dtype=np.int32)
    crops["width"], crops["height"] = expected_sizes(boxes, truth, members, dataset.drawn_context).T
    if dataset.drawn_context is not None:
        # What is shown of a crop is then all that the trainer may show of it.
        crops |= {name: members[:, i] for i, name in enumerate(schema.EDGES)}
        crops |= dict.fromkeys(schema.MARGINS, none)
    return crops


def choose(crops: Columns, chosen: npt.NDArray[np.bool_], count: int, seed: int) -> list[CropRow]:
    """Up to ``count`` of the chosen crops, drawn by the seed: the same page for the same dataset."""
    rows = np.flatnonzero(chosen)
    picked = rows[rng.permutation(rng.key_of_text(seed, "report"), len(rows))[:count]]
    return [_crop_row(crops, int(i)) for i in picked]


def _crop_row(crops: Columns, i: int) -> CropRow:
    box = tuple(float(crops[f"box_{side}"][i]) for side in ("x", "y", "width", "height"))
    whole = {name: int(crops[name][i]) for name in ("offset", "size", "label", "left", "top", "right", "bottom")}
    known = None if np.isnan(box[0]) else (box[0], box[1], box[2], box[3])
    left, top, right, bottom = (int(crops[name][i]) for name in schema.MARGINS)
    margins = (left, top, right, bottom)
    return CropRow(shard=str(crops["shard"][i]), group=str(crops["group"][i]), box=known, margins=margins, **whole)


def _groups(storage: Storage, dataset: Dataset, crops: Columns) -> Section:
    rows: list[list[Any]] = []
    figures = []
    total = max(1, len(crops["group"]))
    for group in GROUPS:
        shards, chosen = dataset.of_group(group), crops["group"] == group
        count = int(chosen.sum())
        megabytes = sum(shard.bytes for shard in shards) / 1e6
        rows.append([GROUP_WORDS[group], count, 100 * count / total, len(shards), megabytes])
        if count:
            some = choose(crops, chosen, 24, dataset.description.seed)
            alt = f"{counted(len(some), 'crop')} of group {group} with the objects' boxes"
            figures.append(
                picture(
                    sheet(storage, some, 6, display=display_range(dataset)),
                    alt,
                    f"{GROUP_WORDS[group]}: {counted(count, 'crop')}",
                    "webp",
                )
            )
    text = (
        "A crop is an object's box, enlarged at random and cut off at the image's edge; its own shape decides which "
        "regions of a jigsaw it can fill. The line in a picture is the object's box, the picture's edge the enlarged "
        "one; pictures without a line are background."
    )
    if dataset.drawn_context is not None:
        text = (
            "Each picture is what the trainer may show of an object: its box, the line, with all of the context "
            f"(up to {dataset.drawn_context:g}x, cut off at the image's edge). How much of it is shown is drawn "
            "anew each time. The shape of the box decides which regions of a jigsaw it can fill; pictures without a "
            "line are background, always shown whole."
        )
    if note := display_note(dataset.pixels):
        text += f" {note}"
    return Section("Crops by shape", text, [Table(["shape", "crops", "%", "shards", "MB"], rows)], figures=figures)


def _shapes(crops: Columns, dataset: Dataset) -> Section:
    width, height = crops["width"].astype(float), crops["height"].astype(float)

    def aspect(axes: Any) -> None:
        axes.hist(np.clip(width / height, 1 / 8, 8), bins=np.geomspace(1 / 8, 8, 61), color="#0072B2")
        axes.set_xscale("log", base=2)
        axes.set_xticks([0.125, 0.25, 0.5, 1, 2, 4, 8], ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
        for limit in (TALL_BELOW, WIDE_ABOVE):
            axes.axvline(limit, color="#D55E00", linestyle="--", linewidth=1.2)
        axes.set_xlabel("width / height of the crop")
        axes.set_ylabel("crops")
        axes.locator_params(axis="y", integer=True)

    def sizes(axes: Any) -> None:
        side = np.sqrt(width * height)
        bins = np.geomspace(max(1.0, side.min()), max(2.0, side.max() * 1.001), 50)
        for group, style in zip(GROUPS, itertools.cycle(("-", "--", ":")), strict=False):
            chosen = crops["group"] == group
            if chosen.any():
                counts, edges = np.histogram(side[chosen], bins)
                axes.stairs(counts, edges, label=GROUP_WORDS[group], linestyle=style, linewidth=1.6)
        axes.set_xscale("log", base=2)
        ticks = [2**i for i in range(0, 13) if bins[0] <= 2**i <= bins[-1]]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("square root of the crop's area, pixels")
        axes.set_ylabel("crops")
        axes.locator_params(axis="y", integer=True)
        axes.legend(frameon=False)

    figures: list[Figure] = [
        chart(
            aspect,
            "histogram of the crops' width divided by height",
            f"Shape; dashed: what is tall ends at {TALL_BELOW:g}, what is wide begins at {WIDE_ABOVE:g}",
        ),
        chart(sizes, "histograms of the crops' sizes by group", "Size, before the trainer's resize ratio"),
    ]
    text = "" if dataset.drawn_context is None else "Of crops with the context that they have on average."
    return Section("Shapes and sizes", text, figures=figures)


def _classes(storage: Storage, dataset: Dataset, crops: Columns) -> Section:
    counts = np.bincount(crops["label"], minlength=dataset.label_count)
    labels = [*dataset.classes, "background"]
    order = sorted(range(len(labels)), key=lambda i: (-int(counts[i]), i))
    figures = []
    for label in order[:CLASSES_SHOWN]:
        if counts[label]:
            some = choose(crops, crops["label"] == label, 5, dataset.description.seed)
            alt = f"{counted(len(some), 'crop')} of class {labels[label]}"
            image = sheet(storage, some, 5, 72, display_range(dataset))
            figures.append(picture(image, alt, f"{labels[label]}: {counted(int(counts[label]), 'crop')}", "webp"))
    text = f"{counted(len(dataset.classes), 'class', 'classes')} and the background, by their crops."
    absent = sum(1 for i in range(len(dataset.classes)) if not counts[i])
    if absent:
        text += f" {counted(absent, 'class has', 'classes have')} no crop."
    if len(order) > CLASSES_SHOWN:
        text += f" Pictures are of the {CLASSES_SHOWN} most frequent ones."
    bars = Bars("Crops of each class:", [(labels[i], int(counts[i])) for i in order])
    return Section("Classes", text, bars=bars, figures=figures)


def _skipped(storage: Storage) -> Section:
    if not storage.exists(layout.SKIPPED):
        return Section("Skipped", missing=f"{layout.SKIPPED} is not there.")
    rows = read_skipped(storage, layout.SKIPPED)
    if not rows.num_rows:
        return Section("Skipped", "Nothing: every annotation became a crop.")
    stages, reasons = (rows.column(name).to_pylist() for name in ("stage", "reason"))
    by_reason: dict[tuple[str, str], list[int]] = {}
    for place, (stage, reason) in enumerate(zip(stages, reasons, strict=True)):
        by_reason.setdefault((stage, reason.split(":")[0]), []).append(place)
    table = [
        [stage, reason, len(found), "\n".join(_thing(row) for row in rows.take(found[:3]).to_pylist())]
        for (stage, reason), found in sorted(by_reason.items(), key=lambda item: -len(item[1]))
    ]
    text = "Images and annotations that gave no crop, and why. skipped.parquet has a row for each."
    return Section("Skipped", text, [Table(["stage", "reason", "how many", "such as"], table)])


def _thing(row: dict[str, Any]) -> str:
    where = row["image_file"] or row["image_id"] or "the dataset"
    return f"{where} annotation {row['annotation_id']}" if row["annotation_id"] is not None else str(where)


def _options(dataset: Dataset) -> Section:
    description = dataset.description
    given = {
        name: f"{value[:16]}…" if name == "annotations_sha256" else setting(value)
        for name, value in description.options.items()
    }
    options = [["seed", str(description.seed)], *map(list, sorted(given.items()))]
    versions = [list(pair) for pair in sorted(description.versions.items())]
    tables = [Table(["option", "value"], options), Table(["what shapes bytes", "version"], versions)]
    return Section("Options", f"Plan {description.plan[:16]}, format {description.format_version}.", tables)


def page(url: str) -> str:
    """The page of the dataset below ``url``; one that is not finished gets a page that says so.

    Raises UserError where prep has written nothing.
    """
    storage = Storage(url)
    if not any(storage.exists(name) for name in (layout.PLAN, layout.DATASET)):
        raise UserError(f"{storage.describe('')} is no dataset: name a folder that `jigsaw-prep shards --out` wrote to")
    try:
        dataset = open_dataset(url)
    except UserError as error:
        done = sum(1 for name in storage.list(layout.PARTS) if name.endswith(".json"))
        text = f"{error.message} Parts finished so far: {done}."
        return render("Crops of an unfinished dataset", "Not finished.", [Section("What is missing", missing=text)])
    crops = read_crops(dataset)
    total = len(crops["label"])
    background = int((crops["label"] == dataset.description.background).sum())
    images = dataset.description.totals.get("images", 0)
    tiles = {
        noun(total, "crop"): total,
        noun(images, "image"): images,
        noun(len(dataset.classes), "class", "classes"): len(dataset.classes),
        "% background": 100 * background / max(1, total),
        noun(len(dataset.shards), "shard"): len(dataset.shards),
        "MB": sum(shard.bytes for shard in dataset.shards) / 1e6,
    }
    sections = [_options(dataset), _skipped(storage)]
    if total:
        shown = [_groups(storage, dataset, crops), _shapes(crops, dataset), _classes(storage, dataset, crops)]
        sections = [*shown, *reversed(sections)]
    lead = "What prep cut out of the detection dataset, for pre-training: are these crops right?"
    return render("Crops for jigsaw pre-training", lead, sections, tiles)


def report(out: str, name: str = "report.html") -> str:
    """Write the page of the dataset below ``out`` to ``name`` there; returns where it lies."""
    storage = Storage(out)
    storage.publish(name, page(out).encode())
    return storage.describe(name)

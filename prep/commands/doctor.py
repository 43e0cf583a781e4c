"""``prep doctor`` tells what is wrong with a dataset before any work is done on it; it writes nothing.

Reads the annotations (a second for a million boxes) and every image's header (0.4 ms each locally, one request each
from a store), with ``--deep`` every pixel (5 ms each), ahead by threads. Images that are byte for byte the same are
told where images are read whole: locally, and with ``--deep``. Each check gives findings in words, with
counts and examples. Exit 0: clean; 1: warnings, things that prep leaves out or that are likely mistakes; 2: it cannot
be prepped. Prefer ``shards --dry-run``, which is quicker, where only the plan is wanted.
"""

import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from jigsaw_pretrain.cli import Command, console_for_names, one_line_errors, plain, tell_next
from jigsaw_pretrain.errors import COMMAND_LINE, UserError, redacted
from jigsaw_pretrain.formats.annotations import options as reads
from jigsaw_pretrain.formats.annotations.coco import NO_CATEGORY, CocoFile, decode, file_name_of
from jigsaw_pretrain.formats.annotations.folders import is_hidden, listing_notes
from jigsaw_pretrain.formats.annotations.read import listed, read_annotations
from jigsaw_pretrain.formats.annotations.skipped import EXAMPLES, BoxReason
from jigsaw_pretrain.formats.annotations.table import Annotations
from jigsaw_pretrain.formats.annotations.yolo import SUFFIXES
from jigsaw_pretrain.formats.images.decode import ImageError, decode_raster, size_and_orientation
from jigsaw_pretrain.formats.images.nodata import check_nodata
from jigsaw_pretrain.formats.images.source import ImageSource, read_ahead
from jigsaw_pretrain.formats.pixels import PixelFormat
from jigsaw_pretrain.prep.images.pixel_format import choose_pixels, missing_images, sample
from jigsaw_pretrain.prep.plan.forecast import Summary
from jigsaw_pretrain.prep.plan.plan import Plan, PlanOptions, make_plan
from jigsaw_pretrain.prep.report.console import print_summary
from jigsaw_pretrain.storage.retries import StoreError
from jigsaw_pretrain.storage.store import map_ahead

logger = logging.getLogger(__name__)

NOTE, WARNING, ERROR = "note", "warning", "error"
"""A fact; something that costs data or is likely a mistake; something that prevents prep."""

STATES = ("clean", "warnings", "cannot be prepped")
"""What is said for each exit status."""

LISTING_SECONDS = 20.0
"""How long a store's listing is waited for: some hundred thousand files. It serves one check of many."""

MUCH_CROWD = 0.1
SKIPPED_SHARE = 0.01


@dataclass(frozen=True)
class Finding:
    """One result of a check: how grave, which check, how many things, these (as many as are known), what it means."""

    level: str
    check: str
    count: int
    text: str
    examples: Sequence[str] = ()


@click.command(cls=Command)
@reads.annotations
@reads.images
@reads.each
@click.option("--seed", default=0, show_default=True, help="Summarise the plan of this seed.")
@click.option("--deep", is_flag=True, help="Decode every image, not only its header.")
@click.option("--all", "whole", is_flag=True, help=f"Name all that a finding is about, not only {EXAMPLES} of them.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object in place of tables.")
def doctor(annotations: str, images: str, seed: int, deep: bool, whole: bool, as_json: bool, **shaping: Any) -> None:
    """Say what is wrong with a dataset before any work.

    The exit status is 0 for a clean dataset, 1 for one with warnings, and 2 for one that cannot be prepped.
    """
    findings: list[Finding] = []
    summary: Summary | None = None
    if not as_json:
        how = "every image whole" if deep else "the head of every image"
        logger.info("%s: reading the annotations and %s", redacted(annotations), how)
    try:
        with one_line_errors(annotations):
            for found in examine(annotations, images, PlanOptions(**shaping), seed, deep):
                if isinstance(found, Summary):
                    summary = found
                else:
                    findings.append(found)
    except UserError as error:
        findings.append(Finding(ERROR, "cannot be prepped", 1, error.message))
    findings = [replace(one, examples=list(one.examples[: None if whole else EXAMPLES])) for one in findings]
    levels = {finding.level for finding in findings}
    state = 2 if ERROR in levels else 1 if WARNING in levels else 0
    if as_json:
        click.echo(json.dumps(report(state, findings, summary), indent=2))
    else:
        _print(console_for_names(), state, findings, summary)
        if summary is not None:
            own = ("--deep", "--all")
            words = [word for word in COMMAND_LINE.get() if word not in own]
            plan = ["jigsaw-prep", "shards", *words[words[:1] == ["doctor"] :], "--out", "crops", "--dry-run"]
            tell_next(("the plan, and the recipe that fits it; writes nothing", plan))
    sys.exit(state)


def examine(url: str, images: str, options: PlanOptions, seed: int, deep: bool) -> Iterator[Finding | Summary]:
    """All findings, and the plan's figures; raises UserError where it cannot be prepped."""
    raw = read_annotations(url, images)
    source = ImageSource(images)
    source.check()
    if raw.kind == "coco":
        yield from coco_findings(decode(raw.files[""], raw.source))
    annotations = listed(raw, source, options.reading)
    decided = choose_pixels(annotations, source)
    if (missing := missing_images(annotations, source)) is not None:
        yield Finding(WARNING, missing.check, len(missing.things), missing.text, missing.things)
    if decided.note:
        yield Finding(NOTE, "pixels", 1, decided.note)
    check_nodata(sample(annotations), source, decided.pixels, options.nodata)
    plan = make_plan(annotations, replace(options, pixels=decided.pixels), seed)
    yield from note_findings(plan)
    if raw.kind != "yolo" and source.can_list:
        yield from listing_findings(annotations, source)
    yield from box_findings(annotations, plan)
    found = check_images(annotations, source, options, decided.pixels, deep)
    yield from image_findings(found, options.exif)
    yield from _usable(plan, set(found.trouble))
    summary = plan.summary()
    yield from plan_findings(summary)
    yield summary


def coco_findings(coco: CocoFile) -> Iterator[Finding]:
    """What only a COCO file can have: ids and names given twice, references to nothing."""
    repeated = _repeated(image.id for image in coco.images)
    if repeated:
        yield _warn("duplicate image ids", repeated, "image ids occur more than once")
    repeated = _repeated(file_name_of(image) for image in coco.images)
    if repeated:
        yield _warn("duplicate file names", repeated, "files are listed more than once; their boxes are put together")
    repeated = _repeated(annotation.id for annotation in coco.annotations if annotation.id is not None)
    if repeated:
        yield _warn(
            "duplicate annotation ids", repeated, "annotation ids occur more than once (prep does not use them)"
        )
    repeated = _repeated(category.id for category in coco.categories)
    if repeated:
        yield _warn("duplicate category ids", repeated, "category ids occur more than once")
    repeated = _repeated(category.name for category in coco.categories)
    if repeated:
        yield _warn("duplicate category names", repeated, "category names occur more than once, as labels of their own")
    known = {category.id for category in coco.categories}
    strange = Counter(a.category_id for a in coco.annotations if a.category_id not in known | {NO_CATEGORY})
    if strange:
        yield _warn("unknown category ids", strange, "boxes have a category that is not listed", strange.total())


def note_findings(plan: Plan) -> Iterator[Finding]:
    """What reading and planning noticed: files not looked at, boxes that look like mistakes."""
    for note in plan.notes:
        level = WARNING if note.grave else NOTE
        yield Finding(level, note.check, max(1, len(note.things)), note.text, note.things)


def listing_findings(annotations: Annotations, source: ImageSource) -> Iterator[Finding]:
    """What lies in the image folder and is not looked at; YOLO's reader, which lists that folder, tells it itself."""
    try:
        files, links = source.survey(LISTING_SECONDS)
    except (StoreError, UserError, PermissionError) as error:
        text = f"what the annotations do not list is not known: {redacted(str(error))}"
        yield Finding(NOTE, "images that cannot be listed", 1, text)
        return
    for note in listing_notes(links, files):
        yield Finding(WARNING if note.grave else NOTE, note.check, len(note.things), note.text, note.things)
    listed_files = {*annotations.files, *(row.image_file for row in annotations.skipped)}
    others = [
        file
        for file in files
        if PurePosixPath(file).suffix.lower() in SUFFIXES and not is_hidden(file) and file not in listed_files
    ]
    if others:
        yield Finding(
            NOTE, "images without annotations", len(others), "the annotations do not list them: not used", others
        )


def box_findings(annotations: Annotations, plan: Plan) -> Iterator[Finding]:
    """Boxes and images that the plan could not use, by reason, and classes without any box."""
    by_reason: dict[str, list[str]] = {}
    for row in plan.skipped:
        where = row.image_file or "annotation " + str(row.annotation_id)
        where += f" box {row.ordinal}" if row.ordinal is not None else ""
        by_reason.setdefault(row.reason.split(":")[0], []).append(where)
    crowd = by_reason.pop(BoxReason.CROWD.text, [])
    if crowd:
        share = len(crowd) / max(1, len(annotations.image))
        level = WARNING if share > MUCH_CROWD else NOTE
        yield Finding(level, "crowd share", len(crowd), f"{share:.1%} of the boxes are crowd regions, never cut out")
    for reason, boxes in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        if reason != BoxReason.UNKNOWN_CATEGORY.text:
            yield Finding(WARNING, reason, len(boxes), "not used", boxes)
    used = set(plan.crops.label.tolist())
    empty = [name for label, name in enumerate(plan.classes) if label not in used]
    if empty:
        yield Finding(WARNING, "categories without boxes", len(empty), "labels that no crop has", empty)


@dataclass(frozen=True)
class ImageCheck:
    """What a look at every image has found.

    trouble: what is wrong with each image that cannot be used, by file. rotated: files that EXIF turns.
    same: by file, the first one that has the same bytes.
    """

    trouble: dict[str, str]
    rotated: list[str]
    same: dict[str, str]


def check_images(
    annotations: Annotations, source: ImageSource, options: PlanOptions, pixels: PixelFormat, deep: bool
) -> ImageCheck:
    """Look at every image that is listed with a usable size; pixels: the dataset's. Raises StoreError."""
    exif = options.exif
    trouble: dict[str, str] = {}
    rotated = []
    first_of: dict[bytes, str] = {}
    same: dict[str, str] = {}

    def note(file: str, digest: bytes | None) -> None:
        if digest is not None and (first := first_of.setdefault(digest, file)) != file:
            same[file] = first

    sizes = list(zip(annotations.widths.tolist(), annotations.heights.tolist(), strict=True))
    for file, size, found in zip(annotations.files, sizes, _headers(source, annotations.files), strict=True):
        if isinstance(found, ImageError):
            trouble[file] = str(found)
            continue
        (width, height, orientation), digest = found
        note(file, digest)
        if orientation in range(2, 9):
            rotated.append(file)
        upright = (height, width) if exif == "apply" and orientation in (5, 6, 7, 8) else (width, height)
        if upright != size:
            trouble[file] = (
                f"size disagrees with the annotations: file {upright[0]}x{upright[1]}, annotations {size[0]}x{size[1]}"
            )
    if deep:
        expected = dict(zip(annotations.files, sizes, strict=True))
        remaining = [file for file in annotations.files if file not in trouble]
        for file, raw in zip(remaining, read_ahead(source, remaining), strict=True):
            try:
                if isinstance(raw, ImageError):
                    raise raw
                note(file, _digest(raw))
                decode_raster(raw, *expected[file], exif, pixels, nodata=options.missing_value)
            except ImageError as error:
                trouble[file] = str(error)
    return ImageCheck(trouble, rotated, same)


Header = tuple[int, int, int]


def _headers(source: ImageSource, files: Sequence[str]) -> list[tuple[Header, bytes | None] | ImageError]:
    """Each image's width, height and orientation, and a digest of its bytes where they are read whole for that."""

    def of_one(file: str) -> tuple[Header, bytes | None] | ImageError:
        try:
            if not source.is_local:
                return source.header(file), None
            raw = source.read(file)
            return size_and_orientation(raw), _digest(raw)
        except ImageError as trouble:
            return trouble

    return list(map_ahead(of_one, files, source.threads))


def _digest(raw: bytes) -> bytes:
    return hashlib.blake2b(raw, digest_size=16).digest()


def image_findings(found: ImageCheck, exif: str) -> Iterator[Finding]:
    """What the images' check found, by reason."""
    by_reason: dict[str, list[str]] = {}
    for file, reason in found.trouble.items():
        kind, _, detail = reason.partition(": ")
        by_reason.setdefault(kind, []).append(f"{file} ({detail})" if detail else file)
    for kind, files in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        yield Finding(WARNING, kind, len(files), "images that cannot be used, nor their boxes", files)
    if found.same:
        pairs = [f"{file} (of {first})" for file, first in found.same.items()]
        text = "images are copies of another, byte for byte: their objects are learned more often, or are in two splits"
        yield Finding(WARNING, "byte-identical images", len(pairs), text, pairs)
    if found.rotated and exif == "ignore":
        text = "images are turned by EXIF. If the boxes were drawn on upright pictures, give --exif apply"
        yield Finding(WARNING, "EXIF-rotated files", len(found.rotated), text, found.rotated)


def _usable(plan: Plan, trouble: set[str]) -> Iterator[Finding]:
    left_out = sum(row.image_file is not None and row.ordinal is None for row in plan.skipped)
    share = (len(trouble) + left_out) / max(1, plan.listed_images + left_out)
    if trouble.issuperset(plan.images.files):
        yield Finding(ERROR, "no usable image", len(trouble), "no image that has boxes can be used. Check --images")
    elif share > SKIPPED_SHARE:
        text = f"{share:.1%} of the images cannot be used: prep stops unless allowed more, with --max-skipped"
        yield Finding(WARNING, "share of unusable images", len(trouble) + left_out, text)


def plan_findings(summary: Summary) -> Iterator[Finding]:
    """What the plan's figures warn of: shapes that hardly occur, small objects, missing background."""
    for name, text in summary.warnings():
        yield Finding(WARNING, name, 1, text)


def _repeated(values: Iterable[Hashable]) -> Counter[Hashable]:
    return Counter({value: count for value, count in Counter(values).items() if count > 1})


def _warn(check: str, found: Counter[Hashable] | Counter[int | float], text: str, count: int | None = None) -> Finding:
    some: Sequence[tuple[Hashable, int]] = found.most_common()
    return Finding(WARNING, check, len(found) if count is None else count, text, [str(value) for value, _ in some])


def report(state: int, findings: list[Finding], summary: Summary | None) -> dict[str, Any]:
    """What ``--json`` prints: status, exit_code, findings, and the plan's totals where there is a plan."""
    return {
        "status": STATES[state],
        "exit_code": state,
        "findings": [asdict(finding) for finding in findings],
        "totals": summary.totals() if summary else None,
    }


def verdict(state: int, findings: Sequence[Finding]) -> str:
    """The state and why, in one line: what is an error in its own words, warnings by name and count."""
    said = f"doctor: {STATES[state]}"
    errors = [finding.text for finding in findings if finding.level == ERROR]
    warnings = [f"{finding.check} ({finding.count:,})" for finding in findings if finding.level == WARNING]
    reasons = errors or list(dict.fromkeys(warnings))
    return f"{said}: {'; '.join(reasons)}" if reasons else said


def _print(console: Console, state: int, findings: list[Finding], summary: Summary | None) -> None:
    said = plain(verdict(state, findings))
    console.print(said, highlight=False, soft_wrap=True)
    if findings:
        listing = Table(title="findings", title_justify="left")
        for name in ("", "what", "count", "meaning", "such as"):
            listing.add_column(name, justify="right" if name == "count" else "left", overflow="fold")
        for finding in sorted(findings, key=lambda finding: (ERROR, WARNING, NOTE).index(finding.level)):
            texts = (finding.level, finding.check, f"{finding.count:,}", finding.text, ", ".join(finding.examples))
            listing.add_row(*(plain(text) for text in texts))
        console.print(listing)
    if summary is not None:
        # Its warnings are among the findings.
        print_summary(console, "plan", summary, summary.seconds or 0.0, estimated=True, warnings=False)
    console.print(said, highlight=False, soft_wrap=True)

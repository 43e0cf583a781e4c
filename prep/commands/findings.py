"""What ``prep doctor`` looks for in annotations: each check gives findings, in words, with counts and examples.

Pure functions of what was read; the images' own checks are in prep.checkup. A second for a million boxes.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from jigsaw_pretrain.formats.annotations.coco import CocoFile, file_name_of
from jigsaw_pretrain.formats.annotations.skipped import BoxReason
from jigsaw_pretrain.formats.annotations.table import Annotations
from jigsaw_pretrain.prep.plan.forecast import Summary
from jigsaw_pretrain.prep.plan.plan import Plan

NOTE, WARNING, ERROR = "note", "warning", "error"
"""A fact; something that costs data or is likely a mistake; something that prevents prep."""

EXAMPLES = 3
MUCH_CROWD = 0.1


@dataclass(frozen=True)
class Finding:
    """One result of a check: how grave, which check, how many things, a few of them, and what it means."""

    level: str
    check: str
    count: int
    text: str
    examples: list[str] = field(default_factory=list)


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
    strange = Counter(a.category_id for a in coco.annotations if a.category_id not in known)
    if strange:
        yield _warn("unknown category ids", strange, "boxes have a category that is not listed", strange.total())


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
    for reason, places in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        if reason != BoxReason.UNKNOWN_CATEGORY.text:
            yield Finding(WARNING, reason, len(places), "not used", places[:EXAMPLES])
    used = set(plan.crops.label.tolist())
    empty = [name for label, name in enumerate(plan.classes) if label not in used]
    if empty:
        yield Finding(WARNING, "categories without boxes", len(empty), "labels that no crop has", empty[:EXAMPLES])


def plan_findings(summary: Summary) -> Iterator[Finding]:
    """What the plan's figures warn of: thin and empty groups, small objects, missing background."""
    for text in summary.warnings():
        yield Finding(WARNING, "groups" if "group" in text else "plan", 1, text)


def _repeated(values: Iterable[Hashable]) -> Counter[Hashable]:
    return Counter({value: count for value, count in Counter(values).items() if count > 1})


def _warn(check: str, found: Counter[Hashable] | Counter[int | float], text: str, count: int | None = None) -> Finding:
    some: Sequence[tuple[Hashable, int]] = found.most_common(EXAMPLES)
    return Finding(WARNING, check, len(found) if count is None else count, text, [str(value) for value, _ in some])

"""A run of prep: plan -> parts -> manifests, for every command that cuts (shards, retry-skipped, verify --repair).

Makes the plan, checks it against what the output was begun as, and cuts parts on an executor. ``plan`` and ``shards``
are the Python API (``jigsaw_pretrain.plan``, ``jigsaw_pretrain.shards``); the commands call them too. Several workers
are processes that are started afresh, so a script that calls ``shards`` needs ``if __name__ == "__main__":``.

Where parts are cut again (``recut``), dataset.json goes first, so that nobody reads a dataset in change, then the
parts' done records, so that a run that is cut short leaves parts to be cut, which the same command, or ``shards``, then
does.
"""

import difflib
import logging
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypedDict, Unpack

import numpy as np

from jigsaw_pretrain.config import Count, Share, checked
from jigsaw_pretrain.errors import Interrupted, UserError, redacted
from jigsaw_pretrain.formats.annotations.read import Exif, Ignored, RawAnnotations, listed, read_annotations
from jigsaw_pretrain.formats.dataset import layout
from jigsaw_pretrain.formats.dataset.dataset import ContextAt, Dataset, Encoding, Subsampling, open_dataset
from jigsaw_pretrain.formats.images.missing import any_there
from jigsaw_pretrain.formats.images.nodata import check_nodata
from jigsaw_pretrain.formats.images.source import MISSING, ImageSource
from jigsaw_pretrain.formats.pixels import RGB8
from jigsaw_pretrain.prep import crops
from jigsaw_pretrain.prep.executors import ArrayTask, InlineExecutor, open_executor, run_tasks, usable_cores
from jigsaw_pretrain.prep.images.pixel_format import AUTO, choose_pixels, missing_images, sample, wanted
from jigsaw_pretrain.prep.manifests import finish, tidy
from jigsaw_pretrain.prep.parts import PartTask, run_part
from jigsaw_pretrain.prep.plan.forecast import Summary
from jigsaw_pretrain.prep.plan.plan import Plan, PlanOptions, make_plan, options_of
from jigsaw_pretrain.prep.records import (
    MAX_SKIPPED,
    Damage,
    PartRecord,
    PlanRecord,
    check_agreement,
    check_place,
    check_plan_version,
    check_shards,
    clear_markers,
    finished_dataset,
    missing_files_of,
    missing_of,
    publish_plan,
    read_parts,
    read_plan,
    read_skipped,
    recorded_options,
    remove_dataset,
    repair_plan_rows,
    require_plan,
    shaping_versions,
    skip_limit,
)
from jigsaw_pretrain.storage.store import Storage, location

logger = logging.getLogger(__name__)


class Shaping(TypedDict, total=False):
    """The options that shape the data, by keyword: the fields of PlanOptions, ``pixels`` by its name."""

    negatives_per_positive: float
    context: float
    context_at: ContextAt
    crops_per_part: int
    jpeg_quality: int
    subsampling: Subsampling
    exif: Exif
    ignored: Ignored
    split: str | None
    voc_origin: int | None
    encode: Encoding
    pixels: str
    """``auto`` (the images decide), ``rgb8``, or channels and type such as ``6xuint16``."""
    nodata: str | None


class Progress(Protocol):
    """What a run reports to its caller while it goes on."""

    def cutting(self, cut: Iterable[tuple[int, int]], images: int, done: int) -> None:
        """Take in images and crops of each part as it gets done, all of them; ``done`` of the images were before."""
        ...

    def image(self) -> None:
        """Hear of one more image of a part under way, where this process cuts it; it is among its part's again."""
        ...

    def finished(self, summary: Summary) -> None:
        """Receive the figures of the dataset that has been made."""
        ...


class Logged:
    """Tells the log, at most once per tenth of the images."""

    def cutting(self, cut: Iterable[tuple[int, int]], images: int, done: int) -> None:
        """Take in the counts."""
        tenths = 10 * done // images if images else 0
        for more, _ in cut:
            done += more
            if 10 * done // images > tenths:
                tenths = 10 * done // images
                logger.info("cut %d of %d images", done, images)

    def image(self) -> None:
        """Log nothing: whole parts are logged."""

    def finished(self, summary: Summary) -> None:
        """Log the counts and the warnings."""
        logger.info("made %d crops in %d shards", summary.crops, summary.shards)
        for _, warning in summary.warnings():
            logger.warning(warning)


@dataclass(frozen=True)
class PrepJob:
    """What to read, where to write, and what shapes the data."""

    annotations: str
    images: str
    out: str
    seed: int
    options: PlanOptions


def plan(annotations: str | Path, images: str | Path, *, seed: int = 0, **shaping: Unpack[Shaping]) -> Plan:
    """Plan every crop of a dataset, before a pixel is decoded; nothing is written.

    A million boxes take some seconds and about 1 GB.

    Args:
        annotations: COCO JSON, CrowdHuman odgt, or a folder of Pascal VOC XML, YOLO txt or MOT files; path or URL.
        images: What the file names are relative to: a folder, zip or tar; a path or a URL.
        seed: Decides every random choice.
        **shaping: The fields of PlanOptions (context, negatives_per_positive, jpeg_quality, ...).

    Returns:
        The plan: ``crops`` and ``images`` are tables of columns, ``summary()`` its figures.

    Raises:
        UserError: The annotations or images cannot be used.
    """
    job = _job(annotations, images, "", seed, shaping)
    source = ImageSource(job.images)
    source.check()
    return plan_job(job, read_annotations(job.annotations, job.images), source)


def shards(
    annotations: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    workers: int | None = None,
    scheduler: str | None = None,
    max_skipped: float = MAX_SKIPPED,
    overwrite: bool = False,
    progress: Progress | None = None,
    **shaping: Unpack[Shaping],
) -> Dataset:
    """Cut a detection dataset into shards of object and background crops, or go on with a run that was cut short.

    The result is the same for any number of workers. A finished dataset is opened as it is. About 4 ms of one core for
    each image of COCO.

    Args:
        annotations: COCO JSON, CrowdHuman odgt, or a folder of Pascal VOC XML, YOLO txt or MOT files; path or URL.
        images: What the file names are relative to: a folder, zip or tar; a path or a URL.
        out: Where shards/ and manifests/ go: a folder or a URL.
        seed: Decides every random choice.
        workers: Processes; all usable cores by default.
        scheduler: Address of a Dask cluster that cuts in place of processes, ``tcp://host:port``.
        max_skipped: The largest share of the images, and of the boxes, that may be unusable, 0 to 1.
        overwrite: Remove what prep wrote to ``out`` before, and start anew.
        progress: Receives what the run reports; the log by default.
        **shaping: The fields of PlanOptions (context, negatives_per_positive, jpeg_quality, ...).

    Returns:
        The finished dataset.

    Raises:
        UserError: The annotations or images cannot be used, or ``out`` holds another dataset.
        OSError: A disk or store that fails.
        Interrupted: A signal ended it; finished parts are kept.
    """
    job = _job(annotations, images, out, seed, shaping)
    _cut_job(job, None, workers, scheduler, max_skipped, overwrite, progress or Logged())
    return open_dataset(job.out)


def shards_task(
    annotations: str | Path,
    images: str | Path,
    out: str | Path,
    task: ArrayTask,
    *,
    seed: int = 0,
    workers: int | None = None,
    scheduler: str | None = None,
    max_skipped: float = MAX_SKIPPED,
    overwrite: bool = False,
    progress: Progress | None = None,
    **shaping: Unpack[Shaping],
) -> Plan | None:
    """Cut one share of the parts, as a task of an array job; once all are done, ``finish`` makes the manifests.

    Takes and raises what ``shards`` does.

    Returns:
        The plan of the whole job; None where the dataset is finished already.
    """
    job = _job(annotations, images, out, seed, shaping)
    return _cut_job(job, task, workers, scheduler, max_skipped, overwrite, progress or Logged())


def _job(annotations: str | Path, images: str | Path, out: str | Path, seed: int, shaping: Shaping) -> PrepJob:
    """What a caller asks for, checked before anything is read; raises UserError."""
    places = location(annotations, "annotations"), location(images, "images"), location(out, "out")
    return PrepJob(*places, checked(seed, int, "seed"), _options(shaping))


def _options(shaping: Shaping) -> PlanOptions:
    names = Shaping.__annotations__
    for strange in shaping.keys() - names.keys():
        near = difflib.get_close_matches(strange, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the options are {', '.join(names)}"
        raise UserError(f"there is no option {strange}; {hint}")
    pixels = wanted(checked(shaping.get("pixels", AUTO), str, "pixels"))
    return PlanOptions(**{**shaping, "pixels": pixels})  # type: ignore[arg-type]


def _cut_job(
    job: PrepJob,
    task: ArrayTask | None,
    workers: int | None,
    scheduler: str | None,
    max_skipped: float,
    overwrite: bool,
    progress: Progress,
) -> Plan | None:
    """Cut what is missing and finish, or cut a task's share of it; None where the dataset is finished already."""
    checked(max_skipped, Share, "max_skipped")
    checked(workers, Count | None, "workers")
    checked(scheduler, str | None, "scheduler")
    raw = read_annotations(job.annotations, job.images)
    out, again = Storage(job.out), False
    if not overwrite:
        record = begun_as(out, job, raw.sha256)
        job = settled(job, record)
        finished = _finished(out, record)
        again = finished is not None and not task and _has_found(out, finished, ImageSource(job.images))
        if finished is not None and not again:
            tidy(out)
            return None
    source = ImageSource(job.images)
    source.check()
    made = plan_job(job, raw, source)
    del raw
    check_turbojpeg(job.options)
    mine = task.mine(made.part_count) if task else range(made.part_count)
    count = min(workers or usable_cores(), len(mine)) or 1
    check_place(out)
    with out.locked(exclusive=overwrite or again) as share:
        if overwrite:
            remove_dataset(out)
        begin(made, out)
        if again:
            logger.info("images that were missing are there now: their parts are cut again")
            out.remove(layout.DATASET)
        if task:
            share()
        with open_executor(count, scheduler) as (executor, at_once):
            cut(made, job, source, mine, executor, at_once, max_skipped, progress)
        if not task:
            progress.finished(finish(job.out, max_skipped))
    return made


def _finished(out: Storage, plan: PlanRecord | None) -> Dataset | None:
    """The finished dataset of a plan that ``out`` holds; raises UserError where that is damaged or a stranger's.

    A damaged dataset.json is none: the manifests are made again from the parts.
    """
    if plan is None:
        if out.exists(layout.DATASET):
            raise UserError(
                f"{out.describe('')} holds a dataset without {layout.PLAN}, so nothing says that it is of these "
                "annotations and options. Start anew with --overwrite, or name another --out."
            )
        return None
    dataset = finished_dataset(out, plan)
    if dataset is not None:
        check_shards(out, dataset)
    return dataset


def _has_found(out: Storage, dataset: Dataset, source: ImageSource) -> bool:
    """Whether any image is there now that was missing when the parts of a finished dataset were cut."""
    if not missing_of(dataset):
        return False
    rows = read_skipped(out, layout.SKIPPED).to_pylist()
    gone = [row["image_file"] for row in rows if row["stage"] == "cut" and row["reason"].startswith(MISSING)]
    return any_there(gone, source)


def plan_job(job: PrepJob, raw: RawAnnotations, source: ImageSource) -> Plan:
    """The plan of a job, from its annotations as read; its images decide where no pixels are asked for.

    Raises UserError, StoreError.
    """
    annotations, options = listed(raw, source, job.options.reading), job.options
    missing = missing_images(annotations, source)
    if options.pixels is None:
        found = choose_pixels(annotations, source)
        options = replace(options, pixels=found.pixels)
        if found.note:
            logger.info(found.note)
    if options.encode == "lossless" and options.stored != RGB8:
        other = ", or give --pixels rgb8" if options.stored.dtype == "uint8" else ""
        raise UserError(
            f"--encode lossless cuts JPEGs out of JPEGs, and the pixels of this dataset are {options.stored}, which "
            f"{options.stored.member} members keep without loss in any case: leave --encode out{other}."
        )
    check_nodata(sample(annotations), source, options.stored, options.nodata)
    made = make_plan(annotations, options, job.seed)
    for note in (*made.notes, *([missing] if missing else [])):
        logger.log(logging.WARNING if note.grave else logging.INFO, note.line())
    return made


def settled(job: PrepJob, record: PlanRecord | None) -> PrepJob:
    """The job with the pixels that its output was begun with, where it leaves them to the images."""
    if record is None or job.options.pixels is not None:
        return job
    return replace(job, options=replace(job.options, pixels=options_of(record.options, layout.PLAN).pixels))


def begun_as(out: Storage, job: PrepJob, sha256: str) -> PlanRecord | None:
    """The plan that ``out`` was begun with; raises UserError where it is of other options, annotations or versions."""
    record = read_plan(out)
    job = settled(job, record)
    if record is not None:
        check_plan_version(out, record)
        check_agreement(
            out.describe(layout.PLAN),
            {
                "format_version": record.format_version,
                "seed": record.seed,
                "options": record.options,
                "versions": record.versions,
            },
            {
                "format_version": job.options.format_version,
                "seed": job.seed,
                "options": recorded_options(job.options.to_dict(), sha256),
                "versions": shaping_versions(),
            },
        )
    return record


def check_turbojpeg(options: PlanOptions) -> None:
    """Raise UserError where this machine lacks what the options need, before anything is written."""
    if options.encode == "lossless":
        crops.load_turbojpeg()


def begin(plan: Plan, out: Storage) -> None:
    """Record the plan, or check that it is the one that was recorded; raises UserError."""
    begun = read_plan(out)
    if begun is None:
        publish_plan(out, plan)
    elif begun.plan != plan.digest:
        raise UserError(
            f"{out.describe(layout.PLAN)} holds another plan ({begun.plan[:12]}…; this command makes "
            f"{plan.digest[:12]}…). Options and annotations agree, so the images differ. Give the same --images to go "
            "on with it, or start anew with --overwrite or another --out."
        )
    else:
        repair_plan_rows(out, plan)


def cut(
    plan: Plan,
    job: PrepJob,
    source: ImageSource,
    numbers: Iterable[int],
    executor: Executor,
    at_once: int,
    max_skipped: float,
    progress: Progress,
) -> None:
    """Cut those of the parts that have no done record, or lacked images that are there now.

    Raises UserError, OSError, Interrupted.
    """
    out = Storage(job.out)
    allowed = skip_limit(max_skipped, out, plan.listed_images, plan.positives, plan.positives_of_images())
    allowed.check()
    listed_parts = list(numbers)
    missing = []
    for number, record in zip(listed_parts, read_parts(out, listed_parts), strict=True):
        if record is not None and any_there(missing_files_of(record), source):
            # With the images of another --images; until it is cut again the part is not done.
            out.remove(layout.part_record(number))
            record = None
        if record is None:
            missing.append(number)
        else:
            allowed.add(record)
    allowed.check()
    tasks = (task_of(plan, job, source, number) for number in missing)
    # Another process would have to be asked how far it is within a part.
    run = partial(run_part, tell=progress.image) if isinstance(executor, InlineExecutor) else run_part
    records = allowed.watch(run_tasks(executor, run, tasks, at_once))
    kept = len(listed_parts) - len(missing)
    images = np.diff(plan.first_image)
    total = int(images[listed_parts].sum())

    def counted() -> Iterator[tuple[int, int]]:
        nonlocal kept
        for record in records:
            kept += 1
            yield int(images[record.part]), record.crops

    try:
        progress.cutting(counted(), total, total - int(images[missing].sum()))
    except KeyboardInterrupt as error:
        clear_markers(out, missing)
        raise Interrupted(
            f"stopped: {kept:,} of {len(listed_parts):,} parts are kept, the same command goes on"
        ) from error


def task_of(plan: Plan, job: PrepJob, source: ImageSource, number: int) -> PartTask:
    """The task of one part."""
    images, crops = plan.part(number)
    return PartTask(
        number=number,
        plan=plan.digest,
        versions=shaping_versions(),
        out=job.out,
        source=job.images,
        quality=job.options.jpeg_quality,
        subsampling=job.options.subsampling,
        exif=job.options.exif,
        encode=job.options.encode,
        background=plan.background,
        format_version=plan.options.format_version,
        pixels=plan.options.stored,
        nodata=plan.options.missing_value,
        images=images,
        crops=crops,
        member_offsets=source.member_offsets(images.files),
        drawn_context=plan.options.drawn_context,
    )


def done_records(out: Storage, plan: PlanRecord) -> Mapping[int, PartRecord]:
    """The done records there are, by part."""
    found = zip(range(plan.parts), read_parts(out, range(plan.parts)), strict=True)
    return {number: record for number, record in found if record is not None}


def recut(
    out: str,
    annotations: str,
    images: str,
    parts: Iterable[int],
    workers: int,
    scheduler: str | None,
    max_skipped: float,
    progress: Progress,
    strays: Iterable[str] = (),
) -> Summary:
    """Cut ``parts`` and those that are missing again, and finish; ``strays`` are removed. Raises UserError, OSError."""
    storage = Storage(out)
    record = require_plan(storage)
    job = PrepJob(annotations, images, out, record.seed, options_of(record.options, storage.describe(layout.PLAN)))
    check_turbojpeg(job.options)
    raw = read_annotations(job.annotations, job.images)
    begun_as(storage, job, raw.sha256)
    source = ImageSource(job.images)
    source.check()
    check_place(storage)
    plan = plan_job(job, raw, source)
    with storage.locked(exclusive=True):
        begin(plan, storage)
        for name in (layout.DATASET, *strays, *map(layout.part_record, parts)):
            storage.remove(name)
        with open_executor(workers, scheduler) as (executor, at_once):
            cut(plan, job, source, range(plan.part_count), executor, at_once, max_skipped, progress)
        return finish(out, max_skipped)


def repair(
    out: str | Path,
    found: Iterable[Damage],
    *,
    annotations: str | Path | None = None,
    images: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Cut the damaged parts of a dataset again and finish; shards of no part are removed.

    Args:
        out: The dataset: a folder or a URL.
        found: What ``verify`` found.
        annotations: The annotations, where parts are to be cut again; manifests alone are made without them.
        images: The images, likewise.
        workers: Processes; all usable cores by default.
        progress: Receives what the run reports; the log by default.

    Raises:
        UserError: The annotations or images are not those of the dataset.
        OSError: A disk or store that fails.
    """
    out = location(out, "out")
    checked(workers, Count | None, "workers")
    storage, found = Storage(out), list(found)
    check_place(storage)
    parts = sorted({damage.part for damage in found if damage.part is not None})
    replan = any(damage.file == layout.PLAN_SKIPPED for damage in found)
    cutting = bool(parts) or replan
    if cutting and (annotations is None or images is None):
        raise UserError(
            f"{redacted(out)} can only be repaired by cutting parts again, and it does not hold where its annotations "
            "and images are: give --annotations and --images."
        )
    strays = [one.file for one in found if one.part is None and one.file.startswith(f"{layout.SHARDS}/")]
    if cutting and annotations is not None and images is not None:
        places = location(annotations, "annotations"), location(images, "images")
        # What was allowed to be skipped was decided when the parts were cut first.
        recut(out, *places, parts, workers or usable_cores(), None, 1.0, progress or Logged(), strays)
        return
    with storage.locked(exclusive=True):
        for name in (layout.DATASET, *strays):
            storage.remove(name)
        finish(out)

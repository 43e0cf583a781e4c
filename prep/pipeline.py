"""A run of prep: plan -> parts -> manifests, for every command that cuts (shards, retry-skipped, verify --repair).

Makes the plan, checks it against what the output was begun as, and cuts parts on an executor. Where parts are cut again
(``recut``), dataset.json goes first, so that nobody reads a dataset in change, then the parts' done records, so that a
run that is cut short leaves parts to be cut, which the same command, or ``shards``, then does.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from rich.console import Console

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.read import RawAnnotations, listed, read_annotations
from jigsaw_pretrain.formats.dataset import layout
from jigsaw_pretrain.formats.pixels import RGB8
from jigsaw_pretrain.prep import crops
from jigsaw_pretrain.prep.executors import open_executor, run_tasks
from jigsaw_pretrain.prep.images.pixel_format import choose_pixels
from jigsaw_pretrain.prep.images.source import ImageSource
from jigsaw_pretrain.prep.inputs import Inputs, remember
from jigsaw_pretrain.prep.manifests import finish
from jigsaw_pretrain.prep.parts import PartTask, run_part
from jigsaw_pretrain.prep.plan.forecast import Summary
from jigsaw_pretrain.prep.plan.plan import Plan, PlanOptions, make_plan, options_of
from jigsaw_pretrain.prep.records import (
    PartRecord,
    PlanRecord,
    check_agreement,
    publish_plan,
    read_parts,
    read_plan,
    recorded_options,
    repair_plan_rows,
    require_plan,
    shaping_versions,
    skip_limit,
)
from jigsaw_pretrain.prep.report import console
from jigsaw_pretrain.storage import Storage


@dataclass(frozen=True)
class PrepJob:
    """What to read, where to write, and what shapes the data."""

    annotations: str
    images: str
    out: str
    seed: int
    options: PlanOptions


def plan_job(job: PrepJob, raw: RawAnnotations, source: ImageSource) -> Plan:
    """The plan of a job, from its annotations as read; its images decide where no pixels are asked for.

    Raises UserError, StoreError.
    """
    annotations, options = listed(raw, source, job.options.exif), job.options
    if options.pixels is None:
        found = choose_pixels(annotations, source)
        options = replace(options, pixels=found.pixels)
        if found.note:
            Console(stderr=True).print(found.note, highlight=False, soft_wrap=True)
    if options.encode == "lossless" and options.stored != RGB8:
        other = ", or give --pixels rgb8" if options.stored.dtype == "uint8" else ""
        raise UserError(
            f"--encode lossless cuts JPEGs out of JPEGs, and the pixels of this dataset are {options.stored}, which "
            f"{options.stored.member} members keep without loss in any case: leave --encode out{other}."
        )
    return make_plan(annotations, options, job.seed)


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


def check_means(options: PlanOptions) -> None:
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
) -> int:
    """Cut those of the parts that have no done record; returns how many were cut. Raises UserError, OSError."""
    out = Storage(job.out)
    allowed = skip_limit(max_skipped, out, plan.listed_images)
    allowed.check()
    listed_parts = list(numbers)
    missing = []
    for number, record in zip(listed_parts, read_parts(out, listed_parts), strict=True):
        if record is None:
            missing.append(number)
        else:
            allowed.add(record)
    allowed.check()
    tasks = (task_of(plan, job, source, number) for number in missing)
    records = allowed.watch(run_tasks(executor, run_part, tasks, at_once))
    console.show_progress(Console(stderr=True), records, len(listed_parts), len(listed_parts) - len(missing))
    return len(missing)


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
    out: str, inputs: Inputs, parts: Iterable[int], workers: int, scheduler: str | None, max_skipped: float
) -> Summary:
    """Cut ``parts`` and those that are missing again, and finish. Raises UserError, OSError."""
    storage = Storage(out)
    plan_record = require_plan(storage)
    options = options_of(plan_record.options, storage.describe(layout.PLAN))
    job = PrepJob(inputs.annotations, inputs.images, out, plan_record.seed, options)
    check_means(options)
    raw = read_annotations(job.annotations, job.images)
    begun_as(storage, job, raw.sha256)
    source = ImageSource(job.images)
    source.check()
    plan = plan_job(job, raw, source)
    begin(plan, storage)
    remember(out, inputs)
    storage.remove(layout.DATASET)
    for number in parts:
        storage.remove(layout.part_record(number))
    with open_executor(workers, scheduler) as (executor, at_once):
        cut(plan, job, source, range(plan.part_count), executor, at_once, max_skipped)
    return finish(storage, max_skipped)

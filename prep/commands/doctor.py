"""``prep doctor``: what is wrong with a dataset, before any work is done on it; nothing is written.

Reads the annotations and every image's head (0.2 ms each locally), with ``--deep`` every pixel (5 ms each). Exit 0:
clean; 1: warnings, things that prep leaves out or that are likely mistakes; 2: it cannot be prepped. ``shards
--dry-run`` is quicker where only the plan is wanted.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from jigsaw_pretrain.cli import one_line_errors
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.coco import decode
from jigsaw_pretrain.formats.annotations.read import listed, read_annotations
from jigsaw_pretrain.prep.commands.checkup import check_images, image_findings
from jigsaw_pretrain.prep.commands.findings import (
    ERROR,
    NOTE,
    WARNING,
    Finding,
    box_findings,
    coco_findings,
    plan_findings,
)
from jigsaw_pretrain.prep.commands.shards import ANNOTATIONS_HELP, IMAGES_HELP
from jigsaw_pretrain.prep.images.pixel_format import found_pixels
from jigsaw_pretrain.prep.images.source import ImageSource
from jigsaw_pretrain.prep.plan.forecast import Summary, planned
from jigsaw_pretrain.prep.plan.plan import Options, Plan, make_plan
from jigsaw_pretrain.prep.report.console import plain, print_summary

STATES = ("clean", "warnings", "cannot be prepped")
SKIPPED_SHARE = 0.01


@click.command()
@click.option("--annotations", "annotation_file", required=True, metavar="FILE", help=ANNOTATIONS_HELP)
@click.option("--images", required=True, metavar="DIR", help=IMAGES_HELP)
@click.option(
    "--exif", type=click.Choice(("ignore", "apply")), default="ignore", show_default=True, help="As of shards."
)
@click.option("--seed", default=0, show_default=True, help="Of the plan whose totals are told.")
@click.option("--deep", is_flag=True, help="Decode every image, not only its head.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object in place of tables.")
def doctor(annotation_file: str, images: str, exif: str, seed: int, deep: bool, as_json: bool) -> None:
    """Say what is wrong with a dataset before any work. Exit 0: clean; 1: warnings; 2: cannot be prepped."""
    findings: list[Finding] = []
    summary: Summary | None = None
    try:
        with one_line_errors(annotation_file):
            for found in examine(annotation_file, images, Options(exif=exif), seed, deep):
                if isinstance(found, Summary):
                    summary = found
                else:
                    findings.append(found)
    except UserError as error:
        findings.append(Finding(ERROR, "cannot be prepped", 1, error.message))
    levels = {finding.level for finding in findings}
    state = 2 if ERROR in levels else 1 if WARNING in levels else 0
    if as_json:
        click.echo(json.dumps(report(state, findings, summary), indent=2))
    else:
        _print(Console(), state, findings, summary)
    sys.exit(state)


def examine(url: str, images: str, options: Options, seed: int, deep: bool) -> Iterator[Finding | Summary]:
    """All findings, and the plan's figures; raises UserError where it cannot be prepped."""
    raw = read_annotations(url, images)
    source = ImageSource(images)
    source.check()
    if raw.kind == "coco":
        yield from coco_findings(decode(raw.files[""], raw.source))
    annotations = listed(raw, source, options.exif)
    decided = found_pixels(annotations, source)
    if decided.note:
        yield Finding(NOTE, "pixels", 1, decided.note)
    plan = make_plan(annotations, replace(options, pixels=decided.pixels), seed)
    yield from box_findings(annotations, plan)
    found = check_images(annotations, source, options.exif, decided.pixels, deep)
    yield from image_findings(found, options.exif)
    yield from _usable(plan, set(found.trouble))
    summary = planned(plan)
    yield from plan_findings(summary)
    yield summary


def _usable(plan: Plan, trouble: set[str]) -> Iterator[Finding]:
    left_out = sum(row.image_file is not None and row.ordinal is None for row in plan.skipped)
    share = (len(trouble) + left_out) / max(1, plan.listed_images + left_out)
    if trouble.issuperset(plan.images.files):
        yield Finding(ERROR, "no usable image", len(trouble), "no image that has boxes can be used. Check --images")
    elif share > SKIPPED_SHARE:
        text = f"{share:.1%} of the images cannot be used: prep stops unless allowed more, with --max-skipped"
        yield Finding(WARNING, "share of unusable images", len(trouble) + left_out, text)


def report(state: int, findings: list[Finding], summary: Summary | None) -> dict[str, Any]:
    """What ``--json`` prints: status, exit_code, findings, and the plan's totals where there is a plan."""
    return {
        "status": STATES[state],
        "exit_code": state,
        "findings": [asdict(finding) for finding in findings],
        "totals": summary.totals() if summary else None,
    }


def _print(console: Console, state: int, findings: list[Finding], summary: Summary | None) -> None:
    if findings:
        listing = Table(title="findings", title_justify="left")
        for name in ("", "what", "count", "meaning", "such as"):
            listing.add_column(name, justify="right" if name == "count" else "left", overflow="fold")
        for finding in sorted(findings, key=lambda finding: (ERROR, WARNING, NOTE).index(finding.level)):
            texts = (finding.level, finding.check, f"{finding.count:,}", finding.text, ", ".join(finding.examples))
            listing.add_row(*(plain(text) for text in texts))
        console.print(listing)
    if summary is not None:
        print_summary(console, "plan", summary, summary.seconds or 0.0, estimated=True)
    console.print(f"doctor: {STATES[state]}", highlight=False)

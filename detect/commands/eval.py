"""`detect eval`: AP of a finished run, or of a COCO results file, by pycocotools.

A run is evaluated on its own validation set or on another one of the same classes; a results file needs no run and no
GPU. Writes results.json, ap.json and page.html where told (a run's folder by default).
"""

import json
from pathlib import Path

import click

from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.detect.annotations import GroundTruth, read_ground_truth
from jigsaw_pretrain.detect.commands import options
from jigsaw_pretrain.detect.evaluate import (
    AP_FILE,
    STATS,
    Evaluation,
    Score,
    ap_document,
    evaluate_model,
    read_results,
    save_evaluation,
    score,
)
from jigsaw_pretrain.detect.report import percent, write_page
from jigsaw_pretrain.detect.run import DetectorConfig, load_detector, read_config
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.read import Reading
from jigsaw_pretrain.storage import Storage
from jigsaw_pretrain.train.engine.distributed import DEVICES, Ranks, rank_zero_errors, start


@click.command("eval", cls=Command)
@click.option("--run", type=click.Path(path_type=Path), help="a finished run of `detect train`")
@click.option("--results", type=click.Path(path_type=Path), help="or a COCO results file, with --annotations")
@click.option("--annotations", help="as prep takes them; a run's own validation set otherwise")
@click.option("--images", help="their images: a folder, zip or tar; a path or a URL")
@options.exif
@options.ignored
@click.option("--out", type=click.Path(path_type=Path), help="folder for the files; the run's otherwise")
@click.option("--kind", default="bbox", show_default=True, type=click.Choice(["bbox", "segm"]), help="for --results")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(0))
@click.option("--device", default="auto", show_default=True, type=click.Choice(DEVICES))
def evaluate(
    run: Path | None,
    results: Path | None,
    annotations: str | None,
    images: str | None,
    exif: str,
    ignored: str,
    out: Path | None,
    kind: str,
    workers: int,
    device: str,
) -> None:
    """AP by size and class of a run or of a results file."""
    with rank_zero_errors():
        if (run is None) == (results is None):
            raise UserError("give either --run RUN or --results FILE")
        if results is not None:
            _evaluate_results(results, annotations, images, Reading(exif, ignored), out, kind)
            return
        assert run is not None
        _evaluate_run(run, annotations, images, Reading(exif, ignored), out or run, start(device), workers)


def _evaluate_results(
    results: Path, annotations: str | None, images: str | None, reading: Reading, out: Path | None, kind: str
) -> None:
    if annotations is None:
        raise UserError(f"{results} is scored against ground truth: give --annotations FILE")
    truth = read_ground_truth(annotations, images, reading)
    # An image that is listed twice is one image; detections may be of either entry.
    listed = truth.other_ids
    given = [{**one, "image_id": listed.get(one["image_id"], one["image_id"])} for one in read_results(results)]
    found = score(truth.truth, given, kind)
    click.echo(table(found))
    if out is not None:
        document = ap_document(Evaluation(found, None, [], 0.0)) if kind == "bbox" else {"bbox": None, "segm": found}
        Storage(out).publish(AP_FILE, json.dumps(document, indent=2, default=vars).encode() + b"\n")


def _evaluate_run(
    run: Path, annotations: str | None, images: str | None, reading: Reading, out: Path, ranks: Ranks, workers: int
) -> None:
    config = ranks.run_on_all(lambda: read_config(run))
    truth, folder = ranks.run_on_all(lambda: _validation(config, run, annotations, images, reading))
    model = ranks.run_on_all(lambda: load_detector(run, config, ranks.device))
    batch = max(1, config.recipe.data.batch // ranks.world)
    evaluation = evaluate_model(model, config.recipe, config.plan, truth, folder, ranks, workers, batch)
    assert evaluation is not None

    def write() -> None:
        save_evaluation(out, evaluation)
        write_page(out, truth, folder)

    ranks.run_on_rank_zero(write)
    ranks.log_rank_zero(table(evaluation.boxes))
    if evaluation.masks:
        ranks.log_rank_zero("masks\n" + table(evaluation.masks))


def _validation(
    config: DetectorConfig, run: Path, annotations: str | None, images: str | None, reading: Reading
) -> tuple[GroundTruth, str]:
    """The validation set given, or the run's own."""
    chosen = annotations or config.data["val_annotations"]
    folder = images or (None if annotations else config.data["val_images"])
    if chosen is None or folder is None:
        raise UserError(f"{run} was trained without a validation set: give --annotations FILE --images DIR")
    found = read_ground_truth(chosen, folder, reading)
    if found.categories != config.categories:
        raise UserError(f"{chosen} does not define the categories that {run} was trained on: give both the same list")
    return found, folder


def table(found: Score) -> str:
    """AP by size and class as text, in hundredths."""
    lines = ["  ".join(f"{name} {percent(found.stats[name])}" for name in STATS)]
    width = max((len(name) for name in found.classes), default=0)
    for name, one in found.classes.items():
        lines.append(
            f"  {name:<{width}}  {one['boxes']:6.0f} boxes  AP {percent(one['AP'])}  AP50 {percent(one['AP50'])}"
        )
    return "\n".join(lines)

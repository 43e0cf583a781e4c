"""Makes the README's pictures from a prepped dataset and a run on it.

    python docs/pictures.py --data OUT --run RUN        (after `make pretrain`: --data . --run runs/sample)

Writes docs/images/jigsaws.jpg, crops.jpg and fields.png in about ten seconds.
"""

import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.fonts import families
from jigsaw_pretrain.formats.dataset.dataset import open_dataset
from jigsaw_pretrain.formats.jigsaw import GROUPS, REGION_WORDS
from jigsaw_pretrain.prep.report.contact_sheet import sheet as contact_sheet
from jigsaw_pretrain.prep.report.page import choose, read_crops
from jigsaw_pretrain.storage.store import Storage
from jigsaw_pretrain.train.data.loader import JigsawLoader
from jigsaw_pretrain.train.engine.run_folder import RunFolder, open_trained
from jigsaw_pretrain.train.report.figures import draw_fields, spread
from jigsaw_pretrain.train.report.sheet import sheet
from jigsaw_pretrain.train.report.snapshots import ErfSnapshot, load_snapshot, snapshots

IMAGES = Path(__file__).parent / "images"
PAPER = (251, 251, 249)


def jigsaws(data: str, run: Path) -> Image.Image:
    """Four jigsaws, whose names are legible in a column of text, as the run's trainer saw them at its first steps."""
    _, recipe, _ = open_trained(RunFolder(run))
    dataset = open_dataset(data)
    batch = JigsawLoader(dataset, recipe.data, workers=0).first(4)
    return sheet(
        batch.images.numpy(),
        batch.labels.tolist(),
        batch.groups.tolist(),
        recipe.data.template,
        dataset.classes,
    )


def crops(data: str) -> Image.Image:
    """The contact sheets of the three groups, one above the other."""
    dataset, storage = open_dataset(data), Storage(data)
    columns = read_crops(dataset)
    sheets = []
    for group in GROUPS:
        some = choose(columns, columns["group"] == group, 8, dataset.description.seed)
        sheets.append(Image.open(io.BytesIO(contact_sheet(storage, some, 8))).convert("RGBA"))
    page = Image.new("RGB", (sheets[0].width, sum(one.height + 8 for one in sheets) - 8), PAPER)
    top = 0
    for one in sheets:
        page.paste(one, (0, top), one)
        top += one.height + 8
    return page


def fields(run: Path) -> bytes:
    """The regions' receptive fields at the first and the last refresh, as PNG."""
    _, recipe, _ = open_trained(RunFolder(run))
    found = snapshots(run, ErfSnapshot)
    rows = {f"step {step}": list(load_snapshot(found[step], ErfSnapshot).fields) for step in spread(list(found), 2)}
    with matplotlib.rc_context({"font.family": families()}):
        figure = Figure(figsize=(8, 4.3), layout="constrained", facecolor="white")
        draw_fields(figure.subplots(), rows, list(REGION_WORDS.values()), recipe.data.template.split)
        sink = io.BytesIO()
        figure.savefig(sink, format="png", dpi=110, metadata={"Software": None})
    return sink.getvalue()


@click.command(cls=Command)
@click.option("--data", required=True, help="A prepped dataset.")
@click.option("--run", required=True, type=click.Path(path_type=Path), help="A run on it.")
def main(data: str, run: Path) -> None:
    """Write docs/images."""
    IMAGES.mkdir(exist_ok=True)
    jigsaws(data, run).save(IMAGES / "jigsaws.jpg", quality=88)
    crops(data).save(IMAGES / "crops.jpg", quality=88)
    (IMAGES / "fields.png").write_bytes(fields(run))


if __name__ == "__main__":
    main()

"""Tables for the terminal: a plan's, a finished dataset's; and the progress of cutting. Nothing here is stored."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jigsaw_pretrain.cli import plain
from jigsaw_pretrain.formats.dataset import layout
from jigsaw_pretrain.formats.jigsaw import REGION_WORDS, SHAPES
from jigsaw_pretrain.formats.pixels import RGB8
from jigsaw_pretrain.prep.plan.forecast import JigsawFit, Summary
from jigsaw_pretrain.prep.plan.recipe import fitted_jigsaw, fitted_recipe, jigsaw_of, this_machine

MOST_CLASSES = 100
ENCODED = "crops not cut losslessly (decoded and encoded)"


def print_summary(
    console: Console,
    title: str,
    summary: Summary,
    seconds: float,
    estimated: bool,
    warnings: bool = True,
    recipe: str | None = None,
) -> None:
    """Print the tables, and warnings unless told not to; ``seconds``: taken, or expected where ``estimated``.

    recipe: the recipe that training will use, where that is not the one which prep fits to the dataset.
    """
    about = "about " if estimated else ""
    share = summary.negatives / summary.crops if summary.crops else 0.0
    facts = Table(title=title, show_header=False, title_justify="left")
    facts.add_column()
    facts.add_column(justify="right")
    facts.add_row("images with crops", f"{summary.images:,} of {summary.images_listed:,}")
    facts.add_row("crops", f"{summary.crops:,}")
    facts.add_row("background share", f"{share:.1%} ({summary.negatives:,} of {summary.negatives_wanted:,} wanted)")
    if summary.drawn_context is not None:
        facts.add_row("surroundings of objects", f"up to {summary.drawn_context:g}x, drawn by the trainer")
    facts.add_row("shards (tar files)", f"{summary.shards:,}")
    if summary.pixels != RGB8:
        facts.add_row("pixels", f"{summary.pixels} as {summary.pixels.member}")
    facts.add_row("bytes", f"{about}{readable_bytes(summary.bytes)}")
    facts.add_row("time", f"{about}{readable_time(seconds)}")
    listings = [*_listing("not used", "reason", summary.skipped), *_listing(ENCODED, "why", summary.encoded or {})]
    jigsaw = jigsaw_of(summary.sizes, recipe) if recipe else fitted_jigsaw(summary.sizes, this_machine())[0]
    regions = _regions(summary, jigsaw, recipe or layout.RECIPE)
    console.print(Group(facts, _classes(summary), regions, *listings))
    for _, warning in summary.warnings() if warnings else ():
        console.print(f"[yellow]warning:[/yellow] {plain(warning)}", highlight=False, soft_wrap=True)


def print_recipe(console: Console, summary: Summary) -> None:
    """Print the keys of OUT/recipe.toml, and why each is what it is."""
    table = Table(title="recipe.toml, fitted to this dataset and this machine", title_justify="left")
    table.add_column("key", no_wrap=True)
    table.add_column("value", justify="right")
    table.add_column("why")
    for key in fitted_recipe(summary, this_machine()).keys:
        table.add_row(f"{key.section}.{key.name}", str(key.value), plain(key.why))
    console.print(table)


def _classes(summary: Summary) -> Table:
    table = Table(title="crops by class and shape", title_justify="left")
    table.add_column("class")
    for name in (*SHAPES.values(), "all"):
        table.add_column(name, justify="right")
    rows = [*zip(map(plain, summary.classes), summary.counts.tolist(), strict=False)]
    hidden = rows[MOST_CLASSES:]
    for name, counts in rows[:MOST_CLASSES]:
        table.add_row(name, *(f"{count:,}" for count in (*counts, sum(counts))))
    if hidden:
        counts = [sum(column) for column in zip(*(counts for _, counts in hidden), strict=True)]
        table.add_row(f"{len(hidden):,} more classes", *(f"{count:,}" for count in (*counts, sum(counts))))
    background = summary.counts[-1].tolist()
    table.add_row("(background)", *(f"{count:,}" for count in (*background, sum(background))))
    table.add_section()
    table.add_row("all", *(f"{count:,}" for count in (*summary.by_group, summary.crops)))
    shares = [count / summary.crops if summary.crops else 0.0 for count in summary.by_group]
    table.add_row("share", *(f"{share:.1%}" for share in shares), "")
    return table


def _regions(summary: Summary, fit: JigsawFit, recipe: str) -> Table:
    size = "" if summary.drawn_context is None else ", surroundings of mean size"
    side, (low, high) = fit.template.size, fit.ratios
    how = {
        "crop": f"crops resized by {low:g} to {high:g}",
        "resize": "whole crops, resized to fit",
        "warp": "whole crops, stretched to fill",
    }[fit.fit]
    about = f"{side} x {side} pixels, {how}{size}"
    table = Table(title=f"what a jigsaw of four crops shows, by {plain(recipe)} ({about})", title_justify="left")
    for name in ("region", "pixels", "filled", "shows of the object (median)"):
        table.add_column(name, justify="left" if name == "region" else "right")
    for slot in fit.slots:
        name = REGION_WORDS[slot.name]
        table.add_row(name, f"{slot.width} x {slot.height}", f"{slot.fill:.0%}", f"{slot.shown:.0%}")
    return table


def _listing(title: str, header: str, counts: Mapping[str, int]) -> Iterator[RenderableType]:
    """A table of counts by reason, the commonest first; none where nothing is to be told."""
    if counts:
        table = Table(title=title, title_justify="left")
        table.add_column(header)
        table.add_column("count", justify="right")
        for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            table.add_row(plain(reason), f"{count:,}")
        yield table


class ConsoleProgress:
    """A bar of the images on standard error, with images/s, crops/s and the time left; keeps the ``summary``.

    It moves with each image that this process cuts, and as a part gets done that another one has cut.
    """

    def __init__(self) -> None:
        self.summary: Summary | None = None
        self._advance: Callable[[int], None] | None = None
        self._ahead = 0

    def cutting(self, cut: Iterable[tuple[int, int]], images: int, done: int) -> None:
        """Take in images and crops of each part as it gets done."""
        bar = Progress(
            # What a narrow terminal cuts off is what matters least.
            TextColumn("cutting {task.completed:,.0f}/{task.total:,.0f} images"),
            TimeRemainingColumn(),
            BarColumn(20),
            TextColumn("{task.fields[rate]}"),
            console=Console(stderr=True),
        )
        with bar:
            task = bar.add_task("", total=images, completed=done, rate="")
            self._ahead, self._advance = 0, partial(bar.advance, task)
            new_images = crops = 0
            for more, made in cut:
                new_images, crops = new_images + more, crops + made
                elapsed = max(bar.tasks[0].elapsed or 0.0, 1e-6)
                rate = f"{new_images / elapsed:,.0f} images/s {crops / elapsed:,.0f} crops/s"
                bar.update(task, advance=more - self._ahead, rate=rate, refresh=True)
                self._ahead = 0
        self._advance = None

    def image(self) -> None:
        """Move the bar by one image, ahead of its part."""
        if self._advance is not None:
            self._ahead += 1
            self._advance(1)

    def finished(self, summary: Summary) -> None:
        """Keep the figures, for the command to print."""
        self.summary = summary


def readable_bytes(count: int) -> str:
    """``12.3 MB``."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"


def readable_time(seconds: float) -> str:
    """``8.4 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

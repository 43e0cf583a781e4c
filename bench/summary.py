"""All goals that the scripts of bench/ have measured, from bench/results/*.json: measured, goal, met or missed.

    python bench/summary.py

A goal is any object in such a file that has ``goal`` and ``met``, wherever it lies: see bench/timing.py.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
from rich.console import Console
from rich.table import Table

from bench.timing import RESULTS


def goals_in(found: Any, name: str = "") -> Iterator[tuple[str, float, str, bool, str]]:
    """What is measured, the figure, its goal, whether it is met, and a note; ``name`` is the key that led here."""
    if isinstance(found, list):
        found = dict(enumerate(found))
    if not isinstance(found, dict):
        return
    if found.get("goal") is not None and found.get("met") is not None:
        figure = found["measured"] if "measured" in found else found["ratio"]
        yield str(found.get("what", name)), figure, found["goal"], found["met"], found.get("note", "")
    for key, inner in found.items():
        yield from goals_in(inner, str(key))


@click.command()
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, help="Folder of the JSON files.")
def main(results: Path) -> None:
    """Print one table of all goals; the status says nothing of them."""
    table = Table(title="goals")
    for head in ("script", "what", "measured", "goal", ""):
        table.add_column(head, justify="right" if head in ("measured", "goal") else "left")
    rows = [
        (file.stem, *row) for file in sorted(results.glob("*.json")) for row in goals_in(json.loads(file.read_text()))
    ]
    for script, what, figure, goal, met, note in rows:
        table.add_row(
            script, what, f"{figure:,.4g}", goal, ("met" if met else "missed") + (f": {note}" if note else "")
        )
    Console().print(table)
    click.echo(f"{sum(row[4] for row in rows)} of {len(rows)} goals met")


if __name__ == "__main__":
    main()

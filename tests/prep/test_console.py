"""What prep shows on a terminal: the table of what jigsaws show, and the progress of cutting."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from jigsaw_pretrain.prep import pipeline
from jigsaw_pretrain.prep.report.console import ConsoleProgress
from tests.helpers.prepped import Drawn, Run

# Words of this project's own, which a newcomer does not know.
TERMS = re.compile(r"\b(groups?|slots?|lanes?|template|parts?|strategy)\b")


def test_the_screen_speaks_everyday_words_and_ends_with_what_to_type(drawn: Drawn, prepped: Run) -> None:
    drawn.add("0.jpg", (200, 160), [[10, 10, 80, 90]])
    planned, made = prepped("--dry-run", "--recipe", "sample"), prepped("--recipe", "sample")
    for result in (planned, made):
        shown = " ".join(result.output.split())
        assert TERMS.search(shown.replace("data.template_", "")) is None, shown
        assert "object (median)" in shown and "large square" in shown
    assert "--dry-run" not in planned.output.split("next", 1)[1] and "jigsaw-prep split" in planned.output
    out = drawn.folder / "out"
    for command in ("jigsaw-prep report", "jigsaw-train preview", "jigsaw-train pretrain"):
        (line,) = [line for line in made.output.splitlines() if f"{command} " in line]
        assert str(out) in line


@pytest.mark.parametrize("width", [80, 140])
def test_progress_counts_images_within_the_terminals_width(
    drawn: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    for number in range(4):
        drawn.add(f"{number}.jpg", (64, 48), [[2, 2, 30, 30]])
    told: list[int] = []

    class Counting(ConsoleProgress):
        def image(self) -> None:
            super().image()
            told.append(1)

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr("jigsaw_pretrain.prep.report.console.Console", lambda **_: console)
    pipeline.shards(
        str(drawn.write()),
        str(drawn.folder / "images"),
        str(tmp_path / "out"),
        workers=1,
        crops_per_part=2,
        negatives_per_positive=0,
        progress=Counting(),
    )
    assert len(told) == 4
    lines = re.split(r"[\r\n]", re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", screen.getvalue()))
    assert any(line.startswith("cutting 2/4 images") for line in lines), lines
    assert any(line.startswith("cutting 4/4 images") and "images/s" in line for line in lines), lines
    # An image that was told of is not counted again with its part.
    assert not any(re.match(r"cutting ([5-9])/4", line) for line in lines)
    assert max(map(len, lines)) <= width

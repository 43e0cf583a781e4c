"""Users without a home, and terminals that cannot show a class's name: nothing ends for want of these."""

import json
import pwd
from pathlib import Path
from typing import NoReturn

import pytest
from click.testing import CliRunner

from jigsaw_pretrain.detect.cli import main as detect
from jigsaw_pretrain.formats.images.source import ImageSource
from jigsaw_pretrain.prep.cli import main as prep
from jigsaw_pretrain.train.cli import main as train
from tests.helpers.prepped import Drawn
from tests.helpers.settings import sets


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whom neither HOME nor the table of users knows, as in a container with an arbitrary user id."""

    def unknown(number: int) -> NoReturn:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(RuntimeError):
        Path.home()


def dataset(drawn: Drawn) -> tuple[list[str], str]:
    """The options that name a dataset whose classes have letters of many scripts, and where its crops go."""
    drawn.categories = [{"id": 3, "name": "\u6c7d\u8f66 \U0001f697"}, {"id": 7, "name": "\u017elu\u0165"}]
    for number in range(4):
        # A box of each group.
        drawn.add(f"\u00fc{number}.jpg", (120, 90), [(5, 5, 40, 40), (60, 5, 50, 20), (60, 30, 20, 50)])
    return ["--annotations", str(drawn.write()), "--images", str(drawn.folder / "images")], str(drawn.folder / "out")


def run(group: object, *words: str, charset: str = "utf-8") -> str:
    result = CliRunner(charset=charset).invoke(group, words, catch_exceptions=False)  # type: ignore[arg-type]
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.usefixtures("homeless")
def test_no_home_ends_nothing_of_local_data(drawn: Drawn) -> None:
    named, out = dataset(drawn)
    run(prep, "shards", *named, "--out", out, "--workers", "1")
    run(prep, "verify", "--out", out)
    size = sets("data.batch=4", "data.lanes=2", "data.template_size=64", "data.template_split=20")
    told = run(train, "digest", "--data", out, *size, "--steps", "2").splitlines()
    assert [line.split()[0] for line in told if "loading" not in line] == ["0", "1"]
    assert ImageSource(named[-1]).files()
    run(detect, "subset", *named, "--images-limit", "2", "--out", str(drawn.folder / "subset.json"))


@pytest.mark.parametrize("charset", ["ascii", "latin-1"])
def test_what_a_terminal_cannot_show_is_replaced_and_never_the_status(drawn: Drawn, charset: str) -> None:
    named, out = dataset(drawn)
    shown = run(prep, "shards", *named, "--out", out, "--workers", "1", charset=charset)
    assert "?" in shown
    run(prep, "shards", *named, "--out", out, "--dry-run", charset=charset)
    run(prep, "verify", "--out", out, charset=charset)
    run(prep, "status", "--out", out, charset=charset)
    run(prep, "report", "--out", out, charset=charset)
    result = CliRunner(charset=charset).invoke(prep, ["doctor", *named])
    assert result.exit_code in (0, 1), result.output
    report = CliRunner(charset=charset).invoke(prep, ["doctor", *named, "--json"])
    assert json.loads(report.stdout)["exit_code"] == report.exit_code
    found = [
        {"image_id": one["image_id"], "category_id": one["category_id"], "bbox": one["bbox"], "score": 0.5}
        for one in drawn.annotations
    ]
    (drawn.folder / "results.json").write_text(json.dumps(found))
    results = ["--annotations", named[1], "--results", str(drawn.folder / "results.json")]
    assert "AP 100.0" in run(detect, "eval", *results, charset=charset)
    size = sets("data.batch=4", "data.lanes=2", "data.template_size=64", "data.template_split=20")
    run(train, "digest", "--data", out, *size, "--steps", "1", charset=charset)

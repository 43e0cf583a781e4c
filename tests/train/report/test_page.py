"""The page that a run keeps up to date."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.engine.run_folder import describe_run
from jigsaw_pretrain.train.report.page import RunPage, page
from tests.helpers.commands import call
from tests.helpers.jobs import ORIGIN, small_job, synthetic


def recorded(drawn: RunPage, job_folder: Path) -> None:
    """Have the page note a step."""
    batch = next(iter(synthetic(small_job(job_folder))(0, 1)))
    drawn.on_step(batch, batch.labels, torch.zeros_like(batch.labels))


@pytest.mark.slow(seconds=6)
def test_a_process_of_its_own_draws_the_page_at_most_once_a_minute(tmp_path: Path) -> None:
    drawn = RunPage(tmp_path, small_job(tmp_path).recipe, ORIGIN)
    recorded(drawn, tmp_path)
    assert "jigsaws" in drawn.on_save(1, last=False)
    drawn.write(1)
    assert not (tmp_path / "report.html").exists()
    recorded(drawn, tmp_path)
    assert drawn.on_save(2, last=False) == {}
    drawn.write(2)
    assert [path.name for path in (tmp_path / "looks").iterdir()] == ["answers-00000001.npz"]
    drawn._wait()
    assert "no step was taken" in (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").unlink()
    drawn._drawn = -math.inf
    assert "jigsaws" in drawn.on_save(3, last=False)
    drawn.write(3)
    drawing = drawn._drawing
    recorded(drawn, tmp_path)
    assert "jigsaws" in drawn.on_save(4, last=True)
    drawn.write(4)
    job = small_job(tmp_path)
    describe_run(job.folder, job.recipe, job.origin, {})
    drawn.on_end(4)
    assert drawing is not None and drawing.returncode == -signal.SIGTERM, "the end waits for an older page"
    assert (tmp_path / "report.html").exists() and len(list((tmp_path / "looks").iterdir())) == 3


def test_a_folder_that_is_no_run_gets_no_page(tmp_path: Path) -> None:
    result = call("report", "--run", tmp_path)
    assert result.exit_code == 2 and "holds no run" in result.output and not list(tmp_path.iterdir())


def test_a_run_of_a_version_without_sections_has_no_page(tmp_path: Path) -> None:
    flat = {"format": 1, "recipe": {"seed": 0, "batch": 4, "steps": 3}, "classes": ["a", "b"], "dataset": "0" * 64}
    (tmp_path / "run.json").write_text(json.dumps(flat))
    with pytest.raises(UserError, match="run.json .*sections"):
        page([tmp_path])

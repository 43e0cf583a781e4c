"""The page that a run keeps up to date."""

from pathlib import Path

import pytest
import torch

from jigsaw_pretrain.train.report.page import RunPage
from tests.helpers.jobs import ORIGIN, small_job, synthetic


def recorded(page: RunPage, job_folder: Path) -> None:
    """Have the page note a step."""
    batch = next(iter(synthetic(small_job(job_folder))(0, 1)))
    page.on_step(batch, batch.labels, torch.zeros_like(batch.labels))


@pytest.mark.slow(seconds=6)
def test_a_process_of_its_own_draws_the_page_at_most_once_a_minute(tmp_path: Path) -> None:
    page = RunPage(tmp_path, small_job(tmp_path).recipe, ORIGIN)
    recorded(page, tmp_path)
    assert "jigsaws" in page.on_save(1, last=False)
    page.write(1)
    assert not (tmp_path / "report.html").exists()
    recorded(page, tmp_path)
    assert page.on_save(2, last=False) == {}
    page.write(2)
    assert [path.name for path in (tmp_path / "looks").iterdir()] == ["answers-00000001.npz"]
    page._wait()
    assert "no step was taken" in (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").unlink()
    assert "jigsaws" in page.on_save(3, last=True)
    page.write(3)
    page.on_end(3)
    assert (tmp_path / "report.html").exists() and len(list((tmp_path / "looks").iterdir())) == 2

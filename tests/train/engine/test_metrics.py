import json
from pathlib import Path

import pytest
import torch

from jigsaw_pretrain.train.engine.distributed import Ranks
from jigsaw_pretrain.train.engine.loggers import ProgressLine, figures
from jigsaw_pretrain.train.engine.metrics import MetricsWindow, Row, digest_file, metrics_file


def row(step: int, loss: float = 1.0) -> Row:
    return Row(step, loss, (0.5, 0.25, 1.0, 0.25), 0.1, 12.3456, 0.25, 0)


def test_a_resumed_run_cuts_its_files_back_to_whole_lines_before_it(tmp_path: Path) -> None:
    metrics = metrics_file(tmp_path / "metrics.jsonl")
    metrics.cut_back(3)  # nothing there yet
    metrics.append([row(step).to_json() for step in range(5)])
    with metrics.path.open("a") as file:
        file.write('{"step": 2, "lo')
    metrics.cut_back(3)
    assert [json.loads(line)["step"] for line in metrics.path.read_text().splitlines()] == [0, 1, 2]
    digests = digest_file(tmp_path / "digest.txt")
    digests.append(["9 a b", "10 c d"])
    digests.cut_back(10)
    assert digests.path.read_text() == "9 a b\n"


def test_a_window_averages_over_images() -> None:
    window = MetricsWindow(Ranks())
    window.add(7, 0.1, torch.tensor(2.0), torch.tensor([4, 0, 2, 1]), 4, 1, 0.0)
    window.add(8, 0.2, torch.tensor(3.0), torch.tensor([0, 0, 0, 2]), 2, 0, 0.0)
    first, second = window.flush()
    assert (first.step, first.loss, first.accuracy, first.lr, first.replaced) == (7, 2.0, (1.0, 0.0, 0.5, 0.25), 0.1, 1)
    assert (second.step, second.loss, second.accuracy[3]) == (8, 3.0, 1.0)
    assert first.images_per_second == second.images_per_second > 0
    assert window.flush() == []


def test_plain_lines_come_at_the_end_and_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ProgressLine(0, 3, True) as progress:
        progress.show([row(0)])
        progress.show([])
        progress.show([row(1), row(2, loss=2.0)])
    assert capsys.readouterr().out == f"step 3/3  {figures([row(1), row(2, loss=2.0)])}\n"
    assert figures([row(1), row(2, loss=2.0)]) == ("loss 1.500  accuracy 50.0%  lr 0.1  12.3 images/s  data wait 25%")
    with ProgressLine(0, 3, False) as progress:
        progress.show([row(2)])
    assert capsys.readouterr().out == ""

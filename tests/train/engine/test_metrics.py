"""Files of metrics, and averages over a window."""

import json
from pathlib import Path

import torch

from jigsaw_pretrain.train.engine.distributed import Ranks
from jigsaw_pretrain.train.engine.metrics import MetricsWindow, digest_file, metrics_file
from tests.helpers.jobs import metrics_row


def test_a_resumed_run_cuts_its_files_back_to_whole_lines_before_it(tmp_path: Path) -> None:
    metrics = metrics_file(tmp_path / "metrics.jsonl")
    metrics.cut_back(3)  # nothing there yet
    metrics.append([metrics_row(step).to_json() for step in range(5)])
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

"""Files of metrics, and averages over a window."""

import json
from pathlib import Path

import pytest
import torch

from jigsaw_pretrain.train.engine.distributed import Ranks
from jigsaw_pretrain.train.engine.metrics import MetricsWindow, StepMetrics, digest_file, metrics_file
from tests.helpers.jobs import metrics_row
from tests.helpers.streams import FakeStreams


def test_a_resumed_run_cuts_its_files_back_to_whole_lines_before_it(tmp_path: Path) -> None:
    metrics = metrics_file(tmp_path / "metrics.jsonl")
    metrics.cut_back(3)  # nothing there yet
    metrics.append([json.dumps(metrics_row(step)) for step in range(5)])
    with metrics.path.open("a") as file:
        file.write('{"step": 2, "lo')
    metrics.cut_back(3)
    assert [json.loads(line)["step"] for line in metrics.path.read_text().splitlines()] == [0, 1, 2]
    digests = digest_file(tmp_path / "digest.txt")
    digests.append(["9 a b", "10 c d"])
    digests.cut_back(10)
    assert digests.path.read_text() == "9 a b\n"


def test_lines_are_never_written_where_a_link_leads(tmp_path: Path) -> None:
    for name in ("unmade", "there"):
        (tmp_path / "there").write_text('{"step": 0}\n')
        metrics = metrics_file(tmp_path / "metrics.jsonl")
        metrics.path.unlink(missing_ok=True)
        metrics.path.symlink_to(tmp_path / name)
        metrics.cut_back(1)
        metrics.append(['{"step": 1}'])
        assert not (tmp_path / "unmade").exists() and (tmp_path / "there").read_text() == '{"step": 0}\n'


def test_the_last_row_is_replaced_alone(tmp_path: Path) -> None:
    metrics = metrics_file(tmp_path / "metrics.jsonl")
    metrics.append(['{"step": 0}', '{"step": 1}'])
    metrics.replace_last('{"step": 1, "validation": 2}')
    assert metrics.path.read_text() == '{"step": 0}\n{"step": 1, "validation": 2}\n'


def test_a_window_averages_over_samples() -> None:
    window = MetricsWindow(Ranks())
    hits, more = torch.tensor([4, 0, 2, 1]), torch.tensor([0, 0, 0, 2])
    window.add(7, StepMetrics({"loss": torch.tensor(8.0), "hits": hits}, 4, 0.1, {"replaced": 1}), 0.0)
    window.add(8, StepMetrics({"loss": torch.tensor(6.0), "hits": more}, 2, 0.2, {"replaced": 0}), 0.0)
    found = window.flush()
    first, second = found.steps
    assert (first.step, first.means["loss"], first.means["hits"]) == (7, [2.0], [1.0, 0.0, 0.5, 0.25])
    assert (first.lr, first.counts) == (0.1, {"replaced": 1})
    assert (second.step, second.means["loss"], second.means["hits"][3], second.lr) == (8, [3.0], 1.0, 0.2)
    assert found.samples_per_second > 0 and 0 <= found.data_wait <= 1
    assert window.flush().steps == ()


def test_a_gpu_waits_where_it_has_nothing_to_do_between_steps() -> None:
    streams = FakeStreams()
    window = MetricsWindow(Ranks(streams=streams))
    sums = {"loss": torch.tensor(1.0)}
    # Its second batch lies there before it is through with the first, whatever the host waited for.
    for step, (arrived, done) in enumerate([(100.0, 300.0), (300.0, 350.0), (355.0, 360.0)]):
        streams.milliseconds = arrived
        metrics = StepMetrics(sums, 4, 0.1, arrived=streams.event())
        streams.milliseconds = done
        window.add(step, metrics, waited=99.0)
    found = window.flush()
    assert found.data_wait * found.seconds == pytest.approx(0.105)
    # After what is not training the clock begins anew.
    streams.milliseconds = 9_000.0
    window.restart()
    window.add(3, StepMetrics(sums, 4, 0.1, arrived=streams.event()), 0.0)
    assert window.flush().data_wait == 0

"""Batches on their way to a GPU: what is asked of it, in which order, and that no memory is written to too early."""

from types import SimpleNamespace

import pytest
import torch

from jigsaw_pretrain.formats.dataset.dataset import Dataset, open_dataset
from jigsaw_pretrain.train.data.device import CudaStreams, DeviceCopies
from jigsaw_pretrain.train.data.loader import JigsawLoader
from jigsaw_pretrain.train.recipe import DataOptions
from tests.helpers.streams import FakeStreams
from tests.helpers.tiny import make_dataset

OPTIONS = DataOptions(batch=4, lanes=4, template_size=96, template_split=32)
STEPS = 12
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("device")
    make_dataset(folder, {"S": [30], "T": [10], "W": [12]})
    return open_dataset(str(folder))


@pytest.mark.parametrize(("workers", "registers"), [(0, True), (2, True), (2, False)])
def test_batches_arrive_whole_though_the_device_lags_behind(dataset: Dataset, workers: int, registers: bool) -> None:
    expected = [batch.images.clone() for batch in JigsawLoader(dataset, OPTIONS, workers=0, stop_step=STEPS)]
    streams = FakeStreams(registers, lags=True)
    loader = JigsawLoader(dataset, OPTIONS, workers=workers, stop_step=STEPS, streams=streams)
    to_device, found = DeviceCopies(CPU, streams), []
    for batch in loader:
        (images, labels), arrived = to_device(batch.images, batch.labels)
        found.append((images, labels, batch.labels))
    assert arrived is not None
    arrived.synchronize()
    assert all(torch.equal(images, one) for (images, _, _), one in zip(found, expected, strict=True))
    assert all(torch.equal(labels, own) for _, labels, own in found)
    # The host waits for a batch before it asks for the next copy, and for nothing else.
    order = [call for call in streams.calls if call in ("copy", "event", "wait")]
    assert order == [*["copy", "event", "wait"] * STEPS]
    # Labels are pinned at each step; images only where the workers' memory cannot be locked.
    own = workers == 0 or not registers
    assert streams.calls.count("pin") == STEPS + 3 * own
    assert streams.calls.count("register") == (workers > 0)
    assert streams.calls.count("unregister") == (not own)


def test_locked_memory_is_given_back_where_a_loader_is_closed_early(dataset: Dataset) -> None:
    streams = FakeStreams()
    loader = JigsawLoader(dataset, OPTIONS, workers=1, streams=streams)
    next(iter(loader))
    loader.close()
    loader.close()
    assert streams.calls.count("unregister") == 1


def test_cuda_is_asked_for_sleeping_events_a_side_stream_and_registered_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            calls.append(("computing waits for", other.name))

        def __enter__(self) -> None:
            calls.append("side")

        def __exit__(self, *_: object) -> None:
            calls.append("computing")

    computing = Stream("computing")
    failing, working = (SimpleNamespace(cudaHostRegister=lambda *_, error=error: error) for error in (2, 0))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: calls.append(("used by", stream.name)))
    streams = CudaStreams(CPU)
    assert torch.equal(streams.copy([torch.arange(3)])[0], torch.arange(3))
    assert calls == ["side", "computing", ("computing waits for", "side"), ("used by", "computing")]

    made: dict[str, bool] = {}
    event = SimpleNamespace(record=lambda stream: calls.append(("recorded on", stream.name)))

    def sleeping(**options: bool) -> SimpleNamespace:
        made.update(options)
        return event

    monkeypatch.setattr(torch.cuda, "Event", sleeping)
    assert streams.event() is event and calls[-1] == ("recorded on", "computing")
    # Waiting for one that is not blocking keeps a core busy, which the workers need.
    assert made == {"enable_timing": True, "blocking": True}

    monkeypatch.setattr(torch.cuda, "cudart", lambda: working)
    assert streams.register(torch.zeros(2))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: failing)

    def check(*_: object, **__: object) -> None:
        calls.append("checked")
        raise RuntimeError("CUDA error: invalid argument")

    monkeypatch.setattr(torch, "ones", check)
    # The error that CUDA keeps is taken before it meets the next kernel.
    assert not streams.register(torch.zeros(2)) and calls[-1] == "checked"

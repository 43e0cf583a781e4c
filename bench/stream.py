"""Streaming from an S3 server on loopback beside the same shards on the local disk: jigsaws and bytes a second.

The server runs in a process of its own (moto, which is slow: its MB/s are a floor for any real store) behind a proxy
that can add latency. Arms: local folder; S3 with an empty cache; the same with 50 ms of added latency; S3 with a full
cache. One loader, two workers; the arms take turns, medians over the rounds. The first step, which waits for the first
shards, is reported by itself, since a long run pays it once.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

from tests.servers import FaultyProxy, s3_server
from tests.train.stores import upload
from tests.train.tiny import make_dataset
from train.access import Access
from train.loader import JigsawLoader
from train.streams import StreamOptions
from train.template import Template

LATENCY = 0.05


def serve(folder: str, pipe: Connection) -> None:
    """Serve the dataset until told to stop; a float sent sets the latency."""
    with s3_server() as store, FaultyProxy(store.endpoint) as proxy:
        upload(store, Path(folder), "set")
        pipe.send((store.bucket, store.environment(proxy.url)))
        while (latency := pipe.recv()) is not None:
            proxy.latency = latency


def measure(url: str, cache: Path | None, steps: int) -> tuple[float, float, float]:
    """Seconds to the first batch, jigsaws a second from there on, MB of shards a second over all."""
    access = Access(cache=cache)
    began = time.perf_counter()
    dataset = access.open_dataset(url)
    loader = JigsawLoader(dataset, Template(224, 64), OPTIONS, workers=2, stop_step=steps, access=access)
    batches = iter(loader)
    next(batches)
    first = time.perf_counter()
    for _ in batches:
        pass
    ended = time.perf_counter()
    megabytes = sum(shard.bytes for shard in dataset.shards) / 1e6
    return first - began, OPTIONS.batch * (steps - 1) / (ended - first), megabytes / (ended - began)


OPTIONS = StreamOptions(batch=64, lanes=8)


def main() -> None:
    """Measure, print a table, write bench/results/stream.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shards", type=int, default=16, help="shards a group")
    parser.add_argument("--crops", type=int, default=120, help="crops a shard")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        counts = [options.crops] * options.shards
        make_dataset(folder / "data", {"S": counts, "T": counts, "W": counts}, low=40, high=250)
        ours, theirs = multiprocessing.Pipe()
        server = multiprocessing.get_context("spawn").Process(target=serve, args=(str(folder / "data"), theirs))
        server.start()
        bucket, environment = ours.recv()
        os.environ.update(environment)
        url = f"s3://{bucket}/set"
        measure(url, folder / "warm", options.steps)
        found: dict[str, list[tuple[float, float, float]]] = {}
        for number in range(options.rounds):
            arms = {
                "local": (str(folder / "data"), None, 0.0),
                "s3, empty cache": (url, folder / f"cold-{number}", 0.0),
                "s3, empty cache, 50 ms": (url, folder / f"late-{number}", LATENCY),
                "s3, full cache": (url, folder / "warm", 0.0),
            }
            for name, (where, cache, latency) in arms.items():
                ours.send(latency)
                found.setdefault(name, []).append(measure(where, cache, options.steps))
        ours.send(None)
        server.join()
    base = statistics.median(speed for _, speed, _ in found["local"])
    print(f"{'arm':26} {'first batch':>12} {'jigsaws/s':>10} {'of local':>9} {'shard MB/s':>11}")
    results = {}
    for name, rounds in found.items():
        first, speed, rate = (statistics.median(values) for values in zip(*rounds, strict=True))
        results[name] = {"first_batch_s": first, "jigsaws_per_s": speed, "of_local": speed / base, "mb_per_s": rate}
        print(f"{name:26} {first:10.2f} s {speed:10.0f} {speed / base:9.2f} {rate:11.1f}")
    out = Path("bench/results/stream.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"options": vars(options), "arms": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""The relay that makes requests late."""

import time
import urllib.request
from pathlib import Path

from bench.stores import Relay
from tests.helpers.servers import file_server


def test_a_relay_passes_everything_on_late(tmp_path: Path) -> None:
    content = bytes(range(256)) * 20_000
    (tmp_path / "file").write_bytes(content)
    with file_server(tmp_path) as url:
        relay = Relay(url)
        assert urllib.request.urlopen(f"{relay.url}/file").read() == content
        relay.latency = 0.2
        began = time.monotonic()
        assert urllib.request.urlopen(f"{relay.url}/file").read() == content
        assert time.monotonic() - began >= 0.2

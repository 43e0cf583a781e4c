"""The tests' own servers: each fault is what it says, and the log tells."""

from pathlib import Path

import pytest
import s3fs
import urllib3

from tests.helpers.servers import FaultyProxy, file_server, s3_server, share


@pytest.mark.slow(seconds=4)
def test_a_store_behind_a_proxy() -> None:
    with s3_server() as store, FaultyProxy(store.endpoint, share(0.05, seed=1)) as proxy:
        # Instances are cached by their options; another test may have used the same port.
        files = s3fs.S3FileSystem(**store.options(proxy.url), skip_instance_cache=True)
        for number in range(20):
            files.pipe_file(f"{store.bucket}/{number}", b"x" * number)
        assert [len(files.cat_file(f"{store.bucket}/{number}")) for number in range(20)] == list(range(20))
        assert len(proxy.log) >= 40 and any(entry.fault for entry in proxy.log)


@pytest.mark.parametrize("fault", ["500", "reset", "lost", "short", "stall", None])
def test_faults(tmp_path: Path, fault: str | None) -> None:
    (tmp_path / "a").write_bytes(b"abcdef")
    with file_server(tmp_path) as url, FaultyProxy(url, lambda *_: fault, latency=0.01, stall=0.1) as proxy:
        pool = urllib3.PoolManager(retries=False)
        if fault in ("500", None):
            answer = pool.request("GET", f"{proxy.url}/a")
            assert (answer.status, answer.data) == ((500, b"out of order") if fault else (200, b"abcdef"))
        else:
            with pytest.raises(urllib3.exceptions.HTTPError):
                pool.request("GET", f"{proxy.url}/a")
    assert [(entry.method, entry.path, entry.fault) for entry in proxy.log] == [("GET", "/a", fault)]
    assert proxy.log[0].ended - proxy.log[0].begun >= 0.01

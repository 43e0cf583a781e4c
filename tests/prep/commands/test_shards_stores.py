"""Object stores: the same tree from everywhere, also where requests fail."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from jigsaw_pretrain.prep.commands.finish import finish_command
from jigsaw_pretrain.prep.commands.status import status
from jigsaw_pretrain.prep.commands.verify import verify
from jigsaw_pretrain.storage import retries
from jigsaw_pretrain.storage.store import Storage
from tests.helpers.prepped import Drawn, Small, invoke, run_shards, tree
from tests.helpers.servers import FaultyProxy, Store, s3_server, share
from tests.helpers.settings import SOAK


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with s3_server() as found:
        reach(found, monkeypatch)
        yield found
    s3fs.S3FileSystem.clear_instance_cache()


def reach(store: Store, monkeypatch: pytest.MonkeyPatch, endpoint: str | None = None) -> None:
    """Let drivers find the store, by the environment alone."""
    for name, value in store.environment(endpoint).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()


def upload(small: Small, store: Store) -> None:
    files = s3fs.S3FileSystem()
    files.pipe_file(f"{store.bucket}/a.json", small.annotations.read_bytes())
    for path in small.images.iterdir():
        files.pipe_file(f"{store.bucket}/pictures/{path.name}", path.read_bytes())


def download(store: Store, prefix: str) -> dict[str, bytes]:
    files = s3fs.S3FileSystem(skip_instance_cache=True, **store.options())
    root = f"{store.bucket}/{prefix}/"
    return {path.removeprefix(root): files.cat_file(path) for path in files.find(root)}


def on_store(small: Small, store: Store, *extra: str) -> list[str]:
    url = f"s3://{store.bucket}"
    parts = ("--crops-per-part", str(small.crops_per_part), "--workers", "1")
    return ["--annotations", f"{url}/a.json", "--images", f"{url}/pictures", "--out", f"{url}/out", *parts, *extra]


@pytest.mark.slow(seconds=13)
def test_everything_on_a_store_that_fails(small: Small, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(small, store)
    faults = ("500", "503", "reset", "lost", "short")
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.02)
    with FaultyProxy(store.endpoint, share(0.05, faults, seed=3)) as proxy:
        reach(store, monkeypatch, proxy.url)
        from jigsaw_pretrain.prep.commands.shards import shards

        result = invoke(shards, *on_store(small, store))
        assert result.exit_code == 0, result.output
        hit = [entry.fault for entry in proxy.log if entry.fault]
        assert len(hit) >= 3, f"{len(hit)} of {len(proxy.log)} requests failed"
    reach(store, monkeypatch)
    assert download(store, "out") == small.tree
    assert "finished" in invoke(status, "--out", f"s3://{store.bucket}/out").output
    assert invoke(verify, "--out", f"s3://{store.bucket}/out", "--workers", "1").exit_code == 0


@pytest.mark.slow(seconds=5)
def test_no_credential_is_written_or_logged(
    small: Small, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    upload(small, store)
    from jigsaw_pretrain.prep.commands.shards import shards

    result = invoke(shards, *on_store(small, store))
    assert result.exit_code == 0, result.output
    secret = store.environment()["AWS_SECRET_ACCESS_KEY"]
    everything = [
        *download(store, "out").values(),
        *tree(tmp_path).values(),
        result.output.encode(),
        caplog.text.encode(),
    ]
    assert not any(secret.encode() in data for data in everything)


def test_without_credentials_it_says_so(
    small: Small, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    result = small.run(f"s3://{store.bucket}/out")
    assert result.exit_code == 2 and ("credentials" in result.output or "permission" in result.output.lower())


def test_a_bucket_that_is_missing_is_one_line(small: Small, store: Store) -> None:
    result = small.run("s3://no-such-bucket/out")
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert "no-such-bucket" in result.output


@pytest.mark.slow(seconds=3)
def test_array_tasks_on_a_store(small: Small, store: Store) -> None:
    out = f"s3://{store.bucket}/array"
    for index in (1, 0):
        result = small.run(out, "--task-index", str(index), "--task-count", "2")
        assert result.exit_code == 0, result.output
    assert invoke(finish_command, "--out", out).exit_code == 0
    assert download(store, "array") == small.tree


def test_wants_nothing_of_listings(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Storage, "entries", lambda self, folder: ())
    assert small.run(tmp_path / "out").exit_code == 0
    (tmp_path / "out" / "manifests" / "dataset.json").unlink()
    assert small.run(tmp_path / "out", "--max-skipped", "0").exit_code == 0
    assert tree(tmp_path / "out") == small.tree
    assert json.loads(small.tree["manifests/dataset.json"])["totals"]["parts"] > (20 if SOAK else 3)


def test_a_folder_of_xml_on_a_store(store: Store, drawn: Drawn) -> None:
    drawn.add("a/b.jpg", (200, 150))
    files = s3fs.S3FileSystem()
    files.pipe_file(f"{store.bucket}/images/a/b.jpg", (drawn.folder / "images" / "a" / "b.jpg").read_bytes())
    box = "<xmin>11</xmin><ymin>21</ymin><xmax>60</xmax><ymax>90</ymax>"
    text = f"<annotation><filename>b.jpg</filename><object><name>x</name><bndbox>{box}</bndbox></object></annotation>"
    files.pipe_file(f"{store.bucket}/xml/a/b.xml", text.encode())
    url = f"s3://{store.bucket}"
    result = run_shards(f"{url}/xml", f"{url}/images", f"{url}/voc", "--workers", "1", "--context", "1")
    assert result.exit_code == 0, result.output
    drawn.box(1, [10, 20, 50, 70])
    local = run_shards(drawn.write(), drawn.folder / "images", drawn.folder / "out", "--workers", "1", "--context", "1")
    assert local.exit_code == 0
    found = {name: data for name, data in download(store, "voc").items() if name.endswith(".tar")}
    drawn_tars = {name: data for name, data in tree(drawn.folder / "out").items() if name.endswith(".tar")}
    assert found.keys() == drawn_tars.keys()

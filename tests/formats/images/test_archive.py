"""Images in zip and tar archives, local and remote: the same tree, and members or archives that are damaged."""

import contextlib
import io
import os
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.images.archive import read_index
from jigsaw_pretrain.formats.images.decode import ImageError
from jigsaw_pretrain.formats.images.source import ImageSource
from jigsaw_pretrain.storage.store import Storage
from tests.helpers.prepped import Drawn, Small, rows, run_shards, tree
from tests.helpers.servers import file_server


@pytest.mark.slow(seconds=3)
@pytest.mark.parametrize("kind", ["zip", "stored zip", "tar", "remote zip", "remote tar"])
def test_archives(small: Small, tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("train2017.zip" if "zip" in kind else "train2017.tar")
    method = zipfile.ZIP_STORED if "stored" in kind else zipfile.ZIP_DEFLATED
    if "zip" in kind:
        with zipfile.ZipFile(path, "w", method) as archive:
            for picture in sorted(small.images.iterdir(), reverse=True):
                archive.write(picture, f"train2017/{picture.name}")
    else:
        with tarfile.open(path, "w") as tar:
            tar.add(small.images, "./train2017")
    with contextlib.ExitStack() as stack:
        images = str(path)
        if "remote" in kind:
            images = f"{stack.enter_context(file_server(tmp_path))}/{path.name}"
        result = run_shards(small.annotations, images, tmp_path / "out", *small.options)
    assert result.exit_code == 0, result.output
    assert tree(tmp_path / "out") == small.tree


def test_damaged_members_cost_themselves(drawn: Drawn) -> None:
    for number in range(4):
        drawn.add(f"{number}.jpg", (120, 90), [(10, 10, 50, 40)])
    drawn.add("absent.jpg", (120, 90), [(10, 10, 50, 40)], draw=False)
    path = drawn.folder / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(4):
            archive.write(drawn.folder / "images" / f"{number}.jpg", f"{number}.jpg")
        archive.writestr("../evil.jpg", b"x")
    raw = bytearray(path.read_bytes())
    places = read_index(Storage(str(drawn.folder)), "x.zip")
    raw[places["1.jpg"].start + 300] ^= 0xFF
    raw[places["2.jpg"].start] = 0
    path.write_bytes(raw)
    result = run_shards(drawn.write(), path, drawn.folder / "out", "--workers", "1", "--max-skipped", "100%")
    assert result.exit_code == 0, result.output
    assert {row["image_file"]: row["reason"].split(":")[0] for row in rows(drawn.folder / "out", "skipped")} == {
        "1.jpg": "image is damaged in its archive",
        "2.jpg": "image is not where its archive's index says",
        "absent.jpg": "image file is missing",
    }


def test_a_member_that_is_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", bytes(50 << 20))
    raw = (tmp_path / "x.zip").read_bytes().replace((50 << 20).to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    (tmp_path / "x.zip").write_bytes(raw)
    with pytest.raises(ImageError):
        ImageSource(str(tmp_path / "x.zip")).read("bomb.jpg")


def test_what_macos_adds_hides_no_top_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("images/a.jpg", b"picture")
        archive.writestr("__MACOSX/images/._a.jpg", b"resource")
        archive.writestr("__MACOSX/._images", b"resource")
    assert ImageSource(str(tmp_path / "x.zip")).read("a.jpg") == b"picture"


def test_a_folder_may_be_called_as_an_archive_is(tmp_path: Path) -> None:
    (tmp_path / "x.zip").mkdir()
    (tmp_path / "x.zip" / "a.jpg").write_bytes(b"picture")
    source = ImageSource(str(tmp_path / "x.zip"))
    source.check()
    assert source.read("a.jpg") == b"picture"


@pytest.mark.parametrize(
    ("name", "data"), [("x.zip", b"PK"), ("x.tar", b"no tar" * 200), ("x.tar.gz", b""), ("y.zip", None)]
)
def test_archives_that_are_none(tmp_path: Path, name: str, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=name):
        ImageSource(str(tmp_path / name)).check()


@pytest.mark.parametrize("name", ["x.zip", "x.tar"])
def test_an_archive_that_is_a_fifo_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=name):
        ImageSource(str(tmp_path / name)).check()


def write_tar(path: Path) -> bytearray:
    """A tar of two members, whose headers are at bytes 0 and 1,024."""
    with tarfile.open(path, "w") as tar:
        for name in "ab":
            member = tarfile.TarInfo(f"{name}.jpg")
            member.size = 512
            tar.addfile(member, io.BytesIO(bytes(512)))
    return bytearray(path.read_bytes())


@pytest.mark.parametrize("place", [0, 1024])
@pytest.mark.parametrize("damage", ["flipped", "cut", "overwritten"])
def test_a_tar_whose_header_is_damaged_is_none_of_fewer_images(tmp_path: Path, place: int, damage: str) -> None:
    raw = write_tar(tmp_path / "x.tar")
    if damage == "flipped":
        raw[place + 2] ^= 1
    raw = raw[: place + 300] if damage == "cut" else raw
    if damage == "overwritten":
        raw[place : place + 512] = b"\xff" * 512
    (tmp_path / "x.tar").write_bytes(raw)
    with pytest.raises(UserError, match="x.tar"):
        ImageSource(str(tmp_path / "x.tar")).check()


def test_a_tar_without_the_blocks_that_end_it_is_whole(tmp_path: Path) -> None:
    raw = write_tar(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(raw[:2048])
    source = ImageSource(str(tmp_path / "x.tar"))
    assert [source.read(name) for name in ("a.jpg", "b.jpg")] == [bytes(512)] * 2


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_an_image_whose_holes_a_tar_leaves_out_is_not_read_as_another(tmp_path: Path, form: str) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        file.write(b"begin")
        file.seek(1 << 20)
        file.write(b"end")
    (tmp_path / "b.npy").write_bytes(b"whole" * 1000)
    packed = subprocess.run(
        ["tar", "--sparse", f"--format={form}", "--create", "--file=x.tar", "a.npy", "b.npy"],
        cwd=tmp_path, capture_output=True, check=False,
    )  # fmt: skip
    if packed.returncode or (tmp_path / "x.tar").stat().st_size > 1 << 19:
        pytest.skip("this machine's tar or file system knows no holes")
    source = ImageSource(str(tmp_path / "x.tar"))
    with pytest.raises(ImageError, match="sparse"):
        source.read("a.npy")
    assert source.read("b.npy") == b"whole" * 1000


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("size", [-512, -1024, -(1 << 60)])
def test_a_tar_that_leads_back_into_itself_is_damaged(tmp_path: Path, place: int, size: int) -> None:
    raw = write_tar(tmp_path / "x.tar")
    header = raw[place * 1024 : place * 1024 + 512]
    header[124:136] = size.to_bytes(12, "big", signed=True)
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    raw[place * 1024 : place * 1024 + 512] = header
    (tmp_path / "x.tar").write_bytes(raw)
    with pytest.raises(UserError, match="x.tar"):
        ImageSource(str(tmp_path / "x.tar")).check()


def test_a_web_server_that_knows_no_ranges_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.jpg", b"x" * 100_000)
    with file_server(tmp_path, ranges=False) as url, pytest.raises(UserError, match="parts of files"):
        ImageSource(f"{url}/x.zip").check()

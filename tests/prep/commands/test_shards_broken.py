"""Failures are data: broken images cost themselves and are listed; too many end the run; mended ones come back."""

import io
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from jigsaw_pretrain.prep.commands.retry_skipped import retry_skipped
from jigsaw_pretrain.prep.commands.shards import shards
from jigsaw_pretrain.prep.commands.status import status
from tests.helpers.prepped import Drawn, inputs, invoke, ramp, rows, run_shards, tree

SIZE = (120, 90)
PICTURE = Image.fromarray(ramp(*SIZE))


def encoded(kind: str, image: Image.Image = PICTURE) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


JPEG, PNG = encoded("JPEG"), encoded("PNG")


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose head promises more pixels than it holds."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return PNG[:8] + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + PNG[33:]


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 << 30)


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def outside(path: Path) -> None:
    (path.parent.parent / "secret.jpg").write_bytes(JPEG)
    path.symlink_to("../secret.jpg")


NOISE = random.Random(0).randbytes(len(JPEG))
BROKEN: dict[str, tuple[bytes | Callable[[Path], None], str]] = {
    "missing.jpg": (lambda path: None, "image file is missing"),
    "empty.jpg": (b"", "image file is empty"),
    "half.jpg": (JPEG[: len(JPEG) // 2], "image is damaged"),
    "half-with-end.jpg": (JPEG[: len(JPEG) // 2] + b"\xff\xd9", "image is damaged"),
    "head-only.jpg": (JPEG[:200], "image is damaged"),
    "half.png": (PNG[: len(PNG) // 2], "image is damaged"),
    "flipped.png": (PNG[:200] + bytes([PNG[200] ^ 0xFF]) + PNG[201:], "image is damaged"),
    "text.jpg": (b"hello", "not an image that can be read"),
    "page.jpg": (b"<html>404 not found</html>", "not an image that can be read"),
    "noise.jpg": (NOISE, "not an image that can be read"),
    "zeros.jpg": (bytes(5000), "not an image that can be read"),
    "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "not an image that can be read"),
    "vector.jpg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image that can be read"),
    "other-size.jpg": (encoded("JPEG", PICTURE.resize((90, 120))), "size disagrees with the annotations"),
    "bomb.png": (png_of_size(60_000, 60_000), "image has too many pixels"),
    "promises.png": (png_of_size(*SIZE[::-1]), "size disagrees with the annotations"),
    "float.tif": (encoded("TIFF", PICTURE.convert("F")), "pixel format is not supported"),
    "folder.jpg": (Path.mkdir, "image file is a folder or lies below a file"),
    "huge.jpg": (sparse, "image file is too large"),
    "link-out.jpg": (outside, "image file is a link that leaves the image folder"),
    "link-abs.jpg": (link("/etc/hostname"), "image file is a link that leaves the image folder"),
    "device.jpg": (link("/dev/zero"), "image file is a link that leaves the image folder"),
    "link-nowhere.jpg": (link("nowhere.jpg"), "image file is missing"),
    "link-to-itself.jpg": (link("link-to-itself.jpg"), "image file cannot be read"),
    "pipe.jpg": (os.mkfifo, "image file is not a regular file"),
    "below/file.jpg/x.jpg": (lambda path: None, "image file is missing"),
    "n" * 300 + ".jpg": (lambda path: None, "image file cannot be read"),
    "../secret.jpg": (lambda path: None, "file name leaves the image folder"),
    "/etc/passwd": (lambda path: None, "file name leaves the image folder"),
    "http://127.0.0.1:9/x.jpg": (lambda path: None, "file name leaves the image folder"),
}


@pytest.fixture
def broken(drawn: Drawn) -> Drawn:
    """Good images, and one of each broken kind, all with boxes."""
    for number in range(5):
        drawn.add(f"good{number}.jpg", SIZE, [(10, 10, 50, 40), (60, 20, 30, 60)])
    for name, (content, _) in BROKEN.items():
        drawn.add(name, SIZE, [(10, 10, 50, 40)], draw=False)
        path = drawn.folder / "images" / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif "/" not in name and len(name) < 255:
            content(path)
    return drawn


@pytest.mark.parametrize("workers", ["1", "2"])
def test_broken_images_cost_only_themselves(broken: Drawn, workers: str) -> None:
    assert len(BROKEN) >= 20
    images, out = broken.folder / "images", broken.folder / "out"
    result = run_shards(broken.write(), images, out, "--workers", workers, "--max-skipped", "100%")
    assert result.exit_code == 0 and "Traceback" not in result.output, result.output
    positives = {(row["image_file"], row["ordinal"]) for row in rows(out, "crops") if row["annotation_id"] is not None}
    assert positives == {(f"good{number}.jpg", ordinal) for number in range(5) for ordinal in range(2)}
    of_images = [row for row in rows(out, "skipped") if row["ordinal"] is None]
    found = {row["image_file"]: row["reason"].split(":")[0] for row in of_images}
    assert found == {name: reason for name, (_, reason) in BROKEN.items()}
    for name, data in tree(out).items():
        assert str(broken.folder).encode() not in data, name


def test_too_many_end_the_run_and_what_was_done_is_kept(broken: Drawn) -> None:
    annotations, images, out = broken.write(), broken.folder / "images", broken.folder / "out"
    small = ("--workers", "1", "--crops-per-part", "4")
    result = run_shards(annotations, images, out, *small)
    assert result.exit_code == 2 and "more than --max-skipped 1%" in result.output and "Traceback" not in result.output
    assert not (out / "manifests" / "dataset.json").exists()
    result = run_shards(annotations, images, out, *small, "--max-skipped", "0.2")
    assert result.exit_code == 2
    done = {path: path.stat().st_mtime_ns for path in (out / "manifests" / "parts").glob("*.json")}
    assert done
    assert run_shards(annotations, images, out, *small, "--max-skipped", "90%").exit_code == 0
    assert all(path.stat().st_mtime_ns == moment for path, moment in done.items())


@pytest.mark.parametrize("text", ["2", "-1%", "101%", "much", "nan"])
def test_shares_that_are_none(drawn: Drawn, text: str) -> None:
    result = run_shards(drawn.write(), drawn.folder / "images", drawn.folder / "out", "--max-skipped", text)
    assert result.exit_code == 2 and "1% or as 0.01" in result.output


def test_mended_images_come_back(drawn: Drawn) -> None:
    for number in range(8):
        drawn.add(f"{number}.jpg", SIZE, [(10, 10, 50, 40), (60, 20, 60, 20)])
    annotations, images, out = drawn.write(), drawn.folder / "images", drawn.folder / "out"
    small = ("--workers", "1", "--crops-per-part", "5", "--max-skipped", "50%")
    assert run_shards(annotations, images, drawn.folder / "whole", *small).exit_code == 0
    kept = {name: (images / name).read_bytes() for name in ("3.jpg", "5.jpg")}
    for name in kept:
        (images / name).write_bytes(b"")
    assert run_shards(annotations, images, out, *small).exit_code == 0
    assert len(rows(out, "skipped")) == 2
    (images / "3.jpg").write_bytes(kept["3.jpg"])
    named = inputs(annotations, images)
    result = invoke(retry_skipped, "--out", str(out), *named, "--workers", "1", "--max-skipped", "50%")
    assert result.exit_code == 0 and "1 of 2 skipped images are used now" in result.output, result.output
    (images / "5.jpg").write_bytes(kept["5.jpg"])
    (out / "manifests" / "dataset.json").unlink()
    result = invoke(retry_skipped, "--out", str(out), *named, "--workers", "1")
    assert result.exit_code == 0, result.output
    assert tree(out) == tree(drawn.folder / "whole")
    assert "nothing to do" in invoke(retry_skipped, "--out", str(out), *named).output


def test_retrying_needs_annotations_and_images(drawn: Drawn) -> None:
    drawn.add("a.jpg", SIZE, [(10, 10, 50, 40)])
    drawn.add("b.jpg", SIZE, [(10, 10, 50, 40)], draw=False)
    annotations, images, out = drawn.write(), drawn.folder / "images", drawn.folder / "out"
    assert run_shards(annotations, images, out, "--workers", "1", "--max-skipped", "50%").exit_code == 0
    result = invoke(retry_skipped, "--out", str(out))
    assert result.exit_code == 2 and "--annotations" in result.output
    assert (out / "manifests" / "dataset.json").exists() and rows(out, "skipped")


def test_a_folder_of_missing_images_ends_before_long(drawn: Drawn) -> None:
    for number in range(40):
        drawn.add(f"{number}.jpg", SIZE, [(10, 10, 50, 40)], draw=False)
    result = run_shards(drawn.write(), drawn.folder / "images", drawn.folder / "out", "--workers", "1")
    assert result.exit_code == 2 and "images/37.jpg is not there" in result.output
    assert not (drawn.folder / "out").exists()


def test_help_names_the_options() -> None:
    text = invoke(shards, "--help").output
    for option in ("--max-skipped", "--scheduler", "--task-index", "--task-count", "--overwrite"):
        assert option in text


def half_missing(drawn: Drawn) -> tuple[Path, Path, Path, tuple[str, ...]]:
    """A dataset of which every other image is in another folder: annotations, part of the images, all, options."""
    for number in range(8):
        drawn.add(f"{number}.jpg", SIZE, [(10, 10, 50, 40), (60, 20, 60, 20)])
    part = drawn.folder / "part"
    part.mkdir()
    for number in range(0, 8, 2):
        shutil.copy(drawn.folder / "images" / f"{number}.jpg", part)
    return drawn.write(), part, drawn.folder / "images", ("--workers", "1", "--crops-per-part", "5")


def test_another_image_folder_looks_again_at_what_was_missing(drawn: Drawn) -> None:
    annotations, part, images, small = half_missing(drawn)
    whole, out = drawn.folder / "whole", drawn.folder / "out"
    assert run_shards(annotations, images, whole, *small).exit_code == 0
    stopped = run_shards(annotations, part, out, *small)
    assert stopped.exit_code == 2 and "--images" in stopped.output
    assert run_shards(annotations, images, out, *small).exit_code == 0
    assert tree(out) == tree(whole)
    # A set that was finished without them is taken up again too, and only where they are there.
    less = drawn.folder / "less"
    assert run_shards(annotations, part, less, *small, "--max-skipped", "60%").exit_code == 0
    lacking = tree(less)
    assert "nothing to do" in run_shards(annotations, part, less, *small).output and tree(less) == lacking
    assert run_shards(annotations, images, less, *small).exit_code == 0
    assert tree(less) == tree(whole)


def test_a_set_without_its_images_is_not_called_done_and_to_lose_them_all_is_never_suggested(drawn: Drawn) -> None:
    annotations, part, images, small = half_missing(drawn)
    out = drawn.folder / "out"
    for kept in range(0, 8, 2):
        if kept:
            (part / f"{kept}.jpg").unlink()
    stopped = run_shards(annotations, part, out, *small, "--max-skipped", "80%")
    assert stopped.exit_code == 2 and "100%" not in stopped.output and "larger" not in stopped.output
    assert run_shards(annotations, part, out, *small, "--max-skipped", "99%").exit_code == 0
    shown = " ".join(invoke(status, "--out", str(out)).output.split())
    assert "7 images are missing" in shown
    (out / "manifests" / "dataset.json").unlink()
    shown = " ".join(invoke(status, "--out", str(out)).output.split())
    assert "7 images are missing" in shown and "finished" not in shown

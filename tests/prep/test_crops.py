"""Lossless cutting: training sees exactly the source's pixels, and whatever cannot be cut so is encoded and counted."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jigsaw_pretrain.formats.dataset.dataset import CropIndex, open_dataset
from jigsaw_pretrain.formats.images.decode import decode
from jigsaw_pretrain.prep import crops
from jigsaw_pretrain.prep.commands.report import report
from jigsaw_pretrain.prep.commands.verify import verify
from jigsaw_pretrain.prep.crops import NOT_JPEG
from jigsaw_pretrain.train.cli import main as train
from jigsaw_pretrain.train.data.reader import SOURCE, CropReader, LocalShards
from tests.helpers.commands import told
from tests.helpers.jpegs import flat_blocks
from tests.helpers.prepped import Drawn, inputs, needs_turbojpeg, ramp, rows, run_shards, tree


@st.composite
def cases(draw: st.DrawFn) -> tuple[bytes, np.ndarray, int, int]:
    """A JPEG of any subsampling, baseline or progressive, small and noisy, and some boxes inside it."""
    sides = st.one_of(st.integers(1, 20), st.integers(1, 90))
    width, height = draw(sides), draw(sides)
    pixels = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, (height, width, 3), dtype=np.uint8)
    kind = draw(st.sampled_from([*crops.SUBSAMPLINGS, "Gray", "progressive"]))
    if kind == "progressive":
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", progressive=True, subsampling=draw(st.integers(0, 2)))
        raw = buffer.getvalue()
    elif kind == "Gray":
        raw = bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels[..., :1]), 90, "GRAY", kind))
    else:
        raw = bytes(simplejpeg.encode_jpeg(pixels, 90, "RGB", kind))
    boxes = []
    for _ in range(draw(st.integers(1, 6))):
        left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        boxes.append((left, top, draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height))))
    return raw, np.array(boxes, dtype=np.int32), width, height


@needs_turbojpeg
@given(cases())
def test_a_crop_without_its_margin_is_the_sources_pixels_exactly(case: tuple[bytes, np.ndarray, int, int]) -> None:
    raw, boxes, width, height = case
    source = simplejpeg.decode_jpeg(raw, "RGB")
    found = crops.cut_lossless(raw, boxes, width, height, "ignore")
    assert not found.refused and len(found.jpegs) == len(boxes) and (found.margins >= 0).all()
    for jpeg, box, margins in zip(found.jpegs, boxes.tolist(), found.margins.tolist(), strict=True):
        member = simplejpeg.decode_jpeg(jpeg, "RGB")
        assert member.shape[:2] == (
            box[3] - box[1] + margins[1] + margins[3],
            box[2] - box[0] + margins[0] + margins[2],
        )
        inner = member[margins[1] :, margins[0] :][: box[3] - box[1], : box[2] - box[0]]
        assert np.array_equal(inner, source[box[1] : box[3], box[0] : box[2]])


@needs_turbojpeg
def test_many_crops_take_several_passes_and_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = bytes(simplejpeg.encode_jpeg(ramp(200, 150), 95, "RGB", "420"))
    boxes = np.array([(i % 50, i % 30, i % 50 + 20 + i, i % 30 + 40) for i in range(100)], dtype=np.int32)
    boxes = np.minimum(boxes, [200, 150, 200, 150]).astype(np.int32)
    whole = crops.cut_lossless(raw, boxes, 200, 150, "ignore").jpegs
    monkeypatch.setattr(crops, "MOST_PIXELS", 5000)
    assert crops.cut_lossless(raw, boxes, 200, 150, "ignore").jpegs == whole and len(whole) == 100


def save(drawn: Drawn, name: str, image: Image.Image, **options: Any) -> None:
    """A picture of 121 x 90 stored pixels with two boxes."""
    drawn.add(name, (121, 90), [(5, 7, 30, 30), (60.5, 40.25, 30.5, 11)])
    image.save(drawn.folder / "images" / name, **options)


PICTURE = Image.fromarray(ramp(121, 90))


@pytest.fixture
def mixed(drawn: Drawn) -> Drawn:
    """Images that can be cut losslessly (four), and one of each kind that cannot."""
    tag = Image.Exif()
    tag[0x010E] = "a secret place"
    save(drawn, "a.jpg", PICTURE, quality=95, subsampling=0, exif=tag)
    save(drawn, "b.jpg", PICTURE, quality=80, subsampling=2)
    save(drawn, "c.jpg", PICTURE, quality=90, subsampling=1, progressive=True)
    save(drawn, "d.jpg", PICTURE.convert("L"), quality=90)
    save(drawn, "e.png", PICTURE)
    save(drawn, "f.jpg", PICTURE.convert("CMYK"), quality=90)
    save(drawn, "cut.jpg", PICTURE, quality=90)
    path = drawn.folder / "images" / "cut.jpg"
    path.write_bytes(path.read_bytes()[:-900])
    return drawn


@needs_turbojpeg
def test_training_sees_the_sources_pixels_and_the_identities_of_the_encoded_dataset(mixed: Drawn) -> None:
    images, out = mixed.folder / "images", mixed.folder / "lossless"
    options = ("--workers", "1", "--crops-per-part", "5", "--max-skipped", "50%", "--context", "1.5")
    result = run_shards(mixed.write(), images, out, "--encode", "lossless", *options)
    assert result.exit_code == 0 and "not cut losslessly" in result.output, result.output
    assert run_shards(mixed.write(), images, mixed.folder / "pixels", *options).exit_code == 0

    dataset = open_dataset(str(out))
    reader, index, crops = CropReader(dataset, LocalShards(dataset), capacity=9), CropIndex(dataset), rows(out, "crops")
    exact = 0
    by_key = {crop["key"]: crop for crop in crops}
    for shard in dataset.shards:
        for crop, key in zip(reader.crops(shard.index), index.rows(shard)["key"], strict=True):
            row = by_key[key]
            pixels = reader.decode(*crop[SOURCE].tolist())
            source = decode((images / row["image_file"]).read_bytes(), 121, 90)
            expected = source[row["top"] : row["bottom"], row["left"] : row["right"]]
            assert pixels is not None and pixels.shape == expected.shape
            if row["image_id"] in "abcd":
                assert np.array_equal(pixels, expected), row
                exact += 1
            else:
                assert all(row[f"margin_{side}"] == 0 for side in ("left", "top", "right", "bottom"))
    counted = {NOT_JPEG: len(crops) - exact}
    description = json.loads((out / "manifests" / "dataset.json").read_text())
    assert exact and description["totals"]["encoded"] == counted and description["options"]["encode"] == "lossless"
    assert "encoded" not in json.loads((mixed.folder / "pixels" / "manifests" / "dataset.json").read_text())["totals"]
    assert not any(b"secret" in path.read_bytes() for path in (out / "shards").iterdir())

    lines = []
    for folder in ("lossless", "pixels"):
        arguments = [
            "digest",
            "--data",
            str(mixed.folder / folder),
            "--set",
            "data.batch=4",
            "--set",
            "data.lanes=2",
            "--steps",
            "3",
        ]
        found = CliRunner().invoke(train, arguments, catch_exceptions=False)
        lines.append([line.split()[:2] for line in found.stdout.splitlines()])
    assert lines[0] == lines[1] and len(lines[0]) == 3


@pytest.mark.slow(seconds=3)
@needs_turbojpeg
def test_the_other_commands_hold(mixed: Drawn) -> None:
    images, out = mixed.folder / "images", mixed.folder / "out"
    options = ("--encode", "lossless", "--crops-per-part", "5", "--max-skipped", "50%")
    run = (mixed.write(), images)
    assert run_shards(*run, out, *options, "--workers", "1").exit_code == 0
    whole = tree(out)
    assert run_shards(*run, mixed.folder / "two", *options, "--workers", "2").exit_code == 0
    assert tree(mixed.folder / "two") == whole
    for command, *extra in ((verify, "--workers", "1"), (report,)):
        result = CliRunner().invoke(command, ["--out", str(out), *extra])
        assert result.exit_code == 0, result.output
    next((out / "shards").glob("*-000001.tar")).write_bytes(b"torn")
    assert CliRunner().invoke(verify, ["--out", str(out), *inputs(*run), "--repair", "--workers", "1"]).exit_code == 0
    assert {name: data for name, data in tree(out).items() if name != "report.html"} == whole
    result = run_shards(*run, out, "--crops-per-part", "5", "--workers", "1")
    assert result.exit_code == 2 and "encode was lossless, now absent" in result.output
    shutil.rmtree(out)


@needs_turbojpeg
def test_images_turned_by_exif_are_encoded_where_boxes_are_upright(drawn: Drawn) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    drawn.add("turned.jpg", (90, 121), [(5, 7, 30, 30)], draw=False)
    PICTURE.save(drawn.folder / "images" / "turned.jpg", quality=95, exif=turned)
    drawn.add("upright.jpg", (121, 90), [(5, 7, 30, 30)])
    out = drawn.folder / "out"
    options = ("--exif", "apply", "--encode", "lossless", "--workers", "1", "--negatives-per-positive", "0")
    assert run_shards(drawn.write(), drawn.folder / "images", out, *options).exit_code == 0
    totals = json.loads((out / "manifests" / "dataset.json").read_text())["totals"]
    assert totals["encoded"] == {crops.TURNED: 1} and totals["crops"] == 2


@needs_turbojpeg
def test_what_the_library_refuses_is_decoded_as_leniently_as_ever() -> None:
    whole = bytes(simplejpeg.encode_jpeg(ramp(64, 48), 90, "RGB", "420"))
    stray = whole[:-2] + b"\0" * 40 + whole[-2:]
    boxes = np.array([[1, 1, 20, 20]], dtype=np.int32)
    assert crops.cut_lossless(whole[:-400], boxes, 64, 48, "ignore").refused == crops.REFUSED
    assert crops.cut_lossless(whole, boxes, 48, 64, "ignore").refused == crops.REFUSED
    assert crops.cut_lossless(b"", boxes, 48, 64, "ignore").refused == crops.NOT_JPEG
    found = crops.cut_lossless(stray, boxes, 64, 48, "ignore")
    assert found.refused or simplejpeg.decode_jpeg(found.jpegs[0]).shape == (32, 32, 3)


def test_without_the_library_one_line_says_so_and_nothing_is_written(
    drawn: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn.add("a.jpg", (120, 90), [(5, 5, 30, 30)])
    monkeypatch.setenv("TURBOJPEG", "libabsent.so")
    crops.load_turbojpeg.cache_clear()
    out = drawn.folder / "out"
    try:
        result = run_shards(drawn.write(), drawn.folder / "images", Path(out), "--encode", "lossless")
    finally:
        crops.load_turbojpeg.cache_clear()
    assert result.exit_code == 2 and len(told(result.output)) == 1, result.output
    assert "libabsent.so" in result.output and "apt-get install libturbojpeg0" in result.output
    assert not out.exists()


FACTORS = (
    ((2, 2), (2, 2), (2, 2)),
    ((1, 2), (1, 2), (1, 2)),
    ((3, 1), (3, 1), (3, 1)),
    ((2, 2), (1, 2), (1, 2)),
    ((2, 2), (2, 1), (2, 1)),
    ((2, 2), (1, 1), (1, 1)),
    ((4, 1), (1, 1), (1, 1)),
    ((1, 4), (1, 1), (1, 1)),
    ((4, 2), (1, 1), (1, 1)),
    ((1, 1), (2, 2), (2, 2)),
    ((2, 1), (1, 2), (1, 1)),
    ((2, 2),),
)


@needs_turbojpeg
@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_a_cut_along_any_sampling_factors_is_exact_or_refused(factors: tuple[tuple[int, int], ...]) -> None:
    width, height = 133, 101
    raw = flat_blocks(width, height, factors)
    boxes = np.array([[30, 27, 90, 47], [0, 0, 133, 101], [64, 64, 96, 96], [120, 90, 133, 101]], dtype=np.int32)
    assert crops.block_unit(raw) == (
        (8, 8) if len(factors) == 1 else (8 * max(h for h, _ in factors), 8 * max(v for _, v in factors))
    )
    found = crops.cut_lossless(raw, boxes, width, height, "ignore")
    if found.refused:
        assert found.jpegs == []
        return
    whole = simplejpeg.decode_jpeg(raw, "RGB")
    for jpeg, (left, top, right, bottom), margins in zip(found.jpegs, boxes, found.margins, strict=True):
        member = simplejpeg.decode_jpeg(jpeg, "RGB")
        inner = member[margins[1] : member.shape[0] - margins[3], margins[0] : member.shape[1] - margins[2]]
        assert np.array_equal(inner, whole[top:bottom, left:right])

"""Hostile annotation files end in a plan or in one clear line, never in a traceback, and touch nothing else."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jigsaw_pretrain.prep.commands.doctor import doctor
from jigsaw_pretrain.prep.commands.shards import shards
from tests.helpers.commands import told
from tests.helpers.prepped import Drawn, invoke, ramp, rows
from tests.helpers.settings import SOAK

CASES = 2000 if SOAK else 100
fuzz = settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=not SOAK)

whole = st.integers(-3, 12) | st.sampled_from([2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**30])
number = whole | st.floats() | st.sampled_from([1e308, -1e308, 5e-324, 0.5, 99.999999, 1e16])
text = st.text(max_size=8) | st.sampled_from(
    ["a.jpg", "b.png", "../a.jpg", "/etc/passwd", "a/../../b.jpg", "file:///etc/passwd", "s3://x/y", "a\x00b", "\ud800"]
    + [
        "[red]x[/red]",
        "\x1b[2J",
        "<script>",
        "%s{0}",
        "\u202egnp",
        "a\nb",
        "C:\\x",
        "\\\\host\\x",
        ".",
        "~",
        "a" * 5000,
    ]
)
junk = st.recursive(st.none() | st.booleans() | number | text, lambda inner: st.lists(inner, max_size=3), max_leaves=4)


def record(wild: bool, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Records of the right types; where ``wild``, now and then a field is junk or absent."""
    if not wild:
        return st.fixed_dictionaries(fields)
    mixed = {name: st.one_of(value, value, value, value, value, junk) for name, value in fields.items()}
    return st.fixed_dictionaries(mixed) | st.fixed_dictionaries({}, optional=mixed)


def lists_of(wild: bool) -> st.SearchStrategy[dict[str, Any]]:
    """The three lists; where not ``wild``, most files can be planned, hostile as their values are."""
    sane = st.lists(st.floats(-20, 120), min_size=4, max_size=4)
    side = st.sampled_from([100, 100, 100, 100, 80]) | number
    image = record(wild, id=st.integers(2, 5), file_name=text, width=side, height=side)
    box = record(
        wild,
        id=number,
        image_id=st.sampled_from([1, 1, 1, 2, 3]) | whole,
        category_id=st.sampled_from([1, 1, 1, 2, 3]) | whole,
        bbox=sane | sane | st.lists(number, min_size=4, max_size=4) | st.lists(number, max_size=6),
        iscrowd=st.integers(0, 1) | st.none(),
        segmentation=junk,
    )
    category = record(wild, id=st.integers(2, 9) | whole.filter(lambda value: value > 9), name=text)
    good = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 30, 30]}]
    first = [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 80}]
    return st.fixed_dictionaries(
        {
            "images": st.lists(image, max_size=4, unique_by=None if wild else lambda entry: entry["id"]).map(
                lambda found: first + found
            ),
            "annotations": st.lists(box, max_size=12).map(lambda found: found if wild else good + found),
            "categories": st.lists(category, max_size=4, unique_by=None if wild else lambda entry: entry["id"]).map(
                lambda found: [{"id": 1, "name": "thing"}, *found]
            ),
        }
    )


files = lists_of(False) | lists_of(False) | lists_of(True)


def check(annotations: Path, folder: Path, *extra: str) -> Result:
    """The plan or an error; nothing written."""
    before = sorted(folder.rglob("*"))
    result = invoke(
        shards,
        *("--annotations", str(annotations), "--images", str(folder / "images"), "--out", str(folder / "out"), *extra),
    )
    assert result.exit_code in (0, 2) and isinstance(result.exception, SystemExit | None), result.exception
    if result.exit_code:
        assert result.output.count("Error: ") == 1 and len(told(result.output)) == 1, result.output
    assert "\x1b" not in result.output
    if "--dry-run" in extra:
        assert sorted(folder.rglob("*")) == before
    return result


def folder_with_images(path: str) -> Path:
    from PIL import Image

    folder = Path(path)
    (folder / "images").mkdir()
    for name in ("a.jpg", "b.png"):
        Image.fromarray(ramp(100, 80)).save(folder / "images" / name)
    return folder


def dump(lists: Any) -> bytes:
    return json.dumps(lists).encode("utf-8", "surrogatepass")


@pytest.mark.slow(seconds=6)
@fuzz
@given(files, st.integers(0, 9))
def test_files_of_about_the_right_shape(lists: dict[str, Any], turn: int) -> None:
    with tempfile.TemporaryDirectory() as path:
        folder = folder_with_images(path)
        (folder / "a.json").write_bytes(dump(lists))
        if check(folder / "a.json", folder, "--dry-run").exit_code == 0 and turn == 0:
            assert check(folder / "a.json", folder, "--workers", "1", "--max-skipped", "100%").exit_code == 0
            assert {entry.name for entry in folder.iterdir()} == {"a.json", "images", "out"}
            for crop in rows(folder / "out", "crops"):
                assert crop["image_file"] in ("a.jpg", "b.png")
                assert 0 <= crop["left"] < crop["right"] <= 100 and 0 <= crop["top"] < crop["bottom"] <= 80
        elif turn == 1:
            named = ("--annotations", str(folder / "a.json"), "--images", str(folder / "images"))
            examined = invoke(doctor, *named, "--json")
            assert examined.exit_code in (0, 1, 2) and json.loads(examined.output)["exit_code"] == examined.exit_code


@pytest.mark.slow(seconds=3)
@fuzz
@given(files, st.data())
def test_files_with_bytes_changed(lists: dict[str, Any], data: st.DataObject) -> None:
    raw = bytearray(dump(lists))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        if data.draw(st.booleans()):
            raw[place] = data.draw(st.integers(0, 255))
        else:
            del raw[place : place + data.draw(st.integers(1, 30))]
        if not raw:
            break
    with tempfile.TemporaryDirectory() as path:
        folder = folder_with_images(path)
        (folder / "a.json").write_bytes(raw)
        check(folder / "a.json", folder, "--dry-run")


tags = st.sampled_from(
    ["annotation", "object", "bndbox", "name", "xmin", "ymin", "xmax", "ymax", "size", "width", "filename"]
)
plain_text = text.filter(lambda value: value.isprintable()) | number.map(str)


def tree_of(tag: str, content: Any) -> str:
    from xml.sax.saxutils import escape

    inner = "".join(tree_of(*child) for child in content) if isinstance(content, list) else escape(str(content))
    return f"<{tag}>{inner}</{tag}>"


nodes = st.recursive(
    st.tuples(tags, plain_text), lambda inner: st.tuples(tags, st.lists(inner, max_size=4)), max_leaves=20
)


@pytest.mark.slow(seconds=3)
@fuzz
@given(st.lists(st.tuples(tags, st.lists(nodes, max_size=4)), max_size=3), st.binary(max_size=30) | st.just(b""))
def test_xml(roots: list[Any], extra: bytes) -> None:
    with tempfile.TemporaryDirectory() as path:
        folder = folder_with_images(path)
        (folder / "xml").mkdir()
        for index, (_, content) in enumerate(roots):
            written = tree_of("annotation", content).encode("utf-8", "replace")
            (folder / "xml" / f"{index}.xml").write_bytes(written + (extra if index else b""))
        check(folder / "xml", folder, "--dry-run")


lines = st.lists(st.lists(number.map(str) | plain_text, max_size=8).map(" ".join), max_size=6).map("\n".join)


@pytest.mark.slow(seconds=3)
@fuzz
@given(lines, junk, st.binary(max_size=20))
def test_yolo(label: str, names: Any, extra: bytes) -> None:
    with tempfile.TemporaryDirectory() as path:
        folder = folder_with_images(path)
        (folder / "labels").mkdir()
        (folder / "labels" / "a.txt").write_bytes(label.encode("utf-8", "replace") + extra)
        (folder / "data.yaml").write_bytes(b"names: " + (dump(names) if extra else b"[a, b]"))
        check(folder, folder, "--dry-run")


LAUGHS = (
    "<!DOCTYPE a [<!ENTITY x0 'ha'>"
    + "".join(f"<!ENTITY x{i} '{f'&x{i - 1};' * 10}'>" for i in range(1, 12))
    + "]><annotation><filename>&x11;</filename></annotation>"
)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize(
    "text", [LAUGHS, '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>']
)
def test_xml_that_grows_or_reaches_out(drawn: Drawn, text: str, encoding: str) -> None:
    (drawn.folder / "xml").mkdir()
    (drawn.folder / "xml" / "a.xml").write_bytes(text.encode(encoding))
    assert "entities" in check(drawn.folder / "xml", drawn.folder, "--dry-run").output


def test_numbers_at_the_edge(drawn: Drawn) -> None:
    image = drawn.add("a.jpg", (200, 150), [(10, 10, 50, 40)])
    for box in ([1e308, 1e308, 1e308, 1e308], [-1e308, 0, 1e308, 9], [0, 0, 1e308, 1e308], [5e-324, 5e-324, 5e-324, 9]):
        drawn.box(image, box)
    drawn.annotations.append({"id": 2**63, "image_id": image, "category_id": 3, "bbox": [1, 1, 9, 9]})
    drawn.annotations.append({"id": -(2**70), "image_id": 2**63, "category_id": 2**64, "bbox": [1, 1, 9, 9]})
    path = drawn.write()
    path.write_text(path.read_text().replace("[10, 10, 50, 40]", "[NaN, -Infinity, 50, 40]", 1))
    check(path, drawn.folder, "--dry-run")
    result = check(path, drawn.folder, "--workers", "1", "--max-skipped", "100%")
    assert result.exit_code == 0, result.output
    kept = [crop for crop in rows(drawn.folder / "out", "crops") if crop["annotation_id"] is not None]
    assert all(np.isfinite([crop["box_x"], crop["box_width"]]).all() for crop in kept)
    assert "annotation id is beyond 64 bits" in {row["reason"] for row in rows(drawn.folder / "out", "skipped")}

"""A part's tar: its bytes, and where its members lie."""

import io

import webdataset

from prep.parts import OWNER, member_places, tar_bytes

KEYS = ["0" * 20 + "-p00000", "f" * 20 + "-n00012", "a" * 20 + "-p123456"]
JPEGS = [b"x" * 700, b"", b"y" * 512]


def test_bytes_are_those_of_webdatasets_own_writer() -> None:
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, encoder=False, mtime=0, user=OWNER, group=OWNER) as writer:
        for key, label, jpeg in zip(KEYS, (3, 0, 80), JPEGS, strict=True):
            writer.write({"__key__": key, "cls": str(label).encode(), "jpg": jpeg})
    assert tar_bytes(KEYS, (3, 0, 80), JPEGS) == buffer.getvalue()


def test_places_point_at_the_jpegs() -> None:
    data = tar_bytes(KEYS, (3, 0, 80), JPEGS)
    assert [data[offset : offset + size] for offset, size in member_places(data)] == JPEGS

"""A part's tar: its bytes, and where its members lie."""

import io
import tarfile

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from jigsaw_pretrain.formats.dataset.shard import OWNER, tar_bytes

KEYS = st.from_regex(r"[0-9a-f]{20}-[pn][0-9]{5,7}", fullmatch=True)
SIZES = st.one_of(st.sampled_from([0, 1, 511, 512, 513]), st.integers(0, 30_000))
MEMBERS = st.lists(st.tuples(KEYS, st.integers(0, 20_000), SIZES), max_size=12, unique_by=lambda member: member[0])


@given(MEMBERS)
def test_bytes_are_those_of_webdatasets_own_writer_and_places_point_at_the_jpegs(
    members: list[tuple[str, int, int]],
) -> None:
    jpegs = [bytes([65 + i]) * size for i, (_, _, size) in enumerate(members)]
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, encoder=False, mtime=0, user=OWNER, group=OWNER) as writer:
        for (key, label, _), jpeg in zip(members, jpegs, strict=True):
            writer.write({"__key__": key, "cls": str(label).encode(), "jpg": jpeg})
    data, offsets = tar_bytes([key for key, _, _ in members], [label for _, label, _ in members], jpegs)
    assert data == buffer.getvalue()
    assert [data[start : start + len(jpeg)] for start, jpeg in zip(offsets, jpegs, strict=True)] == jpegs
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [member.offset_data for member in tar if member.name.endswith(".jpg")] == offsets


def test_a_name_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="no place"):
        tar_bytes(["k" * 97], [0], [b""])

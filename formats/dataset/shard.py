"""Write a shard: a plain WebDataset tar, the same bytes for the same members.

Headers are made by hand from one blank: the standard library's take a third of a part's time.

A module of its own, because it is half of the contract between prep and train, as the readers of shards are the other.
"""

import tarfile
from collections.abc import Sequence

OWNER = "jigsaw"
"""User and group of all tar members, whoever runs prep."""


_NAME, _SIZE, _CHECKSUM = slice(0, 100), slice(124, 136), slice(148, 156)
"""The fields of a USTAR header in which members differ."""

_ZEROS = bytes(tarfile.BLOCKSIZE)


def tar_bytes(
    keys: Sequence[str], labels: Sequence[int], crops: Sequence[bytes], suffix: str = "jpg"
) -> tuple[bytes, list[int]]:
    """A shard, and the offset of each crop in it: members ``<key>.cls`` and ``<key>.SUFFIX``, a fixed time and owner.

    The bytes are those of webdataset.TarWriter(mtime=0) (a test compares them), which is a loop around tarfile;
    importing webdataset imports torch, and four seconds and 300 MB for each worker are too much for a loop. tarfile
    makes one header, and each member's differs from it in name, size and checksum: its own loop, and reading the
    offsets back, took as long as 40 % of decoding the images.
    """
    pieces: list[bytes] = []
    offsets: list[int] = []
    length = 0
    for key, label, crop in zip(keys, labels, crops, strict=True):
        for kind, data in (("cls", str(label).encode("ascii")), (suffix, crop)):
            padding = -len(data) % tarfile.BLOCKSIZE
            pieces += (_header(f"{key}.{kind}".encode("ascii"), len(data)), data, _ZEROS[:padding])
            length += tarfile.BLOCKSIZE + len(data) + padding
        offsets.append(length - padding - len(crop))
    ending = 2 * tarfile.BLOCKSIZE
    pieces.append(bytes(ending + -(length + ending) % tarfile.RECORDSIZE))
    return b"".join(pieces), offsets


def _blank_header() -> bytes:
    member = tarfile.TarInfo()
    member.mtime, member.mode, member.uname, member.gname = 0, 0o444, OWNER, OWNER
    return member.tobuf(tarfile.USTAR_FORMAT)


_BLANK = _blank_header()

_BEFORE, _BETWEEN, _AFTER = _BLANK[100:124], _BLANK[136:148], _BLANK[156:]

_REST = sum(_BEFORE + _BETWEEN + _AFTER) + 8 * ord(" ")
"""What the checksum adds up besides name and size: it counts its own field as blanks."""


def _header(name: bytes, size: int) -> bytes:
    if len(name) > _NAME.stop or size >= 8**11:
        raise ValueError(f"{name!r} of {size} bytes has no place in a USTAR header")
    length = b"%011o\0" % size
    checksum = b"%06o\0 " % (_REST + sum(name) + sum(length))
    return b"".join((name.ljust(_NAME.stop, b"\0"), _BEFORE, length, _BETWEEN, checksum, _AFTER))

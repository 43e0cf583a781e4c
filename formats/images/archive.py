"""Images inside a zip or tar archive, the form in which COCO is downloaded: the offset of each member.

The archive is indexed once, by the process that plans; part tasks take along the offsets of their images and read each
by one range, so members are fetched concurrently from a store as files are. A zip's index is its last few megabytes; a
tar has none and is read from front to back (19 GB of COCO: a minute from a local disk, the time of a download from a
store): copy a remote tar to a zip or a folder if prep is run on it more than once. Compressed tars cannot be read from
the middle and are refused.
"""

import struct
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.images.decode import ImageError
from jigsaw_pretrain.storage.retries import StoreError, with_retries
from jigsaw_pretrain.storage.store import Storage

MOST_BYTES = 1 << 30
"""The largest image file that is read, in bytes."""

_HEADER = struct.Struct("<4s22xHH")
_EXTRA = 1 << 16
_BLOCK = 8 << 20


@dataclass(frozen=True)
class Member:
    """Where an image lies: its bytes from ``start`` on; of a zip with its local header, ``method`` and checksum.

    stored: bytes to read. size: bytes of the image. method: zip's compression (0 or 8), -1 in a tar; -2: encrypted, -3:
    with holes left out.
    """

    start: int
    stored: int
    size: int
    method: int
    crc: int


def is_archive(url: str) -> bool:
    """Whether a URL names an archive by its suffix."""
    return url.lower().endswith((".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"))


def read_index(storage: Storage, name: str) -> dict[str, Member]:
    """The regular files of an archive by their names in one form; raises UserError, StoreError."""
    where = storage.describe(name)
    if not name.lower().endswith((".zip", ".tar")):
        raise UserError(f"{where} is a compressed tar, which cannot be read from the middle. Unpack it, or zip it.")
    index = _zip_index if name.lower().endswith(".zip") else _tar_index

    def read() -> dict[str, Member]:
        path = storage.full_path(name)
        if storage.is_local:
            storage.regular_file(name)
        options = {} if storage.is_local else {"block_size": _BLOCK, "cache_type": "readahead"}
        try:
            with storage.fs.open(path, "rb", **options) as file:
                return index(file)
        except (zipfile.BadZipFile, tarfile.TarError, NotImplementedError, ValueError, EOFError) as error:
            if "range requests" in str(error) or "streaming HTTP" in str(error):
                raise UserError(f"{where}: that web server does not serve parts of files. Copy it first.") from error
            raise UserError(f"{where} is not a whole archive ({error}). Copy or download it again.") from error

    try:
        return read() if storage.is_local else with_retries(read, where)
    except FileNotFoundError as error:
        raise UserError(f"{where}: no such file. Name the image folder or archive with --images.") from error
    except StoreError:
        raise
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error.strerror or type(error).__name__}).") from error


def find(index: Mapping[str, Member], file: str, top: str | None) -> Member | None:
    """The member of a file name: of that name, or below the folder ``top`` that holds all (COCO's ``train2017/``)."""
    return index.get(file) or (index.get(f"{top}/{file}") if top else None)


def top_folder(index: Mapping[str, Member]) -> str | None:
    """The one folder in which all members lie, if there is one."""
    # What macOS adds is nobody's data.
    tops = {name.partition("/")[0] if "/" in name else "" for name in index if not name.startswith("__MACOSX/")}
    return tops.pop() or None if len(tops) == 1 else None


def read_member(storage: Storage, name: str, member: Member) -> bytes:
    """The bytes of one image of an archive; raises ImageError, StoreError, OSError."""
    if member.method == -2:
        raise ImageError("image is encrypted in its archive")
    if member.method == -3:
        raise ImageError("image is stored as a sparse file in its archive: pack it again without --sparse")
    if member.method not in (-1, 0, 8):
        raise ImageError(f"image is compressed in a way that is not read: method {member.method}")
    if max(member.size, member.stored) > MOST_BYTES:
        raise ImageError(f"image file is too large: {member.size:,} bytes, at most {MOST_BYTES:,}")
    raw = storage.read_range(name, member.start, member.stored)
    data = raw if member.method == -1 else _unzipped(raw, member)
    if len(data) != member.size:
        raise ImageError("image is cut short in its archive")
    return data


def _unzipped(raw: bytes, member: Member) -> bytes:
    try:
        signature, name_length, extra_length = _HEADER.unpack_from(raw)
        body = raw[_HEADER.size + name_length + extra_length :]
        if signature != b"PK\x03\x04":
            raise ImageError("image is not where its archive's index says")
        # One byte more than promised is enough to see that a member is a bomb.
        data = zlib.decompressobj(-15).decompress(body, member.size + 1) if member.method == 8 else body[: member.size]
    except (zlib.error, struct.error) as error:
        raise ImageError("image is damaged in its archive") from error
    if len(data) == member.size and zlib.crc32(data) != member.crc:
        raise ImageError("image is damaged in its archive: checksum differs")
    return data


def _zip_index(file: IO[bytes]) -> dict[str, Member]:
    with zipfile.ZipFile(file) as archive:
        listed = sorted(archive.infolist(), key=lambda info: info.header_offset)
        ends = [*(info.header_offset for info in listed[1:]), getattr(archive, "start_dir", 1 << 62)]
        found = {}
        for info, end in zip(listed, ends, strict=True):
            if info.is_dir():
                continue
            # The local header's extra field may be longer than the index tells; the next member bounds it.
            most = _HEADER.size + len(info.orig_filename.encode()) + _EXTRA + info.compress_size
            stored = min(most, max(0, end - info.header_offset))
            method = -2 if info.flag_bits & 1 else info.compress_type
            found[_one_form(info.filename)] = Member(info.header_offset, stored, info.file_size, method, info.CRC)
        return found


def _tar_index(file: IO[bytes]) -> dict[str, Member]:
    found = {}
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (info := next_member(archive)) is not None:
            if info.isreg():
                method = -1 if info.sparse is None else -3
                found[_one_form(info.name)] = Member(info.offset_data, info.size, info.size, method, 0)
            # tarfile keeps every header it has seen: a gigabyte for a million images.
            archive.members = []  # type: ignore[attr-defined]
    return found


def next_member(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next member of a tar, None at its end; raises TarError for a header that is damaged, wherever it stands.

    tarfile takes any header but the first that it cannot read for the end of the archive, so that what lies behind is
    left out in silence; and it goes where a negative size leads: back, and round without end.
    """
    info = archive.next()
    if info is None:
        file = archive.fileobj
        assert file is not None
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"the header at byte {archive.offset:,} is damaged")
    elif info.size < 0 or archive.offset < info.offset_data:
        raise tarfile.ReadError(f"the header at byte {info.offset:,} is damaged: its member ends before it begins")
    return info


def _one_form(name: str) -> str:
    return str(PurePosixPath(name.replace("\\", "/")))

"""Reads images from a folder, an object store, or an archive in either, ahead of their use by threads.

Nothing outside what the user named is read: names that climb out were refused before (formats/annotations/table.py),
links that lead out of a folder are refused here, and so is all that is no regular file. What is wrong with one image is
an ImageError, a row of skipped.parquet; a store that does not answer, tried again and again, ends the run, which can go
on later. Build an ImageSource in the process that reads (see jigsaw_pretrain/storage/store.py).
"""

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.images.archive import (
    MOST_BYTES,
    Member,
    find,
    is_archive,
    read_index,
    read_member,
    top_folder,
)
from jigsaw_pretrain.formats.images.decode import ImageError, RasterHeader, is_tiff, raster_header, size_and_orientation
from jigsaw_pretrain.storage.retries import StoreError
from jigsaw_pretrain.storage.store import CONTENT_SECONDS, LOCAL_THREADS, REMOTE_THREADS, Storage, map_ahead

HEADER_BYTES = 1 << 16

TOGETHER = 4
"""How many files of a disk a thread reads for one handing over."""

Fetched = bytes | ImageError
Size = tuple[int, int]


MISSING = "image file is missing"
"""Why an image cannot be read of which there is no file: another image folder may have it."""


class ImageSource:
    """The images below one root; file names are relative to it.

    member_offsets: of an archive, the members that will be read; without them the archive is indexed when first asked.
    """

    def __init__(self, url: str, member_offsets: Mapping[str, Member] | None = None) -> None:
        self.archive = ""
        folder = url
        if is_archive(url) and not Path(url).is_dir():
            folder, _, self.archive = url.replace("\\", "/").rpartition("/")
            folder = folder or ("/" if url.startswith("/") else ".")
        self.url = url
        self._storage = Storage(folder)
        self._quoted = folder.startswith(("http://", "https://"))
        self._member_offsets = member_offsets
        self._top: str | None = None
        self._real = os.path.realpath(self._storage.root) if self._storage.is_local else ""
        self.is_local = self._storage.is_local
        self.threads = LOCAL_THREADS if self._storage.is_local else REMOTE_THREADS

    def describe(self) -> str:
        """The root as the user gave it, without passwords."""
        return self._storage.describe(self.archive)

    def check(self) -> None:
        """Raise UserError where a local root is no folder and no archive, before any work is done."""
        if self.archive:
            self.index()
        elif self._storage.is_local and not Path(self._storage.root).is_dir():
            raise UserError(
                f"{self.describe()} is not a folder. Name the folder (or zip, or tar) that the annotations' file names "
                "are relative to with --images."
            )

    def index(self) -> Mapping[str, Member]:
        """The members of an archive by name."""
        if self._member_offsets is None:
            self._member_offsets = read_index(self._storage, self.archive)
            self._top = top_folder(self._member_offsets)
        return self._member_offsets

    def member_offsets(self, files: Sequence[str]) -> dict[str, Member] | None:
        """What a task must know to read these files: of an archive their members, else nothing."""
        if not self.archive:
            return None
        index = self.index()
        found = ((file, find(index, file, self._top)) for file in files)
        return {file: member for file, member in found if member is not None}

    @property
    def can_list(self) -> bool:
        """Whether the files below the root can be listed, which plain web servers do not do."""
        return bool(self.archive) or not self._quoted

    def files(self) -> tuple[str, ...]:
        """All files, relative to the root (of an archive with one top folder: to that), sorted."""
        return self.survey()[0]

    def survey(self, seconds: float = CONTENT_SECONDS) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """All files, and links to folders that are not followed (see Storage, also for what it raises)."""
        if not self.archive:
            return self._storage.survey(seconds)
        index = self.index()
        start = f"{self._top}/" if self._top else ""
        return tuple(sorted(name.removeprefix(start) for name in index)), ()

    def read(self, file: str) -> bytes:
        """The bytes of one image file; raises ImageError, StoreError."""
        try:
            if self.archive:
                member = find(self.index(), file, self._top)
                if member is None:
                    raise FileNotFoundError
                return read_member(self._storage, self.archive, member)
            if self._storage.is_local:
                return self._read_local(file)
            return self._storage.read(quote(file) if self._quoted else file, MOST_BYTES)
        except StoreError:
            raise
        except FileNotFoundError as error:
            raise ImageError(MISSING) from error
        except (IsADirectoryError, NotADirectoryError) as error:
            raise ImageError("image file is a folder or lies below a file") from error
        except PermissionError as error:
            raise ImageError("image file may not be read (permissions)") from error
        except MemoryError as error:
            raise ImageError("image does not fit into memory") from error
        except OSError as error:
            raise ImageError(f"image file cannot be read: {type(error).__name__} {error.strerror or ''}") from error

    def _read_local(self, file: str) -> bytes:
        path = self._storage.full_path(file)
        real = os.path.realpath(path)
        if os.path.commonpath([self._real, real]) != self._real:
            raise ImageError("image file is a link that leaves the image folder")
        # Not blocking: opening a pipe without a writer would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        try:
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("image file is not a regular file")
            if status.st_size > MOST_BYTES:
                raise ImageError(f"image file is too large: {status.st_size:,} bytes, at most {MOST_BYTES:,}")
            with os.fdopen(descriptor, "rb", closefd=False) as stream:
                return stream.read()
        finally:
            os.close(descriptor)

    def header(self, file: str) -> tuple[int, int, int]:
        """Width, height and EXIF orientation of an image by its header; raises ImageError, StoreError."""
        if not self.archive and not self._storage.is_local:
            try:
                return size_and_orientation(self._begin(file))
            except (ImageError, OSError):
                # An empty file has no first bytes to a store, and some headers are longer: the whole file decides.
                pass
        return size_and_orientation(self.read(file))

    def raster(self, file: str) -> RasterHeader:
        """What an image holds, by its header; raises ImageError, StoreError."""
        if not self.archive and not self._storage.is_local:
            try:
                begin = self._begin(file)
                if not is_tiff(begin):
                    return raster_header(begin)
            except (ImageError, OSError):
                pass
        return raster_header(self.read(file))

    def _begin(self, file: str) -> bytes:
        return self._storage.read_range(quote(file) if self._quoted else file, 0, HEADER_BYTES)

    def size(self, file: str, exif: str) -> Size:
        """Width and height of an image by its header, upright where ``exif`` is ``apply``; raises as ``header``."""
        width, height, orientation = self.header(file)
        return (height, width) if exif == "apply" and orientation in (5, 6, 7, 8) else (width, height)

    def measure(self, files: Sequence[str], exif: str) -> list[Size | str]:
        """The size of each file, or the reason why it has none."""

        def of_one(file: str) -> Size | str:
            try:
                return self.size(file, exif)
            except ImageError as trouble:
                return str(trouble)

        return list(map_ahead(of_one, files, self.threads))


def read_ahead(source: ImageSource, files: Sequence[str]) -> Iterator[Fetched]:
    """The bytes of each file in order, or what is wrong with it, fetched by threads while the caller decodes.

    From a disk a few at a time: handing a file from thread to thread takes longer than reading it.
    """

    def fetch(file: str) -> Fetched:
        try:
            return source.read(file)
        except ImageError as trouble:
            return trouble

    together = TOGETHER if source.is_local else 1
    some = (files[first : first + together] for first in range(0, len(files), together))
    for fetched in map_ahead(lambda names: [fetch(name) for name in names], some, max(2, source.threads // together)):
        yield from fetched

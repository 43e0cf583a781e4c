"""Images that are not where the annotations say, told before any work is done, with what is there in their place.

The headers of a few images are asked for; only where some are missing is the image folder listed.
"""

import unicodedata
from collections.abc import Sequence
from pathlib import PurePosixPath
from urllib.parse import unquote

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.images.decode import ImageError
from jigsaw_pretrain.formats.images.source import MISSING, ImageSource
from jigsaw_pretrain.storage.store import map_ahead

ASKED = 32


def missing_files(files: Sequence[str], source: ImageSource, option: str = "--images") -> tuple[tuple[str, ...], str]:
    """Which of these files are not there, and what to say of them; raises UserError where none is there.

    files: a sample of those that have boxes; ASKED of them are asked for. option: what names the source.
    """
    files = files[:ASKED]

    missing = tuple(file for file, there in zip(files, _are_there(files, source), strict=True) if not there)
    if not missing:
        return (), ""
    said = f"{source.describe().rstrip('/')}/{missing[0]} is not there{_instead(missing[0], source, option)}"
    if len(missing) == len(files):
        raise UserError(f"no image that has boxes is there: {said}. Check {option}.")
    return missing, f"{len(missing)} of {len(files)} images asked for: {said}"


def any_there(files: Sequence[str], source: ImageSource) -> bool:
    """Whether there is any of these files, which were missing before; the first ASKED of them are asked for."""
    return any(_are_there(files[:ASKED], source))


def _are_there(files: Sequence[str], source: ImageSource) -> list[bool]:
    def is_there(file: str) -> bool:
        try:
            source.header(file)
        except ImageError as error:
            return not str(error).startswith(MISSING)
        return True

    return list(map_ahead(is_there, files, source.threads))


def _instead(file: str, source: ImageSource, option: str) -> str:
    """What is there under nearly that name, and what to do about it."""
    if not source.can_list:
        return ""
    there = [path for path in source.files() if _key(path) == _key(file)]
    near = max(there, key=lambda path: _shared(path, file), default=None)
    if near is None:
        return " and no file of nearly that name"
    folder = near.removesuffix(file).rstrip("/")
    if near.endswith(f"/{file}") and source.archive:
        return f", but {near} is: write {folder}/ before the file names, or unpack the archive"
    if near.endswith(f"/{file}"):
        return f", but {near} is: name {source.describe().rstrip('/')}/{folder} as {option}"
    if file.endswith(f"/{near}"):
        return f", but {near} is: take {file.removesuffix(near)} from the file names, or name the folder that holds it"
    return f", but {near} is ({_difference(near, file)}): correct the file names"


def _key(path: str) -> str:
    return unicodedata.normalize("NFC", unquote(PurePosixPath(path).name)).casefold()


def _shared(path: str, file: str) -> int:
    """How many steps of two paths agree, from their ends."""
    pairs: Sequence[tuple[str, str]] = list(zip(path.split("/")[::-1], file.split("/")[::-1], strict=False))
    return next((nth for nth, (one, other) in enumerate(pairs) if _key(one) != _key(other)), len(pairs))


def _difference(near: str, file: str) -> str:
    one, other = PurePosixPath(near).name, PurePosixPath(file).name
    if one == other:
        return "in another folder"
    if unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other):
        return "its Unicode form differs"
    if one.casefold() == other.casefold():
        return "capitals differ"
    return "the name is percent-encoded" if unquote(one) == unquote(other) else "it is written in another way"

"""Where images come from: a folder or an fsspec URL, read one file at a time.

Build it in the process that reads (see formats.storage).
"""

from pathlib import Path

from formats.errors import UserError
from formats.storage import Storage
from prep.images import ImageTrouble


class ImageSource:
    """The images below one root; file names are relative to it."""

    def __init__(self, url: str) -> None:
        self._storage = Storage(url)

    def check(self) -> None:
        """Raise UserError where a local root is no folder, before any work is done."""
        if self._storage.is_local and not Path(self._storage.root).is_dir():
            raise UserError(
                f"{self._storage.url} is not a folder. Name the folder that the annotations' file names are relative "
                "to with --images."
            )

    def read(self, file: str) -> bytes:
        """The bytes of one image file; raises ImageTrouble."""
        try:
            return self._storage.read(file)
        except FileNotFoundError as error:
            raise ImageTrouble("image file is missing") from error
        except (IsADirectoryError, NotADirectoryError) as error:
            raise ImageTrouble("image file is a folder or lies below a file") from error
        except PermissionError as error:
            raise ImageTrouble("image file may not be read (permissions)") from error
        except OSError as error:
            raise ImageTrouble(f"image file cannot be read: {type(error).__name__} {error.strerror or ''}") from error

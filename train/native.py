"""Crops rendered by compiled code: from a JPEG's bytes to its window in the jigsaw in one call (render/), where built.

Installing the project builds it where there is a C compiler, and goes on without where there is none. The pixels are
the same either way: two small crops are compared when it is loaded, and where they differ (another OpenCV, say) it is
not used. It computes only the samples that a window shows: on COCO crops it takes 0.7 of what decoding the crops whole
takes. What it leaves undone (no plain JPEG, averaged areas, anything odd) is for simplejpeg and window.py.
"""

import ctypes
import functools
from collections.abc import Iterable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg

from train.window import RESIZE, WARP, resample

I64 = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

FIELDS = (
    *("data", "size", "stored_width", "stored_height", "x", "y", "width", "height"),
    *("scaled_x", "scaled_y", "flip", "from_x", "from_y", "out", "pitch", "columns", "rows", "kernel"),
)
"""A job, int64 each: where a member's bytes are and how many, its size, the crop in it; the crop's window as
window.Windows has it; the address of its first pixel in the jigsaw, bytes from row to row, its size; RESIZE or WARP."""

SLOW = "crops are rendered without compiled code, which takes half as long again"


class Renderer:
    """The compiled code and its memory: one a thread. Raises OSError where it is not built or not of this project."""

    def __init__(self, file: Path) -> None:
        library = ctypes.CDLL(str(file))
        library.new_context.restype = ctypes.c_void_p
        library.free_context.argtypes = [ctypes.c_void_p]
        library.render.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
        self._render, self._free = library.render, library.free_context
        self._context = library.new_context()
        if not self._context:
            raise OSError("out of memory")

    def __del__(self) -> None:
        """Give its memory back."""
        if getattr(self, "_context", None):
            self._free(self._context)

    def render(self, jobs: I64) -> npt.NDArray[np.bool_]:
        """Do jobs, int64 [n, FIELDS]; which were left undone, their windows untouched: bool [n].

        Addresses must be right and hold as many bytes as the job says: nothing here can tell.
        """
        jobs = np.ascontiguousarray(jobs, dtype=np.int64)
        undone = np.ones(len(jobs), dtype=np.uint8)
        self._render(self._context, jobs.ctypes.data, len(jobs), undone.ctypes.data)
        return undone != 0


def _agrees(renderer: Renderer) -> bool:
    """Whether it makes of two small crops what simplejpeg and window.py make of them."""
    rng = np.random.default_rng(0)
    pixels = np.repeat(np.repeat(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8), 5, axis=0), 5, axis=1)
    for sampling in ("444", "420"):
        jpeg = np.frombuffer(simplejpeg.encode_jpeg(pixels, 90, "RGB", sampling), dtype=np.uint8)
        whole = simplejpeg.decode_jpeg(jpeg, "RGB")
        for kernel, scaled, size in ((RESIZE, (39, 28), (33, 27)), (WARP, (61, 40), (21, 17))):
            out, expected = np.zeros((2, size[1], size[0], 3), dtype=np.uint8)
            resample(whole, scaled, True, (3, 1), False, expected)
            job = [jpeg.ctypes.data, len(jpeg), 45, 30, 0, 0, 45, 30, *scaled, 1, 3, 1]
            place = [out.ctypes.data, out.strides[0], *size, kernel]
            if renderer.render(np.array([[*job, *place]], dtype=np.int64)).any() or not np.array_equal(out, expected):
                return False
    return True


def files(folder: Path) -> Iterable[Path]:
    """Where a folder may have the compiled code."""
    return (folder / f"_render{suffix}" for suffix in EXTENSION_SUFFIXES)


@functools.lru_cache(maxsize=1)
def check() -> tuple[Path | None, str | None]:
    """The file of the compiled code, or why crops are rendered without it, in plain words."""
    found = next((file for file in files(Path(__file__).parent) if file.is_file()), None)
    if found is None:
        return (
            None,
            f"{SLOW}: where there is a C compiler, `make venv` builds it",
        )
    try:
        if _agrees(Renderer(found)):
            return found, None
        reason = "its pixels are not those of this OpenCV or simplejpeg"
    except (OSError, AttributeError) as error:
        reason = str(error)
    return None, f"{SLOW}: {found.name} is not used ({reason})"


def renderer() -> Renderer | None:
    """A renderer for one thread, or None where there is no compiled code that makes the same pixels."""
    file, _ = check()
    return None if file is None else Renderer(file)

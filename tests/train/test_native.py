"""Compiled rendering: bit for bit what simplejpeg, OpenCV and window.py make, and undone rather than wrong."""

from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.dataset import Dataset
from tests.train.tiny import make_dataset
from train import jigsaw, native
from train.jigsaw import Assembler
from train.native import Renderer, check, files, renderer
from train.streams import StreamOptions
from train.template import Template
from train.window import RESIZE, WARP, resample

Pixels = npt.NDArray[np.uint8]

SMALL = 2
"""As many columns of halved chroma libjpeg upsamples in another way."""


@pytest.fixture(scope="module")
def compiled() -> Renderer:
    found = renderer()
    if found is None:
        pytest.skip(str(check()[1]))
    return found


def picture(size: npt.NDArray[np.int64], rng: np.random.Generator, noise: int) -> Pixels:
    """Soft shapes with noise on them; ``noise`` 255 is nothing else."""
    width, height = (int(side) for side in size)
    coarse = rng.integers(0, 256, (max(2, height // 9), max(2, width // 9), 3), dtype=np.uint8)
    soft = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int64)
    return np.clip(soft + rng.integers(-noise, noise + 1, soft.shape), 0, 255).astype(np.uint8)


class Case:
    """A crop (x, y, width, height) of a member, its scaled size and the window of it that is wanted."""

    def __init__(self, rng: np.random.Generator, largest: int) -> None:
        self.stored = rng.integers(1, largest, 2)
        self.start = rng.integers(0, self.stored) * int(rng.integers(2))
        self.size = self.stored - self.start - rng.integers(0, self.stored - self.start) * int(rng.integers(2))
        self.scaled = np.maximum(1, np.floor(self.size * rng.uniform(0.55, 1.9) + 0.5)).astype(np.int64)
        region = np.array([(64, 64), (160, 64), (64, 160), (160, 160)])[rng.integers(4)]
        self.window = np.minimum(region, self.scaled)
        self.origin = rng.integers(0, self.scaled - self.window + 1)
        self.flip = bool(rng.integers(2))
        self.kernel = WARP if self.scaled.prod() > 2 * self.window.prod() else RESIZE

    def render(self, compiled: Renderer, jpeg: bytes) -> Pixels | None:
        """Its window; None where it is left undone. What is around the window must stay as it was."""
        data = np.frombuffer(jpeg, dtype=np.uint8)
        page = np.full((self.window[1] + 2, self.window[0] + 2, 3), 7, dtype=np.uint8)
        out = page[1:-1, 1:-1]
        job = [data.ctypes.data, len(data), *self.stored, *self.start, *self.size]
        job += [*self.scaled, self.flip, *self.origin, out.ctypes.data, page.strides[0], *self.window, self.kernel]
        undone = compiled.render(np.array([job], dtype=np.int64))[0]
        around = page.copy()
        around[1:-1, 1:-1] = 7
        assert (around == 7).all()
        if undone:
            assert (page == 7).all()
            return None
        return out

    def expect(self, jpeg: bytes) -> Pixels | None:
        """The same the slow way; None for a damaged member."""
        try:
            member = simplejpeg.decode_jpeg(jpeg, "RGB")
        except ValueError:
            return None
        if member.shape[:2] != tuple(self.stored[::-1]):
            return None
        (x, y), (width, height) = self.start, self.size
        out = np.zeros((self.window[1], self.window[0], 3), dtype=np.uint8)
        scaled, origin = (int(self.scaled[0]), int(self.scaled[1])), (int(self.origin[0]), int(self.origin[1]))
        resample(member[y : y + height, x : x + width], scaled, self.flip, origin, False, out)
        return out


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), sampling=st.sampled_from(["444", "420"]), quality=st.integers(20, 100))
def test_pixels_are_those_of_the_libraries(compiled: Renderer, seed: int, sampling: str, quality: int) -> None:
    rng = np.random.default_rng(seed)
    case = Case(rng, int(rng.choice([20, 120, 420])))
    pixels = picture(case.stored, rng, int(rng.choice([0, 8, 255])))
    jpeg = simplejpeg.encode_jpeg(pixels, quality, "RGB", sampling)
    found = case.render(compiled, jpeg)
    if found is None:
        assert sampling == "420" and (case.stored[0] + 1) // 2 <= SMALL
    else:
        expected = case.expect(jpeg)
        assert expected is not None and np.array_equal(found, expected)


def test_a_damaged_member_is_never_done_otherwise_than_by_the_library(compiled: Renderer) -> None:
    rng, seen = np.random.default_rng(5), Counter[str]()
    for _ in range(40):
        case = Case(rng, 60)
        pixels = picture(case.stored, rng, int(rng.choice([0, 8, 255])))
        whole = simplejpeg.encode_jpeg(pixels, int(rng.integers(20, 101)), "RGB", str(rng.choice(["444", "420"])))
        for _ in range(40):
            jpeg = bytearray(whole)
            at = int(rng.integers(len(jpeg)))
            match int(rng.integers(3)):
                case 0:
                    jpeg[at] ^= 1 << int(rng.integers(8))
                case 1:
                    del jpeg[at:]
                case _:
                    del jpeg[at : at + int(rng.integers(1, 30))]
            found = case.render(compiled, bytes(jpeg))
            expected = case.expect(bytes(jpeg))
            if found is not None:
                assert expected is not None and np.array_equal(found, expected)
            seen["undone" if found is None else "done"] += 1
    assert min(seen.values()) > 100


def test_what_is_not_plain_is_left_undone(compiled: Renderer) -> None:
    case = Case(np.random.default_rng(1), 90)
    pixels = picture(case.stored, np.random.default_rng(2), 8)
    plain = simplejpeg.encode_jpeg(pixels, 90, "RGB", "444")
    assert case.render(compiled, plain) is not None
    _, progressive = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])
    _, restarts = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_RST_INTERVAL, 2])
    _, png = cv2.imencode(".png", pixels)
    others = [simplejpeg.encode_jpeg(pixels, 90, "RGB", sampling) for sampling in ("422", "440", "411", "Gray")]
    for jpeg in (*(bytes(one) for one in (progressive, restarts, png)), *others, b"", plain[:-2], plain[2:]):
        assert case.render(compiled, jpeg) is None


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("native"), {"S": [25, 14], "T": [11, 9, 3], "W": [20]})


@pytest.mark.parametrize("options", [{}, {"fit": "warp"}, {"fit": "resize"}, {"resize_low": 0.3, "resize_high": 0.6}])
def test_batches_are_the_same_with_and_without(
    compiled: Renderer, dataset: Dataset, options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    template, stream = Template(96, 32), StreamOptions(batch=16, lanes=4, **options)  # type: ignore[arg-type]

    def batch() -> tuple[Pixels, tuple[tuple[bytes, bytes], ...] | None]:
        assembler = Assembler(dataset, template, stream, range(4), with_digests=True)
        images = np.zeros((16, 96, 96, 3), dtype=np.uint8)
        chunk = assembler.step(3, images)
        assembler.close()
        return images, chunk.digests

    with_it = batch()
    monkeypatch.setattr(jigsaw, "renderer", lambda: None)
    without = batch()
    assert np.array_equal(with_it[0], without[0]) and with_it[1] == without[1]


def test_its_absence_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "files", lambda folder: iter([tmp_path / "_render.so"]))
    file, reason = check.__wrapped__()
    assert (
        file is None and reason and "without compiled code" in reason and "C compiler" in reason and "\n" not in reason
    )
    next(iter(native.files(tmp_path))).write_bytes(b"no library")
    file, reason = check.__wrapped__()
    assert file is None and reason and "_render.so is not used" in reason and "\n" not in reason
    assert all(path.parent == tmp_path for path in files(tmp_path))


def test_other_pixels_are_not_used(compiled: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "resample", lambda *given: given[-1].fill(1))
    file, reason = check.__wrapped__()
    assert file is None and reason and "not those of this OpenCV" in reason

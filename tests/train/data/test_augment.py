"""Windows: the resampled pixels against an independent float64 computation of the whole resized image."""

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from jigsaw_pretrain.formats.jigsaw import Template
from jigsaw_pretrain.train.data.augment import Draws, draw, place_windows, resample
from jigsaw_pretrain.train.recipe import StreamOptions

Pixels = npt.NDArray[np.uint8]


def smooth_image(width: int, height: int, seed: int = 0) -> Pixels:
    """Random, but without the hard edges that magnify a small difference of place."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def weights(length: int, scaled: int) -> npt.NDArray[np.float64]:
    """Bilinear interpolation of one axis as a matrix [scaled, length], border pixels repeated."""
    matrix = np.zeros((scaled, length))
    for i in range(scaled):
        x = min(max((i + 0.5) * length / scaled - 0.5, 0), length - 1)
        low = int(np.floor(x))
        matrix[i, low] += 1 - (x - low)
        matrix[i, min(low + 1, length - 1)] += x - low
    return matrix


def area_weights(length: int, scaled: int) -> npt.NDArray[np.float64]:
    """Area averages of one axis as a matrix [scaled, length]."""
    matrix = np.zeros((scaled, length))
    step = length / scaled
    for i in range(scaled):
        for j in range(length):
            matrix[i, j] = max(0.0, min((i + 1) * step, j + 1) - max(i * step, j)) / step
    return matrix


def reference(pixels: Pixels, scaled: tuple[int, int], flip: bool, smooth: bool) -> npt.NDArray[np.float64]:
    """The whole crop, resized and flipped."""
    image = pixels.astype(np.float64)
    for axis, size in ((0, scaled[1]), (1, scaled[0])):
        kind = area_weights if smooth and size < image.shape[axis] else weights
        image = np.moveaxis(np.tensordot(kind(image.shape[axis], size), image, axes=(1, axis)), 0, axis)
    return image[:, ::-1] if flip else image


@pytest.mark.parametrize("fit", ["crop", "warp", "resize"])
@pytest.mark.parametrize("flip", [False, True])
def test_windows_are_those_of_the_whole_resized_crop(fit: str, flip: bool) -> None:
    template, rng = Template(128, 32), np.random.default_rng(1)
    for trial in range(12):
        sizes = rng.integers(8, 260, (1, 4, 2))
        options = StreamOptions(seed=trial, fit=fit, flip=float(flip), batch=1, resize_low=0.3, resize_high=1.8)
        draws = draw(options, np.array([0]), np.array([trial]))
        windows = place_windows(sizes[..., 0], sizes[..., 1], draws, template, fit)
        for region, place in enumerate(windows.table()[0].tolist()):
            scaled_x, scaled_y, flipped, x, y, to_x, to_y, width, height, smooth = place
            assert bool(flipped) == flip
            pixels = smooth_image(int(sizes[0, region, 0]), int(sizes[0, region, 1]), seed=trial)
            canvas = np.zeros((128, 128, 3), dtype=np.uint8)
            out = canvas[to_y : to_y + height, to_x : to_x + width]
            resample(pixels, (scaled_x, scaled_y), flip, (x, y), bool(smooth), out)
            whole = reference(pixels, (scaled_x, scaled_y), flip, bool(smooth))
            wanted = whole[y : y + height, x : x + width]
            difference = np.abs(out - wanted)
            assert difference.max() <= 2, (fit, trial, region, place)
            assert difference.mean() <= 0.5
            canvas[to_y : to_y + height, to_x : to_x + width] = 0
            assert not canvas.any()


def test_large_crops_meet_an_independent_library() -> None:
    pixels = smooth_image(900, 700)
    out = np.zeros((160, 160, 3), dtype=np.uint8)
    resample(pixels, (1080, 840), False, (333, 217), False, out)
    whole = np.asarray(Image.fromarray(pixels).resize((1080, 840), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(whole[217:377, 333:493] - out).max() <= 2


def test_the_border_of_a_crop_is_not_blended_with_padding() -> None:
    for size, scaled in (((10, 10), (15, 15)), ((300, 300), (450, 450)), ((300, 40), (400, 53))):
        pixels = np.full((size[1], size[0], 3), 200, dtype=np.uint8)
        for smooth in (False, True):
            for start in ((0, 0), (max(0, scaled[0] - 100), max(0, scaled[1] - 100))):
                out = np.zeros((min(100, scaled[1]), min(100, scaled[0]), 3), dtype=np.uint8)
                resample(pixels, scaled, False, start, smooth, out)
                assert (out == 200).all()


def one(width: int, height: int, options: StreamOptions, position: int = 0) -> tuple[Draws, list[list[int]]]:
    draws = draw(options, np.array([0]), np.array([position]))
    sizes = np.array([[width] * 4]), np.array([[height] * 4])
    return draws, place_windows(*sizes, draws, Template(), options.fit).table()[0].tolist()


def test_one_ratio_for_both_axes_from_the_range() -> None:
    options = StreamOptions(batch=1)
    ratios = []
    for position in range(300):
        draws, places = one(1000, 500, options, position)
        for region, place in enumerate(places):
            ratio = float(draws.ratio[0, region])
            assert place[0] == round(1000 * ratio) and place[1] == round(500 * ratio)
            ratios.append(ratio)
    assert 0.8 <= min(ratios) < 0.81 and 1.49 < max(ratios) < 1.5
    assert np.mean(ratios) == pytest.approx(1.15, abs=0.03)


def test_places_cover_the_whole_range_in_each_axis() -> None:
    options = StreamOptions(batch=1, resize_low=1, resize_high=1)
    cut, laid = set(), set()
    for position in range(400):
        _, places = one(170, 150, options, position)
        _, _, _, from_x, from_y, to_x, to_y, width, height, _ = places[3]
        assert (width, height, from_y, to_x) == (160, 150, 0, 64)
        cut.add(from_x)
        laid.add(to_y - 64)
    assert cut == set(range(11)) and laid == set(range(11))


def test_without_augmentation_all_is_centred() -> None:
    for position in range(5):
        draws, places = one(170, 100, StreamOptions(batch=1, augment=False), position)
        assert (draws.ratio == 1).all() and not draws.flip.any()
        assert places[3] == [170, 100, 0, 5, 0, 64, 64 + 30, 160, 100, 0]


def test_resize_fits_inside_and_warp_fills() -> None:
    options = StreamOptions(batch=1, fit="resize")
    _, places = one(300, 100, options)
    # 160 x 53.33 in the large square, 64 x 21.33 in the small one.
    assert [place[:2] for place in places] == [[64, 21], [160, 53], [64, 21], [160, 53]]
    _, places = one(10, 10, options)
    assert [place[:2] for place in places] == [[64, 64], [64, 64], [64, 64], [160, 160]]
    _, places = one(300, 100, StreamOptions(batch=1, fit="warp"))
    assert [place[:2] for place in places] == [[64, 64], [160, 64], [64, 160], [160, 160]]


def test_a_crop_never_vanishes() -> None:
    _, places = one(1, 1, StreamOptions(batch=1, resize_low=0.1, resize_high=0.1))
    assert all(place[:2] == [1, 1] and place[7:9] == [1, 1] for place in places)
    _, places = one(5000, 3, StreamOptions(batch=1, fit="resize"))
    assert all(place[1] >= 1 for place in places)


def test_sides_beyond_the_warp_of_opencv() -> None:
    pixels = np.full((2, 40_000, 3), 90, dtype=np.uint8)
    out = np.zeros((2, 100, 3), dtype=np.uint8)
    resample(pixels, (40_000, 2), True, (123, 0), False, out)
    assert (out == 90).all()

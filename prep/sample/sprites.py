"""The objects of the sample dataset: twelve things drawn with Pillow, four of each aspect group.

Each class has a shape and a range of colours of its own, so that a small network learns them in minutes, and enough
variation in colour, proportion, pattern and light that it has something to learn. A sprite takes 1 to 4 ms.
For real data none of this is used.
"""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from jigsaw_pretrain import rng

Colour = tuple[int, int, int]
OVERSAMPLE = 3


class Dice:
    """Successive draws from one key's stream: the sample dataset's only source of randomness."""

    def __init__(self, key: int) -> None:
        self._key, self._next = key, 0

    def _word(self) -> rng.U64:
        self._next += 1
        return rng.random_u64(rng.derive_key(self._key, self._next), 1)[0]

    def real(self, low: float, high: float) -> float:
        """A float in [low, high)."""
        return low + (high - low) * float(rng.uniform(self._word())[0])

    def whole(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + int(rng.randint(self._word(), high - low + 1)[0])

    def colour(self, hue: tuple[float, float], saturation: float = 0.75, value: float = 0.85) -> Colour:
        """A colour with its hue from a range (0 to 1, may pass 1), near the given saturation and value."""
        h = self.real(*hue) % 1.0
        s = min(1.0, max(0.0, saturation + self.real(-0.15, 0.15)))
        v = min(1.0, max(0.0, value + self.real(-0.12, 0.12)))
        r, g, b = colorsys.hsv_to_rgb(h, s, v)
        return round(255 * r), round(255 * g), round(255 * b)


def shade(colour: Colour, factor: float) -> Colour:
    """The colour made darker (factor below 1) or lighter (above), clipped."""
    r, g, b = (min(255, max(0, round(channel * factor))) for channel in colour)
    return r, g, b


class Pen:
    """An ImageDraw whose coordinates are fractions of the canvas."""

    def __init__(self, canvas: Image.Image) -> None:
        self._draw, self._w, self._h = ImageDraw.Draw(canvas), canvas.width - 1, canvas.height - 1

    def _at(self, points: tuple[float, ...]) -> list[float]:
        return [p * (self._h if i % 2 else self._w) for i, p in enumerate(points)]

    def oval(self, *box: float, fill: Colour) -> None:
        """A filled ellipse in left, top, right, bottom."""
        self._draw.ellipse(self._at(box), fill=fill)

    def slab(self, *box: float, fill: Colour, round_by: float = 0.0) -> None:
        """A filled rectangle, its corners rounded by a fraction of the canvas's shorter side."""
        self._draw.rounded_rectangle(self._at(box), radius=round_by * min(self._w, self._h), fill=fill)

    def shape(self, *points: float, fill: Colour) -> None:
        """A filled polygon x0, y0, x1, y1, ..."""
        self._draw.polygon(self._at(points), fill=fill)

    def stroke(self, *points: float, fill: Colour, width: float = 0.02) -> None:
        """A line through points, its width a fraction of the canvas's shorter side."""
        self._draw.line(self._at(points), fill=fill, width=max(1, round(width * min(self._w, self._h))), joint="curve")


def _ball(pen: Pen, dice: Dice) -> None:
    first, second = dice.colour((0.95, 1.07)), (245, 240, 230)
    pen.oval(0, 0, 1, 1, fill=first)
    tilt = dice.real(-0.25, 0.25)
    pen.shape(0.3 + tilt, 0.06, 0.46 + tilt, 0.02, 0.62 - tilt, 0.98, 0.4 - tilt, 0.99, fill=second)
    pen.shape(0.04, 0.42, 0.96, 0.36, 0.97, 0.54, 0.03, 0.6, fill=second)
    pen.oval(0.4, 0.38, 0.6, 0.58, fill=shade(first, 0.8))


def _crate(pen: Pen, dice: Dice) -> None:
    wood = dice.colour((0.06, 0.1), 0.6, 0.7)
    pen.slab(0, 0, 1, 1, fill=shade(wood, 0.55))
    planks = dice.whole(3, 5)
    for i in range(planks):
        pen.slab(0.05, (i + 0.08) / planks, 0.95, (i + 0.92) / planks, fill=shade(wood, dice.real(0.9, 1.2)))
    for corners in ((0, 0, 0.14, 1), (0.86, 0, 1, 1), (0, 0, 1, 0.12), (0, 0.88, 1, 1)):
        pen.slab(*corners, fill=shade(wood, 0.75))
    pen.stroke(0.1, 0.1, 0.9, 0.9, fill=shade(wood, 0.7), width=0.1)


def _flower(pen: Pen, dice: Dice) -> None:
    petal, count = dice.colour((0.78, 0.92), 0.55, 0.92), dice.whole(6, 9)
    for ring, radius in ((0.32, 0.18), (0.2, 0.13)):
        for i in range(count):
            angle = 2 * np.pi * (i + (ring < 0.3) / 2) / count
            x, y = 0.5 + ring * np.cos(angle), 0.5 + ring * np.sin(angle)
            pen.oval(x - radius, y - radius, x + radius, y + radius, fill=shade(petal, 1.1 if ring < 0.3 else 0.85))
    pen.oval(0.34, 0.34, 0.66, 0.66, fill=(250, 200, 40))
    pen.oval(0.43, 0.43, 0.57, 0.57, fill=(170, 110, 20))


def _clock(pen: Pen, dice: Dice) -> None:
    rim = dice.colour((0.58, 0.68), 0.6, 0.45)
    pen.slab(0, 0, 1, 1, fill=rim, round_by=0.25)
    pen.oval(0.09, 0.09, 0.91, 0.91, fill=(250, 250, 245))
    for i in range(12):
        c, s = np.cos(i * np.pi / 6), np.sin(i * np.pi / 6)
        pen.stroke(0.5 + 0.33 * c, 0.5 + 0.33 * s, 0.5 + 0.39 * c, 0.5 + 0.39 * s, fill=(40, 40, 50), width=0.035)
    for length, width in ((0.2, 0.06), (0.3, 0.04)):
        angle = dice.real(0, 2 * np.pi)
        end = 0.5 + length * np.cos(angle), 0.5 + length * np.sin(angle)
        pen.stroke(0.5, 0.5, *end, fill=(30, 30, 40), width=width)


def _bottle(pen: Pen, dice: Dice) -> None:
    glass = dice.colour((0.3, 0.38), 0.8, 0.5)
    pen.slab(0.34, 0, 0.66, 0.34, fill=glass, round_by=0.1)
    pen.slab(0.3, 0, 0.7, 0.07, fill=(190, 160, 60), round_by=0.06)
    pen.slab(0, 0.24, 1, 1, fill=glass, round_by=0.4)
    pen.slab(0.06, 0.48, 0.94, 0.8, fill=(240, 232, 205))
    pen.slab(0.06, 0.56, 0.94, 0.6, fill=dice.colour((0, 1)))
    pen.slab(0.14, 0.34, 0.24, 0.94, fill=shade(glass, 1.6), round_by=0.05)


def _lighthouse(pen: Pen, dice: Dice) -> None:
    red = dice.colour((0.97, 1.02), 0.85, 0.8)
    bands = dice.whole(5, 7)
    for i in range(bands):
        top, bottom = 0.2 + 0.8 * i / bands, 0.2 + 0.8 * (i + 1) / bands
        inset = [0.24 - 0.24 * (y - 0.2) / 0.8 for y in (top, bottom)]
        edge = (inset[0], top, 1 - inset[0], top, 1 - inset[1], bottom, inset[1], bottom)
        pen.shape(*edge, fill=red if i % 2 == 0 else (245, 245, 245))
    pen.slab(0.3, 0.08, 0.7, 0.2, fill=(255, 225, 110))
    pen.stroke(0.5, 0.08, 0.5, 0.2, fill=(70, 70, 80), width=0.06)
    pen.shape(0.22, 0.09, 0.5, 0, 0.78, 0.09, fill=shade(red, 0.6))
    pen.slab(0.18, 0.19, 0.82, 0.215, fill=(60, 60, 70))


def _cypress(pen: Pen, dice: Dice) -> None:
    leaf = dice.colour((0.26, 0.36), 0.7, 0.42)
    pen.slab(0.4, 0.86, 0.6, 1, fill=(95, 65, 40))
    pen.oval(0.08, 0.12, 0.92, 0.95, fill=shade(leaf, 0.8))
    pen.shape(0.14, 0.5, 0.5, 0, 0.86, 0.5, fill=shade(leaf, 0.8))
    for _ in range(60):
        y = dice.real(0.12, 0.9)
        reach = 0.36 * min(1.0, (y + 0.05) * 2.0) * (1.0 if y < 0.75 else 0.7)
        x, size = 0.5 + dice.real(-reach, reach), dice.real(0.05, 0.1)
        pen.oval(x - size, y - size / 3, x + size, y + size / 3, fill=shade(leaf, dice.real(0.8, 1.7)))


def _candle(pen: Pen, dice: Dice) -> None:
    wax = dice.colour((0.1, 0.16), 0.25, 0.95)
    pen.oval(0.2, 0, 0.8, 0.26, fill=(255, 165, 40))
    pen.oval(0.34, 0.08, 0.66, 0.25, fill=(255, 240, 160))
    pen.slab(0.46, 0.2, 0.54, 0.32, fill=(50, 40, 40))
    pen.slab(0.12, 0.3, 0.88, 0.9, fill=wax, round_by=0.12)
    for x in (0.16, 0.42, 0.66):
        pen.slab(x, 0.3, x + 0.16, dice.real(0.42, 0.66), fill=shade(wax, 0.86), round_by=0.08)
    pen.oval(0, 0.86, 1, 1, fill=(150, 95, 50))


def _car(pen: Pen, dice: Dice) -> None:
    paint = dice.colour((0.55, 0.63), 0.8, 0.8)
    pen.shape(0.2, 0.45, 0.34, 0.02, 0.66, 0.02, 0.84, 0.45, fill=shade(paint, 0.9))
    pen.shape(0.27, 0.42, 0.37, 0.1, 0.49, 0.1, 0.49, 0.42, fill=(190, 220, 235))
    pen.shape(0.53, 0.42, 0.53, 0.1, 0.63, 0.1, 0.75, 0.42, fill=(175, 210, 230))
    pen.slab(0, 0.38, 1, 0.8, fill=paint, round_by=0.14)
    pen.slab(0.93, 0.46, 1, 0.58, fill=(255, 235, 140), round_by=0.04)
    for x in (0.13, 0.67):
        pen.oval(x, 0.54, x + 0.2, 1, fill=(35, 35, 40))
        pen.oval(x + 0.06, 0.68, x + 0.14, 0.86, fill=(190, 190, 195))


def _boat(pen: Pen, dice: Dice) -> None:
    hull = dice.colour((0.04, 0.09), 0.8, 0.6)
    pen.slab(0.44, 0, 0.47, 0.6, fill=(90, 70, 50))
    pen.shape(0.49, 0.03, 0.49, 0.52, 0.86, 0.52, fill=(250, 248, 240))
    pen.shape(0.42, 0.08, 0.42, 0.52, 0.16, 0.52, fill=dice.colour((0.1, 0.15), 0.7, 0.95))
    pen.shape(0, 0.58, 1, 0.58, 0.84, 1, 0.14, 1, fill=hull)
    pen.shape(0, 0.58, 1, 0.58, 0.97, 0.68, 0.03, 0.68, fill=(245, 245, 245))


def _fish(pen: Pen, dice: Dice) -> None:
    scale = dice.colour((0.06, 0.11), 0.9, 0.95)
    pen.shape(0.7, 0.5, 1, 0.08, 0.93, 0.5, 1, 0.92, fill=shade(scale, 0.8))
    pen.shape(0.3, 0.2, 0.45, 0, 0.62, 0.22, fill=shade(scale, 0.8))
    pen.oval(0, 0.1, 0.8, 0.9, fill=scale)
    for x in (0.24, 0.44, 0.6):
        pen.oval(x, 0.14 if x < 0.5 else 0.24, x + 0.07, 0.86 if x < 0.5 else 0.76, fill=(250, 250, 250))
    pen.oval(0.08, 0.34, 0.17, 0.54, fill=(255, 255, 255))
    pen.oval(0.1, 0.39, 0.15, 0.5, fill=(20, 20, 20))


def _bus(pen: Pen, dice: Dice) -> None:
    paint = dice.colour((0.125, 0.155), 0.9, 0.95)
    pen.slab(0, 0, 1, 0.86, fill=paint, round_by=0.12)
    windows = dice.whole(4, 6)
    for i in range(windows):
        left = 0.05 + 0.9 * i / windows
        pen.slab(left, 0.14, left + 0.9 / windows - 0.03, 0.46, fill=(120, 160, 185), round_by=0.04)
    pen.slab(0, 0.56, 1, 0.63, fill=(40, 40, 45))
    for x in (0.14, 0.7):
        pen.oval(x, 0.64, x + 0.15, 1, fill=(30, 30, 35))
        pen.oval(x + 0.05, 0.75, x + 0.1, 0.89, fill=(170, 170, 175))


@dataclass(frozen=True)
class Sprite:
    """One class of object: its name, how it is drawn, and the range of its width divided by its height."""

    name: str
    draw: Callable[[Pen, Dice], None]
    aspect: tuple[float, float]


SPRITES = (
    Sprite("ball", _ball, (0.97, 1.03)),
    Sprite("crate", _crate, (0.85, 1.2)),
    Sprite("flower", _flower, (0.9, 1.1)),
    Sprite("clock", _clock, (0.92, 1.08)),
    Sprite("bottle", _bottle, (0.27, 0.36)),
    Sprite("lighthouse", _lighthouse, (0.26, 0.36)),
    Sprite("cypress", _cypress, (0.28, 0.4)),
    Sprite("candle", _candle, (0.22, 0.34)),
    Sprite("car", _car, (2.1, 2.7)),
    Sprite("boat", _boat, (1.8, 2.3)),
    Sprite("fish", _fish, (1.9, 2.5)),
    Sprite("bus", _bus, (2.2, 3.0)),
)


def render(sprite: Sprite, width: int, height: int, dice: Dice) -> Image.Image:
    """One object as RGBA of that size: drawn large and scaled down, lit from one side, with a grain on its surface."""
    canvas = Image.new("RGBA", (width * OVERSAMPLE, height * OVERSAMPLE), (0, 0, 0, 0))
    sprite.draw(Pen(canvas), dice)
    small = canvas.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(small).astype(np.float32)
    angle = dice.real(0, 2 * np.pi)
    x, y = np.linspace(-1, 1, width)[None, :], np.linspace(-1, 1, height)[:, None]
    light = 1 + 0.22 * (np.cos(angle) * x + np.sin(angle) * y)
    grain = rng.uniform(rng.random_u64(rng.derive_key(dice.whole(0, 2**31)), width * height)).reshape(height, width)
    pixels[..., :3] *= (light * (0.88 + 0.24 * grain))[..., None]
    lit = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8), "RGBA")
    if dice.real(0, 1) < 0.5:
        lit = lit.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if dice.real(0, 1) < 0.25:
        lit = lit.filter(ImageFilter.GaussianBlur(0.7))
    return lit

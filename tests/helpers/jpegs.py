"""JPEGs of any sampling factors, which no encoder at hand writes: every 8 x 8 block of a component is of one value."""

import struct
from collections.abc import Sequence

import numpy as np

_DC_BITS = (0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0)
_DC_CODES = ("00", "010", "011", "100", "101", "110", "1110", "11110", "111110", "1111110", "11111110", "111111110")


Factors = Sequence[tuple[int, int]]


def flat_blocks(width: int, height: int, factors: Factors, seed: int = 0, precision: int = 8) -> bytes:
    """A baseline JPEG whose components have these horizontal and vertical factors; blocks are drawn from the seed."""
    rng = np.random.default_rng(seed)
    # A component alone lies there block by block, whatever its factors.
    units = factors if len(factors) > 1 else [(1, 1)]
    most = max(h for h, _ in units), max(v for _, v in units)
    columns, rows = (-(-size // (8 * one)) for size, one in zip((width, height), most, strict=True))
    bits, before = [], [0] * len(factors)
    for _ in range(columns * rows):
        for nth, (h, v) in enumerate(units):
            for _ in range(h * v):
                value = int(rng.integers(-500, 500))
                bits.append(_coded(value - before[nth]))
                before[nth] = value
    stream = "".join(bits)
    stream += "1" * (-len(stream) % 8)
    data = int(stream, 2).to_bytes(len(stream) // 8, "big").replace(b"\xff", b"\xff\x00")
    frame = struct.pack(">BHHB", precision, height, width, len(factors))
    frame += b"".join(bytes((nth + 1, h << 4 | v, 0)) for nth, (h, v) in enumerate(factors))
    scan = bytes([len(factors)]) + b"".join(bytes((nth + 1, 0)) for nth in range(len(factors))) + b"\x00\x3f\x00"
    segments = (
        (0xE0, b"JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"),
        (0xDB, b"\x00" + b"\x01" * 64),
        (0xC0 if precision == 8 else 0xC1, frame),
        (0xC4, b"\x00" + bytes(_DC_BITS) + bytes(range(12))),
        # The one code of the other coefficients: there are none.
        (0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\x00"),
        (0xDA, scan),
    )
    written = b"".join(struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in segments)
    return b"\xff\xd8" + written + data + b"\xff\xd9"


def _coded(difference: int) -> str:
    size = abs(difference).bit_length()
    value = difference if difference >= 0 else difference + (1 << size) - 1
    return _DC_CODES[size] + (f"{value:0{size}b}" if size else "") + "0"

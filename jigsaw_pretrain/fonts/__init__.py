"""The letters of pictures: names of most scripts, arrows and signs, whatever fonts the machine has.

Two fonts: DejaVu Sans, which matplotlib brings (Latin, Greek, Cyrillic, Hebrew, Arabic, arrows), and a part of Noto
Sans CJK (Chinese, Japanese, Korean) that lies here: the everyday characters of GB 2312, Big5 and JIS, kana, and the
Hangul of KS X 1001, 2 MB, under the SIL Open Font License 1.1 (OFL.txt). Pillow draws a text in one font and asks no
second one for what is missing, so the font is chosen for each text. A character that neither has becomes a question
mark; pages name every class in the browser's own fonts too.
"""

from functools import cache
from pathlib import Path

from PIL import ImageFont

CJK = Path(__file__).with_name("noto-sans-cjk-subset.otf")


@cache
def _faces() -> dict[str, frozenset[int]]:
    """The files of the fonts, the preferred first, each with the characters that it has."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    files = (str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), str(CJK))
    return {file: frozenset(FT2Font(file).get_charmap()) for file in files}


@cache
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


def fitted(text: str, size: int, room: float | None = None, smallest: int = 10) -> tuple[str, ImageFont.FreeTypeFont]:
    """What to draw for a text, and in which font.

    Args:
        text: what is to be read.
        size: of the letters, in pixels.
        room: how wide it may become; a text that is wider gets smaller letters, then is cut and marked so.
        smallest: size of letters.
    """
    known = _faces()
    file = max(known, key=lambda one: sum(ord(letter) in known[one] for letter in text))
    text = "".join(letter if ord(letter) in known[file] else "?" for letter in text)
    font = _font(file, size)
    if room is None:
        return text, font
    while size > smallest and font.getlength(text) > room:
        size -= 1
        font = _font(file, size)
    if font.getlength(text) <= room:
        return text, font
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text.rstrip() + "…", font


@cache
def families() -> list[str]:
    """The fonts of a matplotlib figure, in the order in which it looks for a character."""
    from matplotlib import font_manager

    font_manager.fontManager.addfont(str(CJK))
    return ["DejaVu Sans", font_manager.FontProperties(fname=str(CJK)).get_name()]

"""Letters of pictures: no empty box stands for a name."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from jigsaw_pretrain.fonts import families, fitted
from jigsaw_pretrain.html import chart


def drawn(text: str, size: int = 24) -> bytes:
    """The pixels of a text in the font that is chosen for it."""
    page = Image.new("L", (400, 40))
    written, font = fitted(text, size)
    ImageDraw.Draw(page).text((2, 2), written, fill=255, font=font)
    return page.tobytes()


@pytest.mark.parametrize(
    "name", ["boat → bus", "flower ≠ ball", "größe łódź", "кошка", "σκύλος", "حصان", "クラス", "猫狗貓龍", "고양이"]
)
def test_each_letter_has_a_glyph_of_its_own(name: str) -> None:
    written, _ = fitted(name, 20)
    assert written == name
    missing = drawn("\U000f1000")
    assert all(drawn(letter) not in (missing, drawn("?")) for letter in name if letter != " ")


def test_a_letter_that_no_font_has_is_a_question_mark() -> None:
    assert fitted("cat \u0939", 20)[0] == "cat ?"


def test_a_long_name_gets_smaller_letters_and_is_then_cut() -> None:
    text, font = fitted("cat", 14, 100)
    assert text == "cat" and font.size == 14
    text, font = fitted("a long name", 14, 80)
    assert text == "a long name" and font.size < 14 and font.getlength(text) <= 80
    text, font = fitted("a very long name of a class", 14, 60)
    assert text.endswith("…") and font.getlength(text) <= 60


@pytest.mark.filterwarnings("error")
def test_a_charts_letters_come_from_both_fonts() -> None:
    assert len(families()) == 2
    # Of a letter that no font has matplotlib warns.
    markup = chart(lambda axes: axes.set_title("クラス → größe"), "a chart").markup
    assert np.count_nonzero([name in markup for name in ("DejaVuSans-", "NotoSansCJK")]) == 2

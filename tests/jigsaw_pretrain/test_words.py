"""Numbers as people read them."""

from jigsaw_pretrain.words import counted, hundredths, number, setting


def test_counts_agree_with_their_noun() -> None:
    assert [counted(number, "class", "classes") for number in (0, 1, 2)] == ["0 classes", "1 class", "2 classes"]
    assert counted(1_200, "crop") == "1,200 crops"


def test_ap_is_in_hundredths() -> None:
    assert [hundredths(value) for value in (0.3741, 0, -1, None)] == ["37.4", "0.0", "–", "–"]


def test_measured_numbers_have_three_digits_and_settings_those_they_were_given() -> None:
    measured = (0.0, 6.25, 52.04, 99.96, 1234.6, 0.001234, float("nan"), None, 1234)
    assert [number(one) for one in measured] == ["0", "6.25", "52.0", "100", "1,235", "0.00123", "–", "–", "1,234"]
    given = (0.01234, 0.2, 64_000, None, (14, 18.5), (), True, "gn")
    assert [setting(one) for one in given] == ["0.01234", "0.2", "64,000", "none", "14, 18.5", "none", "yes", "gn"]
    assert setting({"channels": 1, "dtype": "uint16"}) == "channels 1, dtype uint16"

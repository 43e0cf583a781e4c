"""Numbers as people read them."""

from jigsaw_pretrain.words import counted, hundredths


def test_counts_agree_with_their_noun() -> None:
    assert [counted(number, "class", "classes") for number in (0, 1, 2)] == ["0 classes", "1 class", "2 classes"]
    assert counted(1_200, "crop") == "1,200 crops"


def test_ap_is_in_hundredths() -> None:
    assert [hundredths(value) for value in (0.3741, 0, -1, None)] == ["37.4", "0.0", "–", "–"]

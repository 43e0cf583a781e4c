"""Class balance: which crops of a unit are taken how often."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.data.lanes import UNIT_WEIGHT, class_weights, resample_by_class
from jigsaw_pretrain.train.recipe import StreamOptions
from tests.helpers.stores import lines
from tests.helpers.tiny import make_dataset


def test_weights_follow_the_frequencies_and_are_capped() -> None:
    assert class_weights([900, 100, 1, 0], "none", 20) is None
    for balance, expected in (("uniform", [1, 9, 20, 20]), ("sqrt", [1, 3, 20, 20])):
        weights = class_weights([900, 100, 1, 0], balance, 20)
        assert weights is not None and (weights / UNIT_WEIGHT).tolist() == expected


def test_a_crop_is_taken_its_expected_times_or_the_next_whole_number() -> None:
    weights = np.where(np.arange(100) < 90, UNIT_WEIGHT, 9 * UNIT_WEIGHT).astype(np.int64)
    expected = weights * 100 / weights.sum()
    for key in range(50):
        chosen = resample_by_class(weights, key)
        assert len(chosen) == 100 and chosen.min() >= 0 and chosen.max() < 100
        times = np.bincount(chosen, minlength=100)
        assert (np.abs(times - expected) < 1).all()
        assert (resample_by_class(weights, key) == chosen).all()
    assert Counter((resample_by_class(weights, key) < 90).sum() for key in range(50)).most_common(1)[0][0] == 50


def test_batches_are_balanced_whatever_the_ranks(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, {"S": [25, 14], "T": [11, 9, 3], "W": [20]})
    plain = lines(dataset)
    for balance in ("sqrt", "uniform"):
        options = StreamOptions(batch=16, lanes=8, balance=balance)
        found = lines(dataset, options=options)
        assert found != plain
        assert lines(dataset, options=options, world=2, workers=2, first=2, steps=3) == found[2:]


def test_a_manifest_without_counts_is_refused(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, {"S": [9]})
    dataset.description.totals.pop("by_label")
    with pytest.raises(UserError, match="does not count crops by label"):
        lines(dataset, options=StreamOptions(batch=16, lanes=8, balance="sqrt"))
    with pytest.raises(UserError, match="balance 'cubic' is not one of"):
        StreamOptions(balance="cubic")

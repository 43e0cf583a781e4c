"""Scores of predictions, by region, group and class."""

import numpy as np
import pytest
import torch
from torch import nn

from jigsaw_pretrain.formats.jigsaw import Template
from jigsaw_pretrain.train.evaluate import Predictions, predict, score, summarise
from tests.helpers.sources import CLASSES, SyntheticSource


def test_scores_count_hits_beside_the_commonest_label() -> None:
    labels = np.array([1, 1, 1, 2])
    assert score(np.array([1, 1, 0, 2]), labels) == {"count": 4, "accuracy": 0.75, "majority_share": 0.75}
    assert score(labels[:0], labels[:0]) == {"count": 0, "accuracy": None, "majority_share": None}


def test_a_summary_by_region_group_and_class() -> None:
    labels = np.array([[0, 1, 2, 0], [0, 1, 0, 1]])
    predictions = np.array([[0, 1, 0, 1], [1, 1, 0, 1]])
    groups = np.array([[0, 2, 1, 0], [0, 2, 2, 0]])
    report = summarise(Predictions(predictions, labels, groups), ["a", "b"])
    assert report["jigsaws"] == 2
    # Of a 2 of 4 are right, of b all 3, of the background none.
    balanced = pytest.approx((2 / 4 + 1 + 0) / 3)
    assert report["overall"] == {"count": 8, "accuracy": 5 / 8, "majority_share": 0.5, "balanced_accuracy": balanced}
    assert report["regions"]["S-small"] == {"count": 2, "accuracy": 0.5, "majority_share": 1.0}
    assert report["regions"]["T"] == {"count": 2, "accuracy": 0.5, "majority_share": 0.5}
    assert report["groups"]["S"] == {"count": 4, "accuracy": 0.5, "majority_share": 0.75}
    assert report["groups"]["T"]["count"] == 1 and report["groups"]["W"]["accuracy"] == 1.0
    assert [one["class"] for one in report["classes"]] == ["a", "b", "background"]
    assert report["classes"][1] == {"class": "b", "count": 3, "accuracy": 1.0, "share": 3 / 8}
    assert report["classes"][2]["accuracy"] == 0.0


class Oracle(nn.Module):
    """Sure of the right class at one position of each region, mildly for another one at all positions."""

    def __init__(self, source: SyntheticSource, region_map: torch.Tensor) -> None:
        super().__init__()
        self.labels = {batch.images.sum().item(): batch.labels for batch in source}
        self.region_map = region_map

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        logits = torch.zeros(len(images), CLASSES + 1, *self.region_map.shape)
        for image, labels in enumerate(self.labels[images.sum().item()].tolist()):
            for region, label in enumerate(labels):
                places = self.region_map == region
                logits[image, (label + 1) % (CLASSES + 1), places] += 1
                row, column = places.nonzero()[0].tolist()
                logits[image, label, row, column] += 100
        return (logits,)


def test_a_region_is_predicted_by_its_mean_logits() -> None:
    template = Template(64, 16)
    source = SyntheticSource(template, batch=4, lanes=2, first=0, end=3)
    region_map = torch.from_numpy(template.region_map(16))
    answers = predict(Oracle(source, region_map), source, [region_map])
    assert answers.labels.shape == (12, 4)
    assert (answers.predictions == answers.labels).all()
    assert answers.groups[0].tolist() == [0, 2, 1, 0]


class Seen(nn.Module):
    """Says nothing, and notes in which precision it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.precisions: list[torch.dtype] = []

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        one = torch.ones(1, 1)
        self.precisions.append((one @ one).dtype)
        return (torch.zeros(len(images), CLASSES + 1, 2, 2),)


def test_forward_passes_have_the_recipes_precision_and_end_where_a_signal_came() -> None:
    source = SyntheticSource(Template(64, 32), 4, 4, 0, 6)
    region_map = torch.from_numpy(Template(64, 32).region_map(32))
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        seen = Seen()
        assert len(predict(seen, source, [region_map], precision).labels) == 24
        assert seen.precisions == [dtype] * 6
    seen = Seen()
    found = predict(seen, source, [region_map], stopped=lambda: len(seen.precisions) == 2)
    assert len(found.labels) == len(found.predictions) == len(found.groups) == 8

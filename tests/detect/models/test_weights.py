"""Weights that a detector is given."""

import pytest
import torch

from jigsaw_pretrain.detect.models import backbone
from jigsaw_pretrain.detect.models.weights import load
from jigsaw_pretrain.errors import UserError
from tests.helpers.detection import TINY


def test_detectors_say_what_they_read() -> None:
    network = backbone.build_backbone(TINY, "frozen-bn", torch.device("cpu"))
    state = {**network.module.state_dict(), "conv1.weight": torch.zeros(64, 6, 7, 7)}
    with pytest.raises(UserError, match=r"takes images of 6 channels \(conv1.weight\), and these images have 3"):
        load(network, state, "file.pth", False)

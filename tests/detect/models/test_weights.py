"""Weights that a detector is given."""

import pytest
import torch

from jigsaw_pretrain.detect.models import backbone
from jigsaw_pretrain.detect.models.weights import load
from jigsaw_pretrain.errors import UserError


def test_detectors_say_what_they_read() -> None:
    network = backbone.build_backbone("resnet18", "frozen", torch.device("cpu"))
    with pytest.raises(UserError, match="takes images of 6 channels, and these detectors read 8-bit RGB"):
        load(network, {"conv1.weight": torch.zeros(64, 6, 7, 7)}, "file.pth", False)

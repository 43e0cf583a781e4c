"""The dense classifier: normalisation, predictions at every position, initial weights."""

import pytest
import torch
from torch import nn

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.engine.state import build_model
from jigsaw_pretrain.train.models.classifier import DenseClassifier
from jigsaw_pretrain.train.recipe import MEAN, STD, Recipe
from tests.helpers.detection import TINY


def test_images_are_normalised_without_a_copy_of_their_order() -> None:
    model = DenseClassifier(nn.Identity(), 3, 4)
    images = torch.randint(0, 256, (2, 6, 5, 3), dtype=torch.uint8)
    found = model.normalise(images)
    assert found.shape == (2, 3, 6, 5) and found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    for channel in range(3):
        expected = (images[..., channel].double() / 255 - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(found[:, channel].double(), expected, atol=1e-6, rtol=1e-6)


def test_there_is_a_prediction_at_every_position() -> None:
    model = DenseClassifier(nn.Conv2d(3, 7, 4, 4), 7, 5)
    assert [one.shape for one in model(torch.zeros(2, 16, 8, 3, dtype=torch.uint8))] == [(2, 5, 4, 2)]
    assert list(model.state_dict()) == ["backbone.weight", "backbone.bias", "head.weight", "head.bias"]


@pytest.mark.slow(seconds=3)
def test_initial_weights_follow_from_the_seed_alone() -> None:
    recipe = Recipe.load(None, [f"model.backbone={TINY}", "data.template_size=64", "data.template_split=32"])
    torch.manual_seed(1)
    _, first = build_model(recipe, 5)
    torch.manual_seed(2)
    _, second = build_model(recipe, 5)
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters(), strict=True))
    _, third = build_model(Recipe.load(None, [f"model.backbone={TINY}", "data.seed=1"]), 5)
    assert not torch.equal(next(first.parameters()), next(third.parameters()))


def test_a_template_off_the_grid_is_refused() -> None:
    with pytest.raises(UserError, match="stride 32"):
        build_model(Recipe.load(None, [f"model.backbone={TINY}", "data.template_split=80"]), 5)

"""Backbones of torchvision, of timm and of one's own: the last map is found, and what has none is refused."""

import sys

import pytest
import torch
import torchvision
from torch import nn

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.models import backbones, feature_maps
from jigsaw_pretrain.train.models.backbones import whole_timm_model

FAMILIES = {
    "resnet18": 512,
    "resnext50_32x4d": 2048,
    "regnet_y_400mf": 440,
    "convnext_tiny": 768,
    "mobilenet_v3_small": 576,
    "efficientnet_b0": 1280,
    "vgg11": 512,
    "swin_t": 768,
    "densenet121": 1024,
    "shufflenet_v2_x0_5": 1024,
    "mnasnet0_5": 1280,
    "googlenet": 1024,
}


def eager_map(name: str, whole: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """The map as the model's own eager code makes it: what its pooling is given."""
    seen = []
    if name == "densenet121":
        return torch.relu(whole.features(image))  # type: ignore[operator]
    if name.startswith("mnasnet"):
        return whole.layers(image)  # type: ignore[operator]
    if name.startswith("shufflenet"):
        whole.conv5.register_forward_hook(lambda module, given, made: seen.append(made))  # type: ignore[union-attr]
    else:
        whole.avgpool.register_forward_hook(lambda module, given, made: seen.append(given[0]))  # type: ignore[union-attr]
    whole(image)
    found: torch.Tensor = seen[0]
    return found


@pytest.mark.slow(seconds=15)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_map_of_every_family_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if name == "vgg11":
        # Most of its time goes to drawing the 120 million weights of a classifier that is dropped.
        monkeypatch.setattr(nn.init, "normal_", lambda tensor, *given, **named: tensor)
    whole = backbones.whole_model(name)
    found = feature_maps.cut(name, whole)
    assert (found.channels, found.stride) == (FAMILIES[name], 32)
    assert set(found.module.state_dict()) | found.head == set(whole.state_dict())
    assert found.head and not set(found.module.state_dict()) & found.head
    image = torch.randn(2, 3, 96, 64)
    module = found.module
    assert module.training
    made = module(image)
    assert made.shape == (2, found.channels, 3, 2)
    made.sum().backward()
    assert [key for key, parameter in module.named_parameters() if parameter.grad is None] == []
    with torch.no_grad():
        assert torch.equal(module.eval()(image), eager_map(name, whole.eval(), image))


def test_train_and_eval_keep_their_own_behaviour() -> None:
    module = backbones.build("efficientnet_b0").module
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert not torch.equal(module(image), module(image))  # stochastic depth
        module.eval()
        assert torch.equal(module(image), module(image))


@pytest.mark.slow(seconds=4)
@pytest.mark.parametrize("name", ["vit_b_16", "maxvit_t", "alexnet", "squeezenet1_1", "inception_v3"])
def test_models_without_a_usable_map_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"backbone {name} .*Choose"):
        backbones.build(name)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean resnet50"):
        backbones.build("resnet51")
    with pytest.raises(UserError, match="not a classification model"):
        backbones.build("fasterrcnn_resnet50_fpn")
    assert "resnet50" in backbones.names() and "fasterrcnn_resnet50_fpn" not in backbones.names()


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", refuse)
    backbones.build("resnet18")


@pytest.mark.slow(seconds=4)
@pytest.mark.parametrize(
    ("name", "channels"), [("resnet18", 512), ("mobilenetv3_small_100", 576), ("convnext_atto", 320)]
)
def test_a_timm_model_gives_its_map_before_pooling(name: str, channels: int) -> None:
    pytest.importorskip("timm")
    found = backbones.build(f"timm:{name}")
    assert (found.channels, found.stride) == (channels, 32)
    whole = whole_timm_model(f"timm:{name}").eval()
    assert set(found.module.state_dict()) | found.head == set(whole.state_dict())
    assert any("head" in key or "classifier" in key or key.startswith("fc.") for key in found.head)
    whole.load_state_dict(found.module.state_dict(), strict=False)
    image = torch.randn(2, 3, 96, 64)
    assert found.module.training
    made = found.module(image)
    assert made.shape == (2, channels, 3, 2)
    made.sum().backward()
    assert [key for key, one in found.module.named_parameters() if one.grad is None] == []
    with torch.no_grad():
        whole.load_state_dict(found.module.state_dict(), strict=False)
        assert torch.equal(found.module.eval()(image), whole.forward_features(image))  # type: ignore[operator]


def test_timm_models_without_a_usable_map_are_refused() -> None:
    pytest.importorskip("timm")
    with pytest.raises(UserError, match="timm:mixer_s32_224 cannot be run on 256 and 512 pixels"):
        backbones.build("timm:mixer_s32_224")
    with pytest.raises(UserError, match="did you mean timm:resnet50"):
        backbones.build("timm:resnet5O")


def test_timm_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"needs timm: pip install 'jigsaw-pretrain\[timm\]'"):
        backbones.build("timm:resnet18")


def test_ones_own_module_is_a_backbone() -> None:
    found = backbones.build("tests.helpers.own:plain")
    assert (found.channels, found.stride, found.head) == (32, 32, frozenset())
    assert found.module(torch.zeros(1, 3, 64, 64)).shape == (1, 32, 2, 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tests.helpers.own:nothing", r"tests.helpers.own.nothing\(\) fails \(AttributeError"),
        ("no.such.module:build", "fails .ModuleNotFoundError"),
        ("tests.helpers.own:failing", "fails .KeyError"),
        ("tests.helpers.own:number", "returns a int, not a torch.nn.Module"),
        ("tests.helpers.own:Pair", r"maps 256 pixels to \[1, 3, 65536\] .* no map"),
        ("tests.helpers.own:flat", r"maps 256 pixels to \[1, 2\] .* no map"),
        ("tests.helpers.own:uneven", "no map"),
        ("tests.helpers.own:idle", "2 parameters never reach its map .such as extra.bias"),
    ],
)
def test_unusable_modules_are_refused_by_what_is_wrong(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        backbones.build(name)

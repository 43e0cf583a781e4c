import sys

import pytest
import torch

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.models import backbones
from jigsaw_pretrain.train.models.backbones import whole_timm_model


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
    with pytest.raises(UserError, match="timm:vit_tiny_patch16_224 cannot be run on 256 and 512 pixels"):
        backbones.build("timm:vit_tiny_patch16_224")
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
        ("tests.helpers.own:Pair", "returns a tuple: return the last feature map alone"),
        ("tests.helpers.own:flat", r"maps 256 pixels to \[1, 2\] .* no map"),
        ("tests.helpers.own:uneven", "no map"),
        ("tests.helpers.own:idle", "2 parameters never reach its map .such as extra.bias"),
    ],
)
def test_unusable_modules_are_refused_by_what_is_wrong(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        backbones.build(name)

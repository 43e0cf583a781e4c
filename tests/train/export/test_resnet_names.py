"""Names of ResNets in the libraries that exports go to."""

from jigsaw_pretrain.train.export.resnet_names import ResNet, resnet_of, to_detectron2


def test_names_of_resnets_mean_what_the_libraries_build() -> None:
    assert resnet_of("timm:resnext101_32x4d", "x") == ResNet(101, 32, 4)
    assert resnet_of("wide_resnet50_2", "x") == ResNet(50, 1, 128)
    assert len(ResNet(50).detectron2_keys()) == 53 * 5
    # Lines of the table that detectron2's own converter from torchvision prints.
    for ours, theirs in {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_mean": "stem.conv1.norm.running_mean",
        "layer1.0.downsample.0.weight": "res2.0.shortcut.weight",
        "layer1.0.downsample.1.bias": "res2.0.shortcut.norm.bias",
        "layer4.2.bn3.weight": "res5.2.conv3.norm.weight",
        "layer3.22.conv2.weight": "res4.22.conv2.weight",
    }.items():
        assert to_detectron2(ours) == theirs

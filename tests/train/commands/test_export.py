"""The export command: exports of a run, and statistics measured anew."""

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.engine.distributed import Ranks
from jigsaw_pretrain.train.engine.state import build_state
from jigsaw_pretrain.train.models.layers import measure_batch_norms
from tests.helpers.commands import call
from tests.helpers.detection import TINY
from tests.helpers.jobs import same, small_job, synthetic
from tests.helpers.prepped import tree


def test_statistics_are_measured_anew(tmp_path: Path) -> None:
    job = small_job(tmp_path, "optim.steps=3")
    model = build_state(job.recipe, 6, Ranks()).model
    first = next(part for part in model.modules() if isinstance(part, nn.BatchNorm2d))
    before = {name: value.clone() for name, value in model.named_parameters()}
    assert first.running_mean is not None
    first.running_mean.fill_(9)
    batches = [batch.images.clone() for batch in synthetic(job)(0, 3)]
    norms = sum(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    assert measure_batch_norms(model, (batch.images for batch in synthetic(job)(0, 3))) == norms > 0
    seen: list[torch.Tensor] = []
    first.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model.eval()
    with torch.no_grad():
        for images in batches:
            model(images)
    torch.testing.assert_close(first.running_mean, torch.stack([one.mean((0, 2, 3)) for one in seen]).mean(0))
    assert first.momentum == 0.1 and same(before, dict(model.named_parameters()))


@pytest.mark.slow(seconds=2)
def test_an_export_loads_into_torchvision(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "backbone.pth"
    result = call("export", "--run", finished, "--to", "torchvision", "--out", out)
    assert result.exit_code == 0 and "4 of 4 steps" in result.output
    state = torch.load(out, weights_only=True)
    target = torchvision.models.get_model(TINY)
    loaded = target.load_state_dict(state, strict=False)
    assert loaded.missing_keys == ["fc.weight", "fc.bias"] and loaded.unexpected_keys == []
    assert same(state, torch.load(finished / "backbone.pth", weights_only=True))
    assert same(state["conv1.weight"], target.conv1.weight.data)


@pytest.mark.slow(seconds=2)
def test_two_exports_have_a_readme_each(finished: Path, tmp_path: Path) -> None:
    notes = {}
    for target, name in (("torchvision", "b.pth"), ("safetensors", "b.safetensors")):
        assert call("export", "--run", finished, "--to", target, "--out", tmp_path / name).exit_code == 0
        notes[target] = (tmp_path / f"{name}.README.md").read_text()
    assert len(list(tmp_path.glob("*.md"))) == 2 and all(target in text for target, text in notes.items())


@pytest.mark.parametrize("name", ["x.pth", "x.pth.README.md"])
def test_an_export_replaces_nothing_but_an_export(finished: Path, tmp_path: Path, name: str) -> None:
    command = ("export", "--run", finished, "--to", "torchvision", "--out", tmp_path / "x.pth")
    (tmp_path / name).write_text("# Mine")
    refused = call(*command)
    assert refused.exit_code == 2 and f"{tmp_path / name} is already there and no export's: move it" in refused.output
    assert tree(tmp_path) == {name: b"# Mine"}
    # Nothing is lost with an empty one, as mktemp makes it.
    (tmp_path / name).write_text("")
    assert call(*command).exit_code == 0
    made = tree(tmp_path)
    assert call(*command).exit_code == 0 and tree(tmp_path) == made
    # Cut short between its two files.
    (tmp_path / "x.pth").unlink()
    assert call(*command).exit_code == 0 and tree(tmp_path) == made


def test_export_refuses_another_backbones_weights(finished: Path, tmp_path: Path) -> None:
    from jigsaw_pretrain.train.export.targets import check_own

    state = torch.load(finished / "backbone.pth", weights_only=True)
    with pytest.raises(UserError, match="not of resnet18"):
        check_own("resnet18", state)
    with pytest.raises(UserError, match="not of tinybottleneck"):
        check_own("tinybottleneck", state)
    del state["conv1.weight"]
    with pytest.raises(UserError, match="not of tinyresnet"):
        check_own(TINY, state)


@pytest.mark.slow(seconds=3)
def test_an_export_with_statistics_measured_anew(data: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "anew.pth"
    options = ("--run", finished, "--to", "torchvision", "--out", out, "--data", data, "--workers", 0)
    result = call("export", *options, "--recalibrate-bn", 8)
    assert result.exit_code == 0, result.output
    before, after = torch.load(finished / "backbone.pth", weights_only=True), torch.load(out, weights_only=True)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed and {name.rsplit(".", 1)[1] for name in changed} <= {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }

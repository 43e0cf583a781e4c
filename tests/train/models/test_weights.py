"""Weights that a run begins with."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.engine.pretraining import execute
from jigsaw_pretrain.train.models import backbones
from jigsaw_pretrain.train.models.weights import load_tensors, load_weights, read_weights
from tests.helpers.jobs import same, small_job, synthetic
from tests.helpers.own import tensors

OWN = "tests.helpers.own:plain"


class Bomb:
    """Unpickled, it would write a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.write_text, (self.file, "exploded")


def test_every_form_of_a_state_dict_loads(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = tensors()
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"state_dict": {f"module.{key}": one for key, one in state.items()}}, tmp_path / "nested.pth")
    ours = {f"backbone.{key}": one for key, one in state.items()} | {"head.weight": torch.zeros(1)}
    torch.save({"model": ours, "step": 3}, tmp_path / "checkpoint.pt")
    for name in ("w.safetensors", "plain.pth", "nested.pth", "checkpoint.pt"):
        backbone = backbones.build(OWN)
        match = load_weights(backbone, str(tmp_path / name))
        assert same(dict(backbone.module.state_dict()), state), name
        assert "10 matched, 0 missing, 0 unexpected, 0 of another shape" in str(match)


def test_the_classifier_and_old_counters_are_shown(tmp_path: Path) -> None:
    whole = backbones.whole_model("shufflenet_v2_x0_5").state_dict()
    torch.save({key: one for key, one in whole.items() if "num_batches" not in key}, tmp_path / "old.pth")
    match = load_weights(backbones.build("shufflenet_v2_x0_5"), str(tmp_path / "old.pth"))
    assert match.complete
    assert match.notes == (
        "not used: fc.bias, fc.weight (the classifier)",
        "56 batch counters are not in the file",
    )


def test_nothing_is_matched_by_halves(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    state = tensors()
    for change, message in (
        ({"0.weight": None}, r"9 matched, 1 missing \(0.weight\)"),
        ({"spare": torch.zeros(1)}, r"1 unexpected \(spare\)"),
        ({"0.bias": torch.zeros(9)}, r"1 of another shape \(0.bias"),
    ):
        torch.save({key: one for key, one in {**state, **change}.items() if one is not None}, file)
        backbone = backbones.build(OWN)
        before = {key: one.clone() for key, one in backbone.module.state_dict().items()}
        with pytest.raises(UserError, match=message):
            load_weights(backbone, str(file))
        assert same(dict(backbone.module.state_dict()), before)


def test_a_bad_file_is_refused_and_never_unpickled(tmp_path: Path) -> None:
    backbone = backbones.build(OWN)
    with pytest.raises(UserError, match="is missing"):
        load_weights(backbone, str(tmp_path / "none.pth"))
    (tmp_path / "text.pth").write_text("weights")
    (tmp_path / "text.safetensors").write_text("weights")
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"0.weight": Bomb(tmp_path / "trace")}))
    torch.save({"0.weight": Bomb(tmp_path / "trace")}, tmp_path / "zipped.pth")
    for name in ("text.pth", "text.safetensors", "code.pth", "zipped.pth"):
        with pytest.raises(UserError, match="read safely"):
            load_weights(backbone, str(tmp_path / name))
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds no state dict"):
        load_weights(backbone, str(tmp_path / "list.pth"))
    assert not (tmp_path / "trace").exists()


def test_a_run_begins_from_a_file_and_needs_it_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "w.pth"
    torch.save(tensors(), file)
    job = small_job(
        tmp_path / "run",
        f"model.backbone={OWN}",
        f"model.init={file}",
        "optim.lr_start=0",
        "optim.steps=2",
        "optim.weight_decay=0",
    )
    state = execute(job, synthetic(job), stop_after=1)
    assert "begun from" in caplog.text
    assert same(dict(state.model.backbone.state_dict()), tensors())
    file.unlink()
    assert execute(job, synthetic(job)).step == 2
    bad = small_job(tmp_path / "bad", f"model.backbone={OWN}", f"model.init={file}")
    with pytest.raises(UserError, match="is missing"):
        execute(bad, synthetic(bad))
    assert not bad.folder.begun


BAD: dict[str, object] = {
    "empty": {},
    "a list": [torch.zeros(2)],
    "integer keys": {1: torch.zeros(2)},
    "a number": {"a": 1.0},
    "meta": {"a": torch.zeros(2, device="meta")},
    "expanded": {"a": torch.zeros(1).expand(1 << 40)},
    "sparse": {"a": torch.zeros(2, 2).to_sparse()},
    "not finite": {"a": torch.tensor([float("inf")])},
    "beyond float32": {"a": torch.tensor([1e300], dtype=torch.float64)},
    "one tensor under many names": dict.fromkeys("abcdefgh", torch.zeros(2)),
}


@pytest.mark.parametrize("kind", [*BAD, "no bytes", "fifo", "folder", "deflated"])
def test_what_holds_no_weights_is_told_in_own_words(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    if kind in BAD:
        torch.save(BAD[kind], file)
    elif kind == "no bytes":
        file.touch()
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("w/data.pkl", bytes(1 << 20))
    with pytest.raises(UserError) as caught:
        read_weights(str(file))
    assert str(file) in caught.value.message and "weights_only" not in caught.value.message


def doubled(levels: int) -> tuple[object, ...]:
    """A tuple that holds one tuple twice, and so on."""
    found: tuple[object, ...] = ("a",)
    for _ in range(levels):
        found = (found, found)
    return found


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_tuple_that_would_be_hashed_for_hours_is_refused(zipped: bool, hidden: bool, tmp_path: Path) -> None:
    file, options = tmp_path / "w.pth", {"_use_new_zipfile_serialization": zipped}
    torch.save({**tensors(), "names": (("a", "b"),) * 100, "sizes": doubled(4)}, file, **options)
    assert isinstance(load_tensors(file), dict)
    # Not a key here, as this test would have to hash it too.
    torch.save({"names": [{"deep": doubled(40)}]}, file, **options)
    if hidden:
        # An archive at the end of a file that does not begin as one is not what torch reads.
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("w/other.pkl", b"\x80\x02.")
    with pytest.raises(UserError, match="tuples"):
        load_tensors(file)

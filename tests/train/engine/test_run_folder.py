"""A stranger's run: its names lead nowhere, its code does not run, its weights are checked before they are used."""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.engine import remote_run
from jigsaw_pretrain.train.engine.checkpoint import list_checkpoints, newest_checkpoint
from jigsaw_pretrain.train.engine.metrics import metrics_file, read_rows
from jigsaw_pretrain.train.engine.pretraining import execute
from jigsaw_pretrain.train.engine.run_folder import (
    WRITTEN_FOLDERS,
    WRITTEN_LATER,
    choose_recipe,
    open_run_folder,
    open_trained,
    origin_of,
    read_description,
    was_trained_on,
)
from jigsaw_pretrain.train.models import backbones
from jigsaw_pretrain.train.recipe import Recipe
from jigsaw_pretrain.train.report.page import RunPage, page
from tests.helpers.attacks import attack_json
from tests.helpers.commands import call
from tests.helpers.jobs import small_job, synthetic
from tests.helpers.prepped import tree
from tests.helpers.servers import FaultyProxy, file_server
from tests.helpers.settings import REPOSITORY
from tests.helpers.tiny import make_dataset

PLAIN = "tests.helpers.own:plain"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps with two checkpoints."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    job = small_job(folder, f"model.backbone={PLAIN}", "optim.steps=4", "run.checkpoint_every=2")
    execute(job, synthetic(job))
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy to harm."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


HOLDER = """
import sys, time
from pathlib import Path
from jigsaw_pretrain.train.engine.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder.lock()
print("locked", flush=True)
time.sleep(60)
"""


def test_a_folder_in_which_another_process_trains_is_left_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jigsaw_pretrain.storage.files.RUN_LOCK_SECONDS", 0.2)
    settings = (f"model.backbone={PLAIN}", "optim.steps=4", "run.checkpoint_every=2")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], env=environment, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"locked\n"
        unfinished = run / "checkpoints" / ".step-00000009.pt.1-0123abcd.tmp"
        unfinished.write_bytes(b"half")
        before = tree(run)
        with pytest.raises(UserError, match=f"{run} is being trained by another process"):
            job = small_job(run, *settings)
            execute(job, synthetic(job))
        assert tree(run) == before
    finally:
        holder.kill()
        holder.wait()
    # A lock goes with its process.
    job = small_job(run, *settings)
    execute(job, synthetic(job))
    assert not unfinished.exists()


@pytest.mark.parametrize("other", ["seed", "classes", "dataset"])
def test_a_checkpoint_of_another_run_is_not_taken(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, other: str
) -> None:
    settings = [f"model.backbone={PLAIN}", "optim.steps=4", "run.checkpoint_every=2"]
    stranger = small_job(tmp_path / "other", *settings, *(["data.seed=7"] if other == "seed" else []))
    if other == "classes":
        stranger = replace(stranger, origin=replace(stranger.origin, classes=stranger.origin.classes[::-1]))
    if other == "dataset":
        stranger = replace(stranger, origin=replace(stranger.origin, fingerprint="another"))
    execute(stranger, synthetic(stranger), stop_after=3)
    (newest,) = (tmp_path / "other" / "checkpoints").glob("*3.pt")
    for path in (run / "checkpoints").glob("*4.pt"):
        path.unlink()
    shutil.copy(newest, run / "checkpoints")
    assert open_trained(open_run_folder(run))[2]["step"] == 2
    job = small_job(run, *settings)
    state = execute(job, synthetic(job))
    assert state.step == 4 and "of another run" in caplog.text
    (run / "checkpoints" / "step-00000002.pt").unlink(missing_ok=True)
    (run / "checkpoints" / "step-00000004.pt").unlink()
    with pytest.raises(UserError, match="of another run"):
        open_trained(open_run_folder(run))


def test_a_folder_in_which_nothing_was_begun_goes_with_the_lock(tmp_path: Path) -> None:
    folder = open_run_folder(tmp_path / "run")
    folder.lock()
    assert folder.path.exists() and not folder.begun
    folder.close()
    assert not folder.path.exists()
    folder.lock()
    (folder.path / "recipe.toml").touch()
    folder.close()
    assert sorted(path.name for path in folder.path.iterdir()) == [".lock", "recipe.toml"]


names = st.text("./\\\\:abrunjson0123456789-pt", max_size=30) | st.sampled_from(
    [
        "../run.json",
        "/run.json",
        "//run.json",
        "checkpoints/../run.json",
        "checkpoints/..",
        "looks/../../x",
        "run.json/",
    ]
)


@given(names)
def test_only_a_runs_own_names_are_known(name: str) -> None:
    if remote_run._is_known(name):
        assert not {"..", "", "."} & set(name.split("/"))
        assert name.split("/")[0] in ("run.json", "recipe.toml", "metrics.jsonl", "looks", "checkpoints", "tensorboard")


@pytest.mark.parametrize("pointer", ["../..", "/etc/passwd", "step-1.pt", "", "\xff", "a" * 10_000])
def test_a_hostile_pointer_leads_nowhere(pointer: str, run: Path, tmp_path: Path) -> None:
    (run / "checkpoints" / "newest").write_text(pointer)
    (run / "private.txt").write_text("not a run's")
    folder = open_run_folder(f"file://{run}")
    _, _, content = open_trained(folder)
    assert content["step"] == 4 and folder.path != run and not (folder.path / "private.txt").exists()


def test_a_file_of_a_run_at_a_url_has_a_most(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_run, "MOST_LINES_BYTES", (run / "metrics.jsonl").stat().st_size - 1)
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        open_trained(open_run_folder(f"file://{run}"))
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        open_trained(open_run_folder(f"file://{run}"))


def test_damage_at_a_url_is_named_by_it(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "metrics.jsonl").write_text("{\n")
    HARMS["cut"](newest(run))
    folder = open_run_folder(f"file://{run}")
    open_trained(folder)
    read_rows(folder.metrics)
    assert caplog.text.count(f"file://{run}/") == 2 and str(folder.path) not in caplog.text
    for _, other in list_checkpoints(run / "checkpoints"):
        other.write_bytes(b"x")
    for harmed in ("checkpoints/step-", "run.json"):
        with pytest.raises(UserError) as caught:
            open_trained(open_run_folder(f"file://{run}"))
        assert f"file://{run}/{harmed}" in caught.value.message and "/jigsaw-run-" not in caught.value.message
        (run / "run.json").write_text("{")


def test_a_store_that_falls_silent_ends_a_reader_soon(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_run, "READER_TIMEOUT", 0.3)
    with file_server(run.parent) as url, FaultyProxy(url, lambda number, method, path: "stall") as proxy:
        begun = time.monotonic()
        with pytest.raises(UserError, match="run"):
            open_trained(open_run_folder(f"{proxy.url}/run"))
        assert time.monotonic() - begun < 5


def test_reading_a_run_that_trains_here_leaves_its_staged_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(run.parent / "cache"))
    writer = open_run_folder(f"file://{run}")
    assert writer.remote
    writer.remote.pull()
    (writer.path / "metrics.jsonl").write_text("more\n")
    open_trained(open_run_folder(f"file://{run}"))
    assert (writer.path / "metrics.jsonl").read_text() == "more\n"


def test_code_that_only_a_file_names_does_not_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evilmod.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    description = json.loads((run / "run.json").read_text())
    (tmp_path / "evil.yaml").write_text("activation: __import__('os').abort()\n")
    for name in ("evilmod:net", "os:abort", "ultralytics:evil.yaml", f"ultralytics:{run}/x.yaml", "transformers:."):
        description["recipe"]["model"]["backbone"] = name
        (run / "run.json").write_text(json.dumps(description))
        result = call("export", "--run", run, "--to", "safetensors", "--out", tmp_path / "x.safetensors")
        assert result.exit_code == 2 and name in result.output, result.output
    assert not (tmp_path / "touched").exists()


def test_the_command_line_allows_it(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "_ALLOWED", set())
    arguments = ("export", "--run", run, "--to", "safetensors", "--out", tmp_path / "x.safetensors")
    assert call(*arguments).exit_code == 2
    assert call(*arguments, "--backbone", PLAIN).exit_code == 0


def newest(run: Path) -> Path:
    return list_checkpoints(run / "checkpoints")[-1][1]


def zeroed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    state = torch.load(path, weights_only=True)["model"]
    weight = bytes(max(state.values(), key=lambda value: value.numel()).untyped_storage())
    place = bytes(data).index(weight[:200])
    data[place : place + 64] = bytes(64)
    path.write_bytes(data)


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def in_model(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    return lambda path: changed(path, lambda content: change(content["model"]))


HARMS: dict[str, Callable[[Path], object]] = {
    "64 zeroed bytes": zeroed,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "a list": lambda path: torch.save([1, 2], path),
    "not finite": in_model(lambda state: next(iter(state.values())).fill_(float("nan"))),
    "another shape": in_model(lambda state: state.update(dict.fromkeys(state, torch.zeros(2)))),
    "a meta tensor": in_model(lambda state: state.update(extra=torch.zeros(3, device="meta"))),
    "an integer key": in_model(lambda state: state.update({3: torch.zeros(3)})),  # type: ignore[dict-item]
    "no model": lambda path: changed(path, lambda content: content.pop("model")),
    "a tensor for its format": lambda path: changed(path, lambda content: content.update(format=torch.zeros(3))),
    "another step": lambda path: changed(path, lambda content: content.update(step=3)),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_checkpoint_that_cannot_be_used_is_passed_over_aloud(
    run: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = newest(run)
    HARMS[harm](path)
    _, _, content = open_trained(open_run_folder(str(run)))
    assert content["step"] == 2 and str(path) in caplog.text and "weights_only" not in caplog.text
    for _, other in list_checkpoints(run / "checkpoints"):
        other.write_bytes(b"x")
    with pytest.raises(UserError):
        newest_checkpoint(run / "checkpoints")


@given(draw=st.data())
def test_any_run_json_costs_a_line(
    trained: Path, tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject
) -> None:
    run = tmp_path_factory.mktemp("hostile")
    shutil.copy(trained / "run.json", run)
    attack_json(run / "run.json", draw)
    try:
        read_description(open_run_folder(str(run)))
        open_trained(open_run_folder(str(run)))
    except UserError as error:
        assert "\n" not in error.message


def test_a_damaged_line_of_the_metrics_costs_that_line(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = read_rows(run / "metrics.jsonl")
    lines = (run / "metrics.jsonl").read_bytes().split(b"\n")
    lines[1:1] = [b"{", b"\xff\xfe", b"[1]", b'{"step": "x"}', b"[" * 100_000]
    (run / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert read_rows(run / "metrics.jsonl") == whole and "5 damaged lines" in caplog.text
    metrics_file(run / "metrics.jsonl").cut_back(2)
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [0, 1]


@pytest.mark.parametrize("kind", ["garbage", "bomb", "missing array", "folder"])
def test_a_damaged_snapshot_costs_its_part_of_the_page(run: Path, kind: str) -> None:
    (run / "looks").mkdir(exist_ok=True)
    path = run / "looks" / "answers-00000004.npz"
    path.unlink(missing_ok=True)
    if kind == "garbage":
        path.write_bytes(b"PK\x03\x04" + bytes(100))
    elif kind == "bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("images.npy", bytes(200 << 20))
    elif kind == "missing array":
        np.savez_compressed(path, images=np.zeros((1, 8, 8, 3), np.uint8))
    else:
        path.mkdir()
    text = page([run])
    assert "could not be drawn" in text and "Curves" in text


def test_a_dataset_of_the_same_annotations_is_that_of_training_however_it_was_prepped(tmp_path: Path) -> None:
    made = make_dataset(tmp_path, {"S": [4]})

    def of(plan: str, **options: Any) -> Any:
        said = msgspec.structs.replace(made.description, options=options)
        return msgspec.structs.replace(made, description=said, fingerprint=plan)

    origin = origin_of(of("a", annotations_sha256="1" * 64, context=2.0, split="train"), Recipe().data)
    run = {"dataset": origin.fingerprint, "facts": dict(origin.facts)}
    assert was_trained_on(run, of("a")) and was_trained_on(run, of("b", annotations_sha256="1" * 64, split="train"))
    for other in ({"annotations_sha256": "2" * 64, "split": "train"}, {"annotations_sha256": "1" * 64, "split": "val"}):
        assert not was_trained_on(run, of("b", **other))
    assert not was_trained_on({"dataset": "a"}, of("b", context=2.0))


@pytest.mark.parametrize("kind", ["{}", "file://{}"])
@pytest.mark.parametrize("name", [*(name for name in WRITTEN_LATER if name != "run.json"), "recipe.toml"])
def test_no_run_begins_where_its_files_would_replace_others(
    kind: str, name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    (tmp_path / name).write_text("mine")
    folder = open_run_folder(kind.format(tmp_path))
    if folder.remote:
        folder.remote.pull()
    with pytest.raises(UserError) as caught:
        choose_recipe(folder, None, (), resume=True)
    folder.close()
    said = caught.value.message
    assert f"{tmp_path} holds {name} and no run" in said and "\n" not in said
    assert tree(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize("kind", ["{}", "file://{}"])
@pytest.mark.parametrize("name", ["manifests/dataset.json", "manifests/plan.json"])
def test_no_run_begins_in_a_dataset(
    kind: str, name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    (tmp_path / "manifests").mkdir()
    (tmp_path / name).write_text("{}")
    folder = open_run_folder(kind.format(tmp_path))
    if folder.remote:
        folder.remote.pull()
    with pytest.raises(UserError, match=rf"holds a dataset \({name}\).*name another folder"):
        choose_recipe(folder, None, (), resume=True)
    folder.close()


def test_what_a_run_leaves_that_only_began_is_its_own(tmp_path: Path) -> None:
    job = small_job(tmp_path, f"model.backbone={PLAIN}", "optim.steps=4")
    (tmp_path / ".lock").touch()
    for name in WRITTEN_FOLDERS:
        (tmp_path / name).mkdir()
    (tmp_path / "recipe.toml").write_text(job.recipe.to_toml())
    assert choose_recipe(job.folder, job.recipe, (), resume=False) == job.recipe
    with pytest.raises(UserError, match=r"holds recipe\.toml and no run"):
        choose_recipe(job.folder, job.recipe, ("optim.steps=5",), resume=False)
    execute(job, synthetic(job))
    assert choose_recipe(job.folder, None, (), resume=True) == job.recipe


def test_a_run_that_took_no_step_leaves_no_page(tmp_path: Path) -> None:
    job = small_job(tmp_path)
    RunPage(tmp_path, job.recipe, job.origin).on_end(0)
    assert not tree(tmp_path)

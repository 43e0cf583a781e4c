"""Does the pre-training pay, on real images? `detect compare` on voc2007_224, at a size that ends.

    python bench/quality.py [--budget 560] [--arms scratch,jigsaw,...] [--seeds 3]

On a GPU: ResNet-50, Faster R-CNN FPN, batch norm that learns in every arm. On a CPU (or with --toy): ResNet-18, a few
steps and images, to see that it runs; its AP means nothing. Each training is meant to fit one ten-minute call on one
large GPU, and all of it is continued by calling the same command again. The dataset is looked for as bench/campaign/
data.py says. At the size that CPUs reach: bench/pays.py. Prints the tables and writes bench/results/quality.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.campaign.data import find, restricted
from bench.sample import ROOT, prep
from bench.timing import RESULTS

ARMS = (
    "scratch,jigsaw,jigsaw-frozen,jigsaw-cascade,global,block-wise,warp,resize,tau-0.5,tau-0.6,tau-0.8,tau-0.9,tau-1.0"
)

FULL = {
    "detect": (
        "model.name=faster-rcnn-fpn",
        "model.backbone=resnet50",
        "model.norm=sync-bn",
        "run.precision=bf16",
        "optim.steps=2500",
        "run.val_every=500",
        "run.checkpoint_every=250",
    ),
    "pretrain": (
        "model.backbone=resnet50",
        "data.batch=128",
        "optim.steps=2500",
        "optim.warmup_steps=100",
        "loss.erf_every=500",
        "run.checkpoint_every=250",
    ),
    "rates": "0.01,0.02,0.04",
}

TOY = {
    "detect": (
        "model.name=faster-rcnn-fpn",
        "model.backbone=resnet18",
        "model.norm=sync-bn",
        "optim.steps=3",
        "data.batch=2",
        "data.short_side=64",
        "model.neck_channels=32",
        "model.fc=64",
        "model.rois=32",
        "model.proposals=50",
        "run.checkpoint_every=2",
        "run.log_every=1",
    ),
    "pretrain": (
        "model.backbone=resnet18",
        "data.template_size=64",
        "data.template_split=32",
        "data.batch=4",
        "optim.steps=3",
        "optim.warmup_steps=1",
        "optim.lr_batch=64",
    ),
    "rates": "0.02",
}


def shrunk(source: Path, target: Path, images: int) -> Path:
    """The first images of a dataset, with copies of its files."""
    for part in ("train", "val"):
        document = restricted(source / part / "annotations.json", slice(images))
        (target / part / "images").mkdir(parents=True, exist_ok=True)
        for image in document["images"]:
            shutil.copyfile(
                source / part / "images" / image["file_name"], target / part / "images" / image["file_name"]
            )
        (target / part / "annotations.json").write_text(json.dumps(document))
    return target


def main() -> None:
    """Prep, then compare within the budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds voc2007_224")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality")
    parser.add_argument("--budget", type=float, help="seconds; the same command continues")
    parser.add_argument("--arms", help=f"default: {ARMS}; at toy size scratch,jigsaw")
    parser.add_argument("--seeds", type=int, help="default 3; at toy size 1")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--toy", action="store_true", help="the size that a CPU runs by default")
    options = parser.parse_args()
    began = time.monotonic()
    toy = options.toy or not torch.cuda.is_available()
    size = TOY if toy else FULL
    out = options.out.resolve() / ("toy" if toy else "full")
    data = find("voc2007_224", options.data)
    if toy:
        data = shrunk(data, out / "data", 24)
    shards = prep(data / "train", out / "shards-of-train", "--workers", options.workers)
    command = [
        sys.executable,
        "-m",
        "jigsaw_pretrain.detect",
        "compare",
        "--out",
        str(out / "comparison"),
        "--data",
        str(shards),
    ]
    for prefix, part in (("", "train"), ("val-", "val")):
        command += [f"--{prefix}annotations", str(data / part / "annotations.json")]
        command += [f"--{prefix}images", str(data / part / "images")]
    command += ["--arms", options.arms or ("scratch,jigsaw" if toy else ARMS), "--rates", str(size["rates"])]
    command += ["--seeds", str(options.seeds or (1 if toy else 3)), "--workers", str(0 if toy else options.workers)]
    command += [part for setting in size["detect"] for part in ("--set", setting)]
    command += [part for setting in size["pretrain"] for part in ("--pretrain-set", setting)]
    if options.budget:
        command += ["--budget", str(max(1.0, options.budget - (time.monotonic() - began)))]
    subprocess.run(command, check=True, cwd=ROOT)
    result = out / "comparison" / "comparison.json"
    if result.exists():
        report = {"date": time.strftime("%Y-%m-%d"), "toy": toy, **json.loads(result.read_text())}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "quality.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

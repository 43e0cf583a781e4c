"""Label-free pre-training by LightlyTrain of the campaign's backbone, for as many seconds as ours took.

    PEER/bin/python bench/campaign/peer.py --annotations TRAIN.json --images IMAGES --method simclr --seconds 71
        --out RUN

PEER is an environment of its own with `pip install lightly-train`; the project never depends on it. Its methods are
taken with their own settings, but for what ours has too: images of 128 x 128, batches of 32, bf16, one thread. Seconds
are this process's computing time from the first batch on, as a campaign's are; images are read and augmented by a
worker process, whose time is not counted (ours makes its jigsaws within its seconds). A few epochs say what a step
costs, and the training then has as many epochs as fit; the schedule is whole. Writes RUN/weights.pth (the backbone's
state dict) and then RUN/peer.json. Costs the seconds asked for, half a minute to start, and a second core that decodes.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

os.environ["OMP_NUM_THREADS"] = "1"
# Nothing of a benchmark is reported to anybody.
os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"

import torch
from torch import Tensor, nn

from bench.campaign.networks import resnet18_half

WEIGHTS, SUMMARY = "weights.pth", "peer.json"
BATCH, SIDE, CHANNELS = 32, 128, 256
TRIED_EPOCHS = 3
"""Epochs that say what a step costs, the first of which is not counted."""


class Wrapped(nn.Module):
    """The campaign's backbone as LightlyTrain takes it; notes this process's computing time at each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.network = resnet18_half()
        self.times: list[float] = []

    def get_model(self) -> nn.Module:
        """The backbone, whose weights are exported."""
        return self.network

    def feature_dim(self) -> int:
        """Channels of the last map."""
        return CHANNELS

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        """The last map, [n, 256, H / 32, W / 32]."""
        if self.training:
            self.times.append(time.process_time())
        return {"features": self.network(x)[-1]}

    def forward_pool(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """Its mean over positions, [n, 256, 1, 1]."""
        return {"pooled_features": x["features"].mean((2, 3), keepdim=True)}


def trained(out: Path, images: list[str], method: str, epochs: int, seed: int) -> tuple[Wrapped, float]:
    """The backbone after so many epochs, and the seconds of computing since its first batch."""
    import lightly_train

    torch.manual_seed(seed)
    model = Wrapped()
    lightly_train.pretrain(
        out=out,
        data=images,
        model=model,
        method=method,
        epochs=epochs,
        batch_size=BATCH,
        num_workers=1,
        accelerator="cpu",
        devices=1,
        precision="bf16-mixed",
        seed=seed,
        overwrite=True,
        transform_args={"image_size": (SIDE, SIDE)},
    )
    return model, time.process_time() - model.times[0]


def main() -> None:
    """Find out what an epoch costs, train for as many as fit, write the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, required=True, help="COCO JSON whose images are taken")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--method", required=True, help="simclr, dino: what needs no teacher to be downloaded")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    document = json.loads(options.annotations.read_text())
    images = [str(options.images / image["file_name"]) for image in document["images"]]
    tried, _ = trained(options.out / "tried", images, options.method, TRIED_EPOCHS, options.seed)
    per_epoch = len(tried.times) // TRIED_EPOCHS
    epoch_seconds = (tried.times[-1] - tried.times[per_epoch]) / (TRIED_EPOCHS - 1)
    epochs = max(1, round(options.seconds / epoch_seconds))
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(options.out / "run")
    model, seconds = trained(options.out / "run", images, options.method, epochs, options.seed)
    torch.save(model.network.state_dict(), options.out / WEIGHTS)
    found: dict[str, Any] = {"method": options.method, "epochs": epochs, "images": len(images), "seconds": seconds}
    (options.out / SUMMARY).write_text(json.dumps(found) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()

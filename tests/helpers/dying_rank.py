"""`pretrain` under torchrun, one of two ranks being killed at the second checkpoint of RUN: RUN, then options."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import tests.helpers.detection  # noqa: F401  (names the tests' small network to torchvision)
from jigsaw_pretrain.train.commands.pretrain import pretrain


def die_after(checkpoint: Path) -> None:
    """Kill this process when the file appears."""
    while not checkpoint.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        second = Path(sys.argv[1]) / "checkpoints" / "step-00000004.pt"
        threading.Thread(target=die_after, args=(second,), daemon=True).start()
    pretrain.main(["--run", *sys.argv[1:]], standalone_mode=False)

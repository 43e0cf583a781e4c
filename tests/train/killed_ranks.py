"""What test_killed_ranks.py lets two ranks do: a whole run, then the same one with a rank killed again and again.

Arguments: a folder, the kills as rank:step joined by commas, and a `pretrain` command without --run. Each kill is one
start of torchrun's; the whole run is made at the first.
"""

import os
import signal
import sys
import time
from pathlib import Path

from train import ranks
from train.batch import Batch
from train.loop import Loop
from train.pretrain import pretrain


def kill_at(rank: int, step: int, note: Path) -> None:
    """Have this process killed as it begins a step, if it is that rank; the time is noted before."""
    take = Loop.step

    def killed(self: Loop, batch: Batch, lanes: int, waited: float) -> None:
        if (self.job.ranks.rank, self.state.step) == (rank, step):
            note.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        take(self, batch, lanes, waited)

    Loop.step = killed  # type: ignore[method-assign]


if __name__ == "__main__":
    folder, kills, command = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]
    # Both runs are made in one group of ranks: joining another takes longer than they do.
    leave, ranks.finish = ranks.finish, lambda: None
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    (folder / f"began-{start}").write_text(str(time.time()))
    if not start:
        pretrain.main([*command, "--run", str(folder / "whole"), "--keep", "99"], standalone_mode=False)
    if start < len(kills):
        rank, step = map(int, kills[start].split(":"))
        kill_at(rank, step, folder / f"killed-{start}")
    pretrain.main([*command, "--run", str(folder / "killed"), "--resume"], standalone_mode=False)
    leave()

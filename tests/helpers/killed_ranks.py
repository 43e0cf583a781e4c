"""What test_pretrain_killed_ranks.py lets two ranks do: a whole run, then it again with a rank killed again and again.

Arguments: a folder, the kills as rank:step joined by commas, and a `pretrain` command without --run. Each kill is one
start of torchrun's; the whole run is made at the first. Called by itself, without torchrun, it forks its ranks.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from jigsaw_pretrain.train.commands.pretrain import pretrain
from jigsaw_pretrain.train.data.batch import Batch
from jigsaw_pretrain.train.engine import distributed
from jigsaw_pretrain.train.engine.trainer import Trainer
from tests.helpers.detection import TINY
from tests.helpers.ranks import fork_ranks


def kill_at(rank: int, step: int, note: Path) -> None:
    """Have this process killed as it begins a step, if it is that rank; the time is noted before."""
    take = Trainer.step

    def killed(self: Trainer[Any], batch: Batch, waited: float) -> None:
        if (self.ranks.rank, self.task.step) == (rank, step):
            note.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        take(self, batch, waited)

    Trainer.step = killed  # type: ignore[method-assign]


def play(folder: Path, kills: list[str], command: list[str]) -> None:
    """What one rank does from one start on."""
    assert any(TINY in one for one in command)
    # Both runs are made in one group of ranks: joining another takes longer than they do.
    leave, distributed.finish = distributed.finish, lambda: None
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    (folder / f"began-{start}").write_text(str(time.time()))
    if not start:
        pretrain.main([*command, "--run", str(folder / "whole"), "--keep", "99"], standalone_mode=False)
    if start < len(kills):
        rank, step = map(int, kills[start].split(":"))
        kill_at(rank, step, folder / f"killed-{start}")
    pretrain.main([*command, "--run", str(folder / "killed"), "--resume"], standalone_mode=False)
    leave()


if __name__ == "__main__":
    arguments = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        play(*arguments)
    else:
        fork_ranks(play, *arguments, restarts=len(arguments[1]))

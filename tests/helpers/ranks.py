"""Two ranks under torchrun's agent in one process: `fork_ranks`.

A rank that torchrun starts spends seven seconds on imports before it does anything; here they are made once, by the
process that forks the ranks. Everything else is torchrun's: the agent, its environment, signals, restarts. The wheel's
test starts torchrun itself.
"""

import os
from collections.abc import Callable

from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def fork_ranks(play: Callable[..., None], *arguments: object, restarts: int = 0) -> None:
    """Call ``play(*arguments)`` in two ranks, as `torchrun --standalone --nproc-per-node 2 --max-restarts N` would."""
    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id=f"forked-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.1,
        start_method="fork",
    )
    elastic_launch(agent, play)(*arguments)

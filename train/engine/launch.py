"""torchrun whose end is the ranks' own: ``python -m jigsaw_pretrain.train.engine.launch`` takes torchrun's arguments.

torchrun ends a run that Ctrl-C or SIGTERM stops, or whose rank refuses a wrong path, in a traceback of its own, some
dozens of lines below the one line that says what happened. Here that line stands last, and the status is the rank's: 2
for a mistake of the user's, 3 after a signal. The log of torch's launcher is shown where LOGLEVEL asks for it.

A module of its own, because it is a program, which starts the others.
"""

import logging
import os
import sys
from collections.abc import Sequence

from jigsaw_pretrain.errors import Interrupted


def main(arguments: Sequence[str]) -> int:
    """Run the ranks; the exit status."""
    if "LOGLEVEL" not in os.environ:
        logging.disable()
    # torchrun says at length that it would set this.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Its own 30 seconds may be less than a step and a checkpoint take. An option for it would be refused by torch 2.11.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "110")

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(list(arguments)))
    except SignalException:
        return Interrupted.exit_code
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return int(failure.exitcode)
        # It was killed, so that it has said nothing.
        sys.stderr.write(f"rank {rank} was ended by {failure.signal_name()}: the same command goes on, with --resume\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

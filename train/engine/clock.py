"""What training costs: seconds of the device, which is what arms of a comparison are held against.

On a GPU the wall clock, since a rank has its GPU to itself. On a CPU the seconds of computing that this process had:
other programs on its cores then change how long a run takes, not what it cost.
"""

import time
from collections.abc import Callable

import torch


def device_clock(device: torch.device) -> Callable[[], float]:
    """A clock whose differences are device-seconds."""
    return time.process_time if device.type == "cpu" else time.perf_counter

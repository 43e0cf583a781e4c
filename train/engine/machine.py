"""How a run uses the machine it is on: what may change its last bits, never what it is a run of.

These are command-line options, free to differ between two parts of one run; whatever changes the result is a key of the
recipe. Compiling takes a minute or two at the start and saves a tenth to a third of each step on a GPU; it is checked
before the first step and left out, aloud, where it fails. Determinism costs up to a third of the speed of a GPU.
"""

from dataclasses import dataclass

import torch

COMPILE = ("auto", "on", "off")


@dataclass(frozen=True)
class Machine:
    """compile: one of COMPILE, auto being on for GPUs. deterministic: the same bits each time, or an error."""

    compile: str = "auto"
    deterministic: bool = False

    def compiles(self, device: torch.device) -> bool:
        """Whether the model is to be compiled on that device."""
        return self.compile == "on" or (self.compile == "auto" and device.type == "cuda")

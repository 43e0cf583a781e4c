"""The command line of the training stage: `python -m train COMMAND`, or `jigsaw-train COMMAND` anywhere."""

import os

from jigsaw_pretrain.cli import LazyGroup

# Before torch is imported: its threads are to sleep at a barrier, not to spin there. Where loader workers or others
# share the cores that is 2.5 times as fast (2 cores, load 8: 16.5 jigsaws a second against 6.7); the bits are the same.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

main = LazyGroup(
    package="jigsaw_pretrain.train",
    help="Pre-train a backbone on jigsaws of a prepped detection dataset (see `jigsaw-prep`).",
    lazy={
        "pretrain": ("commands.pretrain:pretrain", "Pre-train a backbone, also under torchrun."),
        "estimate": (
            "commands.estimate:estimate",
            "Forecast a recipe's hours and GPU-days here, and what limits it.",
        ),
        "export": ("commands.export:export", "Write the backbone's weights under another library's names."),
        "evaluate": (
            "commands.evaluate:evaluate",
            "Print accuracy by region, group and class on a dataset's jigsaws.",
        ),
        "probe": (
            "commands.probe:probe",
            "Fit a linear probe on held-out crops, beside random weights.",
        ),
        "preview": ("commands.preview:preview", "Draw a sheet of jigsaws as the trainer sees them."),
        "erf": ("commands.erf:erf", "Draw the receptive field of any weights, and print its numbers."),
        "report": ("commands.report:report", "Write one HTML page about a run, or several side by side."),
        "digest": (
            "commands.digest:digest",
            "Print a line per step: which crops and pixels a batch holds.",
        ),
    },
    light=(),
)

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
        "pretrain": ("commands.pretrain:pretrain", "pre-train a backbone; also under torchrun"),
        "estimate": (
            "commands.estimate:estimate",
            "hours and GPU-days of a recipe on this machine, and what limits it",
        ),
        "export": ("commands.export:export", "write the backbone's weights under another library's names"),
        "evaluate": (
            "commands.evaluate:evaluate",
            "accuracy by region, group and class on a dataset's jigsaws",
        ),
        "probe": (
            "commands.probe:probe",
            "a linear probe of the features on held-out crops, beside random ones",
        ),
        "preview": ("commands.preview:preview", "a sheet of jigsaws as the trainer sees them"),
        "erf": ("commands.erf:erf", "the receptive field of any weights, drawn and in numbers"),
        "report": ("commands.report:report", "one HTML page about a run, or several side by side"),
        "digest": (
            "commands.digest:digest",
            "one line per step that says which crops and pixels a batch holds",
        ),
    },
)

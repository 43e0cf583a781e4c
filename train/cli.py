"""The command line of the training stage: `python -m train COMMAND`, or `jigsaw-train COMMAND` anywhere."""

from formats.commands import LazyGroup

main = LazyGroup(
    help="Pre-train a backbone on jigsaws of a prepped detection dataset (see `jigsaw-prep`).",
    lazy={
        "pretrain": ("train.pretrain:pretrain", "pre-train a backbone; also under torchrun"),
        "export": ("train.export:export", "write the backbone's weights under another library's names"),
        "evaluate": ("train.evaluate:evaluate", "accuracy by region, group and class on a dataset's jigsaws"),
        "probe": ("train.probe:probe", "a linear probe of the features on held-out crops, beside random ones"),
        "preview": ("train.preview:preview", "a sheet of jigsaws as the trainer sees them"),
        "erf": ("train.compare_fields:erf", "the receptive field of any weights, drawn and in numbers"),
        "report": ("train.report:report", "one HTML page about a run, or several side by side"),
        "digest": ("train.digest:digest", "one line a step that says which crops and pixels a batch holds"),
    },
)

"""The command line of the detection stage: `python -m detect COMMAND`, or `jigsaw-detect COMMAND` anywhere."""

from formats.commands import LazyGroup

main = LazyGroup(
    help="Fine-tune a detector from a backbone and report AP: does the pre-training pay?",
    lazy={
        "train": ("detect.train:train", "fine-tune a detector; also under torchrun"),
        "eval": ("detect.eval:evaluate", "AP of a run, or of a COCO results file"),
        "compare": ("detect.compare:compare", "pre-train, fine-tune and tabulate arms, or tabulate finished runs"),
    },
)

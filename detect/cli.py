"""The command line of the detection stage: `python -m detect COMMAND`, or `jigsaw-detect COMMAND` anywhere."""

from jigsaw_pretrain.cli import LazyGroup

main = LazyGroup(
    package="jigsaw_pretrain.detect",
    help="Fine-tune a detector from a backbone and report AP: does the pre-training pay?",
    lazy={
        "train": ("commands.train:train", "Fine-tune a detector, also under torchrun."),
        "eval": ("commands.eval:evaluate", "Print the AP of a run, or of a COCO results file."),
        "subset": ("commands.subset:write_subset", "Write the annotations of some of the images, for both stages."),
        "compare": (
            "commands.compare:compare",
            "Pre-train, fine-tune and tabulate arms, or tabulate finished runs.",
        ),
    },
    light=("subset",),
)

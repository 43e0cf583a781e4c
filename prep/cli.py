"""The command line of the prep stage: `python -m prep COMMAND`, or `jigsaw-prep COMMAND` anywhere."""

from jigsaw_pretrain.cli import LazyGroup

main = LazyGroup(
    package="jigsaw_pretrain.prep",
    help="Cut a detection dataset into shards of object and background crops, once.",
    lazy={
        "shards": ("commands.shards:shards", "Cut annotations and images into shards/ and manifests/."),
        "report": ("commands.report:report", "Write one HTML page that shows whether the crops are right."),
        "finish": ("commands.finish:finish_command", "Make the manifests after an array job's tasks."),
        "split": ("commands.split:split", "Split annotations to validate on a part, by image or group."),
        "doctor": ("commands.doctor:doctor", "Check a dataset before any work."),
        "status": ("commands.status:status", "Show how far a run has got."),
        "verify": (
            "commands.verify:verify",
            "Check every shard and crop; --repair cuts bad parts again.",
        ),
        "retry-skipped": ("commands.retry_skipped:retry_skipped", "Try images again that could not be used."),
        "sample-data": (
            "commands.sample_data:sample_data",
            "Draw a small detection dataset to try everything on.",
        ),
    },
)

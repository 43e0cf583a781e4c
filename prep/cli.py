"""The command line of the prep stage: `python -m prep COMMAND`, or `jigsaw-prep COMMAND` anywhere."""

from formats.commands import LazyGroup

main = LazyGroup(
    help="Cut a detection dataset into shards of object and background crops, once.",
    lazy={
        "shards": ("prep.shards:shards", "annotations and images -> shards/ and manifests/"),
        "report": ("prep.report:report", "one HTML page that shows whether the crops are right"),
        "sample-data": ("prep.sample:sample_data", "draw a small detection dataset to try everything on"),
    },
)

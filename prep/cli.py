"""The command line of the prep stage: `python -m prep COMMAND`, or `jigsaw-prep COMMAND` anywhere."""

from formats.commands import LazyGroup

main = LazyGroup(
    help="Cut a detection dataset into shards of object and background crops, once.",
    lazy={
        "shards": ("prep.shards:shards", "annotations and images -> shards/ and manifests/"),
        "report": ("prep.report:report", "one HTML page that shows whether the crops are right"),
        "finish": ("prep.finish:finish_command", "make the manifests after an array job's tasks"),
        "doctor": ("prep.doctor:doctor", "what is wrong with annotations and images, before any work"),
        "status": ("prep.status:status", "how far a run is, from its output alone"),
        "verify": ("prep.verify:verify", "re-hash and re-read everything; --repair cuts bad parts again"),
        "retry-skipped": ("prep.redo:retry_skipped", "try images again that could not be used"),
        "sample-data": ("prep.sample:sample_data", "draw a small detection dataset to try everything on"),
    },
)

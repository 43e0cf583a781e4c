"""How many images may be unusable before a run ends: ``--max-skipped``, a share of all images that are listed.

A dataset of which a tenth is missing is a mistake in the command, not in the data; one of which a thousandth is broken
is normal. What was done when the share is passed is kept. The share shapes no bytes and is not recorded: it may be
another one when the run goes on.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.skipped import count_reasons, most_common
from jigsaw_pretrain.formats.dataset import layout, schema
from jigsaw_pretrain.prep.records import PartRecord
from jigsaw_pretrain.storage import Storage, redacted

DEFAULT = "1%"


class Allowance:
    """Counts unusable images of one output; raises UserError as soon as they are more than the share."""

    def __init__(self, share: float, out: Storage, usable: int, at_plan: Counter[str]) -> None:
        self.share = share
        self._out = out.url
        self._reasons = Counter(at_plan)
        self._listed = usable + at_plan.total()
        self._broken = at_plan.total()

    def check(self) -> None:
        """Raise UserError where too many images are unusable."""
        if self._broken > self.share * self._listed:
            where, share = redacted(self._out), f"{100 * self.share:.4g}%"
            raise UserError(
                f"{self._broken:,} of {self._listed:,} images cannot be used, more than --max-skipped {share}: "
                f"{most_common(self._reasons)}. What was done is kept. Mend them and run `jigsaw-prep retry-skipped "
                f"--out {where}`, or go on without them: the same command with a larger --max-skipped, such as "
                f"{min(100, int(100 * self._broken / self._listed) + 1)}%."
            )

    def add(self, record: PartRecord) -> None:
        """Count in a part."""
        self._reasons += count_reasons(row.reason for row in record.skipped)
        self._broken += len(record.skipped)

    def watch(self, records: Iterable[PartRecord]) -> Iterator[PartRecord]:
        """The records as they come, each counted and checked."""
        for record in records:
            self.add(record)
            yield record
            self.check()


def allowance(share: float, out: Storage, usable: int) -> Allowance:
    """The allowance of an output that has a plan; usable: images that the plan could use."""
    table = schema.read_rows(out.read(layout.PLAN_SKIPPED))
    rows = table.select(["image_file", "annotation_id", "ordinal", "reason"]).to_pylist()
    reasons = [
        row["reason"]
        for row in rows
        if row["image_file"] is not None and row["annotation_id"] is None and row["ordinal"] is None
    ]
    return Allowance(share, out, usable, count_reasons(reasons))

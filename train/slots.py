"""Slots: which aspect group feeds which region of a jigsaw, also where a group is empty or thin (3.2 and the design).

Decided once from the groups' counts, as exact fractions; then a few integer operations a crop. A slot whose group is
empty belongs to the next group by aspect for good and advances that group's stream. A thin group, whose crops would be
drawn more than ``max_repeat`` times as often as those of the best-supplied group, feeds its slots only as often as that
allows, spread evenly over the positions; a substitute from the next group by aspect fills the rest, advancing nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.jigsaw import GROUPS
from jigsaw_pretrain.train.template import REGION_GROUPS

NAMES = {"S": "S (square)", "T": "T (tall)", "W": "W (wide)"}


@dataclass(frozen=True)
class Feed:
    """How one group's stream feeds its slots.

    regions: the regions it fills, in the order in which it is drawn from. share: the part of these slots that its own
    stream fills; a substitute from the group ``topped_up_from`` fills the others.
    """

    group: str
    regions: tuple[int, ...]
    share: Fraction
    topped_up_from: str | None = None

    def own_before(self, slot: int, lane: int, lanes: int) -> int:
        """How many crops a lane's stream has given before its ``slot``-th slot (position x len(regions) + ordinal).

        The lanes are out of step with each other, so that each batch holds about its share of the group.
        """
        top, bottom = self.share.numerator, self.share.denominator
        return (slot * top + lane * bottom // lanes) // bottom


@dataclass(frozen=True)
class Slots:
    """The feeds of a dataset (one a group that is drawn from) and the counts of crops by group they follow from."""

    feeds: tuple[Feed, ...]
    counts: Mapping[str, int]
    max_repeat: int

    def feed(self, group: str) -> Feed:
        """The feed of a group that has one."""
        return next(feed for feed in self.feeds if feed.group == group)

    def shares(self) -> dict[str, float]:
        """The expected share of each group in all crops drawn: they sum to 1."""
        drawn = {group: Fraction(0) for group in GROUPS}
        for feed in self.feeds:
            drawn[feed.group] += feed.share * len(feed.regions)
            if feed.topped_up_from:
                drawn[feed.topped_up_from] += (1 - feed.share) * len(feed.regions)
        return {group: float(value / len(REGION_GROUPS)) for group, value in drawn.items()}

    def notes(self) -> list[str]:
        """What a user should know before the run, in plain words: a line for each empty and each thin group."""
        lines = []
        for group in GROUPS:
            if not self.counts.get(group):
                stand_in = _stand_in(group, self.counts)
                lines.append(f"group {NAMES[group]} has no crops: its slots take {stand_in} crops instead")
        for feed in self.feeds:
            if feed.topped_up_from:
                lines.append(
                    f"group {NAMES[feed.group]} is thin ({self.counts[feed.group]:,} crops): it fills "
                    f"{float(feed.share):.2%} of its slots and {feed.topped_up_from} crops the others, so that none of "
                    f"its crops is drawn more than {self.max_repeat} times as often as one of the best-supplied group"
                )
        if lines:
            shares = ", ".join(f"{group} {share:.1%}" for group, share in self.shares().items())
            lines.append(f"effective shares of the crops drawn: {shares}")
        return lines


def by_aspect(group: str, counts: Mapping[str, int]) -> tuple[str, str]:
    """The other two groups, the next by aspect first; both are equally near to S, so the better supplied is first."""
    if group == "T":
        return ("S", "W")
    if group == "W":
        return ("S", "T")
    return ("T", "W") if counts.get("T", 0) >= counts.get("W", 0) else ("W", "T")


def _stand_in(group: str, counts: Mapping[str, int]) -> str:
    """The group that fills a group's slots: itself, or the next by aspect that has crops."""
    return next(other for other in (group, *by_aspect(group, counts)) if counts.get(other, 0) > 0)


def fill_slots(counts: Mapping[str, int], max_repeat: int = 20) -> Slots:
    """Decide the feeds from the number of crops in each group; raises UserError where all are empty."""
    if not any(counts.get(group, 0) > 0 for group in GROUPS):
        raise UserError("the dataset has no crops at all: prep it again from annotations with valid boxes")
    regions: dict[str, list[int]] = {}
    # The S pair comes first, so that a group standing in for others draws its own slots before theirs.
    for region, group in sorted(enumerate(REGION_GROUPS), key=lambda item: item[1] != "S"):
        regions.setdefault(_stand_in(group, counts), []).append(region)
    rate = {group: Fraction(len(filled), counts[group]) for group, filled in regions.items()}
    # Every non-empty group is drawn from: its own slots are never remapped.
    limit = max_repeat * min(rate.values())
    thin = [group for group in regions if rate[group] > limit]
    feeds = []
    for group, filled in regions.items():
        if group not in thin:
            feeds.append(Feed(group, tuple(filled), Fraction(1)))
            continue
        share = limit / rate[group]
        others = [other for other in by_aspect(group, counts) if other in regions and other not in thin]
        extra = {other: (1 - share) * len(filled) / counts[other] for other in others}
        # A neighbour that the top-up itself would make a thin group is passed over where the other one can take it.
        chosen = next((other for other in others if rate[other] + extra[other] <= limit), None)
        chosen = chosen or min(others, key=lambda other: rate[other])
        rate[chosen] += extra[chosen]
        feeds.append(Feed(group, tuple(filled), share, chosen))
    return Slots(tuple(feeds), dict(counts), max_repeat)

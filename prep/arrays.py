"""Array jobs: which parts are a task's, where a scheduler starts N copies of a command and nothing coordinates them.

Task I of N takes the parts I, I + N, I + 2N, ...: parts weigh alike, so tasks take alike long. Index and count come
from the scheduler's own variables where it sets them. Any task may be run again, at any time, on any machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jigsaw_pretrain.errors import UserError

_AWS, _KUBERNETES, _SLURM = "AWS_BATCH_JOB_ARRAY_INDEX", "JOB_COMPLETION_INDEX", "SLURM_ARRAY_TASK_ID"


@dataclass(frozen=True)
class ArrayTask:
    """Task ``index`` (from 0) of ``count``."""

    index: int
    count: int

    def mine(self, parts: int) -> range:
        """The parts of this task."""
        return range(self.index, parts, self.count)


def array_task(index: int | None, count: int | None, environment: Mapping[str, str]) -> ArrayTask | None:
    """The task that options or a scheduler's variables name; None where there is no array. Raises UserError."""
    source = "--task-index"
    if index is None:
        source, index = _scheduled(environment)
        if index is None:
            if count is not None:
                raise UserError("--task-count is given and no --task-index, nor does a scheduler tell it. Give both.")
            return None
    if count is None:
        known = {_SLURM: "SLURM_ARRAY_TASK_COUNT", _AWS: "AWS_BATCH_JOB_ARRAY_SIZE"}.get(source)
        count = _number(environment, known) if known else None
    if count is None:
        raise UserError(
            f"{source} says that this is task {index} of an array, and nothing says of how many. Give --task-count, or "
            f"unset {source} if this is no array job."
        )
    if not 0 <= index < count:
        raise UserError(f"There is no task {index} of {count}: tasks are numbered from 0 to {count - 1}.")
    return ArrayTask(index, count)


def _scheduled(environment: Mapping[str, str]) -> tuple[str, int | None]:
    """Which variable tells the index, and the index from 0."""
    if _SLURM in environment:
        # Slurm's ids are the user's own: --array=1-16 or 0-30:2.
        number, first = _number(environment, _SLURM), _number(environment, "SLURM_ARRAY_TASK_MIN") or 0
        step = _number(environment, "SLURM_ARRAY_TASK_STEP") or 1
        return _SLURM, None if number is None else (number - first) // step
    for name in (_AWS, _KUBERNETES):
        if name in environment:
            return name, _number(environment, name)
    return "", None


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "").strip()
    if not text:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{name} is {text!r}, not a number. Unset it, or give --task-index.") from error

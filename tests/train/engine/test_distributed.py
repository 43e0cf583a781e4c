"""Ranks in one process: who reports an error."""

import pytest

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.engine.distributed import rank_zero_errors


def test_only_rank_0_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        with rank_zero_errors():
            raise UserError("no")

    with pytest.raises(UserError):
        refuse()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ending:
        refuse()
    assert ending.value.code == 2

"""What a bar says of sources that bring nothing."""

from __future__ import annotations

import pytest

from engine_loader.loading.progress_bar import silence
from engine_loader.transfer.progress import Progress, Silence

LONG, LONGER = Silence("/engines/a/0", 3.2), Silence("/engines/b/7", 6.4)


@pytest.mark.parametrize(
    ("silent", "said"),
    [
        ((), ""),
        ((Silence("/engines/a/0", 2.9),), ""),
        ((LONG,), "nothing has come for 3 s from a/0"),
        ((LONGER, LONG), "nothing has come for 6 s from b/7 and 1 more"),
        ((LONGER, Silence("/engines/a/0", 1.0)), "nothing has come for 6 s from b/7"),
    ],
)
def test_a_source_is_named_once_it_has_been_silent_for_some_seconds(
    silent: tuple[Silence, ...], said: str
) -> None:
    assert silence(Progress(1, 2, silent)) == said

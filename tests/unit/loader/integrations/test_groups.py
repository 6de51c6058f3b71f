"""The ranks of a group read one content."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from engine_loader.errors import SourceLost, VersionUnavailable
from engine_loader.integrations.groups import read_one_content
from tests.support.sglang import Group

CONTENTS = ("a" * 32, "b" * 32)


class Catalogue:
    """Of a source that has gone on since."""

    def __init__(self, contents: Sequence[str] | None) -> None:
        self.contents = CONTENTS if contents is None else tuple(contents)
        self.was_asked_for = contents


def test_the_first_rank_chooses_the_contents_and_all_read_them() -> None:
    first = Group(rank=0, size=2)
    assert read_one_content(first, Catalogue).was_asked_for == CONTENTS
    second = Group(rank=1, size=2, said=first.said)
    assert read_one_content(second, Catalogue).was_asked_for == CONTENTS


def test_no_rank_waits_for_a_first_one_that_finds_nothing_and_each_says_why() -> None:
    def read(_: object) -> Catalogue:
        raise SourceLost("no such source")

    first = Group(rank=0, size=2)
    with pytest.raises(SourceLost, match="no such source"):
        read_one_content(first, read)
    second = Group(rank=1, size=2, said=first.said)
    with pytest.raises(VersionUnavailable, match="no such source"):
        read_one_content(second, Catalogue)

"""The journal of a page: a reader who has applied all that it was told has what is there."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from engine_cli.dashboard.journal import Changes, Journal, Key


def applied(known: dict[Key, Any], changes: Changes) -> dict[Key, Any]:
    after = {} if changes.whole else dict(known)
    for key, value in changes.entries:
        if value is None:
            after.pop(key, None)
        else:
            after[key] = value
    return after


def test_who_knows_nothing_gets_everything() -> None:
    journal = Journal()
    journal.put(("rank", "a/0"), 1)
    assert journal.since(None) == Changes(1, True, ((("rank", "a/0"), 1),))


def test_who_knows_all_gets_nothing() -> None:
    journal = Journal()
    journal.put(("rank", "a/0"), 1)
    assert journal.since(1) == Changes(1, False, ())


def test_the_same_value_again_is_no_change() -> None:
    journal = Journal()
    for _ in range(2):
        journal.put(("rank", "a/0"), {"state": "ready"})
    assert journal.revision == 1


def test_who_missed_more_deletions_than_are_remembered_gets_everything() -> None:
    journal = Journal(max_deletions=1)
    for name in ("a", "b", "c"):
        journal.put(("rank", name), 1)
    seen = journal.revision
    journal.delete(("rank", "a"))
    journal.delete(("rank", "b"))
    assert journal.since(seen) == Changes(5, True, ((("rank", "c"), 1),))


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 4), st.integers(0, 2)),
        st.tuples(st.just("delete"), st.integers(0, 4), st.just(0)),
        st.tuples(st.just("tell"), st.just(0), st.just(0)),
    )
)


@given(_STEPS)
def test_a_reader_who_is_told_now_and_then_has_what_is_there(
    steps: list[tuple[str, int, int]],
) -> None:
    journal, there = Journal(max_deletions=2), dict[Key, Any]()
    known, revision = dict[Key, Any](), None
    for step, name, value in [*steps, ("tell", 0, 0)]:
        key = ("rank", str(name))
        if step == "put":
            journal.put(key, value)
            there[key] = value
        elif step == "delete":
            journal.delete(key)
            there.pop(key, None)
        else:
            changes = journal.since(revision)
            known, revision = applied(known, changes), changes.revision
    assert known == there

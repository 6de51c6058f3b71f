"""The checker of histories finds each fault that it is for, and none in a good history."""

from __future__ import annotations

import pytest

from engine_registry.schema.keys import evicted_key
from engine_registry.schema.keyvalue import Change, Deletion, KeyValue
from engine_registry.schema.record_format import encode
from tests.support.builders import a_record
from tests.support.history import faults

KEY = a_record().key


def history(*steps: str) -> list[Change]:
    """`x` puts that incarnation's live record, `x!` its end, `-` deletes the key, `x evicted` ends
    it and marks it.
    """
    changes: list[Change] = []
    for revision, each in enumerate(steps, 1):
        who = each.rstrip("!").removesuffix(" evicted")
        record = a_record(incarnation=who, ended="" if who == each else "over")
        if each == "-":
            changes.append(Deletion(KEY, revision))
        else:
            changes.append(KeyValue(KEY, encode(record), revision, revision, 1))
        if each.endswith("evicted"):
            changes.append(KeyValue(evicted_key("qwen", 0, who), b"", revision, revision, 2))
    return changes


@pytest.mark.parametrize(
    "steps",
    [
        "",
        "a a a a! -",
        "a a! b b! c",
        "a - a a",  # a blip
        "a a! - a",
        "a|a evicted|-|b|b!|-",
        "a - b b! -",
    ],
)
def test_a_history_in_order_has_no_fault(steps: str) -> None:
    assert faults(history(*(steps.split("|") if "|" in steps else steps.split())), KEY) == []


@pytest.mark.parametrize(
    ("steps", "fault"),
    [
        ("a|b", "2: b took the rank from a, which had not ended"),
        ("a|a!|b|b!|a", "5: a is back after another has held the rank"),
        ("a|a evicted|-|a", "4: a is back after it was evicted"),
        ("a|a evicted|a", "3: a is back after it was evicted"),
        ("a|a!|b|a!", "4: the end of a stands over b"),
    ],
)
def test_each_fault_is_found(steps: str, fault: str) -> None:
    assert faults(history(*steps.split("|")), KEY) == [fault]


def test_other_keys_are_passed_over() -> None:
    other = a_record(rank=1)
    assert faults([*history("a"), KeyValue(other.key, encode(other), 9, 9, 1)], KEY) == []

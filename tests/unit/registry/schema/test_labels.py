"""Labels and selectors: the syntax of Kubernetes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from engine_registry.errors import InvalidField
from engine_registry.schema.labels import MAX_LABELS, Selector, check_labels, labels_text

LABELS = {"team": "search", "tier": "gold", "example.com/owner": "", "beta": "1"}


@pytest.mark.parametrize(
    "labels",
    [
        {},
        LABELS,
        {"a": "b"},
        {"A.b-c_9": "x_y.Z-0"},
        {"app.kubernetes.io/name": "vllm"},
        {"n" * 63: "v" * 63},
        {f"{'d' * 61}.{'e' * 61}/n": ""},
        {f"label-{number}": "" for number in range(MAX_LABELS)},
    ],
)
def test_labels_of_kubernetes_are_taken(labels: dict[str, str]) -> None:
    assert check_labels(labels) == labels


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"Te am": "x"}, ["label 'Te am'", "a name has at most 63 of"]),
        ({"": "x"}, ["label ''", "a name has"]),
        ({"-team": "x"}, ["label '-team'", "begins and ends with a letter or digit"]),
        ({"n" * 64: "x"}, ["a name has at most 63 of"]),
        ({"a/b/c": "x"}, ["label 'a/b/c'", "DNS name"]),
        ({"Example.com/team": "x"}, ["label 'Example.com/team'", "lower case"]),
        ({"/team": "x"}, ["label '/team'", "DNS name"]),
        ({f"{'d' * 254}/team": "x"}, ["253 characters"]),
        (
            {"team": "a b"},
            ["label 'team' has the value 'a b'", "a value is empty, or has at most 63"],
        ),
        ({"team": "v" * 64}, ["label 'team'", "63"]),
        ({"team": "x\n"}, ["label 'team'", r"'x\n'"]),
        ({"team\n": "x"}, [r"label 'team\n'"]),
        ({"team": 5}, ["label 'team' has the value 5"]),
        ({5: "x"}, ["label 5"]),
        ({f"label-{number}": "" for number in range(MAX_LABELS + 1)}, ["17 labels", "16 at most"]),
        (["team"], ["they are a mapping"]),
        (None, ["they are a mapping"]),
    ],
)
def test_other_labels_are_refused_with_the_label_and_the_rule(
    labels: Any, words: list[str]
) -> None:
    with pytest.raises(InvalidField) as caught:
        check_labels(labels)
    assert caught.value.details == {"field": "labels"}
    for word in words:
        assert word in caught.value.what


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("", True),
        (" ", True),
        ("team=search", True),
        ("team==search", True),
        ("team=ads", False),
        ("team", True),
        ("owner", False),
        ("example.com/owner", True),
        ("example.com/owner=", True),
        ("!team", False),
        ("!owner", True),
        ("! owner", True),
        ("team!=ads", True),
        ("team!=search", False),
        ("owner!=ads", True),
        ("team=search,tier=gold", True),
        ("team = search , tier != silver,beta", True),
        ("team=search,tier=silver", False),
    ],
)
def test_a_selector_chooses_where_all_of_its_terms_hold(text: str, chosen: bool) -> None:
    assert Selector.parse(text).matches(LABELS) is chosen


@pytest.mark.parametrize(
    "text",
    ["team=a,,tier=b", ",", "team in (a,b)", "!team=a", "=a", "!", "team=a=b", "team>5", "te am"],
)
def test_what_is_no_selector_is_refused_with_what_one_is(text: str) -> None:
    with pytest.raises(InvalidField) as caught:
        Selector.parse(text)
    assert caught.value.details["field"] in ("selector", "labels")


def test_terms_of_another_syntax_are_refused_with_the_syntax() -> None:
    with pytest.raises(InvalidField, match="does not select by a label") as caught:
        Selector.parse("team in (a,b)")
    assert caught.value.remedy.startswith("say KEY=VALUE, KEY!=VALUE, KEY or !KEY")


def test_labels_are_shown_by_name() -> None:
    assert labels_text({"tier": "gold", "beta": ""}) == "beta=,tier=gold"

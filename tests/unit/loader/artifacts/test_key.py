"""The name and the key of an artifact, and the model that stands for them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.artifacts.key import ArtifactName
from engine_registry import ModelIdentity
from engine_registry.errors import InvalidField

KEY = {"torch": "2.13.0", "device": "NVIDIA H200 9.0"}
KEYS = st.dictionaries(
    st.text("abcAZ09._-", min_size=1, max_size=8), st.text("abc é/=,", min_size=1), min_size=1
).filter(lambda key: len(key) <= 32)


def test_the_model_has_the_name_the_digest_and_the_key() -> None:
    model = ArtifactName("vllm", KEY).model
    assert (model.name, dict(model.extra)) == ("artifact/vllm", KEY)
    assert str(model) == "artifact/vllm@8df6b7e29abded2e"


@given(KEYS)
def test_the_order_of_the_key_does_not_matter_and_the_model_says_it_all(
    key: dict[str, str],
) -> None:
    one, two = ArtifactName("a", key), ArtifactName("a", dict(reversed(key.items())))
    assert one.model == two.model
    assert ArtifactName.of(one.model) == one


@given(KEYS, KEYS)
def test_other_keys_have_other_models(key: dict[str, str], other: dict[str, str]) -> None:
    same = ArtifactName("a", key).model == ArtifactName("a", other).model
    assert same == (key == other)


def test_the_differences_of_two_keys_are_told_by_field() -> None:
    wanted = ArtifactName("a", {"torch": "2.13.0", "device": "cpu", "python": "3.11"})
    other = ArtifactName("a", {"torch": "2.12.0", "device": "cpu", "vllm": "0.32.0"})
    assert wanted.differences(other) == [
        "python is missing, not '3.11'",
        "torch is '2.12.0', not '2.13.0'",
        "vllm is '0.32.0', not missing",
    ]


@pytest.mark.parametrize(
    "model",
    [
        None,
        ModelIdentity("llama"),
        ModelIdentity("artifact/a", "0" * 16, extra=KEY),
        ModelIdentity("artifact/a/b", extra=KEY),
        ModelIdentity("artifact/a"),
    ],
)
def test_other_models_are_no_artifacts(model: ModelIdentity | None) -> None:
    assert ArtifactName.of(model) is None


@pytest.mark.parametrize("name", ["", "a/b", ".a", "a-", "ä", "x" * 64, "a b", 7])
def test_names_that_are_not_valid_are_refused(name: Any) -> None:
    with pytest.raises(InvalidField, match="artifact name") as caught:
        ArtifactName(name, KEY)
    assert caught.value.details["field"] == "name"


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ({}, "1 to 32 fields"),
        (None, "1 to 32 fields"),
        ("torch=2", "1 to 32 fields"),
        ({str(number): "x" for number in range(33)}, "1 to 32 fields"),
        ({"a=b": "x"}, "the field 'a=b'"),
        ({7: "x"}, "the field '?7"),
        ({"torch": ""}, "the field torch of the key"),
        ({"torch": "x\n"}, "the field torch of the key"),
        ({"torch": "x" * 201}, "the field torch of the key"),
        ({"torch": 2}, "the field torch of the key"),
    ],
)
def test_keys_that_are_not_valid_are_refused(key: Any, reason: str) -> None:
    with pytest.raises(InvalidField, match=reason) as caught:
        ArtifactName("a", key)
    assert caught.value.details["field"] == "key"

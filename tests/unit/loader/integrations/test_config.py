"""The settings of an integration, as users write them in JSON."""

from __future__ import annotations

from typing import Any

import pytest

from engine_loader.integrations.config import IntegrationConfig
from engine_registry.errors import InvalidField


def test_nothing_given_means_the_defaults() -> None:
    assert IntegrationConfig.of(None) == IntegrationConfig.of({}) == IntegrationConfig()


def test_numbers_of_json_become_seconds() -> None:
    assert IntegrationConfig.of({"timeout_s": 5}).timeout_s == 5.0
    assert IntegrationConfig.of({"hold_s": 300}).hold_s == 300.0


def test_an_unknown_key_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidField) as caught:
        IntegrationConfig.of({"etdc": "127.0.0.1:2379"})
    assert caught.value.what == "the configuration of engine_registry has an unknown key: etdc"
    assert caught.value.details == {"field": "etdc"}
    known = caught.value.remedy.removeprefix("known are ").split(", ")
    assert {"etcd", "namespace", "model", "stage", "required"} <= set(known)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("etcd", 2379, "a text"),
        ("labels", "team=a", "a mapping of names to values"),
        ("host", None, "a text"),
        ("cacert", 1, "a text"),
        ("required", "yes", "true or false"),
        ("mirror", "auto", "true or false"),
        ("artifacts", 1, "true, false or a folder"),
        ("artifacts", "", "true, false or a folder"),
        ("stage", "raw", "one of auto, loaded, processed"),
        ("protocol", "http", "one of tcp, socket, rdma, nvlink_intra"),
        ("verify", "md5", "one of auto, header, digest"),
        ("verify", ["header"], "one of auto, header, digest"),
        ("timeout_s", "60", "a number of seconds"),
        ("without_etcd_s", -1, "a number of seconds"),
        ("hold_s", -1, "a number of seconds"),
        ("hold_s", "300", "a number of seconds"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(field: str, value: Any, expected: str) -> None:
    with pytest.raises(InvalidField) as caught:
        IntegrationConfig.of({field: value})
    assert caught.value.details["field"] == field
    assert field in caught.value.what
    assert expected in caught.value.what


def test_a_user_without_a_password_is_refused() -> None:
    with pytest.raises(InvalidField, match="both a user and a password"):
        IntegrationConfig.of({"user": "loader"})


def test_a_password_that_is_no_text_is_not_shown() -> None:
    with pytest.raises(InvalidField) as caught:
        IntegrationConfig.of({"user": "loader", "password": 12345})
    assert "12345" not in str(caught.value)


@pytest.mark.parametrize("values", ["etcd", 7, ["etcd"]])
def test_what_is_no_mapping_is_refused(values: object) -> None:
    with pytest.raises(InvalidField, match="give a mapping"):
        IntegrationConfig.of(values)

"""What every error of the packages says, and that it says the same behind a pipe."""

from __future__ import annotations

import json

from engine_loader import LoaderError, TornRead
from engine_registry import EngineRegistryError, EtcdRefused, RegistryError
from engine_registry.errors import from_wire


def test_an_error_has_what_happened_what_to_do_and_the_facts() -> None:
    error = TornRead("the weights changed", "load again", tries=5)
    assert (error.what, error.remedy, error.details) == (
        "the weights changed",
        "load again",
        {"tries": 5},
    )
    assert str(error) == "the weights changed: load again"
    assert str(TornRead("the weights changed")) == "the weights changed"


def test_one_base_catches_the_errors_of_both_packages() -> None:
    assert issubclass(RegistryError, EngineRegistryError)
    assert issubclass(LoaderError, EngineRegistryError)


def test_an_error_that_another_process_sent_is_the_same_error() -> None:
    error = EtcdRefused("etcd at a:1 refuses", "check `user`", reason="denied")
    found = from_wire(json.loads(json.dumps(error.to_wire())))
    assert (type(found), found.what, found.remedy, found.details) == (
        EtcdRefused,
        error.what,
        error.remedy,
        error.details,
    )

"""What variables of the environment say about etcd."""

from __future__ import annotations

import inspect

import pytest

from engine_registry import Registry
from engine_registry.errors import InvalidField
from engine_registry.etcd.environment import VARIABLES, settings_in


def test_each_parameter_of_a_connection_has_a_variable() -> None:
    parameters = set(inspect.signature(Registry.connect).parameters) - {"lazy"}
    assert set(VARIABLES) == parameters
    given = dict.fromkeys(VARIABLES.values(), "3")
    assert settings_in(given) == dict.fromkeys(VARIABLES, "3") | {"timeout_s": 3.0}


def test_variables_that_are_empty_or_mean_something_else_count_for_nothing() -> None:
    assert settings_in({"ENGINES_ETCD": "", "ENGINES_CONTEXT": "prod", "PATH": "/bin"}) == {}


def test_a_timeout_that_is_no_number_is_refused_by_its_variable() -> None:
    with pytest.raises(InvalidField, match="ENGINES_TIMEOUT 'soon' is no number of seconds"):
        settings_in({"ENGINES_TIMEOUT": "soon"})


def test_a_registry_of_the_environment_is_connected_as_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ENGINES_ETCD", "10.0.0.5:2379,10.0.0.6:2379")
    monkeypatch.setenv("ENGINES_NAMESPACE", "prod")
    with Registry.from_env(lazy=True) as registry:
        assert [str(one) for one in registry.config.endpoints] == ["10.0.0.5:2379", "10.0.0.6:2379"]
        assert registry.config.namespace == "prod"

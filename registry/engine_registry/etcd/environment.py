"""How to reach etcd, as variables of the environment say it. Pure: the environment is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine_registry.errors import InvalidField

# by parameter of `Registry.connect`
VARIABLES = {
    "endpoints": "ENGINES_ETCD",
    "namespace": "ENGINES_NAMESPACE",
    "timeout_s": "ENGINES_TIMEOUT",
    "cacert": "ENGINES_CACERT",
    "cert": "ENGINES_CERT",
    "key": "ENGINES_KEY",
    "user": "ENGINES_USER",
    "password": "ENGINES_ETCD_PASSWORD",
}


def settings_in(environ: Mapping[str, str]) -> dict[str, Any]:
    """The parameters of `Registry.connect` that are set there. Empty values count as not set.

    InvalidField where the timeout is no number.
    """
    found: dict[str, Any] = {
        name: environ[variable] for name, variable in VARIABLES.items() if environ.get(variable)
    }
    if "timeout_s" in found:
        try:
            found["timeout_s"] = float(found["timeout_s"])
        except ValueError as exc:
            raise InvalidField(
                f"{VARIABLES['timeout_s']} {found['timeout_s']!r} is no number of seconds",
                field="timeout_s",
            ) from exc
    return found

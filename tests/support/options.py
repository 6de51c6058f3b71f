"""Arguments of the loader's calls with the options among them by name, as helpers of tests take
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from engine_loader import LoadOptions, PublishOptions


def for_load(given: Mapping[str, Any]) -> dict[str, Any]:
    """With LoadOptions in `options`."""
    return _grouped(given, "options", LoadOptions())


def for_publish(given: Mapping[str, Any]) -> dict[str, Any]:
    """With PublishOptions in `options`."""
    return _grouped(given, "options", PublishOptions())


def for_start(given: Mapping[str, Any]) -> dict[str, Any]:
    """As `load_or_seed` takes them; a version is that of the files."""
    return _grouped(_grouped(given, "publish", PublishOptions()), "load", LoadOptions())


def _grouped(
    given: Mapping[str, Any], argument: str, default: LoadOptions | PublishOptions
) -> dict[str, Any]:
    names = {field.name for field in fields(default)}
    mine = {name: value for name, value in given.items() if name in names}
    others = {name: value for name, value in given.items() if name not in names}
    return {**others, argument: replace(others.get(argument, default), **mine)}

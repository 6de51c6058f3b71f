"""Public names of a package that are imported from their modules when they are first used (PEP
562).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazily(
    package: str, module_of: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of the package.

    `module_of` has the module inside it that defines each public name.
    """
    names = vars(sys.modules[package])

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = names[name] = getattr(import_module(f"{package}.{module_of[name]}"), name)
        return found

    def listed() -> list[str]:
        return sorted({*names, *module_of})

    return get, listed

"""The public names of the packages: what a type checker sees is what there is, and importing a
package is quick.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import engine_loader
import engine_registry

PACKAGES = [engine_registry, engine_loader]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_a_type_checker_sees_the_names_that_there_are_and_where(package: ModuleType) -> None:
    path = inspect.getfile(package)
    conditions = [
        node for node in ast.parse(Path(path).read_text("utf-8")).body if isinstance(node, ast.If)
    ]
    (for_checkers,) = [node for node in conditions if ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for node in for_checkers.body if isinstance(node, ast.ImportFrom)]
    name = package.__name__
    seen = {
        alias.name: str(node.module)
        for node in imports
        for alias in node.names
        if str(node.module).startswith(name)
    }
    assert seen == {public: f"{name}.{module}" for public, module in package._MODULE_OF.items()}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_name_can_be_had_from_the_package(package: ModuleType) -> None:
    for public in package._MODULE_OF:
        assert getattr(package, public) is not None
        assert public in dir(package)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_error_is_public(package: ModuleType) -> None:
    errors = importlib.import_module(f"{package.__name__}.errors")
    own = {
        name
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and kind.__module__ == errors.__name__
    }
    assert {name for name in own if issubclass(getattr(errors, name), Exception)} <= set(
        package._MODULE_OF
    )


def test_a_function_is_had_whatever_was_imported_before() -> None:
    """A module that is imported becomes an attribute of its package, in place of a function of its
    name.
    """
    code = """
import importlib, os, sys, torch
for first in sys.argv[1:]:
    if os.fork() == 0:  # as torch takes longest
        importlib.import_module(first)
        from engine_loader import load, publish
        assert callable(load)
        assert callable(publish)
        os._exit(0)
    assert os.wait()[1] == 0, first
"""
    first = ["engine_loader.loading.load", "engine_loader.publishing.publish", "engine_loader"]
    subprocess.run([sys.executable, "-c", code, *first], check=True)


def test_importing_the_packages_and_their_errors_brings_neither_torch_nor_grpc() -> None:
    code = (
        "import sys, engine_registry, engine_loader; from engine_loader import TornRead; "
        "from engine_registry import EtcdError; "
        "print(*sys.modules)"
    )
    modules = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert {"torch", "grpc", "etcd3", "mooncake", "numpy", "prometheus_client"} & set(
        modules
    ) == set()


def undocumented(package: ModuleType) -> Iterator[str]:
    """Public classes and functions, and their public methods and properties, without a docstring of
    their own or of a base.
    """
    for public in package._MODULE_OF:
        found = getattr(package, public)
        if not (inspect.isclass(found) or inspect.isfunction(found)):
            continue
        if not found.__doc__ or found.__doc__.startswith(
            f"{public}("
        ):  # what a dataclass writes by itself
            yield public
        if not inspect.isclass(found):
            continue
        for name in vars(found):
            member = getattr(found, name)
            if (
                not name.startswith("_")
                and (callable(member) or isinstance(member, property))
                and not inspect.getdoc(member)
            ):
                inherited = [getattr(base, name, None) for base in found.__mro__[1:]]
                if not any(inspect.getdoc(each) for each in inherited if each is not None):
                    yield f"{public}.{name}"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_name_has_a_docstring(package: ModuleType) -> None:
    assert list(undocumented(package)) == []

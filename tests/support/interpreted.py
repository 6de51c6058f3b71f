"""Kernels of Triton without a GPU: Triton's interpreter runs them, on the host's memory.

TRITON_INTERPRET would do that for all of a process and of those that it starts, and only if it were
set before anything imports triton.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

# The interpreter changes triton.language while a kernel runs, and so do we.
_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def interpreted(name: str) -> Iterator[ModuleType]:
    """A copy of that module whose kernels the interpreter runs, until the end of the block."""
    module = copy_of(name)
    functions = _functions_of_triton()
    with _ONE_AT_A_TIME:
        before = [(each, dict(vars(each))) for each in _parts_of_triton()]
        for each, replacements in functions:
            for function, replacement in replacements.items():
                setattr(each, function, replacement)
        try:
            yield module
        finally:
            for each, content in before:
                _restore(each, content)


def _parts_of_triton() -> list[Any]:
    """What the interpreter changes, which does not change all of it back."""
    import triton.language as tl

    classes = [each for each in vars(tl.core).values() if inspect.isclass(each)]
    ours = [each for each in classes if each.__module__ == tl.core.__name__]
    return [tl, tl.core, tl.standard, tl.math, *ours]


def _restore(part: Any, content: dict[str, Any]) -> None:
    for name, value in dict(vars(part)).items():
        if name in content:
            if value is not content[name]:
                setattr(part, name, content[name])
        elif inspect.isclass(part):  # names in modules are what rewritten functions refer to
            delattr(part, name)


@functools.cache
def copy_of(name: str) -> ModuleType:
    """The module of `interpreted`: always the same for a name."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for kernel, replacement in _interpreted_in(module).items():
        setattr(module, kernel, replacement)
    return module


@functools.cache
def _functions_of_triton() -> list[tuple[ModuleType, dict[str, Any]]]:
    """Those that are kernels themselves, such as `tl.sum`."""
    import triton.language as tl

    # The first launch imports it, and it has to find them as they are.
    importlib.import_module("triton.experimental.gluon")
    return [(module, _interpreted_in(module)) for module in (tl, tl.standard)]


def _interpreted_in(module: ModuleType) -> dict[str, Any]:
    from triton.runtime.jit import JITFunction

    found = inspect.getmembers(module, lambda each: isinstance(each, JITFunction))
    return {name: _by_interpreter(function) for name, function in found}


@functools.cache
def _by_interpreter(function: Any) -> Any:
    """The same for the same function, whichever module has it."""
    from triton.runtime.interpreter import InterpretedFunction

    return InterpretedFunction(function.fn)

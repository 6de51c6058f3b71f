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
    with _ONE_AT_A_TIME:
        compiled = _exchange(_functions_of_triton())
        try:
            yield module
        finally:
            _exchange(compiled)


Functions = list[tuple[ModuleType, dict[str, Any]]]


def _exchange(functions: Functions) -> Functions:
    """Those that were there before."""
    before = [
        (module, {name: getattr(module, name) for name in each}) for module, each in functions
    ]
    for module, each in functions:
        for name, function in each.items():
            setattr(module, name, function)
    return before


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
def _functions_of_triton() -> Functions:
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

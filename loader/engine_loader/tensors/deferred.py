"""Modules that are built where there is no room for all of their parameters.

Their memory lies there already, as another process has left it, and is adopted as soon as they are
built. Until then large parameters are on the meta device, each from the moment at which its module
becomes a part of another one. Where nothing is adopted after all, they get memory with the values
that they had. So only parameters are deferred that have one value throughout: engines fill most of
them later, and until then torch writes one value to all elements of those. Starts no thread.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from engine_loader.tensors.meta import fixed, like
from engine_loader.tensors.modes import plain_torch
from engine_loader.tensors.usable import references

_LEAST_NBYTES = 1 << 20
_CHUNK = 16 << 20  # elements that are compared at once
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
_OUR_REFERENCES = 2  # to a parameter that no module has: that of `_Param`, and of the question


@dataclass
class _Param:
    """One that is on the meta device."""

    param: nn.Parameter
    value: int  # the bits of each element


class Deferred:
    """The large parameters of modules that are built in the block of `deferred_parameters`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._looked_at: dict[int, nn.Parameter] = {}  # by id
        self._params: list[_Param] = []

    @property
    def nbytes(self) -> int:
        """What those take that have no memory yet."""
        return sum(one.param.nbytes for one in self._params if one.param.is_meta)

    @plain_torch()
    def give_memory(self) -> None:
        """Each that has no memory yet gets some where it was, with the value that it had. They stay
        the same objects. Any number of times. Raises torch.OutOfMemoryError.
        """
        while self._params:
            one = self._params[-1]
            if one.param.is_meta:
                _swap(one.param, self.device, one.value)
            self._params.pop()

    @plain_torch()
    def _defer(self, parent: nn.Module, name: str, module: nn.Module | None) -> None:
        """A module, which is complete, becomes a part of another one."""
        if module is None:
            return
        for param in module.parameters():
            if id(param) not in self._looked_at:
                self._looked_at[id(param)] = param
                if param.device != self.device or not _fits(param):
                    continue
                if (value := _value_of(param)) is not None:
                    self._params.append(_Param(param, value))
                    _swap(param, torch.device("meta"))

    def _built(self) -> None:
        """Parameters that others took the place of meanwhile, as of tied ones, get no memory."""
        self._looked_at.clear()
        self._params = [one for one in self._params if sys.getrefcount(one.param) > _OUR_REFERENCES]


@contextmanager
def deferred_parameters(device: torch.device) -> Iterator[Deferred]:
    """Modules that this thread builds in the block have no memory for large parameters there.

    What other threads build meanwhile has none, either. Code that writes to such a parameter after
    its module has become a part of another one changes nothing.
    """
    deferred = Deferred(device)
    before = torch._C._get_deterministic_algorithms()
    warn_only = torch._C._get_deterministic_algorithms_warn_only()
    hook = register_module_module_registration_hook(deferred._defer)
    try:
        torch._C._set_deterministic_algorithms(True, warn_only=True)  # it fills `torch.empty` then
        yield deferred
    finally:
        torch._C._set_deterministic_algorithms(before, warn_only=warn_only)
        hook.remove()
        deferred._built()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _fits(param: Any) -> bool:
    """Whether it is large, and plain memory that only it uses."""
    if is_lazy(param) or param.is_meta or param.nbytes < _LEAST_NBYTES:
        return False
    if is_traceable_wrapper_subclass(param) or fixed(param):
        return False
    return references(param) == 1 and param.untyped_storage().nbytes() == param.nbytes


def _value_of(param: nn.Parameter) -> int | None:
    """The bits of its elements, if all of them are alike."""
    if (dtype := _BITS.get(param.itemsize)) is None:
        return None
    elements = torch.empty(0, dtype=dtype, device=param.device).set_(param.untyped_storage())
    value = int(elements[0])
    small = 1 << 10  # most that are not alike differ in the first few
    for start, end in ((0, small), *((at, at + _CHUNK) for at in range(0, len(elements), _CHUNK))):
        if not bool((elements[start:end] == value).all()):
            return None
    return value


def _swap(param: nn.Parameter, device: torch.device, value: int = 0) -> None:
    """It lies on that device from now on, where each element has those bits."""
    fresh = torch.empty_strided(param.size(), param.stride(), dtype=param.dtype, device=device)
    if not fresh.is_meta:
        bits = torch.empty(0, dtype=_BITS[param.itemsize], device=device)
        bits.set_(fresh.untyped_storage()).fill_(value)
    torch.utils.swap_tensors(param, like(param, fresh))

"""Tensors on the meta device, which have no memory: modules that are built with such parameters,
and tensors like them that have some.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from engine_loader.tensors.shards import is_sharded
from engine_loader.tensors.usable import is_dense

_BUILDING = threading.RLock()  # `nn.Module` is changed for all threads


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Puts each parameter that a module gets on the meta device. Buffers keep their values.

    A module that is all on the meta device would lose the buffers that it computes when it is
    built, and that no checkpoint has. Tied parameters stay tied. Other threads that build modules
    meanwhile get theirs on the meta device, too.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            on_meta = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            vars(on_meta).update(vars(param))
            param = on_meta
        register(module, name, param)

    with _BUILDING:
        nn.Module.register_parameter = register_on_meta  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def fixed(tensor: Any) -> str:
    """Why another tensor cannot take its place, as `torch.utils.swap_tensors` does it. Empty where
    one can.
    """
    if tensor.layout is not torch.strided or not is_dense(tensor):
        return "not contiguous in any order of its dimensions"
    if weakref.getweakrefs(tensor):
        return "weakly referred to, so nothing can take its place"
    if tensor._use_count() > 1:
        return "used by a view or by autograd, so it cannot be replaced"
    return ""


def like(tensor: Any, view: torch.Tensor) -> torch.Tensor:
    """The same with that memory, which for a DTensor is its part. It can take the tensor's place by
    `torch.utils.swap_tensors`.
    """
    made: torch.Tensor
    if is_sharded(tensor):
        made = type(tensor).from_local(
            view,
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(made, requires_grad=tensor.requires_grad)
    else:
        made = torch.Tensor._make_subclass(type(tensor), view, tensor.requires_grad)
    for name, value in vars(tensor).items():  # engines hang loaders and layouts on parameters
        vars(made).setdefault(name, value)
    return made

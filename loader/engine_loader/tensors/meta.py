"""Modules that are built without memory for their parameters."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

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

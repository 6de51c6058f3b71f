"""Lets SGLang's wheel run on a CPU. Python imports this when it starts, where its folder is on
the path.

SGLang imports packages of GPU kernels that it calls on GPUs only. They become modules whose every
name is an object that does nothing. torchvision's wheel for GPUs lacks its operators beside a torch
for CPUs, so they are declared before it is imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from typing import Any

_KERNELS = {"sgl_kernel", "flashinfer", "deep_ep", "triton_kernels", "soundfile"}


class Nothing:
    """Takes every call, and every name."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        decorates = len(args) == 1 and callable(args[0]) and not kwargs
        return args[0] if decorates else Nothing()

    def __getattr__(self, name: str) -> Any:
        return _attribute(name)

    def __getitem__(self, _: Any) -> Any:
        return Nothing()

    def __mro_entries__(self, _: Any) -> tuple[type, ...]:
        return (object,)

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __or__(self, _: Any) -> Any:
        return Nothing

    __ror__ = __or__


class Kernels(types.ModuleType):
    """A package of which only its name is there."""

    def __getattr__(self, name: str) -> Any:
        return _attribute(name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """After all others: a package that is installed is imported."""

    def find_spec(self, name: str, _: Any, __: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in _KERNELS:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = Kernels(spec.name)
        module.__path__ = []
        module.__dict__["__version__"] = "99.0"
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class Operators(importlib.abc.MetaPathFinder):
    """Before all others, and finds nothing."""

    library: Any = None

    def find_spec(self, name: str, _: Any, __: Any = None) -> None:
        if name == "torchvision" and self.library is None:
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(
                    f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )


def _attribute(name: str) -> Any:
    if name.startswith("__") and name.endswith("__"):
        raise AttributeError(name)
    return Nothing()


sys.meta_path.append(Finder())
sys.meta_path.insert(0, Operators())
